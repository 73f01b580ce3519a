"""The barrier: who waits for whom, and what everyone sees when a rank is missing, late or dies."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ranks import LOCAL, Watched, interrupt, run_ranks, run_threads
from torch.distributed import HashStore, PrefixStore

from refdist import (
    BarrierError,
    GroupCreationError,
    StatelessProcessGroup,
    create_tcp_store,
    keys,
)

SLACK = 6.0  # seconds that a slow machine may take beyond a protocol's own deadline


# Everyone returns, and nobody before everyone has called.


def _count_arrivals(here, rounds):
    seen = []
    with here.group() as group:
        for number in range(rounds):
            here.board.add(f"arrivals/{number}", 1)
            group.barrier()
            seen.append(here.board.add(f"arrivals/{number}", 0))
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nobody_returns_before_all_have_arrived(world_size):
    assert run_ranks(_count_arrivals, world_size, 50) == [[world_size] * 50] * world_size


# One rank is late: it calls when every other one waits already. They return after it has called.


def _one_is_late(here, late):
    with here.group() as group:

        def before(request, *_):
            if request == "wait":
                here.tell(f"waiting/{here.rank}")

        watched = here.watched_group(group, before)
        if here.rank == late:
            for rank in set(range(here.world_size)) - {late}:
                here.ask(f"waiting/{rank}")
            here.tell("the late one calls")
        watched.barrier()
        return here.told("the late one calls")


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_everyone_waits_for_the_late_one(world_size, late):
    assert run_ranks(_one_is_late, world_size, late) == [True] * world_size


# A rank is missing. The others: one and the same BarrierError in time, whatever the timeout of the
# store. The rank comes late: the same error at once. Then everyone passes the next barrier, and the
# store holds what it held after the barrier before.


def _one_is_missing(here, missing, rounds):
    seen = []
    with here.group(store_timeout=300) as group:
        group.barrier()
        keys_before = here.count_keys(group)
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
        here.meet("after")
        return seen, keys_before, here.count_keys(group)


def _check_missing(results, generation):
    for round_number, everyone in enumerate(zip(*[seen for seen, _, _ in results], strict=True)):
        assert len({str(error) for _, error, _ in everyone}) == 1
        for rank, (absent, error, seconds) in enumerate(everyone):
            assert error.phase == "arrival" and f"barrier {error.generation} was" in str(error)
            assert error.generation == generation + round_number
            assert error.missing == (absent,) and f"missing: rank {absent} of" in str(error)
            assert error.allowed == 1 and "of 1 s" in str(error)
            assert 0.9 < error.elapsed < 1 + SLACK and f"{error.elapsed:.2f} of" in str(error)
            assert error.broken_by != absent and f"by rank {error.broken_by} at" in str(error)
            assert not error.completed
            assert seconds < (SLACK if rank == absent else 1 + SLACK)
    for _, keys_before, keys_after in results:
        assert keys_after == keys_before


@pytest.mark.parametrize(("world_size", "missing"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_a_missing_rank(world_size, missing):
    _check_missing(run_ranks(_one_is_missing, world_size, missing, 1), generation=2)


# The same, each rank in turn.
def test_repeated_failures():
    _check_missing(run_ranks(_one_is_missing, 4, 0, 4), generation=2)


def test_several_missing_ranks():
    results = run_ranks(_only_0_and_2_come, 4)
    assert results[0].missing == results[2].missing == (1, 3)
    assert "missing: ranks 1 and 3 of 4" in str(results[0])


def _only_0_and_2_come(here):
    with here.group() as group:
        if here.rank in (0, 2):
            with pytest.raises(BarrierError) as caught:
                group.barrier(timeout=1)
            return caught.value


# The last arrival meets a timeout: either everyone returns or everyone raises.
#
# Rank 1's time is up, and it is about to break the barrier when rank 0 completes it: both return.


def _complete_before_break(here):
    with here.group() as group:

        def before(request, *arguments):
            if here.rank == 1 and request == "compare_set" and not here.told("rank 1 gives up"):
                here.tell("rank 1 gives up")
                here.ask("rank 0 has decided")
            if here.rank == 0 and request == "wait":
                here.tell("rank 0 has decided")

        watched = here.watched_group(group, before)
        if here.rank == 0:
            here.ask("rank 1 gives up")
            watched.barrier(timeout=20)
        else:
            watched.barrier(timeout=0.1)
        watched.barrier(timeout=20)
        return here.told("rank 1 gives up")


def test_a_barrier_that_is_complete_cannot_be_broken():
    assert run_ranks(_complete_before_break, 2) == [True, True]


# Rank 0 has arrived last, but rank 1 breaks the barrier before rank 0 says so: both raise.


def _break_before_complete(here):
    with here.group() as group:

        def before(request, key=None, *_):
            if here.rank == 1 and request == "compare_set" and not here.told("broken"):
                here.tell("rank 1 waits no more")
                here.ask("rank 0 is the last")
            if here.rank == 0 and request == "compare_set" and key == keys.outcome(0):
                here.tell("rank 0 is the last")
                here.ask("broken")

        watched = here.watched_group(group, before)
        if here.rank == 0:
            here.ask("rank 1 waits no more")
        with pytest.raises(BarrierError) as caught:
            watched.barrier(timeout=20 if here.rank == 0 else 0.1)
        here.tell("broken")
        watched.barrier(timeout=20)
        return caught.value


def test_a_barrier_that_is_broken_cannot_be_completed():
    errors = run_ranks(_break_before_complete, 2)
    assert str(errors[0]) == str(errors[1])
    assert [(e.broken_by, e.missing, e.phase) for e in errors] == [(1, (), "arrival")] * 2


# Departure. Every other rank returns while rank 1 is kept from leaving; rank 0 does not return
# before rank 1 has left.


def _rank_1_leaves_late(here):
    with here.group() as group:

        def before(request, key=None, *_):
            if here.rank == 1 and request == "add" and key == keys.departed(0):
                here.ask("rank 2 has returned")
                here.ask("rank 3 has returned")
                here.tell("rank 1 leaves")

        watched = here.watched_group(group, before)
        watched.barrier()
        here.tell(f"rank {here.rank} has returned")
        return here.told("rank 1 leaves")


def test_rank_0_leaves_last():
    assert run_ranks(_rank_1_leaves_late, 4)[0] is True


# Rank 1 is killed between the outcome and its departure. Rank 2 returns. Rank 0: an error that says
# that the barrier completed and that rank 1 did not leave. The next barrier misses rank 1.


def _rank_1_dies(here):
    group = here.group()

    def before(request, key=None, *_):
        if here.rank == 1 and request == "add" and key == keys.departed(0):
            os.kill(os.getpid(), signal.SIGKILL)

    watched = here.watched_group(group, before)
    if here.rank != 0:
        watched.barrier(timeout=20)
        departure, seconds = None, None
    else:
        start = time.monotonic()
        with pytest.raises(BarrierError) as caught:
            watched.barrier(timeout=1)
        departure, seconds = caught.value, time.monotonic() - start
        here.tell("rank 0 is back")
    here.ask("rank 0 is back")
    with pytest.raises(BarrierError) as caught:
        watched.barrier(timeout=1)
    here.tell(f"done/{here.rank}")
    if here.rank == 0:
        here.ask("done/2")  # rank 0 hosts the store
    return departure, caught.value, seconds


def test_a_rank_that_dies_before_departure():
    (departure, next_0, seconds), died, (_, next_2, _) = run_ranks(_rank_1_dies, 3, killed=[1])
    assert died is None
    assert departure.completed and departure.phase == "departure"
    assert departure.missing == (1,) and departure.allowed == 1
    assert 0.9 < departure.elapsed <= seconds < 2 + SLACK
    assert re.match(
        r"barrier 0 completed, but in departure rank 0 waited in vain for rank 1 to leave: "
        rf"{departure.elapsed:.2f} of 1 s$",
        str(departure),
    )
    assert str(next_0) == str(next_2)
    assert next_0.missing == (1,) and next_0.phase == "arrival" and not next_0.completed


# Rank 1 is only slow to leave. Rank 0 raises and names it, and not rank 2, which has left and is
# in the next barrier. Then everyone passes that barrier, and nothing of the first stays.


def _rank_1_is_slow(here):
    with here.group() as group:

        def before(request, key=None, *_):
            slow = here.rank == 1 and not here.told("rank 0 has raised")
            if slow and request == "add" and key == keys.departed(0):
                here.ask("rank 0 has raised")
            if request == "wait" and key == [keys.outcome(1)]:
                here.tell("rank 2 is in the next barrier")
            if request == "wait" and key == [keys.all_left(0)]:
                here.ask("rank 2 is in the next barrier")

        watched = here.watched_group(group, before)
        if here.rank == 0:
            with pytest.raises(BarrierError, match="completed, but in departure") as caught:
                watched.barrier(timeout=1)
            assert caught.value.completed and caught.value.missing == (1,)
            here.tell("rank 0 has raised")
        else:
            watched.barrier()
        watched.barrier()
        once = here.count_keys(group)
        watched.barrier()
        return once == here.count_keys(group)


def test_a_rank_that_leaves_slowly():
    assert run_ranks(_rank_1_is_slow, 3) == [True] * 3


# Each phase has its own timeout. Rank 0 arrives last and takes longer than the timeout to say so;
# rank 1 leaves only when rank 0 waits for that. Both return.


def _slow_between_phases(here):
    with here.group() as group:

        def before(request, key=None, *_):
            if here.rank == 0 and request == "compare_set" and key == keys.outcome(0):
                time.sleep(1.5)  # a slow process; nobody is waited for
            if here.rank == 0 and request == "wait" and key == [keys.all_left(0)]:
                here.tell("rank 0 waits")
            if here.rank == 1 and request == "add" and key == keys.departed(0):
                here.ask("rank 0 waits")
                time.sleep(0.2)  # the same

        watched = here.watched_group(group, before)
        if here.rank == 0:
            group.recv_obj(1)
            watched.barrier(timeout=1)
        else:
            group.send_obj("rank 1 calls", 0)
            watched.barrier(timeout=20)
        return True


def test_each_phase_has_its_own_timeout():
    assert run_ranks(_slow_between_phases, 2) == [True, True]


# The store holds as many keys after 1000 barriers as after 10.


def _count_keys(here):
    with here.group() as group:
        counts = []
        for rounds in (10, 990):
            for _ in range(rounds):
                group.barrier()
            counts.append(here.count_keys(group))
        return counts


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_barriers_leave_nothing_behind(world_size):
    for after_10, after_1000 in run_ranks(_count_keys, world_size):
        assert after_10 == after_1000


# Events: none unless asked for; then the three phases of each barrier, in order, on one clock.


def _record(here):
    with here.group() as group:
        group.barrier()
        without = group.events
        group.events = []
        group.barrier()
        group.barrier()
        return without, group.events


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_events(world_size):
    results = run_ranks(_record, world_size)
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
        # rank 0 is there until the others have begun to leave
        assert everyone[0][2].end >= max(departure.start for _, _, departure in everyone)


def test_a_broken_barrier_records_what_ended():
    group = StatelessProcessGroup(0, 2, HashStore(), events=[])
    with pytest.raises(BarrierError):
        group.barrier(timeout=0.1)
    assert [event.phase for event in group.events] == ["arrival", "confirmation"]


# SIGINT to a rank that waits: KeyboardInterrupt within about a second, and the group still works.
# Rank 0 waits; rank 1 interrupts it when it has begun to.


def _interrupt_rank_0(here, wait, then):
    with here.group() as group:
        if here.rank == 0:

            def before(request, *_):
                if request == "wait":
                    here.tell("rank 0 waits")

            watched = here.watched_group(group, before)
            here.tell("process", os.getpid())
            with pytest.raises(KeyboardInterrupt):
                WAITS[wait](watched)
            end = time.monotonic()
        else:
            watched = here.watched_group(group, lambda *_: None)
            here.ask("rank 0 waits")
            here.tell("interrupted", interrupt(here.ask("process")))
        here.meet("interrupted")
        result = THEN[then](watched)
        watched.barrier()
        if here.rank == 0:
            return result, end - here.ask("interrupted")
        return result


WAITS = {
    "barrier": lambda group: group.barrier(timeout=60),
    "recv_obj": lambda group: group.recv_obj(1),
    "broadcast_obj": lambda group: group.broadcast_obj(None, 1),
    "all_gather_obj": lambda group: group.all_gather_obj(0),
}


def _broken_by_the_interrupt(group):
    if group.rank == 1:
        with pytest.raises(BarrierError, match=r"by rank 0 at .* because of KeyboardInterrupt"):
            group.barrier()


def _message(group):
    return group.recv_obj(1) if group.rank == 0 else group.send_obj("sent later", 0)


def _gathers(group):
    # rank 1 was not interrupted, and still has to pass the gather that rank 0 left
    if group.rank == 1:
        assert group.all_gather_obj(1) == [0, 1]
    return group.all_gather_obj(("next", group.rank))


THEN = {
    "barrier": _broken_by_the_interrupt,
    "recv_obj": _message,
    "broadcast_obj": lambda group: group.broadcast_obj("sent later", 1),
    "all_gather_obj": _gathers,
}


@pytest.mark.parametrize("name", list(WAITS))
def test_sigint_ends_a_wait(name):
    (result, seconds), _ = run_ranks(_interrupt_rank_0, 2, name, name)
    assert seconds < 1 + SLACK
    expected = {
        "barrier": None,
        "recv_obj": "sent later",
        "broadcast_obj": "sent later",
        "all_gather_obj": [("next", 0), ("next", 1)],
    }
    assert result == expected[name]


# Rank 2 does not come, but interrupts rank 1, which waits for it. Rank 0: GroupCreationError at
# once, naming rank 1's interrupt. Then all form the group on the same port.


def _interrupt_creation(here):
    with here.place("group") as (port, listener):
        here.tell(f"process/{here.rank}", os.getpid())
        options = {"store_timeout": 60, "listen_socket": listener}
        start = time.monotonic()
        seconds = None
        if here.rank == 0:
            with pytest.raises(GroupCreationError, match=r"by rank 1 .* of KeyboardInterrupt"):
                StatelessProcessGroup.create(LOCAL, port, 0, 3, **options)
            assert time.monotonic() - start < 1 + 2 * SLACK
        elif here.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                StatelessProcessGroup.create(LOCAL, port, 1, 3, **options)
            seconds = time.monotonic() - here.ask("interrupted")
        else:
            store = create_tcp_store(LOCAL, port)
            for rank in (0, 1):
                store.get(keys.roll(rank))
            here.tell("interrupted", interrupt(here.ask("process/1")))
            del store
        here.meet("second attempt")
        with StatelessProcessGroup.create(LOCAL, port, here.rank, 3, **options) as group:
            return group.all_gather_obj(here.rank), seconds


def test_sigint_ends_a_creation():
    results = run_ranks(_interrupt_creation, 3)
    assert [gathered for gathered, _ in results] == [[0, 1, 2]] * 3
    assert results[1][1] < 1 + SLACK


# A wait of several slices writes nothing to stderr; a wait of the store itself does.

LONG_WAIT = """
import sys
from datetime import timedelta
from refdist import *
alone = StatelessProcessGroup.create("127.0.0.1", 0, 0, 1)
group = StatelessProcessGroup(0, 2, alone.store)
if sys.argv[1] == "refdist":
    for wait in (lambda: group.recv_obj(1, timeout=1.5), lambda: group.barrier(timeout=1.5)):
        try:
            wait()
        except RuntimeError as error:
            print(type(error).__name__)
