"""Objects and tensors between ranks: order, size, failure, expiry, and what stays in the store."""

import hashlib
import os
import pickle
import re
import resource
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from ranks import LOCAL, Watched, run_ranks, run_threads
from torch.distributed import HashStore, PrefixStore, ReduceOp

from refdist import (
    BarrierError,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.barrier import barrier_of
from refdist.objects.encoding import CHUNK_BYTES, MAX_BYTES, encode
from refdist.store import keys
from refdist.store.client import StoreClient

SLACK = 6.0
MIB = 2**20
UNPICKLABLE = threading.Lock()

# What a group may stand on: either server of TCPStore, and a store in memory.
SERVERS = ["libuv", "legacy"]
STORES = [*SERVERS, "hash"]


def _serves(use_libuv):
    """Whether this torch can serve on a socket that was bound before with this kind of server."""
    try:
        create_tcp_store(LOCAL, 0, is_master=True, use_libuv=use_libuv)
    except NotImplementedError:
        return False
    return True


def skip_unless_there_is(kind):
    if kind == "libuv" and not _serves(True):
        pytest.skip("this torch cannot serve on a bound socket with libuv")


@pytest.fixture
def kind(request):
    skip_unless_there_is(request.param)
    return request.param


@pytest.fixture(params=STORES)
def store(request):
    """A store of this process, of each kind."""
    skip_unless_there_is(request.param)
    if request.param == "hash":
        return HashStore()
    return create_tcp_store(LOCAL, 0, is_master=True, use_libuv=request.param == "libuv")


def group_on(here, kind, **options):
    """A group of all ranks, on a server of this kind."""
    store = here.store(f"store/{kind}", use_libuv=kind == "libuv")
    return StatelessProcessGroup(here.rank, here.world_size, store, **options)


def watched_group_on(here, kind, before, **options):
    """A group of all ranks on a server of this kind, and a second one, whose requests are seen."""
    group = group_on(here, kind)
    return group, here.watched_group(group, before, **options)


def groups_on(store, world_size, **options):
    """A group for each rank, all in this process: sending does not wait for the receiver."""
    return [StatelessProcessGroup(rank, world_size, store, **options) for rank in range(world_size)]


def count_keys(here, group, *others):
    """How many keys the store of a group holds, without ``all_left`` of the last barrier.

    The last rank to leave writes that, unless it is rank 0. ``others`` are on the same store.
    """
    count = here.count_keys(group)
    for each in (group, *others):
        last = keys.PlainKeys.of(each._barrier.tries - 1)
        count -= each.store.check([last.all_left])
    return count


def age(group, seconds):
    """Make everything that a rank has sent older."""
    entries = [(key, written - seconds) for key, written in group.entries]
    group.entries.clear()
    group.entries.extend(entries)


each_server = pytest.mark.parametrize("kind", SERVERS, indirect=True)


# Rank 0 sends, rank 1 receives in the same order, and answers. Every tenth message is large.


def _numbered(number):
    return number, bytes(number % 10 == 9 and CHUNK_BYTES + number)


def _send_in_order(here, kind):
    with group_on(here, kind) as group:
        other = 1 - here.rank
        if here.rank == 0:
            for number in range(100):
                group.send_obj(_numbered(number), other)
            return [group.recv_obj(other) for _ in range(100)]
        received = [group.recv_obj(other) for _ in range(100)]
        for obj in received:
            group.send_obj(("back", obj[0]), other)
        return [number for number, _ in received if received[number] == _numbered(number)]


@each_server
def test_messages_keep_their_order(kind):
    answers, received = run_ranks(_send_in_order, 2, kind)
    assert received == list(range(100))
    assert answers == [("back", number) for number in range(100)]


# Everyone sends to everyone else; what comes from a rank is what that rank sent.


def _send_to_all(here, kind):
    with group_on(here, kind) as group:
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


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("libuv", 2), ("libuv", 4), ("legacy", 3)],
    indirect=["kind"],
)
def test_senders_to_one_receiver_do_not_mix(kind, world_size):
    for rank, received in enumerate(run_ranks(_send_to_all, world_size, kind)):
        assert len(received) == world_size - 1
        for source, found in received.items():
            assert found == [(source, rank, number) for number in range(20)]


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
    32 * MIB,
]


def _digest(obj):
    return len(obj), hashlib.blake2b(obj).hexdigest()


def _send_sizes(here, kind):
    seen = []
    with group_on(here, kind) as group:
        for _ in range(6):
            group.all_gather_obj(None)  # every key of the barriers is there from now on
        before = count_keys(here, group)
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
        assert count_keys(here, group) == before
    return seen


@each_server
def test_every_size_arrives_whole(kind):
    first, *others = run_ranks(_send_sizes, 3, kind, deadline=90)
    assert [size for size, _ in first[: len(SIZES)]] == SIZES
    assert others == [first, first]


# The same for 256 MiB, which neither side copies into a pickle.


def _send_256_mib(here, kind):
    with group_on(here, kind) as group:
        before = count_keys(here, group)
        if here.rank == 0:
            torch.manual_seed(7)
            tensor = torch.empty(32 * MIB, dtype=torch.int64).random_()
            group.send_obj(tensor, 1)
        else:
            tensor = group.recv_obj(0)
        assert count_keys(here, group) == before
        return tensor.nbytes, hashlib.blake2b(tensor.numpy()).hexdigest()


@pytest.mark.parametrize("kind", ["libuv", "legacy"], indirect=True)
def test_256_mib_arrive_whole(kind):
    sent, received = run_ranks(_send_256_mib, 2, kind, deadline=90)
    assert sent[0] == 256 * MIB
    assert received == sent


# More than 4 GiB, though all of it is the same memory: refused before anything is sent.
def test_an_object_that_is_too_large():
    store = HashStore()
    zero, one = groups_on(store, 2)
    memory = torch.zeros(64 * MIB, dtype=torch.uint8)
    obj = [memory.view(-1) for _ in range(65)]
    for refuse in (lambda: zero.send_obj(obj, 1), lambda: zero.broadcast_obj(obj, 0)):
        with pytest.raises(ValueError, match=r"object of \d+ bytes: a group carries at most 4294"):
            refuse()
    assert store.num_keys() == 0
    zero.send_obj("next", 1)
    zero.broadcast_obj("next", 0)
    assert one.recv_obj(0) == one.broadcast_obj(None, 0) == "next"


def test_a_large_message_travels_in_chunks(store):
    sender, receiver = groups_on(store, 2)
    sender.send_obj(bytes(2 * CHUNK_BYTES), 1)
    chunks = [keys.message(0, 1, 0).chunk(index) for index in range(3)]
    # a byte more says what follows
    assert all(len(store.get(name)) <= CHUNK_BYTES + 1 for name in chunks)
    assert store.num_keys() == 4
    assert receiver.recv_obj(0) == bytes(2 * CHUNK_BYTES)
    assert store.num_keys() == 0
    sender.broadcast_obj(bytes(2 * CHUNK_BYTES), 0)
    its = keys.broadcast(0, 0)
    assert all(len(store.get(its.chunk(index))) <= CHUNK_BYTES + 1 for index in range(3))
    assert store.num_keys() == 4
    assert receiver.broadcast_obj(None, 0) == bytes(2 * CHUNK_BYTES)
    # until the next barrier
    assert store.check([its.own, its.readers])
    assert store.num_keys() == 2


# What is exactly as long as so many chunks, or a byte shorter or longer: all of it pickle, or most
# of it the memory of several tensors.


