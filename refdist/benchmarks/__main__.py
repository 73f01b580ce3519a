"""``python -m refdist.benchmarks NAME``: run a benchmark and print its results."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.control import (
    MANY_RANKS,
    WORLD_SIZES,
    ControlTiming,
    exponent,
    time_control,
    time_many_ranks,
)
from refdist.benchmarks.data_plane import DTYPES, Plan, run_all_reduce
from refdist.benchmarks.launch import under_torchrun
from refdist.benchmarks.nccl import SIZES as NCCL_SIZES
from refdist.benchmarks.nccl import NcclPlan, NcclTiming, nccl4py_version, time_nccl
from refdist.benchmarks.records import append_records, describe_machine, to_record
from refdist.benchmarks.secret import WORLD_SIZES as SECRET_WORLD_SIZES
from refdist.benchmarks.secret import time_secret
from refdist.benchmarks.small import SIZES as SMALL_SIZES
from refdist.benchmarks.small import WORLD_SIZES as SMALL_WORLD_SIZES
from refdist.benchmarks.small import time_small_sums
from refdist.benchmarks.ways import WAYS
from refdist.benchmarks.weights import LAYERS, VOCABULARY, WeightsTiming, time_weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark that it names."""
    parser = argparse.ArgumentParser(prog="python -m refdist.benchmarks", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    _add_control(benchmarks)
    _add_allreduce(benchmarks)
    _add_cpu_allreduce(benchmarks)
    _add_secret(benchmarks)
    _add_weights(benchmarks)
    _add_nccl(benchmarks)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    options.run(parser, options)


def _add_control(benchmarks: Any) -> None:
    control = benchmarks.add_parser(
        "control", help="barriers and objects, beside vLLM's, gloo's and torch's own"
    )
    control.add_argument("--world-sizes", type=int, nargs="*", default=WORLD_SIZES)
    control.add_argument("--many-ranks", type=int, nargs="*", default=MANY_RANKS)
    control.add_argument("--repeats", type=int, default=5)
    control.add_argument("--json", action="store_true", help="one JSON object a line")
    control.set_defaults(run=_control)


def _add_allreduce(benchmarks: Any) -> None:
    allreduce = benchmarks.add_parser(
        "allreduce",
        help="all-reduce over gloo, or over NCCL and symmetric memory",
        description="Starts its own ranks, or is one of torchrun's.",
    )
    allreduce.add_argument("--world-size", type=int, help="number of ranks to start")
    allreduce.add_argument("--backend", choices=["gloo", "nccl"])
    allreduce.add_argument("--sizes", type=int, nargs="+", help="bytes of the tensor on each rank")
    allreduce.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"]
    )
    allreduce.add_argument("--ways", nargs="+", choices=list(WAYS))
    allreduce.add_argument("--repeats", type=int, default=7)
    allreduce.add_argument("--json", action="store_true", help="one JSON object a line")
    allreduce.add_argument("--output", type=Path, help="file to append the JSON lines to as well")
    allreduce.set_defaults(run=_allreduce)


def _add_cpu_allreduce(benchmarks: Any) -> None:
    small = benchmarks.add_parser("cpu_allreduce", help="cpu_all_reduce_ beside gloo's all-reduce")
    small.add_argument("--world-sizes", type=int, nargs="+", default=SMALL_WORLD_SIZES)
    small.add_argument("--sizes", type=int, nargs="+", default=SMALL_SIZES)
    small.add_argument("--repeats", type=int, default=9)
    small.add_argument("--json", action="store_true", help="one JSON object a line")
    small.set_defaults(run=_cpu_allreduce)


def _add_secret(benchmarks: Any) -> None:
    secret = benchmarks.add_parser("secret", help="what a group with a secret takes longer")
    secret.add_argument("--world-sizes", type=int, nargs="+", default=SECRET_WORLD_SIZES)
    secret.add_argument("--repeats", type=int, default=25)
    secret.add_argument("--json", action="store_true", help="one JSON object a line")
    secret.set_defaults(run=_secret)


def _add_weights(benchmarks: Any) -> None:
    weights = benchmarks.add_parser(
        "weights", help="weights of a model over gloo, beside a bare broadcast of as many bytes"
    )
    weights.add_argument("--world-size", type=int, default=2, help="number of ranks to start")
    weights.add_argument("--buffer-mib", type=int, nargs="+", default=[1024, 64])
    weights.add_argument("--layers", type=int, default=LAYERS, help="of Qwen2.5-0.5B")
    weights.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of Qwen2.5-0.5B")
    weights.add_argument("--repeats", type=int, default=9)
    weights.add_argument("--json", action="store_true", help="one JSON object a line")
    weights.set_defaults(run=_weights)


