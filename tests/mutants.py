"""Barriers with one mistake each, made of the real ones. Exploration has to find every mistake.

Each mistake overrides a step of ``plain.Barrier``, of ``quick.Barrier``, or of both in turn.
"""

from contextlib import contextmanager
from typing import NamedTuple

from refdist.barrier import plain, quick
from refdist.barrier.roll import AGAIN, COMPLETE
from refdist.errors import BarrierError, outcome_of
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
from refdist.store.keys import PlainKeys, Slot
from refdist.store.leftovers import Leftovers


@contextmanager
def replaced(store, **requests):
    """Requests of a client that do something else meanwhile."""
    vars(store).update(requests)
    try:
        yield
    finally:
        for name in requests:
            del vars(store)[name]


# Mistakes that either barrier can have.


class NoDeparture:
    """No departure phase: rank 0 leaves when it knows the outcome."""

    def depart(self, this):
        with replaced(self.store, in_slices=lambda *_: True):
            super().depart(this)


class NoOutcome:
    """No outcome: each rank decides by what it has seen itself."""

    def confirm(self, this):
        mine = COMPLETE
        if this.seen is None:
            mine = this.proposal(self.read(this), self.rank, self.world_size)
        super().confirm(this)
        return mine


class KeysDeletedEarly:
    """Rank 0 deletes the keys before all have left."""

    def depart(self, this):
        if self.rank == 0:
            for key in this.keys:
                self.store.delete_key(key)
        super().depart(this)


class TimeoutBreaksNothing:
    """A rank whose time is up raises, but does not break the barrier for the others."""

    def propose(self, this, outcome):
        if outcome != COMPLETE:
            raise BarrierError("my time was up", generation=self.generation, broken_by=self.rank)
        return super().propose(this, outcome)


class RankZeroIsNotTold:
    """The last to leave does not tell rank 0, which waits for it."""

    def depart(self, this):
        with replaced(self.store, set=lambda *_: None):
            super().depart(this)


class SameNamesAfterFailure:
    """The barrier after a broken one uses the same keys."""

    def go_past(self, this):
        before = self.keys, self.tries
        super().go_past(this)
        if this.seen != COMPLETE:
            self.keys, self.tries = before
            if hasattr(self, "epoch"):
                self.epoch -= 1
                self.slots = [Slot.of(self.epoch, slot) for slot in range(quick.SLOTS)]


class OldKeysStay:
    """The keys of a broken barrier are never deleted."""

    def go_past(self, this):
        super().go_past(this)
        self.leftovers = Leftovers(self.store)


class GoesWithoutAWord:
    """A rank that is interrupted says nothing, and comes again as if it had not been there."""

    def confirm(self, this):
        if this.interrupt is not None:
            raise this.interrupt
        return super().confirm(this)


# Mistakes of the plain barrier.


class OneSetOfKeys:
    """All barriers use the same keys, and nobody deletes them."""

    def go_past(self, this):
        super().go_past(this)
        self.keys = PlainKeys.of(0)
        self.leftovers = Leftovers(self.store)


class ProposalsOverwrite:
    """A rank proposes an outcome also when there is one."""

    def propose(self, this, outcome):
        self.store.set(this.keys.outcome, outcome)
        return outcome


class CountsBeforeItSigns:
    """A rank counts itself before it signs, so the last may not find everyone on the roll."""

    def sign(self, this, kind, value=b""):
        if kind == 0 and this.keys == self.keys:
            self.store.add(this.keys.counter, 1)
            with replaced(self.store, add=lambda *_: 0):
                super().sign(this, kind, value)
            self.counted = True
        else:
            super().sign(this, kind, value)

    def arrive(self, this):
        add = type(self.store).add
        counts = []

        def counted(key, amount):
            # the second time is that of the real barrier
            counts.append(add(self.store, key, amount) if not counts else counts[0])
            return counts[-1]

        with replaced(self.store, add=counted):
            super().arrive(this)


class WaitsForTheOutcome:
    """A rank waits for the outcome as long as the store lets it."""

    def arrive(self, this):
        def wait(key, deadline):
            self.store.store.wait([key])
            return self.store.peek(key)

        with replaced(self.store, wait_for_value=wait):
            super().arrive(this)


class AnyoneTellsRankZero:
    """Any rank that leaves lets rank 0 go, and not only the last."""

    def depart(self, this):
        if self.rank != 0:
            self.store.set(this.keys.all_left, "")
        super().depart(this)


# Mistakes of the quick barrier.


class OneSlot:
    """All barriers use the same keys, and nobody resets them."""

    def depart(self, this):
        self.used = None
        super().depart(this)
        self.keys = self.slots[0]


class BreakWithoutLooking:
    """A rank whose time is up breaks the barrier also when others have confirmed it."""

    def propose(self, this, outcome):
        self.store.set(this.keys.state, "0")
        return super().propose(this, outcome)


class NobodyWakes:
    """The first to confirm wakes nobody."""

    def confirm(self, this):
        with replaced(self.store, set=lambda *_: None):
            return super().confirm(this)