def _as_long_as(size, tensors):
    if not tensors:
        overhead = sum(part.nbytes for part in encode(bytes(size)).parts) or len(
            encode(bytes(size)).value[1:]
        )
        return os.urandom(2 * size - overhead)
    each = torch.randint(255, (size // (tensors + 1),), dtype=torch.uint8)
    last = size - sum(part.nbytes for part in encode([each.clone()] * tensors).parts)
    while True:
        obj = [each + number for number in range(tensors - 1)]
        obj.append(torch.randint(255, (last,), dtype=torch.uint8))
        excess = sum(part.nbytes for part in encode(obj).parts) - size
        if excess == 0:
            return obj
        last -= excess


@pytest.mark.parametrize("tensors", [0, 1, 3])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_the_boundaries_of_chunks(tensors, chunks, excess):
    store = HashStore()
    zero, one = groups_on(store, 2)
    size = chunks * CHUNK_BYTES + excess
    payload = _as_long_as(size, tensors)
    encoded = encode(payload)
    assert size == sum(part.nbytes for part in encoded.parts) or size == len(encoded.value) - 1
    zero.send_obj(payload, 1)
    parts = chunks + (excess == 1)
    assert store.num_keys() == (1 if parts == 1 and len(encoded.parts) == 0 else 1 + parts)
    received = one.recv_obj(0)
    assert store.num_keys() == 0
    if not tensors:
        assert received == payload
    else:
        assert all(torch.equal(*pair) for pair in zip(received, payload, strict=True))


# Objects: values, exceptions, classes.


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is Point and other.x == self.x

    __hash__ = None


OBJECTS = [None, False, 0, "", "text", b"bytes", [1, [2]], {"a": (1, 2)}, {1, 2}, Point(3), Point]


@pytest.mark.parametrize(
    "obj", OBJECTS, ids=lambda obj: getattr(obj, "__name__", type(obj).__name__)
)
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


# Tensors of every kind, in and out of the pickle, arrive as a pickle's copy of them is: the same
# values, dtypes, strides and sharing. The receiver may write to them, and the sender does not see.


def _shared(n):
    base = torch.randn(n, n)
    return [base, base[1:], base]


TENSORS = {
    "contiguous": lambda n: torch.randn(n, n),
    "transposed": lambda n: torch.randn(n, n + 1).t(),
    "a view": lambda n: torch.randn(n, n)[1:, ::2],
    "expanded": lambda n: torch.randn(n, 1).expand(n, n),
    "channels last": lambda n: torch.randn(1, 2, n, n).to(memory_format=torch.channels_last),
    "empty": lambda n: [torch.empty(0), torch.empty(n, 0)],
    "many small": lambda n: [torch.tensor([number]) for number in range(10 * n)],
    "bfloat16": lambda n: torch.randn(n, n).bfloat16(),
    "bool": lambda n: torch.randn(n, n) > 0,
    "complex": lambda n: torch.randn(n, n, dtype=torch.complex64),
    "conjugate": lambda n: torch.randn(n, n, dtype=torch.complex64).conj(),
    "requires_grad": lambda n: torch.randn(n, n, requires_grad=True),
    "parameter": lambda n: torch.nn.Parameter(torch.randn(n, n), requires_grad=False),
    "dict": lambda n: {"a": torch.randn(n), "b": {"c": torch.arange(n * n), "d": "text"}},
    "module": lambda n: torch.nn.Linear(n, n),
    "shared storage": _shared,
    "sparse": lambda n: (torch.randn(n, n) > 1).float().to_sparse(),
    "meta": lambda n: torch.empty(n, n, device="meta"),
}
if hasattr(torch, "quantize_per_tensor"):
    TENSORS["quantized"] = lambda n: torch.quantize_per_tensor(
        torch.randn(n, n), 0.1, 3, torch.qint8
    )


def _tensors_in(obj):
    if isinstance(obj, torch.Tensor):
        return [obj]
    if isinstance(obj, torch.nn.Module):
        return list(obj.parameters())
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list) else []
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _describe(tensor):
    strides = None if tensor.is_sparse else tensor.stride()
    kind = type(tensor), tensor.dtype, tensor.shape, tensor.layout, tensor.device, tensor.is_conj()
    return kind, strides, tensor.requires_grad, tensor.is_quantized


def _values(tensor):
    if tensor.is_meta:
        return None
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.detach().to_dense().resolve_conj().tolist()


def _memories(tensors):
    """For each tensor, the first that has its memory."""
    places = [None if t.is_sparse or t.is_meta else t.untyped_storage().data_ptr() for t in tensors]
    return [places.index(place) for place in places]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("n", [5, 300], ids=["small", "large"])
@pytest.mark.parametrize("name", list(TENSORS))
def test_tensors_arrive_as_a_pickle_would_bring_them(name, n):
    zero, one = groups_on(HashStore(), 2)
    sent = TENSORS[name](n)
    expected = _tensors_in(pickle.loads(pickle.dumps(sent)))
    zero.send_obj(sent, 1)
    zero.broadcast_obj(sent, 0)
    before = list(map(_values, _tensors_in(sent)))
    for received in (one.recv_obj(0), one.broadcast_obj(None, 0)):
        found = _tensors_in(received)
        assert list(map(_describe, found)) == list(map(_describe, expected))
        assert list(map(_values, found)) == list(map(_values, expected)) == before
        assert _memories(found) == _memories(expected)
        for tensor in found:
            if not (tensor.is_meta or tensor.is_quantized or name == "expanded"):
                tensor.detach().zero_()
    assert list(map(_values, _tensors_in(sent))) == before


# The sender writes to a tensor as soon as it is sent: the receiver gets what it was.
@pytest.mark.parametrize("n", [5, 300], ids=["small", "large"])
def test_a_sender_may_change_what_it_has_sent(store, n):
    zero, one = groups_on(store, 2)
    tensor = torch.ones(n, n)
    zero.send_obj(tensor, 1)
    zero.broadcast_obj(tensor, 0)
    tensor.zero_()
    assert one.recv_obj(0).sum() == one.broadcast_obj(None, 0).sum() == n * n


@pytest.mark.parametrize("n", [5, 300], ids=["small", "large"])
def test_arrays_arrive_equal_and_writable(n):
    numpy = pytest.importorskip("numpy")
    zero, one = groups_on(HashStore(), 2)
    array = numpy.arange(n * n, dtype=numpy.float64).reshape(n, n)
    sent = [array, array.T, array[::2, 1:], numpy.empty(0), numpy.array(["text", None])]
    zero.send_obj(sent, 1)
    received = one.recv_obj(0)
    for ours, theirs in zip(received, sent, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.flags.writeable
        assert numpy.array_equal(ours, theirs)
    received[0][:] = 0
    assert array.any() and received[1].any()


# Everyone gets the object of the source, whichever rank that is; a source in a hurry is not lost.
# Every object of the last round is large.


def _broadcast_from_each(here, kind):
    with group_on(here, kind) as group:
        received = []
        for number in range(5):
            for source in range(here.world_size):
                obj = (source, number, bytes(number == 4 and 3 * CHUNK_BYTES))
                obj = group.broadcast_obj(obj if here.rank == source else "ignored", source)
                assert obj[2] == bytes(number == 4 and 3 * CHUNK_BYTES)
                received.append(obj[:2])
        return received


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("libuv", 1), ("libuv", 3), ("legacy", 3)],
    indirect=["kind"],
)
def test_broadcast_from_each_rank(kind, world_size):
    expected = [(source, number) for number in range(5) for source in range(world_size)]
    assert run_ranks(_broadcast_from_each, world_size, kind) == [expected] * world_size


