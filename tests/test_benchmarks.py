"""The benchmarks, on real processes and gloo groups."""

import json
import os
import signal
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, Watched, run_ranks, run_threads

from refdist import create_tcp_store, stateless_init_torch_distributed_process_group
from refdist.barrier import Barrier
from refdist.benchmarks.__main__ import main
from refdist.benchmarks.allreduce import (
    AllReduceTiming,
    _verify,
    choose_backend,
    time_all_reduce,
)
from refdist.benchmarks.bare import bare_barriers
from refdist.benchmarks.control import ControlTiming, exponent, time_control, time_many_ranks
from refdist.benchmarks.launch import run_ranks as run_benchmark_ranks
from refdist.compat import STORE_BARRIER, store_features


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


# The control plane: every operation of every implementation that is here, on real processes.


def test_control_times_every_operation():
    timings = time_control([2], repeats=1, target_seconds=0.01)
    by_name = {(t.operation, t.implementation): t for t in timings}
    assert all(t.world_size == 2 and t.seconds > 0 for t in timings)
    expected = {"barrier", "all_gather_obj", "broadcast_obj", "ping-pong", "64 MiB broadcast_obj"}
    assert {operation for operation, name in by_name if name == "refdist"} == expected
    assert ("barrier", "gloo") in by_name
    has_store_barrier = store_features()[STORE_BARRIER]
    assert (("barrier", "Store.barrier") in by_name) == has_store_barrier


# The bare requests are those of a barrier of refdist, neither more nor fewer.


def count_requests(rank, stores):
    requests = []
    store = Watched(stores[rank], lambda request, *_: requests.append(request))
    barrier = Barrier(store, rank, len(stores))
    bare = bare_barriers(store, rank, len(stores))["arrive, confirm, depart, sign, reset"]
    counted = []
    for step in (lambda: barrier.wait(20), bare):
        # the first has nothing to reset
        step()
        requests.clear()
        for _ in range(4):
            step()
        counted.append(requests.copy())
        requests.clear()
    return counted


@pytest.mark.skipif(not store_features()[STORE_BARRIER], reason="this torch has no Store.barrier")
def test_bare_requests_are_those_of_a_barrier():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    stores = [server, *(create_tcp_store(LOCAL, server.port) for _ in range(2))]
    always = {"append": 4, "add": 4}
    counted = run_threads(count_requests, 3, stores)
    # on a slow machine a rank may fall asleep, which costs it another add, and who wakes it too
    slow = any(ours.count("add") > 4 for ours, _ in counted)
    for rank, (ours, bare) in enumerate(counted):
        for requests in [bare] if slow else [ours, bare]:
            # one of the ranks leaves last; opening the gate takes two requests
            gates = requests.count("barrier") - 4
            opened = requests.count("set")
            expected = always | {"barrier": 4 + gates}
            expected |= {"multi_set": 8} if rank == 0 else {}
            expected |= {"set": opened} if opened else {}
            assert Counter(requests) == expected
            assert gates <= 4 and opened == (0 if rank == 0 else gates)


def test_control_times_many_ranks():
    timings = time_many_ranks([9], repeats=2)
    assert [(t.world_size, t.implementation) for t in timings] == [
        (9, "refdist"),
        (9, "set, add, wait, set"),
    ]
    assert all(t.seconds > 0 for t in timings)


def test_exponent_of_growth():
    def grown(power):
        return [ControlTiming("barrier", "refdist", n, 3 * n**power) for n in (2, 4, 100)]

    assert exponent(grown(1)) == pytest.approx(1)
    assert exponent(grown(2)) == pytest.approx(2)


def raise_on_rank_1(rank, world_size, board):
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    board.get("never")


def die_on_rank_1(rank, world_size, board):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    board.get("never")


def test_a_rank_of_a_benchmark_that_fails_is_reported():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 raised:[\s\S]*rank 1 has had enough"):
        run_benchmark_ranks(raise_on_rank_1, 2)
    with pytest.raises(RuntimeError, match="rank 1 of 2 died"):
        run_benchmark_ranks(die_on_rank_1, 2)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] of 2 did not end in time"):
        run_benchmark_ranks(wait_for_ever, 2, seconds=0.5)


def wait_for_ever(rank, world_size, board):
    board.get("never")


@pytest.mark.parametrize(
    "arguments", [["--world-sizes", "1"], ["--many-ranks", "3"], ["--repeats", "0"]]
)
def test_bad_command_line(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["control", *arguments])
    assert f"{arguments[1]}" in capsys.readouterr().err


def test_command_line(capsys):
    main(["control", "--world-sizes", "2", "--many-ranks", "4", "8", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "2 ranks  barrier" in out and "gloo" in out
    assert "one barrier of many ranks grows with their number to the" in out
    main(["control", "--world-sizes", "--many-ranks", "4", "--repeats", "1", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["implementation"] for line in lines] == ["refdist", "set, add, wait, set"]
    assert all(line["torch"] == torch.__version__ and line["seconds"] > 0 for line in lines)
