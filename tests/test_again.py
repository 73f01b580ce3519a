"""Groups that are formed again, on the same place, and ranks that have to come into step again."""

import random
import socket
import threading
import time
from datetime import timedelta

import pytest
from ranks import LOCAL, run_ranks, run_threads

from refdist import (
    BarrierError,
    StatelessProcessGroup,
    create_tcp_store,
    stateless_init_torch_distributed_process_group,
)

SLACK = 6.0


# A cell of a notebook is run again: the group of before is neither closed nor deleted, and its
# store still listens where the next one shall. Each rank ends its own, and all form the next.


def _form_again(here, times):
    with here.place("group") as (port, listener):
        group, longest = None, 0.0
        for number in range(times):
            time.sleep(random.Random(f"{here.rank} {number}").choice([0, 0, 0, 0.02]))
            start = time.monotonic()
            before = group
            group = StatelessProcessGroup.create(
                LOCAL, port, here.rank, here.world_size, store_timeout=20, listen_socket=listener
            )
            longest = max(longest, time.monotonic() - start)
            assert group.all_gather_obj((number, here.rank)) == [
                (number, rank) for rank in range(here.world_size)
            ]
            if before is not None:
                with pytest.raises(ValueError, match="this group is closed"):
                    before.barrier()
        group.close()
        return longest


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_hundred_groups_on_one_port(world_size):
    assert max(run_ranks(_form_again, world_size, 100, deadline=100)) < 10 + SLACK


# Someone keeps the store of the last group, or the last group is one of torch's, whose store nobody
# can end: every rank is refused at once, and told what to do.


def _keep_the_store(here):
    with here.place("group") as (port, listener):
        options = {"store_timeout": 20, "listen_socket": listener}
        group = StatelessProcessGroup.create(LOCAL, port, here.rank, 2, **options)
        store = group.store
        start = time.monotonic()
        for _ in range(2):
            text = r"still has the store of its last group on .* delete"
            with pytest.raises(ValueError, match=text):
                StatelessProcessGroup.create(LOCAL, port, here.rank, 2, **options)
        seconds = time.monotonic() - start
        here.meet("refused")
        del store
        group = StatelessProcessGroup.create(LOCAL, port, here.rank, 2, **options)
        group.barrier()
        group.close()
        return seconds


def _keep_a_torch_group(here):
    with here.place("group") as (port, listener):
        arguments = (LOCAL, port, here.rank, 2, "gloo")
        group = stateless_init_torch_distributed_process_group(*arguments, listen_socket=listener)
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"has a torch group on .* destroy and del that one"):
            stateless_init_torch_distributed_process_group(*arguments, listen_socket=listener)
        seconds = time.monotonic() - start
        here.meet("refused")
        del group
        return seconds


@pytest.mark.parametrize("keep", [_keep_the_store, _keep_a_torch_group])
def test_what_cannot_be_ended_is_refused_at_once(keep):
    assert max(run_ranks(keep, 2)) < SLACK


# One rank alone calls barrier, and its time is up: it is one call ahead of the others from then on.
# They are told so by their next call, and ``realign`` brings all into step.


def _realign(here, alone):
    with here.group() as group:
        group.barrier()
        for _ in range(2):
            if here.rank == alone:
                with pytest.raises(BarrierError, match="its time was up"):
                    group.barrier(timeout=0.2)
        here.meet("one is ahead")
        group.realign(timeout=20)
        first = group.generation
        gathered = group.all_gather_obj((first, here.rank))
        group.barrier()
        return gathered


@pytest.mark.parametrize(("world_size", "alone"), [(2, 0), (2, 1), (4, 3)])
def test_realign(world_size, alone):
    expected = [[(5, rank) for rank in range(world_size)]] * world_size
    assert run_ranks(_realign, world_size, alone) == expected


