"""Small CPU tensors as messages: copied before they are sent, checked when they come."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch.distributed import ReduceOp

from refdist.checks import check_rank
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


def check_like(expected: torch.Tensor, received: Any, origin: str) -> None:
    """Raise MessageError unless a tensor was received that is shaped and typed as expected."""
    if not isinstance(received, torch.Tensor):
        raise MessageError(f"{origin} came a {type(received).__name__}, not a tensor")
    if (received.shape, received.dtype) != (expected.shape, expected.dtype):
        raise MessageError(
            f"{origin} came a tensor of shape {tuple(received.shape)} and {received.dtype}, "
            f"but here it has shape {tuple(expected.shape)} and {expected.dtype}"
        )


def fill(tensor: torch.Tensor, origin: str, received: Any) -> torch.Tensor:
    """Copy what was received into ``tensor``, and return that.

    Raises:
        MessageError: it has another shape or dtype, or is no tensor.
    """
    check_like(tensor, received, origin)
    with torch.no_grad():
        tensor.copy_(received)
    return tensor


class TensorMethods:
    """The methods of a group for small CPU tensors, which travel as objects."""

    rank: int
    world_size: int
    all_gather_obj: Callable[..., list[Any]]
    _send: Callable[..., None]
    _receive: Callable[..., Any]
    _send_broadcast: Callable[..., None]
    _receive_broadcast: Callable[..., Any]

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send a small CPU tensor, of any shape and dtype, to rank ``dst``. See ``send_obj``."""
        self._send(own_copy(tensor), dst, tensor=True)

    def recv(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Receive a tensor from rank ``src`` into ``tensor``, and return that. See ``recv_obj``.

        Raises:
            ValueError: ``tensor`` is not on the CPU.
            MessageError: a tensor of another shape or dtype came.
        """
        check_cpu(tensor)
        filled: torch.Tensor = self._receive(src, None, partial(fill, tensor, f"from rank {src}"))
        return filled

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Give the tensor of rank ``src`` to every rank. See ``broadcast_obj``.

        ``tensor`` has the same shape and dtype on every rank, lies on the CPU, is filled on the
        others than ``src``, and is returned.
        """
        if self.rank == src:
            self._send_broadcast(own_copy(tensor), None, tensor=True)
            return tensor
        check_cpu(tensor)
        src = check_rank(src, self.world_size, "src")
        into = partial(fill, tensor, f"from rank {src}")
        filled: torch.Tensor = self._receive_broadcast(src, None, into)
        return filled

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """A new tensor: the tensors of all ranks reduced in rank order, bitwise the same for all.

        Args:
            tensor: on the CPU, the same shape and dtype on every rank; not changed.
            op: ``ReduceOp.SUM``, ``PRODUCT``, ``MIN`` or ``MAX``.

        Raises:
            ValueError: ``op`` is another one, or ``tensor`` is not on the CPU.
            MessageError: the tensors differ in shape or dtype.
        """
        combine = reduction(op)
        own = own_copy(tensor)
        gathered = self.all_gather_obj(own)
        for rank, other in enumerate(gathered):
            check_like(own, other, f"from rank {rank}")
        result: torch.Tensor = reduce(combine, gathered)
        return result
