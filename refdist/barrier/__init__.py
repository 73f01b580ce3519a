"""A barrier in three phases, over any torch store.

Arrival
    Each rank signs the roll, where it also puts what it brings to a gather, and adds one to the
    count of arrivals. After this phase a rank knows that all have arrived, or that someone broke
    the barrier, or that its own time is up. In the last case it breaks the barrier, unless all are
    there.
Confirmation
    One key, the *state*, decides for all, because the store changes it one request at a time. A
    rank confirms by adding its mark to the state, and the answer tells it the outcome. A rank
    breaks the barrier by replacing the state, which works only as long as nobody has confirmed.
    So either the first confirmation comes first, and all return, or the break does, and all raise:
    also when the last arrival and a timeout meet. A latecomer finds the state broken and raises
    too, instead of passing alone.
Departure
    A mark in the state also says that its rank has read the outcome and needs nothing more. The
    last of them opens a gate for rank 0, which leaves last: it hosts the store, which the others
    still needed.

Keys are used again. Barrier ``k`` has slot ``k mod 3``, and rank 0 resets the slot of barrier
``k - 1`` when it has confirmed barrier ``k``. By then everyone has arrived at ``k``, so nobody
uses the slot of ``k - 1``; and barrier ``k + 2``, which uses it next, cannot be reached by anyone
before rank 0 arrives at ``k + 1``. Nothing is deleted, and nothing that happens in one barrier, a
cancelled wait or a death, can put a later one out of step.

A broken barrier ends the *epoch*: the next one uses keys with new names, because latecomers still
have to find the broken one. Rank 0 deletes the old keys when a barrier completes, as everyone has
come past them by then.

A rank that is *interrupted* before the barrier is decided has not been there. It breaks the barrier
like one whose time is up, but its break says "again": the others try again in the next epoch, where
the rank may come or not, and no barrier is counted. One bit of the state says it, so all ranks
agree on that as well. If the barrier is decided, the interrupt waits until the rank has left.

A rank that has waited for a second falls *asleep*: it says so in the state, and waits at a gate.
Who confirms first sees the sleepers in the state, opens the gate, and says in the state that it
has, because until then it needs the store. Who is woken looks at the state: a gate that is open
before there is an outcome was opened by someone who is no rank, and this breaks the barrier. With
``Store.barrier`` a rank looks at the roll before it sleeps: a slow store may have let the first
wait of every rank run out, with all of them there.

Requests to the store: at most 11 a rank, of constant size, and one more for each second of waiting.
With ``Store.barrier``, and nobody asleep, 3 a rank, 4 for the last to leave, and 6 for rank 0. When
a barrier breaks, at most 13 a rank; 15 for the one that breaks it, and one more for each rank that
falls asleep meanwhile. In the next complete barrier rank 0 deletes the 16 keys of the epoch, and
in the barrier after a gather of large objects each rank deletes the chunks of its own.
"""

from collections.abc import Sequence

from refdist.barrier.gates import Gates, MeddledGateError, gates_of
from refdist.barrier.phases import Record, phase
from refdist.barrier.roll import (
    ASLEEP,
    MAX_WORLD_SIZE,
    WOKEN,
    State,
    read_reason,
    read_roll,
    read_state,
    sign,
    signed_by,
    write_reason,
)
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import AuthenticationError, BarrierError, name_ranks
from refdist.objects.boxes import Boxes
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS, NoSeals
from refdist.store.waiting import peek, set_several

_REASON_SECONDS = 1.0  # how long a rank waits to read why a barrier broke


