"""``NcclCommunicator`` beside torch's NCCL group, between GPUs of this machine.

Both have a communicator of the same GPUs, sum or send the same tensor, and take turns, so that a
disturbance of the machine affects both alike. A first call verifies the result and makes NCCL
connect, and a first round does not count. ``nccl_weights`` times weights by NcclCommunicator.
"""

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup, Store

from refdist.benchmarks.data_plane import form_group
from refdist.benchmarks.launch import LOCAL, run_ranks
from refdist.benchmarks.nccl_weights import time_weights
from refdist.benchmarks.ways import WITHOUT_MULTICAST, Prepared, launching
from refdist.benchmarks.weights import (
    MODEL,
    WeightRounds,
    WeightsTiming,
    qwen_weights,
    slowest_of,
)
from refdist.nccl import NcclCommunicator, new_unique_id_bytes
from refdist.torch_groups.process_groups import stateless_destroy_torch_distributed_process_group
from refdist.weights import BUFFER_BYTES

SMALL_SIZES = (2**10, 2**13, 2**16, 2**20)
LARGE_SIZES = (2**26, 2**27, 2**28, 2**30, 2**32)
SIZES = SMALL_SIZES + LARGE_SIZES
"""Message sizes in bytes: 1 KiB to 1 MiB for the latency, 64 MiB to 4 GiB for the bandwidth."""

OPERATIONS = ("all_reduce", "broadcast")

WAYS = {
    "alone": "one call and the wait for its end, by the clock of the host",
    "row": "one call after the other is launched, and the last is waited for, by the GPU's clock",
    "graph": "the same calls, recorded in a CUDA graph and replayed",
}
"""Ways to time a call. All of them for sizes up to 1 MiB, where launches matter; else ``"row"``."""

_BYTES_A_RUN, _FEWEST_CALLS, _MOST_CALLS = 2**34, 8, 200
_events: Any = torch.cuda.Event  # has no annotations

Call = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class NcclTiming:
    """The timing of one operation and size in one way.

    Attributes:
        operation: of ``OPERATIONS``.
        way: a key of ``WAYS``.
        num_bytes: size of the tensor on each rank.
        world_size: number of ranks.
        seconds: time of a call of NcclCommunicator on the slowest rank, the median over the rounds.
        torch_seconds: the same for torch's group.
        ratio: torch's time over that of NcclCommunicator, the median over the rounds.
        launch_seconds: the host's time to launch one; with ``"alone"``, to the end.
        torch_launch_seconds: the same for torch's group.
    """

    operation: str
    way: str
    num_bytes: int
    world_size: int
    seconds: float
    torch_seconds: float
    ratio: float
    launch_seconds: float
    torch_launch_seconds: float

    @property
    def bus_bandwidth(self) -> float:
        """Bytes that a rank must send in a second, at least; as nccl-tests define it."""
        n = self.world_size
        factor = 2 * (n - 1) / n if self.operation == "all_reduce" else 1.0
        return factor * self.num_bytes / self.seconds

    @property
    def torch_bus_bandwidth(self) -> float:
        """The same for torch's group."""
        return self.bus_bandwidth * self.seconds / self.torch_seconds


@dataclass(frozen=True)
class NcclPlan:
    """The settings of a run.

    Attributes:
        world_size: number of ranks, one GPU each.
        sizes: message sizes in bytes, multiples of 4.
        buffer_bytes: sizes of the buffer for weights.
        layers: of the model; None for its own.
        vocabulary: of the model; None for its own.
        rounds: rounds that count.
        model: a key of ``weights.MODELS``.
    """

    world_size: int = 2
    sizes: Sequence[int] = SIZES
    buffer_bytes: Sequence[int] = (BUFFER_BYTES, 2**28)
    layers: int | None = None
    vocabulary: int | None = None
    rounds: int = 9
    model: str = MODEL


def time_nccl(plan: NcclPlan) -> tuple[list[NcclTiming], list[WeightsTiming]]:
    """Time the operations and the weights, on ranks that are processes of this machine.

    Raises:
        RuntimeError: a rank raised, died or did not end in time, or a result was wrong.
    """
    ranks = run_ranks(_time_as_rank, plan.world_size, plan)
    timings = [
        _collective_timing(key, plan.world_size, [calls[key] for calls, _ in ranks])
        for key in ranks[0][0]
    ]
    weights = [
        timing
        for buffer_bytes in plan.buffer_bytes
        for timing in slowest_of(
            [weights[buffer_bytes] for _, weights in ranks], buffer_bytes, plan.model
        )
    ]
    return timings, weights


def nccl4py_version() -> dict[str, str]:
    """The version of nccl4py, to add to what ``describe_machine`` tells."""
    return {"nccl4py": importlib.metadata.version("nccl4py")}


_Key = tuple[str, str, int]
_Rounds = dict[str, list[tuple[float, float]]]


