"""Engines of ipyparallel, started, named and stopped in one place.

An engine is a process that runs what a notebook sends it. Here its id is its rank, and the cells
marked ``%%px`` run on all engines and show their output in rank order.

The engines run on this machine, unless the environment variable ``REFDIST_PROFILE`` names a profile
of ipyparallel, or its folder. Then the profile's ``ipcluster_config.py`` says where and how they
are started: by MPI, by SSH, by Slurm, or by any other launcher that ipyparallel has.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ipyparallel
import psutil

PROFILE = "REFDIST_PROFILE"
_LOCAL = "127.0.0.1"
_QUEUE_SECONDS = 600.0  # a cluster may let its jobs wait
_GRACE_SECONDS = 1.0
_SETTINGS = {
    "OMP_NUM_THREADS": "1",  # four engines share the few cores of a laptop
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection would fill a notebook with stack traces
}


_PREPARE = """
import os as _os
for _name, _value in _settings.items():
    _os.environ.setdefault(_name, _value)
_os.environ.update(_environment)
import torch, refdist
"""

# the address from which an engine reaches the controller is one that the other engines reach
_BIND_PORT = """
import socket as _socket
from refdist.store import listen as _listen
with _socket.socket(type=_socket.SOCK_DGRAM) as _probe:
    _probe.connect((_controller, 9))  # sends nothing
    host = _probe.getsockname()[0]
