"""Weights from one rank to the others: over gloo, over stores, and with vLLM's own code."""

import contextlib
import gc
import itertools
import json
import os
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import LOCAL, interrupt, run_ranks, until
from vllm_module import NEWEST, import_vllm, needs_vllm

from refdist import (
    CollectiveError,
    MessageError,
    MessageTimeoutError,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.benchmarks.__main__ import main
from refdist.torch_groups import collectives
from refdist.weights import (
    agree,
    describe,
    receive_into,
    receive_weights,
    send_weights,
)
from refdist.weights.channels import Channel
from refdist.weights.chunks import cut, pack, unpack_into
from refdist.weights.descriptions import weights_of, weights_of_metas
from refdist.weights.memory import past_of

SLACK = 8.0

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip


def form(here, name="gloo"):
    with here.place(name) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, here.rank, here.world_size, "gloo", listen_socket=listener
        )


def random_bits(shape, dtype, seed=0):
    """Any bits, so also NaN with a payload; a bool has 0 or 1."""
    size = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed + size)
    top = 2 if dtype is torch.bool else 256
    drawn = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    return drawn.view(dtype).view(shape)


def every_dtype():
    """Each dtype in several shapes, of which some are empty, and some leave the next misaligned."""
    shapes = [(3,), (2, 5), (), (0,), (4, 0, 2), (1,), (7, 3)]
    return [
        (f"{str(dtype).removeprefix('torch.')}.{number}", random_bits(shape, dtype, number))
        for number, shape in enumerate(shapes)
        for dtype in DTYPES
    ]


def views():
    """Tensors whose memory is not just their elements in order."""
    base = random_bits((6, 8), torch.float32)
    numbers = random_bits((5, 3), torch.complex64)
    return [
        ("odd", random_bits((3,), torch.uint8)),
        ("transposed", base.t()),
        ("columns", base[:, 2:5]),
        ("every second", base[::2]),
        ("row", base[3]),
        ("expanded", base[:1].expand(4, 8)),
        ("permuted", random_bits((2, 3, 4), torch.bfloat16).permute(2, 0, 1)),
        ("conjugated", numbers.conj()),
        ("negated", numbers.conj().imag),
        ("trained", torch.nn.Parameter(random_bits((4,), torch.float16))),
        ("channels last", random_bits((2, 5, 3, 4), torch.half).permute(0, 3, 1, 2)),
    ]  # fmt: skip


def sizes_of(*sizes):
    """Weights of these numbers of bytes."""
    return [(f"w{n}", random_bits((s,), torch.uint8, n)) for n, s in enumerate(sizes)]


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def check_same(received, expected):
    received, expected = list(received), list(expected)
    assert [name for name, _ in received] == [name for name, _ in expected]
    for (name, tensor), (_, original) in zip(received, expected, strict=True):
        assert (tensor.shape, tensor.dtype) == (original.shape, original.dtype), name
        assert torch.equal(bits(tensor), bits(original)), name


# From refdist to refdist, over gloo. Every rank but the source gets the same bits in the same
# order: one by one, and packed into chunks of every kind.

BUFFER = 64
CASES = {
    "none": [],
    "empty tensors alone": sizes_of(0, 0),
    "an empty one at the end of a full chunk": sizes_of(BUFFER + 1, 0),
    "one that is smaller": sizes_of(5),
    "one that is larger than the buffer": sizes_of(10 * BUFFER),
    "larger ones between small ones": sizes_of(3, 3 * BUFFER, 0, 5, 2 * BUFFER),
    "just full": sizes_of(BUFFER - 10, 10, 7),
    "just full at the end": sizes_of(30, 34),
    "one byte more": sizes_of(BUFFER - 10, 11, 7),
    "all equal": sizes_of(*[24] * 10),
    "odd": sizes_of(*range(1, 30, 2)),
    "every dtype": every_dtype(),
    "views": views(),
}


def hand_over_all(here, packed):
    group, src = form(here), here.world_size - 1
    for weights, size in itertools.product(CASES.values(), [1, BUFFER, 700, 2**30]):
        if here.rank == src:
            send_weights(weights, group, packed=packed, buffer_bytes=size, timeout=20)
            continue
        options = {"packed": packed, "buffer_bytes": size, "timeout": 20}
        received = list(receive_weights(describe(weights), group, src, **options))
        check_same(received, weights)
        assert all(tensor.is_contiguous() for _, tensor in received)
    for weights in CASES.values():
        if here.rank == src:
            send_weights(iter(weights), group, src, packed=packed, buffer_bytes=BUFFER)
        else:
            # the memory of an expanded tensor has fewer elements, so nobody can write to it
            into = [
                (k, t.detach().clone()) if k == "expanded" else (k, t) for k, t in blank(weights)
            ]
            receive_into(into, group, src, packed=packed, buffer_bytes=BUFFER)
            check_same(into, weights)
    here.meet("end")


def blank(weights):
    """Tensors with the same strides and no content, to receive into."""
    for name, tensor in weights:
        if name == "expanded":
            yield name, torch.zeros(tensor.shape)
            continue
        memory = tensor.detach().untyped_storage().nbytes() // tensor.element_size()
        fresh = torch.zeros(memory, dtype=tensor.dtype)
        yield name, fresh.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_bit_arrives(world_size, packed):
    run_ranks(hand_over_all, world_size, packed)


# A destination may be any view of the user's, also one that is conjugated or negated.


