"""The benchmarks, on real processes and gloo groups."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
import torch
from ranks import LOCAL, Watched, run_ranks, run_threads

from refdist import (
    create_tcp_store,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.barrier import barrier_of
from refdist.benchmarks.__main__ import main
from refdist.benchmarks.allreduce import (
    AllReduceTiming,
    _verify,
    choose_backend,
    time_all_reduce,
)
from refdist.benchmarks.bare import bare_barriers
from refdist.benchmarks.control import ControlTiming, exponent, time_control, time_many_ranks
from refdist.benchmarks.fit import fit_line
from refdist.benchmarks.launch import run_as_rank, under_torchrun
from refdist.benchmarks.launch import run_ranks as run_benchmark_ranks
from refdist.benchmarks.records import (
    _gpu_links,
    append_records,
    link_bandwidth,
    read_timings,
    to_record,
)
from refdist.benchmarks.secret import SecretTiming, time_secret
from refdist.benchmarks.ways import Workspace, rounded
from refdist.torch_versions import STORE_BARRIER, store_features

ROOT = Path(__file__).parent.parent


def group_of(rank, name="group"):
    with rank.place(name) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, rank.rank, rank.world_size, "gloo", listen_socket=listener
        )


def measure(rank, dtype):
    group = group_of(rank)
    with pytest.warns(UserWarning, match="no symmetric memory: needs CUDA tensors"):
        assert time_all_reduce(group, sizes=[8], ways=["two-shot"]) == []
    timings = time_all_reduce(group, sizes=[8, 4096, 2**20], dtype=dtype, runs=3)
    rank.meet("measured")
    stateless_destroy_torch_distributed_process_group(group)
    return timings


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rank_gets_the_same_timing_for_each_size(world_size, dtype):
    by_rank = run_ranks(measure, world_size, dtype)
    assert all(timings == by_rank[0] for timings in by_rank)
    for timings in by_rank:
        assert [timing.num_bytes for timing in timings] == [8, 4096, 2**20]
        for timing in timings:
            assert (timing.world_size, timing.way) == (world_size, "plain")
            assert timing.dtype == str(dtype).removeprefix("torch.")
            assert 0 < timing.fastest <= timing.seconds <= timing.slowest


def lose_a_tensor(rank):
    group = group_of(rank)
    workspace = Workspace(group, torch.device("cpu"), torch.float32, 40)
    prepared = workspace.prepare("plain", 40)
    _verify(prepared, group, prepared.call)

    def lose():
        if rank.rank == 1:
            prepared.tensor.zero_()
        prepared.call()

    with pytest.raises(RuntimeError, match=f"elements are wrong on rank {rank.rank}"):
        _verify(prepared, group, lose)
    mine = f"{10 * rank.rank} elements are wrong on rank {rank.rank}, 10 on all"
    with pytest.raises(RuntimeError, match=rf"\(plain\).* {mine}"):
        # rank 1 alone sees a wrong sum, and rank 0 hears of it
        _verify(prepared, group, lambda: _spoil(prepared, rank))
    with pytest.raises(ValueError, match="way='two-shot': needs CUDA tensors"):
        workspace.prepare("two-shot", 40)


def _spoil(prepared, rank):
    prepared.call()
    if rank.rank == 1:
        prepared.result.add_(1)


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
    with pytest.raises(ValueError, match="way='three-shot': must be one of plain, graph, one-shot"):
        time_all_reduce(group, ways=["three-shot"])


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


# All-reduce from the command line: its own ranks, or those of torchrun. The table and the JSON
# lines say the same, and the lines can be read back.

ALL_REDUCE = ["allreduce", "--sizes", "1024", "65536", "--repeats", "2"]


def test_all_reduce_on_the_command_line(capsys, tmp_path):
    output = tmp_path / "timings.jsonl"
    main([*ALL_REDUCE, "--world-size", "2", "--backend", "gloo", "--output", str(output)])
    printed = capsys.readouterr().out.splitlines()
    timings, machine = read_timings(output)
    expected = [(n, d, "plain") for d in ("float32", "bfloat16") for n in (1024, 65536)]
    assert [(t.num_bytes, t.dtype, t.way) for t in timings] == expected
    assert [line.split()[:3] for line in printed[2:]] == [[str(n), d, w] for n, d, w in expected]
    assert machine["torch"] == torch.__version__ and machine["backend"] == "gloo"
    assert date.fromisoformat(machine["date"]) and machine["device"] and machine["links"]
    main([*ALL_REDUCE, "--world-size", "1", "--dtypes", "float32", "--json"])
    first, *_ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["num_bytes"] == 1024 and first["bus_bandwidth"] == 0
    assert first["algorithm_bandwidth"] == 1024 / first["seconds"]


def test_all_reduce_under_torchrun(tmp_path):
    output = tmp_path / "timings.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*ALL_REDUCE, "--backend", "gloo", "--dtypes", "float32", "--output", str(output)]
    finished = subprocess.run(
        [*torchrun, "-m", "refdist.benchmarks", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    timings, _ = read_timings(output)
    assert [(timing.num_bytes, timing.world_size) for timing in timings] == [(1024, 2), (65536, 2)]
    assert finished.stdout.count("bus (GB/s)") == 1  # rank 0 alone prints


def test_a_launcher_without_a_store_of_its_own(monkeypatch):
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOCAL, "MASTER_PORT": "0"}
    assert not under_torchrun()
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert under_torchrun()
    assert run_as_rank(tell_and_ask, "value") == (0, b"value")


def tell_and_ask(rank, world_size, board, value):
    board.set(f"{rank}/{world_size}", value)
    return board.get("0/1")


def test_timings_of_two_machines_are_no_figure(tmp_path):
    timing = AllReduceTiming(1024, 2, 1.0, 1.0, 1.0)
    path = tmp_path / "timings.jsonl"
    append_records(path, [to_record(timing, {"device": device}) for device in "ab"])
    with pytest.raises(ValueError, match=r"timings.jsonl: must hold timings of one machine"):
        read_timings(path)


def test_links_are_read_and_rated():
    topology = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n"
    assert _gpu_links(topology) == "NV18"
    assert _gpu_links("GPU0\n") == _gpu_links("unknown") == "unknown"
    assert link_bandwidth({"device": "2 x NVIDIA H200", "links": "NV18"}) == 450e9
    assert link_bandwidth({"device": "2 x NVIDIA H200", "links": "PHB"}) is None
    assert link_bandwidth({"device": "AMD EPYC", "links": "loopback"}) is None


def timings_along(alpha, beta, factors=(1,) * 8):
    sizes = [4**power for power in range(5, 13)]
    seconds = [(alpha + beta * size) * factor for size, factor in zip(sizes, factors, strict=True)]
    return [AllReduceTiming(n, 2, t, t, t) for n, t in zip(sizes, seconds, strict=True)]


@pytest.mark.parametrize(("alpha", "beta"), [(1e-5, 1e-9), (3e-3, 2e-12), (0.0, 1e-9)])
def test_a_line_is_found_again(alpha, beta):
    line = fit_line(timings_along(alpha, beta))
    assert (line.alpha, line.beta) == pytest.approx((alpha, beta), rel=1e-6, abs=1e-12)
    assert line.error < 1e-9
    assert line.seconds(2**20) == pytest.approx(alpha + beta * 2**20)
    assert line.balance == pytest.approx(alpha / beta, abs=1e-2)


def test_the_error_of_a_line_is_relative():
    factors = (1.1, 0.9) * 4
    line = fit_line(timings_along(1e-5, 1e-9, factors))
    assert 0.05 < line.error < 0.15
    assert line.alpha == pytest.approx(1e-5, rel=0.2) and line.beta == pytest.approx(1e-9, rel=0.2)
    with pytest.raises(ValueError, match="timings of 1 messages: must be of at least two sizes"):
        fit_line([AllReduceTiming(8, 2, 1.0, 1.0, 1.0)])


def test_calls_fit_into_whole_graphs():
    assert [rounded(calls) for calls in (1, 5, 19, 20, 39, 200)] == [1, 5, 19, 20, 20, 200]


def test_small_sums_on_the_command_line(capsys):
    arguments = ["cpu_allreduce", "--world-sizes", "2", "3", "--sizes", "4", "1024"]
    main([*arguments, "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [["2", "4"], ["2", "1024"], ["3", "4"], ["3", "1024"]]
    assert [line.split()[:2] for line in lines[2:]] == rows
    main([*arguments[:3], "--sizes", "8", "--repeats", "1", "--json"])
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (record["num_bytes"], record["world_size"]) == (8, 2)
    assert record["ratio"] == pytest.approx(record["gloo_seconds"] / record["seconds"])


# The control plane: every operation of every implementation that is here, on real processes.


def test_control_times_every_operation():
    timings = time_control([2], repeats=1, target_seconds=0.01)
    by_name = {(t.operation, t.implementation): t for t in timings}
    assert all(t.world_size == 2 and t.seconds > 0 for t in timings)
    expected = {"barrier", "split and close", "all_gather_obj", "broadcast_obj", "ping-pong"}
    expected.add("64 MiB broadcast_obj")
    assert {operation for operation, name in by_name if name == "refdist"} == expected
    assert ("barrier", "gloo") in by_name
    has_store_barrier = store_features()[STORE_BARRIER]
    assert (("barrier", "Store.barrier") in by_name) == has_store_barrier


# The bare requests are those of a barrier of refdist, neither more nor fewer.


def count_requests(rank, stores):
    requests = []
    store = Watched(stores[rank], lambda request, *_: requests.append(request))
    barrier = barrier_of(store, rank, len(stores))
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
    counted = run_threads(count_requests, 3, stores)
    # on a slow machine a rank may fall asleep, which costs it another add, and who wakes it too
    slow = any(ours.count("add") > 4 for ours, _ in counted)
    for rank, (ours, bare) in enumerate(counted):
        for requests in [bare] if slow else [ours, bare]:
            # one of the ranks leaves last: it opens the gate, or need not if it is rank 0
            gates, opened = requests.count("barrier") - 4, requests.count("set")
            expected = Counter({"add": 4, "barrier": 4 + gates, "set": opened})
            # rank 0 resets keys, and the others sign the roll again as they leave
            expected += Counter({"append": 4, "multi_set": 4} if rank == 0 else {"append": 8})
            assert Counter(requests) == +expected
            assert (opened if rank == 0 else gates) == 0 and max(gates, opened) <= 4


def test_control_times_many_ranks():
    timings = time_many_ranks([9], repeats=2)
    assert [(t.world_size, t.implementation) for t in timings] == [
        (9, "refdist"),
        (9, "set, add, wait, set"),
    ]
    assert all(t.seconds > 0 for t in timings)


# With a secret and without: the same operations, side by side.


def test_secret_times_both():
    timings = time_secret([2, 3], repeats=2, calls=3)
    small = ["barrier", "all_gather_obj", "ping-pong"]
    assert [(t.world_size, t.operation) for t in timings] == [
        *((2, name) for name in [*small, "64 MiB broadcast_obj"]),
        *((3, name) for name in small),
    ]
    assert all(min(t.seconds, t.plain_seconds, t.ratio) > 0 for t in timings)


def test_nanoseconds_per_byte():
    timing = SecretTiming("64 MiB broadcast_obj", 2, 0.3, 0.2, 1.5, 10**8)
    assert timing.nanoseconds_per_byte == pytest.approx(1.0)


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


def test_command_line(capsys):
    main(["control", "--world-sizes", "2", "--many-ranks", "4", "8", "--repeats", "1"])
    out = capsys.readouterr().out
    rows = [line.split()[:3] for line in out.splitlines()]
    assert ["2", "barrier", "refdist"] in rows and ["2", "barrier", "gloo"] in rows
    assert "one barrier of many ranks grows with their number to the" in out
    main(["control", "--world-sizes", "--many-ranks", "4", "--repeats", "1", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["implementation"] for line in lines] == ["refdist", "set, add, wait, set"]
    assert all(line["torch"] == torch.__version__ and line["seconds"] > 0 for line in lines)
