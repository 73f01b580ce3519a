"""Collectives of a torch group: by rank in the group, with a deadline, and named in errors.

``torch.distributed`` has a function for each of these. Functions that take no rank work on a group
without global state: ``all_reduce``, ``all_gather``, ``all_gather_into_tensor``,
``reduce_scatter_tensor``, ``all_to_all_single``, ``barrier``, ``all_gather_object``. The other
functions take a global rank, and such a group has none. Their arguments ``group_src`` and
``group_dst``, the rank in the group, depend on torch. On 2.6 they do not help. On 2.13 they help
for ``broadcast``, ``reduce``, ``scatter``, ``gather``, ``send`` and most functions for objects, but
``recv`` still raises, after it has received. The group's own methods take ranks of the group on
every torch. The functions of this module call these methods. A rank that is not in the group is a
ValueError.

A tensor may be any dense view: transposed, with gaps, conjugated or negated. If gloo or NCCL cannot
read or write it in place, it is copied.

The ranks must pass tensors of one dtype and of one size, except for a factor n that a function
names. Gloo does not check this. This module does not check it either, because a check needs another
message. Gloo ends the process of a rank that gets more bytes than it has room for (SIGABRT, no
error in Python). A rank that gets fewer bytes, or bytes of another dtype, returns without an error,
with meaningless numbers. ``cpu_all_reduce_`` notices both.

With CPU tensors, each function blocks until it is done. With CUDA tensors, it only launches the
work, in the order of the current stream; with ``timeout`` it waits for the end.

A group cannot be used after a failure: gloo closes its connections, and NCCL's work is aborted.
Destroy it and form another.
"""

import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup, ReduceOp

from refdist import torch_versions
from refdist.checks import check_rank, check_timeout, wait_of
from refdist.errors import failure
from refdist.objects.tensors import plain

_POLL_SECONDS = 1e-4


def all_reduce(
    tensor: torch.Tensor,
    group: ProcessGroup,
    op: Any = ReduceOp.SUM,
    timeout: timedelta | None = None,
) -> None:
    """Combine a tensor over all ranks, in place.

    Args:
        tensor: has one shape and dtype on all ranks; on the CPU for gloo, on the GPU for NCCL.
        group: all its ranks must call all its collectives in the same order.
        op: sum, product, minimum or maximum; the average with NCCL, and with gloo on torch 2.13.
        timeout: at least 0; None for the group's own.

    Raises:
        CollectiveError: it failed or did not end in time. All functions here raise it.
        ValueError: ``timeout`` is negative, or longer than 1e9 seconds. All functions raise it.
    """
    options = c10d.AllreduceOptions()
    options.reduceOp = op
    _run("all_reduce", group, timeout, lambda mine: group.allreduce([mine], options), tensor)


def broadcast(
    tensor: torch.Tensor, src: int, group: ProcessGroup, timeout: timedelta | None = None
) -> None:
    """Copy the tensor of rank ``src`` of the group into the tensor of every other rank."""
    options = c10d.BroadcastOptions()
    options.rootRank = check_rank(src, group.size(), "src", "group size")
    _run("broadcast", group, timeout, lambda mine: group.broadcast([mine], options), tensor)


def reduce(
    tensor: torch.Tensor,
    dst: int,
    group: ProcessGroup,
    op: Any = ReduceOp.SUM,
    timeout: timedelta | None = None,
) -> None:
    """Like ``all_reduce``, but the result is defined only on rank ``dst`` of the group."""
    options = c10d.ReduceOptions()
    options.reduceOp, options.rootRank = op, check_rank(dst, group.size(), "dst", "group size")
    _run("reduce", group, timeout, lambda mine: group.reduce([mine], options), tensor)


def all_gather_into_tensor(
    output: torch.Tensor,
    tensor: torch.Tensor,
    group: ProcessGroup,
    timeout: timedelta | None = None,
) -> None:
    """Put the tensors of all ranks, in rank order, into ``output``, which is n times as large."""
    options = c10d.AllgatherOptions()
    _run(
        "all_gather_into_tensor", group, timeout,
        lambda all_of_them: group._allgather_base(all_of_them, plain(tensor), options), output,
    )  # fmt: skip