def receive_into_views(here):
    group = form(here)
    weights = [
        ("a", random_bits((3, 4), torch.complex64)),
        ("b", random_bits((3, 4), torch.float32)),
    ]
    for packed in (True, False):
        if here.rank == 0:
            send_weights(weights, group, packed=packed)
            continue
        numbers = torch.zeros(4, 3, dtype=torch.complex64)
        model = torch.nn.ParameterDict({"b": torch.nn.Parameter(torch.zeros(3, 4))})
        into = {"a": numbers.t().conj(), "b": model["b"]}
        receive_into(into, group, 0, packed=packed)
        check_same(into.items(), weights)
        assert model["b"].grad is None and model["b"].requires_grad
    here.meet("end")


def test_destinations_may_be_views():
    run_ranks(receive_into_views, 2)


# An expanded tensor has one memory for many elements: it is refused before anything is received. A
# tensor that was made in inference mode, as an engine makes them, is written to.


def test_destinations_that_torch_does_not_write_to():
    tape = Tape([random_bits((8,), torch.uint8)] * 2)
    into = {"a": torch.zeros(4), "b": torch.zeros(1, 4).expand(2, 4)}
    with pytest.raises(ValueError, match=r"'b' of shape \(2, 4\) and strides \(0, 1\): is"):
        receive_into(into, tape, 0)
    with torch.inference_mode():
        into = {"a": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(2, 2, dtype=torch.uint8)}
    receive_into(into, tape, 0)
    assert torch.cat([into["a"], into["b"].flatten()]).equal(random_bits((8,), torch.uint8))


# Received tensors never change: memory whose tensors the user holds is not used again. When it is
# free, it is: that of two chunks is enough for all transfers over a communicator.


def hand_over_step(here, group, step):
    """Five chunks of 200 bytes. Returns what was received and what it must be."""
    weights = [(f"w{n}", random_bits((100,), torch.uint8, n + step)) for n in range(10)]
    if here.rank == 0:
        send_weights(weights, group, buffer_bytes=150)
        return [], []
    return list(receive_weights(describe(weights), group, 0, buffer_bytes=150)), weights


def kept_by(group):
    return past_of(group).memory._kept


def keep_some(here):
    group = form(here)
    kept = [hand_over_step(here, group, step) for step in range(5)]
    assert all(user() for _, user in kept_by(group)) or here.rank == 0
    for received, weights in kept:
        check_same(received, weights)
    del received, weights, kept
    hand_over_step(here, group, 5)
    # memory that is much too large is given back, and all of it with the communicator
    for size in (2**20, 100):
        if here.rank == 0:
            send_weights(sizes_of(size, size), group)
        else:
            assert len(list(receive_weights(describe(sizes_of(size, size)), group, 0))) == 2
    largest = max((len(kept) for kept, _ in kept_by(group)), default=0)
    here.meet("end")
    memory = weakref.ref(past_of(group).memory)
    stateless_destroy_torch_distributed_process_group(group)
    del group
    return largest < 2**20, memory() is None


def test_what_is_kept_never_changes():
    assert run_ranks(keep_some, 2) == [(True, True)] * 2


def test_memory_is_used_again():
    weights, seen = sizes_of(*[100] * 9), []

    def look(pairs):
        for pair in pairs:
            seen.extend(kept for kept, _ in kept_by(tape))
            yield pair

    # a communicator that has ended when it returns, as gloo's thread holds memory a moment longer
    tape = Tape()
    for _ in range(3):
        send_weights(look(weights), tape, buffer_bytes=150)
    assert len({id(kept) for kept in seen}) == 1  # for 15 chunks
    tape, seen = Tape(tape.kept), []
    for _ in range(3):
        for name, tensor in look(receive_weights(describe(weights), tape, 0, buffer_bytes=150)):
            assert torch.equal(tensor, dict(weights)[name])
        del tensor
    assert len({id(kept) for kept in seen}) == 2  # one of them is the caller's


# Tensors that are made on the way go when they are packed, also while two chunks are under way.


@pytest.mark.parametrize("ahead", [0, 1])
def test_packed_tensors_are_let_go(ahead, monkeypatch):
    monkeypatch.setattr(Channel, "ahead", ahead)
    made = []

    def weights():
        for number in range(40):
            memory = memoryview(bytearray(100))
            made.append(weakref.ref(memory))
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            del memory
            yield f"w{number}", tensor
            del tensor
            # a chunk of ten that is being gathered, and the last one of the chunk before
            assert sum(user() is not None for user in made) <= 11

    send_weights(weights(), Tape(), buffer_bytes=950)


# A chunk is the only memory that a transfer takes: tensors with gaps are copied from and to it.


