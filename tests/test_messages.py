"""Objects and tensors between ranks: order, size, failure, expiry, and what stays in the store."""

import hashlib
import os
import re
import threading
import time
from collections import deque
from datetime import timedelta

import pytest
import torch
from ranks import LOCAL, run_ranks
from torch.distributed import HashStore, PrefixStore, ReduceOp

from refdist import (
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    keys,
)
from refdist.messages import CHUNK_BYTES, encode

SLACK = 6.0
MIB = 2**20
UNPICKLABLE = threading.Lock()


def groups_on(store, world_size, **options):
    """A group for each rank, all in this process: sending does not wait for the receiver."""
    return [StatelessProcessGroup(rank, world_size, store, **options) for rank in range(world_size)]


def age(group, seconds):
    """Make everything that a rank has sent older."""
    group.entries = deque((key, written - seconds) for key, written in group.entries)


def is_empty(store, *all_keys):
    return [store.check([key]) for key in all_keys] == [False] * len(all_keys)


# Rank 0 sends, rank 1 receives in the same order, and answers.


def _send_in_order(here):
    with here.group() as group:
        other = 1 - here.rank
        if here.rank == 0:
            for number in range(100):
                group.send_obj(("from 0", number), other)
            return [group.recv_obj(other) for _ in range(100)]
        received = [group.recv_obj(other) for _ in range(100)]
        for obj in received:
            group.send_obj(("back", obj), other)
        return received


def test_messages_keep_their_order():
    sent = [("from 0", number) for number in range(100)]
    assert run_ranks(_send_in_order, 2) == [[("back", obj) for obj in sent], sent]


# Everyone sends to everyone else; what comes from a rank is what that rank sent.


def _send_to_all(here):
    with here.group() as group:
        others = [rank for rank in range(here.world_size) if rank != here.rank]
        for number in range(20):
            for other in others:
                group.send_obj((here.rank, other, number), other)
        received = {other: [] for other in others}
        for _ in range(20):
            for other in reversed(others):
                received[other].append(group.recv_obj(other))
        group.barrier()
        return received


@pytest.mark.parametrize("world_size", [2, 4])
def test_senders_to_one_receiver_do_not_mix(world_size):
    for rank, received in enumerate(run_ranks(_send_to_all, world_size)):
        assert len(received) == world_size - 1
        for source, messages in received.items():
            assert messages == [(source, rank, number) for number in range(20)]


# Objects of every size arrive whole, also those that no single request can carry.

SIZES = [
    0,
    1,
    CHUNK_BYTES - 1000,
    CHUNK_BYTES - 20,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
    2 * CHUNK_BYTES - 20,
    8 * MIB - 1,
    8 * MIB,
    8 * MIB + 1,
    9 * MIB,
    64 * MIB,
]


def _digest(obj):
    return len(obj), hashlib.blake2b(obj).hexdigest()


def _send_sizes(here, use_libuv):
    if here.rank == 0:
        store = create_tcp_store(LOCAL, 0, is_master=True, use_libuv=use_libuv)
        here.tell("port", store.port)
    else:
        store = create_tcp_store(LOCAL, here.ask("port"))
    seen = []
    with StatelessProcessGroup(here.rank, 3, store) as group:
        group.barrier()
        before = here.count_keys(group)
        for size in SIZES:
            payload = os.urandom(size) if here.rank == 0 else None
            if here.rank == 0:
                group.send_obj(payload, 1)
                sent = group.broadcast_obj(payload, 0)
                assert sent is payload
                seen.append(_digest(payload))
            elif here.rank == 1:
                received = _digest(group.recv_obj(0))
                assert received == _digest(group.broadcast_obj(None, 0))
                seen.append(received)
            else:
                seen.append(_digest(group.broadcast_obj(None, 0)))
        for size in (8 * MIB + 1, CHUNK_BYTES, 0):
            payload = os.urandom(size)
            seen.append([_digest(obj) for obj in group.all_gather_obj(payload)])
            assert seen[-1][here.rank] == _digest(payload)
        group.barrier()
        # of what was given to the last gather, one key a rank stays until the next
        assert here.count_keys(group) == before + 3
    return seen


