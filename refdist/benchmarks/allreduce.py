"""The time of all-reduce on a group, for messages of many sizes, in each possible way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from refdist.benchmarks.ways import WAYS, Prepared, Workspace, launching, rounded

SIZES = tuple(2**power for power in range(10, 27, 2))
"""Message sizes in bytes: 1 KiB to 64 MiB."""

GPU_SIZES = tuple(2**power for power in range(10, 33, 2))
"""Message sizes in bytes: 1 KiB to 4 GiB."""

# small messages are sent many times in a run, so that the clock's error is small
_BYTES_A_RUN = {"cpu": 2**24, "cuda": 2**32}
_FEWEST_CALLS = {"cpu": 1, "cuda": 5}
_MOST_CALLS = {"cpu": 50, "cuda": 200}
_ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class AllReduceTiming:
    """The timing of one message size in one way.

    Attributes:
        num_bytes: size of the tensor on each rank.
        world_size: number of ranks.
        seconds: time of one all-reduce on the slowest rank, the median over the runs.
        fastest: the same for the fastest run.
        slowest: the same for the slowest run.
        dtype: type of the elements.
        way: a key of ``ways.WAYS``.
        launch_seconds: time of the host to launch one, the median over the runs. If it is about
            as long as ``seconds``, the GPU waits for the host. On a CPU, both are equal.
    """

    num_bytes: int
    world_size: int
    seconds: float
    fastest: float
    slowest: float
    dtype: str = "float32"
    way: str = "plain"
    launch_seconds: float = 0.0

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes of the tensor that are reduced in a second."""
        return self.num_bytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes that each rank must send in a second, at least: 2 (n - 1) / n of the tensor.

        It can be compared with the speed of a link, for any number of ranks.

        Source: nccl-tests, ``doc/PERFORMANCE.md``.
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
    ways: Sequence[str] | None = None,
) -> list[AllReduceTiming]:
    """Time the sum over the ranks of a group. Every rank calls this at the same time.

    For each size and way, the result is first verified exactly. Then one run is not counted, and
    ``runs`` more are timed. Each run has many all-reduces. On a GPU, CUDA events time a run. Sizes
    for which a rank lacks the memory are left out.

    Args:
        group: a gloo or NCCL group. For symmetric memory it must be registered under a name that
            no earlier group of the process had.
        device: device of this rank's tensors; for NCCL its own GPU, which is the current one.
        sizes: bytes of the tensor on each rank, each a multiple of the dtype's size.
        dtype: type of the elements; a float type.
        runs: timed runs for each size, at least 1.
        ways: keys of ``ways.WAYS``; None for all that are possible here. A way that is impossible
            for a size is left out, with a warning if symmetric memory is missing.

    Returns:
        The timings, the same on every rank, by size and then by way.

    Raises:
        ValueError: a size is no multiple of the dtype's size, ``runs`` is below 1, or a way is
            unknown.
        RuntimeError: a result was wrong, on this rank or another.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: must be at least 1")
    device = torch.device(device)
    for way in ways or ():
        if way not in WAYS:
            raise ValueError(f"way={way!r}: must be one of {', '.join(WAYS)}")
    for num_bytes in sizes:
        if num_bytes % dtype.itemsize or num_bytes <= 0:
            raise ValueError(f"size={num_bytes}: must be a multiple of {dtype.itemsize}, above 0")
    sizes = [size for size in sizes if size <= _largest(group, device)]
    if not sizes:
        return []
    workspace = Workspace(group, device, dtype, max(sizes), ways)
    return [
        _time(group, workspace.prepare(way, num_bytes), way, runs)
        for num_bytes in sizes
        for way in workspace.ways(num_bytes)
    ]


def _largest(group: ProcessGroup, device: torch.device) -> float:
    """The largest message for which every rank has memory, with 2 GiB to spare for the rest."""
    if device.type != "cuda":
        return float("inf")
    free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), device=device)
    dist.all_reduce(free, dist.ReduceOp.MIN, group=group)
    return free.item() - 2**31


def _time(group: ProcessGroup, prepared: Prepared, way: str, runs: int) -> AllReduceTiming:
    with launching(prepared, way, 1) as launch:
        _verify(prepared, group, launch, way)
    prepared.tensor.zero_()  # sums of zeros stay finite, however many there are
    num_bytes, kind = prepared.tensor.nbytes, prepared.tensor.device.type
    wanted = min(_MOST_CALLS[kind], _BYTES_A_RUN[kind] // num_bytes)
    calls = rounded(max(_FEWEST_CALLS[kind], wanted))
    clock = _time_on_gpu if kind == "cuda" else _time_on_cpu
    times = []
    with launching(prepared, way, calls) as launch:
        for _ in range(runs + 1):
            _meet(group, prepared.tensor.device)
            times.append(clock(launch))
    counted = torch.tensor(times[1:], dtype=torch.float64, device=prepared.tensor.device) / calls
    # an all-reduce is done when its last rank is done
    dist.all_reduce(counted, dist.ReduceOp.MAX, group=group)
    seconds, launches = counted.t().tolist()
    return AllReduceTiming(
        num_bytes, group.size(), median(seconds), min(seconds), max(seconds),
        str(prepared.tensor.dtype).removeprefix("torch."), way, median(launches),
    )  # fmt: skip


def _meet(group: ProcessGroup, device: torch.device) -> None:
    """Let all ranks start a run together."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _verify(
    prepared: Prepared, group: ProcessGroup, launch: Callable[[], None], way: str = "plain"
) -> None:
    """Verify a sum: each element counts the ranks whose rank plus its index is 0 modulo 3.

    The sums are whole numbers up to the number of ranks: exact for bfloat16 up to 256 ranks.
    Every rank learns whether another one found a wrong sum.
    """
    n, tensor, result = group.size(), prepared.tensor, prepared.result
    by_remainder = [sum((i + rank) % 3 == 0 for rank in range(n)) for i in range(3)]
    expected = torch.tensor(by_remainder, dtype=tensor.dtype, device=tensor.device)
    parts = range(0, tensor.numel(), _ELEMENTS_AT_ONCE)
    for start in parts:
        part = tensor[start : start + _ELEMENTS_AT_ONCE]
        part.copy_((_indices(part, start) + group.rank()) % 3 == 0)
    _meet(group, tensor.device)
    launch()
    wrong = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    for start in parts:
        part = result[start : start + _ELEMENTS_AT_ONCE]
        wrong += (part != expected[_indices(part, start) % 3]).sum()
    mine = int(wrong)
    dist.all_reduce(wrong, group=group)
    if mine or int(wrong):
        raise RuntimeError(
            f"all-reduce ({way}) of {tensor.numel()} elements of {tensor.dtype} on {n} ranks: "
            f"{mine} elements are wrong on rank {group.rank()}, {int(wrong)} on all"
        )


def _indices(part: torch.Tensor, start: int) -> torch.Tensor:
    return torch.arange(start, start + part.numel(), device=part.device)


def _time_on_cpu(launch: Callable[[], None]) -> tuple[float, float]:
    start = time.perf_counter()
    launch()
    seconds = time.perf_counter() - start
    return seconds, seconds


def _time_on_gpu(launch: Callable[[], None]) -> tuple[float, float]:
    """The seconds between two events on the GPU, and the host's seconds in between."""
    events: Any = torch.cuda.Event  # has no annotations
    start, end = events(enable_timing=True), events(enable_timing=True)
    start.record()
    before = time.perf_counter()
    launch()
    launched = time.perf_counter() - before
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3, launched