class Barrier:
    """The barriers of one group, one after the other, as one of its ranks sees them.

    Attributes:
        seals: of what the ranks write about a barrier. Counts have none: ``refdist.store.seals``.
    """

    def __init__(
        self, store: StoreClient, rank: int, world_size: int, seals: NoSeals = NO_SEALS
    ) -> None:
        if world_size > MAX_WORLD_SIZE:
            raise ValueError(f"world_size={world_size}: must be at most {MAX_WORLD_SIZE}")
        self.seals = seals
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._gates: Gates = gates_of(store)
        self._generation = 0
        self._epoch = 0
        self._slots = keys.slots(0)
        self._in_epoch = 0  # barriers since the epoch began
        self._used: keys.Slot | None = None  # of the barrier before, in the same epoch
        self._old_keys: list[str] = []  # that rank 0 deletes after the next complete barrier
        self._past: list[str] = []  # that this rank deletes when all have arrived at the next one

    @property
    def generation(self) -> int:
        """The number of the next barrier."""
        return self._generation

    def wait(
        self,
        timeout: float | Deadline,
        record: Record | None = None,
        each_phase: bool = True,
    ) -> None:
        """Block until every rank has called ``wait``; rank 0 until every other rank has left.

        Args:
            timeout: seconds, or a deadline that is restarted for the second wait.
            record: is called with a PhaseEvent for each phase that ended.
            each_phase: False if the timeout holds for all phases together.

        Raises:
            BarrierError: on every rank that entered, when a rank did not arrive in time; on rank
                0 alone, with ``completed=True``, when a rank did not leave in time.
            CancelledWaitError: on the rank whose deadline was cancelled. Unless ``generation``
                has gone on, this rank has not been here, and the others wait until it comes again.
            torch.distributed.DistError: the store is lost, or holds what no rank wrote.
        """
        self._meet(timeout, record, each_phase, None)

    def gather(
        self,
        value: bytes,
        timeout: float | Deadline,
        record: Record | None = None,
        each_phase: bool = True,
    ) -> list[bytes]:
        """Pass a barrier, and return the value that each rank brought to it, in rank order.

        All ranks read the values after the last has arrived and before they confirm, so rank 0
        resets nothing that someone still has to read. One request more than ``wait``.

        Args:
            value: at least one byte.
            timeout: as for ``wait``.
            record: as for ``wait``.
            each_phase: as for ``wait``.

        Raises:
            ValueError: the value is empty.
            AuthenticationError: someone else has written on the roll.
            MessageError: not every rank brought one value.
            BarrierError, CancelledWaitError, torch.distributed.DistError: as ``wait``.
        """
        if not value:
            raise ValueError(f"value={value!r}: must have at least one byte")
        values = self._meet(timeout, record, each_phase, value)
        assert values is not None
        return values

    def break_off(self, reason: str) -> None:
        """Break the next barrier, to which this rank will not come. ``reason`` says why.

        The others, who may be waiting there, learn it at once. Up to 6 requests.
        """
        if self._world_size > 1:
            self._break(self._slot, self._generation, Deadline(0), reason)
            self._generation += 1
            self._end_epoch()

    def skip_broken(self) -> None:
        """Go past the barriers that have broken without this rank, as if it had been there.

        So ranks that have made different numbers of calls come together. One request, and one
        more for each of them.
        """
        while (state := self._look(self._slot, self._generation)).broken:
            self._generation += not state.again
            self._end_epoch()

    def delete_in_next(self, some_keys: Sequence[str]) -> None:
        """Delete keys when all ranks have arrived at the next barrier. One request each, and one.

        What this rank wrote for the others to read after one barrier, they have read by then.
        """
        self._past += some_keys

    def _meet(
        self,
        timeout: float | Deadline,
        record: Record | None,
        each_phase: bool,
        value: bytes | None,
    ) -> list[bytes] | None:
        """One barrier. Returns what the ranks brought, if this one brought a value."""
        deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
        generation = self._generation
        while True:
            slot = self._slot
            with phase("arrival", self._rank, generation, record):
                deadline.check()
                mark, give_up, cancelled = self._come(slot, generation, deadline, value or b"")
            with phase("confirmation", self._rank, generation, record):
                if give_up:
                    self._break(slot, generation, deadline, give_up, cancelled is not None)
                roll = None if value is None else peek(self._store, slot.roll)
                state = self._confirm(slot, generation, mark)
            if not state.again:
                break
            # a rank was interrupted, and has not been here; it may come again, and so do all others
            self._end_epoch()
            if cancelled is not None:
                raise cancelled

        self._generation += 1
        self._in_epoch += 1
        if state.broken:
            reason = keys.reason(self._epoch)
            self._end_epoch()
            if cancelled is not None:
                raise cancelled
            raise self._reason(reason, generation)
        with phase("departure", self._rank, generation, record):
            if each_phase:
                deadline.restart()
            try:
                self._depart(slot, state, generation, deadline, cancelled)
            except CancelledWaitError as error:
                error.completed = True
                raise
        if value is None:
            return None
        return read_roll(roll or b"", generation, self._world_size, self.seals, slot.roll)

    def _come(
        self, slot: keys.Slot, generation: int, deadline: Deadline, value: bytes
    ) -> tuple[int, str, CancelledWaitError | None]:
        """Sign, and wait until there is an outcome: all have arrived, or the barrier is broken.

        Returns:
            What this rank has to add to the state; why it gives up, if it does; and what has
            interrupted it.
        """
        signature = sign(generation, self._rank, value, self.seals, slot.roll)
        self._store.append(slot.roll, signature)
        mark = State.mark(self._rank)
        try:
            over, awake = self._arrive(slot, generation, deadline)
            mark -= awake
            if not over and not self._all_here(slot, generation):
                return mark, "its time was up", None
            if self._past:
                self._delete_past(slot, generation)
        except MeddledGateError as error:
            return mark, str(error), None
        except CancelledWaitError as error:
            return mark, f"of {error}", error
        return mark, "", None

    def _arrive(self, slot: keys.Slot, generation: int, deadline: Deadline) -> tuple[bool, int]:
        """Wait until there is an outcome: all have arrived, or someone broke the barrier.

        Returns:
            Whether there is one, and what this rank has added to the state and must take back.

        Raises:
            MeddledGateError: a gate says what no rank can have said there.
        """
        if self._gates.count_in(slot.arrived, self._world_size, deadline):
            return True, 0
        state = State.of(self._store.add(slot.state, ASLEEP))
        if state.broken or state.left > 0:
            return True, ASLEEP
        # a slow store may have let the first wait of every rank run out, with all of them there
        if not self._gates.open_always and self._all_here(slot, generation):
            return True, 0
        # whoever confirms first sees the sleeper, and opens the gate
        if not self._gates.wait(slot.wake, deadline):
            return False, 0
        state = self._look(slot, generation)
        if not state.broken and state.left == 0:
            raise MeddledGateError(f"{slot.wake} was opened by no rank")
        return True, 0

    @property
    def _slot(self) -> keys.Slot:
        """The keys of the next barrier."""
        return self._slots[self._in_epoch % keys.SLOTS]

    def _look(self, slot: keys.Slot, generation: int) -> State:
        return read_state(peek(self._store, slot.state) or b"", generation, self._world_size)

    def _delete_past(self, slot: keys.Slot, generation: int) -> None:
        # who breaks a barrier says so before it lets the others go on
        if self._look(slot, generation).broken:
            return
        while self._past:
            self._store.delete_key(self._past[-1])
            self._past.pop()

    def _all_here(self, slot: keys.Slot, generation: int) -> bool:
        """Whether the last has signed and no more, because it is slow or died there."""
        roll = peek(self._store, slot.roll) or b""
        return len(signed_by(roll, generation, self.seals, slot.roll)) == self._world_size

    def _confirm(self, slot: keys.Slot, generation: int, mark: int) -> State:
        """Add this rank's mark. The state as it is then holds the outcome."""
        added = self._store.add(slot.state, mark)
        state = read_state(added, generation, self._world_size)
        first = not state.broken and state.left == 1
        if first and (state.asleep > 0 or self._gates.open_always):
            self._gates.open(slot.wake)
            # only now can rank 0 leave
            added = self._store.add(slot.state, WOKEN)
            state = read_state(added, generation, self._world_size)
        return state

    def _break(
        self,
        slot: keys.Slot,
        generation: int,
        deadline: Deadline,
        reason: str,
        again: bool = False,
    ) -> None:
        """Break the barrier, unless a rank has confirmed it or broken it already."""
        elapsed = deadline.elapsed()
        broken = str(State.broken_by(self._rank, again)).encode()
        found = peek(self._store, slot.state) or b""
        while True:
            state = read_state(found, generation, self._world_size)
            if state.broken or state.left > 0:
                return
            answer = self._store.compare_set(slot.state, found.decode(), broken.decode())
            if answer == broken:
                break
            # someone fell asleep meanwhile, which each rank does once
            found = answer
        # this rank alone comes here
        if not again:
            roll = peek(self._store, slot.roll) or b""
            here = signed_by(roll, generation, self.seals, slot.roll)
            missing = [r for r in range(self._world_size) if r not in here]
            why = write_reason(self._rank, reason, missing, elapsed, deadline.allowed)
            self._boxes().put(keys.reason(self._epoch), why.encode())
        self._gates.open(slot.wake)
        self._gates.open(slot.arrived)

    def _reason(self, key: str, generation: int) -> BarrierError:
        """Why a barrier broke. The rank that broke it may be just about to write that."""
        try:
            why = self._boxes().wait(key, Deadline(_REASON_SECONDS))
        except AuthenticationError as error:
            return BarrierError(
                f"barrier {generation} was broken, and why cannot be trusted: {error}",
                phase="arrival",
                generation=generation,
            )
        broken = read_reason(why, generation, self._world_size)
        if self._rank in broken.missing:
            # this rank came late, and the others may have gone on
            roll = peek(self._store, self._slot.roll) or b""
            ahead = sorted(signed_by(roll, generation + 1, self.seals, self._slot.roll))
            if ahead:
                broken.add_note(
                    f"{name_ranks(ahead)} came to barrier {generation + 1} already. If a rank has "
                    f"made a call that others have not, call group.realign() on all of them."
                )
        return broken

    def _boxes(self) -> Boxes:
        return Boxes(self._store, self.seals)

    def _depart(
        self,
        slot: keys.Slot,
        state: State,
        generation: int,
        deadline: Deadline,
        cancelled: CancelledWaitError | None,
    ) -> None:
        sleepers = state.asleep > 0 or self._gates.open_always
        everyone = state.left == self._world_size and (state.woken or not sleepers)
        used, self._used = self._used, slot
        if everyone and (self._rank != 0 or self._gates.open_always):
            self._gates.open(slot.left)
        if self._rank == 0:
            if used is not None:
                self._gates.close([used.wake, used.left])
                set_several(self._store, {used.arrived: "0", used.state: "0", used.roll: ""})
            if cancelled is None and not everyone and not self._gates.wait(slot.left, deadline):
                self._check_departures(slot, generation, deadline)
            while self._old_keys:
                self._store.delete_key(self._old_keys[-1])
                self._old_keys.pop()
        if cancelled is not None:
            raise cancelled

    def _end_epoch(self) -> None:
        if self._rank == 0:
            self._old_keys += keys.of_epoch(self._epoch)
        self._epoch += 1
        self._slots = keys.slots(self._epoch)
        self._in_epoch = 0
        self._used = None

    def _check_departures(self, slot: keys.Slot, generation: int, deadline: Deadline) -> None:
        """Raise, naming who did not leave; unless all did, and the last could not say so."""
        state = self._look(slot, generation)
        count = self._world_size - state.left
        if count == 0:
            return
        if count == 1:
            missing = [sum(range(self._world_size)) - state.left_sum]
        else:
            # a rank that has arrived at the next barrier has left this one
            roll_key = self._slot.roll
            roll = peek(self._store, roll_key) or b""
            arrived = signed_by(roll, generation + 1, self.seals, roll_key)
            missing = [r for r in range(1, self._world_size) if r not in arrived]
        some_of = "" if count >= len(missing) else f"{count} of "
        raise BarrierError(
            f"barrier {generation} completed, but in departure rank 0 waited in vain for "
            f"{some_of}{name_ranks(missing)} to leave: "
            f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
            phase="departure",
            missing=missing,
            elapsed=deadline.elapsed(),
            allowed=deadline.allowed,
            broken_by=self._rank,
            generation=generation,
            completed=True,
        )
