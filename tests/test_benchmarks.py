"""The all-reduce benchmark on real gloo groups."""

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, run_ranks

from refdist import stateless_init_torch_distributed_process_group
from refdist.benchmarks.allreduce import (
    AllReduceTiming,
    _verify,
    choose_backend,
    time_all_reduce,
)


def group_of(rank, name="group"):
    with rank.place(name) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, rank.rank, rank.world_size, "gloo", listen_socket=listener
        )


def measure(rank, dtype):
    return time_all_reduce(group_of(rank), sizes=[8, 4096, 2**20], dtype=dtype, runs=3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_rank_gets_a_timing_for_each_size(world_size, dtype):
    for timings in run_ranks(measure, world_size, dtype):
        assert [timing.num_bytes for timing in timings] == [8, 4096, 2**20]
        for timing in timings:
            assert timing.world_size == world_size
            assert 0 < timing.fastest <= timing.seconds <= timing.slowest


def lose_a_tensor(rank):
    group = group_of(rank)
    tensor = torch.zeros(10)
    _verify(tensor, group)
    # rank 1 takes part with zeros, as if its tensor had been lost
    if rank.rank == 1:
        dist.all_reduce(tensor.zero_(), group=group)
    else:
        with pytest.raises(RuntimeError, match="elements are wrong on rank 0"):
            _verify(tensor, group)


def test_a_wrong_sum_is_noticed():
    run_ranks(lose_a_tensor, 2)


def refuse(rank):
    group = group_of(rank)
    with pytest.raises(ValueError, match="size=10: must be a multiple of 4, above 0"):
        time_all_reduce(group, sizes=[10])
    with pytest.raises(ValueError, match="size=0: must be a multiple of 4"):
        time_all_reduce(group, sizes=[0])
    with pytest.raises(ValueError, match="runs=0: must be at least 1"):
        time_all_reduce(group, runs=0)


def test_bad_arguments_are_refused():
    run_ranks(refuse, 1)


def test_bandwidths_follow_their_definitions():
    timing = AllReduceTiming(8 * 10**9, world_size=8, seconds=2.0, fastest=1.0, slowest=3.0)
    assert timing.algorithm_bandwidth == 4e9
    assert timing.bus_bandwidth == 7e9


def test_backend_needs_a_gpu_for_each_rank():
    gpus = torch.cuda.device_count()
    assert choose_backend(1) == "gloo"
    assert choose_backend(gpus + 2) == "gloo"
    assert gpus < 2 or choose_backend(gpus) == "nccl"
