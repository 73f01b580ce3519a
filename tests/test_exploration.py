"""Exploration: that the explorer is right about small protocols, then what it says of refdist.

The barrier and the messages that are explored are those of the package, unchanged.
"""

import math
import random
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import pytest
from mutants import MUTANTS, GoesWithoutAWord
from ranks import with_secret
from torch.distributed import DistStoreError

from refdist import (
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
    StatelessProcessGroup,
    torch_versions,
)
from refdist.barrier import plain, quick
from refdist.barrier.roll import COMPLETE
from refdist.deadline import CancelledWaitError, Deadline
from refdist.exploration import (
    REFDIST_BARRIER,
    RefdistWords,
    explore,
    next_call_works,
    no_key_stays,
    nobody_waits_for_ever,
    replay,
    within,
)
from refdist.exploration.machine import Machine
from refdist.joining.realigning import break_off
from refdist.objects import encoding
from refdist.store.keys import message
from refdist.store.seals import Seals

COUNTERS = pytest.mark.skipif(
    not torch_versions.store_features()[torch_versions.STORE_BARRIER],
    reason="this torch has no Store.barrier",
)
BOTH_GROUPS = pytest.mark.parametrize(
    "native", [pytest.param(True, id="quick", marks=COUNTERS), pytest.param(False, id="plain")]
)
BOTH_KINDS = pytest.mark.parametrize("module", [plain, quick], ids=["plain", "quick"])
SECOND = timedelta(seconds=1)


def kind_of_barrier(native):
    """All groups made in this context have this kind of barrier."""
    return nullcontext() if native else torch_versions.switched_off(torch_versions.STORE_BARRIER)


def barriers(rounds=1, kind=plain.Barrier, seconds=1.0, secret=False):
    def protocol(store, rank, world_size):
        barrier = kind(store, rank, world_size)
        if secret:
            barrier.seals = Seals(b"a secret of tests", "group")
        return {f"barrier {number}": lambda: barrier.wait(seconds) for number in range(rounds)}

    return protocol


def only(rank, call):
    """A protocol of one call, which this rank makes alone, while the others have nothing to do."""
    return lambda store, own, _: {"call": partial(call, store)} if own == rank else {}


def never(snapshot):
    """Nothing ever ends."""
    return not snapshot.ended


# The explorer itself. Schedules are counted as combinatorics counts them.


def counting(requests):
    def call(store, rank):
        for _ in range(requests[rank]):
            store.add(f"count/{rank}", 1)

    return lambda store, rank, _: {f"call of {rank}": partial(call, store, rank)}


@pytest.mark.parametrize("requests", [(0,), (3,), (2, 3), (5, 5), (1, 2, 3), (2, 2, 2, 2)])
def test_independent_ranks(requests):
    found = explore(counting(requests), len(requests), [])
    steps = [1 + number for number in requests]  # a step to enter the call
    multinomial = math.factorial(sum(steps))
    for number in steps:
        multinomial //= math.factorial(number)
    assert found.schedules == multinomial
    assert found.states == math.prod(number + 1 for number in steps)
    assert found.steps == sum(steps)
    assert found.complete and found.counterexample is None
    assert str(found).endswith(f"{found.schedules:,} schedules; all properties hold")


# A rank may die before each of its requests: after entering, and after each request but the last.
def test_every_moment_of_a_death():
    found = explore(counting((3,)), 1, [], crashes=1)
    assert (found.schedules, found.states) == (1 + 4, 5 + 4)


# What is merged loses nothing: schedules, one by one, end in the states that exploration finds.


def walk(machine, state, timeouts, crashes, schedule=""):
    ended = True
    for step, after in machine.steps(state, timeouts, crashes):
        ended = False
        yield from walk(machine, after, timeouts, crashes, schedule + step)
    if ended:
        yield schedule, state


def meeting(store, rank, world_size):
    """A barrier without an outcome, with few requests."""

    def call():
        if store.add("arrived", 1) == world_size:
            store.set("go", "")
        store.wait(["go"], SECOND)

    return {"meet": call}