def test_tensors_with_gaps_take_no_more_memory():
    weights = {f"w{n}": random_bits((400, 500), torch.float32).t() for n in range(4)}
    into = {name: torch.zeros(400, 500).t() for name in weights}
    sent = list(weights_of(weights))
    memory = torch.empty(sum(weight.num_bytes for weight in sent), dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        pack(sent, memory)
        unpack_into(list(weights_of(into)), memory)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert taken < memory.numel() / 20  # torch's own copy of such a tensor takes a little
    check_same(into.items(), weights.items())


# Over a StatelessProcessGroup: small tensors, as objects of its store. It has a timeout of its own.


def over_a_store(here):
    weights = every_dtype() + views()
    with here.group() as group:
        for packed in (True, False):
            if here.rank == 0:
                send_weights(weights, group, packed=packed, buffer_bytes=100)
            else:
                received = receive_weights(
                    describe(weights), group, 0, packed=packed, buffer_bytes=100
                )
                check_same(received, weights)
        group.barrier()
        with pytest.raises(ValueError, match=r"timeout=3: must be None for StatelessProcessGroup"):
            send_weights(weights, group, timeout=3)
        # such a group notices another number of bytes, and the text says which weight it was
        if here.rank == 0:
            send_weights(sizes_of(4, 5), group, packed=False)
        else:
            text = (
                r"^rank 1, receiving weight 1, 'w1' \(6 bytes\): from rank 0 came a tensor of sha"
            )
            with pytest.raises(MessageError, match=text):
                list(receive_weights(describe(sizes_of(4, 6)), group, 0, packed=False))
        group.barrier()


def test_small_weights_over_a_store():
    run_ranks(over_a_store, 2)


# vLLM's code uses streams of a GPU. Here it has none, and its tensors are on the CPU, so that a
# stream and an event have nothing to do. These stand for a device, and for nothing else.


class _NoStream(contextlib.AbstractContextManager):
    def __init__(self, *_, **__):
        pass

    def __exit__(self, *_):
        return None

    def __getattr__(self, name):
        return lambda *_, **__: None


def vllm_packing():
    """vLLM's module of packed tensors, in this process of a rank."""
    import_vllm(NEWEST)
    from vllm.distributed.weight_transfer import packed_tensor

    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = lambda *_: _NoStream()
    torch.Stream = torch.Event = torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.stream = torch.cuda.current_stream = lambda *_: _NoStream()
    warnings.filterwarnings("ignore", "Tensor .* which exceeds buffer_size_bytes")
    return packed_tensor


class OverGloo:
    """What vLLM's code needs of a communicator, over a gloo group."""

    device = torch.device("cpu")

    def __init__(self, group):
        self.group, self.rank, self.world_size = group, group.rank(), group.size()

    def broadcast(self, tensor, src):
        collectives.broadcast(tensor, src, self.group)


def vllm_sends(packing, weights, communicator, buffer_bytes, num_buffers=2):
    packing.packed_nccl_broadcast_producer(
        iter(weights), communicator, communicator.rank, lambda pair: pair[1], buffer_bytes,
        num_buffers,
    )  # fmt: skip


def vllm_receives(packing, weights, communicator, src, buffer_bytes, num_buffers=2):
    metas = [(name, (list(tensor.shape), tensor.dtype)) for name, tensor in weights]
    received = []
    packing.packed_nccl_broadcast_consumer(
        iter(metas), communicator, src,
        lambda chunk: received.extend((name, tensor.clone()) for name, tensor in chunk),
        buffer_bytes, num_buffers, device="cpu",
    )  # fmt: skip
    return received


VLLM_CASES = {name: some for name, some in CASES.items() if name not in ("every dtype", "views")}
# vLLM cannot read a tensor that is misaligned, nor send one that is conjugated
VLLM_CASES["every dtype, sorted"] = sorted(every_dtype(), key=lambda pair: -pair[1].itemsize)
VLLM_CASES["views"] = [pair for pair in views() if pair[0] not in ("odd", "conjugated")]


def both_ways(here, num_buffers):
    group, packing = form(here), vllm_packing()
    for weights, size in itertools.product(VLLM_CASES.values(), [1, BUFFER, 701, 2**30]):
        if here.rank == 0:
            send_weights(weights, group, buffer_bytes=size)
            # and in the other direction
            received = receive_weights(describe(weights), group, 1, buffer_bytes=size)
        else:
            received = vllm_receives(packing, weights, OverGloo(group), 0, size, num_buffers)
            vllm_sends(packing, weights, OverGloo(group), size, num_buffers)
        check_same(received, weights)
    here.meet("end")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_with_vllm_on_the_other_side(num_buffers):
    run_ranks(both_ways, 2, num_buffers)


# vLLM's consumer refuses a misaligned tensor. refdist reads it.


def misaligned_ones(here):
    group, packing = form(here), vllm_packing()
    weights = [
        ("three", random_bits((3,), torch.bfloat16)),
        ("two", random_bits((2,), torch.float32)),
    ]
    if here.rank == 0:
        send_weights(weights, group)
        check_same(receive_weights(describe(weights), group, 1), weights)
    else:
        with pytest.raises(RuntimeError, match="storage_offset"):
            vllm_receives(packing, weights, OverGloo(group), 0, 2**30)
        vllm_sends(packing, weights, OverGloo(group), 2**30)
    here.meet("end")


@needs_vllm(NEWEST)
def test_misaligned_tensors():
    run_ranks(misaligned_ones, 2)


# The cut is vLLM's, for all sizes. Both pack the same weights for a communicator that keeps what it
# is given; then both receive what the other one packed.


class Tape:
    """Keeps what the source broadcasts, or plays it."""

    rank, world_size, device = 0, 2, torch.device("cpu")

    def __init__(self, played=None):
        self.rank = 0 if played is None else 1
        self.kept, self.played = [], iter(played or ())

    def broadcast(self, tensor, src):
        assert tensor.dtype == torch.uint8 and tensor.dim() == 1 and src == 0
        if self.rank == 1:
            tensor.copy_(next(self.played))
        self.kept.append(tensor.clone())


def cut_alike(here):
    packing = vllm_packing()

    @settings(max_examples=400, deadline=None, database=None)
    @given(
        sizes=st.lists(st.integers(0, 40), max_size=30), size=st.integers(1, 100),
        buffers=st.integers(1, 4),
    )  # fmt: skip
    def check(sizes, size, buffers):
        weights = sizes_of(*sizes)
        ours, theirs = Tape(), Tape()
        send_weights(weights, ours, buffer_bytes=size)
        vllm_sends(packing, weights, theirs, size, buffers)
        assert [tensor.tolist() for tensor in ours.kept] == [t.tolist() for t in theirs.kept]
        chunks = cut(weights_of_metas(describe(weights)), True, size)
        assert [chunk.num_bytes for chunk in chunks] == [tensor.numel() for tensor in ours.kept]
        played = Tape(theirs.kept)
        check_same(receive_weights(describe(weights), played, 0, buffer_bytes=size), weights)
        assert len(played.kept) == len(theirs.kept)
        check_same(vllm_receives(packing, weights, Tape(ours.kept), 0, size, buffers), weights)

    check()


@needs_vllm(NEWEST)
def test_the_cut_is_vllms():
    run_ranks(cut_alike, 1)


# vLLM's own StatelessProcessGroup is a communicator too. Its rank 0 serves the store to the end.


def over_vllms_group(here):
    utils = import_vllm(NEWEST)
    with here.place("vllm") as (port, listener):
        group = utils.StatelessProcessGroup.create(
            LOCAL, port, here.rank, here.world_size, listen_socket=listener
        )
    for packed in (True, False):
        weights = every_dtype() + views()
        if here.rank == 0:
            send_weights(weights, group, packed=packed, buffer_bytes=100)
        else:
            metas = describe(weights)
            check_same(receive_weights(metas, group, 0, packed=packed, buffer_bytes=100), weights)
    here.meet("end")


@needs_vllm(NEWEST)
def test_over_vllms_stateless_group():
    run_ranks(over_vllms_group, 2)


# All ranks agree on what comes. If one expects something else, every rank gets the same error,
# before any tensor moves, and the group works on.


def expected(change):
    metas = describe([("a", torch.zeros(2, 3)), ("b", torch.zeros(4)), ("c", torch.zeros(5))])
    options = {"buffer_bytes": 100, "src": 1}
    if change == "order":
        metas[1:] = metas[:0:-1]
    elif change == "shape":
        metas[0] = ("a", (3, 2), "float32")
    elif change == "dtype":
        metas[2] = ("c", (5,), "bfloat16")
    elif change == "name":
        metas[1] = ("d", (4,), "float32")
    elif change == "missing":
        del metas[2]
    elif change == "more":
        metas.append(("d", (), "int64"))
    elif change == "buffer size":
        options["buffer_bytes"] = 101
    elif change == "packed":
        options["packed"] = False
    elif change == "source":
        options["src"] = 2
    elif change == "whatever":
        metas = None
    return metas, options


OBJECTS = "1 of 3 ranks object to the weights of rank 1: "
SAID = {
    "order": OBJECTS + "weight 1 is 'c' of shape (5,) and float32 on rank 2, and 'b' of shape (4,) "
    "and float32 on rank 1",
    "shape": OBJECTS + "weight 0 is 'a' of shape (3, 2) and float32 on rank 2, and 'a' of shape (2",
    "dtype": OBJECTS + "weight 2 is 'c' of shape (5,) and bfloat16 on rank 2, and 'c' of shape (5,",
    "name": OBJECTS + "weight 1 is 'd' of shape (4,) and float32 on rank 2, and 'b' of shape (4,) ",
    "missing": OBJECTS + "weight 2 is none on rank 2, and 'c' of shape (5,) and float32 on rank 1",
    "more": OBJECTS + "weight 3 is 'd' of shape () and int64 on rank 2, and none on rank 1",
    "buffer size": "the ranks do not mean the same buffer_bytes: 100 on ranks 0 and 1, 101 on rank",
    "packed": "the ranks do not mean the same packed: True on ranks 0 and 1, False on rank 2",
    "source": "the ranks do not mean the same src: 1 on ranks 0 and 1, 2 on rank 2",
}


def agree_or_not(here):
    texts = {}
    with here.group() as group:
        for change in SAID:
            metas, options = expected(change if here.rank == 2 else None)
            with pytest.raises(MessageError) as caught:
                agree(metas, group, timeout=20, **options)
            texts[change] = str(caught.value)
        for change in (None, "whatever"):
            metas, options = expected(change if here.rank == 2 else None)
            assert agree(metas, group, timeout=20, **options) == expected(None)[0]
        with pytest.raises(ValueError, match=r"src=3: must be in 0..2"):
            agree([], group, 3)
        # not packed, the size of the buffer has no meaning
        assert agree([], group, 1, packed=False, buffer_bytes=here.rank + 1) == []
    return texts


def test_ranks_agree_before():
    first, *others = run_ranks(agree_or_not, 3)
    assert others == [first, first]
    for change, said in SAID.items():
        assert first[change].startswith(said), first[change]


def agree_alone(here):
    with here.group(store_timeout=20) as group:
        if here.rank == 1:
            here.ask("raised")
        elif here.rank == 0:
            with pytest.raises(ValueError, match="metas=None on rank 0: must be a description"):
                agree(None, group, 0)
            with pytest.raises(MessageTimeoutError, match="rank 1"):
                agree([], group, 0, timeout=0.5)
            here.tell("raised")
        here.meet("end")


def test_a_rank_does_not_agree_in_time():
    run_ranks(agree_alone, 2)


def announce_nonsense(here):
    with here.group() as group:
        if here.rank == 0:
            group.all_gather_obj("nonsense")
            group.all_gather_obj({"src": 0, "packed": True, "buffer_bytes": 1, "weights": ["x"]})
            group.all_gather_obj(None)
            return
        with pytest.raises(MessageError, match=r"the same src: 'nonsense' on rank 0, 0 on rank 1"):
            agree([], group, 0)
        with pytest.raises(
            MessageError, match=r"rank 0 announces no weights: description 0 is 'x'"
        ):
            agree([], group, 0, buffer_bytes=1)


def test_what_is_announced_is_checked():
    run_ranks(announce_nonsense, 2)


# Descriptions are plain data, which JSON can carry too.


def test_descriptions_are_plain():
    metas = describe(every_dtype())
    assert all(type(part) in (str, tuple) for meta in metas for part in meta)
    assert all(type(size) is int for _, shape, _ in metas for size in shape)
    again = [weight.meta for weight in weights_of_metas(json.loads(json.dumps(metas)))]
    assert again == metas
    named = torch.nn.Linear(2, 3).named_parameters()
    assert describe(named) == [("weight", (3, 2), "float32"), ("bias", (3,), "float32")]
    assert weights_of_metas([("a", [2], torch.float16)])[0].meta == ("a", (2,), "float16")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([("a", [1, 2])], r"weight 0, 'a': is \[1, 2\], and must be a tensor"),
        ([torch.zeros(2)], r"weight 0 is tensor\(\[0., 0.\]\): must be a tuple of a name and a te"),
        ([(1, torch.zeros(2))], "must be a tuple of a name and a tensor"),
        ([("a", torch.zeros(2, device="meta"))], "on meta: must be dense, not quantized, of whole"),
        ([("a", torch.zeros(2, dtype=torch.uint8).view(torch.uint4))], "torch.uint4, torch.str"),
        ([("a", torch.eye(2).to_sparse())], "torch.sparse_coo, on cpu: must be dense"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "name 'a': is that of weights 0 and 1"),
    ],
)
def test_bad_weights_are_refused(weights, said):
    for call in (describe, lambda bad: send_weights(bad, Tape())):
        with pytest.raises(ValueError, match=said):
            call(weights)


