"""The checks of notebook 01: right answers pass, and the obvious wrong ones fail."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from refdist import BarrierError, PhaseEvent, StatelessProcessGroup, create_tcp_store
from refdist.lab.costs import barrier_costs
from refdist.lab.exercises import UnsolvedError
from refdist.lab.exercises.phases import (
    check_numbered_door,
    check_read_timeline,
    check_requests,
    check_seconds_lost,
)
from refdist.lab.requests import LoggedStore, log_requests, wait_until_inside

DEADLINE = 20.0
pytestmark = pytest.mark.xdist_group("phases")


def stub(*_):
    raise NotImplementedError


def refuses(check, *answers, match):
    with pytest.raises(UnsolvedError, match=match):
        check(*answers)


def last_to_arrive(store, world_size, number):
    return store.add(f"count/{number}", 1) == world_size


# 1.1. The last rank to arrive deletes the keys of the use before.


def door(store, rank, world_size, number):
    if last_to_arrive(store, world_size, number):
        if number > 0:
            store.delete_key(f"count/{number - 1}")
            store.delete_key(f"door/{number - 1}")
        store.set(f"door/{number}", "open")
    else:
        store.wait([f"door/{number}"])


# One count for all uses.
def one_count(store, rank, world_size, number):
    if store.add("count", 1) == world_size * (number + 1):
        store.set(f"door/{number}", "open")
        if number:
            store.delete_key(f"door/{number - 1}")
    else:
        store.wait([f"door/{number}"])


@pytest.mark.parametrize("answer", [door, one_count])
def test_a_barrier_with_numbered_doors_passes(answer, capsys):
    check_numbered_door(answer)
    assert "Exercise 1.1 a door for each use: solved." in capsys.readouterr().out


def polls(store, rank, world_size, number):
    count = store.add(f"count/{number}", 1)
    while count < world_size:
        count = store.add(f"count/{number}", 0)


def test_an_answer_that_asks_again_and_again_is_refused_soon():
    with pytest.raises(UnsolvedError, match="asks the store again and again"):
        check_numbered_door(polls)


def one_door(store, rank, world_size, number):
    if store.add("count", 1) == world_size:
        store.set("door", "open")
    else:
        store.wait(["door"])


def waits_for_nobody(store, rank, world_size, number):
    store.add(f"count/{number}", 1)


def opens_too_early(store, rank, world_size, number):
    if store.add(f"count/{number}", 1) == max(1, world_size - 1):
        store.set(f"door/{number}", "open")
    store.wait([f"door/{number}"])


def for_two_ranks_only(store, rank, world_size, number):
    door(store, rank, 2 if world_size == 3 else world_size, number)


def never_opens(store, rank, world_size, number):
    if store.add("count", 1) == world_size:
        store.set(f"door/{number}", "open")
    store.wait([f"door/{number}"])


def everyone_waits(store, rank, world_size, number):
    if last_to_arrive(store, world_size, number):
        store.set(f"door/{number}", "open")
        if number > 0:
            store.delete_key(f"count/{number - 1}")
            store.delete_key(f"door/{number - 1}")
    store.wait([f"door/{number}"])
    store.check([f"door/{number}"])


def leaves_keys(store, rank, world_size, number):
    if last_to_arrive(store, world_size, number):
        store.set(f"door/{number}", "open")
    else:
        store.wait([f"door/{number}"])


# A slow rank may still wait for that door.
def deletes_at_once(store, rank, world_size, number):
    if last_to_arrive(store, world_size, number):
        store.set(f"door/{number}", "open")
        store.delete_key(f"count/{number}")
    else:
        store.wait([f"door/{number}"])
        store.delete_key(f"door/{number}")


def first_to_arrive_deletes(store, rank, world_size, number):
    arrived = store.add(f"count/{number}", 1)
    if arrived == 1 and number > 0:
        store.delete_key(f"count/{number - 1}")
        store.delete_key(f"door/{number - 1}")
    if arrived == world_size:
        store.set(f"door/{number}", "open")
    else:
        store.wait([f"door/{number}"])


def asks_each(store, rank, world_size, number):
    store.set(f"{number}/{rank}", "")
    for other in range(world_size):
        store.wait([f"{number}/{other}"])


def of_torch(store, rank, world_size, number):
    store.get(f"door/{number}") if number < 0 else door(store, rank, world_size, number)
    store.num_keys()


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (stub, "not written yet"),
        (one_door, "before every rank has entered it"),
        (waits_for_nobody, "before every rank has entered it"),
        (opens_too_early, "before every rank has entered it"),
        (for_two_ranks_only, "3 ranks and 2 uses.*before every rank"),
        (never_opens, "waits for ever|no rank waits, without a timeout"),
        (deletes_at_once, "no rank waits, without a timeout"),
        (first_to_arrive_deletes, "no rank waits, without a timeout"),
        (everyone_waits, "at most 120 are allowed, 6 a use"),
        (leaves_keys, "left 40 keys in the store, at most 4"),
        (asks_each, "at most"),
        (of_torch, "asked the store for num_keys"),
    ],
)
def test_other_barriers_are_refused(answer, match):
    refuses(check_numbered_door, answer, match=match)


# 1.2


MEASURED = [PhaseEvent(rank, 5, "arrival", 7 + 0.2 * rank, 7.7) for rank in range(4)]
MEASURED += [PhaseEvent(rank, 5, "confirmation", 7.7, 7.8) for rank in range(4)]


def lost(events):
    total = 0.0
    for generation in {event.generation for event in events}:
        starts = [
            event.start
            for event in events
            if event.generation == generation and event.phase == "arrival"
        ]
        total += sum(max(starts) - start for start in starts)
    return total


def lost_in_all_barriers_as_one(events):
    starts = [event.start for event in events if event.phase == "arrival"]
    return sum(max(starts) - start for start in starts) if starts else 0.0


def length_of_arrivals(events):
    return sum(event.seconds for event in events if event.phase == "arrival")


def lost_of_all_phases(events):
    starts = [event.start for event in events]
    return sum(max(starts) - start for start in starts) if starts else 0.0


def lost_and_sorted(events):
    events.sort(key=lambda event: -event.start)
    return lost(events)


def test_seconds_lost(capsys):
    check_seconds_lost(lost, MEASURED)
    assert "lost 1.2 rank-seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (stub, "not written yet"),
        (lambda _: 1.2, "for no events: returned 1.2, wanted 0.0"),
        (lost_in_all_barriers_as_one, "for two barriers"),
        (length_of_arrivals, "for the measured events"),
        (lost_of_all_phases, "for the measured events"),
        (lost_and_sorted, "the list of events was changed"),
    ],
)
def test_other_sums_are_refused(answer, match):
    refuses(check_seconds_lost, answer, MEASURED, match=match)


# 1.3


def read(events, world_size):
    arrivals = {event.rank: event for event in events if event.phase == "arrival"}
    if any(event.phase == "departure" for event in events):
        end = max(event.start for event in arrivals.values())
        late = [rank for rank, event in arrivals.items() if event.start == end]
        return late, {rank: end - event.start for rank, event in arrivals.items()}
    end = min(event.end for event in arrivals.values())
    in_time = [rank for rank, event in arrivals.items() if event.start <= end]
    late = [rank for rank in range(world_size) if rank not in in_time]
    return late, {rank: event.seconds for rank, event in arrivals.items()}


def read_as_complete(events, world_size):
    arrivals = {event.rank: event for event in events if event.phase == "arrival"}
    end = max(event.start for event in arrivals.values())
    late = [rank for rank, event in arrivals.items() if event.start == end]
    return late, {rank: end - event.start for rank, event in arrivals.items()}


def read_lengths(events, world_size):
    late, _ = read(events, world_size)
    return late, {event.rank: event.seconds for event in events if event.phase == "arrival"}


def read_rank_0(events, world_size):
    if any(event.rank == 0 and event.phase == "departure" for event in events):
        return read(events, world_size)
    return read([event for event in events if event.phase != "departure"], world_size)


def read_only_the_absent(events, world_size):
    late, waited = read(events, world_size)
    if any(event.phase == "departure" for event in events):
        return late, waited
    return [rank for rank in range(world_size) if rank not in waited], waited


def read_in_order(events, world_size):
    late, waited = read(events, world_size)
    if events[0].rank != 0:
        late = late[::-1] or late
        waited = dict.fromkeys(waited, 0.0)
    return late, waited


def test_read_timeline(capsys):
    check_read_timeline(read)
    assert "7 timelines were read, 3 of them of barriers that broke" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (stub, "not written yet"),
        (lambda *_: None, "returned None, wanted a list"),
        (lambda *_: ([1], {0: 0.75, 1: 0.0, 2: 0.25}), "went on 5 s later(.|\n)*returned waits"),
        (read_as_complete, "rank 2 did not come(.|\n)*returned late ranks .1., wanted .2."),
        (read_lengths, "rank 1 came last(.|\n)*returned waits"),
        (read_rank_0, "rank 0 gave up in departure"),
        (read_only_the_absent, "rank 0 came after rank 1 had broken off"),
        (read_in_order, "returned waits"),
    ],
)
def test_other_readings_are_refused(answer, match):
    refuses(check_read_timeline, answer, match=match)


# 1.4


def of_keys(world_size):
    return world_size**2


def of_plain(world_size, rank_0_waits):
    arrival_and_confirmation = 4 * (world_size - 1) + 5
    departure = 2 * (world_size - 1) + 1
    return arrival_and_confirmation + departure + 4 + 2 * rank_0_waits


def barrier_of_keys(store, rank, world_size, number):
    store.set(f"{number}/{rank}", "")
    for other in range(world_size):
        if other != rank:
            store.wait([f"{number}/{other}"])


def test_requests(capsys):
    check_requests(of_keys, of_plain, barrier_of_keys)
    assert (
        "For 12: 144 requests with a key for each rank, 76 or 78 in the plain barrier"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("keys", "plain", "match"),
    [
        (stub, stub, "not written yet"),
        (of_keys, stub, "not written yet"),
        (lambda n: n * (n - 1), of_plain, "barrier of keys, 1 ranks: predicted 0, counted 1"),
        (lambda n: {1: 1, 2: 4, 4: 16}.get(n, 256), of_plain, "3 ranks: predicted 256, counted 9"),
        (of_keys, lambda n, _: of_plain(n, True), "1 ranks: predicted 12, counted 10"),
        (of_keys, lambda n, _: of_plain(n, False), "rank 0 waits .* 2 ranks: predicted 16"),
        (of_keys, lambda n, waits: of_plain(n, waits) - 4, "predicted 6, counted 10.* 4 delete"),
        (of_keys, lambda n, waits: 6 * n + 2 + 2 * n, "2 ranks: predicted 18, counted 16"),
    ],
)
def test_other_predictions_are_refused(keys, plain, match):
    refuses(check_requests, keys, plain, barrier_of_keys, match=match)


# What the notebook measures with.


def test_a_logged_store_writes_down_each_request():
    store = LoggedStore(HashStore())
    store.set("a", "1")
    store.wait(["a", "b"][:1], timedelta(seconds=1))
    with pytest.raises(RuntimeError):
        store.wait(["b"], timedelta(milliseconds=1))
    assert [(one.name, one.key) for one in store.log] == [
        ("set", "a"),
        ("wait", "a"),
        ("wait", "b"),
    ]
    assert all(one.sent <= one.answered for one in store.log)
    assert isinstance(store, HashStore)


# An observer that ended the wait of rank 1 would let it pass, although rank 0 stays away.
def test_looking_inside_wakes_no_rank():
    server = create_tcp_store("127.0.0.1", 0, is_master=True)
    clients = server, create_tcp_store("127.0.0.1", server.port)
    groups = [StatelessProcessGroup(rank, 2, store) for rank, store in enumerate(clients)]
    requests = log_requests(groups[1])
    raised = []

    def enter():
        try:
            groups[1].barrier(timeout=0.5)
        except BarrierError as error:
            raised.append(error.missing)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert wait_until_inside(groups[0], 1) == [1]
    thread.join(DEADLINE)
    assert raised == [(0,)]
    assert requests[0].name == "append"
    assert log_requests(groups[1]) is requests
    with pytest.raises(TimeoutError, match="fewer than 1 ranks"):
        wait_until_inside(groups[1], 1, seconds=0)


def test_costs_of_barriers():
    costs = barrier_costs({"keys": barrier_of_keys, "door": door}, (2, 3))
    assert [(cost.name, cost.world_size) for cost in costs] == [
        (name, world_size) for world_size in (2, 3) for name in ("refdist", "keys", "door")
    ]
    counted = {(cost.name, cost.world_size): cost.requests for cost in costs}
    assert (counted["keys", 2], counted["keys", 3]) == (4, 9)
    assert (counted["door", 2], counted["door", 3]) == (6, 8)
    assert all(cost.milliseconds > 0 for cost in costs)
