"""The time of all-reduce on a group, for messages of many sizes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

SIZES = tuple(2**power for power in range(10, 25, 2))
"""Message sizes in bytes: 1 KiB to 16 MiB."""

_BYTES_A_RUN = 2**24  # small messages are sent many times in a run, so that the clock's error fades
_LONGEST_RUN = 50


@dataclass(frozen=True)
class AllReduceTiming:
    """One message size.

    Attributes:
        num_bytes: size of the tensor on each rank.
        world_size: number of ranks.
        seconds: time of one all-reduce, the median over the runs.
        fastest: the same of the fastest run.
        slowest: the same of the slowest run.
    """

    num_bytes: int
    world_size: int
    seconds: float
    fastest: float
    slowest: float

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes of the tensor that are reduced in a second."""
        return self.num_bytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes that each rank must send in a second, at least: 2 (n - 1) / n of the tensor.

        It compares with the speed of a link, whatever the number of ranks.
        """
        return self.algorithm_bandwidth * 2 * (self.world_size - 1) / self.world_size


def choose_backend(world_size: int) -> str:
    """``"nccl"`` where each of ``world_size`` ranks can have a GPU of this machine, else gloo."""
    return "nccl" if 1 < world_size <= torch.cuda.device_count() else "gloo"


def time_all_reduce(
    group: ProcessGroup,
    device: torch.device | str = "cpu",
    sizes: Sequence[int] = SIZES,
    dtype: torch.dtype = torch.float32,
    runs: int = 7,
) -> list[AllReduceTiming]:
    """Time the in-place sum over the ranks of a group. Every rank calls this at the same time.

    For each size the result is verified first, exactly. Then come ``runs`` runs of several
    all-reduces each, the first of them not counted. On a GPU, a run is timed by CUDA events.

    Args:
        group: a gloo or NCCL group.
        device: where this rank's tensors are; for NCCL its own GPU.
        sizes: bytes of the tensor on each rank, each a multiple of the dtype's size.
        dtype: of the elements; a float type.
        runs: timed runs for each size, at least 1.

    Raises:
        ValueError: a size is no multiple of the dtype's size, or ``runs`` is below 1.
        RuntimeError: a result was wrong.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: must be at least 1")
    device = torch.device(device)
    timings = []
    for num_bytes in sizes:
        elements, rest = divmod(num_bytes, dtype.itemsize)
        if rest or not elements:
            raise ValueError(f"size={num_bytes}: must be a multiple of {dtype.itemsize}, above 0")
        tensor = torch.empty(elements, dtype=dtype, device=device)
        _verify(tensor, group)
        tensor.zero_()  # sums of zeros stay finite, however many there are
        repeats = max(1, min(_LONGEST_RUN, _BYTES_A_RUN // num_bytes))

        def run(tensor: torch.Tensor = tensor, repeats: int = repeats) -> None:
            for _ in range(repeats):
                dist.all_reduce(tensor, group=group)

        clock = _time_on_gpu if device.type == "cuda" else _time_on_cpu
        seconds = []
        for _ in range(runs + 1):
            # all ranks start each run together
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            seconds.append(clock(run) / repeats)
        counted = seconds[1:]
        timings.append(
            AllReduceTiming(num_bytes, group.size(), median(counted), min(counted), max(counted))
        )
    return timings


def _verify(tensor: torch.Tensor, group: ProcessGroup) -> None:
    """Count, in each element, the ranks that are 0 modulo 3 when its index is added; compare.

    The sums are whole numbers up to the number of ranks: exact for bfloat16 up to 256 ranks.
    """
    n = group.size()
    index = torch.arange(tensor.numel(), device=tensor.device)
    tensor.copy_((index + group.rank()) % 3 == 0)
    dist.all_reduce(tensor, group=group)
    by_remainder = [sum((i + rank) % 3 == 0 for rank in range(n)) for i in range(3)]
    expected = torch.tensor(by_remainder, dtype=tensor.dtype, device=tensor.device)[index % 3]
    wrong = int((tensor != expected).sum())
    if wrong:
        raise RuntimeError(
            f"all-reduce of {tensor.numel()} elements of {tensor.dtype} on {n} ranks: {wrong} "
            f"elements are wrong on rank {group.rank()}"
        )


def _time_on_cpu(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], None]) -> float:
    events: Any = torch.cuda.Event  # has no annotations
    start, end = events(enable_timing=True), events(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