# A reader waits for the end of a large broadcast while another one looks whether it is there. That
# other one wakes the first on the libuv server of TCPStore, which must go on waiting.


@pytest.mark.parametrize("libuv", [True, False], ids=["libuv", "legacy"])
def test_a_reader_is_not_disturbed_by_another(libuv):
    if not _serves(libuv):
        pytest.skip("this torch cannot serve on a bound socket with libuv")
    server = create_tcp_store(LOCAL, 0, is_master=True, use_libuv=libuv)
    end = keys.broadcast(0, 0).chunk(3)
    waits, looked = threading.Event(), threading.Event()

    def write_late(request, *arguments):
        if request == "set" and arguments[0] == end:
            looked.wait(SLACK)

    def say_so(request, *arguments):
        if request == "wait" and arguments[0] == [end]:
            waits.set()

    def take_part(rank):
        store = create_tcp_store(LOCAL, server.port, use_libuv=libuv)
        if rank == 2:
            waits.wait(SLACK)
            client = StoreClient(store)
            for _ in range(300):
                client.peek(end)
            looked.set()
        else:
            watched = Watched(store, say_so if rank else write_late)
            group = StatelessProcessGroup(rank, 3, watched)
            return len(group.broadcast_obj(None if rank else bytes(4 * CHUNK_BYTES - 99), 0))

    assert run_threads(take_part, 3)[:2] == [4 * CHUNK_BYTES - 99] * 2


def test_a_source_does_not_wait_for_the_readers_of_a_broadcast(store):
    zero, one, two = groups_on(store, 3)
    for number in range(3):
        zero.broadcast_obj(number, 0)
    assert [one.broadcast_obj(None, 0) for _ in range(3)] == [0, 1, 2]
    assert [two.broadcast_obj(None, 0) for _ in range(3)] == [0, 1, 2]


# A broadcast stays until all ranks that have received it come to a barrier or gather, and then all
# of it is gone. Rank 2 gives up before it is there, and receives it after the next barrier.


def _broadcast_and_meet(here, kind, plain, size):
    group = group_on(here, kind)
    if plain:
        group = here.watched_group(group, lambda *_: None)
    for _ in range(6):
        group.barrier()  # every key of the barriers is there from now on
    counts, received = [count_keys(here, group)], []

    def receive():
        for obj in (bytes(size), "next"):
            received.append(group.broadcast_obj(obj if here.rank == 0 else None, 0, timeout=20))

    for name, meet in {"barrier": group.barrier, "gather": lambda: group.all_gather_obj(0)}.items():
        if here.rank == 2:
            with pytest.raises(MessageTimeoutError):
                group.broadcast_obj(None, 0, timeout=0.1)
        here.meet(f"rank 2 gave up before a {name}")
        if here.rank != 2:
            receive()
        counts.append(count_keys(here, group))
        meet()
        counts.append(count_keys(here, group))
        if here.rank == 2:
            receive()
        counts.append(count_keys(here, group))
        # of another source, in the same barrier
        received.append(group.broadcast_obj(("last", here.rank), 1, timeout=20))
        counts.append(count_keys(here, group))
        meet()
        counts.append(count_keys(here, group))
    group.close()
    return received, [count - counts[0] for count in counts[1:]]


@each_server
@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_broadcast_stays_until_all_have_received_it(kind, plain, size):
    large = size > CHUNK_BYTES
    chunks, readers = 3 * large, int(large)
    expected = [2 + chunks + readers] * 2 + [2 + readers, 3 + readers, 0]
    for received, counts in run_ranks(_broadcast_and_meet, 3, kind, plain, size):
        assert received == [bytes(size), "next", ("last", 1)] * 2
        assert counts == expected * 2


# Each request costs time: a broadcast is one for its source, however many read it.
def test_requests_of_messages_and_broadcasts():
    store = HashStore()
    seen = []
    groups = [
        StatelessProcessGroup(rank, 4, Watched(store, lambda request, *_: seen.append(request)))
        for rank in range(4)
    ]

    def requests(call):
        seen.clear()
        call()
        return seen.copy()

    for _ in range(3):
        assert requests(lambda: groups[0].send_obj("obj", 1)) == ["set"]
        assert requests(lambda: groups[1].recv_obj(0)) == ["wait", "compare_set", "delete_key"]
        assert requests(lambda: groups[0].broadcast_obj("obj", 0)) == ["set"]
        for reader in groups[1:]:
            assert requests(lambda: reader.broadcast_obj(None, 0)) == ["wait", "compare_set"]  # noqa: B023


# Gathers: everyone gets the objects in rank order, and at its own place its own.


def _gather(here, kind):
    with group_on(here, kind) as group:
        own = [here.rank]
        gathered = group.all_gather_obj(own)
        assert gathered[here.rank] is own
        return [gathered] + [group.all_gather_obj((here.rank, n)) for n in range(20)]


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("libuv", 1), ("libuv", 4), ("legacy", 4)],
    indirect=["kind"],
)
def test_gather_is_in_rank_order(kind, world_size):
    for first, *others in run_ranks(_gather, world_size, kind):
        assert first == [[rank] for rank in range(world_size)]
        for number, gathered in enumerate(others):
            assert gathered == [(rank, number) for rank in range(world_size)]


# Every other rank gives 5 MiB. Everyone gets all of it, and afterwards no key of it is left, nor of
# the gather before, which rank 0 gave up.


def _gather_large(here, kind):
    with group_on(here, kind) as group:
        for _ in range(6):
            group.all_gather_obj(None)  # every key of the barriers is there from now on
        before = count_keys(here, group)
        own = bytes([here.rank]) * (here.rank % 2 and 5 * MIB)
        if here.rank == 2:
            here.ask("rank 0 gave up")
        with pytest.raises(MessageTimeoutError) as caught:
            group.all_gather_obj(own, timeout=1.5 if here.rank == 0 else 30)
        if here.rank == 0:
            here.tell("rank 0 gave up")
        seen = [[_digest(obj) for obj in group.all_gather_obj(own)] for _ in range(2)]
        for _ in range(6):
            group.all_gather_obj(None)
        return caught.value.missing, seen, count_keys(here, group) - before


@each_server
def test_large_objects_are_gathered(kind):
    expected = [_digest(bytes([rank]) * (rank % 2 and 5 * MIB)) for rank in range(4)]
    for missing, seen, more in run_ranks(_gather_large, 4, kind):
        assert missing == (2,)
        assert seen == [expected] * 2
        assert more == 0


# An object that cannot be pickled: the sender gets pickle's error, its counter does not move, and
# the receiver gets the next message.


def test_send_of_an_unpicklable_object(store):
    zero, one = groups_on(store, 2)
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
# gather works. So it is where the others give large objects.


def _gather_unpicklable(here, size):
    with here.group() as group:
        for _ in range(6):
            group.all_gather_obj(None)
        before = count_keys(here, group)
        with pytest.raises((TypeError, MessageError)) as caught:
            group.all_gather_obj(UNPICKLABLE if here.rank == 1 else bytes(size))
        after = group.all_gather_obj(here.rank)
        return type(caught.value), str(caught.value), after, count_keys(here, group) - before


@pytest.mark.parametrize(("world_size", "size"), [(2, 10), (4, 2 * CHUNK_BYTES)])
def test_gather_of_an_unpicklable_object(world_size, size):
    results = run_ranks(_gather_unpicklable, world_size, size)
    for rank, (kind, text, after, more) in enumerate(results):
        if rank == 1:
            assert kind is TypeError and "cannot pickle" in text
        else:
            assert kind is MessageError
            assert re.match(r"gather \d+: rank 1: had no object to give: .*cannot pickle", text)
        assert after == list(range(world_size))
        assert more == 0


