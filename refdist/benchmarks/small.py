"""The sum of small CPU tensors: ``cpu_all_reduce_`` beside ``torch.distributed.all_reduce``.

Both work on the same group, in turn, so that a disturbance of the machine affects both alike.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import Store

from refdist.benchmarks.data_plane import form_group
from refdist.benchmarks.launch import LOCAL, run_ranks
from refdist.torch_groups.process_groups import stateless_destroy_torch_distributed_process_group
from refdist.torch_groups.small_sums import cpu_all_reduce_

SIZES = (4, 64, 1024, 4096, 16384, 65536)
"""Message sizes in bytes."""

WORLD_SIZES = (2, 3, 4, 8)
_CALLS = 40


@dataclass(frozen=True)
class SmallSumTiming:
    """The timing of one message size on one number of ranks.

    Attributes:
        num_bytes: size of the tensor on each rank.
        world_size: number of ranks.
        seconds: time of one ``cpu_all_reduce_`` on the slowest rank, the median over the repeats.
        gloo_seconds: the same for ``torch.distributed.all_reduce``.
        ratio: gloo's time over ``cpu_all_reduce_``'s, the median over the repeats.
    """

    num_bytes: int
    world_size: int
    seconds: float
    gloo_seconds: float
    ratio: float


def time_small_sums(
    world_sizes: Sequence[int] = WORLD_SIZES, sizes: Sequence[int] = SIZES, repeats: int = 9
) -> list[SmallSumTiming]:
    """Time float32 sums of each size on each number of ranks, each a process of this machine."""
    timings = []
    for world_size in world_sizes:
        by_rank = run_ranks(_time_as_rank, world_size, tuple(sizes), repeats)
        for num_bytes in sizes:
            ours, gloo = (
                [
                    max(times)
                    for times in zip(*(rank[num_bytes, n] for rank in by_rank), strict=True)
                ]
                for n in (0, 1)
            )
            ratio = median(b / a for a, b in zip(ours, gloo, strict=True))
            timings.append(SmallSumTiming(num_bytes, world_size, median(ours), median(gloo), ratio))
    return timings


def _time_as_rank(
    rank: int, world_size: int, board: Store, sizes: Sequence[int], repeats: int
) -> dict[tuple[int, int], list[float]]:
    """The seconds of each size, for ours (0) and gloo's (1), in each repeat."""
    group, _ = form_group(rank, world_size, board, LOCAL, "gloo")
    times: dict[tuple[int, int], list[float]] = {}
    for num_bytes in sizes:
        tensor = torch.zeros(num_bytes // 4)

        def ours(tensor: torch.Tensor = tensor) -> None:
            cpu_all_reduce_(tensor, group)

        def gloo(tensor: torch.Tensor = tensor) -> None:
            dist.all_reduce(tensor, group=group)

        both: tuple[Callable[[], None], ...] = (ours, gloo)
        # the first repeat warms up
        for repeat in range(repeats + 1):
            for number, call in enumerate(both):
                group.barrier().wait()
                start = time.perf_counter()
                for _ in range(_CALLS):
                    call()
                if repeat > 0:
                    seconds = (time.perf_counter() - start) / _CALLS
                    times.setdefault((num_bytes, number), []).append(seconds)
    group.barrier().wait()
    stateless_destroy_torch_distributed_process_group(group)
    return times
