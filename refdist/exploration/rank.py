"""One rank of a protocol, which runs on recorded answers up to its next request.

The actions of a rank follow from the answers that it got. So its state is the list of these
answers. To find its next request, its code runs from the start on the recorded answers. No state is
copied or suspended, and the code needs no change.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from refdist.exploration.server import Request
from refdist.exploration.session import HaltedError, Reply, Session, time_of
from refdist.exploration.store import SimulatedStore

Protocol = Callable[[Any, int, int], Mapping[str, Callable[[], object]]]
"""``protocol(store, rank, world_size)`` returns the calls of a rank by name, in order."""


@dataclass(frozen=True)
class Call:
    """One call of a rank, as an observer sees it.

    Attributes:
        name: its name in the protocol.
        after: the ranks that had left their call of this name when this one was entered.
        over: whether it has ended: by returning ``value``, or by raising ``error``.
        seconds: total duration of its waits that timed out.
        early: number of its waits that timed out while another rank could go on.
        stalled: number of its waits that timed out because nothing else could happen.
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
    """The progress of a rank.

    Attributes:
        names: names of all its calls.
        calls: the calls that it has entered.
        request: its next request; None at its end.
    """

    names: tuple[str, ...]
    calls: tuple[Call, ...]
    request: Request | None


def run(
    protocol: Protocol, rank: int, world_size: int, asked: list[Request], replies: list[Reply]
) -> Ran:
    """Run a rank on recorded replies, in simulated time.

    Raises:
        ValueError: the protocol returned no calls, or other requests than before.
        Exception: any error that the protocol raises outside its calls.
    """
    session = Session(rank, asked, replies)
    names: tuple[str, ...] = ()
    calls: list[Call] = []
    with time_of(session):
        try:
            functions = protocol(SimulatedStore(session), rank, world_size)
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
                except HaltedError as halted:
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
        except HaltedError as halted:
            traceback.clear_frames(halted.__traceback__)
    if session.differs:
        raise ValueError(session.differs)
    return Ran(names, tuple(calls), session.request)


def _without_frames(error: Exception) -> Exception:
    """The error without its tracebacks, which keep objects of the run alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