NO_METAS = [
    "a", ("a", (2,)), ("a", 2, "int8"), ("a", (-1,), "int8"), ("a", (2,), "nn"), ("a", "2", "int8"),
    (b"a", (2,), "int8"), ("a", ("x",), "int8"), ("a", (2.9, 3), "int8"), ("a", ("3",), "int8"),
    ("a", (2,), "uint4"), ("a", (2,), "qint8"), ("a", (2,), torch.int1), ("a", (2,), None),
]  # fmt: skip


@pytest.mark.parametrize("meta", NO_METAS, ids=str)
def test_bad_descriptions_are_refused(meta):
    with pytest.raises(ValueError, match=r"description 0 is .*: must be a name, a shape and a dt"):
        receive_weights([meta], Tape([]), 0)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_quantized_tensors_are_refused():
    quantized = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
    with pytest.raises(
        ValueError, match=r"qint8, torch.strided, on cpu: must be dense, not quanti"
    ):
        describe({"a": quantized})


def test_bad_arguments_are_refused():
    source, sink = Tape(), Tape([])
    with pytest.raises(ValueError, match=r"src=1: must be this rank, 0, because it sends"):
        send_weights([], source, 1)
    with pytest.raises(ValueError, match=r"src=1: must be another rank than this one, which rec"):
        receive_weights([], sink, 1)
    with pytest.raises(ValueError, match=r"src=2: must be in 0..1"):
        receive_into({}, sink, 2)
    with pytest.raises(ValueError, match=r"buffer_bytes=0: must be at least 1"):
        receive_weights([], sink, 0, buffer_bytes=0)
    with pytest.raises(ValueError, match=r"buffer_bytes=1.5: must be an integer"):
        send_weights([], source, buffer_bytes=1.5)
    with pytest.raises(ValueError, match=r"timeout=-1: must be finite seconds, at least 0"):
        send_weights([], source, timeout=-1)
    with pytest.raises(ValueError, match=r"timeout=3: must be None for Tape"):
        send_weights([], source, timeout=3)
    with pytest.raises(
        ValueError, match=r"communicator='tcp': must be a ProcessGroup of torch, or"
    ):
        send_weights([], "tcp")