def all_gather(
    outputs: list[torch.Tensor],
    tensor: torch.Tensor,
    group: ProcessGroup,
    timeout: timedelta | None = None,
) -> None:
    """Put the tensor of each rank into ``outputs``, a list of one such tensor for each rank."""
    _run(
        "all_gather", group, timeout,
        lambda *parts: group.allgather([list(parts)], [plain(tensor)]), *outputs,
    )  # fmt: skip


def reduce_scatter_tensor(
    output: torch.Tensor, tensor: torch.Tensor, group: ProcessGroup, op: Any = ReduceOp.SUM,
    timeout: timedelta | None = None,
) -> None:  # fmt: skip
    """Combine ``tensor`` over all ranks. Rank r gets the r-th of n parts in ``output``."""
    options = c10d.ReduceScatterOptions()
    options.reduceOp = op
    _run(
        "reduce_scatter_tensor", group, timeout,
        lambda part: group._reduce_scatter_base(part, plain(tensor), options), output,
    )  # fmt: skip


def scatter(
    output: torch.Tensor, parts: Sequence[torch.Tensor] | None, src: int, group: ProcessGroup,
    timeout: timedelta | None = None,
) -> None:  # fmt: skip
    """Send each rank its part of rank ``src``'s ``parts``. The other ranks pass None."""
    options = c10d.ScatterOptions()
    options.rootRank = check_rank(src, group.size(), "src", "group size")
    given = [[plain(part) for part in parts or []]] if group.rank() == src else []
    _run("scatter", group, timeout, lambda part: group.scatter([part], given, options), output)


def gather(
    tensor: torch.Tensor, outputs: list[torch.Tensor] | None, dst: int, group: ProcessGroup,
    timeout: timedelta | None = None,
) -> None:  # fmt: skip
    """Put the tensor of each rank into ``outputs`` on rank ``dst``. The other ranks pass None."""
    options = c10d.GatherOptions()
    options.rootRank = check_rank(dst, group.size(), "dst", "group size")
    is_dst = group.rank() == dst
    _run(
        "gather", group, timeout,
        lambda *parts: group.gather([list(parts)] if is_dst else [], [plain(tensor)], options),
        *(outputs or [] if is_dst else []),
    )  # fmt: skip


def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    group: ProcessGroup,
    timeout: timedelta | None = None,
) -> None:
    """Send the r-th of n parts of ``tensor`` to rank r. ``output`` gets one part from each."""
    options = c10d.AllToAllOptions()
    _run(
        "all_to_all_single", group, timeout,
        lambda parts: group.alltoall_base(parts, plain(tensor), [], [], options), output,
    )  # fmt: skip


def send(
    tensor: torch.Tensor,
    dst: int,
    group: ProcessGroup,
    tag: int = 0,
    timeout: timedelta | None = None,
) -> None:
    """Send a tensor to rank ``dst`` of the group. NCCL has no tags."""
    dst = check_rank(dst, group.size(), "dst", "group size")
    _run(f"send to rank {dst}", group, timeout, lambda: group.send([plain(tensor)], dst, tag))


def recv(
    tensor: torch.Tensor,
    src: int,
    group: ProcessGroup,
    tag: int = 0,
    timeout: timedelta | None = None,
) -> None:
    """Receive a tensor of this shape and dtype from rank ``src`` of the group."""
    src = check_rank(src, group.size(), "src", "group size")
    _run(
        f"recv from rank {src}", group, timeout, lambda mine: group.recv([mine], src, tag), tensor
    )  # fmt: skip


