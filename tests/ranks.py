"""Running a function on several real processes, which meet on a port that rank 0 has bound."""

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from refdist import StatelessProcessGroup, create_tcp_store
from refdist.barrier import barrier_of
from refdist.barrier.roll import ARRIVED, ENTRY, Roll
from refdist.store.seals import NO_SEALS, Seals

LOCAL = "127.0.0.1"
DEADLINE = 40.0
_GRACE = 5.0  # what the others have left after one rank has failed

_processes = multiprocessing.get_context("forkserver")
# a process is forked from one that has imported these already: milliseconds, not seconds
_IMPORTED = [
    "torch", "refdist", "refdist.benchmarks.__main__", "refdist.exploration",
    "hypothesis", "psutil", "pytest",
]  # fmt: skip

# starting a process reads the exit codes of all others, and an exit code can be read only once
_one_thread = threading.Lock()


class RankFailedError(AssertionError):
    """A rank raised, died or did not end; the text has the traceback of each."""


class Rank:
    """What a rank function gets: its rank, and a board where ranks tell each other things.

    The board is a store of the test's own. It orders what the ranks do, in place of clocks.
    """

    def __init__(self, rank: int, world_size: int, board: TCPStore) -> None:
        self.rank = rank
        self.world_size = world_size
        self.board = board
        self._counts = 0

    def tell(self, name: str, value: Any = None) -> None:
        """Put a value on the board."""
        self.board.set(name, pickle.dumps(value))

    def ask(self, name: str) -> Any:
        """Take a value from the board; wait until it is there."""
        return pickle.loads(self.board.get(name))

    def told(self, name: str) -> bool:
        """Whether a value is on the board."""
        return self.board.check([name])

    def meet(self, name: str) -> None:
        """Wait until every rank has called this, without any code of refdist."""
        self.tell(f"meet/{name}/{self.rank}")
        for rank in range(self.world_size):
            self.ask(f"meet/{name}/{rank}")

    def count_keys(self, group: StatelessProcessGroup) -> int:
        """How many keys the store of a group holds, while no rank uses it."""
        self._counts += 1
        self.meet(f"before count {self._counts}")
        count = group.store.num_keys()
        self.meet(f"after count {self._counts}")
        return count

    @contextmanager
    def place(self, name: str, rank: int | None = None, host: str = LOCAL):
        """A port, and on rank 0 the bound socket to listen on; None on the others."""
        if (self.rank if rank is None else rank) != 0:
            yield self.ask(f"port/{name}"), None
            return
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host.strip("[]"), 0))
            listener.listen(64)
            self.tell(f"port/{name}", listener.getsockname()[1])
            yield listener.getsockname()[1], listener

    def group(
        self, name: str = "group", members: Sequence[int] | None = None, **options: Any
    ) -> StatelessProcessGroup:
        """A group of all ranks, or of ``members``, in the order in which they are given."""
        members = range(self.world_size) if members is None else members
        rank = list(members).index(self.rank)
        with self.place(name, rank) as (port, listener):
            return StatelessProcessGroup.create(
                LOCAL, port, rank, len(members), listen_socket=listener, **options
            )

    def store(self, name: str, **options: Any) -> TCPStore:
        """A store of all ranks, which rank 0 serves."""
        with self.place(name) as (port, listener):
            return create_tcp_store(LOCAL, port, listener, is_master=self.rank == 0, **options)

    def watched_group(
        self, group: StatelessProcessGroup, before: Callable[..., None], **options: Any
    ) -> StatelessProcessGroup:
        """A second group of the same ranks, whose requests to the store are seen by ``before``.

        Its store has no ``Store.barrier`` that is one request, because of the prefix.
        """
        store = Watched(PrefixStore("watched", group.store), before)
        return StatelessProcessGroup(group.rank, group.world_size, store, **options)