@pytest.mark.parametrize(
    ("protocol", "world_size", "timeouts", "crashes"),
    [
        (barriers(), 2, 0, 0),
        (barriers(), 2, 0, 1),
        (meeting, 2, 2, 1),
        (meeting, 3, 1, 0),
        (counting((1, 1, 2)), 3, 0, 1),
    ],
)
def test_schedules_one_by_one(protocol, world_size, timeouts, crashes):
    ends = []

    def collect(snapshot):
        """Nothing."""
        if snapshot.ended:
            ends.append(tuple(tuple(calls.values()) for calls in snapshot.calls))
        return True

    found = explore(protocol, world_size, [collect], timeouts=timeouts, crashes=crashes)
    machine = Machine(protocol, world_size)
    schedules = dict(walk(machine, machine.start(), timeouts, crashes))
    assert len(schedules) == found.schedules
    assert max(sum(c.isdigit() for c in schedule) for schedule in schedules) == found.steps
    one_by_one = {repr(tuple(r.calls for r in state.histories)) for state in schedules.values()}
    assert one_by_one == set(map(repr, ends))


def test_the_counterexample_is_a_shortest_one():
    protocol, crashes = barriers(), 1

    def all_return(snapshot):
        """Nobody raises."""
        return not any(call.raised for calls in snapshot.calls for call in calls.values())

    found = explore(protocol, 2, [all_return], timeouts=0, crashes=crashes)
    machine = Machine(protocol, 2)
    lengths = [
        sum(c.isdigit() for c in schedule)
        for schedule, state in walk(machine, machine.start(), 0, crashes)
        if any(call.raised for r in state.histories for call in r.calls)
    ]
    assert sum(c.isdigit() for c in found.counterexample.schedule) <= min(lengths)
    assert found.counterexample.violated is all_return
    assert found.counterexample.sentence == "Nobody raises."
    assert str(found).endswith(f"until {found.counterexample.schedule}; not so: Nobody raises.")


# Time: a wait that times out takes as long as it was told, on the clock of its rank alone.


def test_simulated_time():
    def call(store):
        store.add("other", 1)
        before = time.monotonic(), time.time()
        with pytest.raises(DistStoreError, match="wait timeout after 1500ms"):
            store.wait(["never"], timedelta(seconds=1.5))
        time.sleep(2)
        return time.monotonic() - before[0], time.time() - before[1]

    values = []

    def collect(snapshot):
        """Nothing."""
        values.extend(calls["call"].value for calls in snapshot.calls if calls and snapshot.ended)
        return True

    real = time.monotonic()
    assert explore(only(0, call), 1, [collect], timeouts=0).schedules == 1
    assert values == [(3.5, 3.5)]
    assert time.monotonic() - real < 3 and time.monotonic is not None


# A wait may time out although the key is there, or before; and again when nobody can go on.
def test_timeouts():
    def call(store):
        try:
            store.wait(["key"], SECOND)
        except DistStoreError:
            return False
        return True

    def protocol(store, rank, world_size):
        return {"wait": lambda: call(store)} if rank == 1 else {"set": lambda: store.set("key", "")}

    def counts(timeouts):
        outcomes = []

        def collect(snapshot):
            """Nothing."""
            if snapshot.ended:
                outcomes.append(snapshot.calls[1]["wait"].value)
            return True

        return explore(protocol, 2, [collect], timeouts=timeouts).schedules, set(outcomes)

    # of the orders of two steps each, and in some rank 1 is woken or asks when the key is there
    assert counts(0)[1] == {True}
    assert counts(1)[1] == {True, False}
    assert explore(only(0, call), 1, [], timeouts=0).schedules == 1


def test_a_wait_without_a_timeout_of_its_own_is_for_ever():
    found = explore(only(0, lambda store: store.get("never")), 2, [nobody_waits_for_ever])
    assert found.counterexample.schedule == "00"
    assert "In the end, no rank waits" in found.counterexample.sentence


# Replaying.


def test_a_timeline():
    def protocol(store, rank, world_size):
        def call():
            if store.add("arrived", 1) == world_size:
                store.set("go", b"\x01")
            store.wait(["go"], SECOND)
            return store.get("go")

        return {"meet": call}

    timeline = replay(protocol, 2, "00011x01t1")
    there = " " * 23
    assert str(timeline).splitlines() == [
        "step  rank 0                 rank 1",
        "   1  enters meet",
        "   2  add 1 to arrived -> 1",
        "   3  wait go: waits",
        f"   4  {there}enters meet",
        f"   5  {there}add 1 to arrived -> 2",
        "   6  dies",
        f"   7  {there}set go = \\x01",
        f"   8  {there}wait go: time is up",
        f"      {there}raises DistStoreError from meet",
    ]
    kinds = [event.kind for event in timeline.events if event.rank == 1]
    assert kinds == ["enters", "asks", "asks", "times out", "raises"]


