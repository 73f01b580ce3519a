"""A barrier in three phases, complete over any torch store.

Arrival
    Each rank signs the roll, adds one to the count, and waits for the outcome. The rank that makes
    the count whole goes on at once, and so does a rank whose time is up.
Confirmation
    The outcome is one key that is written once: the first proposal holds for all. A rank that finds
    everyone on the roll proposes "complete", another one "broken", and says why. So all ranks
    return or all raise, also when the last arrival and a timeout meet, and a rank that comes late.
Departure
    Each rank signs off and adds one to the count again. Rank 0 hosts the store, so it leaves last:
    the last of the others writes the key for which rank 0 waits.

Each try has keys of its own. A rank that arrives at one has done with those before it, so the ranks
delete the 4 earlier keys as they leave. Besides, a rank waits for 4 requests, rank 0 for 5 unless
it is the last to leave; and for one more in each further second.

A rank that is interrupted in arrival proposes "again": then no barrier is counted, and the others
try again. If another outcome holds, the interrupt waits until the rank has left. With a secret, the
roll and the outcome carry tags. The count has none and decides nothing: a stranger can make a
barrier fail, in time, but never pass.
"""

from typing import Any

from refdist.barrier.roll import AGAIN, ARRIVED, COMPLETE, ENTRY, LEFT, Roll, Try
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import error_of, not_left
from refdist.store.client import StoreClient
from refdist.store.keys import PlainKeys
from refdist.store.leftovers import Leftovers
from refdist.store.seals import NO_SEALS, NoSeals


class Barrier:
    """The barriers of a group, which ``generation`` counts, over a torch store or a StoreClient."""

    def __init__(self, store: Any, rank: int, world_size: int, seals: NoSeals = NO_SEALS) -> None:
        self.store = store if isinstance(store, StoreClient) else StoreClient(store)
        self.rank, self.world_size, self.seals = rank, world_size, seals
        self.generation = self.tries = 0
        self.keys: Any = PlainKeys.of(0)
        self.leftovers = Leftovers(self.store)

    def gather(self, value: bytes, timeout: float | Deadline) -> list[bytes]:
        """A ``wait`` to which each rank brings a value, not empty. Returns all, in rank order."""
        return self.wait(timeout, value) or []

    def wait(self, timeout: float | Deadline, value: bytes = b"") -> list[bytes] | None:
        """Block until all ranks have come; rank 0 until all have left. Seconds for each wait.

        Raises:
            BarrierError: on every rank that entered, when a rank did not arrive in time; on rank
                0 alone, with ``completed=True``, when a rank did not leave in time.
            CancelledWaitError: on a rank whose deadline was cancelled.
        """
        deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
        outcome = AGAIN
        try:
            while outcome == AGAIN:
                this = Try(self.keys, value, deadline)
                self.arrive(this)
                outcome = self.confirm(this)
                if outcome != COMPLETE:
                    self.go_past(this)
                    if this.interrupt is not None:
                        raise this.interrupt
            if outcome != COMPLETE:
                raise error_of(outcome, self.generation, self.world_size)
            self.depart(this)
            return this.roll.in_rank_order(self.world_size) if value else None
        finally:
            self.generation += outcome != AGAIN
            this.interrupt = None  # its traceback has ``this``

    def arrive(self, this: Try) -> None:
        """Sign the roll, and wait for the outcome; without one, this rank has to propose it."""
        self.sign(this, ARRIVED, this.value)
        try:
            if self.store.add(this.keys.counter, 1) < self.world_size:
                this.seen = self.store.wait_for_value(this.keys.outcome, this.deadline) or None
        except CancelledWaitError as error:
            this.interrupt = error

    def confirm(self, this: Try) -> bytes:
        """The outcome that holds for all, which may be the one that this rank proposes."""
        if this.seen is None:
            proposal = this.proposal(self.read(this), self.rank, self.world_size)
            this.seen = self.propose(this, proposal)
        outcome = self.seals.unseal_outcome(this.keys.outcome, this.seen)
        if this.value and outcome == COMPLETE:
            this.roll = self.read(this)
        return outcome

    def depart(self, this: Try) -> None:
        """Sign off. Rank 0 waits until all have, unless it was interrupted."""
        self.leftovers.delete(lambda: self.read(this).broadcasts)
        self.go_past(this)
        if self.rank != 0:
            self.sign(this, LEFT)
        left = self.store.add(this.keys.counter, 1) - self.world_size
        if self.rank != 0 and left == self.world_size:
            self.store.set(this.keys.all_left, "")
        if this.interrupt is not None:
            raise this.interrupt
        if self.rank == 0 and left < self.world_size:
            self.wait_for_others(this, "wait", [this.keys.all_left])

    def all_have_left(self, this: Try) -> bool:
        """Whether all ranks have left."""
        return self.store.add(this.keys.counter, 0) == 2 * self.world_size

    def wait_for_others(self, this: Try, *request: Any) -> None:
        """Wait until all ranks have left. The last might not have been able to say so."""
        this.deadline.restart()
        if not (self.store.in_slices(this.deadline, *request) or self.all_have_left(this)):
            others, waited = set(range(1, self.world_size)), this.deadline
            missing = sorted(others - self.read(this).left or others)
            raise not_left(missing, self.generation, waited.elapsed(), waited.allowed)

    def go_past(self, this: Try) -> None:
        """Go on to the next try. Each rank deletes its share of these keys in a later one."""
        self.leftovers.add(this.keys[self.rank :: self.world_size])
        self.tries += 1
        self.keys = PlainKeys.of(self.tries)

    def propose(self, this: Try, outcome: bytes) -> bytes:
        """Write an outcome, unless there is one. Returns the one that is there then."""
        key = this.keys.outcome
        return self.store.decide(key, self.seals.seal(key, outcome))

    def look(self, this: Try) -> bytes | None:
        """The outcome; None while there is none."""
        found = self.store.check([this.keys.outcome]) and self.store.peek(this.keys.outcome)
        return self.seals.unseal_outcome(this.keys.outcome, found) if found else None

    def sign(self, this: Try, kind: int, value: bytes = b"") -> None:
        """Append an entry to the roll."""
        broadcasts = self.leftovers.broadcasts
        entry = ENTRY.pack(self.generation, broadcasts, self.rank, kind, len(value)) + value
        if self.seals.tag_bytes:
            entry += self.seals.tag(this.keys.roll, entry)
        self.store.append(this.keys.roll, entry)

    def read(self, this: Try) -> Roll:
        """Read the roll."""
        key = this.keys.roll
        return Roll.parse(self.store.peek(key), self.generation, self.seals, key)
