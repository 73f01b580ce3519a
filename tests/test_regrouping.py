"""Exploration of groups that shrink, grow and split, over the simulated store.

The processes of an exploration have numbers. A group is the list of those of its ranks, and so is
what a call returns that begins another one.
"""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import mutants_of_groups as mutants
import pytest
from mutants_of_groups import made
from ranks import with_secret
from test_exploration import BOTH_GROUPS, kind_of_barrier

from refdist import BarrierError, GroupCreationError, StatelessProcessGroup
from refdist.barrier.roll import ARRIVED, Try
from refdist.deadline import Deadline
from refdist.exploration import (
    RefdistWords,
    each_is_in_its_group,
    explore,
    new_group_works,
    nobody_else_is_told,
    nobody_waits_for_ever,
    nothing_old_is_received,
    one_group_follows,
    who_is_left_out_is_told,
    within,
)
from refdist.joining import admitting, asking, shrinking, splitting
from refdist.joining.connection import Connection
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS


@pytest.fixture(autouse=True)
def _simulated():
    """No PrefixStore of torch, which takes none but real stores, and no random numbers."""
    with (
        patch.object(splitting, "PrefixStore", lambda _, store: store),
        patch.object(admitting, "os", SimpleNamespace(urandom=bytes)),
        patch.object(asking, "os", SimpleNamespace(urandom=bytes)),
    ):
        yield


class Numbered(StatelessProcessGroup):
    """A group that knows the numbers of its ranks."""

    numbers: Any = None
    chosen: Any = None

    def _barrier_at(self, prefix, members, connection):
        self.chosen = tuple(self.numbers[member] for member in members)
        return super()._barrier_at(prefix, members, connection)

    def _with(self, *arguments, **changes):
        group = super()._with(*arguments, **changes)
        group.numbers = self.chosen or tuple(range(group.world_size))
        return group


class InterruptError(Exception):
    """What the handler of SIGINT raises."""


AT_THE_END = 0


class Process:
    """A process, whose methods are the calls of a protocol.

    Args:
        number: of the process; below ``size``, it is that rank of the group.
        turns: of the waits before which it is interrupted, each in another attempt; AT_THE_END for
            an interrupt of a call that has done all that it does.
    """

    def __init__(self, store, number, size, turns=(), secret=False):
        self.store, self.number, self.turns = store, number, turns
        self.old = self.new = None
        if number < size:
            self.old = Numbered(number, size, store)
            self.old.numbers = tuple(range(size))
            if secret:
                with_secret(self.old)

    def go_on(self, call):
        """Make a call that may begin another group. One that is interrupted is made again."""
        old = self.new or self.old
        for turn in self.turns:
            try:
                group = self.interrupted(old, call, turn)
                break
            except InterruptError:
                pass
        else:
            group = call(old)
        self.turns = ()
        if group is old:
            return None
        self.new = group
        return group.numbers

    def interrupted(self, group, call, turn):
        """Make a call that is interrupted before a wait, if it waits so many times, or at its end.

        As the handler of ``refdist.calls`` does, this keeps the error until the call has ended.
        """

        class InterruptedDeadline(Deadline):
            waits = 0

            def slice(self):
                self.waits += 1
                if self.waits == turn:
                    group._calls._present["call"].raised = InterruptError()
                    self.cancel("an interrupt")
                return super().slice()

        def to_the_end(really, *arguments):
            following = really(*arguments)
            if turn == AT_THE_END:
                group._calls._present["call"].raised = InterruptError()
            return following

        with (
            patch.object(shrinking, "Deadline", InterruptedDeadline),
            patch.object(admitting, "Deadline", InterruptedDeadline),
            patch.object(group, "_shrink", partial(to_the_end, group._shrink)),
            patch.object(group, "_admit", partial(to_the_end, group._admit)),
        ):
            return call(group)

    def shrink(self):
        numbers = self.go_on(lambda group: group.shrink(1.0))
        assert numbers is not None
        return numbers

    def admit(self):
        return self.go_on(lambda group: group.admit(1.0))

    def admit_or_shrink(self):
        """As ``admit``, but shrink if it is interrupted."""
        (turn,), self.turns = self.turns, ()
        try:
            self.new = self.interrupted(self.old, lambda group: group.admit(1.0), turn)
        except InterruptError:
            # if the new group had formed, this one is closed
            return self.admit() if self.old._calls.closed else self.shrink()
        return self.new.numbers

    def ask(self):
        connection = Connection(StoreClient(self.store))
        joined = asking.ask(connection, "here", None, Deadline(4.0, whole=True))
        self.new = splitting.made(Numbered, joined, None, 3600, "pickle")
        self.new.numbers = tuple(range(self.new.world_size))
        return self.new.numbers

    def see(self):
        """Wait until a process has asked."""
        self.store.wait(["ask/0"])

    def gather(self):
        """In the new group, if there is one."""
        return self.new and tuple(self.new.all_gather_obj(self.number, 1.0))

    def send(self):
        """Send to each other rank which group this is."""
        group = self.new or self.old
        for other in set(range(group.world_size)) - {group.rank}:
            group.send_obj(group.numbers, other)

    def receive(self):
        group = self.new
        return group and group.recv_obj((group.rank + 1) % group.world_size, 1.0)