# One step may end the wait of another rank, and that its call.
def test_a_timeline_tells_who_is_woken():
    def protocol(store, rank, world_size):
        if rank == 1:
            return {"set": lambda: store.set("go", "")}
        return {"wait": lambda: store.wait(["go"], SECOND)}

    events = replay(protocol, 2, "0011").events
    assert [(event.step, event.rank, event.kind) for event in events] == [
        (1, 0, "enters"),
        (2, 0, "waits"),
        (3, 1, "enters"),
        (4, 1, "asks"),
        (4, 1, "returns"),
        (4, 0, "is woken"),
        (4, 0, "returns"),
    ]


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("02", r"schedule='02': step 2 is 2, but only 0, 1, x0, x1 can happen there"),
        ("0t0", r"step 2 is t0, but only 0, 1, x0, x1"),
        ("0x0x0", r"step 3 is x0, but only 1, x1"),
        ("0y", r"schedule='0y': must be of steps like 0, t0 and x0"),
    ],
)
def test_a_schedule_that_cannot_be(schedule, text):
    with pytest.raises(ValueError, match=text):
        replay(counting((1, 1)), 2, schedule)


# Limits, randomness, progress, and bad input.


def test_a_width_keeps_some_states_drawn_by_the_seed():
    everything = explore(barriers(2), 2, [], timeouts=1)
    some = [explore(barriers(2), 2, [], timeouts=1, width=50, seed=seed) for seed in (1, 1, 2)]
    assert everything.complete and not any(found.complete for found in some)
    assert some[0] == some[1] != some[2]
    assert all(0 < found.schedules < everything.schedules for found in some)
    assert all(50 < found.states < everything.states for found in some)


# The schedule of a narrow search is a schedule all the same.
def test_a_counterexample_of_a_narrow_search():
    found = explore(barriers(2), 2, [never], timeouts=1, width=20, seed=3)
    timeline = replay(barriers(2), 2, found.counterexample.schedule)
    assert {event.kind for event in timeline.events if event.rank == 0} >= {"enters", "returns"}


def test_progress_is_a_line_after_each_step():
    lines = []
    found = explore(barriers(), 2, [], timeouts=0, progress=lines.append)
    assert lines[0] == "step 0: 1 states, 0 schedules ended"
    assert len(lines) == found.steps + 2
    assert lines[-1].endswith(f"{found.states:,} states, {found.schedules:,} schedules ended")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"world_size": 0}, r"world_size=0: must be in 1..10"),
        ({"world_size": 11}, r"world_size=11: must be in 1..10"),
        ({"timeouts": -1}, "timeouts=-1: must be at least 0"),
        ({"crashes": 0.5}, "crashes=0.5: must be an integer"),
        ({"width": 0}, "width=0: must be at least 1"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        explore(counting((1, 1)), **({"world_size": 2, "properties": []} | options))


def test_a_protocol_without_calls():
    with pytest.raises(
        ValueError, match="protocol of rank 0 returned 7: must be its calls by name"
    ):
        explore(lambda *_: 7, 2, [])


def test_a_protocol_that_draws_lots():
    def call(store):
        for _ in range(50):
            store.set(str(random.random()), "")

    with pytest.raises(ValueError, match=r"rank 0 asked .*must depend on nothing but these"):
        explore(only(0, call), 1, [])


def test_a_protocol_that_polls():
    def call(store):
        while not store.check(["never"]):
            pass

    with pytest.raises(ValueError, match="max_steps=40: a schedule has more"):
        explore(only(0, call), 1, [], max_steps=40)


# A value that is no integer: the server closes the connection. The rank gets an error each time.
def test_a_closed_connection():
    def call(store):
        store.set("key", "x")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="closed the connection"):
                store.add("key", 1)

    assert explore(only(0, call), 1, [within(0)]).counterexample is None


# The shipped barriers. With more than a second, ranks of the quick one may fall asleep.


