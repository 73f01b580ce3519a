"""The properties that should hold in every state of a protocol, each in one sentence.

Of barriers: a call is *collective* if every rank makes a call of its name. A rank *completes* a
call when it returns, and also when rank 0 raises only because another rank did not leave in time.

Of groups that follow one another: a call *regroups* if it returns the ranks that go on, as they are
numbered in the exploration, or None if the group stays as it is. A rank without which others go on
is *told* so by a GroupCreationError. These properties are made for the names of such calls.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from refdist.barrier.quick import SLOTS
from refdist.errors import GroupCreationError
from refdist.exploration.rank import Call
from refdist.exploration.search import Property, Snapshot
from refdist.store import keys


def nobody_returns_early(snapshot: Snapshot) -> bool:
    """Nobody returns from a collective call before every rank has entered it."""
    return all(
        len(calls) == len(snapshot.calls) or not any(call.returned for call in calls.values())
        for calls in snapshot.collective.values()
    )


def agreement(snapshot: Snapshot) -> bool:
    """Of the ranks that leave a collective call, either all complete it or none does."""
    return all(
        len({completed(call) for call in calls.values() if call.over}) <= 1
        for calls in snapshot.collective.values()
    )


def no_latecomer_passes(snapshot: Snapshot) -> bool:
    """A rank that enters a collective call after another has given it up never completes it."""
    return not any(
        completed(call) and any(gave_up(calls[other]) for other in call.after)
        for calls in snapshot.collective.values()
        for call in calls.values()
    )


def rank_0_leaves_last(snapshot: Snapshot) -> bool:
    """Of those that live, rank 0 returns from a collective call last, unless its time is up."""
    for calls in snapshot.collective.values():
        if 0 in calls and calls[0].returned and calls[0].seconds == 0:
            inside = [rank for rank, call in calls.items() if not call.over]
            if set(inside) - snapshot.dead:
                return False
    return True


def nobody_waits_for_ever(snapshot: Snapshot) -> bool:
    """In the end, no rank waits, without a timeout, for what cannot come any more."""
    return not snapshot.stuck


def next_call_works(snapshot: Snapshot) -> bool:
    """A collective call is completed if no rank dies and no wait of it times out too early."""
    return all(
        not gave_up(call)
        for calls in _undisturbed(snapshot)
        if not any(call.early for call in calls.values())
        for call in calls.values()
    )


def everyone_is_woken(snapshot: Snapshot) -> bool:
    """If all enter a collective call and none dies, no rank is left asleep in it."""
    return not any(call.stalled for calls in _undisturbed(snapshot) for call in calls.values())


def one_reason(snapshot: Snapshot) -> bool:
    """All that give a collective call up, and can tell who broke it, name the same rank."""
    return all(
        len(
            {getattr(call.error, "broken_by", -1) for call in calls.values() if gave_up(call)}
            - {-1}
        )
        <= 1
        for calls in snapshot.collective.values()
    )


def within(seconds: float) -> Property:
    """The property that no call waits longer than ``seconds``."""

    def in_time(snapshot: Snapshot) -> bool:
        return all(call.seconds <= seconds for calls in snapshot.calls for call in calls.values())

    in_time.__doc__ = f"No call waits longer than {seconds:g} s."
    return in_time


def no_key_stays(snapshot: Snapshot) -> bool:
    """When a barrier has returned everywhere, all keys of those before it are gone or reset."""
    barriers = list(snapshot.collective.values())
    if not (snapshot.ended and barriers) or not all(c.returned for c in barriers[-1].values()):
        return True
    tries = {key.rpartition("/")[0] for key in snapshot.values}
    if all(re.fullmatch(r"barrier/\d+", prefix) for prefix in tries):
        return len(tries) == 1  # each try has its own keys
    broken = [any(map(gave_up, calls.values())) for calls in barriers]
    epoch, in_epoch = sum(broken), broken[::-1].index(True) if any(broken) else len(broken)
    slots = [set(keys.Slot.of(epoch, number)) for number in range(SLOTS)]
    in_use, reset = slots[(in_epoch - 1) % SLOTS], set().union(*slots)
    return all(
        key in in_use or (key in reset and value in (b"", b"0"))
        for key, value in snapshot.values.items()
    )


BARRIER: tuple[Property, ...] = (
    nobody_returns_early,
    agreement,
    no_latecomer_passes,
    rank_0_leaves_last,
    nobody_waits_for_ever,
    next_call_works,
    everyone_is_woken,
)
"""The properties of any barrier."""

REFDIST_BARRIER: tuple[Property, ...] = (*BARRIER, one_reason, no_key_stays)
"""The properties of ``refdist.barrier``. They use its errors and keys."""


def one_group_follows(*names: str) -> Property:
    """The property that no two groups follow one."""

    def no_other_group(snapshot: Snapshot) -> bool:
        lists = {repr(ranks) for _, ranks in _lists(snapshot, names)}
        return len(lists) <= 1

    return _in_words(no_other_group, "All ranks that return from {} go on with the same.", names)


def each_is_in_its_group(*names: str) -> Property:
    """The property that a list holds the rank that gets it, and keeps the order of the ranks."""

    def in_order(snapshot: Snapshot) -> bool:
        return all(
            rank in ranks and list(ranks) == sorted(set(ranks))
            for rank, ranks in _lists(snapshot, names)
        )

    text = "A rank that returns from {} is one of those that go on, which are in the old order."
    return _in_words(in_order, text, names)


def who_is_left_out_is_told(*names: str) -> Property:
    """The property that no rank ends its call without knowing that others go on without it."""

    def told(snapshot: Snapshot) -> bool:
        last = [[call for name, call in calls.items() if name in names] for calls in snapshot.calls]
        return all(
            rank in ranks or not calls or not calls[-1].over or _told(calls[-1])
            for _, ranks in _lists(snapshot, names)
            for rank, calls in enumerate(last)
        )

    return _in_words(told, "A rank without which others return from {} is told so there.", names)


def nobody_else_is_told(*names: str) -> Property:
    """The property that no rank is told that it was left out while others count on it."""

    def not_told(snapshot: Snapshot) -> bool:
        return not any(
            _told(call)
            for _, ranks in _lists(snapshot, names)
            for name in names
            for rank, call in snapshot.named(name).items()
            if rank in ranks
        )

    return _in_words(not_told, "No rank is told to be left out with which others go on.", names)


def new_group_works(*names: str, then: str) -> Property:
    """The property that a new group can be used; its ranks make the call ``then`` next."""

    def works(snapshot: Snapshot) -> bool:
        for _, ranks in _lists(snapshot, names):
            calls = [call for rank, call in snapshot.named(then).items() if rank in ranks]
            early = any(call.early for call in calls)
            if not early and snapshot.dead.isdisjoint(ranks) and any(map(gave_up, calls)):
                return False
        return True

    text = (
        f"The ranks that return from {{}} complete {then}, if none of them dies and no wait in it "
        f"ends too early."
    )
    return _in_words(works, text, names)


def nothing_old_is_received(*names: str, receiving: str) -> Property:
    """The property that messages stay in their group. Each is the list of the ranks of its group.

    Args:
        names: of the calls that regroup.
        receiving: the name of the call that returns a message.
    """

    def only_new(snapshot: Snapshot) -> bool:
        received = snapshot.named(receiving)
        return all(
            received[rank].value == ranks
            for rank, ranks in _lists(snapshot, names)
            if rank in received and received[rank].returned
        )

    text = f"After {{}}, {receiving} returns nothing that was sent in the old group."
    return _in_words(only_new, text, names)


def _lists(snapshot: Snapshot, names: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The ranks that have returned from these calls, and the list that each has got."""
    for name in names:
        for rank, call in snapshot.named(name).items():
            if call.returned and call.value is not None:
                yield rank, call.value


def _told(call: Call) -> bool:
    return isinstance(call.error, GroupCreationError)


def _in_words(holds: Property, text: str, names: Sequence[str]) -> Property:
    """A property with its sentence."""
    *others, last = names
    holds.__doc__ = text.format(f"{', '.join(others)} or {last}" if others else last)
    return holds


def _undisturbed(snapshot: Snapshot) -> list[dict[int, Call]]:
    """The collective calls that every rank has entered, if none has died."""
    if snapshot.dead:
        return []
    return [c for c in snapshot.collective.values() if len(c) == len(snapshot.calls)]


def completed(call: Call) -> bool:
    """Whether a rank has completed a call."""
    error: BaseException | None = call.error
    while error is not None:
        if getattr(error, "completed", False):
            return True
        error = error.__cause__
    return call.returned


def gave_up(call: Call) -> bool:
    """Whether a rank has left a call without completing it."""
    return call.over and not completed(call)
