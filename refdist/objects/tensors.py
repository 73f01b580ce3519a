"""Small CPU tensors as messages: copied before they are sent, checked when they come."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ReduceOp

from refdist.errors import MessageError

_REDUCTIONS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}


def reduction(op: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of two tensors that ``op`` stands for.

    Raises:
        ValueError: there is none here.
    """
    found = next((function for known, function in _REDUCTIONS.items() if op == known), None)
    if found is None:
        raise ValueError(f"op={op}: must be ReduceOp.SUM, PRODUCT, MIN or MAX")
    return found


def check_cpu(tensor: torch.Tensor) -> None:
    """Raise ValueError unless the tensor is on the CPU."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"tensor on {tensor.device}: this group carries CPU tensors; for the others use "
            f"stateless_init_torch_distributed_process_group"
        )


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where its memory is not just its elements, one after the other.

    Gloo and NCCL go by the memory alone. They do not see that a view is conjugated or negated;
    gloo does not see gaps or another order of the elements either, and writes into the gaps.
    """
    if tensor.layout is not torch.strided:
        return tensor
    return tensor.resolve_conj().resolve_neg().contiguous()


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: a pickled view would carry the whole storage that it looks into.

    Raises:
        ValueError: the tensor is not on the CPU, or torch cannot copy its layout or dtype.
    """
    check_cpu(tensor)
    try:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    except RuntimeError as error:
        raise ValueError(
            f"tensor of {tensor.dtype} and {tensor.layout}: must be dense and of a dtype that "
            f"torch copies; convert it first"
        ) from error


def check_like(expected: torch.Tensor, received: Any, whence: str) -> None:
    """Raise MessageError unless a tensor was received that is shaped and typed as expected."""
    if not isinstance(received, torch.Tensor):
        raise MessageError(f"{whence} came a {type(received).__name__}, not a tensor")
    if (received.shape, received.dtype) != (expected.shape, expected.dtype):
        raise MessageError(
            f"{whence} came a tensor of shape {tuple(received.shape)} and {received.dtype}, "
            f"but here it has shape {tuple(expected.shape)} and {expected.dtype}"
        )


def fill(tensor: torch.Tensor, received: Any, whence: str) -> torch.Tensor:
    """Copy what was received into ``tensor``, and return that.

    Raises:
        MessageError: it has another shape or dtype, or is no tensor.
    """
    check_like(tensor, received, whence)
    with torch.no_grad():
        tensor.copy_(received)
    return tensor