@pytest.mark.parametrize(
    ("module", "seconds", "secret"),
    [
        pytest.param(plain, 1.0, False, id="plain"),
        pytest.param(plain, 1.0, True, id="plain, secret"),
        pytest.param(quick, 1.0, False, id="quick"),
        pytest.param(quick, 1.5, False, id="quick, sleepers"),
        pytest.param(quick, 1.5, True, id="quick, sleepers, secret"),
    ],
)
@pytest.mark.parametrize(("rounds", "timeouts", "crashes"), [(2, 1, 0), (2, 0, 1), (1, 99, 1)])
def test_all_schedules_of_two_ranks(rounds, timeouts, crashes, module, seconds, secret):
    found = explore(
        barriers(rounds, module.Barrier, seconds, secret), 2,
        [*REFDIST_BARRIER, within(rounds * 4.01)],
        timeouts=timeouts, crashes=crashes,
    )  # fmt: skip
    assert found.counterexample is None and found.complete
    assert found.states > 1_000 and found.schedules > 50_000


# More of them, and three ranks. Where there are too many states, some are drawn after each step.


@BOTH_KINDS
@pytest.mark.parametrize(
    ("world_size", "rounds", "timeouts", "crashes", "seconds", "width"),
    [(2, 2, 2, 0, 1.5, 1_500), (2, 2, 1, 1, 1.5, 1_500), (3, 1, 1, 1, 1.5, 4_000)],
)
def test_more_schedules(world_size, rounds, timeouts, crashes, seconds, width, module):
    found = explore(
        barriers(rounds, module.Barrier, seconds), world_size, REFDIST_BARRIER,
        timeouts=timeouts, crashes=crashes, width=width,
    )  # fmt: skip
    assert found.counterexample is None
    assert found.states > 20_000 and found.schedules > 10**6


# A rank is interrupted, once, after any of its waits. It has not been there then, and comes again;
# or all were there, and it knows that.


class InterruptedDeadline(Deadline):
    """Is cancelled as soon as a wait has timed out."""

    def slice(self):
        if self.elapsed() > 0:
            self.cancel("an interrupt")
        return super().slice()


def interrupted(ranks, rounds=1, kind=plain.Barrier):
    def protocol(store, rank, world_size):
        barrier = kind(store, rank, world_size)
        outcomes, confirm = [], barrier.confirm

        def noted(this):
            outcomes.append(confirm(this))
            return outcomes[-1]

        barrier.confirm = noted

        def call(number):
            deadline = Deadline if number or rank not in ranks else InterruptedDeadline
            try:
                barrier.wait(deadline(9.0))
            except CancelledWaitError:
                if barrier.generation == number:
                    barrier.wait(9.0)
                elif outcomes[-1] != COMPLETE:
                    raise

        return {f"barrier {number}": partial(call, number) for number in range(rounds)}

    return protocol


# the keys of barriers that were tried again go with the next broken or complete one
WITHOUT_KEYS = [holds for holds in REFDIST_BARRIER if holds is not no_key_stays]


@BOTH_KINDS
@pytest.mark.parametrize(
    ("world_size", "ranks", "rounds", "timeouts", "width"),
    [
        (2, (0, 1), 1, 1, None),
        (2, (0, 1), 1, 2, 1_000),
        (2, (0, 1), 2, 1, 2_000),
        (3, (0, 1, 2), 1, 1, 1_000),
    ],
)
def test_interrupted_ranks(world_size, ranks, rounds, timeouts, width, module):
    found = explore(
        interrupted(ranks, rounds, module.Barrier), world_size, WITHOUT_KEYS,
        timeouts=timeouts, width=width,
    )  # fmt: skip
    assert found.counterexample is None and (found.complete or width is not None)
    assert found.schedules > 10**5


# Were the others not told, they would let the rank pass alone, or wait for it in vain.
@BOTH_KINDS
def test_interrupted_without_a_word(module):
    kind = type("Mutant", (GoesWithoutAWord, module.Barrier), {})
    found = explore(interrupted((0, 1), 1, kind), 2, WITHOUT_KEYS, timeouts=1)
    assert found.counterexample is not None


# One rank makes a call alone, and breaks it, or rank 0 alone does. Then both realign, whatever the
# other has made of that call, and are in step.