def _serves(use_libuv):
    """Whether this torch can serve on a socket that was bound before with this kind of server."""
    try:
        create_tcp_store(LOCAL, 0, is_master=True, use_libuv=use_libuv)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("use_libuv", [True, False], ids=["libuv", "legacy"])
def test_every_size_arrives_whole(use_libuv):
    if not _serves(use_libuv):
        pytest.skip("this torch cannot serve on a bound socket with libuv")
    first, *others = run_ranks(_send_sizes, 3, use_libuv, deadline=90)
    assert [size for size, _ in first[: len(SIZES)]] == SIZES
    assert others == [first, first]


def test_a_large_message_travels_in_chunks():
    store = HashStore()
    sender, receiver = groups_on(store, 2)
    sender.send_obj(bytes(2 * CHUNK_BYTES), 1)
    key = keys.message(0, 1, 0)
    chunks = [keys.chunk(key, index) for index in range(3)]
    assert all(len(store.get(name)) <= CHUNK_BYTES for name in [key, *chunks])
    assert receiver.recv_obj(0) == bytes(2 * CHUNK_BYTES)
    assert is_empty(store, key, *chunks)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_the_boundaries_of_chunks(chunks, excess):
    store = HashStore()
    zero, one = groups_on(store, 2)
    size = chunks * CHUNK_BYTES + excess
    payload = os.urandom(size - (len(encode(bytes(size))) - size))
    assert len(encode(payload)) == size
    zero.send_obj(payload, 1)
    parts = chunks + (excess == 1)
    assert store.num_keys() == (1 if parts == 1 else 1 + parts)
    assert one.recv_obj(0) == payload
    assert store.num_keys() == 0


# Objects: tensors, exceptions, classes.


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is Point and other.x == self.x

    __hash__ = None


OBJECTS = [None, False, 0, "", "text", b"bytes", [1, [2]], {"a": (1, 2)}, {1, 2}, Point(3), Point]


@pytest.mark.parametrize("obj", OBJECTS, ids=repr)
def test_objects_arrive_equal(obj):
    zero, one = groups_on(HashStore(), 2)
    zero.send_obj(obj, 1)
    assert one.recv_obj(0) == obj
    one.broadcast_obj(obj, 1)
    assert zero.broadcast_obj(None, 1) == obj


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_in_objects_keep_dtype_and_shape(dtype, shape):
    zero, one = groups_on(HashStore(), 2)
    tensor = torch.arange(24)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    zero.send_obj({"tensor": tensor}, 1)
    received = one.recv_obj(0)["tensor"]
    assert (received.dtype, received.shape) == (dtype, torch.Size(shape))
    assert torch.equal(received, tensor)


# Everyone gets the object of the source, whichever rank that is; a source in a hurry is not lost.


def _broadcast_from_each(here):
    with here.group() as group:
        received = []
        for number in range(5):
            for source in range(here.world_size):
                obj = (source, number) if here.rank == source else "ignored"
                received.append(group.broadcast_obj(obj, source))
        return received


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_broadcast_from_each_rank(world_size):
    expected = [(source, number) for number in range(5) for source in range(world_size)]
    assert run_ranks(_broadcast_from_each, world_size) == [expected] * world_size


def test_a_source_does_not_wait_for_the_readers_of_a_broadcast():
    zero, one, two = groups_on(HashStore(), 3)
    for number in range(3):
        zero.broadcast_obj(number, 0)
    assert [one.broadcast_obj(None, 0) for _ in range(3)] == [0, 1, 2]
    assert [two.broadcast_obj(None, 0) for _ in range(3)] == [0, 1, 2]


