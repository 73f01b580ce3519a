"""``python -m refdist.benchmarks NAME``: run a benchmark and print its results."""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, TextIO

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.commands import PROG, add_commands
from refdist.benchmarks.nccl import NcclTiming
from refdist.benchmarks.records import to_record
from refdist.benchmarks.tables import HEADERS, rows
from refdist.benchmarks.weights import WeightsTiming
from refdist.command_line import Parser, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the benchmark that it names, and print what it measured."""
    options = make_parser().parse_args(arguments)
    options.check(options)
    with ExitStack() as stack:
        output = stack.enter_context(_open(options)) if options.output else None
        kind = None
        for timings, machine in options.measure(options):
            lines = [json.dumps(_record(options.benchmark, t, machine)) for t in timings]
            if output is not None:
                output.writelines(f"{line}\n" for line in lines)
                output.flush()
            if not options.json:
                lines = list(rows(timings))
                if kind is None:
                    print(", ".join(f"{name} {value}" for name, value in machine.items()))
                if timings and type(timings[0]) is not kind:
                    kind = type(timings[0])
                    print(HEADERS[kind])
            for line in lines:
                print(line, flush=True)


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=PROG,
        description="Time refdist beside its peers, in turn, on ranks of this machine.",
        examples=[f"{PROG} control --world-sizes 2 4", f"{PROG} control --help"],
    )
    add_commands(parser.add_subparsers(dest="benchmark", required=True, metavar="NAME"))
    return parser


def _open(options: argparse.Namespace) -> TextIO:
    try:
        output: TextIO = options.output.open("a")
    except OSError as error:
        options.parser.error(f"argument --output: {options.output}: {error.strerror}")
    return output


def _record(benchmark: str, timing: Any, machine: dict[str, str]) -> dict[str, Any]:
    """The content of one JSON line."""
    if isinstance(timing, AllReduceTiming):
        return to_record(timing, machine)
    if benchmark == "nccl" and isinstance(timing, WeightsTiming):
        benchmark = "nccl weights"
    record = {"benchmark": benchmark} | asdict(timing)
    if isinstance(timing, NcclTiming):
        record["bus_bandwidth"] = timing.bus_bandwidth
    return record | machine


if __name__ == "__main__":
    run(main)
