"""A barrier in three phases, over any torch store.

Arrival
    Each rank writes itself into the roll and adds one to the count of arrivals. Who makes the
    count whole knows that everyone is here. The others wait for the outcome. After this phase a
    rank knows that all have arrived, or that somebody has decided, or that its time is up.
Confirmation
    One write decides for all. The last arrival proposes "complete"; a rank whose time is up
    proposes "broken", with the ranks that it missed. ``compare_set`` accepts the first proposal
    and answers every later one with it. After this phase every rank knows the same outcome, so
    either all return or all raise, also when the last arrival and a timeout meet. A latecomer
    finds the barrier broken and raises too, instead of passing alone.
Departure
    Each rank but 0 says that it has read the outcome. Rank 0 waits for them and leaves last: it
    hosts the store, which the others still needed in order to read the outcome, and now it may
    delete the outcome or end the store.

Barriers are numbered by *generation*; every rank counts for itself, and a broken barrier counts.
Each generation has keys of its own, so nothing that happens in one, an interrupt or a death, can
put a later one out of step. Rank 0 deletes them when everyone has left. Those of a broken barrier
stay for latecomers, until a complete barrier shows that everyone has come past it.

Requests to the store: at most 9 a rank, of constant size, and one more for each second of waiting.
A rank whose time is up looks up the roll besides, one request for each rank.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.distributed import DistError, Store

from refdist import keys
from refdist.errors import BarrierError, name_ranks
from refdist.waiting import Deadline, decide, peek, wait_for_keys

_COMPLETE = b"complete"


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


class Barrier:
    """The barriers of one group, one after the other, as one of its ranks sees them."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._generation = 0
        self._litter: list[str] = []  # keys that rank 0 deletes after the next complete barrier

    def wait(
        self,
        timeout: float | Deadline,
        record: Callable[[PhaseEvent], None] | None = None,
    ) -> None:
        """Block until every rank has called ``wait``; rank 0 until every other rank has left.

        Args:
            timeout: seconds, for each phase; or one deadline for all of them.
            record: is called with a PhaseEvent for each phase that ended.

        Raises:
            BarrierError: on every rank that entered, when a rank did not arrive in time; on rank
                0 alone, with ``completed=True``, when a rank did not leave in time.
            KeyboardInterrupt: on the interrupted rank. If the barrier was not complete, it is
                broken for the others.
        """
        deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
        generation = self._generation
        self._generation += 1
        try:
            with self._phase("arrival", generation, record):
                i_am_last, in_time = self._arrive(generation, deadline)
            with self._phase("confirmation", generation, record):
                proposal = _COMPLETE if i_am_last else None
                if not in_time:
                    proposal = self._broken(generation, deadline, "its time was up")
                outcome = self._agree(generation, proposal)
        except BaseException as reason:
            self._abandon(generation, deadline, reason)
            raise
        if outcome != _COMPLETE:
            self._note_litter(generation)
            self._raise_broken(generation, outcome)
        if not isinstance(timeout, Deadline):
            deadline = Deadline(timeout)
        with self._phase("departure", generation, record):
            self._depart(generation, deadline)

    def _arrive(self, generation: int, deadline: Deadline) -> tuple[bool, bool]:
        """Returns whether this rank is the last to arrive, and whether it was decided in time."""
        self._store.set(keys.roll(self._rank), f"{generation} arrived")
        if self._store.add(keys.arrived(generation), 1) == self._world_size:
            return True, True
        return False, wait_for_keys(self._store, [keys.outcome(generation)], deadline)

    def _agree(self, generation: int, proposal: bytes | None) -> bytes:
        """The outcome: this rank's proposal if it is the first, else what was proposed before."""
        key = keys.outcome(generation)
        if proposal is not None:
            return decide(self._store, key, proposal)
        return peek(self._store, key) or b""

    def _depart(self, generation: int, deadline: Deadline) -> None:
        if self._rank != 0:
            self._say_left(generation)
            return
        self._note_litter(generation)
        if self._world_size > 1:
            all_left = [keys.all_left(generation)]
            if not wait_for_keys(self._store, all_left, deadline):
                self._check_departures(generation, deadline)
        # everyone has left this barrier, so nobody needs its keys, nor those of barriers before
        while self._litter:
            self._store.delete_key(self._litter[-1])
            self._litter.pop()

    def _say_left(self, generation: int) -> None:
        departures = self._store.add(keys.departed(generation), 1)
        self._store.set(keys.roll(self._rank), f"{generation} left")
        if departures == self._world_size - 1:
            self._store.set(keys.all_left(generation), "")

    def _note_litter(self, generation: int) -> None:
        """Before rank 0 waits or raises, so that the keys go away later if they do not now."""
        if self._rank == 0:
            self._litter += [keys.outcome(generation), keys.arrived(generation)]
            if self._world_size > 1:
                self._litter += [keys.departed(generation), keys.all_left(generation)]

    def _abandon(self, generation: int, deadline: Deadline, reason: BaseException) -> None:
        """This rank leaves by an exception: break the barrier, unless it is complete already."""
        # a store that is gone tells the other ranks by itself
        with suppress(DistError):
            broken = self._broken(generation, deadline, f"of {type(reason).__name__}")
            completed = self._agree(generation, broken) == _COMPLETE
            self._note_litter(generation)
            if completed and self._rank != 0:
                self._say_left(generation)

    def _broken(self, generation: int, deadline: Deadline, reason: str) -> bytes:
        """The proposal that breaks a barrier: who, why, when, and who was missing."""
        arrived = f"{generation} arrived".encode()
        missing = [r for r in range(self._world_size) if peek(self._store, keys.roll(r)) != arrived]
        return json.dumps(
            {
                "by": self._rank,
                "reason": reason,
                "missing": missing,
                "elapsed": deadline.elapsed(),
                "allowed": deadline.allowed,
                "at": time.time(),
            }
        ).encode()

    def _raise_broken(self, generation: int, outcome: bytes) -> NoReturn:
        try:
            broken = json.loads(outcome)
            by, missing, at = int(broken["by"]), list(map(int, broken["missing"])), broken["at"]
            elapsed, allowed = float(broken["elapsed"]), float(broken["allowed"])
            when = time.strftime("%H:%M:%S", time.localtime(at))
            text = (
                f"barrier {generation} was broken in arrival by rank {by} at {when}, after "
                f"{elapsed:.2f} of {round(allowed, 2):g} s, because {broken['reason']}; "
                f"missing: {name_ranks(missing)} of {self._world_size}"
            )
        except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
            raise self._error(
                f"barrier {generation} has an outcome that no rank of refdist writes: "
                f"{outcome[:80]!r}",
                phase="confirmation",
            ) from error
        raise self._error(
            text, phase="arrival", missing=missing, elapsed=elapsed, allowed=allowed, broken_by=by
        )

    def _check_departures(self, generation: int, deadline: Deadline) -> None:
        """Raise, naming who did not leave; unless all have, and an interrupt kept one quiet."""
        departures = int(peek(self._store, keys.departed(generation)) or 0)
        # a rank that has left may have arrived at the next barrier already
        present = f"{generation} arrived".encode()
        others = range(1, self._world_size)
        missing = [r for r in others if peek(self._store, keys.roll(r)) == present]
        if not missing or departures == self._world_size - 1:
            return
        raise self._error(
            f"barrier {generation} completed, but in departure rank 0 waited in vain for "
            f"{name_ranks(missing)} to leave: {deadline.elapsed():.2f} of {deadline.allowed:g} s",
            phase="departure",
            missing=missing,
            elapsed=deadline.elapsed(),
            allowed=deadline.allowed,
            completed=True,
        )

    def _error(self, text: str, **attributes: Any) -> BarrierError:
        known: dict[str, Any] = {"missing": (), "elapsed": 0.0, "allowed": 0.0}
        known |= {"broken_by": self._rank, "generation": self._generation - 1}
        return BarrierError(text, **(known | attributes))

    @contextmanager
    def _phase(
        self, name: str, generation: int, record: Callable[[PhaseEvent], None] | None
    ) -> Iterator[None]:
        if record is None:
            yield
            return
        start = time.monotonic()
        yield
        record(PhaseEvent(self._rank, generation, name, start, time.monotonic()))