else:
    try:
        alone.store.wait(["never"], timedelta(seconds=0.1))
    except RuntimeError as error:
        print(type(error).__name__)
"""


def _run_long_wait(who):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-c", LONG_WAIT, who],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=Path(__file__).parent.parent,
        check=True,
    )


def test_a_long_wait_is_quiet():
    quiet = _run_long_wait("refdist")
    assert quiet.stdout.split() == ["MessageTimeoutError", "BarrierError"]
    assert quiet.stderr == ""
    loud = _run_long_wait("torch")
    assert loud.stdout.split() == ["DistStoreError"]
    assert "timeout" in loud.stderr.lower()


# Requests to the store, counted: at most 9 a rank in a barrier, as refdist/barrier.py says, for
# any number of ranks.


def _count_requests(rank, world_size, stores):
    counts = Counter()
    waits = set()

    def before(request, *arguments):
        # the slices of a long wait are one
        if request == "wait":
            request = f"wait {arguments[0]}"
            if request in waits:
                return
            waits.add(request)
        counts[request] += 1

    group = StatelessProcessGroup(rank, world_size, Watched(stores[rank], before))
    group.barrier(60)
    counts.clear()
    group.barrier(60)
    return counts.total()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_requests_of_a_rank(world_size, kind):
    if kind == "hash":
        stores = [HashStore()] * world_size
    else:
        server = create_tcp_store(LOCAL, 0, is_master=True)
        clients = [create_tcp_store(LOCAL, server.port) for _ in range(1, world_size)]
        stores = [PrefixStore("group", store) for store in (server, *clients)]
    counts = run_threads(_count_requests, world_size, world_size, stores)
    assert max(counts) == (6 if world_size == 1 else 9)
    assert sum(counts) == (6 if world_size == 1 else 6 * world_size + 4)


def test_the_docstring_says_how_many_requests():
    import refdist.barrier

    assert "Requests to the store: at most 9 a rank" in refdist.barrier.__doc__


# Bad input and a store that someone else writes to.


@pytest.mark.parametrize("timeout", [-1, float("inf"), float("nan")])
def test_bad_timeout(timeout):
    group = StatelessProcessGroup(0, 1, HashStore())
    with pytest.raises(ValueError, match=f"timeout={timeout}: must be finite seconds, at least 0"):
        group.barrier(timeout=timeout)
    group.barrier()


@pytest.mark.parametrize("garbage", ["nonsense", "{}", '{"by": 1}', "[1]", "\x00"])
def test_an_outcome_that_no_rank_wrote(garbage):
    store = HashStore()
    group = StatelessProcessGroup(0, 2, store)
    store.set(keys.outcome(0), garbage)
    with pytest.raises(BarrierError, match="barrier 0 has an outcome that no rank of refdist"):
        group.barrier(timeout=1)
