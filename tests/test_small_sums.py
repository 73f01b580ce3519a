"""cpu_all_reduce_: the sum of a small tensor, with the same bits on every rank."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from ranks import LOCAL, run_ranks

from refdist import (
    CollectiveError,
    cpu_all_reduce_,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)

SLACK = 6.0
LIMIT = timedelta(seconds=20)


def form(here, **options):
    with here.place("group") as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, here.rank, here.world_size, "gloo", listen_socket=listener, **options
        )


def end(here, group):
    here.meet("end")
    stateless_destroy_torch_distributed_process_group(group)


def _sum_in_place(here):
    group = form(here)
    tensor = torch.arange(4) + here.rank
    returned = cpu_all_reduce_(tensor, group)
    cpu_all_reduce_(tensor, group, timeout=LIMIT)
    with pytest.raises(ValueError, match="tensor on meta: must be on the CPU"):
        cpu_all_reduce_(torch.empty(1, device="meta"), group)
    end(here, group)
    return returned is tensor, tensor.tolist()


# One rank; two, which swap; up to nine, of which rank 0 is the only parent; ten and more.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 11])
def test_a_sum_in_place(world_size):
    offset = sum(range(world_size))
    expected = [world_size * (world_size * n + offset) for n in range(4)]
    assert run_ranks(_sum_in_place, world_size) == [(True, expected)] * world_size


# Numbers whose sum depends on the order of the additions, and NaNs that can be told apart.


def _sum_many(here):
    group = form(here)
    generator = torch.Generator().manual_seed(here.rank)
    results = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in [(1,), (1000,), (3, 0), (64, 128), ()]:
            spread = 10 ** torch.randint(-3, 4, shape, generator=generator)
            tensor = (torch.randn(shape, generator=generator) * spread).to(dtype)
            cpu_all_reduce_(tensor, group)
            results[str(dtype), shape] = tensor.reshape(-1).view(torch.uint8).tolist()
    nan = torch.tensor([0x7FC00000 + here.rank, here.rank], dtype=torch.int32).view(torch.float32)
    cpu_all_reduce_(nan, group)
    results["nan"] = nan.view(torch.int32).tolist()
    end(here, group)
    return results


@pytest.mark.parametrize("world_size", [2, 3, 5, 10])
def test_every_rank_has_the_same_bits(world_size):
    by_rank = run_ranks(_sum_many, world_size)
    assert all(results == by_rank[0] for results in by_rank)
    assert by_rank[0]["torch.float64", (1000,)] != [0] * 8000


# Views, tensors that require gradients, and many calls in a row, in which some ranks run ahead.


def _sum_unusual(here):
    group = form(here)
    whole = torch.arange(12.0).reshape(3, 4)
    cpu_all_reduce_(whole[:, 1], group)
    negated = torch._neg_view(-torch.arange(3.0)) if here.rank == 0 else torch.arange(3.0)
    cpu_all_reduce_(negated, group)
    weights = torch.ones(3, requires_grad=True)
    cpu_all_reduce_(weights, group)
    counts = []
    for number in range(200):
        tensor = torch.full((1 + number % 7,), number)
        counts.append(cpu_all_reduce_(tensor, group).unique().tolist())
    end(here, group)
    return whole.tolist(), negated.tolist(), weights.tolist(), counts


@pytest.mark.parametrize("world_size", [2, 4])
def test_views_and_many_calls(world_size):
    whole = torch.arange(12.0).reshape(3, 4)
    whole[:, 1] *= world_size
    expected = (
        whole.tolist(), [0, world_size, 2 * world_size], [world_size] * 3,
        [[number * world_size] for number in range(200)],
    )  # fmt: skip
    assert run_ranks(_sum_unusual, world_size) == [expected] * world_size


# Rank 1 does not take part: rank 0 gets an error in the time of the call, or else of the group. If
# it has died, all others get one.


def _sum_alone(here, own_timeout):
    group = form(here, timeout=timedelta(seconds=10 if own_timeout else 3))
    if here.rank == 1:
        return here.ask("rank 0 gave up")
    start = time.monotonic()
    with pytest.raises(CollectiveError, match=r"^cpu_all_reduce_ failed on rank 0 of 2") as caught:
        cpu_all_reduce_(torch.ones(1), group, timedelta(seconds=1) if own_timeout else None)
    assert caught.value.operation == "cpu_all_reduce_"
    seconds = time.monotonic() - start
    here.tell("rank 0 gave up")
    stateless_destroy_torch_distributed_process_group(group)
    return seconds


@pytest.mark.parametrize("own_timeout", [True, False])
def test_in_vain(own_timeout):
    assert run_ranks(_sum_alone, 2, own_timeout)[0] < (1 if own_timeout else 3) + SLACK


# One rank has another shape or dtype: all ranks get an error in time, and none a wrong sum.

MISFITS = {
    "longer": torch.ones(8),
    "empty": torch.ones(0),
    "as many bytes": torch.ones(4, dtype=torch.int32),
    "another shape": torch.ones(2, 2),
}


def _misfit(here, name):
    group = form(here)
    tensor = MISFITS[name] if here.rank == 1 else torch.ones(4)
    with pytest.raises(CollectiveError, match=rf"^cpu_all_reduce_ failed on rank {here.rank} of"):
        cpu_all_reduce_(tensor, group, timedelta(seconds=1))
    end(here, group)


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_another_shape_or_dtype(world_size, name):
    run_ranks(_misfit, world_size, name)


def _lose_a_rank(here):
    group = form(here, timeout=timedelta(seconds=5))
    cpu_all_reduce_(torch.ones(1), group)
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(CollectiveError, match=rf"^cpu_all_reduce_ failed on rank {here.rank} of 4"):
        cpu_all_reduce_(torch.ones(1), group)
    return time.monotonic() - start


def test_a_dead_rank():
    seconds = run_ranks(_lose_a_rank, 4, killed=[1])
    assert max(seconds[0], *seconds[2:]) < 2 * 5 + SLACK
