"""The sum of a small CPU tensor over a gloo group, with few messages.

Gloo's own all-reduce sends parts of the tensor around a ring: 2 (n - 1) steps one after the
other, each with messages of every rank. That suits large tensors. A small one costs what its
messages cost, so here it travels whole, along a tree: each rank adds what its children have, in
order, and hands it to its parent, and the sum comes back the same way. That is 2 (n - 1) messages
in all. Two ranks swap their tensors instead, which takes one step.

It sends and receives, which gloo does in the calling thread; a collective of gloo's goes to a
thread of its own first.

The sum is made once, or by both of two ranks in the same order, so it has the same bits everywhere.
"""

import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup

from refdist.checks import check_timeout, wait_of
from refdist.errors import failure
from refdist.objects.tensors import plain

_FAN_OUT = 8
_TAGS = 1 << 30  # and above: apart from the tags that users send with


def cpu_all_reduce_(
    tensor: torch.Tensor, group: ProcessGroup, timeout: timedelta | None = None
) -> torch.Tensor:
    """Sum a small CPU tensor over the ranks of a gloo group, in place, with low latency.

    Meant for up to some 64 KiB. The result has the same bits on every rank. Every addition rounds
    to the tensor's dtype.

    Args:
        tensor: on the CPU, the same shape and dtype on every rank.
        group: a gloo group.
        timeout: for the whole call, at least 0; None for the group's own.

    Returns:
        ``tensor``.

    Raises:
        ValueError: ``tensor`` is not on the CPU, the group is not for CPU tensors, or ``timeout``
            is negative.
        CollectiveError: a rank did not come in time, or came with another shape or dtype, or its
            connection was lost. The group cannot be used again.

    Source: ``vllm.distributed.utils``, from which it has its name and signature.
    """
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor on {tensor.device}: must be on the CPU")
    if torch.device("cpu") not in group._device_types:
        raise ValueError(f"group of {group._device_types}: must be a gloo group, for CPU tensors")
    began = time.monotonic()
    seconds = None if timeout is None else check_timeout("timeout", timeout)

    def finish(work: Any) -> None:
        if seconds is None:
            work.wait()
        else:
            work.wait(wait_of(began + seconds - time.monotonic()))

    total = plain(tensor.detach())
    try:
        if group.size() == 2:
            _swap(total, group, _tag(tensor), finish)
        else:
            _sum_along_tree(total, group, _tag(tensor), finish)
    except RuntimeError as error:
        rank, size = group.rank(), group.size()
        elapsed = time.monotonic() - began
        raise failure("cpu_all_reduce_", rank, size, elapsed, seconds, error) from error
    if total.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(total)
    return tensor


def _tag(tensor: torch.Tensor) -> int:
    """The tag of the messages: 30 bits of a hash of the dtype and the shape.

    Gloo looks at neither. So a rank never receives a message of another kind than it expects.
    """
    return _TAGS | zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode()) >> 2


def _swap(
    total: torch.Tensor, group: ProcessGroup, tag: int, finish: Callable[[Any], None]
) -> None:
    other = torch.empty_like(total)
    peer = 1 - group.rank()
    sending = group.send([total], peer, tag)
    finish(group.recv([other], peer, tag))
    finish(sending)
    # rank 0's comes first on both, which matters for the bits of NaN
    first, second = (total, other) if peer else (other, total)
    torch.add(first, second, out=total)


def _sum_along_tree(
    total: torch.Tensor, group: ProcessGroup, tag: int, finish: Callable[[Any], None]
) -> None:
    rank, size = group.rank(), group.size()
    children = range(_FAN_OUT * rank + 1, min(size, _FAN_OUT * (rank + 1) + 1))
    parts = [torch.empty_like(total) for _ in children]
    # a message for which a receiver waits already needs no announcement
    upward = [group.recv([part], child, tag) for part, child in zip(parts, children, strict=True)]
    for part, receiving in zip(parts, upward, strict=True):
        finish(receiving)
        total.add_(part)
    if rank > 0:
        parent = (rank - 1) // _FAN_OUT
        result = torch.empty_like(total)
        sending = group.send([total], parent, tag)
        finish(group.recv([result], parent, tag))
        finish(sending)  # which it is by now: this wakes no thread
        total.copy_(result)
    for sending in [group.send([total], child, tag) for child in children]:
        finish(sending)