def _collective_timing(key: _Key, world_size: int, ranks: list[_Rounds]) -> NcclTiming:
    """The timing from each rank's (seconds, seconds to launch) in each round."""
    operation, way, num_bytes = key
    times = {
        side: [[max(of_ranks) for of_ranks in zip(*pairs, strict=True)]
               for pairs in zip(*(rounds[side] for rounds in ranks), strict=True)]
        for side in ranks[0]
    }  # fmt: skip
    ours, torchs = times["refdist"], times["torch"]
    return NcclTiming(
        operation, way, num_bytes, world_size,
        median(t for t, _ in ours), median(t for t, _ in torchs),
        median(other / own for (own, _), (other, _) in zip(ours, torchs, strict=True)),
        median(t for _, t in ours), median(t for _, t in torchs),
    )  # fmt: skip


def _time_as_rank(
    rank: int, world_size: int, board: Store, plan: NcclPlan
) -> tuple[dict[_Key, _Rounds], dict[int, WeightRounds]]:
    for name, value in WITHOUT_MULTICAST.items():
        os.environ.setdefault(name, value)
    group, device = form_group(rank, world_size, board, LOCAL, "nccl", "beside")
    if rank == 0:
        board.set("unique id", new_unique_id_bytes().hex())
    unique_id = bytes.fromhex(board.get("unique id").decode())
    communicator = NcclCommunicator.from_unique_id_bytes(unique_id, rank, world_size, device)
    calls = {
        (operation, way, size): _time_calls(operation, way, size, group, communicator, plan.rounds)
        for size in plan.sizes
        for operation in OPERATIONS
        for way in (WAYS if size <= max(SMALL_SIZES) else ["row"])
    }
    torch.cuda.empty_cache()
    model = qwen_weights(plan.layers, plan.vocabulary, plan.model, device)
    weights = {
        size: time_weights(group, communicator, size, model, plan.rounds)
        for size in plan.buffer_bytes
    }
    communicator.destroy()
    stateless_destroy_torch_distributed_process_group(group)
    return calls, weights


def _sides(
    operation: str, group: ProcessGroup, communicator: NcclCommunicator
) -> dict[str, tuple[Call, Callable[[], object]]]:
    """For each side, the operation and the wait for its end."""
    if operation == "all_reduce":
        return {
            "refdist": (lambda t: communicator.all_reduce(t, t), communicator.wait),
            "torch": (lambda t: dist.all_reduce(t, group=group), torch.cuda.synchronize),
        }
    options = c10d.BroadcastOptions()
    options.rootRank = 0
    if hasattr(options, "asyncOp"):
        options.asyncOp = False  # so that torch uses the current stream, as dist.broadcast does

    def broadcast(tensor: torch.Tensor) -> None:
        work: Any = group.broadcast([tensor], options)
        if work is not None:
            work.wait()

    return {
        "refdist": (lambda t: communicator.broadcast(t, 0), communicator.wait),
        "torch": (broadcast, torch.cuda.synchronize),
    }


def _time_calls(
    operation: str,
    way: str,
    num_bytes: int,
    group: ProcessGroup,
    communicator: NcclCommunicator,
    rounds: int,
) -> _Rounds:
    """Seconds of a call, and of its launch, for each side in each round."""
    tensor = torch.zeros(num_bytes // 4, device=communicator.device)
    sides = _sides(operation, group, communicator)
    for side, (call, _) in sides.items():
        _verify(operation, side, tensor, call, group)
    tensor.zero_()  # sums of zeros stay finite
    calls = min(_MOST_CALLS, max(_FEWEST_CALLS, _BYTES_A_RUN // num_bytes))
    times: _Rounds = {side: [] for side in sides}
    for number in range(-1, rounds):  # the first round does not count
        order = deque(sides)
        order.rotate(number)
        for side in order:
            call, wait = sides[side]
            launch = partial(call, tensor)
            prepared = Prepared(tensor, tensor, launch)
            with launching(prepared, "graph" if way == "graph" else "plain", calls) as row:
                _meet(group, tensor.device)
                if way == "alone":
                    taken = _time_alone(launch, wait, calls)
                else:
                    taken = _time_row(launch, row, calls)
            if number >= 0:
                times[side].append(taken)
    return times


def _verify(
    operation: str, side: str, tensor: torch.Tensor, call: Call, group: ProcessGroup
) -> None:
    """Elements differ from their neighbours, and between ranks; the results are whole numbers."""
    n, rank = group.size(), group.rank()
    pattern = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device) % 7
    tensor.copy_(pattern + rank)
    call(tensor)
    pattern = pattern * n + n * (n - 1) // 2 if operation == "all_reduce" else pattern
    wrong = int((tensor != pattern).sum())
    if wrong:
        raise RuntimeError(
            f"{operation} of {side}: {wrong} of {tensor.numel()} elements are wrong on rank {rank}"
        )


def _meet(group: ProcessGroup, device: torch.device) -> None:
    """Let all ranks start together."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize()


def _time_alone(
    launch: Callable[[], object], wait: Callable[[], object], calls: int
) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(calls):
        launch()
        wait()
    seconds = (time.perf_counter() - start) / calls
    return seconds, seconds


def _time_row(
    first: Callable[[], object], row: Callable[[], None], calls: int
) -> tuple[float, float]:
    """The GPU's time from the end of a first call, in which the ranks meet, to that of the last."""
    start, end = _events(enable_timing=True), _events(enable_timing=True)
    first()
    start.record()
    before = time.perf_counter()
    row()
    launched = time.perf_counter() - before
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls, launched / calls
