"""The barrier: who waits for whom, and what everyone sees when a rank is missing, late or dies.

Most tests run on both kinds of barriers: "counters", where the store has ``Store.barrier``, which
are those of ``refdist.barrier.quick``; and "keys", those of ``refdist.barrier.plain``.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from ranks import LOCAL, Watched, run_ranks, run_threads, second_group, until_signed, with_secret
from torch.distributed import HashStore, PrefixStore

from refdist import BarrierError, StatelessProcessGroup, create_tcp_store, torch_versions
from refdist.barrier import barrier_of, plain, quick
from refdist.barrier.quick import ASLEEP, COUNT, OPEN, WOKEN
from refdist.barrier.roll import Roll
from refdist.store.keys import PlainKeys, Slot, reason
from refdist.store.seals import NO_SEALS

SLACK = 6.0  # seconds that a slow machine may take beyond a protocol's own deadline

COUNTERS = pytest.param(
    True,
    id="counters",
    marks=pytest.mark.skipif(
        not torch_versions.store_features()[torch_versions.STORE_BARRIER],
        reason="this torch has no Store.barrier",
    ),
)
BOTH_KINDS = pytest.mark.parametrize("native", [COUNTERS, pytest.param(False, id="keys")])
ONLY_COUNTERS = pytest.mark.parametrize("native", [COUNTERS])


def kind_of_barrier(native):
    """All groups made in this context have this kind of barrier."""
    return nullcontext() if native else torch_versions.switched_off(torch_versions.STORE_BARRIER)


def keys_of(native, number=0):
    """The keys of a barrier of a group of which none has broken."""
    return Slot.of(0, number % quick.SLOTS) if native else PlainKeys.of(number)


def gate_of(its):
    """The key at which ranks wait long for the outcome of a barrier with these keys."""
    return its.wake if isinstance(its, Slot) else its.outcome


def last_gate_of(its):
    """The key at which rank 0 waits for the others to leave."""
    return its.left if isinstance(its, Slot) else its.all_left


def waits_at(gate, request, key):
    """Whether a request waits at this key."""
    return request in ("wait", "barrier") and key in (gate, [gate])


def falls_asleep(slot, request, key, amount):
    """Whether a request says that its rank falls asleep."""
    return request == "add" and key == slot.state and amount == ASLEEP


def looks_at_state(slot, request, key, amount):
    """Whether a request only looks at the state."""
    return request == "add" and key == slot.state and amount == 0


def proposes(its, request, key, expected):
    """Whether a request decides a barrier, if it is not decided; with counters, it breaks it."""
    decided = its.state if isinstance(its, Slot) else its.outcome
    looks = expected in (b"\0", b"\0\0")
    return request == "compare_set" and key == decided and not looks


def confirms(its, request, key, value):
    """Whether a request confirms. With keys, that of the last to arrive."""
    if isinstance(its, Slot):
        return request == "add" and key == its.state and value & COUNT == 1
    return proposes(its, request, key, value)


def leaves(its, request, key, value):
    """Whether a request says on the roll that its rank has left barrier 0."""
    signs = request == "append" and key == its.roll
    return signs and len(Roll.parse(value, 0, NO_SEALS, key).left) == 1


def there_by_chance(group):
    """The number of keys that a barrier leaves on the store only if rank 0 did not leave last."""
    barrier = group._barrier
    if isinstance(barrier, quick.Barrier):
        return 0
    return int(group.store.check([PlainKeys.of(barrier.tries - 1).all_left]))


def count_keys(here, group):
    """How many keys the store of a group holds, besides those that are there by chance."""
    here.count_keys(group)  # from here on, all ranks have left
    by_chance = there_by_chance(group)
    return here.count_keys(group) - by_chance


def clients(world_size, native):
    """A store for each of several threads, the first of which has the server."""
    server = create_tcp_store(LOCAL, 0, is_master=True)
    stores = [server, *(create_tcp_store(LOCAL, server.port) for _ in range(1, world_size))]
    return stores if native else [PrefixStore("group", store) for store in stores]


# Everyone returns, and nobody before everyone has called.


def _count_arrivals(here, native, rounds):
    seen = []
    with kind_of_barrier(native), here.group() as group:
        for number in range(rounds):
            here.board.add(f"arrivals/{number}", 1)
            group.barrier()
            seen.append(here.board.add(f"arrivals/{number}", 0))
    return seen


@BOTH_KINDS
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nobody_returns_before_all_have_arrived(world_size, native):
    assert run_ranks(_count_arrivals, world_size, native, 50) == [[world_size] * 50] * world_size


# One rank is late: it calls when every other one waits already. They return after it has called.


def _one_is_late(here, native, late):
    with here.group() as group:

        def before(request, *_):
            if request in ("wait", "barrier"):
                here.tell(f"waiting/{here.rank}")

        again = second_group(here, group, native, before)
        if here.rank == late:
            for rank in set(range(here.world_size)) - {late}:
                here.ask(f"waiting/{rank}")
            here.tell("the late one calls")
        again.barrier()
        return here.told("the late one calls")


@BOTH_KINDS
@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_everyone_waits_for_the_late_one(world_size, late, native):
    assert run_ranks(_one_is_late, world_size, native, late) == [True] * world_size


# Rank 0 waits; with counters, it sleeps, for it has waited for a second. When rank 1 comes, rank 0
# is woken within the slice in which it waits, so it asks the store once. On a machine that is slow
# just then, rank 1 may come a slice later, so there are several rounds, of which one has to show
# it. Without waking, rank 0 would have to ask twice in each.


def _rank_0_sleeps(rank, native, stores, told):
    requests = []
    gates = [gate_of(keys_of(native, number)) for number in range(3)]

    def before(request, key=None, *_):
        if rank == 0 and any(waits_at(gate, request, key) for gate in gates):
            requests.append(key)
            if len(requests) == 1:
                told.set()  # a second one would let rank 1 go in the next round already

    group = StatelessProcessGroup(rank, 2, Watched(stores[rank], before))
    counts = []
    for _ in range(3):
        requests.clear()
        if rank == 1:
            assert told.wait(20)
            told.clear()
        group.barrier()
        counts.append(len(requests))
    return min(counts)


@BOTH_KINDS
def test_a_sleeper_is_woken_at_once(native):
    assert run_threads(_rank_0_sleeps, 2, native, clients(2, native), threading.Event()) == [1, 0]


# A rank is missing. The others: one and the same BarrierError in time, whatever the timeout of the
# store. The rank comes late: the same error at once. Then everyone passes the next barrier, and
# after some more the store holds what it held before.


def _one_is_missing(here, native, missing, rounds):
    seen = []
    with kind_of_barrier(native), here.group(store_timeout=300) as group:
        for _ in range(4):
            group.barrier()
        keys_before = count_keys(here, group)
        for number in range(rounds):
            absent = (missing + number) % here.world_size
            if here.rank == absent:
                for rank in set(range(here.world_size)) - {absent}:
                    here.ask(f"raised/{number}/{rank}")
            start = time.monotonic()
            with pytest.raises(BarrierError) as caught:
                group.barrier(timeout=30 if here.rank == absent else 1)
            seen.append((absent, caught.value, time.monotonic() - start))
            here.tell(f"raised/{number}/{here.rank}")
        here.board.add("arrivals", 1)
        group.barrier()
        assert here.board.add("arrivals", 0) == here.world_size
        for _ in range(4):
            group.barrier()
        return seen, keys_before, count_keys(here, group)


def _check_missing(results, generation):
    for round_number, everyone in enumerate(zip(*[seen for seen, _, _ in results], strict=True)):
        assert len({str(error) for _, error, _ in everyone}) == 1
        for rank, (absent, error, seconds) in enumerate(everyone):
            assert error.phase == "arrival" and f"barrier {error.generation} was" in str(error)
            assert error.generation == generation + round_number
            assert error.missing == (absent,) and f"missing: rank {absent} of" in str(error)
            assert error.allowed == 1 and "of 1 s" in str(error)
            assert 0.95 < error.elapsed < 1 + SLACK and f"{error.elapsed:.2f} of" in str(error)
            assert error.broken_by != absent and f"by rank {error.broken_by} at" in str(error)
            assert not error.completed
            assert seconds < (0 if rank == absent else 1) + SLACK
    for _, keys_before, keys_after in results:
        assert keys_after == keys_before


@BOTH_KINDS
@pytest.mark.parametrize(("world_size", "missing"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_a_missing_rank(world_size, missing, native):
    _check_missing(run_ranks(_one_is_missing, world_size, native, missing, 1), generation=5)


# The same, each rank in turn.
@BOTH_KINDS
def test_repeated_failures(native):
    _check_missing(run_ranks(_one_is_missing, 4, native, 0, 4), generation=5)


# One or two of four do not come. The others raise after 2 seconds, neither before nor when the
# store has waited for its own 300.


def _only_some_come(here, native, coming):
    with kind_of_barrier(native), here.group(store_timeout=300) as group:
        if here.rank not in coming:
            return None
        start = time.monotonic()
        with pytest.raises(BarrierError) as caught:
            group.barrier(timeout=2)
        return caught.value, time.monotonic() - start


@BOTH_KINDS
def test_missing_ranks_are_named_in_time(native):
    cases = [((0, 2), (1, 3), "ranks 1 and 3"), ((0, 1, 3), (2,), "rank 2")]
    # side by side, as they wait nearly all of the time
    everything = run_threads(
        lambda case: run_ranks(_only_some_come, 4, native, cases[case][0]), len(cases)
    )
    for (coming, missing, text), results in zip(cases, everything, strict=True):
        assert [result is not None for result in results] == [rank in coming for rank in range(4)]
        for error, seconds in filter(None, results):
            assert error.missing == missing and f"missing: {text} of 4" in str(error)
            # of the rank that gave up; another may have come later, and have waited for less
            assert error.elapsed > 1.95 and seconds < 2 + SLACK


# A rank comes late to a barrier that is broken. It waits for nothing: no request to the store is
# made twice, whatever its timeout.


def _comes_late(rank, stores, over):
    requests = []
    group = StatelessProcessGroup(
        rank, 3, Watched(stores[rank], lambda *request: requests.append(request[:2]))
    )
    if rank == 2:
        assert all(event.wait(20) for event in over)
    start = time.monotonic()
    with pytest.raises(BarrierError) as caught:
        group.barrier(timeout=60 if rank == 2 else 0.2)
    if rank != 2:
        over[rank].set()
    return str(caught.value), time.monotonic() - start, requests


@BOTH_KINDS
def test_a_latecomer_raises_at_once(native):
    over = [threading.Event(), threading.Event()]
    results = run_threads(_comes_late, 3, clients(3, native), over)
    assert len({text for text, _, _ in results}) == 1
    _, seconds, requests = results[2]
    assert seconds < SLACK
    first = keys_of(native)
    if native:
        assert requests == [
            ("append", first.roll),
            ("barrier", first.counter),
            ("append", first.roll),
            ("add", first.state),
            ("wait", [reason(0)]),
            ("compare_set", reason(0)),
            # whether others have gone on, to tell
            ("compare_set", Slot.of(1, 0).roll),
        ]
    else:
        assert requests == [
            ("append", first.roll),
            ("add", first.counter),
            # it makes the count whole
            ("compare_set", first.roll),
            ("compare_set", first.outcome),
            ("compare_set", PlainKeys.of(1).roll),
        ]


# Sixteen ranks time out together, as the seventeenth never comes. Each time one of them alone
# breaks the barrier, and all raise its words.


def _time_out(rank, world_size, stores, rounds):
    reasons = []

    def before(request, key=None, *_):
        if request == "set" and key.endswith(("/reason", "/outcome")):
            reasons.append(key)

    group = StatelessProcessGroup(rank, world_size, Watched(stores[rank], before))
    errors = []
    for _ in range(rounds):
        with pytest.raises(BarrierError) as caught:
            group.barrier(timeout=0.1)
        errors.append(caught.value)
    return errors, reasons


@BOTH_KINDS
def test_one_rank_alone_breaks_a_barrier(native):
    results = run_threads(_time_out, 16, 17, clients(16, native), 10)
    written = [key for _, reasons in results for key in reasons]
    expected = [reason(k) if native else PlainKeys.of(k).outcome for k in range(10)]
    assert sorted(written) == sorted(expected)
    for generation, errors in enumerate(zip(*[errors for errors, _ in results], strict=True)):
        assert len({str(error) for error in errors}) == 1
        (breaker,) = {error.broken_by for error in errors}
        assert expected[generation] in results[breaker][1]
        assert {error.generation for error in errors} == {generation}
        # who came later than the break is missing too, on a slow machine
        assert all(16 in error.missing for error in errors)


# The last arrival meets a timeout: either everyone returns or everyone raises.
#
# Rank 1's time is up, and it is about to break the barrier when rank 0 confirms it. With counters:
# before rank 1 looks at the state, or between that and the break. With keys: before it looks at the
# roll, or between that and the break. Both return.


def _confirm_before_break(here, native, request_number):
    with here.group() as group:
        first, looks = keys_of(native), []

        def before(request, key=None, value=None, *_):
            if native:
                reads = looks_at_state(first, request, key, value)
            else:
                reads = (request, key) == ("compare_set", first.roll)
            if here.rank == 1 and (reads or proposes(first, request, key, value)):
                looks.append(request)
                if len(looks) == request_number:
                    here.tell("rank 1 gives up")
                    here.ask("rank 0 has confirmed")
            if here.rank == 0 and waits_at(last_gate_of(first), request, key):
                here.tell("rank 0 has confirmed")

        again = second_group(here, group, native, before)
        if here.rank == 0:
            here.ask("rank 1 gives up")
            again.barrier(timeout=20)
        else:
            again.barrier(timeout=0.1)
        again.barrier(timeout=20)
        return len(looks)


@BOTH_KINDS
@pytest.mark.parametrize("request_number", [1, 2])
def test_a_barrier_that_is_confirmed_cannot_be_broken(request_number, native):
    # with counters, it looks again when the break has failed
    looks = {1: 1, 2: 3}[request_number] if native else 2
    assert run_ranks(_confirm_before_break, 2, native, request_number) == [0, looks]


# Rank 1's time is up when rank 0 has signed, but is not counted. Rank 1 finds it on the roll, so
# the barrier is complete: rank 1 returns while rank 0 is still not counted, and then rank 0 does.


def _sign_before_break(here, native):
    with here.group() as group:
        first, looks = keys_of(native), []

        def before(request, key=None, value=None, *_):
            if here.rank == 1 and (request, key) == ("compare_set", first.roll):
                looks.append(request)
                here.tell("rank 1 gives up")
                until_signed(again.store._store, [0])
            if here.rank == 0 and request in ("barrier", "add") and key == first.counter:
                here.ask("rank 1 has returned")

        again = second_group(here, group, native, before)
        if here.rank == 0:
            here.ask("rank 1 gives up")
        again.barrier(timeout=20 if here.rank == 0 else 0.1)
        here.tell(f"rank {here.rank} has returned")
        again.barrier(timeout=20)
        return len(looks)


@BOTH_KINDS
def test_a_barrier_to_which_all_have_come_cannot_be_broken(native):
    assert run_ranks(_sign_before_break, 2, native) == [0, 1]


# Rank 0 has arrived last, but rank 1 breaks the barrier before rank 0 confirms it: both raise.


def _break_before_confirm(here, native):
    with here.group() as group:
        first = keys_of(native)

        def before(request, key=None, value=None, *_):
            if here.told("broken"):
                return
            if here.rank == 1 and proposes(first, request, key, value):
                here.tell("rank 1 waits no more")
                here.ask("rank 0 is the last")
            if here.rank == 0 and confirms(first, request, key, value):
                here.tell("rank 0 is the last")
                here.ask("broken")

        again = second_group(here, group, native, before)
        if here.rank == 0:
            here.ask("rank 1 waits no more")
        with pytest.raises(BarrierError) as caught:
            again.barrier(timeout=20 if here.rank == 0 else 0.1)
        here.tell("broken")
        again.barrier(timeout=20)
        return caught.value


@BOTH_KINDS
def test_a_barrier_that_is_broken_cannot_be_confirmed(native):
    errors = run_ranks(_break_before_confirm, 2, native)
    assert str(errors[0]) == str(errors[1])
    # when rank 1 looked at the roll, rank 0 was not there
    assert [(e.broken_by, e.missing, e.phase) for e in errors] == [(1, (0,), "arrival")] * 2


# Rank 1 is about to break the barrier when rank 2 falls asleep or, with keys, is counted and begins
# to wait. With counters, that changes the state, but decides nothing: rank 1 tries again. It breaks
# the barrier, and all raise the same.


def _sleep_before_break(here, native):
    with here.group() as group:
        first, looks = keys_of(native), []

        def before(request, key=None, value=None, *_):
            if here.rank == 1 and proposes(first, request, key, value):
                looks.append(request)
                if len(looks) == 1:
                    here.tell("rank 1 breaks it")
                    here.ask("rank 2 sleeps")
            counts = not native and (request, key) == ("add", first.counter)
            if here.rank == 2 and (counts or (native and falls_asleep(first, request, key, value))):
                here.ask("rank 1 breaks it")
            if here.rank == 2 and waits_at(gate_of(first), request, key):
                here.tell("rank 2 sleeps")

        again = second_group(here, group, native, before)
        if here.rank == 0:
            here.ask("raised/1")
            here.ask("raised/2")
        if here.rank == 1:
            until_signed(again.store._store, [2])
        with pytest.raises(BarrierError) as caught:
            again.barrier(timeout=0.1 if here.rank == 1 else 20)
        here.tell(f"raised/{here.rank}")
        again.barrier()
        return str(caught.value), len(looks)


@BOTH_KINDS
def test_falling_asleep_does_not_keep_a_barrier_from_breaking(native):
    results = run_ranks(_sleep_before_break, 3, native)
    assert len({text for text, _ in results}) == 1
    assert "by rank 1 at" in results[0][0] and "missing: rank 0 of 3" in results[0][0]
    assert [looks for _, looks in results] == [0, 2 if native else 1, 0]


# Rank 1 is about to fall asleep or, with keys, to wait, but the barrier is decided just before:
# confirmed by rank 0, or broken by rank 2. With counters it does not wait; with keys, its first
# request to wait is its last.


def _decide_before_sleep(here, native, outcome):
    with here.group() as group:
        first, waits = keys_of(native), []

        def before(request, key=None, value=None, *_):
            waiting = waits_at(gate_of(first), request, key)
            sleeps = falls_asleep(first, request, key, value) if native else waiting
            if here.rank == 1 and sleeps and not waits:
                here.tell("rank 1 falls asleep")
                here.ask("decided")
            if here.rank == 1 and waiting:
                waits.append(key)
            if here.rank == 0 and waits_at(last_gate_of(first), request, key):
                here.tell("decided")

        again = second_group(here, group, native, before)
        if here.rank == 0 or (outcome == "broken" and here.rank == 2):
            here.ask("rank 1 falls asleep")
        if here.rank == 0 and outcome == "broken":
            here.ask("decided")
        if outcome == "confirmed":
            again.barrier()
        else:
            with pytest.raises(BarrierError, match="by rank 2 at"):
                again.barrier(timeout=0.1 if here.rank == 2 else 20)
            if here.rank == 2:
                here.tell("decided")
        again.barrier()
        return len(waits)


@BOTH_KINDS
@pytest.mark.parametrize("outcome", ["confirmed", "broken"])
def test_nobody_falls_asleep_after_the_decision(outcome, native):
    waits = 0 if native else 1
    assert run_ranks(_decide_before_sleep, 3, native, outcome) == [0, waits, 0]


# Departure. Every other rank returns while rank 1 is kept from leaving; rank 0 does not return
# before rank 1 has left.


def _rank_1_leaves_late(here, native):
    with here.group() as group:
        first = keys_of(native)

        def before(request, key=None, value=None, *_):
            if here.rank == 1 and request in ("wait", "barrier"):
                here.tell("rank 1 waits")
            if here.rank == 1 and leaves(first, request, key, value):
                here.ask("rank 2 has returned")
                here.ask("rank 3 has returned")
                here.tell("rank 1 leaves")

        again = second_group(here, group, native, before)
        if here.rank == 2:
            here.ask("rank 1 waits")  # the last to arrive must not be held up, or nobody confirms
        again.barrier()
        here.tell(f"rank {here.rank} has returned")
        return here.told("rank 1 leaves")


@BOTH_KINDS
def test_rank_0_leaves_last(native):
    assert run_ranks(_rank_1_leaves_late, 4, native)[0] is True


# Rank 1 is killed between its arrival and what says that it has left. Rank 2 returns. Rank 0: an
# error that says that the barrier completed and that rank 1 did not leave. The next barrier misses
# rank 1.


def _rank_1_dies(here, native):
    group = here.group()
    first = keys_of(native)

    def before(request, key=None, value=None, *_):
        if request in ("wait", "barrier"):
            here.tell(f"rank {here.rank} waits")
        if here.rank == 1 and leaves(first, request, key, value):
            os.kill(os.getpid(), signal.SIGKILL)

    again = second_group(here, group, native, before)
    if here.rank != 0:
        again.barrier(timeout=20)
        departure, seconds = None, None
    else:
        # the last to arrive must not die, or nobody confirms
        here.ask("rank 1 waits")
        here.ask("rank 2 waits")
        start = time.monotonic()
        with pytest.raises(BarrierError) as caught:
            again.barrier(timeout=0.5)
        departure, seconds = caught.value, time.monotonic() - start
        here.tell("rank 0 is back")
    here.ask("rank 0 is back")
    with pytest.raises(BarrierError) as caught:
        again.barrier(timeout=1)
    here.tell(f"done/{here.rank}")
    if here.rank == 0:
        here.ask("done/2")  # rank 0 hosts the store
    return departure, caught.value, seconds


@BOTH_KINDS
def test_a_rank_that_dies_before_departure(native):
    results = run_ranks(_rank_1_dies, 3, native, killed=[1])
    (departure, next_0, seconds), died, (_, next_2, _) = results
    assert died is None
    assert departure.completed and departure.phase == "departure"
    assert departure.missing == (1,) and departure.allowed == 0.5
    assert 0.45 < departure.elapsed <= seconds < 1 + SLACK
    assert re.match(
        r"barrier 0 completed, but in departure rank 0 waited in vain for rank 1 to leave: "
        rf"{departure.elapsed:.2f} of 0.5 s$",
        str(departure),
    )
    assert str(next_0) == str(next_2)
    assert next_0.missing == (1,) and next_0.phase == "arrival" and not next_0.completed


# Ranks 1 and 2 are killed there. The roll tells who did not leave: rank 4 is in the next barrier,
# and rank 3 has returned and is not.


def _two_die(here, native):
    group = here.group()
    first, second = keys_of(native), keys_of(native, 1)

    def before(request, key=None, value=None, *_):
        if request in ("wait", "barrier"):
            here.tell(f"rank {here.rank} waits")
        if here.rank in (1, 2) and leaves(first, request, key, value):
            os.kill(os.getpid(), signal.SIGKILL)
        if here.rank == 4 and key == second.counter:
            here.tell("rank 4 is in the next barrier")
        if here.rank == 0 and waits_at(last_gate_of(first), request, key):
            here.ask("rank 4 is in the next barrier")
            here.ask("rank 3 is back")

    again = second_group(here, group, native, before)
    text = None
    if here.rank == 0:
        for rank in range(1, 5):
            here.ask(f"rank {rank} waits")  # the last to arrive must not die, or nobody confirms
        with pytest.raises(BarrierError, match="completed, but in departure") as caught:
            again.barrier(timeout=0.5)
        text = str(caught.value)
        assert caught.value.missing == (1, 2) and caught.value.completed
        here.tell("rank 0 is back")
    else:
        again.barrier()
        here.tell(f"rank {here.rank} is back")
        if here.rank == 3:
            here.ask("rank 0 is back")
    with pytest.raises(BarrierError, match=r"missing: ranks 1 and 2 of 5") as caught:
        again.barrier(timeout=20 if here.rank == 4 else 1)
    here.tell(f"done/{here.rank}")
    if here.rank == 0:
        here.ask("done/3")
        here.ask("done/4")  # rank 0 hosts the store
    return text


@BOTH_KINDS
def test_two_ranks_that_die_before_departure(native):
    text = run_ranks(_two_die, 5, native, killed=[1, 2])[0]
    assert "waited in vain for ranks 1 and 2 to leave" in text


# Rank 1 is only slow to leave. Rank 0 raises and names it, and not rank 2, which has left and is
# in the next barrier. Then everyone passes that barrier, and nothing of the first stays.


def _rank_1_is_slow(here, native):
    with here.group() as group:
        first, second = keys_of(native), keys_of(native, 1)

        def before(request, key=None, value=None, *_):
            if request in ("wait", "barrier"):
                here.tell(f"rank {here.rank} waits")
            if here.rank == 1 and leaves(first, request, key, value):
                here.ask("rank 0 has raised")
            if here.rank == 2 and key == second.counter:
                here.tell("rank 2 is in the next barrier")
            if here.rank == 0 and waits_at(last_gate_of(first), request, key):
                here.ask("rank 2 is in the next barrier")

        # a slot is used again after three barriers, and each has its hooks in the first use only
        over = []
        again = second_group(
            here, group, native, lambda *request: None if over else before(*request)
        )
        if here.rank == 0:
            # the last to arrive must not be held up, or nobody confirms
            here.ask("rank 1 waits")
            here.ask("rank 2 waits")
            with pytest.raises(BarrierError, match="completed, but in departure") as caught:
                again.barrier(timeout=0.5)
            assert caught.value.completed and caught.value.missing == (1,)
            here.tell("rank 0 has raised")
        else:
            again.barrier()
        again.barrier()
        over.append(True)
        for _ in range(3):
            again.barrier()
        once = count_keys(here, again)
        for _ in range(3):
            again.barrier()
        return once == count_keys(here, again)


@BOTH_KINDS
def test_a_rank_that_leaves_slowly(native):
    assert run_ranks(_rank_1_is_slow, 3, native) == [True] * 3


# Each phase has its own timeout. Rank 0 arrives last and takes longer than the timeout to confirm;
# rank 1 leaves only when rank 0 waits for that. Both return.


def _slow_between_phases(here, native):
    with here.group() as group:
        first = keys_of(native)

        def before(request, key=None, value=None, *_):
            if here.rank == 0 and confirms(first, request, key, value):
                time.sleep(0.8)  # a slow process; nobody is waited for
            if here.rank == 0 and waits_at(last_gate_of(first), request, key):
                here.tell("rank 0 waits")
            if here.rank == 1 and request in ("wait", "barrier"):
                here.tell("rank 1 waits")
            if here.rank == 1 and leaves(first, request, key, value):
                here.ask("rank 0 waits")
                time.sleep(0.1)  # the same

        again = second_group(here, group, native, before)
        if here.rank == 0:
            here.ask("rank 1 waits")
        again.barrier(timeout=0.5 if here.rank == 0 else 20)
        return True


@BOTH_KINDS
def test_each_phase_has_its_own_timeout(native):
    assert run_ranks(_slow_between_phases, 2, native) == [True, True]


# The store holds as many keys after 1000 barriers as after 10.


def _count_keys(here, native):
    with kind_of_barrier(native), here.group() as group:
        counts = []
        for rounds in (10, 990):
            for _ in range(rounds):
                group.barrier()
            counts.append(count_keys(here, group))
        return counts


@BOTH_KINDS
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_barriers_leave_nothing_behind(world_size, native):
    for after_10, after_1000 in run_ranks(_count_keys, world_size, native):
        assert after_10 == after_1000


# Events: none unless asked for; then the three phases of each barrier, in order, on one clock.


def _record(here, native):
    with kind_of_barrier(native), here.group() as group:
        group.barrier()
        without = group.events
        group.events = []
        group.barrier()
        group.barrier()
        return without, group.events


@BOTH_KINDS
@pytest.mark.parametrize("world_size", [1, 4])
def test_events(world_size, native):
    results = run_ranks(_record, world_size, native)
    phases = ["arrival", "confirmation", "departure"]
    for rank, (without, events) in enumerate(results):
        assert without is None
        assert [event.phase for event in events] == phases * 2
        assert [event.generation for event in events] == [2] * 3 + [3] * 3
        assert {event.rank for event in events} == {rank}
        times = [time for event in events for time in (event.start, event.end)]
        assert times == sorted(times)
        assert all(event.seconds == event.end - event.start for event in events)
    for barrier in (0, 3):
        everyone = [events[barrier : barrier + 3] for _, events in results]
        last_start = max(arrival.start for arrival, _, _ in everyone)
        assert all(arrival.end >= last_start for arrival, _, _ in everyone)
        # rank 0 is there until the others have confirmed
        assert everyone[0][2].end >= max(confirmation.start for _, confirmation, _ in everyone)


@BOTH_KINDS
def test_a_broken_barrier_records_what_ended(native):
    group = StatelessProcessGroup(0, 2, *clients(1, native), events=[])
    with pytest.raises(BarrierError):
        group.barrier(timeout=0.1)
    assert [event.phase for event in group.events] == ["arrival", "confirmation"]


# A wait of several slices writes nothing to stderr; a wait of the store itself does.

LONG_WAIT = """
import sys
from datetime import timedelta
from refdist import *
store = create_tcp_store("127.0.0.1", 0, is_master=True)
group = StatelessProcessGroup(0, 2, store)
waits = [
    lambda: group.recv_obj(1, timeout=1.2),
    lambda: group.barrier(timeout=1.2),
    lambda: store.wait(["never"], timedelta(seconds=0.1)),
]
for wait in waits:
    try:
        wait()
    except RuntimeError as error:
        print(type(error).__name__, file=sys.stderr)
