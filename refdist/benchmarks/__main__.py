"""``python -m refdist.benchmarks NAME``: run a benchmark and print what it measured."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import torch

from refdist.benchmarks.control import (
    MANY_RANKS,
    WORLD_SIZES,
    ControlTiming,
    exponent,
    time_control,
    time_many_ranks,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the benchmark that it names."""
    parser = argparse.ArgumentParser(prog="python -m refdist.benchmarks", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    control = benchmarks.add_parser(
        "control", help="barriers and objects, beside vLLM's, gloo's and torch's own"
    )
    control.add_argument("--world-sizes", type=int, nargs="*", default=WORLD_SIZES)
    control.add_argument("--many-ranks", type=int, nargs="*", default=MANY_RANKS)
    control.add_argument("--repeats", type=int, default=5)
    control.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    small = [n for n in options.world_sizes if n < 2] + [n for n in options.many_ranks if n < 4]
    if small:
        parser.error(f"{small[0]} ranks: at least 2 processes, or 4 of many ranks")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    show = _print_json if options.json else _print_table
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in _machine().items()), flush=True)
    for world_size in options.world_sizes:
        show(time_control([world_size], options.repeats))
    many = [t for n in options.many_ranks for t in _shown(show, time_many_ranks([n]))]
    ours = [timing for timing in many if timing.implementation == "refdist"]
    if len(ours) > 1 and not options.json:
        print(f"\none barrier of many ranks grows with their number to the {exponent(ours):.2f}")


def _shown(show: Any, timings: list[ControlTiming]) -> list[ControlTiming]:
    show(timings)
    return timings


def _machine() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }


def _print_json(timings: Sequence[ControlTiming]) -> None:
    for timing in timings:
        print(json.dumps(asdict(timing) | _machine()), flush=True)


def _print_table(timings: Sequence[ControlTiming]) -> None:
    """For each operation, the time of refdist, and how many times as long the others took."""
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
