"""What needs GPUs: NCCL groups and symmetric memory, on one process for each GPU."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, run_ranks
from test_collectives import check_all

from refdist import (
    CollectiveError,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.benchmarks.allreduce import time_all_reduce
from refdist.benchmarks.records import describe_machine, read_timings
from refdist.benchmarks.ways import SMALL_BYTES, WAYS, WITHOUT_MULTICAST
from refdist.torch_groups import collectives

GPUS = torch.cuda.device_count()
DEADLINE = 110
SLACK = 10.0
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


# Every collective of refdist.torch_groups.collectives, with the results that gloo has to give too.


@pytest.mark.parametrize("world_size", sorted({1, 2, GPUS}))
def test_every_collective(world_size):
    check_all("nccl", world_size, deadline=DEADLINE)


# Rank 1 does not take part: rank 0 gets an error in time that names the operation, and both can
# end their group.


def _wait_in_vain(here):
    group = form(here)
    tensor = torch.ones(4, device="cuda")
    collectives.all_reduce(tensor, group, timeout=LIMIT)
    seconds = 0.0
    if here.rank == 0:
        start = time.monotonic()
        with pytest.raises(CollectiveError, match=r"^all_reduce failed on rank 0 of 2 .* of 2 s:"):
            collectives.all_reduce(tensor, group, timeout=timedelta(seconds=2))
        seconds = time.monotonic() - start
        here.tell("rank 0 gave up")
    here.ask("rank 0 gave up")
    stateless_destroy_torch_distributed_process_group(group)
    return seconds, float(torch.ones(1, device="cuda"))


def test_a_timeout_names_the_operation():
    (seconds, one), (_, other) = run_ranks(_wait_in_vain, 2, deadline=DEADLINE)
    assert 1.9 < seconds < 2 + SLACK
    assert one == other == 1  # the GPUs still work


# Rank 1 has died: rank 0 has work that cannot end, and destroys the group within its timeout.


def _outlive(here):
    group = form(here, timeout=timedelta(seconds=20))
    tensor = torch.ones(4, device="cuda")
    collectives.all_reduce(tensor, group, timeout=LIMIT)
    here.meet("summed")
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    collectives.all_reduce(tensor, group)
    stateless_destroy_torch_distributed_process_group(group)
    return time.monotonic() - start


def test_a_group_whose_peer_died_can_be_destroyed():
    assert run_ranks(_outlive, 2, killed=[1], deadline=DEADLINE)[0] < 20 + SLACK


# Groups come and go, also while another one works, and nothing stays.


def _come_and_go(here, rounds):
    lasting = form(here, "lasting")
    counts = []
    for number in range(rounds):
        group = form(here, f"group/{number}", group_name=f"group {number}")
        tensor = torch.ones(4, device="cuda")
        dist.all_reduce(tensor, group=group)
        dist.all_reduce(tensor, group=lasting)
        assert tensor.tolist() == [here.world_size**2] * 4
        stateless_destroy_torch_distributed_process_group(group)
        del group
        here.meet(f"round {number}")
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    stateless_destroy_torch_distributed_process_group(lasting)
    return counts


def test_groups_leave_nothing_behind():
    for counts in run_ranks(_come_and_go, 2, 20, deadline=DEADLINE):
        for kind in zip(*counts, strict=True):
            assert max(kind[-5:]) <= max(kind[2:8]) + 1, counts


# All-reduce is timed in every way, each of which is verified exactly before. Larger messages, and
# groups that are not registered, have fewer ways.


def _measure(here, dtype):
    group = form(here, group_name="measured")
    sizes = [1024, 2**20, 2 * SMALL_BYTES]
    timings = time_all_reduce(group, f"cuda:{here.rank}", sizes, dtype, runs=2)
    alone = time_all_reduce(group, f"cuda:{here.rank}", [64], dtype, runs=1, ways=["graph"])
    assert [timing.way for timing in alone] == ["graph"]
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
        timings = time_all_reduce(group, f"cuda:{here.rank}", [1024], runs=2, ways=list(WAYS))
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
