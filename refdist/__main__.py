"""``python -m refdist``: what this machine can do, and where to begin."""

import json
import os
import platform
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refdist import StatelessProcessGroup, __version__
from refdist.command_line import Parser, run
from refdist.joining.launched import find_place
from refdist.torch_versions import STORE_BARRIER, store_features

TESTED = (2, 6), (2, 15)
"""The first and the last version of torch that tests ran on."""

LAUNCHERS = {"torchrun": "RANK", "mpirun": "OMPI_COMM_WORLD_RANK", "srun": "SLURM_PROCID"}
"""Programs that start ranks, and the variable by which each tells a rank its number."""

VARIABLES = ("REFDIST_PORT", "REFDIST_PROFILE", "REFDIST_SECRET", "REFDIST_VLLM")
"""All variables of the environment that refdist reads."""

_PROG = "python -m refdist"
_SECONDS = 10
_WIDTH = 100
_FOLDER = Path(__file__).parent.parent
_BEGIN = """\
Save three lines as hello.py:

from refdist import StatelessProcessGroup
with StatelessProcessGroup.from_env() as group:
    print(group.rank, group.all_gather_obj(f"hello from {group.rank}"))

and start two ranks:
    python -m torch.distributed.run --standalone --nproc-per-node=2 hello.py
To read on: help(refdist) in Python, and https://github.com/refdist/refdist
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what this machine can do. Exits with 1 if no group forms here."""
    options = make_parser().parse_args(arguments)
    found = look()
    formed, found["a group"] = try_a_group()
    if options.json:
        print(json.dumps(found))
        sys.exit(not formed)
    for name, text in found.items():
        print(textwrap.fill(f"{name:14}{text}", _WIDTH, subsequent_indent=" " * 14))
    print()
    if (_FOLDER / "notebooks" / "00_start_here.ipynb").exists():
        print(f"For the course, run make learn in {_FOLDER}. For the package alone:")
    print(_BEGIN, end="")
    sys.exit(not formed)


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=_PROG,
        description="Say what this machine can do, whether a group forms here, and where to begin. "
        "Exits with 1 if none forms.",
        examples=[_PROG, f"{_PROG} --json", f"{_PROG}.pipeline --help"],
    )
    parser.add_argument("--version", action="version", version=f"refdist {__version__}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def look() -> dict[str, str]:
    """The facts about this machine and what is installed, each in a few words."""
    return {
        "versions": f"refdist {__version__}, Python {platform.python_version()}, {_torch()}",
        "store": _store(),
        "barrier": _barrier(),
        "torch groups": _backends(),
        "refdist.nccl": _nccl(),
        "GPUs": _gpus(),
        "cores": _cores(),
        "launchers": _launchers(),
        "this process": _launched(),
        "notebooks": _notebooks(),
        "variables": _variables(),
    }


def try_a_group() -> tuple[bool, str]:
    """Form a group of this process alone, and pass a barrier. Whether it worked, and how it went.

    Ends within some seconds, also where nothing answers.
    """
    start = time.monotonic()
    try:
        with StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, store_timeout=_SECONDS) as group:
            formed = time.monotonic()
            group.barrier(timeout=_SECONDS)
            passed = time.monotonic()
    except (OSError, RuntimeError, ValueError) as error:
        return False, f"DOES NOT FORM here: {type(error).__name__}: {error}"
    created, waited = (formed - start) * 1e3, (passed - formed) * 1e3
    return True, f"of one rank formed in {created:.1f} ms, and passed a barrier in {waited:.2f} ms"


def _torch() -> str:
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    first, last = (".".join(map(str, version)) for version in TESTED)
    known = "in" if TESTED[0] <= here <= TESTED[1] else "OUTSIDE"
    return f"torch {torch.__version__} ({known} the range tested: {first} to {last})"


def _store() -> str:
    features = store_features()
    has, lacks = ([text.partition(":")[0] for text in features if features[text] is here]
                  for here in (True, False))  # fmt: skip
    return f"has {', '.join(has)}" + (f"; lacks {', '.join(lacks)}" if lacks else "")


def _barrier() -> str:
    if store_features()[STORE_BARRIER]:
        return "quick, in few requests, because the store has Store.barrier"
    return "plain, in more requests, because the store lacks Store.barrier"


def _backends() -> str:
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        nccl: Any = torch.cuda.nccl  # has no annotations
        found.append(f"nccl {'.'.join(map(str, nccl.version()))}")
    return ", ".join(found) or "none: this torch has neither gloo nor NCCL"


def _nccl() -> str:
    found = _version("nccl4py")
    missing = [] if torch.cuda.is_available() else ["a GPU"]
    missing += [] if found else ["nccl4py: pip install nccl4py cuda-bindings"]
    return f"needs {' and '.join(missing)}" if missing else f"nccl4py {found}"


def _gpus() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if not torch.cuda.is_available():
        return f"none that torch can use; this torch is {built}"
    names = Counter(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return f"{', '.join(f'{count} x {name}' for name, count in names.items())}; torch is {built}"


def _cores() -> str:
    everything = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything
    return f"{usable}" if usable == everything else f"{usable} of {everything} for this process"


def _launchers() -> str:
    there = {name: shutil.which(name) is not None for name in LAUNCHERS if name != "torchrun"}
    found = ["python -m torch.distributed.run (torchrun)"]  # torch has it, on the path or not
    found += [name for name, is_there in there.items() if is_there]
    missing = [f"no {name}" for name, is_there in there.items() if not is_there]
    return ", ".join([*found, *missing])


def _launched() -> str:
    by = next((name for name, rank in LAUNCHERS.items() if os.environ.get(rank)), None)
    if by is None:
        return "was started by none of them"
    try:
        place = find_place(os.environ)
    except ValueError as error:
        return f"was started by {by}, but from_env fails: {error}"
    return f"is rank {place.rank} of {place.world_size}, says {by}; {place.origin}"


def _notebooks() -> str:
    found = {name: _version(name) for name in ("ipyparallel", "jupyterlab", "matplotlib")}
    texts = [f"{name} {number}" if number else f"no {name}" for name, number in found.items()]
    if not all(found.values()):
        texts[-1] += "; pip install '.[notebooks]' brings all"
    return ", ".join(texts)


def _variables() -> str:
    """The values of those that are known. Another one may be a secret under a wrong name."""
    texts = []
    for name in sorted(name for name in os.environ if name.startswith("REFDIST_")):
        if name not in VARIABLES:
            texts.append(f"{name} (refdist reads no such variable)")
        elif name == "REFDIST_SECRET":
            texts.append(f"{name} (is set)")
        else:
            texts.append(f"{name}={os.environ[name]}")
    return ", ".join(texts) or f"none is set, of {', '.join(VARIABLES)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run(main)
