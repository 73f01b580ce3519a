"""The other ranks' side: each chunk is received, and cut into tensors."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from refdist.weights.buffers import Block, Buffers
from refdist.weights.channels import Channel, Finish, channel_of, naming
from refdist.weights.chunks import (
    BUFFER_BYTES,
    Chunk,
    bytes_in_place,
    check_buffer_bytes,
    cut,
    unpack,
)
from refdist.weights.descriptions import (
    NamedTensors,
    Weight,
    WeightMeta,
    all_weights_of,
    weights_of_metas,
)


def receive_weights(
    metas: Iterable[WeightMeta],
    communicator: Any,
    src: int,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    buffers: Buffers | None = None,
    timeout: float | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Receive the weights that rank ``src`` sends. Returns an iterator of names and tensors.

    The tensors are on the communicator's device, contiguous, and the caller's for good: none
    changes later. Packed, those of a chunk are views of one memory, which lives as long as one of
    them: clone the few that you keep. A new chunk is received while the caller works on the last.

    Take all of them. The source waits for a rank that stops in the middle, until its deadline.

    Args:
        metas: name, shape and dtype of each weight, in order, as ``describe`` gives them.
        communicator: see ``refdist.weights``.
        src: the rank that sends.
        packed: as on the source. So is ``buffer_bytes``.
        buffer_bytes: the bytes after which a broadcast is made.
        buffers: memory to use again; None for memory of this call alone.
        timeout: in seconds, for each broadcast; see ``send_weights``. It also runs while the source
            gathers or packs what comes next.

    Raises:
        ValueError: an argument is wrong; at once.
        CollectiveError, MessageError: of the communicator, while iterating. The text begins with
            the weights that were being received. None of these was given out.
    """
    found = weights_of_metas(metas)
    received = _receiver(found, communicator, src, packed, buffer_bytes, buffers, timeout)
    return ((weight.name, tensor) for weight, tensor in received)


def receive_into(
    weights: NamedTensors,
    communicator: Any,
    src: int,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    buffers: Buffers | None = None,
    timeout: float | None = None,
) -> None:
    """Receive the weights that rank ``src`` sends into tensors that are there.

    One by one, a contiguous tensor on the communicator's device is written by the communicator
    itself, without a copy. After an error, some tensors are new, some old, and one may be both.

    Args:
        weights: pairs of a name and a dense tensor, or a mapping; in the order of the source, with
            its shapes and dtypes. Any view may be written to.
        communicator: as the other arguments, see ``receive_weights``.
        src: the rank that sends.
        packed: as on the source.
        buffer_bytes: as on the source.
        buffers: memory to use again.
        timeout: in seconds, for each broadcast.

    Raises:
        ValueError, CollectiveError, MessageError: as ``receive_weights``.
    """
    found = all_weights_of(weights)
    received = _receiver(found, communicator, src, packed, buffer_bytes, buffers, timeout)
    for weight, tensor in received:
        if weight.tensor is not None and weight.tensor.data_ptr() != tensor.data_ptr():
            weight.tensor.copy_(tensor)


def _receiver(
    weights: Sequence[Weight],
    communicator: Any,
    src: int,
    packed: bool,
    buffer_bytes: int,
    buffers: Buffers | None,
    timeout: float | None,
) -> Iterator[tuple[Weight, torch.Tensor]]:
    """Check the arguments, and receive on demand."""
    channel = channel_of(communicator, src, timeout)
    if channel.src == channel.rank:
        raise ValueError(f"src={src}: must be another rank than this one, which receives")
    chunks = cut(weights, packed, check_buffer_bytes(buffer_bytes))
    return _receive(chunks, packed, channel, Buffers() if buffers is None else buffers)


class _Arrival:
    """A chunk whose broadcast has begun.

    Its memory is the tensor into which it goes at last, or is lent by a block, or is this chunk's
    alone.
    """

    def __init__(
        self, number: int, chunk: Chunk, packed: bool, channel: Channel, buffers: Buffers
    ) -> None:
        self.chunk, self._channel, self._buffers = chunk, channel, buffers
        self._block: Block | None = None
        self._typed = channel.typed and not packed
        self._what = f"rank {channel.rank}, receiving {chunk}"
        used = [weight.tensor for weight in chunk.weights if weight.tensor is not None]
        with naming(self._what), channel.turn(number, *used):
            self._memory = self._take(packed)
            self._finish: Finish = channel.start(self._memory)

    def _take(self, packed: bool) -> torch.Tensor:
        chunk, device = self.chunk, self._channel.device
        if self._typed:
            (weight,) = chunk.weights
            return torch.empty(weight.shape, dtype=weight.dtype)
        in_place = bytes_in_place(chunk.weights[0], device) if len(chunk.weights) == 1 else None
        if in_place is not None:
            return in_place
        if not packed:
            return torch.empty(chunk.num_bytes, dtype=torch.uint8, device=device)
        self._block = self._buffers.take(chunk.num_bytes, device)
        return self._block.tensor[: chunk.num_bytes]

    def tensors(self) -> Iterator[tuple[Weight, torch.Tensor]]:
        """Wait for the chunk, and cut it."""
        with naming(self._what):
            self._finish()
        if self._typed:
            yield self.chunk.weights[0], self._memory
            return
        memory = self._memory
        if self._block is not None:
            memory = self._block.lend(self.chunk.num_bytes)
            self._buffers.give_back(self._block)
        self._channel.hand_over(memory)
        yield from unpack(self.chunk, memory)


def _receive(
    chunks: Iterator[Chunk], packed: bool, channel: Channel, buffers: Buffers
) -> Iterator[tuple[Weight, torch.Tensor]]:
    """Receive the chunks in turn.

    The next one begins when the caller has taken the first tensor of this one. By then, a caller
    that keeps none holds no tensor of the one before, and the next one gets its memory.
    """
    numbered = enumerate(chunks)

    def begin() -> _Arrival | None:
        number, chunk = next(numbered, (0, None))
        return None if chunk is None else _Arrival(number, chunk, packed, channel, buffers)

    arrival = begin()
    while arrival is not None:
        following, begun = None, False
        for pair in arrival.tensors():
            yield pair
            if channel.ahead and not begun:
                following, begun = begin(), True
        arrival = following if begun else begin()