# A rank that comes late is told who has gone on, and what to do if it has made fewer calls.
def test_a_rank_that_is_behind_is_told():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    stores = [server, create_tcp_store(LOCAL, server.port)]
    observer = create_tcp_store(LOCAL, server.port)
    ahead, behind = (StatelessProcessGroup(rank, 2, stores[rank]) for rank in range(2))
    with pytest.raises(BarrierError):
        ahead.barrier(timeout=0.1)
    roll = ahead._barrier.keys.roll  # of the next barrier

    def call(rank):
        if rank == 0:
            ahead.realign(timeout=20)
            return None
        observer.wait([roll])
        with pytest.raises(BarrierError, match="missing: rank 1 of 2") as caught:
            behind.barrier(timeout=20)
        behind.realign(timeout=20)
        return caught.value.__notes__

    _, notes = run_threads(call, 2)
    assert notes == [
        "rank 0 came to barrier 1 already. If a rank has made a call that others have not, call "
        "group.realign() on all of them."
    ]


# Nobody else realigns: an error in time that names who is missing. The next try works.
def test_realign_without_the_others():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    stores = [server, create_tcp_store(LOCAL, server.port)]
    groups = [StatelessProcessGroup(rank, 2, stores[rank]) for rank in range(2)]
    start = time.monotonic()
    with pytest.raises(BarrierError, match="missing: rank 1 of 2"):
        groups[0].realign(timeout=0.5)
    assert time.monotonic() - start < 0.5 + SLACK
    run_threads(lambda rank: groups[rank].realign(timeout=20), 2)
    run_threads(lambda rank: groups[rank].barrier(timeout=20), 2)


# A stranger stops in the middle of a request, which holds the legacy server up: calls go on once it
# is dropped, in a second, and a creation completes.


def _stranger_stops(here, libuv, sent):
    with here.place("group") as (port, listener):
        store = create_tcp_store(LOCAL, port, listener, is_master=here.rank == 0, use_libuv=libuv)
        with socket.create_connection((LOCAL, port)) as stranger:
            stranger.sendall(sent)
            group = StatelessProcessGroup(here.rank, 2, store)
            start = time.monotonic()
            for number in range(3):
                assert group.all_gather_obj(number, timeout=20) == [number, number]
            seconds = time.monotonic() - start
            here.meet("over")
        group.close()
        return seconds


HALF_A_REQUEST = [b"\0", b"\x00\x05\x00\x00\x00\x00\x00\x00\x00ab"]


@pytest.mark.parametrize("sent", HALF_A_REQUEST, ids=["one byte", "half a set"])
@pytest.mark.parametrize("libuv", [True, False], ids=["libuv", "legacy"])
def test_a_stranger_stops_in_the_middle_of_a_request(libuv, sent):
    if libuv and not _libuv_takes_a_socket():
        pytest.skip("the libuv server of this torch takes no socket")
    assert max(run_ranks(_stranger_stops, 2, libuv, sent)) < 3 + SLACK


def _libuv_takes_a_socket():
    try:
        create_tcp_store(LOCAL, 0, is_master=True, use_libuv=True)
        return True
    except NotImplementedError:
        return False


# The same while a group is formed.


def _stranger_stops_at_creation(here):
    with here.place("group") as (port, listener), socket.create_connection((LOCAL, port)) as other:
        other.sendall(b"\0")
        start = time.monotonic()
        with StatelessProcessGroup.create(
            LOCAL, port, here.rank, 2, store_timeout=20, listen_socket=listener
        ) as group:
            group.barrier()
        return time.monotonic() - start


def test_a_stranger_stops_at_creation():
    assert max(run_ranks(_stranger_stops_at_creation, 2)) < 6 + SLACK


# A stranger deletes the count of arrivals, again and again: the call ends in its own time, and not
# in that of the store, which waits so long for a key that is gone.


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stranger_deletes_the_count(rank):
    server = create_tcp_store(LOCAL, 0, is_master=True, timeout=timedelta(seconds=30))
    stores = [server, create_tcp_store(LOCAL, server.port, timeout=timedelta(seconds=30))]
    stranger = create_tcp_store(LOCAL, server.port)
    group = StatelessProcessGroup(rank, 2, stores[rank])
    counter = group._barrier.keys.counter
    over = threading.Event()

    def hammer():
        while not over.is_set():
            stranger.delete_key(counter)

    thread = threading.Thread(target=hammer, daemon=True)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(BarrierError, match="its time was up"):
            group.barrier(timeout=0.3)
        assert time.monotonic() - start < 0.3 + SLACK
    finally:
        over.set()
        thread.join(20)
