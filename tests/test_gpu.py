"""What needs GPUs: NCCL groups and symmetric memory, on one process for each GPU."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, run_ranks

from refdist import (
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.benchmarks.allreduce import time_all_reduce
from refdist.benchmarks.records import describe_machine, read_timings
from refdist.benchmarks.ways import SMALL_BYTES, WAYS, WITHOUT_MULTICAST

GPUS = torch.cuda.device_count()
DEADLINE = 110
LIMIT = timedelta(seconds=60)

pytestmark = [
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs, and this machine has {GPUS}"),
    pytest.mark.xdist_group("gpu"),
    pytest.mark.timeout(180),
]


def form(here, name="group", timeout=LIMIT, **options):
    """An NCCL group of all ranks, each on the GPU of its number."""
    os.environ.update(WITHOUT_MULTICAST)
    torch.cuda.set_device(here.rank)
    with here.place(name) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, here.rank, here.world_size, "nccl", listen_socket=listener,
            timeout=timeout, **options,
        )  # fmt: skip


def _sum(here):
    group = form(here)
    results = []
    for size in (1, 1000, 2**20):
        tensor = torch.full((size,), float(here.rank + 1), device="cuda")
        dist.all_reduce(tensor, group=group)
        results.append(bool((tensor == sum(range(here.world_size + 1))).all()))
    assert not dist.is_initialized()
    here.meet("done")
    stateless_destroy_torch_distributed_process_group(group)
    return results


@pytest.mark.parametrize("world_size", sorted({2, GPUS}))
def test_sum_without_global_state(world_size):
    assert run_ranks(_sum, world_size, deadline=DEADLINE) == [[True] * 3] * world_size


# All-reduce is timed in every way, each of which is verified exactly before. Larger messages, and
# groups that are not registered, have fewer ways.


def _measure(here, dtype):
    group = form(here, group_name="measured")
    sizes = [1024, 2**20, 2 * SMALL_BYTES]
    timings = time_all_reduce(group, f"cuda:{here.rank}", sizes, dtype, runs=2)
    stateless_destroy_torch_distributed_process_group(group)
    return timings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_reduce_in_every_way(dtype):
    by_rank = run_ranks(_measure, 2, dtype, deadline=DEADLINE)
    assert by_rank[0] == by_rank[1]
    seen = [(timing.num_bytes, timing.way) for timing in by_rank[0]]
    assert seen == [
        *[(1024, way) for way in WAYS],
        *[(2**20, way) for way in WAYS],
        (2 * SMALL_BYTES, "plain"),
    ]


def _measure_unregistered(here):
    group = form(here)
    with pytest.warns(UserWarning, match="no symmetric memory: group: is not registered"):
        timings = time_all_reduce(group, f"cuda:{here.rank}", [1024], runs=2)
    stateless_destroy_torch_distributed_process_group(group)
    return [timing.way for timing in timings]


def test_an_unregistered_group_has_no_symmetric_memory():
    ways = [["plain", "graph"]] * 2
    assert run_ranks(_measure_unregistered, 2, deadline=DEADLINE) == ways


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["device"].startswith(f"{GPUS} x ")
    assert machine["nccl"].count(".") == 2 and machine["cuda"] and machine["driver"]
    assert machine["links"]


def test_all_reduce_on_the_command_line(tmp_path):
    from refdist.benchmarks.__main__ import main

    output = tmp_path / "timings.jsonl"
    main(["allreduce", "--sizes", "65536", "--repeats", "2", "--output", str(output)])
    timings, machine = read_timings(output)
    assert {timing.world_size for timing in timings} == {GPUS}
    assert [timing.way for timing in timings] == [*WAYS, *WAYS]
    assert machine["backend"] == "nccl"
