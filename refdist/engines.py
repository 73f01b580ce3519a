"""Local engines of ipyparallel, started, named and stopped in one place.

An engine is a process that runs what a notebook sends it. Here its id is its rank, and the cells
marked ``%%px`` run on all engines and show their output in rank order.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ipyparallel
import psutil

_GRACE_SECONDS = 1.0
_SETTINGS = {
    "OMP_NUM_THREADS": "1",  # four engines share the few cores of a laptop
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection would fill a notebook with stack traces
}


_BIND_PORT = """
from refdist.store import listen as _listen
listen_socket = _listen("127.0.0.1", 0)
port = listen_socket.getsockname()[1]
"""


class LocalEngines:
    """``n`` engines on this machine, as an object or as a context manager.

    Each engine has imported torch and refdist, and has these names::

        rank            its id, 0 to n - 1
        world_size      n
        port            a free port of 127.0.0.1
        listen_socket   on rank 0, a socket that is bound to it; else None

    In a notebook, ``%%px`` runs a cell on all of them. The engines end with ``stop``, and at the
    latest a few seconds after the process that started them.

    Args:
        n: how many engines, at least 1.
        timeout: seconds until starting fails.
        environment: variables for the engines, besides those of this process.

    Raises:
        ValueError: ``n`` is below 1.
        TimeoutError: the engines did not all start in time. None of them is left.
    """

    def __init__(
        self, n: int = 4, *, timeout: float = 60.0, environment: dict[str, str] | None = None
    ) -> None:
        if n < 1:
            raise ValueError(f"n={n}: must be at least 1")
        self.n = n
        self.pids: list[int] = []
        self._stopped = False
        # a profile of its own: the user's may start its engines on another machine
        self._profile = tempfile.mkdtemp(prefix="refdist-engines-")
        self._cluster = ipyparallel.Cluster(
            n=n,
            profile_dir=self._profile,
            controller_ip="127.0.0.1",
            engine_launcher_class="local",
            controller_launcher_class="local",
            log_level=logging.ERROR,
            send_engines_connection_env=True,
        )
        settings = _SETTINGS | dict(os.environ) | (environment or {})
        self._cluster.config.LocalEngineLauncher.environment = settings
        try:
            self._start(timeout)
        except BaseException:
            self.stop()
            raise

    def _start(self, timeout: float) -> None:
        self._cluster.start_cluster_sync()
        self.client = self._cluster.connect_client_sync()
        self.client.wait_for_engines(self.n, interactive=False, timeout=timeout)
        self.view = self.client[sorted(self.client.ids)]
        self.view.block = True
        self.pids = self.view.apply_sync(
            _start_watching, os.getpid(), self._cluster.controller.pid, self._profile
        )
        for rank, engine in enumerate(self.client.ids):
            self.client[engine].push({"rank": rank, "world_size": self.n}, block=True)
        self.view.execute("import torch, refdist", block=True)
        self.offer_port()
        self._show_in_rank_order()

    def offer_port(self, rank: int = 0) -> None:
        """Bind a free port on one engine and tell all: new ``port`` and ``listen_socket``.

        Each group that lives at the same time as another needs a port of its own. Engines that
        are dead or stopped are not told.

        Args:
            rank: the engine that is to be rank 0 of the group.
        """
        first = self.view.targets[rank]
        others = [self.view.targets[other] for other in self.answering() if other != rank]
        self.client[first].execute(_BIND_PORT, block=True)
        port: int = self.client[first].pull("port", block=True)
        if others:
            self.client[others].push({"port": port, "listen_socket": None}, block=True)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, world_size, *arguments)`` on every engine at once.

        Returns:
            The results in rank order.

        Raises:
            ipyparallel.error.RemoteError: it raised on an engine; that of the lowest rank.
        """
        started = [
            self.client[engine].apply_async(function, rank, self.n, *arguments)
            for rank, engine in enumerate(self.view.targets)
        ]
        return [result.get() for result in started]

    def gather(self, name: str) -> list[Any]:
        """The value of a variable on every engine, in rank order."""
        values: list[Any] = self.view.pull(name, block=True)
        return values

    def answering(self) -> list[int]:
        """The ranks whose engines are neither dead nor stopped."""
        return [rank for rank, pid in enumerate(self.pids) if _answers(pid)]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one engine, such as SIGINT, SIGSTOP, SIGCONT or SIGKILL."""
        os.kill(self.pids[rank], number)

    def stop(self) -> None:
        """End the engines and their controller. Stopping again does nothing."""
        if self._stopped:
            return
        self._stopped = True
        started = self._processes()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()  # a frozen engine would not hear that it shall end
        try:
            self._cluster.stop_cluster_sync()
        finally:
            if hasattr(self, "client"):
                self.client.close()
            _, alive = psutil.wait_procs(started, timeout=_GRACE_SECONDS)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=_GRACE_SECONDS)
            shutil.rmtree(self._profile, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """The engines, the controller, and the processes that these started."""
        controller = getattr(self._cluster.controller, "pid", None)
        found = []
        for pid in [*self.pids, controller]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if pid is not None:
                    process = psutil.Process(pid)
                    found += [process, *process.children(recursive=True)]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"LocalEngines(n={self.n}, {'stopped' if self._stopped else 'running'})"

    def _show_in_rank_order(self) -> None:
        """Make ``%%px`` use these engines, print output sorted by rank, and show no bars."""
        try:
            from IPython.core.getipython import get_ipython
        except ImportError:
            return
        if get_ipython() is not None:
            self.view.activate()
            get_ipython().run_line_magic("pxconfig", "--no-stream --progress-after=-1")


def _answers(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        silent = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED}
        return psutil.Process(pid).status() not in silent
    return False


def _start_watching(parent: int, controller: int, profile: str) -> int:
    """On an engine: end with the process that started the engines. Returns the engine's pid.

    A notebook's kernel that is killed can stop neither its engines nor their controller.
    """
    import contextlib
    import os
    import shutil
    import threading
    import time

    import psutil

    owner = psutil.Process(parent)

    def watch() -> None:
        # a zombie is dead, and a process with the same number but another start is not the owner
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(controller).terminate()
        for nanny in psutil.Process().children():
            nanny.kill()
        shutil.rmtree(profile, ignore_errors=True)
        psutil.Process().kill()

    threading.Thread(target=watch, daemon=True, name="refdist-watch").start()
    return os.getpid()
