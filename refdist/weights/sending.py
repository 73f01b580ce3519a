"""The source's side: tensors are packed into chunks, and each chunk is broadcast."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
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
    pack,
)
from refdist.weights.descriptions import (
    NamedTensors,
    Weight,
    WeightMeta,
    WeightsMismatchError,
    all_weights_of,
    difference_at,
    first_difference,
    weight_of,
    weights_of_metas,
)


def send_weights(
    weights: NamedTensors,
    communicator: Any,
    src: int | None = None,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    metas: Iterable[WeightMeta] | None = None,
    buffers: Buffers | None = None,
    timeout: float | None = None,
) -> None:
    """Send named tensors to every other rank of a communicator. They must all receive.

    Blocks until this rank's part is done, and the tensors may be changed again. A receiver may not
    have all of them yet: gloo and the network hold some megabytes. A barrier after it tells.

    Args:
        weights: pairs of a name and a dense tensor, or a mapping. They are taken one by one, so
            they may be made on the way (gathered, converted). Views, tensors with gaps and those of
            another device are copied to the communicator's device. A tensor must not change
            before the call returns.
        communicator: see ``refdist.weights``.
        src: this rank; None for the communicator's rank.
        packed: in vLLM's format, as it packs weights. False for one broadcast for each tensor.
        buffer_bytes: packed, the bytes after which a broadcast is made; the same on all ranks.
        metas: what ``describe`` or ``agree`` has told the others. Each weight is compared with it
            before it is sent, and those that are all there (in a mapping or a list) before anything
            is sent.
        buffers: memory to use again; None for memory of this call alone.
        timeout: in seconds, for each broadcast; None for that of the communicator, or 300 seconds
            for one of a GPU that has no attribute ``timeout``. It also runs while a receiver works
            on what came before. A StatelessProcessGroup takes none.

    Raises:
        ValueError: an argument is wrong, or a weight is no pair of a name and a dense tensor.
        WeightsMismatchError: the weights are not those of ``metas``; the text has the first that
            differs. Those before it may have been sent, and then the other ranks wait for the rest
            until their deadline.
        CollectiveError, MessageError: of the communicator. The text begins with the weights that
            were being sent.
    """
    channel = channel_of(communicator, src, timeout)
    if channel.src != channel.rank:
        raise ValueError(f"src={src}: must be this rank, {channel.rank}, because it sends")
    buffer_bytes = check_buffer_bytes(buffer_bytes)
    announced = None if metas is None else weights_of_metas(metas)
    buffers = Buffers() if buffers is None else buffers
    found: Iterable[Weight]
    if isinstance(weights, (Mapping, Sequence)):
        found = all_weights_of(weights)
        difference = None if announced is None else first_difference(found, announced, "in metas")
        if difference:
            raise WeightsMismatchError(f"rank {channel.rank} has sent nothing: {difference}")
    else:
        found = _as_they_come(weights, announced, channel.rank)
    _send(cut(found, packed, buffer_bytes), packed, channel, buffers)


def _as_they_come(
    weights: Iterable[tuple[str, torch.Tensor]], announced: Sequence[Weight] | None, rank: int
) -> Iterator[Weight]:
    """The weights, each compared with what was announced in its place."""
    found = (weight_of(pair, number) for number, pair in enumerate(weights))
    if announced is None:
        yield from found
        return
    for number, (weight, said) in enumerate(zip_longest(found, announced)):
        difference = difference_at(number, weight, said, "in metas")
        if difference:
            raise WeightsMismatchError(f"rank {rank} stops to send: {difference}")
        yield weight


def _send(chunks: Iterable[Chunk], packed: bool, channel: Channel, buffers: Buffers) -> None:
    """Broadcast the chunks in turn. Where it can be, one is packed while the last is on its way."""
    under_way = deque[tuple[str, Finish, Block | None]]()

    def finish_first() -> None:
        what, finish, block = under_way.popleft()
        with naming(what):
            finish()
        if block is not None:
            buffers.give_back(block)

    for number, chunk in enumerate(chunks):
        what = f"rank {channel.rank}, sending {chunk}"
        with naming(what):
            finish, block = _start(number, chunk, packed, channel, buffers)
        under_way.append((what, finish, block))
        if len(under_way) > channel.ahead:
            finish_first()
    while under_way:
        finish_first()


def _start(
    number: int, chunk: Chunk, packed: bool, channel: Channel, buffers: Buffers
) -> tuple[Finish, Block | None]:
    """Begin the broadcast of a chunk. Returns the block that it needs until then, if any."""
    tensors = [weight.tensor for weight in chunk.weights if weight.tensor is not None]
    if channel.typed and not packed:
        return channel.start(tensors[0].to(channel.device)), None
    with channel.turn(number, *tensors):
        alone = chunk.weights[0] if len(chunk.weights) == 1 else None
        data = None if alone is None else bytes_in_place(alone, channel.device)
        if data is not None:
            return channel.start(data), None
        block = buffers.take(chunk.num_bytes, channel.device)
        data = block.tensor[: chunk.num_bytes]
        pack(chunk, data)
        return channel.start(data), block