def _weights(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    least = {"world_size": 2, "buffer_mib": 1, "layers": 0, "vocabulary": 1}
    for name, value in least.items():
        given = getattr(options, name)
        smallest = min(given) if isinstance(given, list) else given
        if smallest < value:
            parser.error(f"--{name.replace('_', '-')} {smallest}: must be at least {value}")
    machine = describe_machine()
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print(f"{'buffer':>8}  {'way':12} {'time (ms)':>10} {'GB/s':>6} {'bare time / time':>17}")
    for mib in options.buffer_mib:
        timings = time_weights(
            options.world_size, mib * 2**20, options.repeats, options.layers, options.vocabulary
        )
        for timing in timings:
            if options.json:
                print(json.dumps({"benchmark": "weights"} | asdict(timing) | machine))
                continue
            print(
                f"{mib:4} MiB  {timing.way:12} {timing.seconds * 1e3:10.1f} "
                f"{timing.bytes_per_second / 1e9:6.2f} {timing.ratio:17.2f}",
                flush=True,
            )


def _add_nccl(benchmarks: Any) -> None:
    nccl = benchmarks.add_parser(
        "nccl", help="NcclCommunicator beside torch's NCCL group, and weights by it, on GPUs"
    )
    nccl.add_argument("--world-size", type=int, help="number of ranks, one GPU each")
    nccl.add_argument(
        "--sizes", type=int, nargs="*", default=NCCL_SIZES, help="bytes of the tensor on each rank"
    )
    nccl.add_argument(
        "--buffer-mib", type=int, nargs="*", default=[1024, 128], help="buffers for the weights"
    )
    nccl.add_argument("--layers", type=int, default=LAYERS, help="of Qwen2.5-0.5B")
    nccl.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of Qwen2.5-0.5B")
    nccl.add_argument("--repeats", type=int, default=9)
    nccl.add_argument("--json", action="store_true", help="one JSON object a line")
    nccl.add_argument("--output", type=Path, help="file to append the JSON lines to as well")
    nccl.set_defaults(run=_nccl)


def _nccl(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    ranks = gpus if options.world_size is None else options.world_size
    if not 2 <= ranks <= gpus:
        parser.error(f"{ranks} ranks: must be at least 2, on a GPU each, and torch finds {gpus}")
    if importlib.util.find_spec("nccl") is None:
        parser.error("nccl4py is not installed: pip install refdist[nccl]")
    bad = [size for size in options.sizes if size < 4 or size % 4]
    if bad:
        parser.error(f"--sizes {bad[0]}: must be multiples of 4, above 0")
    if min(options.buffer_mib, default=1) < 1:
        parser.error(f"--buffer-mib {min(options.buffer_mib)}: must be at least 1")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: its folder must exist")
    buffers = [mib * 2**20 for mib in options.buffer_mib]
    plan = NcclPlan(
        ranks, options.sizes, buffers, options.layers, options.vocabulary, options.repeats
    )
    calls, weights = time_nccl(plan)
    machine = describe_machine() | nccl4py_version()
    records = [
        {"benchmark": "nccl"} | asdict(timing) | {"bus_bandwidth": timing.bus_bandwidth} | machine
        for timing in calls
    ]
    records += [{"benchmark": "nccl weights"} | asdict(timing) | machine for timing in weights]
    if options.json:
        for record in records:
            print(json.dumps(record))
    else:
        _print_nccl(calls, weights, machine)
    if options.output:
        append_records(options.output, records)


def _print_nccl(
    calls: Sequence[NcclTiming], weights: Sequence[WeightsTiming], machine: dict[str, str]
) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"{'operation':10} {'way':6} {'bytes':>11} {'refdist (us)':>13} {'torch (us)':>11} "
        f"{'ratio':>6} {'launch':>8} {'torch':>8} {'bus (GB/s)':>11} {'torch':>7}"
    )
    for timing in calls:
        print(
            f"{timing.operation:10} {timing.way:6} {timing.num_bytes:11} "
            f"{timing.seconds * 1e6:13.2f} {timing.torch_seconds * 1e6:11.2f} {timing.ratio:6.3f} "
            f"{timing.launch_seconds * 1e6:8.2f} {timing.torch_launch_seconds * 1e6:8.2f} "
            f"{timing.bus_bandwidth / 1e9:11.2f} {timing.torch_bus_bandwidth / 1e9:7.2f}"
        )
    print(f"{'weights':14} {'buffer (MiB)':>12} {'time (ms)':>10} {'GB/s':>6} {'bare / time':>12}")
    for sent in weights:
        print(
            f"{sent.way:14} {sent.buffer_bytes // 2**20:12} {sent.seconds * 1e3:10.3f} "
            f"{sent.bytes_per_second / 1e9:6.1f} {sent.ratio:12.3f}"
        )


def _secret(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    few = [n for n in options.world_sizes if n < 2]
    if few:
        parser.error(f"--world-sizes {few[0]}: must be at least 2")
    timings = time_secret(options.world_sizes, options.repeats)
    machine = describe_machine()
    if options.json:
        for timing in timings:
            print(json.dumps({"benchmark": "secret"} | asdict(timing) | machine))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'ranks':>5}  {'operation':21} {'secret (ms)':>11} {'none (ms)':>9} {'ratio':>6}")
    for timing in timings:
        per_byte = f"  {timing.nanoseconds_per_byte:.2f} ns/byte" if timing.num_bytes else ""
        print(
            f"{timing.world_size:5}  {timing.operation:21} {timing.seconds * 1e3:11.3f} "
            f"{timing.plain_seconds * 1e3:9.3f} {timing.ratio:6.3f}{per_byte}"
        )


def _cpu_allreduce(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    few = [n for n in options.world_sizes if n < 1]
    if few:
        parser.error(f"--world-sizes {few[0]}: must be at least 1")
    bad = [size for size in options.sizes if size < 1 or size % 4]
    if bad:
        parser.error(f"--sizes {bad[0]}: must be multiples of 4, above 0")
    timings = time_small_sums(options.world_sizes, options.sizes, options.repeats)
    machine = describe_machine()
    if options.json:
        for timing in timings:
            print(json.dumps({"benchmark": "cpu_allreduce"} | asdict(timing) | machine))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'ranks':>5} {'bytes':>7} {'cpu_all_reduce_ (us)':>21} {'gloo (us)':>10} {'ratio':>6}")
    for timing in timings:
        print(
            f"{timing.world_size:5} {timing.num_bytes:7} {timing.seconds * 1e6:21.1f} "
            f"{timing.gloo_seconds * 1e6:10.1f} {timing.ratio:6.2f}"
        )


def _allreduce(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.world_size is not None and options.world_size < 1:
        parser.error(f"--world-size {options.world_size}: must be at least 1")
    bad = [size for size in options.sizes or () if size < 1 or size % 8]
    if bad:
        parser.error(f"--sizes {bad[0]}: must be multiples of 8, above 0")
    if options.backend == "nccl":
        _check_gpus(parser, options.world_size)
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: its folder must exist")
    plan = Plan(
        options.world_size, options.backend, options.sizes, options.dtypes, options.ways,
        options.repeats,
    )  # fmt: skip
    answer = run_all_reduce(plan)
    if answer is None:
        return
    timings, machine = answer
    records = [to_record(timing, machine) for timing in timings]
    if options.json:
        for record in records:
            print(json.dumps(record))
    else:
        _print_all_reduce(timings, machine)
    if options.output:
        append_records(options.output, records)


def _check_gpus(parser: argparse.ArgumentParser, world_size: int | None) -> None:
    """End with an error unless NCCL has a GPU for each rank of this machine."""
    gpus = torch.cuda.device_count()
    if under_torchrun():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    else:
        ranks = world_size or max(gpus, 2)
    if gpus < ranks:
        parser.error(
            f"--backend nccl: must have a GPU for each of {ranks} ranks, and torch finds {gpus}; "
            f"use --backend gloo, or fewer ranks"
        )


def _print_all_reduce(timings: Sequence[AllReduceTiming], machine: dict[str, str]) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"{'bytes':>11}  {'dtype':9} {'way':15} {'time (us)':>10} {'fastest':>10} {'slowest':>10}"
        f" {'launch':>10} {'algorithm (GB/s)':>17} {'bus (GB/s)':>11}"
    )
    for timing in timings:
        times = (timing.seconds, timing.fastest, timing.slowest, timing.launch_seconds)
        print(
            f"{timing.num_bytes:11}  {timing.dtype:9} {timing.way:15} "
            f"{' '.join(f'{seconds * 1e6:10.2f}' for seconds in times)} "
            f"{timing.algorithm_bandwidth / 1e9:17.4g} {timing.bus_bandwidth / 1e9:11.4g}",
            flush=True,
        )


def _control(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    small = [n for n in options.world_sizes if n < 2] + [n for n in options.many_ranks if n < 4]
    if small:
        parser.error(f"{small[0]} ranks: at least 2 processes, or 4 of many ranks")
    show = _print_json if options.json else _print_table
    if not options.json:
        machine = describe_machine()
        print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    for world_size in options.world_sizes:
        show(time_control([world_size], options.repeats))
    many = [t for n in options.many_ranks for t in _shown(show, time_many_ranks([n]))]
    ours = [timing for timing in many if timing.implementation == "refdist"]
    if len(ours) > 1 and not options.json:
        print(f"\none barrier of many ranks grows with their number to the {exponent(ours):.2f}")


def _shown(show: Any, timings: list[ControlTiming]) -> list[ControlTiming]:
    show(timings)
    return timings


def _print_json(timings: Sequence[ControlTiming]) -> None:
    for timing in timings:
        print(json.dumps(asdict(timing) | describe_machine()), flush=True)


def _print_table(timings: Sequence[ControlTiming]) -> None:
    """Print refdist's time of each operation, and the others' times with their ratios to it."""
    for operation in dict.fromkeys(timing.operation for timing in timings):
        some = [timing for timing in timings if timing.operation == operation]
        ours = next(timing for timing in some if timing.implementation == "refdist")
        print(f"{ours.world_size:4} ranks  {operation:22} {ours.seconds * 1e3:9.3f} ms")
        for timing in some:
            if timing is not ours:
                print(
                    f"{'':13}{timing.implementation:48} {timing.seconds * 1e3:9.3f} ms"
                    f"  x {timing.seconds / ours.seconds:.2f}"
                )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
