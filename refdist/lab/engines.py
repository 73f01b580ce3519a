"""Engines of ipyparallel: their start, their names and their end.

An engine is a process that runs code of a notebook. Here its id is its rank. Cells marked ``%%px``
run on all engines and show their output in rank order.

The engines run on this machine, unless the environment variable ``REFDIST_PROFILE`` names a profile
of ipyparallel, or its folder. Then the profile's ``ipcluster_config.py`` gives their machines and
their launcher: MPI, SSH, Slurm, or any other launcher of ipyparallel.
"""

import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any, Self

try:
    import ipyparallel
    from ipyparallel.error import EngineError, RemoteError

    from refdist.lab import cluster, engine_guard, px
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"refdist.lab.engines needs {error.name}: pip install '.[notebooks]'", name=error.name
    ) from None

_QUEUE_SECONDS = 600.0  # a cluster may queue its jobs
_POLL_SECONDS = 0.01
_NANNY_SECONDS = 10.0  # until it has sent a signal, or told of an engine's end
_GRACE_SECONDS = 5.0  # for engines to report the interrupt
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
from urllib.parse import urlsplit as _split
from ipyparallel.engine.app import IPEngine as _IPEngine
from refdist.store.listening import listen as _listen
with _socket.socket(type=_socket.SOCK_DGRAM) as _probe:
    _probe.connect((_split(_IPEngine.instance().registration_url).hostname, 9))  # sends nothing
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

    Attributes:
        n: number of engines.
        client: ipyparallel's client of them.
        view: ipyparallel's view of all of them, in rank order; its calls wait for the result.
        ids: ipyparallel's id of each rank's engine: its rank, unless the profile has it otherwise.
        folder: the profile's folder, with ipyparallel's logs.

    Args:
        n: number of engines, at least 1.
        timeout: seconds until the start fails; None for 60, or 600 with a profile.
        environment: variables for the engines, besides those of this process or, on other
            machines, those of the launcher.

    Raises:
        ValueError: ``n`` is below 1, or the profile does not exist.
        TimeoutError: not all engines started in time. None of them is left.
        ipyparallel.error.EngineError: what started them has ended. None of them is left.
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
        self.ids: list[int] = []
        self._paused: set[int] = set()  # the ranks that SIGSTOP has stopped
        self._over = False
        self._environment = environment or {}
        profile = os.environ.get(cluster.PROFILE)
        self._is_local = not profile
        if profile:
            self._cluster = cluster.of_profile(n, profile)
        else:
            self._cluster = cluster.on_this_machine(n, self._environment)
        self.folder: str = self._cluster.profile_dir
        ours = self.folder if self._is_local else None  # then the guard removes it
        guard = engine_guard.start(self._cluster.cluster_id, ours)
        self._end_all = weakref.finalize(self, engine_guard.end, guard)
        try:
            self._start(timeout or (60.0 if self._is_local else _QUEUE_SECONDS))
        except BaseException:
            self.stop()
            raise

    def _start(self, timeout: float) -> None:
        self.client = self._cluster.start_and_connect_sync(self.n, timeout)
        weakref.finalize(self, self.client.close)
        self.ids = self.client.ids[: self.n]  # a profile may start more
        self.view = self.client[self.ids]
        self.view.block = True
        self._check_targets()
        self.view.scatter("rank", range(self.n), flatten=True)
        names = {"_settings": cluster.SETTINGS, "_environment": self._environment}
        self.view.push({"world_size": self.n} | names)
        self.view.execute(_PREPARE)
        self.offer_port()
        px.use(self)

    def offer_port(self, rank: int = 0) -> None:
        """Bind a free port on one engine, and set ``host``, ``port``, ``listen_socket`` on all.

        Groups that exist at the same time need different ports. Engines that are dead or stopped
        get no values.

        Args:
            rank: the engine that will be rank 0 of the group.
        """
        first = self.client[self.ids[rank]]
        first.execute(_BIND_PORT, block=True)
        host, port = first.pull(["host", "port"], block=True)
        others = [self.ids[other] for other in self.answering() if other != rank]
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
                for rank, engine in enumerate(self.ids)
            ],
            self.ids,
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
        values: list[Any] = self._finish([self.view.pull(name, block=False)], self.ids)[0]
        return values

    def _finish(self, results: list[Any], engines: list[int]) -> list[Any]:
        """Wait for results of engines, and pass an interrupt on to them."""
        together = ipyparallel.AsyncResult.join(*results)
        try:
            together.wait()
        except KeyboardInterrupt:
            asked = [self.ids[rank] for rank in self.answering() if self.ids[rank] in engines]
            self.client.send_signal("SIGINT", targets=asked, block=False)
            together.wait(_GRACE_SECONDS)
            raise
        try:
            return [result.get() for result in results]
        except RemoteError as error:
            self._check(engines, error)
            raise

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one engine, such as SIGINT, SIGSTOP, SIGCONT or SIGKILL, and wait.

        ipyparallel's nanny, a process beside the engine, sends it when this returns. After SIGKILL
        the engine has ended then.

        Raises:
            ipyparallel.error.EngineError: the engine has ended, or its nanny does not answer.
        """
        number = signal.Signals(number)
        paused = rank in self._paused
        self._paused.discard(rank)  # the nanny of a stopped engine answers
        try:
            # by its name: the numbers of another machine's system may differ
            sent = self.client.send_signal(number.name, targets=self.ids[rank], block=False)
            (reply,) = sent.result(_NANNY_SECONDS)
        except TimeoutError:
            text = f"engine {rank}: its nanny has not answered within {_NANNY_SECONDS:g} s"
            raise EngineError(text) from None
        finally:
            if number == signal.SIGSTOP or (paused and number != signal.SIGCONT):
                self._paused.add(rank)
        if (said := reply["content"])["status"] != "ok":
            raise EngineError(f"engine {rank}: {said['ename']}: {said['evalue']}")
        if number == signal.SIGKILL:
            self._wait_until_ended(rank)

    def _wait_until_ended(self, rank: int) -> None:
        end = time.monotonic() + _NANNY_SECONDS
        while self.state(rank) != _ENDED:
            if time.monotonic() >= end:
                raise EngineError(f"engine {rank} has not ended within {_NANNY_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def answering(self) -> list[int]:
        """The ranks whose engines have not ended and were not stopped by ``signal``."""
        return [rank for rank in range(len(self.ids)) if self.state(rank) is None]

    def state(self, rank: int) -> str | None:
        """The reason why an engine cannot answer: it has ended, or is stopped; None if it can."""
        if self._over or self.ids[rank] not in self.client.ids:
            return _ENDED
        return _STOPPED if rank in self._paused else None

    def _check(self, engines: list[int], cause: BaseException | None = None) -> None:
        """Raise an error that names the ranks that do not answer, and the remedy."""
        states = {
            rank: state
            for rank, engine in enumerate(self.ids)
            if engine in engines and (state := self.state(rank))
        }
        if states:
            text = ", ".join(f"engine {rank} {state}" for rank, state in states.items())
            if _ENDED in states.values():
                text += f". Start engines again: engines = LocalEngines({self.n})"
            else:
                text += f". Let it go on: engines.signal({min(states)}, signal.SIGCONT)"
            raise EngineError(text) from cause

    def _check_targets(self) -> None:
        """Let every call of the client check its engines.

        The client's own way fails: for an engine that has ended, its error is a bare KeyError, and
        a call of a stopped engine waits for ever.
        """
        build_targets, reference = self.client._build_targets, weakref.ref(self)

        def checked(targets: Any) -> Any:
            engines = reference()
            if engines is not None and not isinstance(targets, (str, slice, type(None))):
                engines._check([targets] if isinstance(targets, int) else targets)
            return build_targets(targets)

        self.client._build_targets = checked

    def stop(self) -> None:
        """End the engines and their controller. A second call does nothing."""
        if self._over:
            return
        self._over = True
        try:
            if self._is_local:
                self._end_all()  # ipyparallel would wait seconds for stopped engines
            self._cluster.stop_cluster_sync()
        finally:
            if hasattr(self, "client"):
                self.client.close()
            self._end_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"LocalEngines(n={self.n}, {'stopped' if self._over else 'running'})"
