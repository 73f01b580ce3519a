"""The ways to all-reduce one tensor: by plain calls, from a CUDA graph, in symmetric memory."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from refdist import torch_versions

WAYS = {
    "plain": "one call of torch.distributed.all_reduce after the other",
    "graph": "the same calls, recorded in a CUDA graph and replayed",
    "one-shot": "torch's kernel in symmetric memory: each rank reads all of every other's tensor",
    "one-shot graph": "the same, replayed from a CUDA graph",
    "two-shot": "each rank sums one part of the tensor and writes it to all others",
    "two-shot graph": "the same, replayed from a CUDA graph",
}

SMALL_BYTES = 2**24
"""The largest tensor with ways other than plain calls. Above it, launch time does not matter."""

WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""Environment in which neither NCCL nor symmetric memory asks for NVLink multicast."""

_CALLS_A_GRAPH = 20


@dataclass(frozen=True)
class Prepared:
    """A tensor and the function that sums it.

    Attributes:
        tensor: the tensor that a rank brings.
        result: the tensor with the sum; the same tensor if the way is in place.
        call: does one sum. On a GPU, it only launches it on the current stream.
    """

    tensor: torch.Tensor
    result: torch.Tensor
    call: Callable[[], object]


class Workspace:
    """Memory for every way, allocated once for all message sizes.

    Args:
        group: a gloo or NCCL group.
        device: device of this rank's tensors.
        dtype: type of the elements.
        num_bytes: size of the largest message.
        ways: the ways that are wanted; None for all that are possible.

    All ranks of the group create theirs at the same time, with the same ways. It warns if a way
    that is wanted by name needs symmetric memory, and there is none.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        num_bytes: int,
        ways: Sequence[str] | None = None,
    ) -> None:
        self.group = group
        self._wanted = list(WAYS if ways is None else ways)
        self._memory = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._symmetric: torch.Tensor | None = None
        self._reason = "needs CUDA tensors"
        needs_it = any("shot" in way for way in self._wanted)
        if device.type == "cuda" and needs_it:
            small = min(num_bytes, SMALL_BYTES) // dtype.itemsize
            self._symmetric, self._reason = _symmetric_memory(group, device, dtype, small)
        if ways is not None and needs_it and self._symmetric is None:
            warnings.warn(f"no symmetric memory: {self._reason}", stacklevel=3)

    def ways(self, num_bytes: int) -> list[str]:
        """The ways that are wanted and possible for a message of this size."""
        if self._memory.device.type != "cuda" or num_bytes > SMALL_BYTES:
            possible = ["plain"]
        else:
            possible = ["plain", "graph"] if self._symmetric is None else list(WAYS)
        return [way for way in possible if way in self._wanted]

    def prepare(self, way: str, num_bytes: int) -> Prepared:
        """A tensor of ``num_bytes`` and the function that sums it, without the graph."""
        count = num_bytes // self._memory.element_size()
        tensor, group = self._memory[:count], self.group
        kernel = way.removesuffix("graph").strip()
        if kernel in ("", "plain"):
            return Prepared(tensor, tensor, lambda: dist.all_reduce(tensor, group=group))
        if self._symmetric is None:
            raise ValueError(f"way={way!r}: {self._reason}")
        symmetric, name = self._symmetric[:count], group.group_name
        operators = torch.ops.symm_mem
        if kernel == "two-shot":
            two_shot = operators.two_shot_all_reduce_.default
            return Prepared(symmetric, symmetric, lambda: two_shot(symmetric, "sum", name))
        one_shot = operators.one_shot_all_reduce_out.default
        return Prepared(symmetric, tensor, lambda: one_shot(symmetric, "sum", name, tensor))


@contextmanager
def launching(prepared: Prepared, way: str, calls: int) -> Iterator[Callable[[], None]]:
    """A function that launches ``calls`` calls in a way. A graph is recorded once, and freed after.

    NCCL's communicator cannot be destroyed while a graph uses it.
    """
    if not way.endswith("graph"):
        yield lambda: _repeat(prepared.call, calls)
        return
    graph = _record(prepared.call, min(calls, _CALLS_A_GRAPH))
    try:
        yield lambda: _repeat(graph.replay, calls // min(calls, _CALLS_A_GRAPH))
    finally:
        torch.cuda.synchronize()
        graph.reset()


def rounded(calls: int) -> int:
    """The number of calls, rounded down to full graphs; unchanged if below one full graph."""
    return calls if calls < _CALLS_A_GRAPH else calls // _CALLS_A_GRAPH * _CALLS_A_GRAPH


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _record(call: Callable[[], object], times: int) -> Any:
    call()  # the first use of a kernel loads it, which cannot be recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call, unused-ignore]  # in torch 2.6
    # NCCL's watchdog thread queries events meanwhile; this mode lets other threads do so
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        _repeat(call, times)
    return graph


def _symmetric_memory(
    group: ProcessGroup, device: torch.device, dtype: torch.dtype, count: int
) -> tuple[torch.Tensor | None, str]:
    """Memory that all ranks of the group can read, or None and the reason."""
    memory, reason = None, ""
    try:
        memory = torch_versions.symmetric_memory(group, device, dtype, count)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    # either all ranks have it or none uses it
    have = torch.tensor(float(memory is not None), device=device)
    dist.all_reduce(have, dist.ReduceOp.MIN, group=group)
    if not have.item():
        return None, reason or "another rank has no symmetric memory"
    return memory, ""