listen_socket = _listen(host, 0)
port = listen_socket.getsockname()[1]
"""


class LocalEngines:
    """``n`` engines on this machine, or on those of a profile, as an object or context manager.

    Each engine has imported torch and refdist, and has these names::

        rank            its id, 0 to n - 1
        world_size      n
        host            an address of rank 0's machine: 127.0.0.1 if all run on this one
        port            a free port of it
        listen_socket   on rank 0, a socket that is bound to it; else None

    In a notebook, ``%%px`` runs a cell on all of them. The engines end with ``stop``, and at the
    latest a few seconds after the process that started them, if any of them runs on its machine;
    else ``ipcluster stop`` ends what a killed notebook has left.

    Args:
        n: how many engines, at least 1.
        timeout: seconds until starting fails; None for 60, or 600 with a profile.
        environment: variables for the engines, besides those of this process, or on other
            machines, besides those that the launcher sets.

    Raises:
        ValueError: ``n`` is below 1.
        TimeoutError: the engines did not all start in time. None of them is left.
    """

    def __init__(
        self,
        n: int = 4,
        *,
        timeout: float | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n={n}: must be at least 1")
        self.n = n
        self.pids: list[int] = []
        self._local: list[bool] = []  # whether it runs on this machine
        self._stopped = False
        self._environment = environment or {}
        self._profile: str | None = None  # the folder of one that is ours
        named = os.environ.get(PROFILE)
        self._cluster = self._of_profile(named) if named else self._here()
        try:
            self._start(timeout or (_QUEUE_SECONDS if named else 60.0))
        except BaseException:
            self.stop()
            raise

    def _here(self) -> Any:
        # a profile of its own: the user's may start its engines on another machine
        self._profile = tempfile.mkdtemp(prefix="refdist-engines-")
        cluster = ipyparallel.Cluster(
            n=self.n,
            profile_dir=self._profile,
            controller_ip=_LOCAL,
            engine_launcher_class="local",
            controller_launcher_class="local",
            log_level=logging.ERROR,
            send_engines_connection_env=True,
        )
        settings = _SETTINGS | dict(os.environ) | self._environment
        cluster.config.LocalEngineLauncher.environment = settings
        return cluster

    def _of_profile(self, name: str) -> Any:
        place = {"profile_dir": name} if os.sep in name else {"profile": name}
        cluster = ipyparallel.Cluster(n=self.n, log_level=logging.ERROR, **place)
        if not Path(cluster.profile_dir).is_dir():
            raise ValueError(
                f"{PROFILE}={name}: there is no {cluster.profile_dir}; make it with "
                f"'ipython profile create --parallel'"
            )
        return cluster

    def _start(self, timeout: float) -> None:
        self._cluster.start_cluster_sync()
        self.client = self._cluster.connect_client_sync()
        self._wait_for_engines(time.monotonic() + timeout)
        self.view = self.client[sorted(self.client.ids)]
        self.view.block = True
        found = self.view.apply_sync(
            _start_watching, _myself(), self._cluster.controller.pid, self._profile
        )
        self.pids = [pid for pid, _ in found]
        self._local = [here for _, here in found]
        self._controller = self._location()
        for rank, engine in enumerate(self.client.ids):
            self.client[engine].push({"rank": rank, "world_size": self.n}, block=True)
        self.view.push({"_settings": _SETTINGS, "_environment": self._environment}, block=True)
        self.view.execute(_PREPARE, block=True)
        self.offer_port()
        self._show_in_rank_order()

    def _wait_for_engines(self, end: float) -> None:
        stopped = False
        while True:
            slice_seconds = max(0.0, min(1.0, end - time.monotonic()))
            try:
                self.client.wait_for_engines(self.n, interactive=False, timeout=slice_seconds)
                return
            except (TimeoutError, ipyparallel.error.EngineError) as error:
                # ipyparallel sees it too, if it looks just then
                stopped |= isinstance(error, ipyparallel.error.EngineError)
                sets = self._cluster.engines.values()
                # mpiexec; the launchers of other kinds have no process that lasts
                starters = [one.process for one in sets if getattr(one, "process", None)]
                over = stopped or any(not starter.is_running() for starter in starters)
                if over or time.monotonic() >= end:
                    text = f"{len(self.client.ids)} of {self.n} engines have started"
                    text += ", and what started them has ended" if over else ""
                    # a profile that is ours goes, and its logs with it
                    logs = "" if self._profile else f"; see {self._cluster.profile_dir}/log"
                    raise TimeoutError(text + logs) from None

    def _location(self) -> str:
        """The address of the controller, as other machines know it."""
        file = self._cluster.controller.connection_files["client"]
        told = json.loads(Path(file).read_text())
        address = str(told["interface"]).rpartition("/")[2]
        return str(told["location"]) if address in {"*", "0.0.0.0"} else address

    def offer_port(self, rank: int = 0) -> None:
        """Bind a free port on one engine and tell all: ``host``, ``port`` and ``listen_socket``.

        Each group that lives at the same time as another needs a port of its own. Engines that
        are dead or stopped are not told.

        Args:
            rank: the engine that is to be rank 0 of the group.
        """
        first = self.view.targets[rank]
        others = [self.view.targets[other] for other in self.answering() if other != rank]
        self.client[first].push({"_controller": self._controller}, block=True)
        self.client[first].execute(_BIND_PORT, block=True)
        host, port = self.client[first].pull(["host", "port"], block=True)
        if others:
            place = {"host": host, "port": port, "listen_socket": None}
            self.client[others].push(place, block=True)

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
        """The ranks whose engines are neither dead nor stopped; on other machines, not dead."""
        registered = set(self.client.ids)
        return [
            rank
            for rank, (pid, here) in enumerate(zip(self.pids, self._local, strict=True))
            if (_answers(pid) if here else self.view.targets[rank] in registered)
        ]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one engine, such as SIGINT, SIGSTOP, SIGCONT or SIGKILL.

        Raises:
            ValueError: the engine runs on another machine.
        """
        if not self._local[rank]:
            raise ValueError(f"rank={rank}: its engine runs on another machine")
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
            if self._profile is not None:
                shutil.rmtree(self._profile, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """The engines, the controller, and the processes that these started."""
        controller = getattr(self._cluster.controller, "pid", None)
        found = []
        own = [pid for pid, here in zip(self.pids, self._local, strict=True) if here]
        for pid in [*own, controller]:
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


def _myself() -> tuple[int, float]:
    """This process, as no other machine has it: its number, and when it was started."""
    return os.getpid(), psutil.Process().create_time()


def _start_watching(
    owner_is: tuple[int, float], controller: int, profile: str | None
) -> tuple[int, bool]:
    """On an engine: end with the process that started the engines, if that is on this machine.

    A notebook's kernel that is killed can stop neither its engines nor their controller.

    Returns:
        The engine's pid, and whether it runs on the machine of its owner.
    """
    import contextlib
    import os
    import shutil
    import threading
    import time

    import psutil

    parent, created = owner_is
    if not psutil.pid_exists(parent) or psutil.Process(parent).create_time() != created:
        return os.getpid(), False
    owner = psutil.Process(parent)

    def watch() -> None:
        # a zombie is dead, and a process with the same number but another start is not the owner
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(controller).terminate()
        for nanny in psutil.Process().children():
            nanny.kill()
        if profile is not None:
            shutil.rmtree(profile, ignore_errors=True)
        psutil.Process().kill()

    threading.Thread(target=watch, daemon=True, name="refdist-watch").start()
    return os.getpid(), True