def processes(*names, newcomers=0, turns=None, secret=False, **others):
    """A protocol of processes which make these calls.

    Args:
        names: of the calls. The first word is that of the method.
        newcomers: the last so many are in no group, ask to be let in, and gather.
        turns: of interrupts, by number.
        secret: whether the group has one.
        others: the calls of processes that make other ones, as ``p1=["shrink"]``.
    """

    def protocol(store, number, world_size):
        size = world_size - newcomers
        process = Process(store, number, size, (turns or {}).get(number, ()), secret)
        mine = others.get(f"p{number}", names) if number < size else ("ask", "gather")
        return {name: getattr(process, name.split()[0]) for name in mine}

    return protocol


# Properties that are about these protocols alone.


def raises_only(name, *kinds):
    def only_these(snapshot):
        """A call raises nothing but what it promises."""
        return all(isinstance(c.error, kinds) for c in snapshot.named(name).values() if c.raised)

    return only_these


def everyone_is_there(*names):
    def all_gathered(snapshot):
        """A gather of the new group has those who go on, and no others."""
        gathers = snapshot.named("gather")
        return all(
            gathers[number].value == call.value
            for name in names
            for number, call in snapshot.named(name).items()
            if call.returned and number in gathers and gathers[number].returned
        )

    return all_gathered


ONE_GROUP, IN_ORDER = one_group_follows("shrink"), each_is_in_its_group("shrink")
TOLD, NOT_TOLD = who_is_left_out_is_told("shrink"), nobody_else_is_told("shrink")
NOTHING_ELSE = raises_only("shrink", GroupCreationError)
SHRINKS = [
    ONE_GROUP, IN_ORDER, TOLD, NOT_TOLD, NOTHING_ELSE, nobody_waits_for_ever,
    new_group_works("shrink", then="gather"), everyone_is_there("shrink"),
]  # fmt: skip


def holds(protocol, world_size, properties, timeouts=0, crashes=0, width=None, native=True):
    """Explore; all properties hold. Returns what was found."""
    with kind_of_barrier(native):
        found = explore(
            protocol, world_size, properties, timeouts=timeouts, crashes=crashes, width=width
        )
        if found.counterexample is not None:
            pytest.fail(f"{found}\n{found.counterexample.timeline(RefdistWords())}")
    print(found)
    assert found.complete or width is not None
    return found


# Shrinking. The functions first: two ranks in all schedules, three in some of them. No call waits
# longer than its meetings.


