"""The sum of a small CPU tensor over a gloo group, with few messages.

Gloo's own all-reduce sends parts of the tensor around a ring: 2 (n - 1) steps one after the
other, each with messages of every rank. This suits large tensors. A small tensor costs as much as
its messages, so here it travels whole, along a tree. Each rank adds the tensors of its children, in
order, and sends the sum to its parent. The total comes back the same way. This takes 2 (n - 1)
messages in all. Two ranks swap their tensors instead, in one step.

Gloo sends and receives in the calling thread. It hands a collective to another thread first.

One rank computes the sum, or both of two ranks in the same order. So its bits are equal everywhere.
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
_TAGS = 1 << 30  # our smallest tag, above the tags of users


def cpu_all_reduce_(
    tensor: torch.Tensor, group: ProcessGroup, timeout: timedelta | None = None
) -> torch.Tensor:
    """Sum a small CPU tensor over the ranks of a gloo group, in place, with low latency.

    It is meant for up to about 64 KiB. The result has the same bits on every rank. Every addition
    rounds to the tensor's dtype.

    Args:
        tensor: a CPU tensor with the same shape and dtype on every rank.
        group: a gloo group.
        timeout: timeout of the whole call, at least 0; None for the group's own.

    Returns:
        ``tensor``.

    Raises:
        ValueError: ``tensor`` is not on the CPU, the group is not for CPU tensors, or ``timeout``
            is negative.
        CollectiveError: a rank did not come in time, or came with another shape or dtype, or its
            connection was lost. The group cannot be used again.

    Source: ``vllm.distributed.utils``, for its name and signature.
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

    Gloo checks neither. The tag keeps a rank from receiving a message of another dtype or shape.
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
    # rank 0's comes first on both, because the order decides the bits of NaN
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
        finish(sending)  # it is done by now, so this wakes no thread
        total.copy_(result)
    for sending in [group.send([total], child, tag) for child in children]:
        finish(sending)
