"""The benchmarks that the command line offers: the options of each, their rules, and what it runs.

A function that runs one gives its timings in batches, each as soon as it is measured.
"""

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from refdist.benchmarks import nccl, secret, small
from refdist.benchmarks.control import (
    MANY_RANKS,
    WORLD_SIZES,
    exponent,
    time_control,
    time_many_ranks,
)
from refdist.benchmarks.data_plane import DTYPES, Plan, run_all_reduce
from refdist.benchmarks.launch import under_torchrun
from refdist.benchmarks.records import describe_machine
from refdist.benchmarks.ways import WAYS
from refdist.benchmarks.weights import LAYERS, MODEL, MODELS, VOCABULARY, time_weights
from refdist.command_line import Parser, at_least, number

PROG = "python -m refdist.benchmarks"

Batch = tuple[Sequence[Any], dict[str, str]]
"""Timings that were measured together, and the machine."""


def add_commands(names: Any) -> None:
    """Add a parser for each benchmark. Its defaults name what checks the options and what runs."""
    _add_control(names)
    _add_allreduce(names)
    _add_cpu_allreduce(names)
    _add_secret(names)
    _add_weights(names)
    _add_nccl(names)


def _add(
    names: Any,
    name: str,
    subject: str,
    measure: Callable[[Namespace], Iterator[Batch]],
    examples: Sequence[str],
    repeats: int,
    check: Callable[[Namespace], None] = lambda options: None,
) -> Parser:
    """A parser with the options that all benchmarks have."""
    parser: Parser = names.add_parser(
        name, help=subject, description=f"Time {subject}.",
        examples=[f"{PROG} {name} {example}" for example in examples],
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=at_least(1), default=repeats, help="rounds that count (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--output", type=Path, help="file to append the JSON lines to as well")
    parser.set_defaults(parser=parser, check=check, measure=measure)
    return parser


def _sizes(factor: int) -> Callable[[str], int]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rule = f"a multiple of {factor}, above 0 and at most {memory}, this machine's memory"
    return number(int, lambda size: 0 < size <= memory and size % factor == 0, rule)


def _add_control(names: Any) -> None:
    subject = "barriers and objects, beside vLLM's, gloo's and torch's own"
    examples = ["--world-sizes 2 --many-ranks 32 64 --repeats 1", "--many-ranks --json"]
    parser = _add(names, "control", subject, _control, examples, repeats=5)
    parser.add_argument(
        "--world-sizes", type=at_least(2), nargs="*",
        help=f"numbers of ranks, each a process; {_listed(WORLD_SIZES)} if no ranks are named",
    )  # fmt: skip
    parser.add_argument(
        "--many-ranks", type=at_least(4), nargs="*",
        help="numbers of ranks, each a thread, for one barrier; "
        f"{_listed(MANY_RANKS)} if no ranks are named",
    )  # fmt: skip


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _control(options: Namespace) -> Iterator[Batch]:
    machine = describe_machine()
    none_named = options.world_sizes is None and options.many_ranks is None
    world_sizes = WORLD_SIZES if none_named else options.world_sizes or ()
    many_ranks = MANY_RANKS if none_named else options.many_ranks or ()
    for world_size in world_sizes:
        yield time_control([world_size], options.repeats), machine
    ours = []
    for ranks in many_ranks:
        timings = time_many_ranks([ranks], options.repeats)
        ours += [timing for timing in timings if timing.implementation == "refdist"]
        yield timings, machine
    if len({timing.world_size for timing in ours}) > 1 and not options.json:
        print(f"\none barrier of many ranks grows with their number to the {exponent(ours):.2f}")


def _add_allreduce(names: Any) -> None:
    subject = "all-reduce, over gloo or over NCCL, on ranks of its own or on torchrun's"
    examples = ["--world-size 2 --backend gloo --sizes 1024 1048576", "--backend nccl --json"]
    parser = _add(names, "allreduce", subject, _allreduce, examples, 7, _check_allreduce)
    parser.add_argument("--world-size", type=at_least(1), help="ranks to start")
    parser.add_argument("--backend", choices=["gloo", "nccl"], help="(nccl if there are GPUs)")
    parser.add_argument("--sizes", type=_sizes(8), nargs="+", help="bytes of the tensor on a rank")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"],
        help="of the elements",
    )  # fmt: skip
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), help="of calling it (all that are possible)"
    )


def _check_allreduce(options: Namespace) -> None:
    """End with an error unless NCCL has a GPU for each rank of this machine."""
    gpus = torch.cuda.device_count()
    if under_torchrun():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    else:
        ranks = options.world_size or max(gpus, 2)
    if options.backend == "nccl" and gpus < ranks:
        options.parser.error(
            f"argument --backend: nccl: must have a GPU for each of {ranks} ranks, and torch finds "
            f"{gpus}; use --backend gloo, or fewer ranks"
        )


