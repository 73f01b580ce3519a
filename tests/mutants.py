"""Barriers with one mistake each, made of the real one. Exploration has to find every mistake."""

from typing import NamedTuple
from unittest.mock import patch

from refdist.barrier import Barrier
from refdist.barrier.roll import write_reason
from refdist.errors import BarrierError
from refdist.exploration import (
    Property,
    agreement,
    everyone_is_woken,
    next_call_works,
    no_key_stays,
    no_latecomer_passes,
    nobody_returns_early,
    nobody_waits_for_ever,
    one_reason,
    rank_0_leaves_last,
)
from refdist.store import keys


class NoDeparture(Barrier):
    """No departure phase: rank 0 leaves when it knows the outcome."""

    def _depart(self, slot, state, *rest):
        super()._depart(slot, state._replace(left=self._world_size), *rest)


class NoOutcome(Barrier):
    """No outcome key: each rank decides by what it has seen itself."""

    def _break(self, slot, generation, *rest):
        super()._break(slot, generation, *rest)
        raise BarrierError("my time was up", generation=generation, broken_by=self._rank)

    def _confirm(self, *arguments):
        return super()._confirm(*arguments)._replace(broken=False)


class PlainCounter(Barrier):
    """A plain counter of arrivals that is used again, and never reset."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._slots = self._slots[:1] * keys.SLOTS

    def _depart(self, slot, *rest):
        self._used = None
        super()._depart(slot, *rest)


class KeysDeletedEarly(Barrier):
    """Rank 0 deletes the keys before all have left."""

    def _depart(self, slot, *rest):
        if self._rank == 0:
            for key in vars(slot).values():
                self._store.delete_key(key)
        super()._depart(slot, *rest)


class TimeoutBreaksNothing(Barrier):
    """A rank whose time is up raises, but does not break the barrier for the others."""

    def _break(self, slot, generation, *rest):
        raise BarrierError("my time was up", generation=generation, broken_by=self._rank)


class BreakWithoutLooking(Barrier):
    """A rank whose time is up breaks the barrier also when others have confirmed it."""

    def _break(self, slot, generation, *rest):
        self._store.set(slot.state, "0")
        super()._break(slot, generation, *rest)


class NobodyWakes(Barrier):
    """The first to confirm wakes nobody."""

    def _confirm(self, *arguments):
        gates, self._gates = self._gates, _GatesThatStayShut()
        try:
            return super()._confirm(*arguments)
        finally:
            self._gates = gates


class _GatesThatStayShut:
    open_always = False

    def open(self, key):
        pass


class SleepsUnseen(Barrier):
    """A rank does not look whether the barrier is decided before it falls asleep."""

    def _arrive(self, slot, generation, deadline):
        if self._gates.count_in(slot.arrived, self._world_size, deadline):
            return True, 0
        return self._gates.wait(slot.wake, deadline), 0


class AnyoneOpensTheLastGate(Barrier):
    """Whoever leaves lets rank 0 go, and not only the last."""

    def _depart(self, slot, state, *rest):
        left = state.left if self._rank == 0 else self._world_size
        super()._depart(slot, state._replace(left=left), *rest)


class SameNamesAfterFailure(Barrier):
    """The barrier after a broken one uses the same keys."""

    def _end_epoch(self):
        epoch, slots = self._epoch, self._slots
        super()._end_epoch()
        self._epoch, self._slots = epoch, slots


class OldKeysStay(Barrier):
    """The keys of a broken barrier are never deleted."""

    def _end_epoch(self):
        super()._end_epoch()
        self._old_keys.clear()


class EveryoneTellsWhy(Barrier):
    """Every rank whose time is up writes why, and not only the one that broke the barrier."""

    def _break(self, slot, generation, deadline, reason, again=False):
        super()._break(slot, generation, deadline, reason, again)
        why = write_reason(self._rank, reason, [], deadline.elapsed(), deadline.allowed)
        self._store.set(keys.reason(self._epoch), why)


class NoReason(Barrier):
    """The rank that breaks the barrier does not say why."""

    def _break(self, *arguments):
        with patch("refdist.store.keys.reason", lambda epoch: "elsewhere"):
            super()._break(*arguments)


class ResetTooEarly(Barrier):
    """Rank 0 resets the slot of the present barrier, and not that of the one before."""

    def _depart(self, slot, *rest):
        self._used = slot
        super()._depart(slot, *rest)


class TwoSlots(Barrier):
    """Two sets of keys in turn, and not three."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._slots = [*self._slots[:2]] * keys.SLOTS

    @property
    def _in_epoch(self):
        return self.__dict__["_in_epoch"]

    @_in_epoch.setter
    def _in_epoch(self, number):
        # the slot is this modulo 3; so it is 0, 1, 0, 1, ...
        self.__dict__["_in_epoch"] = number % 2


class WaitsForEver(Barrier):
    """A rank that falls asleep waits for the gate as long as the store lets it."""

    def _arrive(self, slot, generation, deadline):
        if self._gates.count_in(slot.arrived, self._world_size, deadline):
            return True, 0
        self._store.wait([slot.wake])
        return True, 0


class Mutant(NamedTuple):
    """A barrier with a mistake, and where it shows.

    Attributes:
        barrier: the class.
        violated: the property that must not hold.
        native: whether its gates are counters.
        world_size: how many ranks it takes.
        rounds: how many barriers it takes, one after the other.
        timeouts: how many must come early.
        width: of the search.
        shows: a line of its timeline.
    """

    barrier: type[Barrier]
    violated: Property
    native: bool = False
    world_size: int = 2
    rounds: int = 1
    timeouts: int = 1
    width: int | None = None
    shows: str = ""


MUTANTS = [
    Mutant(
        NoDeparture, rank_0_leaves_last, native=True, shows="   7  add 1 left to state -> 1 left"
    ),
    Mutant(NoOutcome, agreement, shows="raises BarrierError from barrier 0"),
    Mutant(PlainCounter, nobody_returns_early, rounds=2, shows="add 1 to arrived -> 3"),
    Mutant(KeysDeletedEarly, everyone_is_woken, shows="delete_key state -> yes"),
    Mutant(TimeoutBreaksNothing, no_latecomer_passes, shows="raises BarrierError from barrier 0"),
    Mutant(BreakWithoutLooking, agreement, shows="set state = nothing yet"),
    Mutant(NobodyWakes, everyone_is_woken, shows="wait wake: time is up"),
    Mutant(
        SleepsUnseen, everyone_is_woken, native=True, shows="   9  barrier wake of open: time is up"
    ),
    Mutant(WaitsForEver, nobody_waits_for_ever, native=True, shows="wait wake: waits"),
    Mutant(AnyoneOpensTheLastGate, rank_0_leaves_last, native=True, shows="   8  add 1 left"),
    Mutant(
        SameNamesAfterFailure, next_call_works, rounds=2, shows="raises BarrierError from barrier 1"
    ),
    Mutant(OldKeysStay, no_key_stays, rounds=2, shows="returns from barrier 1"),
    Mutant(EveryoneTellsWhy, one_reason, world_size=3, timeouts=2, width=3000, shows='{"by": 0'),
    Mutant(NoReason, everyone_is_woken, shows="wait reason: time is up"),
    Mutant(ResetTooEarly, next_call_works, shows="set arrived = 0, state = nothing yet"),
    Mutant(TwoSlots, next_call_works, rounds=3, timeouts=0, shows="add 1 to arrived -> 3"),
]
