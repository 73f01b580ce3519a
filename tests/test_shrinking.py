"""Groups that have lost ranks: who goes on, where, and what is told to those that come late.

Ranks are processes. Most of their time they wait, so several groups of them run side by side.
"""

import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import psutil
import pytest
from ranks import LOCAL, interrupt, run_ranks, until

from refdist import (
    BarrierError,
    GroupCreationError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.store.client import StoreClient

SECRET = "a secret of tests for all ranks"
TIMEOUT = 1.5  # of a meeting: a rank that is alive comes in that time, also on a busy machine
AT_ONCE = 9  # groups that run side by side

# These tests start many processes, so they run one after the other.
pytestmark = pytest.mark.xdist_group("shrinking")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(process):
    """Stop a process, and return when it has stopped."""
    os.kill(process, signal.SIGSTOP)
    until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)


def _error(call: Callable[[], object]) -> Exception | None:
    """The error of a call, without the frames, which hold its variables; None if it returned."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return error.with_traceback(None)
    return None


def _watch(before):
    """Let ``before`` see each request of this process to a store, and its key."""

    def watched(name, place):
        request = getattr(StoreClient, name)

        def call(client, *arguments, **named):
            key = arguments[place]
            before(client.prefix + (key if isinstance(key, str) else key[0]))
            return request(client, *arguments, **named)

        setattr(StoreClient, name, call)

    for name in ("append", "set", "add", "compare_set"):
        watched(name, 0)
    watched("in_slices", 2)


def _run_all(function, check, cases):
    """Run ``function`` on each case: world size, arguments, and the ranks that are killed."""

    def run(case):
        world_size, arguments, killed = case
        try:
            check(case, run_ranks(function, world_size, *arguments, killed=killed))
        except Exception as error:
            return f"{case}: {error}"
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failures = [failure for failure in pool.map(run, cases) if failure]
    if failures:
        pytest.fail("\n".join(failures))


# Any ranks are killed. The others agree who they are, and have the old order. If the store is left,
# they stay there, and else go to the successor, where the new rank 0 serves. All of them know one
# next successor. The old group is closed, and its messages are never read.


def _goes_on(here, victims, host, options):
    with here.place("group", host=host) as (port, listener):
        group = StatelessProcessGroup.create(
            host, port, here.rank, here.world_size, listen_socket=listener, **options
        )
    place, successor = (group.host, group.port), group.successor
    group.send_obj("of the old group", (here.rank + 1) % here.world_size)
    group.barrier()
    group.events = []
    if here.rank in victims:
        _die()
    if victims:
        assert isinstance(_error(lambda: group.barrier(0.5)), BarrierError | StoreConnectionError)
    new = group.shrink(TIMEOUT)
    assert str(_error(group.barrier)) == "barrier: this group is closed"
    there, back = (new.rank + 1) % new.world_size, (new.rank - 1) % new.world_size
    assert isinstance(_error(lambda: new.recv_obj(back, timeout=0.1)), MessageTimeoutError)
    new.barrier()
    new.send_obj("of the new group", there)
    found = new.all_gather_obj(here.rank), new.recv_obj(back)
    assert new.events is group.events and new.events[-1].generation == 1
    assert new.rank == found[0].index(here.rank) and new.generation == 2
    assert (new.socket is not None) == (new.rank == 0)
    places = place, successor, (new.host, new.port), new.successor
    new.close()
    return found, places


def _check_goes_on(case, results):
    _, (victims, *_), _ = case
    others = [rank for rank, _ in enumerate(results) if rank not in victims]
    (found, (place, successor, new_place, new_successor)), *_ = [results[rank] for rank in others]
    assert all(results[rank] == results[others[0]] for rank in others)
    assert found == (others, "of the new group")
    assert new_place == (successor if 0 in victims else place)
    assert new_successor is not None and new_successor not in (place, new_place)
    assert (new_successor == successor) == (0 not in victims and 1 not in victims)


def test_those_that_are_left_go_on():
    plain, secret = {"messages": "plain"}, {"secret": SECRET}
    cases = [
        ((), LOCAL, {}), ((0,), LOCAL, {}), ((1, 3), LOCAL, {}), ((0, 3), LOCAL, {}),
        ((), LOCAL, secret), ((1,), LOCAL, secret | plain), ((0,), LOCAL, secret | plain),
    ]  # fmt: skip
    _run_all(_goes_on, _check_goes_on, [(4, case, case[0]) for case in cases])


def test_on_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    case = 3, ((0,), "::1", {}), (0,)
    _check_goes_on(case, run_ranks(_goes_on, *case[:1], *case[1], killed=case[2]))


# Rank 0 and the successor are killed: nobody opens a store, and the others learn that in time.


def _lose_both(here):
    group = here.group()
    host, port = group.successor
    if here.rank < 2:
        _die()
    assert isinstance(_error(group.barrier), StoreConnectionError)
    error = _error(lambda: group.shrink(timeout=1))
    assert isinstance(error, StoreConnectionError)
    assert f"no store answered on {host}:{port} within 1 s" in str(error)
    group.close()


def test_rank_0_and_the_successor_are_killed():
    run_ranks(_lose_both, 4, killed=[0, 1])


# A rank is killed at each request that it makes in the meeting: before and after it has signed the
# roll, is counted, and knows the outcome. The others get one and the same group, with it or without
# it, and if with it, shrink once more. Rank 0 takes no store with it here.

REQUESTS = range(4)


def _dies_in_the_meeting(here, victim, request):
    requests = []

    def before(key):
        if here.rank == victim and key.startswith("meeting/"):
            if len(requests) == request:
                _die()
            requests.append(key)

    _watch(before)
    store = create_tcp_store(LOCAL, here.board.port)
    group = StatelessProcessGroup(here.rank, here.world_size, store)
    here.meet("shrink")
    group = group.shrink(timeout=1)
    if here.rank == victim:
        _die()
    first = group.world_size
    if first == here.world_size:
        # rank 0 comes a second later if it waits for the dead one to leave the meeting
        error = _error(lambda: group.all_gather_obj(None, timeout=2))
        assert isinstance(error, MessageTimeoutError) and error.missing == (victim,), error
        group = group.shrink(timeout=1)
    found = first, group.all_gather_obj(here.rank)
    group.close()
    return found


def _check_the_meeting(case, results):
    _, (victim, _), _ = case
    survivors = [result for result in results if result is not None]
    others = [rank for rank in range(len(results)) if rank != victim]
    assert len(survivors) == len(others)
    assert survivors[0][1] == others and all(one == survivors[0] for one in survivors)


def test_a_rank_dies_in_the_meeting():
    cases = [(3, (victim, request), (victim,)) for victim in (0, 2) for request in REQUESTS]
    _run_all(_dies_in_the_meeting, _check_the_meeting, cases)


# Here it does. The others get one and the same group, or all of them an error in time.


def _the_host_dies_in_the_meeting(here, request):
    requests = []

    def before(key):
        if here.rank == 0 and key.startswith("meeting/"):
            if len(requests) == request:
                _die()
            requests.append(key)

    _watch(before)
    group = here.group()
    here.meet("shrink")
    try:
        group = group.shrink(TIMEOUT)
        if here.rank == 0:
            _die()
        if group.world_size == here.world_size:
            assert isinstance(_error(group.barrier), StoreConnectionError)
            group = group.shrink(TIMEOUT)
        found = group.all_gather_obj(here.rank)
        group.close()
    except (GroupCreationError, StoreConnectionError):
        return "an error"
    return found


def _check_the_host(case, results):
    assert results[1] == results[2] and results[1] in ("an error", [1, 2])


def test_the_host_dies_in_the_meeting():
    cases = [(3, (request,), (0,)) for request in REQUESTS]
    _run_all(_the_host_dies_in_the_meeting, _check_the_host, cases)


# A rank that comes late is told, each time that it tries. It asks to be let in, and is, behind the
# others. Rank 0, whose store goes on, is told as well.


def _comes_late(here, late):
    group = here.group()
    place = group.host, group.port
    here.meet("all are there")
    if here.rank == late:
        here.ask("shrunk")
        others = " and ".join(str(rank) for rank in range(here.world_size) if rank != late)
        for _ in range(2):
            error = _error(lambda: group.shrink(TIMEOUT))
            assert isinstance(error, GroupCreationError) and error.missing == (late,)
            assert str(error) == (
                f"rank {late} came late, and was left out: ranks {others} met without it; "
                f"StatelessProcessGroup.join asks to be let in again"
            )
        new = StatelessProcessGroup.join(*place, timeout=20)
    else:
        new = group.shrink(timeout=1)
        here.tell("shrunk")
        while new.world_size < here.world_size:
            new = new.admit()
    found = new.all_gather_obj(here.rank)
    assert (new.host, new.port) == place and new.successor is not None
    new.close()
    here.meet("closed")
    group.close(timeout=0)
    return found


def _check_late(case, results):
    _, (late,), _ = case
    assert results == [[*(rank for rank in range(3) if rank != late), late]] * 3


def test_a_rank_comes_late():
    _run_all(_comes_late, _check_late, [(3, (late,), ()) for late in range(3)])


# The host of the store was left out, and let in again, so it is not rank 0. When it is killed, the
# others go on at the successor, which is rank 0.


def _another_host(here):
    group = here.group()
    if here.rank == 0:
        here.ask("shrunk")
        new = StatelessProcessGroup.join(group.host, group.port, timeout=20)
    else:
        new = group.shrink(timeout=1)
        here.tell("shrunk")
        while new.world_size < here.world_size:
            new = new.admit()
    assert new.all_gather_obj(here.rank) == [1, 2, 0] and new.socket is None
    if here.rank == 0:
        for rank in (1, 2):
            here.ask(f"gathered/{rank}")
        _die()
    here.tell(f"gathered/{here.rank}")
    successor = new.successor
    assert isinstance(_error(new.barrier), StoreConnectionError)
    new = new.shrink(TIMEOUT)
    assert new.all_gather_obj(here.rank) == [1, 2] and (new.host, new.port) == successor
    assert (new.socket is not None) == (here.rank == 1)
    new.close()


def test_a_host_that_is_not_rank_0():
    run_ranks(_another_host, 3, killed=[0])


# A group shrinks as often as it must. When its host is killed, and then the host after that, the
# others are at the successor of each; in the end one is alone.


def _again_and_again(here, order):
    group = here.group()
    hosts = []
    for victim in order:
        successor, place = group.successor, (group.host, group.port)
        is_host = group.socket is not None
        hosts.append(is_host)
        group.barrier()
        if here.rank == victim:
            here.tell(f"host/{victim}", is_host)
            _die()
        was_host = here.ask(f"host/{victim}")
        with pytest.raises((BarrierError, StoreConnectionError)):
            group.barrier(0.5)
        group = group.shrink(TIMEOUT)
        assert (group.host, group.port) == (successor if was_host else place)
    found = group.all_gather_obj(here.rank)
    group.close()
    return found


def _check_again(case, results):
    world_size, (order,), _ = case
    others = [rank for rank in range(world_size) if rank not in order]
    assert [results[rank] for rank in others] == [others] * len(others)


def test_again_and_again():
    orders = [(4, (0, 1, 2)), (4, (3, 1))]
    _run_all(_again_and_again, _check_again, [(size, (order,), order) for size, order in orders])


# A part shrinks like any group, and the whole has nothing to do with it. Later, the whole shrinks.


def _keys_of_parts(group):
    """The keys of parts, while no rank uses the store."""
    group.barrier()
    listed = (
        torch_versions.tcp_store_of(group.store).list_keys() if torch_versions.lists_keys() else []
    )
    group.barrier()
    return {key for key in listed if "part/" in key}


def _shrinks_a_part(here):
    group = here.group(secret=SECRET)
    part = group.split(None if here.rank == 1 else 0)
    group.barrier()
    if here.rank == 3:
        _die()
    found = None
    if part is not None:
        part = part.shrink(TIMEOUT)
        assert part.successor is None
        with pytest.raises(ValueError, match="admit: this group was split off another"):
            part.admit()
        found = part.all_gather_obj(here.rank)
        here.tell("part")
    here.ask("part")
    whole = group.shrink(TIMEOUT)
    if part is not None:
        part.barrier()
        part.close()
    found = found, whole.all_gather_obj(here.rank)
    # a part of a group that lost ranks has lost none itself: nothing of it is left
    kept = _keys_of_parts(whole)
    another = whole.split(0).shrink(timeout=20)
    another.barrier()
    another.close()
    assert _keys_of_parts(whole) == kept
    whole.close()
    return found


def test_a_part_shrinks():
    *results, _ = run_ranks(_shrinks_a_part, 4, killed=[3])
    assert results == [([0, 2], [0, 1, 2]), (None, [0, 1, 2]), ([0, 2], [0, 1, 2])]


# An interrupt ends shrink, and the next call goes on with it: while this rank waits for another, or
# when the others have got the new group already.


def _interrupted(here, moment):
    def before(key):
        outcome = "meeting/" in key and key.endswith("outcome")
        if here.rank == 1 and outcome and not here.told("process"):
            here.tell("process", os.getpid())
            if moment == "late":
                here.ask("shrunk")
            here.ask("sent")

    _watch(before)
    group = here.group()
    here.meet("shrink")
    if here.rank == 1:
        with pytest.raises(KeyboardInterrupt):
            group.shrink(timeout=20)
        here.tell("interrupted")
    elif moment == "early" or here.rank == 2:
        process = here.ask("process")
        if here.rank == 2:
            new = group.shrink(timeout=20) if moment == "late" else None
            here.tell("shrunk")
            interrupt(process)
            here.tell("sent")
        here.ask("interrupted")
    if here.rank == 1 and moment == "late":
        with pytest.raises(
            ValueError, match=r"^admit: this group is closed; call shrink again for"
        ):
            group.admit()
    new = group.shrink(timeout=20) if moment == "early" or here.rank != 2 else new
    found = new.all_gather_obj(here.rank)
    new.close()
    return found


def _check_interrupted(case, results):
    assert results == [[0, 1, 2]] * 3


def test_an_interrupt():
    cases = [(3, (moment,), ()) for moment in ("early", "late")]
    _run_all(_interrupted, _check_interrupted, cases)


# A rank that is interrupted when the others have got the new group closes the old one: then it has
# left both, and the others learn it. If it is rank 0, its port is free.


def _leaves_both(here, victim, how):
    group = here.group()
    place = group.host, group.port
    if here.rank == victim:

        def before(key):
            if key.startswith("meeting/") and key.endswith("outcome") and not here.told("waits"):
                here.tell("waits")
                here.ask("shrunk")
                interrupt(os.getpid())

        _watch(before)
        with pytest.raises(KeyboardInterrupt), group if how == "with" else nullcontext():
            group.shrink(timeout=60)
        if how == "end":
            group.end()
        if victim == 0:
            with socket.socket() as probe:
                assert probe.connect_ex(place) != 0
        here.tell("left")
        return
    here.ask("waits")
    new = group.shrink(timeout=60)
    here.tell("shrunk")
    error = _error(lambda: new.barrier(timeout=60))
    if victim == 0:
        assert isinstance(error, StoreConnectionError | BarrierError), error
    elif how == "with":
        assert isinstance(error, BarrierError) and "because of KeyboardInterrupt" in str(error)
    here.ask("left")


def test_an_interrupted_rank_leaves_both_groups():
    cases = [(2, (0, "with"), ()), (2, (0, "end"), ()), (2, (1, "with"), ())]
    _run_all(_leaves_both, lambda *_: None, cases)


# Rank 0 comes late, and asks the others, whose store it serves, to let it in. It need not keep the
# old group for that. When it closes that, the store ends.


def _the_host_comes_again(here):
    group = here.group()
    if here.rank == 0:
        here.ask("shrunk")
        error = _error(lambda: group.shrink(timeout=2))
        assert isinstance(error, GroupCreationError) and error.missing == (0,)
        group = StatelessProcessGroup.join(group.host, group.port, timeout=20)
        gc.collect()
    else:
        group = group.shrink(TIMEOUT)
        here.tell("shrunk")
        while group.world_size < 3:
            group = group.admit()
    found = group.all_gather_obj(here.rank)
    group.close()
    here.meet("closed")  # the host has the last rank, and does not wait for the others
    return found


def test_the_host_comes_again():
    assert run_ranks(_the_host_comes_again, 3) == [[1, 2, 0]] * 3


# Where the system refuses a socket for the way to the successor, the call ends with an error, and
# the next one goes on.


def _too_many_files(here):
    group = here.group()
    here.meet("formed")
    if here.rank == 0:
        _die()
    assert isinstance(_error(lambda: group.barrier(timeout=20)), StoreConnectionError)
    if here.rank == 2:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        error = _error(lambda: group.shrink(timeout=20))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(error, StoreConnectionError) and "Too many open files" in str(error)
    new = group.shrink(timeout=20)
    found = new.all_gather_obj(here.rank)
    new.close()
    return found


def test_too_many_open_files():
    assert run_ranks(_too_many_files, 3, killed=[0]) == [None, [1, 2], [1, 2]]


# Rank 0 is stopped, and the others give up its store and go on at the successor. When it goes on,
# it finds itself alone on its store. It may ask the others to let it in.


def _stopped_and_continued(here):
    group = here.group(secret=SECRET)
    group.barrier()
    if here.rank == 0:
        here.tell("process", os.getpid())
        place = here.ask("place")
        error = _error(lambda: group.barrier(timeout=0.2))
        assert isinstance(error, BarrierError) and error.missing == (1, 2)
        alone = group.shrink(timeout=0.5)
        assert alone.world_size == 1 and alone.all_gather_obj(0) == [0]
        tag = alone._barrier.seals.tag("a key", b"a value")
        alone.close()
        new = StatelessProcessGroup.join(*place, timeout=20, secret=SECRET)
    else:
        process = here.ask("process")
        if here.rank == 1:
            _stop(process)
            here.tell("stopped")
        here.ask("stopped")
        error = _error(lambda: group.barrier(timeout=0.2))
        assert isinstance(error, StoreConnectionError) and "did not answer" in str(error)
        successor = group.successor
        new = group.shrink(TIMEOUT)
        assert (new.host, new.port) == successor
        tag = new._barrier.seals.tag("a key", b"a value")
        if here.rank == 1:
            os.kill(process, signal.SIGCONT)
            here.tell("place", successor)
        while new.world_size < 3:
            new = new.admit()
    found = new.all_gather_obj(here.rank)
    new.close()
    return found, tag


def test_rank_0_is_stopped_and_continued():
    results = run_ranks(_stopped_and_continued, 3)
    assert [found for found, _ in results] == [[1, 2, 0]] * 3


# What was written in the group of rank 0 alone is refused in that of the others.


def test_seals_on_both_stores():
    alone, new, same = (tag for _, tag in run_ranks(_stopped_and_continued, 3))
    assert new == same != alone


# It is stopped for a while, and a meeting takes longer: then all of them go on as they were.


def _stopped_for_a_while(here):
    group = here.group()
    group.barrier()
    if here.rank == 0:
        here.tell("process", os.getpid())
        here.ask("continued")
    elif here.rank == 1:
        process = here.ask("process")
        _stop(process)
        here.tell("stopped")
        time.sleep(1.5)  # longer than a store may take to answer after a deadline
        os.kill(process, signal.SIGCONT)
        here.tell("continued")
    else:
        here.ask("stopped")
    new = group.shrink(timeout=3)
    found = new.all_gather_obj(here.rank)
    new.close()
    return found


def test_rank_0_is_stopped_for_a_while():
    assert run_ranks(_stopped_for_a_while, 3) == [[0, 1, 2]] * 3


# Fewer than half of the ranks come to the successor: they are told, and may try again.


def _too_few(here):
    group = here.group()
    if here.rank == 0:
        _die()
    assert isinstance(_error(group.barrier), StoreConnectionError)
    if here.rank == 1:
        error = _error(lambda: group.shrink(timeout=0.5))
        assert isinstance(error, GroupCreationError) and error.missing == (2, 3)
        assert "only rank 1 of 4 came to the successor's store, which is less than" in str(error)
        here.tell("alone")
    here.ask("alone")
    new = group.shrink(TIMEOUT)
    found = new.all_gather_obj(here.rank)
    new.close()
    return found


def test_too_few_come_to_the_successor():
    assert run_ranks(_too_few, 4, killed=[0])[1:] == [[1, 2, 3]] * 3


# A store that too few have come to ends, although somebody keeps the error.


def _keeps_the_error(here):
    group = here.group()
    if here.rank == 0:
        _die()
    assert isinstance(_error(group.barrier), StoreConnectionError)
    if here.rank == 1:
        with pytest.raises(GroupCreationError) as kept:
            group.shrink(timeout=0.2)
        with pytest.raises(StoreConnectionError):
            create_tcp_store(*group.successor, timeout=timedelta(seconds=1))
        assert kept.value.missing == (2,)


def test_a_store_that_too_few_have_come_to():
    run_ranks(_keeps_the_error, 3, killed=[0])