def meets(store, rank, world_size):
    client = StoreClient(store)

    def shrink():
        deadline = Deadline(1.0)
        here = shrinking.meet(client, rank, list(range(world_size)), 0, NO_SEALS, deadline)
        if rank not in here:
            raise GroupCreationError("left out", [rank])
        return tuple(here)

    return {"shrink": shrink}


@pytest.mark.parametrize(
    ("world_size", "timeouts", "crashes", "width"),
    [(2, 0, 1, None), (2, 1, 1, None), (2, 9, 1, None), (3, 0, 1, None), (3, 1, 1, 300)],
)
def test_meetings(world_size, timeouts, crashes, width):
    properties = [*SHRINKS, within(world_size + 0.01)]
    found = holds(meets, world_size, properties, timeouts, crashes, width)
    assert found.states > 250 and found.schedules > 1_000


# The whole method, and then a gather of the new group.
@BOTH_GROUPS
@pytest.mark.parametrize(
    ("world_size", "timeouts", "crashes", "width", "secret"),
    [(2, 0, 1, None, False), (2, 1, 1, 150, True), (3, 1, 1, 80, False)],
)
def test_shrinking(world_size, timeouts, crashes, width, secret, native):
    protocol = processes("shrink", "gather", secret=secret)
    found = holds(protocol, world_size, SHRINKS, timeouts, crashes, width, native)
    assert found.states > 1_000


# Rank 1 signs the roll of the first meeting, and dies; rank 2 does not come. So rank 0 has heard of
# rank 1, and goes on alone.


def after_a_death(store, rank, world_size):
    def sign_and_die():
        place = shrinking.keys.meeting("", 0, 0)
        meeting = shrinking.Meeting(StoreClient(store).at(place), rank, world_size)
        meeting.sign(Try(meeting.keys, b"", Deadline(1.0)), ARRIVED)
        store.set("died", "")

    shrink = {"see": lambda: store.wait(["died"]), **meets(store, rank, world_size)}
    return [shrink, {"die": sign_and_die}, {}][rank]


def not_with(number, name):
    def without_it(snapshot):
        """Nobody goes on with a process that does not come any more."""
        return not any(number in c.value for c in snapshot.named(name).values() if c.returned)

    return without_it


def test_a_rank_that_died_after_it_had_come():
    holds(after_a_death, 3, [not_with(1, "shrink"), *SHRINKS])


# One shrink after the other, in the new group; and a group that nobody has left.
@pytest.mark.parametrize(
    ("world_size", "timeouts", "crashes", "width"), [(2, 1, 1, 80), (3, 0, 1, 80)]
)
def test_shrinking_twice(world_size, timeouts, crashes, width):
    properties = [
        one_group_follows("shrink"),
        one_group_follows("shrink again"),
        each_is_in_its_group("shrink again"),
        new_group_works("shrink again", then="gather"),
        everyone_is_there("shrink again"),
    ]
    protocol = processes("shrink", "shrink again", "gather")
    holds(protocol, world_size, properties, timeouts, crashes, width)


# A rank is interrupted, and comes again. Found here: of two that were interrupted, one was told
# that it was left out, because it looked for keys of the meeting that the other had deleted.
@pytest.mark.parametrize(
    "turns",
    [{0: (1,)}, {1: (1, 1)}, {0: (2,), 1: (1,)}, {0: (1,), 1: (1,)}, {0: (AT_THE_END,)}],
    ids=str,
)
def test_interrupted_ranks_that_shrink(turns):
    protocol = processes("shrink", "gather", turns=turns)
    holds(protocol, 2, SHRINKS, timeouts=1, width=50)


# What was sent in the old group is not received in the new one. Rank 2 does not come, so the groups
# differ.
MESSAGES = processes("send", "shrink", "send again", "receive", p2=[])
ONLY_NEW = nothing_old_is_received("shrink", receiving="receive")


