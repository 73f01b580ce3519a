"""Engines of ipyparallel: their start, their names and their end.

An engine is a process that runs code of a notebook. Here its id is its rank. Cells marked ``%%px``
run on all engines and show their output in rank order.

The engines run on this machine, unless the environment variable ``REFDIST_PROFILE`` names a profile
of ipyparallel, or its folder. Then the profile's ``ipcluster_config.py`` gives their machines and
their launcher: MPI, SSH, Slurm, or any other launcher of ipyparallel.
"""

import contextlib
import json
import logging
import os
import signal
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

try:
    import ipyparallel
    import psutil
    from IPython.core.getipython import get_ipython
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"refdist.lab.engines needs {error.name}: pip install 'refdist[notebooks]'", name=error.name
    ) from None

from refdist.lab import engine_guard

PROFILE = "REFDIST_PROFILE"
_LOCAL = "127.0.0.1"
_QUEUE_SECONDS = 600.0  # a cluster may queue its jobs
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for engines to report the interrupt
_SETTINGS = {
    "OMP_NUM_THREADS": "1",  # four engines share the few cores of a laptop
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection would fill a notebook with stack traces
    # torch looks up the name of each address that it connects to; a lost answer costs 5 s, or 1
    "RES_OPTIONS": "timeout:1 attempts:1",
}
_ENDED = "has ended"
_STOPPED = "is stopped"

_PREPARE = """
import os as _os
for _name, _value in _settings.items():
    _os.environ.setdefault(_name, _value)
_os.environ.update(_environment)
import torch, refdist
"""

# the other engines can reach the address from which an engine reaches the controller
_BIND_PORT = """
import socket as _socket
from refdist.store.listening import listen as _listen
with _socket.socket(type=_socket.SOCK_DGRAM) as _probe:
    _probe.connect((_controller, 9))  # sends nothing
    host = _probe.getsockname()[0]
listen_socket = _listen(host, 0)
port = listen_socket.getsockname()[1]
"""