def realigned(alone):
    def protocol(store, rank, world_size):
        group = StatelessProcessGroup(rank, world_size, store)

        def break_alone():
            break_off(group._barrier, "its time was up")

        calls = {"alone": break_alone} if rank == alone else {}
        return calls | {
            "realign": lambda: group.realign(timeout=9.0),
            "gather": lambda: group.all_gather_obj(rank, timeout=9.0),
        }

    return protocol


def everyone_realigns(snapshot):
    """Whoever has ended the last call has got what both brought to it."""
    gathers = snapshot.named("gather").values()
    return all(call.value == [0, 1] for call in gathers if call.returned)


@BOTH_GROUPS
@pytest.mark.parametrize("alone", [0, 1])
def test_realigned_ranks(alone, native):
    both = [everyone_realigns, nobody_waits_for_ever]
    with kind_of_barrier(native):
        undisturbed = explore(realigned(alone), 2, [*both, next_call_works], timeouts=0)
        # with a timeout, the plain barrier has some millions of states
        disturbed = explore(realigned(alone), 2, both, timeouts=1, width=500)
    assert undisturbed.counterexample is None and undisturbed.complete
    assert disturbed.counterexample is None
    assert min(undisturbed.schedules, disturbed.schedules) > 1_000


# Every mutant is caught, by the property that it was made to break. The real barrier is not.


def name_of(mutant):
    return f"{mutant.barrier.__name__}-{mutant.kind.__module__.rpartition('.')[2]}"


def explore_as(mutant, kind, properties):
    return explore(
        barriers(mutant.rounds, kind, mutant.seconds), mutant.world_size, properties,
        timeouts=mutant.timeouts, crashes=mutant.crashes, width=mutant.width,
    )  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_mutants(mutant):
    found = explore_as(mutant, mutant.barrier, [mutant.violated])
    timeline = found.counterexample.timeline(RefdistWords())
    print(f"{mutant.barrier.__doc__}\n{timeline}")
    assert str(timeline).endswith(f"Not so: {mutant.violated.__doc__}")
    assert mutant.shows in str(timeline)


# Where a mutant fails, the real barrier does not: also in test_all_schedules_of_two_ranks.


@pytest.mark.parametrize(
    "config", sorted({m[2:8] for m in MUTANTS} - {(2, 2, 1, 0, 1.0, None)}, key=str), ids=str
)
@BOTH_KINDS
def test_the_real_barrier_where_mutants_fail(config, module):
    alike = [m for m in MUTANTS if m[2:8] == config and m.kind is module.Barrier]
    if alike:
        found = explore_as(alike[0], module.Barrier, list({m.violated for m in alike}))
        assert found.counterexample is None


# Gathering: a barrier that carries objects. All ranks get all objects, or none does.


def gathers(rounds, secret=False):
    def protocol(store, rank, world_size):
        group = StatelessProcessGroup(rank, world_size, store)
        if secret:
            with_secret(group)

        def gather(number):
            return group.all_gather_obj((number, rank), timeout=1.0)

        return {str(number): partial(gather, number) for number in range(rounds)}

    return protocol


def everyone_gets_everything(snapshot):
    """Who returns from a gather has the objects that all ranks brought to it, in rank order."""
    return all(
        call.value == [(int(name), rank) for rank in range(len(snapshot.calls))]
        for name, calls in snapshot.collective.items()
        for call in calls.values()
        if call.returned
    )


def errors_are(*kinds):
    def only_these(snapshot):
        """A call raises nothing but what it promises."""
        return all(
            isinstance(call.error, kinds)
            for calls in snapshot.calls
            for call in calls.values()
            if call.raised
        )

    return only_these


@BOTH_GROUPS
@pytest.mark.parametrize(
    ("rounds", "timeouts", "crashes", "secret"),
    [(1, 1, 1, False), (2, 0, 0, False), (1, 1, 1, True)],
)
def test_gathering(rounds, timeouts, crashes, secret, native):
    properties = [*REFDIST_BARRIER, everyone_gets_everything, errors_are(MessageTimeoutError)]
    with kind_of_barrier(native):
        found = explore(
            gathers(rounds, secret), 2, properties,
            timeouts=timeouts, crashes=crashes,
        )  # fmt: skip
    assert found.counterexample is None and found.complete


# Messages. What is received is what was sent, in order and each once; what has expired is missed
# out, and said so. A receiver that gives up gets it the next time.


