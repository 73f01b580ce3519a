"""What a review of the core found, each with a test that failed before."""

import gc
import threading
import time
import weakref

import pytest
import torch
from ranks import Watched, run_threads
from torch.distributed import HashStore, PrefixStore

from refdist import (
    MessageTimeoutError,
    StatelessProcessGroup,
    create_tcp_store,
)
from refdist.calls import Calls
from refdist.deadline import CancelledWaitError, Deadline
from refdist.objects.encoding import CHUNK_BYTES

LOCAL = "127.0.0.1"
LARGE = bytes(2 * CHUNK_BYTES)


def groups_on(store, world_size, **options):
    return [StatelessProcessGroup(rank, world_size, store, **options) for rank in range(world_size)]


# Rank 2 misses a broadcast of rank 0, and receives one of rank 1 meanwhile. The first stays in the
# store through barriers until rank 2 has it, and goes in the next one.
def test_a_broadcast_that_was_overtaken_stays():
    store = HashStore()
    groups = groups_on(store, 3)
    with pytest.raises(MessageTimeoutError):
        groups[2].broadcast_obj(None, 0, timeout=0.01)
    groups[0].broadcast_obj("from 0", 0)
    assert groups[1].broadcast_obj(None, 0) == "from 0"
    groups[1].broadcast_obj("from 1", 1)
    assert [groups[rank].broadcast_obj(None, 1) for rank in (0, 2)] == ["from 1"] * 2
    run_threads(lambda rank: groups[rank].barrier(10), 3)
    assert groups[2].broadcast_obj(None, 0, timeout=1) == "from 0"
    run_threads(lambda rank: groups[rank].barrier(10), 3)
    assert not store.check(["broadcast/0/0"]) and not store.check(["broadcast/1/0"])


# Thousands of broadcasts between two barriers: the next one deletes some of them, and is in time.
def test_a_barrier_deletes_no_more_than_it_has_time_for():
    def meet(rank):
        group = StatelessProcessGroup(rank, 2, stores[rank])
        for number in range(3000):
            assert group.broadcast_obj(number, 1) == number
        group.barrier(0.5)
        counted.wait()
        left = server.num_keys()
        counted.wait()
        for _ in range(15):
            group.barrier(10)
        counted.wait()
        return left, server.num_keys()

    server = create_tcp_store(LOCAL, 0, is_master=True)
    stores = [server, create_tcp_store(LOCAL, server.port)]
    counted = threading.Barrier(2, timeout=30)
    for after_one, after_many in run_threads(meet, 2):
        assert after_one > 2000 and after_many < 30


# Large broadcasts that all have read, and no barrier: nothing but the note of expiry stays.
def test_counts_of_readers_expire():
    store = HashStore()
    zero, one = groups_on(store, 2, data_expiration_seconds=1)
    for _ in range(3):
        zero.broadcast_obj(LARGE, 0)
        assert one.broadcast_obj(None, 0) == LARGE
    zero.entries.extend([(key, at - 10) for key, at in zero.entries])
    for _ in range(3):
        zero.entries.popleft()
    zero.expire_data()
    assert store.num_keys() == 1
    with pytest.raises(MessageTimeoutError):
        one.broadcast_obj(None, 0, timeout=0.01)


# Someone else's entry among those of a group is nobody's object.
def test_a_foreign_entry():
    zero, one = groups_on(HashStore(), 2, data_expiration_seconds=1)
    zero.entries.append(("foreign", -1e6))
    zero.send_obj("real", 1)
    assert one.recv_obj(0) == "real"


# The host is stopped while chunks come fast: the call ends two seconds after its timeout, also if
# no slice of waiting has run out.
def test_the_limit_follows_the_deadline_while_chunks_come():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    group = StatelessProcessGroup(0, 2, create_tcp_store(LOCAL, server.port))
    other = StatelessProcessGroup(1, 2, create_tcp_store(LOCAL, server.port))
    other.send_obj(bytes(8 * CHUNK_BYTES), 0)
    limits = []
    limit = type(group._barrier.store).limit
    seen = lambda seconds: (limits.append(seconds), limit(group._barrier.store, seconds))  # noqa: E731
    group._barrier.store.limit = seen
    deadline = Deadline(30)
    its_time = time.monotonic() - 20
    deadline._start = its_time
    group._calls.run("recv_obj", deadline, group._mailbox.receive, 1, deadline, None, kept=1)
    assert limits[0] == 30 and all(9 < seconds <= 10 for seconds in limits[1:]) and limits[1:]


# Two groups on prefixes of one store share its socket, and so its limit.
def test_prefixes_share_a_limit():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    groups = [StatelessProcessGroup(0, 1, PrefixStore(name, server)) for name in "ab"]
    for seconds, group in ((5, groups[0]), (300, groups[1]), (5, groups[0])):
        group.barrier(seconds)
        assert all(one._barrier.store.shared.seconds == seconds for one in groups)


# Groups end with their last reference, also after errors that have left one.


def _interrupted(groups):
    deadline = Deadline(5)
    deadline.cancel("an interrupt")
    with pytest.raises(CancelledWaitError):
        groups[0]._barrier.wait(deadline)


def _cannot_pickle(groups):
    def gather(rank):
        with pytest.raises(Exception, match="pickle"):
            groups[rank].all_gather_obj((lambda: None) if rank else "an object", timeout=5)

    run_threads(gather, 2)


@pytest.mark.parametrize("leave_an_error", [_interrupted, _cannot_pickle])
def test_no_cycle_keeps_a_group(leave_an_error):
    groups = groups_on(HashStore(), 2)
    kept = [weakref.ref(group) for group in groups]
    gc.collect()
    gc.disable()
    try:
        leave_an_error(groups)
        groups.clear()
        assert [group() for group in kept] == [None, None]
    finally:
        gc.enable()


# A tensor that cannot be written: torch's error, the group goes on, and so does the message.
def test_a_tensor_that_cannot_be_written():
    zero, one = groups_on(HashStore(), 2)
    zero.send(torch.ones(3), 1)
    with pytest.raises(RuntimeError, match="single memory location"):
        one.recv(torch.zeros(1).expand(3), 0)
    assert one.recv(torch.zeros(3), 0).tolist() == [1, 1, 1]


# A call ends just as another thread closes the group, and the next one begins: it is not torn.
def test_close_leaves_a_running_call():
    calls = Calls(0)
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(20)

    class Ended:
        what, thread = "the call before", 0

        def runs(self):
            # meanwhile it ends, and the next begins
            del calls._present["call"]
            thread.start()
            assert inside.wait(20)
            return False

    errors = []

    def run():
        try:
            calls.run("barrier", Deadline(20), wait)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    calls._present["call"] = Ended()
    with pytest.raises(Exception, match="barrier is running"):
        calls.close("close", 1.0, lambda deadline: None)
    go_on.set()
    thread.join(20)
    assert errors == []


# A chunk of a gather does not come: the error names the gather and the rank.
def test_a_gather_that_misses_a_chunk_names_the_rank():
    store = HashStore()
    groups = groups_on(store, 2)

    def before(request, key=None, *_):
        if request == "append":
            store.delete_key("gather/1/0/chunk/0")

    groups[1] = StatelessProcessGroup(1, 2, Watched(store, before))

    def gather(rank):
        if rank == 1:
            return groups[1].all_gather_obj(LARGE, timeout=1)
        with pytest.raises(MessageTimeoutError) as caught:
            groups[0].all_gather_obj("small", timeout=1)
        assert caught.value.missing == (1,)
        assert "gather 0: rank 0 waited in vain for the rest from rank 1: 1." in str(caught.value)

    run_threads(gather, 2)