class LocalEngines:
    """``n`` engines on this machine, or on a profile's, as an object or context manager.

    Each engine has imported torch and refdist, and has these names::

        rank            its id, 0 to n - 1
        world_size      n
        host            an address of rank 0's machine: 127.0.0.1 if all run on this one
        port            a free port of that machine
        listen_socket   on rank 0, a socket that is bound to this port; else None

    In a notebook, ``%%px`` runs a cell on all of them, and Stop interrupts them. New engines take
    over ``%%px``. The old engines then end with the cell, unless a variable still names them.

    The engines end with ``stop``, or when nothing refers to this object, and at the latest a few
    seconds after the process that started them. This holds for this machine. On others,
    ``ipcluster stop`` ends the engines that a killed notebook has left.

    Args:
        n: number of engines, at least 1.
        timeout: seconds until the start fails; None for 60, or 600 with a profile.
        environment: variables for the engines, besides those of this process or, on other
            machines, those of the launcher.

    Raises:
        ValueError: ``n`` is below 1.
        TimeoutError: not all engines started in time. None of them is left.
    """

    _of_cells: ClassVar["LocalEngines | None"] = None  # the engines that %%px uses

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
        self._local: list[bool] = []  # whether each runs on this machine
        self._stopped = False
        self._environment = environment or {}
        self._profile: str | None = None  # the folder of a profile that is ours
        named = os.environ.get(PROFILE)
        self._cluster = self._of_profile(named) if named else self._here()
        guard = engine_guard.start(self._cluster.cluster_id, self._profile)
        self._end_all = weakref.finalize(self, engine_guard.end, guard)
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
            cluster_file="",  # ipyparallel would restore it and the folder when an engine ends
            shutdown_atexit=False,  # the guard ends the engines
        )
        # besides this process's own variables
        settings = {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
        cluster.config.LocalEngineLauncher.environment = settings | self._environment
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
        weakref.finalize(self, self.client.close)
        self._wait_for_engines(time.monotonic() + timeout)
        self._ids = sorted(self.client.ids)
        self.view = self.client[self._ids]
        self.view.block = True
        found = self.view.apply_sync(_where, _myself())
        self.pids = [pid for pid, _ in found]
        self._local = [here for _, here in found]
        self._check_targets()
        self._controller = self._location()
        for rank, engine in enumerate(self._ids):
            self.client[engine].push({"rank": rank, "world_size": self.n}, block=True)
        self.view.push({"_settings": _SETTINGS, "_environment": self._environment}, block=True)
        self.view.execute(_PREPARE, block=True)
        self.offer_port()
        self._show_in_rank_order()

    def _wait_for_engines(self, end: float) -> None:
        # errors of ipyparallel's own function refer to this frame, and so keep this object alive
        before = 0
        while (ready := len(self.client.ids)) < self.n:
            over = ready < before or any(map(_has_ended, self._cluster.engines.values()))
            if over or time.monotonic() >= end:
                text = f"{ready} of {self.n} engines have started"
                text += ", and what started them has ended" if over else ""
                # a profile that is ours is removed with its logs
                logs = "" if self._profile else f"; see {self._cluster.profile_dir}/log"
                raise TimeoutError(text + logs)
            before = ready
            time.sleep(_POLL_SECONDS)

    def _location(self) -> str:
        """The address of the controller for other machines."""
        file = self._cluster.controller.connection_files["client"]
        told = json.loads(Path(file).read_text())
        address = str(told["interface"]).rpartition("/")[2]
        return str(told["location"]) if address in {"*", "0.0.0.0"} else address

    def offer_port(self, rank: int = 0) -> None:
        """Bind a free port on one engine, and set ``host``, ``port``, ``listen_socket`` on all.

        Groups that exist at the same time need different ports. Engines that are dead or stopped
        get no values.

        Args:
            rank: the engine that will be rank 0 of the group.
        """
        first = self._ids[rank]
        others = [self._ids[other] for other in self.answering() if other != rank]
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
            ipyparallel.error.RemoteError: it raised on an engine; the error of the lowest rank.
            ipyparallel.error.EngineError: an engine has ended, or was stopped before the call.
            KeyboardInterrupt: Stop or Ctrl-C; it is raised on the engines too.
        """
        return self._finish(
            [
                self.client[engine].apply_async(function, rank, self.n, *arguments)
                for rank, engine in enumerate(self._ids)
            ],
            self._ids,
        )

    def show(self, result: Any, groupby: str = "type") -> None:
        """Wait for a cell that ``%%px --noblock --out name`` started, and show its output.

        Raises:
            ipyparallel.error.RemoteError: the cell raised; the error of the lowest rank.
            ipyparallel.error.EngineError: an engine has ended.
            KeyboardInterrupt: Stop or Ctrl-C; it is raised on the engines too.
        """
        targets = result._targets
        try:
            self._finish([result], [targets] if isinstance(targets, int) else targets)
        finally:
            if result.ready():
                result.wait_for_output(1)
                result.display_outputs(groupby)

    def gather(self, name: str) -> list[Any]:
        """The value of a variable on every engine, in rank order."""
        values: list[Any] = self._finish([self.view.pull(name, block=False)], self._ids)[0]
        return values

    def answering(self) -> list[int]:
        """The ranks whose engines are neither dead nor stopped; on other machines, not dead."""
        return [rank for rank in range(len(self.pids)) if self._state(rank) is None]

    def _state(self, rank: int) -> str | None:
        """The reason why an engine cannot answer; None if it can."""
        if self._ids[rank] not in self.client.ids:
            return _ENDED  # ipyparallel may report it before the process is gone
        if not self._local[rank]:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            status = psutil.Process(self.pids[rank]).status()
            if status not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}:
                return _STOPPED if status == psutil.STATUS_STOPPED else None
        return _ENDED

    def _check(self, engines: list[int], cause: BaseException | None = None) -> None:
        """Raise an error that names the ranks that do not answer, and the remedy."""
        states = {
            rank: state
            for rank, engine in enumerate(self._ids)
            if engine in engines and (state := self._state(rank))
        }
        if states:
            text = ", ".join(f"engine {rank} {state}" for rank, state in states.items())
            if _ENDED in states.values():
                text += f". Start engines again: engines = LocalEngines({self.n})"
            else:
                text += f". Let it go on: engines.signal({min(states)}, signal.SIGCONT)"
            raise ipyparallel.error.EngineError(text) from cause

    def _check_targets(self) -> None:
        """Let every call of the client check its engines: its own error is a bare KeyError."""
        build_targets, reference = self.client._build_targets, weakref.ref(self)

        def checked(targets: Any) -> Any:
            engines = reference()
            if engines is not None and not isinstance(targets, (str, slice, type(None))):
                engines._check([targets] if isinstance(targets, int) else targets)
            return build_targets(targets)

        self.client._build_targets = checked

    def _finish(self, results: list[Any], engines: list[int]) -> list[Any]:
        """Wait for results of engines, and pass an interrupt on to them."""
        together = ipyparallel.AsyncResult.join(*results)
        try:
            while not together.wait(_LOOK_SECONDS):
                self._give_up_the_dead()
        except KeyboardInterrupt:
            asked = [self._ids[rank] for rank in self.answering() if self._ids[rank] in engines]
            self.client.send_signal("SIGINT", targets=asked, block=False)
            together.wait(_GRACE_SECONDS)
            raise
        try:
            return [result.get() for result in results]
        except ipyparallel.error.RemoteError as error:
            self._check(engines, error)
            raise

    def _give_up_the_dead(self) -> None:
        """Unregister engines that have ended: without a nanny, ipyparallel needs half a minute."""
        for rank, engine in enumerate(self._ids):
            if engine in self.client.ids and self._state(rank) == _ENDED:
                message = {"content": {"id": engine}}
                self.client._io_loop.add_callback(self.client._unregister_engine, message)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one engine, such as SIGINT, SIGSTOP, SIGCONT or SIGKILL.

        Raises:
            ValueError: the engine runs on another machine.
        """
        if not self._local[rank]:
            raise ValueError(f"rank={rank}: its engine runs on another machine")
        os.kill(self.pids[rank], number)

    def stop(self) -> None:
        """End the engines and their controller. A second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        try:
            if self._profile is not None:
                self._end_all()  # ipyparallel would wait seconds for stopped engines
            self._cluster.stop_cluster_sync()
        finally:
            if hasattr(self, "client"):
                self.client.close()
            self._end_all()

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
        """Make ``%%px`` use these engines, and show output by rank, without bars."""
        shell = get_ipython()
        if shell is None:
            return
        self.view.activate()
        magics = shell.magics_manager.registry["ParallelMagics"]
        magics.parallel_execute = partial(_execute, self, magics)
        # ipyparallel counts only engines that have not ended: without 0, 0:2 would be 1 and 2
        ids = {"ids": self._ids, "all": self._ids}
        magics._eval_target_str = lambda text: eval(f"ids[{text}]" if ":" in text else text, ids)
        before, LocalEngines._of_cells = LocalEngines._of_cells, self

        # IPython keeps outputs and tracebacks of cells, so references to the old engines stay
        def stop_unnamed(*_: Any) -> None:
            shell.events.unregister("post_run_cell", stop_unnamed)
            names = [name for name, value in shell.user_ns.items() if value is before]
            if before is not None and all(name.startswith("_") for name in names):
                before.stop()

        shell.events.register("post_run_cell", stop_unnamed)


def _execute(
    engines: LocalEngines,
    magics: Any,
    cell: str,
    block: bool | None = None,
    groupby: str = "type",
    save_name: str | None = None,
    **_: Any,
) -> Any:
    """Run ``%%px``. ipyparallel's own version turns a KeyboardInterrupt into a TimeoutError."""
    result = type(magics).parallel_execute(magics, cell, block=False, save_name=save_name)
    if not (magics.view.block if block is None else block):
        return None if save_name else result  # the name has it
    engines.show(result, groupby)
    return None


def _has_ended(launcher: Any) -> bool:
    # mpiexec has a process; other launchers have none that lasts
    process = getattr(launcher, "process", None)
    return launcher.state == "after" or (process is not None and not process.is_running())


def _myself() -> tuple[int, float]:
    """A unique identity of this process: its pid and its start time."""
    return os.getpid(), psutil.Process().create_time()


def _where(owner_is: tuple[int, float]) -> tuple[int, bool]:
    """The pid of this engine, and whether it runs on the machine of its owner."""
    import os

    import psutil

    owner, created = owner_is
    here = psutil.pid_exists(owner) and psutil.Process(owner).create_time() == created
    return os.getpid(), here
