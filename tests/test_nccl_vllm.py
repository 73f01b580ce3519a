"""refdist's NcclCommunicator and vLLM's own PyNcclCommunicator in one communicator, on GPUs."""

import base64
import ctypes
import itertools
import os
import signal
import time

import pytest
import torch
from ranks import run_ranks
from test_nccl import DEADLINE, GPUS, SLACK, nccl4py
from test_vllm_wire import OURS, THEIRS, group_of
from torch.distributed import ReduceOp
from vllm_module import NEWEST, import_vllm, needs_vllm

from refdist import CollectiveError
from refdist.benchmarks.ways import WITHOUT_MULTICAST
from refdist.benchmarks.weights import qwen_weights
from refdist.nccl import NcclCommunicator, new_unique_id_bytes
from refdist.weights import BUFFER_BYTES, describe, receive_into, receive_weights, send_weights

pytestmark = [
    pytest.mark.skipif(
        GPUS < 2 or nccl4py is None,
        reason=f"needs two CUDA GPUs and nccl4py, and this machine has {GPUS} GPUs",
    ),
    needs_vllm(NEWEST),
    pytest.mark.xdist_group("gpu"),
    pytest.mark.timeout(180),
]

# refdist as the trainer, rank 0, and as the last rank
LAYOUTS = [(OURS, *[THEIRS] * (max(GPUS, 2) - 1)), (*[THEIRS] * (max(GPUS, 2) - 1), OURS)]
in_each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)


def communicator_by_store(here, layout, **options):
    """Each rank has a group of its own kind, on one store, and a communicator over it."""
    prepare(here)
    group = group_of(here, layout, NEWEST)
    if layout[here.rank] == OURS:
        return NcclCommunicator(group, here.rank, **options)
    return vllm_nccl()[0](group, here.rank)


def communicator_by_id(here, layout, **options):
    """Rank 0 hands the id out as text, as vLLM takes it in a request (``nccl_unique_id_b64``)."""
    prepare(here)
    if layout[here.rank] == OURS:
        form, new_id = NcclCommunicator.from_unique_id_bytes, new_unique_id_bytes
    else:
        communicator, library = vllm_nccl()
        form, new_id = communicator.from_unique_id_bytes, library().ncclGetUniqueId
    if here.rank == 0:
        here.tell("id", base64.b64encode(bytes(new_id())).decode())
    unique_id = base64.b64decode(here.ask("id"), validate=True)
    return form(unique_id, here.rank, len(layout), here.rank, **options)


def vllm_nccl():
    """vLLM's ``PyNcclCommunicator`` and ``NCCLLibrary``, on this rank.

    The library looks up all functions that vLLM may call. An older NCCL, such as 2.28 of torch
    2.11, lacks those that suspend a communicator and tell its properties. None is needed here.
    """
    import_vllm(NEWEST)
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    there = ctypes.CDLL(os.environ.get("VLLM_NCCL_SO_PATH") or "libnccl.so.2")
    functions = [one for one in NCCLLibrary.exported_functions if hasattr(there, one.name)]
    NCCLLibrary.exported_functions = functions
    return PyNcclCommunicator, NCCLLibrary


def prepare(here):
    os.environ.update(WITHOUT_MULTICAST)
    torch.cuda.set_device(here.rank)


# Every operation that both have is right on every rank, whoever is rank 0.


def _every_operation(here, form, layout):
    communicator, n, rank = form(here, layout), len(layout), here.rank
    assert (communicator.rank, communicator.world_size) == (rank, n)
    mine = torch.tensor([1.0, 2.0]).repeat(500 * n).cuda() + rank
    sum_of_all = [n + n * (n - 1) // 2, 2 * n + n * (n - 1) // 2]
    expected = {
        ReduceOp.SUM: sum_of_all, ReduceOp.MIN: [1, 2], ReduceOp.MAX: [n, n + 1],
        ReduceOp.AVG: [(n + 1) / 2, (n + 3) / 2],
    }  # fmt: skip
    for op, pair in expected.items():
        assert communicator.all_reduce(mine, op=op).tolist() == pair * (500 * n)
        part = torch.zeros(1000, device="cuda")
        communicator.reduce_scatter(part, mine, op)
        assert part.tolist() == pair * 500
    in_place = mine.clone()
    communicator.all_reduce(in_place, in_place)
    assert in_place.tolist() == sum_of_all * (500 * n)
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16):
        _check_moves(communicator, torch.arange(6, device="cuda").to(dtype) + 10 * rank, rank, n)
    here.meet("done")
    communicator.destroy()


def _check_moves(communicator, mine, rank, n):
    """Every rank has 0, 1, ..., 5 plus ten times its rank, and sends it around."""
    of_rank = [[10 * r + i for i in range(6)] for r in range(n)]
    together = torch.zeros(6 * n, dtype=mine.dtype, device="cuda")
    communicator.all_gather(together, mine)
    assert together.tolist() == list(itertools.chain(*of_rank))
    for src in range(n):
        tensor = mine.clone()
        communicator.broadcast(tensor, src)
        assert tensor.tolist() == of_rank[src]
    left, right, received = (rank - 1) % n, (rank + 1) % n, torch.zeros_like(mine)
    communicator.group_start()
    communicator.send(mine, right)
    communicator.recv(received, left)
    communicator.group_end()
    assert received.tolist() == of_rank[left]
    received = torch.zeros_like(mine)
    if rank == 0:
        communicator.send(mine, n - 1)
    elif rank == n - 1:
        communicator.recv(received, 0)
        assert received.tolist() == of_rank[0]


@in_each_layout
@pytest.mark.parametrize("form", [communicator_by_store, communicator_by_id])
def test_every_operation(form, layout):
    run_ranks(_every_operation, len(layout), form, layout, deadline=DEADLINE)


