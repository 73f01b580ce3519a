"""One rank of a protocol, which runs on recorded answers up to its next request.

What a rank does follows from the answers that it got. So its state is the list of them, and to
know its next request, its code runs from the start on the recorded answers. Nothing is copied or
suspended, and nothing in the code needs to know.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from refdist.exploration.server import Client, Request

Protocol = Callable[[Any, int, int], Mapping[str, Callable[[], object]]]
"""``protocol(store, rank, world_size)`` returns the calls of a rank by name, in order."""

STORE_SECONDS = 300.0
"""A wait that is given no other timeout has this one; it counts as waiting for ever."""

# torch 2.11 to 2.15
_QUEUE_EMPTY: type[Exception] = getattr(torch.distributed, "QueueEmptyError", DistStoreError)

ANSWERED, TIMED_OUT, STALLED, CLOSED = "answered", "timed out", "stalled", "closed"


class Reply(NamedTuple):
    """How a request of a rank ended.

    Attributes:
        kind: ``ANSWERED``; ``TIMED_OUT`` while others could go on; ``STALLED``, which is timed out
            when nothing else could happen; or ``CLOSED``, the connection.
        answer: if answered.
    """

    kind: str
    answer: Any = None


@dataclass(frozen=True)
class Call:
    """One call of a rank, as an observer sees it.

    Attributes:
        name: as the protocol named it.
        after: the ranks that had left their call of this name when this one was entered.
        over: whether it has ended: by returning ``value``, or by raising ``error``.
        seconds: how long its waits that timed out have taken.
        early: how many of those timed out while another rank could go on.
        stalled: how many timed out because nothing else could happen.
    """

    name: str
    after: tuple[int, ...]
    over: bool = False
    value: object = None
    error: Exception | None = None
    seconds: float = 0.0
    early: int = 0
    stalled: int = 0

    @property
    def returned(self) -> bool:
        """Whether it has ended without an error."""
        return self.over and self.error is None

    @property
    def raised(self) -> bool:
        """Whether it has ended with an error."""
        return self.error is not None


class Ran(NamedTuple):
    """How far a rank came.

    Attributes:
        names: of all the calls that it makes.
        calls: those that it has entered.
        request: what it asks next; None at its end.
    """

    names: tuple[str, ...]
    calls: tuple[Call, ...]
    request: Request | None


def run(
    protocol: Protocol, rank: int, world_size: int, asked: list[Request], replies: list[Reply]
) -> Ran:
    """Run a rank on recorded replies, in simulated time.

    Raises:
        ValueError: the protocol returned no calls, or did not ask as before.
        Exception: whatever the protocol raises outside its calls.
    """
    session = _Session(rank, asked, replies)
    names: tuple[str, ...] = ()
    calls: list[Call] = []
    with _time_of(session):
        try:
            functions = protocol(_SimulatedStore(session), rank, world_size)
            if not isinstance(functions, Mapping):
                raise ValueError(
                    f"protocol of rank {rank} returned {functions!r}: must be its calls by name"
                )
            names = tuple(functions)
            for name, function in functions.items():
                after = session.ask(Request("enter", (name,)))
                began, early, stalled = session.seconds, session.early, session.stalled
                value, error = None, None
                try:
                    value = function()
                except _HaltedError as halted:
                    traceback.clear_frames(halted.__traceback__)
                except Exception as raised:
                    error = _without_frames(raised)
                over = session.request is None
                calls.append(
                    Call(
                        name,
                        after,
                        over,
                        value if over else None,
                        error if over else None,
                        session.seconds - began,
                        session.early - early,
                        session.stalled - stalled,
                    )
                )
                if not over:
                    break
        except _HaltedError as halted:
            traceback.clear_frames(halted.__traceback__)
    if session.differs:
        raise ValueError(session.differs)
    return Ran(names, tuple(calls), session.request)


class _HaltedError(BaseException):
    """Leaves the code of a rank at a request that has no reply yet."""


class _Session:
    """One run of a rank: what it asks, what it was told, and its clock."""

    def __init__(self, rank: int, asked: list[Request], replies: list[Reply]) -> None:
        self.rank = rank
        self.request: Request | None = None  # the first without a reply
        self.seconds = 0.0
        self.differs = ""  # how it asks otherwise than before
        self.early = self.stalled = 0
        self.connections = 0
        self._asked = asked
        self._replies = replies
        self._next = 0
        self._closed: set[Client] = set()

    def ask(self, request: Request) -> Any:
        # code that leaves may still ask, in a finally clause
        if self.request is not None or self.differs:
            raise _HaltedError
        if request.client in self._closed and request.name != "enter":
            raise _lost()
        if self._next == len(self._replies):
            self.request = request
            raise _HaltedError
        before, reply = self._asked[self._next], self._replies[self._next]
        if before != request:
            self.differs = (
                f"rank {self.rank} asked {_brief(request)}, where it asked {_brief(before)} before "
                f"on the same answers: a protocol must depend on nothing but these"
            )
            raise _HaltedError
        self._next += 1
        if reply.kind == CLOSED:
            self._closed.add(request.client)
            raise _lost()
        if reply.kind != ANSWERED:
            self.seconds += request.seconds or 0.0
            self.early += reply.kind == TIMED_OUT
            self.stalled += reply.kind == STALLED
            raise DistStoreError(f"wait timeout after {1000 * (request.seconds or 0):.0f}ms")
        return reply.answer


class _SimulatedStore:
    """What a rank gets for its store: passes for a TCPStore, and asks the explorer instead."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._client: Client = (session.rank, session.connections)
        session.connections += 1
        self._seconds = STORE_SECONDS

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return TCPStore

    libuvBackend = True  # noqa: N815  # torch's name

    @property
    def timeout(self) -> timedelta:
        """How long a wait may take that names no timeout."""
        return timedelta(seconds=self._seconds)

    def set_timeout(self, timeout: timedelta) -> None:
        """Change it, for this connection."""
        self._seconds = timeout.total_seconds()

    def clone(self) -> "_SimulatedStore":
        """Another connection of the same rank."""
        return _SimulatedStore(self._session)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._session.ask(Request(name, arguments, None, self._client))

    def _ask_and_wait(self, name: str, timeout: timedelta | None, *arguments: Any) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        limit = seconds if seconds < STORE_SECONDS else None
        self._session.ask(Request(name, arguments, limit, self._client))

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _bytes(value))

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        self._ask("multi_set", tuple(keys), tuple(map(_bytes, values)))

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _bytes(value))

    def add(self, key: str, amount: int) -> int:
        total: int = self._ask("add", key, amount)
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        value: bytes = self._ask("compare_set", key, _bytes(expected), _bytes(desired))
        return value

    def check(self, keys: list[str]) -> bool:
        found: bool = self._ask("check", tuple(keys))
        return found

    def delete_key(self, key: str) -> bool:
        found: bool = self._ask("delete_key", key)
        return found

    def num_keys(self) -> int:
        number: int = self._ask("num_keys")
        return number

    def list_keys(self) -> list[str]:
        return list(self._ask("list_keys"))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask_and_wait("wait", timeout, tuple(keys))

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._ask("get", key)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return list(self._ask("multi_get", tuple(keys)))

    def barrier(self, key: str, world_size: int, timeout: timedelta | None = None) -> None:
        self._ask_and_wait("barrier", timeout, key, world_size)

    def queue_push(self, key: str, value: str | bytes) -> None:
        self._ask("queue_push", key, _bytes(value))

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        if block:
            self.wait([key])
        found: tuple[bytes, ...] = self._ask("queue_pop", key)
        if not found:
            raise _QUEUE_EMPTY("queue is empty")
        return found[0]

    def queue_len(self, key: str) -> int:
        length: int = self._ask("queue_len", key)
        return length


def _brief(request: Request) -> str:
    return f"{request.name}{request.arguments}"


def _lost() -> DistNetworkError:
    return DistNetworkError("the server has closed the connection")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


@contextmanager
def _time_of(session: _Session) -> Iterator[None]:
    """Let this thread read the clock of a rank, which its timeouts alone advance.

    A rank may so be slower than any other, or faster: an order of steps that some speeds of ranks
    bring about is explored, and more.
    """
    thread = threading.get_ident()
    real = {name: getattr(time, name) for name in ("monotonic", "time", "perf_counter", "sleep")}

    def clock(name: str) -> Callable[[], float]:
        return lambda: session.seconds if threading.get_ident() == thread else real[name]()

    def sleep(seconds: float) -> None:
        if threading.get_ident() != thread:
            real["sleep"](seconds)
        else:
            session.seconds += seconds

    simulated = {name: clock(name) for name in ("monotonic", "time", "perf_counter")}
    for name, function in (simulated | {"sleep": sleep}).items():
        setattr(time, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(time, name, function)


def _without_frames(error: Exception) -> Exception:
    """The error, without what it keeps alive of the run."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