def _gather(here):
    with here.group() as group:
        own = [here.rank]
        gathered = group.all_gather_obj(own)
        assert gathered[here.rank] is own
        return [gathered] + [group.all_gather_obj((here.rank, n)) for n in range(20)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gather_is_in_rank_order(world_size):
    for first, *others in run_ranks(_gather, world_size):
        assert first == [[rank] for rank in range(world_size)]
        for number, gathered in enumerate(others):
            assert gathered == [(rank, number) for rank in range(world_size)]


# An object that cannot be pickled: the sender gets pickle's error, its counter does not move, and
# the receiver gets the next message.


def test_send_of_an_unpicklable_object():
    zero, one = groups_on(HashStore(), 2)
    for _ in range(2):
        with pytest.raises(TypeError, match="cannot pickle"):
            zero.send_obj(UNPICKLABLE, 1)
        with pytest.raises(TypeError, match="cannot pickle"):
            zero.broadcast_obj(UNPICKLABLE, 0)
    assert zero.send_dst_counter == {0: 0, 1: 0}
    assert zero.broadcast_send_counter == 0
    assert not zero.entries
    zero.send_obj("next", 1)
    zero.broadcast_obj("next broadcast", 0)
    assert one.recv_obj(0) == "next"
    assert one.broadcast_obj(None, 0) == "next broadcast"
    assert zero.send_dst_counter == {0: 0, 1: 1}
    assert zero.broadcast_send_counter == 1


# In a gather: rank 1 gets pickle's error, the others a MessageError that names rank 1, and the next
# gather works.


def _gather_unpicklable(here):
    with here.group() as group:
        before = group.all_gather_obj(here.rank), here.count_keys(group)
        with pytest.raises((TypeError, MessageError)) as caught:
            group.all_gather_obj(UNPICKLABLE if here.rank == 1 else here.rank)
        after = group.all_gather_obj(here.rank), here.count_keys(group)
        return type(caught.value), str(caught.value), before, after


@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_of_an_unpicklable_object(world_size):
    for rank, (kind, text, before, after) in enumerate(run_ranks(_gather_unpicklable, world_size)):
        if rank == 1:
            assert kind is TypeError and "cannot pickle" in text
        else:
            assert kind is MessageError
            assert re.match("gather/1/1: rank 1 had no object to give: .*cannot pickle", text)
        assert before == after
        assert after[0] == list(range(world_size))


# Nothing comes in time: an error that says who was waited for and how long. The next call gets what
# comes later.


def _receive_too_early(here):
    with here.group() as group:
        if here.rank == 1:
            here.ask("nothing came")
            group.send_obj("late message", 0)
            group.broadcast_obj("late broadcast", 1)
            return None
        texts = []
        for receive in (
            lambda timeout: group.recv_obj(1, timeout=timeout),
            lambda timeout: group.broadcast_obj(None, 1, timeout=timeout),
        ):
            start = time.monotonic()
            with pytest.raises(MessageTimeoutError) as caught:
                receive(0.5)
            assert time.monotonic() - start < 0.5 + SLACK
            assert caught.value.missing == (1,)
            texts.append(str(caught.value))
        here.tell("nothing came")
        return texts, group.recv_obj(1), group.broadcast_obj(None, 1)


def test_receive_in_vain_then_again():
    (texts, message, broadcast), _ = run_ranks(_receive_too_early, 2)
    for text, what in zip(texts, ["message 0", "broadcast 0"], strict=True):
        assert re.match(
            rf"rank 0 waited in vain for {what} from rank 1: 0\.\d\d of 0\.5 s$", text
        ), text
    assert (message, broadcast) == ("late message", "late broadcast")


# A timeout of 0 takes what is there, however slow the store is, and waits for nothing.
def test_receive_without_waiting():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    zero, one = groups_on(store, 2)
    for number in range(200):
        zero.send_obj(number, 1)
        assert one.recv_obj(0, timeout=0) == number
    with pytest.raises(MessageTimeoutError, match="in vain for message 200 from rank 0"):
        one.recv_obj(0, timeout=0)


# Two of four are missing from a gather; those who came know whom. All are in the next one.


def _gather_without_two(here):
    with here.group() as group:
        if here.rank in (0, 2):
            with pytest.raises(MessageTimeoutError) as caught:
                group.all_gather_obj(here.rank, timeout=0.5)
            here.tell(f"gave up/{here.rank}")
            return caught.value, group.all_gather_obj(("second", here.rank))
        here.ask("gave up/0")
        here.ask("gave up/2")
        return group.all_gather_obj(here.rank), group.all_gather_obj(("second", here.rank))


def test_gather_without_two():
    results = run_ranks(_gather_without_two, 4)
    for rank, (first, second) in enumerate(results):
        assert second == [("second", r) for r in range(4)]
        if rank in (0, 2):
            assert first.missing == (1, 3)
            assert f"rank {rank} waited in vain for gather 0 from ranks 1 and 3: " in str(first)
        else:
            assert first == [0, 1, 2, 3]


# Without a timeout, the store's own holds.
def test_the_timeout_of_the_store_is_the_default():
    store = create_tcp_store(LOCAL, 0, is_master=True, timeout=timedelta(seconds=0.5))
    group = StatelessProcessGroup(0, 2, PrefixStore("group", store))
    for receive in (
        lambda: group.recv_obj(1),
        lambda: group.broadcast_obj(None, 1),
        lambda: group.all_gather_obj(0),
    ):
        with pytest.raises(MessageTimeoutError, match=r"from rank 1: 0\.\d\d of 0\.5 s"):
            receive()


# A message expires before it is read: the receiver is told so at once, and gets the next one. The
# store keeps nothing of it.


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_message_that_expired(size):
    store = HashStore()
    sender, receiver = groups_on(store, 2, data_expiration_seconds=60)
    empty = store.num_keys()
    sender.send_obj(bytes(size), 1)
    age(sender, 61)
    sender.send_obj("next", 1)  # sending expires what is old
    assert [key for key, _ in sender.entries] == [keys.message(0, 1, 1)]
    start = time.monotonic()
    with pytest.raises(MessageExpiredError, match=r"^message/0/1/0: expired unread after 60 s"):
        receiver.recv_obj(0, timeout=30)
    assert time.monotonic() - start < SLACK
    assert receiver.recv_obj(0) == "next"
    assert store.num_keys() == empty


def test_expire_data_takes_what_is_old_and_nothing_else():
    store = HashStore()
    sender, receiver = groups_on(store, 2, data_expiration_seconds=60)
    sender.send_obj("old", 1)
    age(sender, 61)
    sender.entries.append((keys.message(0, 1, 1), time.monotonic() - 59))
    store.set(keys.message(0, 1, 1), store.get(keys.message(0, 1, 0)))
    sender.expire_data()
    sender.expire_data()
    with pytest.raises(MessageExpiredError):
        receiver.recv_obj(0)
    assert receiver.recv_obj(0) == "old"


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_message_that_was_read_expires_without_a_trace(size):
    store = HashStore()
    sender, receiver = groups_on(store, 2)
    empty = store.num_keys()
    sender.send_obj(bytes(size), 1)
    receiver.recv_obj(0)
    age(sender, 3601)
    sender.expire_data()
    assert not sender.entries
    assert store.num_keys() == empty


# A broadcast expires when one of its three readers has read it: each of the others is told so, at
# once, and all get the next one. The store keeps nothing of it.


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_broadcast_that_expired(size):
    store = HashStore()
    source, *readers = groups_on(store, 4)
    empty = store.num_keys()
    source.broadcast_obj(bytes(size), 0)
    readers[0].broadcast_obj(None, 0)
    age(source, 3601)
    source.broadcast_obj("next", 0)
    for reader in readers[1:]:
        with pytest.raises(MessageExpiredError, match="expired unread after 3600 s"):
            reader.broadcast_obj(None, 0, timeout=30)
    assert [reader.broadcast_obj(None, 0) for reader in readers] == ["next"] * 3
    assert store.num_keys() == empty


# The same between processes: rank 1 waits for nothing, and is told at once.


def _expire_between_processes(here):
    with here.group(data_expiration_seconds=1) as group:
        if here.rank == 0:
            group.send_obj("old", 1)
            age(group, 2)
            group.expire_data()
            here.tell("expired")
            group.send_obj("new", 1)
            return None
        here.ask("expired")
        start = time.monotonic()
        with pytest.raises(MessageExpiredError, match="expired unread after 1 s"):
            group.recv_obj(0)
        return time.monotonic() - start, group.recv_obj(0)


def test_expiry_between_processes():
    seconds, message = run_ranks(_expire_between_processes, 2)[1]
    assert seconds < SLACK
    assert message == "new"


# The store holds as many keys after 1000 rounds as after 10, whatever the round.


def _exchange(group, what):
    successor, predecessor = (group.rank + 1) % 3, (group.rank - 1) % 3
    if what == "message":
        group.send_obj(what, successor)
        group.recv_obj(predecessor)
    elif what == "broadcast":
        for source in range(3):
            group.broadcast_obj(what, source)
    else:
        group.all_gather_obj(what)


def _count_keys(here, what):
    with here.group() as group:
        counts = []
        for rounds in (10, 990):
            for _ in range(rounds):
                _exchange(group, what)
            counts.append(here.count_keys(group))
        return counts


@pytest.mark.parametrize("what", ["message", "broadcast", "gather"])
def test_exchanges_leave_nothing_behind(what):
    for after_10, after_1000 in run_ranks(_count_keys, 3, what):
        assert after_10 == after_1000


# Garbage where a message should be: an error that shows it, and the next message arrives.


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        ("", "holds b'', which no rank of refdist writes"),
        ("garbage", "holds b'garbage', which no rank of refdist writes"),
        ("\x01", "0 bytes do not unpickle"),
        ("\x01garbage", "7 bytes do not unpickle"),
        ("\x02", "holds .*, which no rank of refdist writes"),
        ("\x02-1", "holds .*, which no rank of refdist writes"),
        ("\x023", "expired while it was read"),
        ("\x04a reason", "a reason"),
    ],
)
def test_garbage(garbage, message):
    store = HashStore()
    zero, one = groups_on(store, 2)
    empty = store.num_keys()
    store.set(keys.message(0, 1, 0), garbage)
    with pytest.raises(MessageError, match=f"^message/0/1/0: {message}"):
        one.recv_obj(0)
    store.set(keys.broadcast(0, 0), garbage)
    with pytest.raises(MessageError, match=f"^broadcast/0/0: {message}"):
        one.broadcast_obj(None, 0)
    store.set(keys.gathered(0, 0), garbage)
    with pytest.raises(MessageError, match=f"^gather/0/0: {message}"):
        one.all_gather_obj(None)
    zero.send_dst_counter[1] = zero.broadcast_send_counter = 1
    zero.send_obj("next", 1)
    zero.broadcast_obj("next", 0)
    assert one.recv_obj(0) == one.broadcast_obj(None, 0) == "next"
    for key in (keys.gathered(0, 0), keys.gathered(0, 1)):
        store.delete_key(key)
    assert store.num_keys() == empty