class SleepsUnseen:
    """A rank does not look whether the barrier is decided before it falls asleep."""

    def sleep(self, this):
        self.store.in_slices(this.deadline, "barrier", this.keys.wake, quick.OPEN)
        return COMPLETE


class WaitsToBeWoken:
    """A rank that falls asleep waits for the key as long as the store lets it."""

    def arrive(self, this):
        def wait(deadline, request, key, *_):
            self.store.store.wait([key])
            return True

        with replaced(self.store, in_slices=wait):
            super().arrive(this)


class AnyoneLetsRankZeroGo:
    """Any rank that leaves lets rank 0 go, and not only the last."""

    def depart(self, this):
        if self.rank != 0:
            self.store.set(this.keys.left, str(quick.OPEN))
        super().depart(this)


class EveryoneTellsWhy:
    """Every rank whose time is up writes why, and not only the one that broke the barrier."""

    def propose(self, this, outcome):
        super().propose(this, outcome)
        why = outcome_of(self.rank, "its time was up", [], 0.0, 0.0)
        if outcome not in (COMPLETE, AGAIN):
            self.store.set(quick.reason(self.epoch), why)
        return outcome


class NoReason:
    """The rank that breaks the barrier does not say why."""

    def propose(self, this, outcome):
        with replaced(self.store, set=lambda *_: None):
            return super().propose(this, outcome)


class ResetTooEarly:
    """Rank 0 resets the slot of the present barrier, and not that of the one before."""

    def depart(self, this):
        self.used = this.keys
        super().depart(this)


class TwoSlots:
    """Two sets of keys in turn, and not three."""

    def depart(self, this):
        super().depart(this)
        self.tries %= 2
        self.keys = self.slots[self.tries]


class Mutant(NamedTuple):
    """A barrier with a mistake, and where it shows.

    Attributes:
        barrier: the class.
        violated: the property that must not hold.
        world_size: how many ranks it takes.
        rounds: how many barriers it takes, one after the other.
        timeouts: how many must come early.
        crashes: how many ranks must die.
        seconds: the timeout of each barrier; above 1.0, ranks of ``quick`` may sleep.
        width: of the search.
        shows: a line of its timeline.
    """

    barrier: type[plain.Barrier]
    violated: Property
    world_size: int = 2
    rounds: int = 1
    timeouts: int = 1
    crashes: int = 0
    seconds: float = 1.0
    width: int | None = None
    shows: str = ""

    @property
    def kind(self):
        """The barrier without the mistake."""
        return self.barrier.__bases__[-1]


def mutant(mistake, module, violated, **options):
    kind = type(mistake.__name__, (mistake, module.Barrier), {"__doc__": mistake.__doc__})
    return Mutant(kind, violated, **options)


MUTANTS = [
    mutant(NoDeparture, plain, rank_0_leaves_last),
    mutant(NoDeparture, quick, rank_0_leaves_last),
    mutant(NoOutcome, plain, agreement),
    mutant(NoOutcome, quick, agreement),
    mutant(KeysDeletedEarly, plain, agreement),
    mutant(KeysDeletedEarly, quick, agreement),
    mutant(TimeoutBreaksNothing, plain, no_latecomer_passes),
    mutant(TimeoutBreaksNothing, quick, no_latecomer_passes),
    mutant(RankZeroIsNotTold, plain, everyone_is_woken),
    mutant(RankZeroIsNotTold, quick, everyone_is_woken),
    mutant(SameNamesAfterFailure, plain, next_call_works, rounds=2),
    mutant(SameNamesAfterFailure, quick, next_call_works, rounds=2),
    mutant(OldKeysStay, plain, no_key_stays, rounds=2),
    mutant(OldKeysStay, quick, no_key_stays, rounds=2),
    mutant(OneSetOfKeys, plain, nobody_returns_early, rounds=2),
    mutant(ProposalsOverwrite, plain, agreement),
    mutant(CountsBeforeItSigns, plain, next_call_works),
    mutant(WaitsForTheOutcome, plain, nobody_waits_for_ever, crashes=1),
    mutant(AnyoneTellsRankZero, plain, rank_0_leaves_last, world_size=3, timeouts=0),
    mutant(OneSlot, quick, nobody_returns_early, rounds=2),
    mutant(BreakWithoutLooking, quick, agreement),
    mutant(NobodyWakes, quick, everyone_is_woken, seconds=1.5),
    mutant(SleepsUnseen, quick, everyone_is_woken, seconds=1.5),
    mutant(WaitsToBeWoken, quick, nobody_waits_for_ever, crashes=1, seconds=1.5),
    mutant(AnyoneLetsRankZeroGo, quick, rank_0_leaves_last, world_size=3, timeouts=0),
    mutant(EveryoneTellsWhy, quick, one_reason, world_size=3, timeouts=2, width=1000),
    mutant(NoReason, quick, everyone_is_woken),
    mutant(ResetTooEarly, quick, next_call_works, rounds=2),
    mutant(TwoSlots, quick, next_call_works, rounds=3, timeouts=0),
]