# Weights with the sizes of Qwen2.5-0.5B, 988 MB of random bits, from refdist to vLLM's ranks and
# from one of these to the others, one by one and packed. Every rank knows the bits by the seed.


class Model:
    """Names, shapes and dtypes of the weights, and their bits, which follow from a seed."""

    def __init__(self, seed):
        self.metas = describe(qwen_weights())
        self.numbers = {name: number for number, (name, _, _) in enumerate(self.metas)}
        self.seed = seed

    def weight(self, name, shape, dtype):
        """One of them."""
        dtype = getattr(torch, dtype)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        generator = torch.Generator("cuda").manual_seed(1000 * self.seed + self.numbers[name])
        drawn = torch.randint(
            0, 256, (num_bytes,), dtype=torch.uint8, device="cuda", generator=generator
        )
        return drawn.view(dtype).view(shape)

    def weights(self):
        """All of them, for any stream."""
        found = [(name, self.weight(name, *rest)) for name, *rest in self.metas]
        torch.cuda.synchronize()
        return found

    def empty(self):
        """Tensors of zeros to receive into, for any stream."""
        found = [
            (name, torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda"))
            for name, shape, dtype in self.metas
        ]
        torch.cuda.synchronize()
        return found

    def check(self, received):
        """Every weight came once, in order, with the right bits."""
        for (name, tensor), (expected, shape, dtype) in zip(received, self.metas, strict=True):
            assert (name, tuple(tensor.shape)) == (expected, shape)
            right = self.weight(name, shape, dtype)
            assert tensor.dtype == right.dtype
            assert torch.equal(tensor.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


def vllm_sends(communicator, model, packed, buffer_bytes):
    from vllm.distributed.weight_transfer import packed_tensor

    if packed:
        packed_tensor.packed_nccl_broadcast_producer(
            iter(model.weights()), communicator, communicator.rank, lambda pair: pair[1],
            buffer_bytes,
        )  # fmt: skip
    else:
        for _, tensor in model.weights():
            communicator.broadcast(tensor, communicator.rank)
    torch.cuda.synchronize()


def vllm_receives(communicator, model, src, packed, buffer_bytes):
    from vllm.distributed.weight_transfer import packed_tensor

    received = model.empty()
    if packed:
        metas = [(n, (list(shape), getattr(torch, dtype))) for n, shape, dtype in model.metas]
        found, received = received, []

        def keep(chunk):
            for name, tensor in chunk:
                place = found[len(received)][1]
                received.append((name, place.copy_(tensor)))

        packed_tensor.packed_nccl_broadcast_consumer(
            iter(metas), communicator, src, keep, buffer_bytes, device=communicator.device
        )
    else:
        for _, tensor in received:
            communicator.broadcast(tensor, src)
    torch.cuda.synchronize()
    model.check(received)


def refdist_receives(communicator, model, src, into, **options):
    if into:
        received = model.empty()
        receive_into(received, communicator, src, **options)
        model.check(received)
    else:
        model.check(receive_weights(model.metas, communicator, src, **options))


def _hand_over(here, layout, packed, buffer_bytes):
    communicator = communicator_by_store(here, layout)
    ours = layout[here.rank] == OURS
    trainers = [layout.index(OURS), layout.index(THEIRS)]
    for seed, src in enumerate([*trainers, *trainers]):
        model, options = Model(seed), {"packed": packed, "buffer_bytes": buffer_bytes}
        if ours and here.rank == src:
            send_weights(model.weights(), communicator, metas=model.metas, **options)
        elif ours:
            refdist_receives(communicator, model, src, into=seed > 1, **options)
        elif here.rank == src:
            vllm_sends(communicator, model, packed, buffer_bytes)
        else:
            vllm_receives(communicator, model, src, packed, buffer_bytes)
    here.meet("done")
    communicator.destroy()


@in_each_layout
@pytest.mark.parametrize(
    ("packed", "buffer_bytes"),
    [(False, BUFFER_BYTES), (True, BUFFER_BYTES), (True, 2**26)],
    ids=["one-by-one", "packed", "packed-in-small-chunks"],
)
def test_weights(layout, packed, buffer_bytes):
    run_ranks(_hand_over, len(layout), layout, packed, buffer_bytes, deadline=DEADLINE)


# vLLM's rank dies in the middle of a transfer: refdist's rank gets an error in time that says what
# it was doing, whether it sends or receives.


def _send(communicator, model, sender):
    send_weights(model.weights(), communicator, sender)


def _receive(communicator, model, sender):
    list(receive_weights(model.metas, communicator, sender))


def _left_alone(here, layout, sends):
    communicator = communicator_by_store(here, layout, timeout=2)
    model, alive = Model(0), layout.index(OURS)
    sender = alive if sends else layout.index(THEIRS)
    tensor = torch.ones(1000, device="cuda")
    communicator.broadcast(tensor, sender)
    torch.cuda.synchronize()
    here.meet("connected")
    if here.rank != alive:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    what = "sending" if sends else "receiving"
    text = rf"^rank {here.rank}, {what} weight.*: broadcast failed on rank {here.rank} of "
    hand_over = _send if sends else _receive
    with pytest.raises(CollectiveError, match=text):
        hand_over(communicator, model, sender)
    assert communicator.disabled
    return time.monotonic() - start


@in_each_layout
@pytest.mark.parametrize("sends", [True, False], ids=["sends", "receives"])
def test_vllms_ranks_die(layout, sends):
    killed = [rank for rank, kind in enumerate(layout) if kind == THEIRS]
    alive = layout.index(OURS)
    ran = run_ranks(_left_alone, len(layout), layout, sends, killed=killed, deadline=DEADLINE)
    assert ran[alive] < 4 + SLACK