# The source compares what it sends with what was announced: before it sends anything where all
# weights are there, else before the weight that differs.


def test_the_source_keeps_to_its_announcement():
    weights = sizes_of(3, 4, 5, 6)
    metas = describe(weights)
    for changed, said in [
        (weights[:3], "weight 3 is none here, and 'w3' of shape"),
        ([*weights, ("x", torch.zeros(1))], "weight 4 is 'x' of shape .* here, and none in metas"),
        ([weights[1], weights[0], *weights[2:]], "weight 0 is 'w1' .* here, and 'w0'"),
    ]:
        tape, said = Tape(), f"rank 0 does not send what metas tells: {said}"
        with pytest.raises(ValueError, match=said):
            send_weights(changed, tape, packed=False, metas=metas)
        assert tape.kept == []
        with pytest.raises(ValueError, match=said):
            send_weights(iter(changed), tape, packed=False, metas=metas)
        assert [t.numel() for t in tape.kept] in ([3, 4, 5], [3, 4, 5, 6], [])
    tape = Tape()
    send_weights(iter(weights), tape, packed=False, metas=metas)
    assert len(tape.kept) == 4


# Weights of a mapping or a list are all checked before the first is sent, so a wrong one costs
# neither broadcasts nor the communicator.


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("announced", [True, False])
def test_a_mapping_is_checked_before(kind, announced):
    tape, weights = Tape(), sizes_of(*[10] * 5)
    metas = describe(weights) if announced else None
    with pytest.raises(ValueError, match=r"'sparse' of .* must be dense"):
        send_weights(kind([*weights, ("sparse", torch.eye(2).to_sparse())]), tape, packed=False,
                     metas=metas)  # fmt: skip
    assert tape.kept == []
    send_weights(kind(weights), tape, packed=False)
    assert len(tape.kept) == 5


