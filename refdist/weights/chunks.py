"""The cut of weights into chunks, and how tensors lie in the bytes of one. Nothing is sent here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from refdist.objects.tensors import plain
from refdist.weights.descriptions import Weight

_TOGETHER = 64
"""Weights that one launch packs. A GPU copies them while the host prepares the next ones."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Weights that travel in one broadcast.

    Attributes:
        first: the place of the first among all weights.
        weights: the weights, at least one.
    """

    first: int
    weights: tuple[Weight, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the broadcast; 0 if all are empty."""
        return sum(weight.num_bytes for weight in self.weights)

    def __str__(self) -> str:
        if len(self.weights) == 1:
            return f"weight {self.first}, {self.weights[0].name!r} ({self.num_bytes} bytes)"
        last = self.first + len(self.weights) - 1
        return (
            f"weights {self.first} to {last}, {self.weights[0].name!r} to "
            f"{self.weights[-1].name!r} ({self.num_bytes} bytes)"
        )


def cut(weights: Iterable[Weight], packed: bool, buffer_bytes: int) -> Iterator[Chunk]:
    """The chunks of weights, in order. One weight is in each, or as many as vLLM packs.

    vLLM adds a tensor to the chunk first, and sends the chunk if its bytes are then more than
    ``buffer_bytes``. So a chunk may be larger than that, by as much as its last tensor. A chunk
    that is just full waits for the next tensor. At the end, the tensors that are left are sent,
    also if they are all empty: then the broadcast has 0 bytes. No tensors make no broadcast.
    """
    first, some, num_bytes = 0, list[Weight](), 0
    for weight in weights:
        some.append(weight)
        num_bytes += weight.num_bytes
        if not packed or num_bytes > buffer_bytes:
            yield Chunk(first, tuple(some))
            first, some, num_bytes = first + len(some), [], 0
    if some:
        yield Chunk(first, tuple(some))


def bytes_in_place(weight: Weight, device: torch.device) -> torch.Tensor | None:
    """The memory of the weight's tensor as uint8, if it is the bytes that travel; else None.

    It is not if the tensor is elsewhere or has gaps, or if torch negates or conjugates its elements
    when they are read.
    """
    tensor = weight.tensor
    if tensor is None or tensor.device != device:
        return None
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    return _bytes_of(tensor)


def pack(weights: Sequence[Weight], memory: torch.Tensor) -> None:
    """Copy the tensors of a chunk into its bytes, one after the other, without gaps."""
    sources, places = list[torch.Tensor](), list[torch.Tensor]()
    for weight, part in zip(weights, _cut(weights, memory), strict=True):
        source = bytes_in_place(weight, memory.device)
        if source is not None:
            sources.append(source)
            places.append(part)
        elif _is_aligned(weight, part):
            _as(weight, part).copy_(_tensor(weight))
        else:
            part.copy_(_bytes_of(plain(_tensor(weight))))
        if len(places) == _TOGETHER:
            _copy(sources, places)
            sources, places = [], []
    _copy(sources, places)


def unpack(
    weights: Sequence[Weight], memory: torch.Tensor
) -> Iterator[tuple[Weight, torch.Tensor]]:
    """The tensors in the bytes of a chunk: views of them, or a copy of one that is misaligned."""
    for weight, part in zip(weights, _cut(weights, memory), strict=True):
        yield weight, _elements(weight, part)


def unpack_into(weights: Sequence[Weight], memory: torch.Tensor) -> None:
    """Copy the bytes of a chunk into its tensors."""
    parts, places = list[torch.Tensor](), list[torch.Tensor]()
    with torch.inference_mode():  # outside, torch writes to no tensor that was made in it
        for weight, part in zip(weights, _cut(weights, memory), strict=True):
            place = bytes_in_place(weight, memory.device)
            if place is not None:
                parts.append(part)
                places.append(place)
            else:
                _tensor(weight).copy_(_elements(weight, part))
        _copy(parts, places)


def _tensor(weight: Weight) -> torch.Tensor:
    assert weight.tensor is not None
    return weight.tensor


def _cut(weights: Sequence[Weight], memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split_with_sizes(memory, [weight.num_bytes for weight in weights])


def _is_aligned(weight: Weight, part: torch.Tensor) -> bool:
    return part.storage_offset() % weight.dtype.itemsize == 0


def _elements(weight: Weight, part: torch.Tensor) -> torch.Tensor:
    return _as(weight, part if _is_aligned(weight, part) else part.clone())


def _copy(sources: list[torch.Tensor], places: list[torch.Tensor]) -> None:
    """Copy tensors of bytes. On a GPU, one launch does it for hundreds of tensors.

    A ``copy_`` for each takes the host as long as the GPU takes to send a MiB. ``torch.cat`` takes
    the GPU's memory so much that the broadcast of another chunk meanwhile takes 12% longer; this
    makes it 2% longer (two H100). Torch's FSDP uses it too.
    """
    if places:
        torch._foreach_copy_(places, sources)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor. One of 0 or 1 elements may have any stride."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _as(weight: Weight, part: torch.Tensor) -> torch.Tensor:
    return part.view(weight.dtype).view(weight.shape)
