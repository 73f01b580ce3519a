"""How ranks that have made different numbers of calls come together again."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from refdist.barrier.plain import Barrier
from refdist.barrier.roll import AGAIN, COMPLETE, Try
from refdist.deadline import Deadline
from refdist.errors import (
    BarrierError,
    ConcurrentCallError,
    StoreConnectionError,
    name_ranks,
    outcome_of,
)


class Realigning:
    """The methods of a group for ranks that are out of step."""

    _barrier: Any
    _calls: Any
    _wire: Any
    _recorded: Callable[..., Any]

    def realign(self, timeout: float = 30.0) -> None:
        """Bring ranks into step that have made different numbers of collective calls.

        All ranks call it. It is a barrier, with one timeout for all phases, that goes past those
        that have broken without this rank. Ranks get out of step if one of them alone makes a call,
        and that times out. An interrupt does no such thing. Raises as ``barrier``; with
        ``wire="vllm"``, a ValueError.
        """
        if self._wire.realign is None:
            raise ValueError("realign: vLLM's protocol has nothing that brings ranks into step")
        deadline, function = Deadline(timeout, whole=True), self._recorded(self._wire.realign)
        self._calls.run("realign", deadline, function, self._barrier, deadline)

    def _advise(self, error: BarrierError) -> None:
        """Tell a rank that came late which ranks have gone on without it."""
        with suppress(BarrierError, ConcurrentCallError, StoreConnectionError, ValueError):
            self._calls.run("barrier", Deadline(0), advise, self._barrier, error)


def realign(barrier: Barrier, deadline: Deadline) -> None:
    """Pass a barrier with all other ranks, whatever broken ones each of them still has to find.

    Raises:
        BarrierError: as ``Barrier.wait``.
    """
    while True:
        _skip_broken(barrier)
        try:
            barrier.wait(deadline)
            return
        except BarrierError as error:
            over = deadline.remaining() == 0 or error.broken_by == barrier.rank
            if error.completed or over:
                raise


def _skip_broken(barrier: Barrier) -> None:
    """Go past the barriers that have broken without this rank, as if it had been there."""
    while True:
        this = Try(barrier.keys, b"", Deadline(0))
        outcome = barrier.look(this)
        if outcome is None or outcome == COMPLETE:
            return
        barrier.generation += outcome != AGAIN
        barrier.go_past(this)


def break_off(barrier: Barrier, reason: str, missing: Sequence[int] = ()) -> None:
    """Break the next barrier, to which this rank will not come. ``reason`` says why.

    The other ranks, which may be waiting there, learn it at once, and which ranks are missing; by
    default, those that have not arrived.
    """
    if barrier.world_size > 1:
        this = Try(barrier.keys, b"", Deadline(0))
        missing = missing or barrier.read(this).missing(barrier.world_size)
        barrier.propose(this, outcome_of(barrier.rank, reason, missing, 0.0, 0.0))
        barrier.generation += 1
        barrier.go_past(this)


def advise(barrier: Barrier, error: BarrierError) -> None:
    """Add to the error of a rank that came late which ranks have gone on without it."""
    if barrier.rank in error.missing and not error.completed:
        ahead = sorted(barrier.read(Try(barrier.keys, b"", Deadline(0))).values)
        if ahead:
            error.add_note(
                f"{name_ranks(ahead)} came to barrier {barrier.generation} already. If a rank has "
                f"made a call that others have not, call group.realign() on all of them."
            )