def mail(objects, attempts, seconds=0.0):
    def protocol(store, rank, world_size):
        group = StatelessProcessGroup(rank, world_size, store, data_expiration_seconds=1)

        def wait_and_expire():
            time.sleep(seconds)
            group.expire_data()

        if rank == 0:
            calls = {f"send {obj}": partial(group.send_obj, obj, 1) for obj in objects}
            return calls | ({"expire": wait_and_expire} if seconds else {})
        receive = partial(group.recv_obj, 0, timeout=1.0)
        return {f"receive {number}": receive for number in range(attempts)}

    return protocol


def received(snapshot):
    """What rank 1 has got, where None is for an object that has expired."""
    calls = [call for call in snapshot.calls[1].values() if call.over]
    return [
        call.value if call.returned else None
        for call in calls
        if call.returned or isinstance(call.error, MessageExpiredError)
    ]


def in_order(objects):
    def each_once(snapshot):
        """Messages arrive in the order in which they were sent, each at most once."""
        found = received(snapshot)
        return all(one in (None, sent) for one, sent in zip(found, objects, strict=False))

    return each_once


def nothing_is_lost(snapshot):
    """Without a death and a timeout that comes too early, every object arrives or has expired."""
    calls = [call for calls in snapshot.calls for call in calls.values()]
    if snapshot.dead or not snapshot.ended or any(call.early for call in calls):
        return True
    return not any(type(call.error) is MessageTimeoutError for call in calls)


def no_message_stays(snapshot):
    """When everything has arrived or expired, and was asked for, only notes of expiry stay."""
    done = snapshot.ended and not any(call.raised for call in snapshot.calls[1].values())
    return not done or bool(snapshot.dead) or {*snapshot.values} <= {message(0, 1, 0).expired}


MAIL = [nothing_is_lost, no_message_stays, nobody_waits_for_ever, errors_are(MessageError)]


# Found here: a message expired just as its reader looked, which so found nothing, and then found
# the note. It took the note for a value that nobody writes: 000000011010111111.
@pytest.mark.parametrize("seconds", [0, 2], ids=["kept", "expired"])
@pytest.mark.parametrize(("timeouts", "crashes"), [(0, 0), (2, 1)])
def test_messages(timeouts, crashes, seconds):
    objects = ["a", "b", "c"]
    found = explore(
        mail(objects, 3, seconds), 2, [*MAIL, in_order(objects)],
        timeouts=timeouts, crashes=crashes,
    )  # fmt: skip
    assert found.counterexample is None and found.complete


# The same for an object that takes several chunks.
@pytest.mark.parametrize("seconds", [0, 2], ids=["kept", "expired"])
def test_messages_in_chunks(seconds):
    objects = ["x" * 300]
    with patch.object(encoding, "CHUNK_BYTES", 128):
        found = explore(
            mail(objects, 2, seconds), 2, [nobody_waits_for_ever, in_order(objects)],
            timeouts=1, crashes=1,
        )  # fmt: skip
    assert found.counterexample is None and found.complete


# A surprise of torch's queues, which is why refdist uses none: a client that has waited for a queue
# stays listed there, so the next push to it ends the wait of that client for anything else. The
# test of the simulated store shows that the real one does the same.
@COUNTERS
def test_a_queue_wakes_who_waits_in_a_barrier():
    def protocol(store, rank, world_size):
        barrier = quick.Barrier(store, rank, world_size)
        mine = lambda: store.queue_push("q", "x") if rank == 0 else store.queue_pop("q")  # noqa: E731
        second = {"again": lambda: store.queue_push("q", "x")} if rank == 0 else {}
        return {"first": mine, **second, "barrier": lambda: barrier.wait(1.0)}

    def nobody_passes_alone(snapshot):
        """Nobody returns from the barrier before every rank has entered it."""
        calls = snapshot.named("barrier")
        return len(calls) == 2 or not any(call.returned for call in calls.values())

    found = explore(protocol, 2, [nobody_passes_alone], timeouts=0)
    events = found.counterexample.timeline().events
    pushed = [event for event in events if event.rank == 0 and "queue_push" in event.text]
    assert [event.kind for event in events if event.step == pushed[1].step] == [
        "asks",
        "returns",
        "is woken",
    ]