# An object that cannot be unpickled: whoever gets it raises MessageError, and the next one comes.


class _Unreadable:
    def __reduce__(self):
        return int, ("not a number",)


def _gather_unreadable(here):
    with here.group() as group:
        try:
            group.all_gather_obj(_Unreadable() if here.rank == 1 else here.rank)
            text = ""
        except MessageError as error:
            text = str(error)
        return text, group.all_gather_obj(here.rank)


def test_an_object_that_does_not_unpickle(store):
    zero, one = groups_on(store, 2)
    zero.send_obj(_Unreadable(), 1)
    zero.send_obj("next", 1)
    with pytest.raises(
        MessageError, match=r"^message/0/1/0: \d+ bytes do not unpickle: ValueError"
    ):
        one.recv_obj(0)
    assert one.recv_obj(0) == "next"


def test_gather_of_an_object_that_does_not_unpickle():
    for rank, (text, after) in enumerate(run_ranks(_gather_unreadable, 3)):
        assert after == [0, 1, 2]
        assert rank == 1 or re.match(
            r"gather \d+: rank 1: \d+ bytes do not unpickle: ValueError", text
        )


# Ranks 1 and 2 pass a barrier where the others gather. The gathering ranks raise an error that
# names both, and the next gather works.


def _gather_and_barrier(here, kind, size):
    with group_on(here, kind) as group:
        if here.rank in (1, 2):
            group.barrier(timeout=30)
            text = None
        else:
            with pytest.raises(MessageError) as caught:
                group.all_gather_obj(bytes(size), timeout=30)
            text = str(caught.value)
        group.barrier(timeout=30)
        return text, group.all_gather_obj(here.rank)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("libuv", 10), ("libuv", 2 * CHUNK_BYTES), ("legacy", 10)],
    indirect=["kind"],
)
def test_a_barrier_where_others_gather(kind, size):
    for rank, (text, after) in enumerate(run_ranks(_gather_and_barrier, 4, kind, size)):
        assert after == [0, 1, 2, 3]
        if rank in (0, 3):
            assert "ranks 1 and 2 brought nothing; did another rank call barrier" in text


# Nothing comes in time: an error that says who was waited for and how long. The next call gets what
# comes later.


def _receive_too_early(here, kind):
    with group_on(here, kind) as group:
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


@each_server
def test_receive_in_vain_then_again(kind):
    (texts, message, broadcast), _ = run_ranks(_receive_too_early, 2, kind)
    for text, box in zip(texts, ["message/1/0/0", "broadcast/1/0"], strict=True):
        expected = rf"{box}: rank 0 waited in vain for this from rank 1: \d\.\d\d of 0\.5 s$"
        assert re.match(expected, text), text
    assert (message, broadcast) == ("late message", "late broadcast")


# A timeout of 0 takes what is there, however slow the store is, and waits for nothing.
def test_receive_without_waiting(store):
    zero, one = groups_on(store, 2)
    for number in range(50):
        zero.send_obj(number, 1)
        assert one.recv_obj(0, timeout=0) == number
    with pytest.raises(MessageTimeoutError, match="message/0/1/50: rank 1 waited in vain for this"):
        one.recv_obj(0, timeout=0)


# The store has 10 MiB to read first: what was sent before is there all the same.
def test_receive_without_waiting_from_a_busy_store(store):
    zero, one = groups_on(store, 2)
    zero.send_obj(bytes(10 * MIB), 1)
    assert one.recv_obj(0, timeout=0) == bytes(10 * MIB)


# The timeout comes while the sender is still in the middle of a large message. The receiver raises,
# and the next call gets the same message.


@pytest.mark.parametrize("broadcast", [False, True], ids=["message", "broadcast"])
def test_a_sender_that_is_slow(store, broadcast):
    its = keys.broadcast(0, 0) if broadcast else keys.message(0, 1, 0)
    timed_out = []

    def before(request, *arguments):
        if request == "set" and arguments[0] == its.chunk(2):
            with pytest.raises(MessageTimeoutError) as caught:
                receive(0.2)
            timed_out.append(str(caught.value))

    def receive(timeout):
        return one.broadcast_obj(None, 0, timeout) if broadcast else one.recv_obj(0, timeout)

    one = StatelessProcessGroup(1, 2, store)
    zero = StatelessProcessGroup(0, 2, Watched(store, before))
    for obj in (bytes(4 * CHUNK_BYTES), "next"):
        if broadcast:
            zero.broadcast_obj(obj, 0)
        else:
            zero.send_obj(obj, 1)
    (text,) = timed_out
    expected = rf"{its.own}: rank 1 waited in vain for the rest from rank 0: \d\.\d\d of 0\.2 s$"
    assert re.match(expected, text), text
    assert receive(SLACK) == bytes(4 * CHUNK_BYTES)
    assert receive(SLACK) == "next"
    # two broadcasts, and the count of the readers of the large one
    assert store.num_keys() == (3 if broadcast else 0)


# A rank is interrupted while it reads a large message, whose end is still to come. The next call
# gets the same message, the one after it the next, and nothing stays.


def _interrupt_a_reader(here, kind, broadcast):
    its = keys.broadcast(0, 0) if broadcast else keys.message(0, 1, 0)
    interrupted = []

    def before(request, *arguments):
        if here.rank == 0 and request == "set" and arguments[0] == its.chunk(2):
            here.ask("interrupted")
        if request == "wait" and arguments[0] == [its.chunk(2)] and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    group, watched = watched_group_on(here, kind, before)
    count = count_keys(here, group)
    sent = [bytes(4 * CHUNK_BYTES), "next"]
    with group:
        if here.rank == 0:
            for obj in sent:
                watched.broadcast_obj(obj, 0) if broadcast else watched.send_obj(obj, 1)
        else:

            def receive():
                return watched.broadcast_obj(None, 0) if broadcast else watched.recv_obj(0)

            with pytest.raises(KeyboardInterrupt):
                receive()
            here.tell("interrupted")
            assert [receive(), receive()] == sent
        # two broadcasts, and the count of the readers of the large one
        assert count_keys(here, group) - count == (3 if broadcast else 0)


@pytest.mark.parametrize(
    ("kind", "broadcast"),
    [("libuv", False), ("legacy", False), ("libuv", True)],
    indirect=["kind"],
)
def test_an_interrupted_reader_of_a_large_message(kind, broadcast):
    run_ranks(_interrupt_a_reader, 2, kind, broadcast)


# Two of four are missing from a gather. Those who came know whom, the late ones raise at once and
# hear the same, and all are in the next one.


def _gather_without_two(here, kind):
    with group_on(here, kind) as group:
        late = here.rank in (1, 3)
        here.meet("start")
        if late:
            here.ask("gave up/0")
            here.ask("gave up/2")
        start = time.monotonic()
        with pytest.raises(MessageTimeoutError) as caught:
            group.all_gather_obj(here.rank, timeout=30 if late else 1)
        seconds = time.monotonic() - start
        if not late:
            here.tell(f"gave up/{here.rank}")
        cause = caught.value.__cause__
        second = group.all_gather_obj(("second", here.rank))
        return str(caught.value), caught.value.missing, cause, seconds, second