# Ranks that are none of the group, or make no sense.


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda g: g.send_obj(0, 3), "dst=3: must be in 0..2 (world_size=3)"),
        (lambda g: g.send_obj(0, -1), "dst=-1: must be in 0..2 (world_size=3)"),
        (lambda g: g.send_obj(0, 1), "dst=1: is this rank itself; it must be another one"),
        (lambda g: g.recv_obj(3), "src=3: must be in 0..2 (world_size=3)"),
        (lambda g: g.recv_obj(-1), "src=-1: must be in 0..2 (world_size=3)"),
        (lambda g: g.recv_obj(1), "src=1: is this rank itself; it must be another one"),
        (lambda g: g.broadcast_obj(0, 3), "src=3: must be in 0..2 (world_size=3)"),
        (lambda g: g.broadcast_obj(0, -1), "src=-1: must be in 0..2 (world_size=3)"),
        (lambda g: g.recv_obj(0, timeout=-1), "timeout=-1: must be finite seconds, at least 0"),
        (lambda g: g.send(torch.ones(1), 1), "dst=1: is this rank itself"),
        (lambda g: g.recv(torch.ones(1), 1), "src=1: is this rank itself"),
        (lambda g: g.broadcast(torch.ones(1), 3), "src=3: must be in 0..2 (world_size=3)"),
        (lambda g: g.all_reduce(torch.ones(1), "sum"), "op=sum: must be ReduceOp.SUM, PRODUCT"),
        (lambda g: g.all_reduce(torch.ones(1), ReduceOp.BAND), "must be ReduceOp.SUM, PRODUCT"),
        (lambda g: g.send(torch.ones(1, device="meta"), 0), "tensor on meta: this group carries"),
        (lambda g: g.recv(torch.ones(1, device="meta"), 0), "tensor on meta: this group carries"),
        (lambda g: g.broadcast(torch.ones(1, device="meta"), 0), "tensor on meta: this group"),
        (lambda g: g.broadcast(torch.ones(1, device="meta"), 1), "tensor on meta: this group"),
        (lambda g: g.all_reduce(torch.ones(1, device="meta")), "tensor on meta: this group"),
    ],
)
def test_bad_input(use, message):
    store = HashStore()
    group = StatelessProcessGroup(1, 3, store)
    with pytest.raises(ValueError, match=re.escape(message)):
        use(group)
    assert store.num_keys() == 0
    assert group.send_dst_counter == group.recv_src_counter == {0: 0, 1: 0, 2: 0}