def test_messages_stay_in_their_group():
    holds(MESSAGES, 3, [ONLY_NEW, nobody_waits_for_ever])
    holds(MESSAGES, 3, [ONLY_NEW, nobody_waits_for_ever], timeouts=1, width=50)


# Growing: a process asks, and the ranks let it in.

ADMITS = [
    one_group_follows("admit", "ask", "shrink"),
    each_is_in_its_group("admit", "ask"),
    new_group_works("admit", "ask", then="gather"),
    everyone_is_there("admit", "ask"),
    raises_only("admit", BarrierError, GroupCreationError, InterruptError),
    raises_only("ask", GroupCreationError),
]


def told_of_what_comes(snapshot):
    """A process that asks is told of a new group only when all ranks of the old one know it."""
    answered = any(k.startswith("answer/") and v[:1] == b"[" for k, v in snapshot.values.items())
    admits = snapshot.named("admit").values()
    return not answered or not any(isinstance(call.error, BarrierError) for call in admits)


@pytest.mark.parametrize(
    ("world_size", "timeouts", "crashes", "width"),
    [(2, 0, 1, None), (2, 1, 1, 100), (3, 0, 1, 60), (3, 1, 0, 60), (3, 1, 1, 60)],
)
def test_growing(world_size, timeouts, crashes, width):
    protocol = processes("admit", "gather", newcomers=1)
    holds(protocol, world_size, [*ADMITS, nobody_waits_for_ever], timeouts, crashes, width)
    protocol = processes("see", "admit", "gather", newcomers=1)
    holds(protocol, world_size, [*ADMITS, told_of_what_comes], timeouts, crashes, width)


# Rank 1 does not call ``admit``. Found here: rank 0 told the process that asked before it knew, and
# then that process waited until its time was up, and not for the next ``admit``.
WITHOUT_1 = processes("see", "admit", newcomers=1, p1=["see"])


def test_growing_without_a_rank():
    holds(WITHOUT_1, 3, [*ADMITS, told_of_what_comes])


# A process asks, and has died when it gets its answer. The group goes on without it.


def dead_asker(store, number, world_size):
    def ask():
        store.set("ask/0", json.dumps(["00" * 16, None, StoreClient(store).has_barrier]))
        store.add("asked", 1)

    group = Process(store, number, 1)
    return {"ask": ask} if number else {"see": lambda: store.wait(["asked"]), "admit": group.admit}


def test_a_process_that_asked_and_died():
    holds(dead_asker, 2, [not_with(1, "admit"), raises_only("admit", GroupCreationError)])


# A process asks and dies, so nobody is let in, and then the ranks shrink. Found here: their group
# counted as the one that follows, so shrink returned it, and ended it.
def test_shrinking_after_nobody_was_let_in():
    protocol = processes("see", "admit", "shrink", "gather", newcomers=1, turns={0: (AT_THE_END,)})
    both = [raises_only("shrink", GroupCreationError), new_group_works("shrink", then="gather")]
    holds(protocol, 2, both, crashes=1)
    holds(protocol, 3, both, crashes=1, width=60)


# Interrupted ranks. Found here: one that was interrupted when all had met was told, when it came
# again, that nobody had asked; or, after the end of ``admit``, that its group was part of another.
@pytest.mark.parametrize("turn", [(1,), (2,), (2, 1), (3,), (AT_THE_END,)], ids=str)
@pytest.mark.parametrize("number", [0, 1])
def test_interrupted_ranks_that_grow(number, turn):
    protocol = processes("see", "admit", "gather", newcomers=1, turns={number: turn})
    holds(protocol, 2 + number, ADMITS, width=50)


def others_learn_of_it(snapshot):
    """Rank 0 does not wait in vain for rank 1, which is interrupted."""
    return not any(call.stalled for call in snapshot.calls[0].values())