@each_server
def test_gather_without_two(kind):
    for rank, result in enumerate(run_ranks(_gather_without_two, 4, kind)):
        text, missing, cause, seconds, second = result
        assert second == [("second", r) for r in range(4)]
        assert missing == (1, 3)
        assert f"all_gather_obj on rank {rank}: barrier 0 was broken in arrival by rank " in text
        assert "missing: ranks 1 and 3 of 4" in text
        assert isinstance(cause, BarrierError) and cause.missing == (1, 3)
        assert seconds < 1 + SLACK


# One rank is late, or in time, by the width of a hair: whoever is in the gather, either all get all
# objects, or all raise; and all are in step afterwards.


def _gather_on_the_edge(here, kind):
    outcomes = []
    with group_on(here, kind) as group:
        for number in range(12):
            here.meet(f"round {number}")
            if here.rank == 1:
                # arrives at about the time at which the others give up
                threading.Event().wait(0.2 + 0.004 * (number - 6))
            try:
                outcomes.append(group.all_gather_obj((here.rank, number), timeout=0.2))
            except MessageTimeoutError as error:
                outcomes.append(error.missing)
        return outcomes, group.all_gather_obj(here.rank)


@pytest.mark.parametrize("kind", ["libuv", "legacy"], indirect=True)
def test_gather_on_the_edge(kind):
    results = run_ranks(_gather_on_the_edge, 3, kind)
    assert all(after == [0, 1, 2] for _, after in results)
    for number, outcomes in enumerate(zip(*(found for found, _ in results), strict=True)):
        everything = [(rank, number) for rank in range(3)]
        raised = [outcome != everything for outcome in outcomes]
        assert all(raised) or not any(raised), outcomes


# Without a timeout, the store's own holds.
def test_the_timeout_of_the_store_is_the_default():
    store = create_tcp_store(LOCAL, 0, is_master=True, timeout=timedelta(seconds=0.5))
    group = StatelessProcessGroup(0, 2, PrefixStore("group", store))
    for receive, text in (
        (lambda: group.recv_obj(1), r"from rank 1: \d\.\d\d of 0\.5 s"),
        (lambda: group.broadcast_obj(None, 1), r"from rank 1: \d\.\d\d of 0\.5 s"),
        (lambda: group.all_gather_obj(0), r"after \d\.\d\d of 0\.5 s.*missing: rank 1 of 2"),
    ):
        with pytest.raises(MessageTimeoutError, match=text):
            receive()


# A message expires before it is read: the receiver is told so at once, and gets the next one. The
# store keeps a note of it, one for each pair of ranks.


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_message_that_expired(store, size):
    sender, receiver = groups_on(store, 2, data_expiration_seconds=60)
    for number in (0, 2):
        sender.send_obj(bytes(size), 1)
        age(sender, 61)
        sender.send_obj("next", 1)  # sending expires what is old
        assert [key for key, _ in sender.entries] == [keys.message(0, 1, number + 1).own]
        start = time.monotonic()
        text = rf"^message/0/1/{number}: expired unread after 60 s"
        with pytest.raises(MessageExpiredError, match=text):
            receiver.recv_obj(0, timeout=30)
        assert time.monotonic() - start < 1 + SLACK
        assert receiver.recv_obj(0) == "next"
        assert store.check([keys.message(0, 1, 0).expired])
        assert store.num_keys() == 1
        # the note is not for what comes next
        with pytest.raises(MessageTimeoutError):
            receiver.recv_obj(0, timeout=0)


def test_expire_data_takes_what_is_old_and_nothing_else(store):
    sender, receiver = groups_on(store, 2, data_expiration_seconds=60)
    sender.send_obj("old", 1)
    age(sender, 2)
    sender.send_obj("young", 1)
    age(sender, 59)
    sender.expire_data()
    sender.expire_data()
    with pytest.raises(MessageExpiredError):
        receiver.recv_obj(0)
    assert receiver.recv_obj(0) == "young"


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_message_that_was_read_expires_without_a_trace(store, size):
    sender, receiver = groups_on(store, 2)
    sender.send_obj(bytes(size), 1)
    receiver.recv_obj(0)
    age(sender, 3601)
    sender.expire_data()
    assert not sender.entries
    assert store.num_keys() == 0


# Time is monotonic: a clock on the wall that is changed by a year expires nothing.
def test_the_clock_on_the_wall_expires_nothing(monkeypatch):
    sender, receiver = groups_on(HashStore(), 2)
    wall = time.time
    sender.send_obj("first", 1)
    monkeypatch.setattr(time, "time", lambda: wall() + 365 * 86400)
    sender.send_obj("second", 1)
    monkeypatch.setattr(time, "time", lambda: wall() - 365 * 86400)
    sender.expire_data()
    assert len(sender.entries) == 2
    assert [receiver.recv_obj(0), receiver.recv_obj(0)] == ["first", "second"]


# A message expires while its receiver reads it, after two of five chunks: the receiver is told so
# at once, and gets the next one.


def _expire_before_chunk(sender, its, index):
    """What a reader's store calls: the message expires just before that chunk is asked for."""

    def before(request, *arguments):
        if arguments and arguments[0] == its.chunk(index) and sender.entries:
            age(sender, 3601)
            sender.expire_data()

    return before


def test_a_message_that_expires_while_it_is_read(store):
    its = keys.message(0, 1, 0)
    sender = StatelessProcessGroup(0, 2, store)
    watched = Watched(store, _expire_before_chunk(sender, its, 2))
    receiver = StatelessProcessGroup(1, 2, watched)
    sender.send_obj(bytes(5 * CHUNK_BYTES), 1)
    start = time.monotonic()
    with pytest.raises(MessageExpiredError, match="message/0/1/0: expired unread after"):
        receiver.recv_obj(0, timeout=30)
    assert time.monotonic() - start < 1 + SLACK
    assert store.check([its.expired])
    assert store.num_keys() == 1
    sender.send_obj("next", 1)
    assert receiver.recv_obj(0) == "next"


# The same for a broadcast, whose other reader has read it, or has not begun.
@pytest.mark.parametrize("other_has_read", [True, False])
def test_a_broadcast_that_expires_while_it_is_read(store, other_has_read):
    source, other = (StatelessProcessGroup(rank, 3, store) for rank in (0, 2))
    its = keys.broadcast(0, 0)
    watched = Watched(store, _expire_before_chunk(source, its, 2))
    reader = StatelessProcessGroup(1, 3, watched)
    source.broadcast_obj(bytes(5 * CHUNK_BYTES), 0)
    if other_has_read:
        other.broadcast_obj(None, 0)
    start = time.monotonic()
    with pytest.raises(MessageExpiredError, match="expired unread after"):
        reader.broadcast_obj(None, 0, timeout=3)
    assert time.monotonic() - start < 1 + SLACK
    if not other_has_read:
        with pytest.raises(MessageExpiredError, match="expired unread after"):
            other.broadcast_obj(None, 0)
    # the note alone
    assert store.check([its.expired]) and store.num_keys() == 1
    source.broadcast_obj("next", 0)
    assert [group.broadcast_obj(None, 0) for group in (reader, other)] == ["next"] * 2


# A message expires just as its receiver takes it: between waiting for it and looking at it, which
# the receiver is told at once; or between looking at it and deleting it, and then it arrives.
@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
@pytest.mark.parametrize("moment", ["compare_set", "delete_key"])
def test_a_message_that_expires_as_it_is_taken(store, moment, size):
    its = keys.message(0, 1, 0)

    def before(request, *arguments):
        if request == moment and arguments[0] == its.own and sender.entries:
            age(sender, 3601)
            sender.expire_data()

    sender = StatelessProcessGroup(0, 2, store)
    receiver = StatelessProcessGroup(1, 2, Watched(store, before))
    sender.send_obj(bytes(size), 1)
    start = time.monotonic()
    if moment == "delete_key":
        assert receiver.recv_obj(0, timeout=30) == bytes(size)
    else:
        with pytest.raises(MessageExpiredError, match=r"^message/0/1/0: expired unread after"):
            receiver.recv_obj(0, timeout=30)
    assert time.monotonic() - start < 1 + SLACK
    assert store.check([its.expired])
    assert store.num_keys() == 1
    sender.send_obj("next", 1)
    assert receiver.recv_obj(0) == "next"


