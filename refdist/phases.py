"""When each phase of a barrier began and ended, for figures and for debugging."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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


STEPS = {"arrive": "arrival", "confirm": "confirmation", "depart": "departure"}
"""The steps of a barrier, which are methods, and the phases that they are."""


def recorded(
    barrier: Any,
    record: Callable[[PhaseEvent], object],
    function: Callable[..., T],
    *arguments: Any,
) -> T:
    """Call a function, and record each phase of the barrier that ends meanwhile without an error.

    Args:
        barrier: a ``refdist.barrier.plain.Barrier``, or one of the same steps.
        record: is called with a PhaseEvent.
        function: such as ``barrier.wait``.
        arguments: of the function.
    """

    def timed(step: Callable[[Any], Any], phase: str) -> Callable[[Any], Any]:
        def run(this: Any) -> Any:
            start = time.monotonic()
            result = step(this)
            record(PhaseEvent(barrier.rank, barrier.generation, phase, start, time.monotonic()))
            return result

        return run

    with ExitStack() as stack:
        for name, phase in STEPS.items():
            setattr(barrier, name, timed(getattr(barrier, name), phase))
            stack.callback(delattr, barrier, name)
        return function(*arguments)