"""


def test_a_long_wait_is_quiet():
    finished = subprocess.run(
        [sys.executable, "-c", LONG_WAIT],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"},
        cwd=Path(__file__).parent.parent,
        timeout=60,
        check=True,
    )
    first, second, *loud, last = finished.stderr.splitlines()
    assert (first, second, last) == ("MessageTimeoutError", "BarrierError", "DistStoreError")
    assert "timeout" in " ".join(loud).lower()


# Requests to the store, counted. What each rank asks of it is one of few sequences.


class Requests:
    """The requests of one rank, in words: the name of the request, and the last part of the key."""

    def __init__(self):
        self.words = []

    def __call__(self, request, key=None, *_):
        key = key[0] if isinstance(key, list) else key
        self.words.append(f"{request} {key.split('/')[-1]}")

    def take(self):
        """All since the last time, where the slices of one wait are one request."""
        waits = ("barrier wake", "barrier left", "wait outcome", "wait all_left")
        words = [
            word
            for i, word in enumerate(self.words)
            if word not in waits or word not in self.words[i - 1 : i]
        ]
        self.words.clear()
        return words


def sequence_of(native, rank, world_size, secret):
    """All that a rank may ask of the store in a complete barrier that is not the first."""
    signs_off = "append roll, " if rank != 0 else ""
    if native:
        looks = "compare_set roll, " if secret else ""
        last = ", multi_set roll(, barrier left)?" if rank == 0 else "(, set left)?"
        return (
            "append roll, barrier counter, "
            "(add state, (compare_set roll, (barrier wake, add state, )?)?)?"
            f"{looks}{signs_off}add state(, set wake, add state)?{last}"
        )
    deletes = "".join(f"delete_key {field}, " for field in _deleted_by(rank, world_size))
    last = "wait" if rank == 0 else "set"
    return (
        "append roll, add counter, "
        "(wait outcome, compare_set outcome|compare_set roll, compare_set outcome, set outcome), "
        f"{deletes}{signs_off}add counter(, {last} all_left)?"
    )


def _deleted_by(rank, world_size):
    """The keys of an earlier barrier, without ``Store.barrier``, that a rank deletes."""
    return PlainKeys._fields[rank::world_size][::-1]


ROUNDS = 2


def _count_requests(rank, world_size, native, stores, asleep, sleepers, secret):
    requests = Requests()

    def before(request, key=None, *rest):
        if waits_at(gate_of(keys_of(native, number)), request, key):
            sleepers[number].release()
        requests(request, key, *rest)

    number = 0
    group = StatelessProcessGroup(rank, world_size, Watched(stores[rank], before))
    if secret:
        with_secret(group)
    group.barrier(60)
    taken = []
    for number in range(1, 1 + ROUNDS):
        if asleep and rank == world_size - 1:
            for _ in range(world_size - 1):
                assert sleepers[number].acquire(timeout=20)
        requests.take()
        group.barrier(60)
        taken.append(requests.take())
    return taken


def _requests(world_size, native, asleep, secret=False):
    """The requests of each rank, in each of several barriers."""
    sleepers = [threading.Semaphore(0) for _ in range(1 + ROUNDS)]
    arguments = world_size, native, clients(world_size, native), asleep, sleepers, secret
    barriers = list(zip(*run_threads(_count_requests, world_size, *arguments), strict=True))
    decides, lets_go = ("set wake", "set left") if native else ("set outcome", "set all_left")
    for everyone in barriers:
        for rank, words in enumerate(everyone):
            sequence = sequence_of(native, rank, world_size, secret)
            assert re.fullmatch(sequence, ", ".join(words)), (rank, words)
        # the first to know the outcome says it; with counters, only where someone sleeps
        assert sum(decides in words for words in everyone) in ((0, 1) if native else (1,))
        # the last to leave says it, and rank 0 waits for that unless it is the last
        letting_go = sum(lets_go in words for words in everyone)
        assert letting_go == ("left" in everyone[0][-1]) and lets_go not in everyone[0]
    return barriers


# Everyone comes at once. With counters nobody falls asleep, unless the machine is slow: 4 requests
# a rank, and 1 more with a secret, for the roll. 1 more for who leaves last. Rank 0 does not sign
# off, and resets keys in place of it; 1 more if it has to wait for the last to leave.
# With keys: 7 for the last to arrive, 6 for the others, also with a secret; 1 less for rank 0, as
# it does not sign off; 1 more for who leaves last, and for rank 0 if it has to wait for that. And
# 4, shared among all, to delete keys.


@BOTH_KINDS
@pytest.mark.parametrize("secret", [False, True], ids=["", "secret"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 64])
def test_requests(world_size, native, secret):
    for everyone in _requests(world_size, native, asleep=False, secret=secret):
        slow = native and any(words.count("add state") > 1 for words in everyone)
        for rank, words in enumerate(everyone):
            counted = 4 + secret if native else 6 + ("set outcome" in words) - (rank == 0)
            counted += sum(word in ("set left", "set all_left") for word in words)
            counted += sum(word in ("barrier left", "wait all_left") for word in words)
            counted += sum("delete_key" in word for word in words)
            assert slow or len(words) == counted
            assert len(words) <= 9 + secret or not native
        assert native or sum("delete_key" in word for words in everyone for word in words) == 4


# All but the last rank wait, with counters asleep, before that one comes. It wakes them.


@BOTH_KINDS
@pytest.mark.parametrize("world_size", [2, 16])
def test_requests_of_sleepers(world_size, native):
    for everyone in _requests(world_size, native, asleep=True):
        for rank, words in enumerate(everyone):
            last = rank == world_size - 1
            assert (("set wake" if native else "set outcome") in words) == last
            # those who sleep look at the roll before, and at the state when they are woken
            with_counters, with_keys = (6, 7) if last else (8, 6 - (rank == 0))
            expected = with_counters if native else with_keys
            expected += sum(word in ("set left", "set all_left") for word in words)
            expected += sum(word in ("barrier left", "wait all_left") for word in words)
            expected += 0 if native else len(_deleted_by(rank, world_size))
            assert len(words) == expected


# The docstring of ``refdist.barrier.plain`` says how many requests a rank waits for, besides those
# that delete keys. The others have no answer.


def _waited_for(words):
    unanswered = ("append", "set", "multi_set", "delete_key")
    return sum(word.split()[0] not in unanswered for word in words)


def test_the_docstring_says_how_many_requests():
    text = " ".join(plain.__doc__.split())
    pattern = (
        r"the ranks delete the (\d+) earlier keys as they leave\. Besides, a rank waits for (\d+) "
        r"requests, rank 0 for (\d+) unless it is the last to leave; and for one more in "
        r"each further second"
    )
    said = re.search(pattern, text)
    deletes, waiting, rank_0 = map(int, said.groups())
    for world_size in (2, 16):
        # all wait when the last comes, which is not rank 0
        for everyone in _requests(world_size, native=False, asleep=True):
            counted = [_waited_for(words) for words in everyone]
            assert counted[1:] == [waiting] * (world_size - 1)
            assert counted[0] == (rank_0 if "wait all_left" in everyone[0] else waiting)
            assert sum("delete_key" in word for words in everyone for word in words) == deletes


# A barrier that breaks. Rank 0 breaks it: it looks up the roll, and lets the others read why. Rank
# 1 only finds it broken, and a late rank 2 too. The barrier after it deletes the old keys.


def _count_broken(rank, stores, broken):
    requests = Requests()
    group = StatelessProcessGroup(rank, 3, Watched(stores[rank], requests))
    if rank == 0:
        until_signed(stores[3], [1])
    if rank == 2:
        assert broken.wait(20)
    with pytest.raises(BarrierError):
        group.barrier(timeout=0.1 if rank == 0 else 20)
    broken.set()
    words = ", ".join(requests.words)
    requests.words.clear()
    group.barrier()
    return words, requests.words


@BOTH_KINDS
def test_requests_of_a_broken_barrier(native):
    results = run_threads(_count_broken, 3, clients(4, native), threading.Event())
    if native:
        comes = "append roll, barrier counter"
        learns = "append roll, add state, wait reason, compare_set reason"
        # on a slow machine, it tries again, because rank 1 has fallen asleep; and if it has not
        # waited for quite as long as it shall, it falls asleep itself
        sleeps = "(, add state, compare_set roll(, barrier wake)+)?"
        breaks = "compare_set roll(, add state, compare_set state){1,2}, set reason, multi_set wake"
        it_learns = learns.removeprefix("append roll, ")  # rank 0 does not sign off
        assert re.fullmatch(f"{comes}{sleeps}, {breaks}, {it_learns}", results[0][0])
        sleeps = "(, add state(, compare_set roll(, barrier wake)+, add state)?)?"
        assert re.fullmatch(f"{comes}{sleeps}, {learns}", results[1][0]), results[1][0]
    else:
        comes = "append roll, add counter"
        # it looks for the outcome once more when its time is up
        waits = "(, wait outcome)+(, (check|compare_set) outcome){1,2}"
        breaks = "compare_set roll, compare_set outcome, set outcome"
        learns = "compare_set roll, compare_set outcome"
        assert re.fullmatch(f"{comes}{waits}, {breaks}", results[0][0]), results[0][0]
        assert re.fullmatch(f"{comes}(, wait outcome)+, compare_set outcome", results[1][0])
    # it comes late, and looks whether the others have gone on
    assert results[2][0] == f"{comes}, {learns}, compare_set roll"
    deleted = [[word for word in words if "delete_key" in word] for _, words in results]
    # with counters, rank 0 deletes all keys of three slots, and the reason
    assert [len(words) for words in deleted] == ([16, 0, 0] if native else [2, 1, 1])


# A rank that waits asks the store once a second.


@BOTH_KINDS
def test_requests_of_a_long_wait(native):
    requests = Requests()
    group = StatelessProcessGroup(0, 2, Watched(clients(1, native)[0], requests))
    with pytest.raises(BarrierError) as caught:
        group.barrier(timeout=2.5)
    assert caught.value.elapsed >= 2.45
    # then it looks once more whether all have come
    if native:
        sequence = (
            "append roll, barrier counter, add state, compare_set roll(, barrier wake){2,3}, "
            "compare_set roll, add state, compare_set state, set reason, multi_set wake, "
            "add state, wait reason, compare_set reason"
        )
    else:
        sequence = (
            "append roll, add counter(, wait outcome){3,4}(, (check|compare_set) outcome){1,2}, "
            "compare_set roll, compare_set outcome, set outcome"
        )
    # the store may end a wait a little too early, so there may be one more
    assert re.fullmatch(sequence, ", ".join(requests.words)), requests.words


# The same when many wait, of which rank 0 is the last and, in realign, looks for an outcome before.
# None of them makes another one ask again.


def _wait_among_many(rank, world_size, stores, call, waiting):
    requests = Requests()

    def before(request, *rest):
        requests(request, *rest)
        if request in ("wait", "barrier"):
            waiting[rank].set()

    group = StatelessProcessGroup(rank, world_size + 1, Watched(stores[rank], before))
    if rank == 0:
        assert all(event.wait(20) for event in waiting[1:])
        time.sleep(0.2)  # what a rank says comes just before its request
    with pytest.raises(BarrierError, match="by rank 0 at"):
        getattr(group, call if rank == 0 else "barrier")(timeout=2.5 if rank == 0 else 20)
    return len(requests.words)


@BOTH_KINDS
@pytest.mark.parametrize("call", ["barrier", "realign"])
def test_requests_of_many_that_wait_long(call, native):
    world_size = 16
    waiting = [threading.Event() for _ in range(world_size)]
    counts = run_threads(
        _wait_among_many, world_size, world_size, clients(world_size, native), call, waiting
    )
    assert max(counts) <= 17


# Many barriers with random timeouts. In each one some rank is late by a random time, often by just
# about another one's timeout. Of each barrier, all return or all raise the same. Rank 0 may besides
# learn that someone was slow to leave. After that a barrier completes, and the keys are as before.


def _stress(rank, seed, world_size, stores, checkpoint):
    group = StatelessProcessGroup(rank, world_size, stores[rank])
    plans = random.Random(seed)

    def count():
        for _ in range(5):
            group.barrier(60)
        checkpoint.wait(40)
        number = group.store.num_keys() - there_by_chance(group)
        checkpoint.wait(40)
        return number

    before, outcomes = count(), []
    for number in range(40):
        # every rank draws the plan of all of them
        seconds = 1.1 if number % 20 == 10 else plans.choice([0.0, 0.02, 0.1])
        timeouts = [seconds + plans.choice([0.001, 0.01, 0.2]) for _ in range(world_size)]
        timeouts[plans.randrange(world_size)] = seconds + 5
        delays = [0.0] * world_size
        late = plans.sample(range(world_size), plans.choice([0, 1, 1, 2]))
        for one in late:
            delays[one] = max(0.0, seconds + plans.uniform(-0.01, 0.01))
        time.sleep(delays[rank])  # this rank is slow
        try:
            group.barrier(timeouts[rank])
            outcomes.append(None)
        except BarrierError as error:
            outcomes.append(None if error.completed else str(error))
    return before, outcomes, count()


@BOTH_KINDS
def test_random_delays_and_timeouts(native):
    world_size, seed = 6, 1
    checkpoint = threading.Barrier(world_size)
    results = run_threads(
        _stress, world_size, seed, world_size, clients(world_size, native), checkpoint
    )
    assert len({number for before, _, after in results for number in (before, after)}) == 1
    barriers = list(zip(*[outcomes for _, outcomes, _ in results], strict=True))
    assert [len(set(outcomes)) for outcomes in barriers] == [1] * 40
    # some of each kind, or the test tests little
    assert {outcomes[0] is None for outcomes in barriers} == {True, False}


# Bad input and a store that someone else writes to.


@pytest.mark.parametrize("timeout", [-1, float("inf"), float("nan")])
def test_bad_timeout(timeout):
    group = StatelessProcessGroup(0, 1, HashStore())
    with pytest.raises(ValueError, match=f"timeout={timeout}: must be finite seconds, at least 0"):
        group.barrier(timeout=timeout)
    group.barrier()


# A timeout of 0: the last rank still passes, and the others raise at once.
@BOTH_KINDS
def test_no_timeout_at_all(native):
    alone = StatelessProcessGroup(0, 1, *clients(1, native))
    alone.barrier(timeout=0)
    start = time.monotonic()
    with pytest.raises(BarrierError, match=r"of 0 s, .*; missing: rank 1 of 2"):
        StatelessProcessGroup(0, 2, *clients(1, native)).barrier(timeout=0)
    assert time.monotonic() - start < SLACK


# The state of quick's barrier counts so many ranks, and no more. More ranks take the other kind.


@ONLY_COUNTERS
def test_many_ranks(native):
    (store,) = clients(1, native)
    assert type(barrier_of(store, 0, COUNT)) is quick.Barrier
    assert type(barrier_of(store, 0, COUNT + 1)) is plain.Barrier
    # each of them may leave, fall asleep, and break it
    assert COUNT < WOKEN < ASLEEP and ASLEEP * (COUNT + 1) < 1 << 60
    for world_size in (16384, 16385, COUNT, COUNT + 1):
        group = StatelessProcessGroup(0, world_size, clients(1, native)[0])
        with pytest.raises(BarrierError, match="missing") as caught:
            group.barrier(timeout=0)
        assert len(caught.value.missing) == world_size - 1


# What no rank of refdist writes where ranks look for why a barrier broke.

BROKEN_BY_1 = str((1 << 40) - (1 << 62))


def _raise_the_reason(native, garbage, match):
    (store,) = clients(1, native)
    group = StatelessProcessGroup(0, 2, store)
    if native:
        store.set(keys_of(native).state, BROKEN_BY_1)
        store.set(reason(0), garbage)
    else:
        store.set(keys_of(native).outcome, garbage)
    with pytest.raises(BarrierError, match=match):
        group.barrier(timeout=1)


@BOTH_KINDS
@pytest.mark.parametrize("garbage", ["nonsense", "{}", '{"by": 1}', "[1]", "\x01"])
def test_a_reason_that_no_rank_wrote(garbage, native):
    _raise_the_reason(native, garbage, "broken for a reason that no rank of refdist writes")


# It looks like what a rank itself makes of a wrong tag, but is no text.
@BOTH_KINDS
def test_a_reason_that_is_no_text(native):
    _raise_the_reason(native, b"untrusted: \xff", "barrier 0 was broken")


# The rank that broke the barrier died before it wrote why.
@ONLY_COUNTERS
def test_no_reason_at_all(native):
    (store,) = clients(1, native)
    group = StatelessProcessGroup(0, 2, store)
    store.set(keys_of(native).state, BROKEN_BY_1)
    with pytest.raises(BarrierError, match="barrier 0 was broken by a rank that died before"):
        group.barrier(timeout=1)


# More ranks have left than there are, or more sleep.
@ONLY_COUNTERS
@pytest.mark.parametrize("secret", [False, True], ids=["", "secret"])
@pytest.mark.parametrize("state", [7, 3 * ASLEEP])
def test_a_state_that_no_rank_wrote(state, secret, native):
    (store,) = clients(1, native)
    group = StatelessProcessGroup(0, 2, store)
    if secret:
        with_secret(group)
    store.set(keys_of(native).state, str(state))
    store.set(keys_of(native).counter, "2")
    with pytest.raises(BarrierError, match="rank 1") as caught:
        group.barrier(timeout=1)
    assert not secret or not caught.value.completed


# A stranger lets rank 0 go, which waits, before there is an outcome; with keys, what it writes is
# none. Nobody passes alone: the barrier breaks, for rank 1 too, who comes later, and the next one
# works. With keys, a stranger counts more ranks than there are: the same.


def _meddled_with(rank, native, stores, stranger, key, value, asleep, broken):
    gate = gate_of(keys_of(native))

    def before(request, requested=None, *_):
        if waits_at(gate, request, requested):
            asleep.set()

    group = StatelessProcessGroup(rank, 2, Watched(stores[rank], before))
    if rank == 1:
        if key == gate:
            assert asleep.wait(20)
            stranger.set(key, value)
        assert broken.wait(20)
    elif key != gate:
        stranger.set(key, value)
        assert stranger.get(key) == value.encode()
    start = time.monotonic()
    with pytest.raises(BarrierError) as caught:
        group.barrier(timeout=20)
    seconds = time.monotonic() - start
    broken.set()
    group.barrier(timeout=20)
    return str(caught.value), seconds


def _meddle(native, key, value):
    stores = clients(3, native)
    events = threading.Event(), threading.Event()
    found = run_threads(_meddled_with, 2, native, stores, stores[2], key, value, *events)
    assert found[0][0] == found[1][0]
    assert max(seconds for _, seconds in found) < SLACK
    return found[0][0]


@pytest.mark.parametrize("value", [str(OPEN), "garbage"])
def test_an_outcome_that_no_rank_proposed(value):
    found = _meddle(False, keys_of(False).outcome, value)
    assert f"broken for a reason that no rank of refdist writes: {value.encode()!r}" in found


@ONLY_COUNTERS
def test_a_gate_that_no_rank_opened(native):
    found = _meddle(native, keys_of(native).wake, str(OPEN))
    assert "by rank 0 at" in found and "missing: rank 1 of 2" in found
    # that is the reason, and not a timeout
    assert "because its wait ended before all had arrived" in found


def test_a_count_that_is_too_high():
    found = _meddle(False, keys_of(False).counter, "9")
    assert "by rank 0 at" in found
    assert "because its wait ended before all had arrived; missing: rank 1 of 2" in found
