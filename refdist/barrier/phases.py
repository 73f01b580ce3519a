"""When each phase of a barrier began and ended, for figures and for debugging."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

_NOT_RECORDED = nullcontext()


@dataclass(frozen=True)
class PhaseEvent:
    """One phase of one barrier on one rank.

    ``start`` and ``end`` are seconds of ``time.monotonic()``, which all processes of a host share.
    """

    rank: int
    generation: int
    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long the phase took on this rank."""
        return self.end - self.start


Record = Callable[[PhaseEvent], None]


def phase(
    name: str, rank: int, generation: int, record: Record | None
) -> AbstractContextManager[None]:
    """Around a phase: record when it began and ended, if it ends without an error."""
    return _NOT_RECORDED if record is None else _recorded(name, rank, generation, record)


@contextmanager
def _recorded(name: str, rank: int, generation: int, record: Record) -> Iterator[None]:
    start = time.monotonic()
    yield
    record(PhaseEvent(rank, generation, name, start, time.monotonic()))