# A rank dies in the middle. The others get the error of the communicator within their deadline,
# and it says what was on the way. Rank 1 is killed after it has the first of the large weights.

LARGE = 2**24


def large_weights():
    return [(f"layer.{n}", torch.full((LARGE,), n, dtype=torch.uint8)) for n in range(12)]


def receiver_dies(here, packed):
    group = form(here)
    if here.rank == 1:
        for _ in receive_weights(describe(large_weights()), group, 0, packed=packed,
                                 buffer_bytes=2 * LARGE):  # fmt: skip
            os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    text = (
        r"^rank 0, sending weights? (\d+).*'layer\.\1'.*\(\d+ bytes\): broadcast failed on rank 0"
    )
    with pytest.raises(CollectiveError, match=text) as caught:
        send_weights(large_weights(), group, packed=packed, buffer_bytes=2 * LARGE, timeout=3)
    assert time.monotonic() - began < 3 * 3 + SLACK
    assert caught.value.operation == "broadcast"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
def test_a_receiver_dies(packed):
    run_ranks(receiver_dies, 2, packed, killed=[1])


def sender_dies(here, packed):
    def weights():
        for number, pair in enumerate(large_weights()):
            if number == 7:
                here.ask("one has some")
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair

    group, options = form(here), {"packed": packed, "buffer_bytes": 2 * LARGE}
    if here.rank == 0:
        send_weights(weights(), group, **options)
    began, received = time.monotonic(), []

    def receive():
        metas = describe(large_weights())
        for pair in receive_weights(metas, group, 0, timeout=3, **options):
            received.append(pair)
            here.tell("one has some")

    text = (
        r"^rank [12], receiving weights? (\d+).*'layer\.\1'.*: broadcast failed on rank [12] of 3"
    )
    with pytest.raises(CollectiveError, match=text):
        receive()
    assert time.monotonic() - began < 8 * 3 + SLACK
    assert 0 < len(received) <= 7
    check_same(received, large_weights()[: len(received)])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
def test_the_source_dies(packed):
    run_ranks(sender_dies, 3, packed, killed=[0])


# Nobody sends, or nobody receives: the deadline ends the wait.


def nobody_sends(here):
    group, weights = form(here), sizes_of(1000)
    if here.rank == 1:
        began = time.monotonic()
        text = r"^rank 1, receiving weight 0, 'w0' \(1000 bytes\): broadcast failed .* of 0.5 s: "
        with pytest.raises(CollectiveError, match=text):
            receive_into(weights, group, 0, timeout=0.5)
        assert 0.4 < time.monotonic() - began < SLACK
    here.meet("end")


def test_nobody_sends():
    run_ranks(nobody_sends, 2)


# An error of a user's iterator comes through as it is. The broadcast before it is complete, and the
# caller may change the tensors at once.


def iterator_raises(here):
    def weights():
        yield "first", first
        raise KeyError("layer 3")

    group, first = form(here), torch.full((LARGE,), 1, dtype=torch.uint8)
    if here.rank == 0:
        with pytest.raises(KeyError, match=r"^'layer 3'$"):
            send_weights(weights(), group, packed=False)
        first.fill_(7)
    else:
        metas = [*describe([("first", first)]), ("second", (7,), "uint8")]
        received = receive_weights(metas, group, 0, packed=False, timeout=3)
        check_same([next(received)], [("first", first)])
        with pytest.raises(CollectiveError, match=r"receiving weight 1, 'second' \(7 bytes\)"):
            next(received)
    refused(here, group)
    here.meet("end")


def refused(here, group):
    """The communicator takes no other transfer, in either direction."""
    text = f"^rank {here.rank} can neither send nor receive: the last transfer .* did not end; des"
    with pytest.raises(CollectiveError, match=text):
        send_weights(sizes_of(3), group)
    with pytest.raises(CollectiveError, match=text):
        receive_weights(describe(sizes_of(3)), group, 1 - here.rank)


def test_an_iterator_raises():
    run_ranks(iterator_raises, 2)


# A transfer breaks off in the middle, by Ctrl-C on the source or because a receiver drops its
# iterator. The next one would mix the two, so the rank refuses it. Nothing is refused if an error
# came before anything was sent, or if a receiver has all weights and did not ask for more.