# The receiver of a message waits for a chunk that the sender has just deleted, in the middle of the
# expiry. Nothing stays but the note.


def _expire_and_read_meanwhile(here, kind):
    its = keys.message(0, 1, 0)

    def before(request, *arguments):
        if not arguments:
            return
        # rank 1 has read one chunk when the message expires
        if here.rank == 1 and arguments[0] == its.chunk(1) and not here.told("rank 1 reads"):
            here.tell("rank 1 reads")
            here.ask("rank 0 expires")
        elif here.rank == 1 and request == "wait" and here.told("rank 0 expires"):
            here.tell("rank 1 waits")
        elif (here.rank, request, *arguments[:1]) == (0, "delete_key", its.chunk(3)):
            here.tell("rank 0 expires")
            here.ask("rank 1 waits")

    group, watched = watched_group_on(here, kind, before)
    with group:
        keys_before = count_keys(here, group)
        if here.rank == 0:
            watched.send_obj(bytes(6 * CHUNK_BYTES), 1)
            here.ask("rank 1 reads")
            age(watched, 3601)
            watched.expire_data()
        else:
            with pytest.raises(MessageExpiredError):
                watched.recv_obj(0, timeout=20)
        return count_keys(here, group) - keys_before


@each_server
def test_expiry_leaves_nothing_behind_a_reader(kind):
    assert run_ranks(_expire_and_read_meanwhile, 2, kind) == [1, 1]


# A broadcast expires when one of its three readers has read it: each of the others is told so, at
# once, and all get the next one.


@pytest.mark.parametrize("size", [10, 2 * CHUNK_BYTES])
def test_a_broadcast_that_expired(store, size):
    source, *readers = groups_on(store, 4)
    source.broadcast_obj(bytes(size), 0)
    readers[0].broadcast_obj(None, 0)
    age(source, 3601)
    source.broadcast_obj("next", 0)
    for reader in readers[1:]:
        start = time.monotonic()
        with pytest.raises(MessageExpiredError, match="expired unread after 3600 s"):
            reader.broadcast_obj(None, 0, timeout=30)
        assert time.monotonic() - start < 1 + SLACK
    assert [reader.broadcast_obj(None, 0) for reader in readers] == ["next"] * 3
    old, new = (keys.broadcast(0, number) for number in range(2))
    assert store.check([old.expired, new.own])
    assert store.num_keys() == 2


# The same between processes: rank 1 waits for nothing, and is told at once.


def _expire_between_processes(here, kind, size):
    with group_on(here, kind, data_expiration_seconds=1) as group:
        if here.rank == 0:
            group.send_obj(bytes(size), 1)
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


@pytest.mark.parametrize(
    ("kind", "size"),
    [("libuv", 10), ("libuv", 2 * CHUNK_BYTES), ("legacy", 10), ("legacy", 2 * CHUNK_BYTES)],
    indirect=["kind"],
)
def test_expiry_between_processes(kind, size):
    seconds, message = run_ranks(_expire_between_processes, 2, kind, size)[1]
    assert seconds < 1 + SLACK
    assert message == "new"


# After 4,000 barriers, gathers and messages the store holds as many keys as after ten, and rank 0,
# which hosts it, has not grown by 2 MiB.


def _exchange(group, what, rounds):
    successor, predecessor = (group.rank + 1) % group.world_size, group.rank - 1
    for _ in range(rounds):
        if what == "barrier":
            group.barrier()
        elif what == "gather":
            group.all_gather_obj(what)
        elif what == "broadcast":
            for source in range(group.world_size):
                group.broadcast_obj(what, source)
        else:
            group.send_obj(what, successor)
            group.recv_obj(predecessor % group.world_size)


def _resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _use_for_long(here, kind):
    with group_on(here, kind) as group:
        measured = []
        for rounds in (10, 3990):
            for what in ("barrier", "gather", "message"):
                # both ranks send in each round
                _exchange(group, what, rounds // 2 if what == "message" else rounds)
            measured.append((count_keys(here, group), _resident_bytes()))
        return measured


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["libuv"], indirect=True)
def test_long_use_takes_no_more_keys_and_hardly_any_memory(kind):
    (early, late), (_, _) = run_ranks(_use_for_long, 2, kind, deadline=100)
    assert early[0] == late[0]
    assert (late[1] - early[1]) / MIB < 2


# The same for each kind of store, with fewer rounds.


def _count_keys(here, kind):
    with group_on(here, kind) as group:
        counts = []
        for rounds in (5, 200):
            for what in ("message", "broadcast", "gather"):
                _exchange(group, what, rounds)
            counts.append(count_keys(here, group))
        return counts


@pytest.mark.parametrize("kind", ["libuv", "legacy"], indirect=True)
def test_exchanges_leave_nothing_behind(kind):
    for early, late in run_ranks(_count_keys, 3, kind):
        assert early == late


# A rank that has waited for a message waits in a barrier when the next message comes for it. That
# must not end its wait.


def _send_into_a_barrier(here, kind, waiter, sender):
    late = 3 - waiter - sender
    with group_on(here, kind) as group:
        seen = []
        for number in range(20):
            if here.rank == sender:
                group.send_obj(number, waiter)
                group.send_obj("more", waiter)
                # the server has got them
                group.store.num_keys()
                here.tell(f"sent/{number}")
            elif here.rank == late:
                here.ask(f"sent/{number}")
                here.tell(f"arrives/{number}")
            else:
                assert group.recv_obj(sender) == number
            group.barrier()
            seen.append(here.told(f"arrives/{number}"))
            if here.rank == waiter:
                assert group.recv_obj(sender) == "more"
        return seen


@each_server
@pytest.mark.parametrize(("waiter", "sender"), [(0, 1), (1, 0), (1, 2)])
def test_a_message_does_not_end_the_wait_for_something_else(kind, waiter, sender):
    for seen in run_ranks(_send_into_a_barrier, 3, kind, waiter, sender):
        assert seen == [True] * 20


# All methods in turn, with a different source each time, so that ranks run ahead of each other.


def _all_in_turn(here, kind, rounds):
    with group_on(here, kind) as group:
        everyone = list(range(here.world_size))
        for number in range(rounds):
            group.barrier()
            assert group.all_gather_obj(here.rank) == everyone
            source = number % here.world_size
            assert group.broadcast_obj(number if source == here.rank else None, source) == number
            group.send_obj((number, here.rank), (here.rank + 1) % here.world_size)
            before = (here.rank - 1) % here.world_size
            assert group.recv_obj(before) == (number, before)
            assert group.all_gather_obj(here.rank) == everyone


@each_server
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_methods_in_turn(kind, world_size):
    run_ranks(_all_in_turn, world_size, kind, 150)


# Garbage where a message should be: an error that shows it, and the next message arrives. What
# comes again is what a stranger wrote, so no key is counted.