# One is interrupted when it lets a process in, and shrinks then. Either nobody is let in, and it
# meets alone; or it gets the group into which that process came.
@pytest.mark.parametrize("turn", [1, 2, AT_THE_END])
@pytest.mark.parametrize("number", [0, 1])
def test_shrinking_after_an_interrupt(number, turn):
    calls = {f"p{number}": ["see", "admit_or_shrink", "gather"]}
    protocol = processes("see", "admit", "gather", newcomers=1, turns={number: (turn,)}, **calls)
    names = "admit", "admit_or_shrink", "ask"
    properties = [
        one_group_follows(*names),
        each_is_in_its_group(*names),
        new_group_works(*names, then="gather"),
        everyone_is_there(*names),
        raises_only("admit_or_shrink", BarrierError, GroupCreationError),
    ]
    holds(protocol, 3, properties, width=50)


# Parts. A part of a part is open when that is closed. Found here: its messages were deleted.


def nested(store, rank, world_size):
    groups = [StatelessProcessGroup(rank, world_size, store)]

    def split():
        groups.append(groups[-1].split(0, timeout=1.0))

    def send():
        return groups[2].send_obj("in the part", 1)

    def receive():
        return groups[2].recv_obj(0, timeout=1.0)

    return {
        "split": split,
        "split again": split,
        **({"send": send} if rank == 0 else {}),
        "close": lambda: groups[1].close(1.0),
        **({"receive": receive} if rank == 1 else {}),
        "barrier": lambda: groups[0].barrier(1.0),
        "close the other": lambda: groups[2].close(1.0),
    }


def everything_works(snapshot):
    """No call raises."""
    return not any(call.raised for calls in snapshot.calls for call in calls.values())


def no_key_of_a_part_stays(snapshot):
    """When all have closed a part, its keys are gone."""
    return not snapshot.ended or not any("part" in key for key in snapshot.values)


@BOTH_GROUPS
def test_parts_of_parts(native):
    properties = [everything_works, no_key_of_a_part_stays, nobody_waits_for_ever]
    holds(nested, 2, properties, width=60, native=native)


# A part shrinks, and is closed. Found here: the keys from before stayed.


def shrunk_part(store, rank, world_size):
    groups = [StatelessProcessGroup(rank, world_size, store)]
    return {
        "split": lambda: groups.append(groups[-1].split(0, timeout=1.0)),
        "shrink": lambda: groups.append(groups[-1].shrink(timeout=1.0)),
        "close": lambda: groups[-1].close(1.0),
        "barrier": lambda: groups[0].barrier(1.0),
    }


def test_a_part_that_shrinks():
    properties = [everything_works, no_key_of_a_part_stays, nobody_waits_for_ever]
    holds(shrunk_part, 2, properties, timeouts=0, width=200)
    holds(shrunk_part, 3, properties, width=50)


# Calls in a part and in the whole take place in any order, also where a wait of one ends early, and
# neither ends the other.


def overlapping(store, rank, world_size):
    group = StatelessProcessGroup(rank, world_size, store)
    parts = []
    in_part = {"in the part": lambda: parts[0].all_gather_obj(rank, 1.0)} if rank < 2 else {}
    return {
        "split": lambda: parts.append(group.split(0 if rank < 2 else 1, timeout=1.0)),
        **in_part,
        "in the whole": lambda: group.all_gather_obj(rank, 1.0),
        **({"send": lambda: parts[0].send_obj("late", 1)} if rank == 0 else {}),
        "close": lambda: parts[0].close(1.0),
    }


def test_parts_and_the_whole():
    properties = [everything_works, nobody_waits_for_ever, no_key_of_a_part_stays]
    holds(overlapping, 3, properties, width=60)


# Every mutant is caught, by the property that it was made to break.


class Mutant(NamedTuple):
    """Mistakes, and where they show.

    Attributes:
        mistakes: as ``made`` takes them.
        protocol: that is explored.
        violated: the property that must not hold.
        size: number of processes.
    """

    mistakes: list[Any]
    protocol: Any
    violated: Any
    size: int = 2
    timeouts: int = 0
    crashes: int = 0
    width: int | None = None