def barrier(group: ProcessGroup, timeout: timedelta | None = None) -> None:
    """Wait until all ranks have called this, with NCCL too."""
    options = c10d.BarrierOptions()
    device = _device(group)
    if device.type == "cuda":
        options.device = device
        options.device_ids = [device.index]
    _run("barrier", group, timeout, lambda: group.barrier(options))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def broadcast_object(
    obj: Any, src: int, group: ProcessGroup, timeout: timedelta | None = None
) -> Any:
    """Return the object of rank ``src`` of the group. The objects of the others are ignored.

    Here and below, objects travel as pickles in tensors, and functions block until done.
    """
    size = torch.zeros(1, dtype=torch.int64, device=_device(group))
    content = _to_tensor(obj, group) if group.rank() == src else None
    if content is not None:
        size.fill_(content.numel())
    broadcast(size, src, group, timeout)
    if content is None:
        content = torch.empty(int(size), dtype=torch.uint8, device=_device(group))
    broadcast(content, src, group, timeout)
    return obj if group.rank() == src else _to_object(content)


def all_gather_object(obj: Any, group: ProcessGroup, timeout: timedelta | None = None) -> list[Any]:
    """The objects of all ranks, in rank order."""
    content, n = _to_tensor(obj, group), group.size()
    sizes = torch.zeros(n, dtype=torch.int64, device=content.device)
    mine = torch.tensor([content.numel()], device=content.device)
    all_gather_into_tensor(sizes, mine, group, timeout)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=content.device)
    padded[: content.numel()] = content
    together = torch.empty(n * longest, dtype=torch.uint8, device=content.device)
    all_gather_into_tensor(together, padded, group, timeout)
    parts = zip(together.view(n, longest), sizes.tolist(), strict=True)
    return [_to_object(part[:size]) for part, size in parts]


def send_object(obj: Any, dst: int, group: ProcessGroup, timeout: timedelta | None = None) -> None:
    """Send an object to rank ``dst`` of the group."""
    content = _to_tensor(obj, group)
    send(torch.tensor([content.numel()], device=content.device), dst, group, timeout=timeout)
    send(content, dst, group, timeout=timeout)


def recv_object(src: int, group: ProcessGroup, timeout: timedelta | None = None) -> Any:
    """Receive an object from rank ``src`` of the group."""
    size = torch.zeros(1, dtype=torch.int64, device=_device(group))
    recv(size, src, group, timeout=timeout)
    content = torch.empty(int(size), dtype=torch.uint8, device=size.device)
    recv(content, src, group, timeout=timeout)
    return _to_object(content)


def _run(
    operation: str,
    group: ProcessGroup,
    timeout: timedelta | None,
    start: Callable[..., Any],
    *outputs: torch.Tensor,
) -> None:
    """Start work and wait for it: on the CPU for its end, on a GPU as the module says.

    ``start`` gets the tensors to write to: ``outputs``, or copies that go to ``outputs`` later.
    """
    seconds = None if timeout is None else check_timeout("timeout", timeout)
    written = [plain(output) for output in outputs]
    began = time.monotonic()
    on_gpu = _device(group).type == "cuda"
    try:
        work = start(*written)
        if on_gpu and seconds is not None:
            _poll(work, began + seconds)
        # torch 2.6 ignores the timeout of the options, but not the timeout of wait
        if seconds is None or on_gpu:
            work.wait()
        else:
            work.wait(wait_of(seconds))
    except (RuntimeError, TimeoutError) as error:
        if on_gpu:
            torch_versions.abort(group)
        rank, size = group.rank(), group.size()
        elapsed = time.monotonic() - began
        raise failure(operation, rank, size, elapsed, seconds, error) from error
    for output, result in zip(outputs, written, strict=True):
        if result is not output:
            output.detach().copy_(result)


def _poll(work: Any, end: float) -> None:
    while not work.is_completed():
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        time.sleep(_POLL_SECONDS)


def _device(group: ProcessGroup) -> torch.device:
    """The device of the group's tensors: the CPU, or the current GPU."""
    devices: list[torch.device] = group._device_types
    if any(device.type == "cuda" for device in devices):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _to_tensor(obj: Any, group: ProcessGroup) -> torch.Tensor:
    content = bytearray(pickle.dumps(obj))
    return torch.frombuffer(content, dtype=torch.uint8).to(_device(group))


def _to_object(content: torch.Tensor) -> Any:
    received = bytearray(content.numel())
    torch.frombuffer(received, dtype=torch.uint8).copy_(content)
    return pickle.loads(received)