class Watched:
    """A real store, and a function that is called before each request to it.

    It passes for a store of the same class.
    """

    def __init__(self, store: Any, before: Callable[..., None]) -> None:
        self._store = store
        self._before = before

    @property
    def __class__(self) -> Any:
        return type(self._store)

    def __repr__(self) -> str:
        return repr(self._store)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if not callable(attribute):
            return attribute

        def request(*arguments: Any, **named: Any) -> Any:
            self._before(name, *arguments)
            return attribute(*arguments, **named)

        return request


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    killed: Sequence[int] = (),
    deadline: float = DEADLINE,
) -> list[Any]:
    """Call ``function(Rank, *arguments)`` on each of ``world_size`` processes.

    Returns what each returned, in rank order, and None for those in ``killed``, which must die of
    SIGKILL. Raises RankFailedError if another one does not return within ``deadline`` seconds.
    """
    board = create_tcp_store(LOCAL, 0, is_master=True, timeout=timedelta(seconds=deadline))
    # the first process counts; other tests and the package ask for other modules
    _processes.set_forkserver_preload(_IMPORTED)
    processes, pipes = [], []
    end = time.monotonic() + deadline
    try:
        for rank in range(world_size):
            here, there = _processes.Pipe(duplex=False)
            process = _processes.Process(
                target=_run_rank,
                args=(there, function, rank, world_size, board.port, deadline, arguments),
                daemon=True,
            )
            with _one_thread:
                process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        answers, end = _collect(pipes, end)
        for process in processes:
            _join(process, max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if not _join(process, 0):
                process.kill()
                _join(process, _GRACE)
    results, failures = [], []
    for rank, process in enumerate(processes):
        returned, value = answers.get(rank, (False, f"no answer; exit code {process.exitcode}"))
        if rank in killed and process.exitcode == -signal.SIGKILL and rank not in answers:
            returned, value = True, None
        elif rank in killed or (returned and process.exitcode != 0):
            returned, value = False, f"returned {value!r}, then exit code {process.exitcode}"
        results.append(value)
        if not returned:
            failures.append(f"--- rank {rank} of {world_size} ---\n{value}")
    if failures:
        raise RankFailedError("\n".join([function.__name__, *failures]))
    return results


def _join(process: Any, seconds: float) -> bool:
    """Wait for the end of a process. Whether it has ended."""
    wait([process.sentinel], seconds)
    with _one_thread:
        process.join(0)
        return process.exitcode is not None


def _collect(pipes: list[Connection], end: float) -> tuple[dict[int, tuple[bool, Any]], float]:
    """What each rank answered, by rank, and the deadline, which a failure brings closer."""
    answers = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < end:
        for pipe in wait(list(open_pipes), max(0.0, end - time.monotonic())):
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                continue
            if not answers[rank][0]:
                end = min(end, time.monotonic() + _GRACE)
    return answers, end


def _run_rank(pipe, function, rank, world_size, port, deadline, arguments) -> None:
    torch.set_num_threads(1)
    # a run in the background of a shell starts with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a process of a test that was killed itself ends by itself
    signal.alarm(int(deadline) + 30)
    try:
        board = create_tcp_store(LOCAL, port, timeout=timedelta(seconds=deadline))
        result = function(Rank(rank, world_size, board), *arguments)
        answer = pickle.dumps((True, result))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)


def run_threads(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline: float = DEADLINE
) -> list[Any]:
    """Call ``function(rank, *arguments)`` on each of ``world_size`` threads of this process."""
    results: list[Future[Any]] = [Future() for _ in range(world_size)]

    def run(rank: int) -> None:
        try:
            results[rank].set_result(function(rank, *arguments))
        except BaseException as error:
            results[rank].set_exception(error)

    for rank in range(world_size):
        threading.Thread(target=run, args=(rank,), daemon=True).start()
    end = time.monotonic() + deadline
    return [result.result(max(0.0, end - time.monotonic())) for result in results]


def with_secret(
    group: StatelessProcessGroup, secret: str = "a secret of tests"
) -> StatelessProcessGroup:
    """Let a group over a store that was there before seal what it writes, as ``create`` does."""
    group._barrier.seals = Seals(secret.encode(), "group")
    return group


def entry(generation: int, rank: int, value: bytes = b"", seals=NO_SEALS, key: str = "") -> bytes:
    """What a rank appends to the roll under a key when it arrives."""
    signed = ENTRY.pack(generation, 0, rank, ARRIVED, len(value)) + value
    return signed + seals.tag(key, signed)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what cannot be waited for in any other way."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_signed(store: Any, ranks: Iterable[int]) -> None:
    """Wait until these ranks have signed the roll of the first barrier of a group."""
    roll = barrier_of(store, 0, 1).keys.roll
    store.wait([roll], timedelta(seconds=20))
    until(lambda: set(Roll.parse(store.get(roll), 0, NO_SEALS, roll).values) >= set(ranks))


def interrupt(process_id: int) -> float:
    """Send SIGINT. Returns the time at which it was sent."""
    os.kill(process_id, signal.SIGINT)
    return time.monotonic()


def second_group(
    here: Rank,
    group: StatelessProcessGroup,
    native: bool,
    before: Callable[..., None],
    **options: Any,
) -> StatelessProcessGroup:
    """A second group of the same ranks, whose requests to the store are seen by ``before``.

    A native one has a TCPStore of its own, so the ``Store.barrier`` of the present torch. The
    other one has a prefix of the store of ``group``, which rules ``Store.barrier`` out.
    """
    if not native:
        return here.watched_group(group, before, **options)
    store = Watched(here.store("second group"), before)
    return StatelessProcessGroup(here.rank, here.world_size, store, **options)
