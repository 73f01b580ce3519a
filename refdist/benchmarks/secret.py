"""The cost of a secret: two groups of the same ranks, with a secret and without, in turn."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.distributed import TCPStore

from refdist.benchmarks.control import LARGE_BYTES, broadcast_and_wait, ping_pong
from refdist.benchmarks.launch import LOCAL, place, run_ranks
from refdist.group import StatelessProcessGroup

WORLD_SIZES = (2, 4, 8)
_SECRET = "a secret of the benchmark"
_CALLS = 100


@dataclass(frozen=True)
class SecretTiming:
    """The timing of one operation.

    Attributes:
        operation: name of the operation, such as ``"barrier"``.
        world_size: number of ranks.
        seconds: time of one with a secret on the slowest rank, the median over the repeats.
        plain_seconds: the same without.
        ratio: time with a secret over time without, the median over the repeats.
        num_bytes: size of a large object; else 0.
    """

    operation: str
    world_size: int
    seconds: float
    plain_seconds: float
    ratio: float
    num_bytes: int = 0

    @property
    def nanoseconds_per_byte(self) -> float:
        """The extra time for each byte of a large object."""
        return (self.seconds - self.plain_seconds) * 1e9 / self.num_bytes


def time_secret(
    world_sizes: Sequence[int] = WORLD_SIZES, repeats: int = 25, calls: int = _CALLS
) -> list[SecretTiming]:
    """Time barriers, gathers and ping-pongs of small objects, and on two ranks a large broadcast.

    Args:
        world_sizes: numbers of ranks, each a process of this machine.
        repeats: number of times that everything runs in turn.
        calls: number of calls in a row; the broadcast runs once.
    """
    timings = []
    for world_size in world_sizes:
        ranks = run_ranks(_time_as_rank, world_size, repeats, calls)
        for operation in dict.fromkeys(operation for operation, _ in ranks[0]):
            plain, sealed = (
                [max(times) for times in zip(*(rank[operation, n] for rank in ranks), strict=True)]
                for n in (0, 1)
            )
            ratio = median(b / a for a, b in zip(plain, sealed, strict=True))
            num_bytes = LARGE_BYTES if operation.startswith("64 MiB") else 0
            timings.append(
                SecretTiming(operation, world_size, median(sealed), median(plain), ratio, num_bytes)
            )
    return timings


def _time_as_rank(
    rank: int, world_size: int, board: TCPStore, repeats: int, calls: int
) -> dict[tuple[str, int], list[float]]:
    """The seconds of each operation, without a secret (0) and with one (1), in each repeat."""
    times: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        groups = []
        for secret in (None, _SECRET):
            with place(rank, board, f"secret {secret}") as (port, listener):
                group = StatelessProcessGroup.create(
                    LOCAL, port, rank, world_size, listen_socket=listener, secret=secret
                )
            groups.append(stack.enter_context(group))
        operations = [_operations(group) for group in groups]
        # the first repeat warms up
        for repeat in range(repeats + 1):
            for name in operations[0]:
                count = 1 if name.startswith("64 MiB") else calls
                # neither group is always second
                for number in (0, 1) if repeat % 2 else (1, 0):
                    groups[0].barrier()
                    start = time.perf_counter()
                    for _ in range(count):
                        operations[number][name]()
                    if repeat > 0:
                        seconds = (time.perf_counter() - start) / count
                        times.setdefault((name, number), []).append(seconds)
    return times


def _operations(group: StatelessProcessGroup) -> dict[str, Callable[[], Any]]:
    obj = {"rank": group.rank, "address": "10.0.0.1:29500"}
    operations: dict[str, Callable[[], Any]] = {
        "barrier": group.barrier,
        "all_gather_obj": partial(group.all_gather_obj, obj),
        "ping-pong": partial(ping_pong, group, obj),
    }
    if group.world_size == 2:
        large = torch.rand(LARGE_BYTES // 4) if group.rank == 0 else None
        operations["64 MiB broadcast_obj"] = partial(broadcast_and_wait, group, large)
    return operations