def break_off(here, on_rank):
    def weights():
        for number, pair in enumerate(sizes_of(*[100] * 10)):
            if number == 4 and on_rank == 0:
                raise KeyboardInterrupt
            yield pair

    group, metas = form(here), describe(sizes_of(*[100] * 10))
    if here.rank == 0:
        with pytest.raises(ValueError, match="does not send what metas tells"):
            send_weights(weights(), group, metas=metas[::-1])
        send_weights(sizes_of(100), group, packed=False)
        with pytest.raises(KeyboardInterrupt if on_rank == 0 else CollectiveError):
            send_weights(weights(), group, packed=False, timeout=2)
    else:
        next(receive_weights(metas[:1], group, 0, packed=False))
        received = receive_weights(metas, group, 0, packed=False, timeout=2)
        if on_rank == 0:
            with pytest.raises(CollectiveError, match="receiving weight 4, 'w4'"):
                list(received)
        else:
            next(received)
            del received
    refused(here, group)
    here.meet("end")


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_transfer_breaks_off(on_rank):
    run_ranks(break_off, 2, on_rank)


# Ctrl-C may come when a broadcast has begun and its call has not returned. On a GPU, memory that is
# left then must not be used again before the broadcast has ended: the channel is told of it.


class InterruptedTape(Tape):
    def broadcast(self, tensor, src):
        self.kept.append(tensor)
        if len(self.kept) == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
def test_ctrl_c_when_a_broadcast_has_begun(packed, monkeypatch):
    left, tape = [], InterruptedTape()
    monkeypatch.setattr(Channel, "leave", lambda _, tensor: left.append(tensor))
    with pytest.raises(KeyboardInterrupt):
        send_weights(sizes_of(*[10] * 9), tape, packed=packed, buffer_bytes=15)
    assert [tensor.data_ptr() for tensor in left] == [tape.kept[1].data_ptr()]


# Ctrl-C ends a wait over gloo long before its deadline, on the source and on a receiver.


def send_or_receive(weights, group, **options):
    if group.rank() == 0:
        send_weights(weights, group, **options)
    else:
        receive_into(weights, group, 0, **options)


def interrupted(here, on_rank, packed):
    group, weights, sent = form(here), large_weights(), []
    if here.rank == on_rank:

        def interrupt_the_transfer():
            until(lambda: past_of(group).unfinished)
            sent.append(interrupt(os.getpid()))

        threading.Thread(target=interrupt_the_transfer, daemon=True).start()
        options = {"packed": packed, "buffer_bytes": 2 * LARGE, "timeout": 3 * SLACK}
        with pytest.raises(KeyboardInterrupt):
            send_or_receive(weights, group, **options)
        assert time.monotonic() - sent[0] < SLACK
        refused(here, group)
    here.meet("end")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
@pytest.mark.parametrize("on_rank", [0, 1])
def test_ctrl_c_ends_a_wait(on_rank, packed):
    run_ranks(interrupted, 2, on_rank, packed)


# On a GPU, each chunk has a stream. Here every broadcast is slow, and what the caller's stream does
# before and after is not. Weights that are only just made must be sent whole, although they are
# changed as soon as the call returns; received ones must be whole, although memory is used again.

GPUS = torch.cuda.device_count()


def needs_gpus(number):
    return pytest.mark.skipif(number > GPUS, reason=f"needs {number} GPUs, and there are {GPUS}")


class SlowTape(Tape):
    device = torch.device("cuda", 0)

    def broadcast(self, tensor, src):
        torch.cuda._sleep(20_000_000)  # cycles
        super().broadcast(tensor, src)


