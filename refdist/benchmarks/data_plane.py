"""All-reduce on groups that a benchmark forms itself, for the command line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, Store

from refdist.benchmarks.allreduce import (
    GPU_SIZES,
    SIZES,
    AllReduceTiming,
    choose_backend,
    time_all_reduce,
)
from refdist.benchmarks.launch import LOCAL, place, run_as_rank, run_ranks, under_torchrun
from refdist.benchmarks.records import describe_machine
from refdist.benchmarks.ways import WAYS, WITHOUT_MULTICAST
from refdist.torch_groups.process_groups import (
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Plan:
    """The settings of a run. None stands for a value that suits the machine.

    Attributes:
        world_size: number of ranks; under torchrun, torchrun's number.
        backend: ``"gloo"`` or ``"nccl"``.
        sizes: message sizes in bytes.
        dtypes: keys of ``DTYPES``.
        ways: keys of ``ways.WAYS``.
        runs: timed runs for each size and way.
    """

    world_size: int | None = None
    backend: str | None = None
    sizes: Sequence[int] | None = None
    dtypes: Sequence[str] = ("float32", "bfloat16")
    ways: Sequence[str] | None = None
    runs: int = 7


def run_all_reduce(plan: Plan) -> tuple[list[AllReduceTiming], dict[str, str]] | None:
    """Time all-reduce on ranks of this program or of torchrun.

    Returns:
        The timings and the machine of rank 0; None under torchrun on the other ranks.

    Raises:
        RuntimeError: a rank raised, died or did not end in time, or a result was wrong.
    """
    if under_torchrun():
        rank, answer = run_as_rank(_time_as_rank, os.environ["MASTER_ADDR"], plan)
        return answer if rank == 0 else None
    gpus = torch.cuda.device_count()
    world_size = plan.world_size or (gpus if gpus > 1 else 4)
    return run_ranks(_time_as_rank, world_size, LOCAL, plan)[0]  # type: ignore[no-any-return]


def _time_as_rank(
    rank: int, world_size: int, board: Store, host: str, plan: Plan
) -> tuple[list[AllReduceTiming], dict[str, str]]:
    for name, value in WITHOUT_MULTICAST.items():
        os.environ.setdefault(name, value)
    # under torchrun, the ranks of this machine
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    backend = plan.backend or choose_backend(local_size)
    group, device = form_group(rank, world_size, board, host, backend)
    sizes = plan.sizes or (GPU_SIZES if device.type == "cuda" else SIZES)
    # named ways, so that a warning says why one is missing
    ways = plan.ways or (list(WAYS) if device.type == "cuda" else None)
    timings = []
    for name in plan.dtypes:
        timings += time_all_reduce(group, device, sizes, DTYPES[name], plan.runs, ways)
    stateless_destroy_torch_distributed_process_group(group)
    return timings, describe_machine() | {"backend": backend}


def form_group(
    rank: int, world_size: int, board: Store, host: str, backend: str, name: str = "data plane"
) -> tuple[ProcessGroup, torch.device]:
    """A group of all ranks, registered under a name of its own, and this rank's device."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    with place(rank, board, name, host) as (port, listener):
        options: dict[str, Any] = {"group_name": f"refdist {name} {port}"}
        group = stateless_init_torch_distributed_process_group(
            host, port, rank, world_size, backend, listen_socket=listener, timeout=_TIMEOUT,
            **options,
        )  # fmt: skip
    return group, device