# The store ends while a rank waits: it is told so, long before the timeout.


def _lose_the_store(here):
    group = here.group()
    if here.rank == 0:
        here.ask("process of rank 1 is ready")
        group.close(timeout=0)
        return None
    here.tell("process of rank 1 is ready")
    start = time.monotonic()
    with pytest.raises(StoreConnectionError, match="recv_obj: rank 1 lost the store that rank 0"):
        group.recv_obj(0, timeout=60)
    return time.monotonic() - start


def test_a_store_that_ends():
    assert run_ranks(_lose_the_store, 2)[1] < 1 + 2 * SLACK


# Tensors.


def _tensors(here):
    with here.group() as group:
        size = here.world_size
        successor, predecessor = (here.rank + 1) % size, (here.rank - 1) % size
        mine = torch.full((2, 3), float(here.rank), dtype=torch.float64)
        group.send(mine, successor)
        place = torch.empty(2, 3, dtype=torch.float64)
        assert group.recv(place, predecessor) is place
        seen = [place.tolist()]
        for source in range(size):
            tensor = torch.full((3,), here.rank, dtype=torch.int16)
            assert group.broadcast(tensor, source) is tensor
            seen.append(tensor.tolist())
        reduced = group.all_reduce(mine)
        assert mine.tolist() == [[here.rank] * 3] * 2 and reduced is not mine
        return [*seen, reduced.tolist()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_send_broadcast_and_reduce_tensors(world_size):
    for rank, (received, *broadcasts, reduced) in enumerate(run_ranks(_tensors, world_size)):
        assert received == [[(rank - 1) % world_size] * 3] * 2
        assert broadcasts == [[source] * 3 for source in range(world_size)]
        assert reduced == [[sum(range(world_size))] * 3] * 2


def test_tensors_of_a_group_of_one():
    (group,) = groups_on(HashStore(), 1)
    tensor = torch.tensor([1, 2])
    assert group.broadcast(tensor, 0) is tensor
    reduced = group.all_reduce(tensor)
    reduced[0] = 5
    assert tensor.tolist() == [1, 2]


# Each operation, for dtypes of each kind, equals torch's own on the stacked tensors.

OPERATIONS = [
    (ReduceOp.SUM, lambda stacked: stacked.sum(0, dtype=stacked.dtype)),
    (ReduceOp.PRODUCT, lambda stacked: stacked.prod(0, dtype=stacked.dtype)),
    (ReduceOp.MIN, lambda stacked: stacked.amin(0)),
    (ReduceOp.MAX, lambda stacked: stacked.amax(0)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def _tensor_of(rank, dtype, shape):
    # small integers: exact in every dtype, and so is their sum and product
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * (rank + 1)) % 4 + 1).reshape(shape).to(dtype)


def _reduce_all(here):
    results = []
    with here.group() as group:
        for dtype in DTYPES:
            for shape in [(), (5,), (0, 2), (2, 3, 2)]:
                for op, _ in OPERATIONS:
                    reduced = group.all_reduce(_tensor_of(here.rank, dtype, shape), op=op)
                    results.append((str(reduced.dtype), tuple(reduced.shape), reduced.tolist()))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_reduction(world_size):
    expected = []
    for dtype in DTYPES:
        for shape in [(), (5,), (0, 2), (2, 3, 2)]:
            stacked = torch.stack([_tensor_of(r, dtype, shape) for r in range(world_size)])
            for _, oracle in OPERATIONS:
                expected.append((str(dtype), shape, oracle(stacked).tolist()))
    assert run_ranks(_reduce_all, world_size) == [expected] * world_size


# Sums of floating-point numbers depend on their order; every rank gets the same bits.


def _reduce_noise(here):
    torch.manual_seed(here.rank)
    noise = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    with here.group() as group:
        return group.all_reduce(noise).numpy().tobytes()


def test_reductions_are_bitwise_the_same_on_all_ranks():
    results = run_ranks(_reduce_noise, 4)
    assert len(results[0]) == 4000
    assert results == [results[0]] * 4


# A view of a large storage travels as what it shows.
def test_views_travel_small():
    store = HashStore()
    zero, one = groups_on(store, 2)
    view = torch.arange(2**17, dtype=torch.int64).reshape(128, 1024).t()[5, :8]
    assert view.untyped_storage().nbytes() == 2**20 < CHUNK_BYTES
    zero.send(view, 1)
    zero.broadcast(view, 0)
    for key in (keys.message(0, 1, 0), keys.broadcast(0, 0)):
        assert len(store.get(key)) < 4096
    expected = [5 + 1024 * row for row in range(8)]
    place = torch.zeros(1024, dtype=torch.int64)[::128]
    assert one.recv(place, 0).tolist() == place.tolist() == expected
    assert one.broadcast(torch.zeros(8, dtype=torch.int64), 0).tolist() == expected


def test_tensors_that_need_gradients():
    zero, one = groups_on(HashStore(), 2)
    zero.send(torch.tensor([1.0, 2.0], requires_grad=True) * 2, 1)
    place = torch.zeros(2, requires_grad=True)
    assert one.recv(place, 0).tolist() == [2.0, 4.0]
    assert place.requires_grad and place.grad_fn is None


# Tensors that differ: an error that shows both, and the next one arrives.


@pytest.mark.parametrize(
    ("sent", "place", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            "from rank 0 came a tensor of shape (2, 3) and torch.float32, "
            "but here it has shape (3, 2) and torch.float32",
        ),
        (
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(2),
            "from rank 0 came a tensor of shape (2,) and torch.int32, "
            "but here it has shape (2,) and torch.float32",
        ),
    ],
)
def test_tensors_that_differ(sent, place, message):
    zero, one = groups_on(HashStore(), 2)
    zero.send(sent, 1)
    zero.broadcast(sent, 0)
    for receive in (one.recv, one.broadcast):
        with pytest.raises(MessageError, match=f"^{re.escape(message)}$"):
            receive(place, 0)
    assert not place.any()
    zero.send(place + 1, 1)
    zero.broadcast(place + 1, 0)
    assert torch.equal(one.recv(place, 0), place)
    assert place.all()
    place.zero_()
    assert one.broadcast(place, 0).all()


def test_a_tensor_was_expected():
    zero, one = groups_on(HashStore(), 2)
    zero.send_obj("text", 1)
    with pytest.raises(MessageError, match="from rank 0 came a str, not a tensor"):
        one.recv(torch.zeros(1), 0)


def _reduce_different(here):
    with here.group() as group:
        shape = (2,) if here.rank == 1 else (3,)
        with pytest.raises(MessageError) as caught:
            group.all_reduce(torch.zeros(shape))
        return str(caught.value), group.all_reduce(torch.ones(1)).tolist()


def test_reduction_of_tensors_that_differ():
    (first, next_0), (second, next_1) = run_ranks(_reduce_different, 2)
    assert "from rank 1 came a tensor of shape (2,)" in first and "here it has shape (3,)" in first
    assert "from rank 0 came a tensor of shape (3,)" in second
    assert next_0 == next_1 == [2.0]
