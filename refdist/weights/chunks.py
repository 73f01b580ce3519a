"""The cut of weights into chunks, and how tensors lie in the bytes of one. Nothing is sent here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from refdist.checks import check_integer
from refdist.weights.descriptions import Weight, weights_of_metas

BUFFER_BYTES = 2**30
"""The size at which vLLM flushes a buffer, unless it is told another."""


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


def check_buffer_bytes(buffer_bytes: Any) -> int:
    """``buffer_bytes`` as an int, at least 1; else a ValueError."""
    number = check_integer("buffer_bytes", buffer_bytes)
    if number < 1:
        raise ValueError(f"buffer_bytes={number}: must be at least 1")
    return number


def misaligned(metas: Iterable[Any], buffer_bytes: int = BUFFER_BYTES) -> list[str]:
    """The names of those weights which vLLM's consumer cannot read, if they are sent packed.

    It looks at the bytes of a tensor in place. Torch refuses to do so if the bytes before the
    tensor in its chunk are no multiple of the size of its elements: three bfloat16 and then a
    float32, for example. vLLM's rank raises a RuntimeError then, and takes part in no further
    broadcast. ``receive_weights`` copies such a tensor instead. Weights of one dtype are always
    aligned, and so are those that are sorted by the size of their elements, the largest first.

    Args:
        metas: as ``describe`` gives them.
        buffer_bytes: as for ``send_weights``.
    """
    found = []
    for chunk in cut(weights_of_metas(metas), True, check_buffer_bytes(buffer_bytes)):
        for weight, offset in _offsets(chunk):
            if offset % weight.dtype.itemsize:
                found.append(weight.name)
    return found


def _offsets(chunk: Chunk) -> Iterator[tuple[Weight, int]]:
    offset = 0
    for weight in chunk.weights:
        yield weight, offset
        offset += weight.num_bytes


def bytes_in_place(weight: Weight, device: torch.device) -> torch.Tensor | None:
    """The memory of the weight's tensor as uint8, if it is the bytes that travel; else None.

    It is not if the tensor is elsewhere or has gaps, or if torch negates or conjugates its elements
    when they are read.
    """
    tensor = weight.tensor
    if tensor is None or tensor.device != device or not tensor.is_contiguous():
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.view(-1).view(torch.uint8)


def pack(chunk: Chunk, memory: torch.Tensor) -> None:
    """Copy the tensors of a chunk into its bytes, one after the other, without gaps."""
    for weight, offset in _offsets(chunk):
        assert weight.tensor is not None
        part = memory[offset : offset + weight.num_bytes]
        if offset % weight.dtype.itemsize == 0:
            _as(weight, part).copy_(weight.tensor)
        else:
            plain = weight.tensor.resolve_conj().resolve_neg().contiguous()
            part.copy_(plain.view(-1).view(torch.uint8))


def unpack(chunk: Chunk, memory: torch.Tensor) -> Iterator[tuple[Weight, torch.Tensor]]:
    """The tensors in the bytes of a chunk: views of them, or a copy of one that is misaligned."""
    for weight, offset in _offsets(chunk):
        part = memory[offset : offset + weight.num_bytes]
        if offset % weight.dtype.itemsize:
            part = part.clone()
        yield weight, _as(weight, part)


def _as(weight: Weight, part: torch.Tensor) -> torch.Tensor:
    return part.view(weight.dtype).view(weight.shape)