GARBAGE = [
    ("", "holds b'', which no rank of refdist writes"),
    ("\0", r"holds b'\\x00', which no rank of refdist writes"),
    ("\0\0\0", r"holds b'\\x00\\x00\\x00', which no rank of refdist writes"),
    ("garbage", "holds b'garbage', which no rank of refdist writes"),
    ("\x01", "0 bytes do not unpickle"),
    ("\x01garbage", "7 bytes do not unpickle"),
    ("\x02", "holds .*, which no rank of refdist writes"),
    ("\x02-1", "holds .*, which no rank of refdist writes"),
    ("\x02garbage!", "holds .*, which no rank of refdist writes"),
    ("\x02" + "\0" * 8, "holds .*, which no rank of refdist writes"),
    ("\x03a reason", "a reason"),
    ("\x04garbage", "holds .*, which no rank of refdist writes"),
    ("\x05garbage", "holds .*, which no rank of refdist writes"),
]


@contextmanager
def ending_in_time(seconds=20.0):
    """End a call that does not end by itself, by SIGINT, and fail."""

    def interrupt():
        ended.wait(seconds) or os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        pytest.fail(f"did not end within {seconds:g} s")
    finally:
        ended.set()


@pytest.mark.parametrize(("garbage", "message"), GARBAGE, ids=[repr(g) for g, _ in GARBAGE])
def test_garbage_in_a_box(store, garbage, message):
    zero, one = groups_on(store, 2)
    zero.send_obj("overwritten", 1)
    zero.broadcast_obj("overwritten", 0)
    store.set(keys.message(0, 1, 0).own, garbage)
    store.set(keys.broadcast(0, 0).own, garbage)
    with ending_in_time(5):
        with pytest.raises(MessageError, match=f"^message/0/1/0: {message}"):
            one.recv_obj(0, timeout=2)
        with pytest.raises(MessageError, match=f"^broadcast/0/0: {message}"):
            one.broadcast_obj(None, 0, timeout=2)
    zero.send_obj("next", 1)
    zero.broadcast_obj("next", 0)
    assert one.recv_obj(0) == one.broadcast_obj(None, 0) == "next"


