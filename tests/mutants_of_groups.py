"""Mistakes in how groups split, shrink and grow. Exploration has to find every one.

Each takes the place of a function or a class of ``refdist.joining``.
"""

import json
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import patch

from refdist.barrier import plain, quick
from refdist.errors import BarrierError, GroupCreationError
from refdist.joining import admitting, asking, leaving, shrinking
from refdist.store import keys


@contextmanager
def made(*mistakes):
    """Make mistakes in this context. Each comes with the places that it takes."""
    with ExitStack() as stack:
        for mistake, places in mistakes:
            for place in places:
                stack.enter_context(patch(f"refdist.joining.{place}", mistake))
        yield


# Of meetings.


class QuickMeeting(quick.Barrier):
    """Ranks meet at a quick barrier, and the one that breaks it may die before it says why."""

    depart = shrinking.Meeting.depart


class OwnRoll(shrinking.Meeting):
    """Each rank goes on with those that it has found on the roll itself."""

    def confirm(self, this):
        outcome = super().confirm(this)
        self.missed = self.read(this).missing(self.world_size)
        return outcome

    def wait(self, deadline):
        try:
            super().wait(deadline)
        except BarrierError as error:
            error.missing = self.missed
            if self.missed:
                raise


class LatecomersGoOn(shrinking.Meeting):
    """A rank that others have missed goes on with them all the same."""

    def wait(self, deadline):
        try:
            super().wait(deadline)
        except BarrierError as error:
            error.missing = [rank for rank in error.missing if rank != self.rank]
            raise


class OneMeeting(shrinking.Meeting):
    """There is one meeting, and those that came to it go on, although one may have died since."""

    def wait(self, deadline):
        if "/0/0/" in self.store.prefix:
            super().wait(deadline)


class InterruptedAtOnce(plain.Barrier):
    """An interrupt ends a meeting also when all have come, and the rank comes again."""

    def depart(self, this):
        with suppress(BarrierError):
            super().depart(this)


def same_keys_later(place, era, number):
    """A group that has shrunk meets with the keys with which it has met before."""
    return f"{place}meeting/{number}/"


def own_rank_first(*arguments, really=shrinking.meet):
    """Each rank puts itself first."""
    here = really(*arguments)
    return sorted(here, key=lambda rank: rank != arguments[1])


# Of the group that follows.


def old_prefix(place, number, attempt):
    """The new group has the keys of the old one."""
    return place


# Of letting processes in.


def no_meeting(*_):
    """The ranks do not meet those that they let in."""


def told_at_once(connection, seals, really=asking.unanswered):
    """Who asks has the answer before the ranks of the group have agreed."""
    for ask in really(connection, seals):
        plan = asking.Plan(2, "", 1, "era/1/grown/0/", [None] * 3, ["00" * 16, ask.token], 300.0)
        connection.client.decide(keys.answer(ask.number), json.dumps(plan).encode())
        yield ask


def keeps_itself(group, deadline, really=admitting.Admitting._admit):
    """A group that has let nobody in is taken for the one that follows it."""
    try:
        return really(group, deadline)
    except GroupCreationError:
        group._calls.kept["shrink"] = group
        raise


def asks_again(group, deadline, really=admitting.Admitting._admit):
    """A rank that was interrupted at the end of admit forgets the new group."""
    group._calls.kept.pop("admit", None)
    return really(group, deadline)


def goes_without_a_word(*_):
    """A rank that is interrupted does not tell those that wait for it."""


# Of parts.


def below_the_whole(place, generation, first, really=keys.part):
    """The keys of a part are below those of the part that was split."""
    return really(place.replace(".", "/"), generation, first)


def own_keys_only(barrier, place, reason, really=leaving.leave_part):
    """Who closes a part that has shrunk deletes only what it has written since."""
    really(barrier, barrier.store.prefix, reason)
