"""One run of a rank's code on recorded replies: its requests, their replies, and its clock."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.distributed import DistNetworkError, DistStoreError

from refdist.exploration.server import Client, Request

ANSWERED, TIMED_OUT, STALLED, CLOSED = "answered", "timed out", "stalled", "closed"


class Reply(NamedTuple):
    """The end of a rank's request.

    Attributes:
        kind: ``ANSWERED``; ``TIMED_OUT`` while others could go on; ``STALLED``: timed out because
            nothing else could happen; or ``CLOSED``: the connection was closed.
        answer: the answer, if any.
    """

    kind: str
    answer: Any = None


class HaltedError(BaseException):
    """Ends the code of a rank at a request that has no reply yet."""


class Session:
    """One run of a rank: its requests, their replies, and its clock."""

    def __init__(self, rank: int, asked: list[Request], replies: list[Reply]) -> None:
        self.rank = rank
        self.request: Request | None = None  # the first request without a reply
        self.seconds = 0.0
        self.differs = ""  # the error text, if a request differs from before
        self.early = self.stalled = 0
        self.connections = 0
        self._asked = asked
        self._replies = replies
        self._next = 0
        self._closed: set[Client] = set()

    def ask(self, request: Request) -> Any:
        """The recorded answer to a request.

        Raises:
            HaltedError: there is none yet, or the request differs from the recorded one.
            torch.distributed.DistStoreError: the request timed out.
            torch.distributed.DistNetworkError: the connection is closed.
        """
        # a finally clause of halted code may still send requests
        if self.request is not None or self.differs:
            raise HaltedError
        if request.client in self._closed and request.name != "enter":
            raise _lost()
        if self._next == len(self._replies):
            self.request = request
            raise HaltedError
        before, reply = self._asked[self._next], self._replies[self._next]
        if before != request:
            self.differs = (
                f"rank {self.rank} asked {_brief(request)}, where it asked {_brief(before)} before "
                f"on the same answers: a protocol must depend on nothing but these"
            )
            raise HaltedError
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


@contextmanager
def time_of(session: Session) -> Iterator[None]:
    """Let this thread read the clock of a rank. Only its timeouts and sleeps advance it.

    So a rank may be slower or faster than any other. The exploration includes every order of steps
    that some speeds of ranks cause, and more.
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


def _brief(request: Request) -> str:
    return f"{request.name}{request.arguments}"


def _lost() -> DistNetworkError:
    return DistNetworkError("the server has closed the connection")