def _allreduce(options: Namespace) -> Iterator[Batch]:
    plan = Plan(
        options.world_size, options.backend, options.sizes, options.dtypes, options.ways,
        options.repeats,
    )  # fmt: skip
    answer = run_all_reduce(plan)
    if answer is not None:
        yield answer


def _add_cpu_allreduce(names: Any) -> None:
    subject = "cpu_all_reduce_ beside gloo's all-reduce"
    examples = ["--world-sizes 2 --sizes 4 4096 --repeats 1"]
    parser = _add(names, "cpu_allreduce", subject, _cpu_allreduce, examples, repeats=9)
    parser.add_argument(
        "--world-sizes", type=at_least(1), nargs="+", default=small.WORLD_SIZES,
        help="numbers of ranks",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_sizes(4), nargs="+", default=small.SIZES,
        help="bytes of the tensor on a rank",
    )  # fmt: skip


def _cpu_allreduce(options: Namespace) -> Iterator[Batch]:
    timings = small.time_small_sums(options.world_sizes, options.sizes, options.repeats)
    yield timings, describe_machine()


def _add_secret(names: Any) -> None:
    subject = "a group with a secret beside one without"
    examples = ["--world-sizes 2 --repeats 1"]
    parser = _add(names, "secret", subject, _secret, examples, repeats=25)
    parser.add_argument(
        "--world-sizes", type=at_least(2), nargs="+", default=secret.WORLD_SIZES,
        help="numbers of ranks",
    )  # fmt: skip


def _secret(options: Namespace) -> Iterator[Batch]:
    yield secret.time_secret(options.world_sizes, options.repeats), describe_machine()


def _add_weights(names: Any) -> None:
    subject = "weights of Qwen2.5-0.5B over gloo, beside a bare broadcast of as many bytes"
    examples = ["--layers 2 --vocabulary 1000 --buffer-mib 64 --repeats 1", "--world-size 4"]
    parser = _add(names, "weights", subject, _weights, examples, repeats=9)
    parser.add_argument("--world-size", type=at_least(2), default=2, help="ranks to start")
    _add_weight_options(parser, [1024, 64], "+")
    parser.set_defaults(layers=LAYERS, vocabulary=VOCABULARY)


def _add_weight_options(parser: Parser, buffers: list[int], nargs: str) -> None:
    """The options of a benchmark that sends weights."""
    parser.add_argument(
        "--buffer-mib", type=at_least(1), nargs=nargs, default=buffers, help="sizes of the buffer"
    )
    parser.add_argument("--layers", type=at_least(0), help="(those of the model)")
    parser.add_argument("--vocabulary", type=at_least(1), help="(that of the model)")


def _weights(options: Namespace) -> Iterator[Batch]:
    machine = describe_machine()
    for mib in options.buffer_mib:
        timings = time_weights(
            options.world_size, mib * 2**20, options.repeats, options.layers, options.vocabulary
        )
        yield timings, machine


def _add_nccl(names: Any) -> None:
    subject = "NcclCommunicator beside torch's NCCL group, and weights by it, on GPUs"
    examples = ["--sizes 1024 67108864 --buffer-mib 256", "--model Qwen2.5-7B --output nccl.jsonl"]
    parser = _add(names, "nccl", subject, _nccl, examples, 9, _check_nccl)
    parser.add_argument("--world-size", type=at_least(2), help="number of ranks, one GPU each")
    parser.add_argument(
        "--sizes", type=_sizes(4), nargs="*", default=nccl.SIZES,
        help="bytes of the tensor on a rank",
    )  # fmt: skip
    _add_weight_options(parser, [1024, 256], "*")
    parser.add_argument("--model", choices=list(MODELS), default=MODEL, help="(%(default)s)")


def _check_nccl(options: Namespace) -> None:
    gpus = torch.cuda.device_count()
    ranks = options.world_size or max(gpus, 2)
    if gpus < ranks:
        options.parser.error(f"must have a GPU for each of {ranks} ranks, and torch finds {gpus}")
    if importlib.util.find_spec("nccl") is None:
        options.parser.error("nccl4py is not installed: pip install refdist[nccl]")


def _nccl(options: Namespace) -> Iterator[Batch]:
    plan = nccl.NcclPlan(
        options.world_size or torch.cuda.device_count(), options.sizes,
        [mib * 2**20 for mib in options.buffer_mib], options.layers, options.vocabulary,
        options.repeats, options.model,
    )  # fmt: skip
    calls, weights = nccl.time_nccl(plan)
    machine = describe_machine() | nccl.nccl4py_version()
    yield calls, machine
    yield weights, machine