def meeting(mistake):
    return (mistake, ("shrinking.Meeting", "asking.Meeting"))


AT_ONCE = meeting(mutants.InterruptedAtOnce)
BOTH_INTERRUPTED = processes("shrink", turns={0: (2,), 1: (1,)})

MUTANTS = [
    Mutant([meeting(mutants.QuickMeeting)], meets, NOTHING_ELSE, timeouts=1, crashes=1),
    Mutant([meeting(mutants.OwnRoll)], meets, ONE_GROUP, 3, timeouts=1, width=300),
    Mutant([meeting(mutants.LatecomersGoOn)], meets, NOTHING_ELSE, timeouts=1),
    Mutant([meeting(mutants.OneMeeting)], after_a_death, not_with(1, "shrink"), 3),
    Mutant([AT_ONCE], BOTH_INTERRUPTED, ONE_GROUP),
    Mutant(
        [(mutants.same_keys_later, ["shrinking.keys.meeting"])],
        processes("shrink", "shrink again", p1=["shrink"]), not_with(1, "shrink again"),
    ),
    Mutant([(mutants.own_rank_first, ["shrinking.meet"])], meets, IN_ORDER),
    Mutant([(mutants.old_prefix, ["shrinking.keys.era"])], MESSAGES, ONLY_NEW, 3),
    Mutant([(mutants.no_meeting, ["asking.Plan.meet"])], dead_asker, not_with(1, "admit")),
    Mutant([(mutants.told_at_once, ["admitting.unanswered"])], WITHOUT_1, told_of_what_comes, 3),
    Mutant(
        [(mutants.keeps_itself, ["admitting.Admitting._admit"])],
        processes("see", "admit", "shrink", newcomers=1), NOTHING_ELSE, crashes=1,
    ),
    Mutant(
        [(mutants.asks_again, ["admitting.Admitting._admit"])],
        processes("see", "admit", "gather", newcomers=1, turns={0: (AT_THE_END,)}), ADMITS[2],
    ),
    Mutant(
        [(mutants.goes_without_a_word, ["asking.break_off"])],
        processes("see", "admit", newcomers=1, turns={1: (2,)}), others_learn_of_it, 3, width=50,
    ),
    Mutant(
        [(mutants.below_the_whole, ["splitting.keys.part"])], nested, everything_works, width=60
    ),
    Mutant(
        [(mutants.own_keys_only, ["leaving.leave_part"])], shrunk_part, no_key_of_a_part_stays,
        width=50,
    ),
]  # fmt: skip


def name_of(mutant):
    return "-".join(mistake.__name__ for mistake, _ in mutant.mistakes)


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_mutants(mutant):
    with made(*mutant.mistakes):
        found = explore_as(mutant, [mutant.violated])
        timeline = found.counterexample.timeline(RefdistWords())
    print(f"{mutant.mistakes[0][0].__doc__}\n{timeline}")
    assert str(timeline).endswith(f"Not so: {mutant.violated.__doc__}")


# Where a mutant fails, refdist does not.
@pytest.mark.parametrize("config", sorted({mutant[3:] for mutant in MUTANTS}, key=str), ids=str)
def test_refdist_where_mutants_fail(config):
    for protocol in {mutant.protocol for mutant in MUTANTS if mutant[3:] == config}:
        alike = [m for m in MUTANTS if (m.protocol, *m[3:]) == (protocol, *config)]
        found = explore_as(alike[0], [mutant.violated for mutant in alike])
        assert found.counterexample is None


def explore_as(mutant, properties):
    return explore(
        mutant.protocol, mutant.size, properties,
        timeouts=mutant.timeouts, crashes=mutant.crashes, width=mutant.width,
    )  # fmt: skip