@needs_gpus(1)
@pytest.mark.xdist_group("gpu")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one by one"])
def test_streams_of_a_gpu(packed):
    torch.cuda.set_device(0)
    options = {"packed": packed, "buffer_bytes": 2**21, "timeout": 20}
    expected = [(f"w{n}", torch.full((2**20 - n,), n, dtype=torch.uint8)) for n in range(12)]
    weights = [(name, torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda"))
               for name, tensor in expected]  # fmt: skip
    torch.cuda._sleep(100_000_000)
    for number, (_, tensor) in enumerate(weights):
        tensor.fill_(number)
    tape = SlowTape()
    send_weights(weights, tape, **options)
    for _, tensor in weights:
        tensor.fill_(255)
    assert len(tape.kept) == (4 if packed else 12)
    for into in (False, True):
        played = SlowTape(tape.kept)
        if into:
            receive_into(weights, played, 0, **options)
            received = weights
        else:
            names = describe(expected)
            received = [(n, t + 0) for n, t in receive_weights(names, played, 0, **options)]
        check_same([(name, tensor.cpu()) for name, tensor in received], expected)


# A transfer takes memory for two chunks, or for three if the caller gets views of them, also if
# tensors have gaps. Chunks that differ a little take as much memory as the largest. When a transfer
# breaks off, memory is not used again before the broadcast that is under way has written to it.

MIB = 2**20


class SevensSlowly(Tape):
    device = torch.device("cuda", 0)

    def __init__(self, rank=1, interrupted=False):
        super().__init__([])
        self.rank, self.interrupted = rank, interrupted

    def broadcast(self, tensor, src):
        torch.cuda._sleep(20_000_000)  # cycles
        tensor.fill_(7)
        if self.interrupted:
            raise KeyboardInterrupt


def peak_memory(call):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@needs_gpus(1)
@pytest.mark.xdist_group("gpu")
def test_memory_of_a_gpu():
    torch.cuda.set_device(0)
    sizes, options = [MIB - 8 * n for n in range(40)], {"buffer_bytes": 4 * MIB, "timeout": 20}
    into = {f"w{n}": torch.zeros(size, dtype=torch.uint8, device="cuda")
            for n, size in enumerate(sizes)}  # fmt: skip
    gaps = {name: torch.zeros(2 * tensor.numel(), dtype=torch.uint8, device="cuda")[::2]
            for name, tensor in into.items()}  # fmt: skip
    metas = describe(into)
    for some in (into, gaps):
        peak = peak_memory(lambda some=some: receive_into(some, SevensSlowly(), 0, **options))
        assert peak == 2 * 5 * MIB
        assert all(bool((tensor == 7).all()) for tensor in some.values())
        peak = peak_memory(lambda some=some: send_weights(some, SevensSlowly(0), **options))
        assert peak == 2 * 5 * MIB
    peak = peak_memory(lambda: [0 for _ in receive_weights(metas, SevensSlowly(), 0, **options)])
    assert peak == 3 * 5 * MIB
    received = receive_weights(metas, SevensSlowly(), 0, **options)
    next(received)
    del received
    check_left_alone()
    with pytest.raises(KeyboardInterrupt):
        receive_into(into, SevensSlowly(interrupted=True), 0, **options)
    check_left_alone()


def check_left_alone():
    """Memory that is taken now is not written to by what is under way."""
    gc.collect()
    others = [torch.zeros(5 * MIB, dtype=torch.uint8, device="cuda") for _ in range(3)]
    torch.cuda.synchronize()
    assert not any(bool(tensor.any()) for tensor in others)


# A communicator that does not abort, as vLLM's: two broadcasts that are late share one deadline.


class LateTape(Tape):
    device = torch.device("cuda", 0)

    def broadcast(self, tensor, src):
        torch.cuda._sleep(6_000_000_000)  # cycles; a GPU makes fewer than 2.5e9 in a second


@needs_gpus(1)
@pytest.mark.xdist_group("gpu")
def test_late_broadcasts_share_a_deadline():
    torch.cuda.set_device(0)
    weights = [(f"w{n}", torch.zeros(100, dtype=torch.uint8, device="cuda")) for n in range(3)]
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="sending weight 0, 'w0'"):
        send_weights(weights, LateTape(), packed=False, timeout=2)
    assert time.monotonic() - began < 2 * 2
    torch.cuda.synchronize()


# Between two GPUs, over an NCCL group of torch: weights that are on the GPU, and some on the CPU.


def over_nccl(here):
    torch.cuda.set_device(here.rank)
    with here.place("nccl") as (port, listener):
        group = stateless_init_torch_distributed_process_group(
            LOCAL, port, here.rank, here.world_size, "nccl", listen_socket=listener
        )
    on_gpu = [(name, tensor.detach().cuda()) for name, tensor in every_dtype() + views()]
    for weights, packed in itertools.product((on_gpu, every_dtype()), (True, False)):
        options = {"packed": packed, "buffer_bytes": 300, "timeout": 30}
        if here.rank == 0:
            send_weights(weights, group, **options)
        else:
            received = list(receive_weights(describe(weights), group, 0, **options))
            assert all(tensor.is_cuda for _, tensor in received)
            check_same([(n, t.cpu()) for n, t in received], [(n, t.cpu()) for n, t in weights])
    here.meet("end")
    stateless_destroy_torch_distributed_process_group(group)


@needs_gpus(2)
@pytest.mark.xdist_group("gpu")
def test_over_nccl():
    run_ranks(over_nccl, 2, deadline=100)


# The benchmark: a model in small, and the ratios that it prints.


def test_the_benchmark(capsys):
    small = ["weights", "--layers", "1", "--vocabulary", "64", "--repeats", "2"]
    main([*small, "--buffer-mib", "1", "2", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ways = ["bare", "one by one", "packed", "packed, into"]
    assert [line["way"] for line in lines] == ways * 2
    assert [line["buffer_bytes"] for line in lines] == [2**20] * 4 + [2**21] * 4
    assert all(line["seconds"] > 0 and line["ratio"] > 0 for line in lines)
    assert lines[0]["ratio"] == 1 and len({line["num_bytes"] for line in lines}) == 1
    main([*small, "--buffer-mib", "1"])
    printed = capsys.readouterr().out
    assert all(way in printed for way in ways)
    for bad in (["--world-size", "1"], ["--layers", "-1"], ["--buffer-mib", "0"]):
        with pytest.raises(SystemExit):
            main(["weights", *bad])
        assert bad[0] in capsys.readouterr().err


# A tensor of 0 or 1 elements is contiguous, whatever its strides are.


def odd_strides(here):
    group = form(here)
    weights = {
        "byte": torch.ones(1, dtype=torch.int8),  # so that the next one is misaligned in its chunk
        "one": torch.arange(2.0).view(1, 2)[:, 1],
        "none": torch.ones(0, 2)[:, 0],
    }
    for packed in (True, False):
        if here.rank == 0:
            send_weights(weights, group, packed=packed)
        else:
            received = dict(receive_weights(describe(weights), group, 0, packed=packed))
            assert all(torch.equal(received[name], weights[name]) for name in weights)
    here.meet("end")


def test_odd_strides():
    run_ranks(odd_strides, 2)


def test_agree_wants_a_group_of_refdist():
    with pytest.raises(ValueError, match="group is a list of builtins; agree"):
        agree([], [], 0)