# Garbage in place of a chunk: an error that names it, and the next message arrives.


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        ("", "holds b'', which no rank of refdist writes"),
        ("\0", "which no rank of refdist writes"),
        ("garbage", "holds b'garbage', which no rank of refdist writes"),
        ("\x01garbage", "which no rank of refdist writes"),
        ("\x03a reason", "a reason"),
        ("\x04", "holds 0 bytes, not as many as it should"),
        ("\x04garbage", "holds 7 bytes, not as many as it should"),
        ("\x04" + "x" * (CHUNK_BYTES + 1), f"holds {CHUNK_BYTES + 1} bytes, not as many"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_garbage_in_place_of_a_chunk(store, garbage, message):
    zero, one = groups_on(store, 2)
    zero.send_obj(bytes(3 * CHUNK_BYTES), 1)
    zero.broadcast_obj(bytes(3 * CHUNK_BYTES), 0)
    in_message, in_broadcast = keys.message(0, 1, 0).chunk(1), keys.broadcast(0, 0).chunk(1)
    store.set(in_message, garbage)
    store.set(in_broadcast, garbage)
    with ending_in_time():
        with pytest.raises(MessageError, match=f"^{in_message}: .*{message}"):
            one.recv_obj(0, timeout=2)
        with pytest.raises(MessageError, match=f"^{in_broadcast}: .*{message}"):
            one.broadcast_obj(None, 0, timeout=2)
    zero.send_obj("next", 1)
    zero.broadcast_obj("next", 0)
    assert one.recv_obj(0) == one.broadcast_obj(None, 0) == "next"
    # two broadcasts, and the count of the readers of the large one
    assert store.num_keys() == 3


# The lengths of 4 GiB, and nothing that follows: the reader waits, but sets no memory aside.


def _read_lengths_alone(here):
    zero, one = groups_on(here.store("store"), 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zero.store.set(keys.message(0, 1, 0).own, b"\x02" + MAX_BYTES.to_bytes(8, "little"))
    with pytest.raises(MessageTimeoutError, match=r"^message/0/1/0: .* in vain for the rest from"):
        one.recv_obj(0, timeout=0.5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_lengths_alone_take_no_memory():
    (kibibytes,) = run_ranks(_read_lengths_alone, 1)
    assert kibibytes < 512 * 1024


# A note of an expiry with no number, or one that no integer has: it is not believed.
@pytest.mark.parametrize("note", ["", "\0", "garbage", "-1", "9" * 5000], ids=len)
def test_garbage_in_a_note(store, note):
    zero, one = groups_on(store, 2)
    zero.send_obj(bytes(3 * CHUNK_BYTES), 1)
    its = keys.message(0, 1, 0)
    store.delete_key(its.chunk(1))
    store.set(its.expired, note)
    with ending_in_time(), pytest.raises(MessageTimeoutError, match="in vain for the rest from"):
        one.recv_obj(0, timeout=0.3)


# Garbage in the keys of the first gather and barrier, before anyone comes. Each rank raises a clear
# error in time, or gets what the others gave, where the garbage was only overwritten.

CLEAR = (MessageError, BarrierError, StoreConnectionError)


def _meet_garbage(rank, port, libuv, gather, plain):
    # in a plain barrier, a rank that waits reads what the last to arrive decides on
    time.sleep(0.2 * rank * plain)
    # each rank has a connection of its own, which the server closes on some requests
    store = create_tcp_store(LOCAL, port, use_libuv=libuv)
    group = StatelessProcessGroup(rank, 2, store)
    try:
        if gather:
            return group.all_gather_obj(("from", rank), timeout=2)
        group.barrier(timeout=2)
        return None
    except CLEAR as error:
        return error


@pytest.mark.parametrize("libuv", [True, False], ids=["libuv", "legacy"])
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "barrier"])
@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
def test_garbage_in_the_keys_of_a_barrier(libuv, gather, plain):
    if not _serves(libuv):
        pytest.skip("this torch cannot serve on a bound socket with libuv")
    switched_off = torch_versions.switched_off(torch_versions.STORE_BARRIER)
    with switched_off if plain else nullcontext():
        _let_ranks_meet_garbage(libuv, gather)


def _let_ranks_meet_garbage(libuv, gather):
    first = barrier_of(create_tcp_store(LOCAL, 0, is_master=True), 0, 2).keys
    plain = isinstance(first, keys.PlainKeys)
    # how it ended is one key or two
    ends = [first.outcome] if plain else [first.state, keys.reason(0)]
    places = (first.counter, first.roll, *ends)
    servers = {}
    for case in product(places, ["", "\0", "garbage", "9" * 30] if gather else ["garbage"]):
        servers[case] = create_tcp_store(LOCAL, 0, is_master=True, use_libuv=libuv)
        servers[case].set(*case)

    def meet(number):
        server = list(servers.values())[number // 2]
        return _meet_garbage(number % 2, server.port, libuv, gather, plain)

    start = time.monotonic()
    outcomes = run_threads(meet, 2 * len(servers))
    assert time.monotonic() - start < 2 * 2 + 2 + SLACK
    for number, (key, garbage) in enumerate(servers):
        pair = outcomes[2 * number : 2 * number + 2]
        failed = [isinstance(outcome, CLEAR) for outcome in pair]
        assert all(failed) or not any(failed), (key, garbage, pair)
        if not any(failed):
            assert pair == ([[("from", 0), ("from", 1)]] * 2 if gather else [None] * 2), key
        if key == first.roll and gather and garbage:
            # a plain barrier goes by the roll, and a native one by the count
            text = "its wait ended before all" if plain else "which no rank of refdist writes"
            assert all(text in str(outcome) for outcome in pair), pair


# Garbage where a large object of a gather should be: everyone else raises, naming it, and the next
# gather works.


def _gather_garbage(here, kind):
    name = keys.gathered(1, 0).chunk(3)

    def before(request, *arguments):
        if here.rank == 1 and request == "append":
            group.store.set(f"watched/{name}", "garbage")

    group, watched = watched_group_on(here, kind, before)
    with group:
        try:
            seen = watched.all_gather_obj(bytes(here.rank and 5 * CHUNK_BYTES), timeout=20)
        except MessageError as error:
            seen = str(error)
        return seen, watched.all_gather_obj(here.rank)


@each_server
def test_garbage_in_a_large_gather(kind):
    results = run_ranks(_gather_garbage, 3, kind)
    assert all(after == [0, 1, 2] for _, after in results)
    for rank in (0, 2):
        assert results[rank][0].startswith("gather/1/0/chunk/3: holds b'garbage'")


# Garbage where the reason should be why a barrier broke: a latecomer says so, and does not hang. In
# a plain barrier the reason is the outcome, so a rank cannot die in between, and nothing there
# means that there is none.
@pytest.mark.parametrize("garbage", [None, "", "\0", "garbage", "[]", '{"by": "x"}', "{}"])
def test_garbage_for_a_reason(store, garbage):
    zero, one = groups_on(store, 2)
    first = zero._barrier.keys
    key = keys.reason(0) if isinstance(first, keys.Slot) else first.outcome
    if not garbage and key != keys.reason(0):
        pytest.skip("this is no outcome of a plain barrier")
    with pytest.raises(MessageTimeoutError, match="missing: rank 1"):
        zero.all_gather_obj("early", timeout=0.1)
    store.delete_key(key)
    if garbage is not None:
        store.set(key, garbage)
    text = "a reason that no rank of refdist writes"
    if garbage is None:
        text = "died before it said why"
    with ending_in_time(), pytest.raises(MessageTimeoutError, match=text) as caught:
        one.all_gather_obj("late", timeout=5)
    assert isinstance(caught.value.__cause__, BarrierError)


# Two groups of the same two ranks on one server, each with a prefix. In step, with the same numbers
# in their keys, each hears only itself; and nothing stays.


def _use_two_prefixes(here, kind):
    other = 1 - here.rank
    with group_on(here, kind) as base:
        groups = {
            name: StatelessProcessGroup(here.rank, 2, PrefixStore(name, base.store))
            for name in ("a", "b")
        }
        counts, heard = [], []
        for number in (1, 2, 3, 4):
            for name, group in groups.items():
                group.send_obj((name, number), other)
                if here.rank == 0:
                    group.broadcast_obj((name, number, bytes(2 * CHUNK_BYTES)), 0)
            for name, group in reversed(groups.items()):
                if here.rank == 1:
                    heard.append([name, group.broadcast_obj(None, 0)[:2]])
                    group.broadcast_obj((name, number, bytes(2 * CHUNK_BYTES)), 1)
                else:
                    heard.append([name, group.broadcast_obj(None, 1)[:2]])
                group.barrier()
                heard[-1].append(group.recv_obj(other))
                heard[-1] += group.all_gather_obj((name, number))
                heard[-1] += (name, number) if len(set(heard[-1][1:])) == 1 else ()
                group.all_gather_obj((name, bytes(CHUNK_BYTES)))
            counts.append(count_keys(here, base, *groups.values()))
        return heard, counts


@each_server
def test_two_groups_on_one_server(kind):
    for heard, counts in run_ranks(_use_two_prefixes, 2, kind):
        for (name, *said), number in zip(heard, [1, 1, 2, 2, 3, 3, 4, 4], strict=True):
            assert said == [(name, number)] * 4 + [name, number]
        assert len(set(counts[2:])) == 1


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
def test_views_travel_small(store):
    zero, one = groups_on(store, 2)
    view = torch.arange(2**17, dtype=torch.int64).reshape(128, 1024).t()[5, :8]
    assert view.untyped_storage().nbytes() == MIB
    zero.send(view, 1)
    zero.broadcast(view, 0)
    assert store.num_keys() == 2
    for its in (keys.message(0, 1, 0), keys.broadcast(0, 0)):
        value = store.get(its.own)
        assert len(value) < 4096
        store.set(its.own, value)
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


# An object takes long to unpickle, as one does that must import a large module. That is no store
# that says nothing: the object is received, and the group goes on.


class SlowToUnpickle:
    def __reduce__(self):
        return _slowly, (7,)


def _slowly(value):
    time.sleep(2.5)  # more than the timeout, and what a store may take beyond it
    return value


def _unpickle_slowly(here):
    with here.group() as group:
        if here.rank == 0:
            for size in (1, CHUNK_BYTES):
                group.send_obj((SlowToUnpickle(), bytes(size)), 1)
            group.send_obj("next", 1)
            here.tell("sent")
            return None
        here.ask("sent")
        return [group.recv_obj(0, timeout=0.5) for _ in range(3)]


def test_an_object_that_is_slow_to_unpickle():
    *slow, following = run_ranks(_unpickle_slowly, 2)[1]
    assert slow == [(7, bytes(1)), (7, bytes(CHUNK_BYTES))] and following == "next"


# A message finds no room in memory. The next call tries it again.


def _out_of_memory(here):
    with here.group() as group:
        if here.rank == 0:
            group.send_obj(bytes(128 << 20), 1)
            group.send_obj("next", 1)
            return None
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), limits[1]))
        try:
            with pytest.raises(MemoryError):
                group.recv_obj(0, timeout=20)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        return len(group.recv_obj(0, timeout=20)), group.recv_obj(0, timeout=20)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_a_message_that_finds_no_room():
    assert run_ranks(_out_of_memory, 2)[1] == (128 << 20, "next")


# A large broadcast expires when a reader has its last chunk, but has not yet counted itself.


def test_no_count_of_readers_stays():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    clients = [create_tcp_store(LOCAL, server.port) for _ in range(3)]

    def before(request, key=None, *_):
        if request == "add" and "readers" in key:
            time.sleep(0.02)  # until it is old enough
            source.expire_data()

    source = StatelessProcessGroup(0, 3, clients[0], data_expiration_seconds=0.01)
    readers = [
        StatelessProcessGroup(1, 3, clients[1]),
        StatelessProcessGroup(2, 3, Watched(clients[2], before)),
    ]
    groups = [source, *readers]

    def meet(rank):
        groups[rank].barrier(timeout=20)

    for _ in range(6):
        run_threads(meet, 3)  # every key of the barriers is there from now on
    counts = []
    for _ in range(3):
        source.broadcast_obj(bytes(CHUNK_BYTES), 0)
        for reader in readers:
            assert reader.broadcast_obj(None, 0, timeout=20) == bytes(CHUNK_BYTES)
        run_threads(meet, 3)
        last = keys.PlainKeys.of(source._barrier.tries - 1)  # of which one is not always there
        counts.append(server.num_keys() - server.check([last.all_left]))
    assert len(set(counts)) == 1, counts


# A message expires a bounded number of others, more than it adds.


def test_a_message_expires_some_of_many():
    store = HashStore()
    group = StatelessProcessGroup(0, 2, store)
    for number in range(1000):
        group.send_obj(number, 1)
    age(group, 3601)
    group.send_obj("obj", 1)
    assert 900 < len(group.entries) < 1000
    assert store.num_keys() == len(group.entries) + 1
    group.expire_data()
    assert [key for key, _ in group.entries] == ["message/0/1/1000"]
    assert store.num_keys() == 2
