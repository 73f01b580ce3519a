"""Weights on their way: the source packs and sends chunks, the others receive and cut them."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any

import torch

from refdist.weights.channels import Channel, Finish, channel_of
from refdist.weights.chunks import Chunk, bytes_in_place, cut, pack, unpack, unpack_into
from refdist.weights.descriptions import (
    BUFFER_BYTES,
    NamedTensors,
    Weight,
    WeightMeta,
    check_buffer_bytes,
    difference,
    weights_of,
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
    timeout: float | None = None,
) -> None:
    """Send named tensors to every other rank of a communicator. They must all receive.

    Blocks until this rank's part is done, and the tensors may be changed again, also after an
    Exception. But a broadcast that has not ended by its deadline may read them until the
    communicator is destroyed. A receiver may not have all of them yet; a barrier after it tells.

    Args:
        weights: pairs of a name and a dense tensor, or a mapping. Those of a mapping or a list are
            checked before anything is sent. Others are taken one by one, so they may be made on the
            way (gathered, converted). Views, tensors with gaps and those of another device are
            copied. A tensor must not change before the call returns.
        communicator: see ``refdist.weights``.
        src: this rank; None for the communicator's rank.
        packed: in vLLM's format, as it packs weights. False for one broadcast for each tensor.
        buffer_bytes: packed, the bytes after which a broadcast is made; the same on all ranks.
        metas: what ``describe`` or ``agree`` has told the others. Each weight is compared with it
            before it is sent.
        timeout: in seconds, for each broadcast; None for that of the communicator, or 300 seconds
            for one of a GPU that has no attribute ``timeout``. It also runs while a receiver works
            on what came before. A StatelessProcessGroup takes none.

    Raises:
        ValueError: an argument is wrong; a weight is no pair of a name and a dense tensor, or is
            not that of ``metas``. Of an iterator, weights before it may have been sent.
        CollectiveError, MessageError: of the communicator. The text begins with the weights that
            were being sent. Or the last transfer over the communicator did not end.
    """
    channel = channel_of(communicator, src, timeout)
    if channel.src != channel.rank:
        raise ValueError(f"src={src}: must be this rank, {channel.rank}, because it sends")
    buffer_bytes = check_buffer_bytes(buffer_bytes)
    found: Iterable[Weight] = weights_of(weights)
    if metas is not None:
        found = _compared(found, weights_of_metas(metas), channel.rank)
    if isinstance(weights, (Mapping, Sequence)):
        found = list(found)
    for moved in _moved(cut(found, packed, buffer_bytes), packed, channel):
        del moved  # with its memory, which the next chunk gets


def _compared(
    weights: Iterable[Weight], announced: Sequence[Weight], rank: int
) -> Iterator[Weight]:
    """The weights, each compared with what was announced in its place."""
    for number, (weight, said) in enumerate(zip_longest(weights, announced)):
        if text := difference(number, weight, "here", said, "in metas"):
            raise ValueError(f"rank {rank} does not send what metas tells: {text}")
        yield weight


def receive_weights(
    metas: Iterable[WeightMeta],
    communicator: Any,
    src: int,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    timeout: float | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Receive the weights that rank ``src`` sends. Returns an iterator of names and tensors.

    The tensors are on the communicator's device, contiguous, and the caller's for good: none
    changes later. Packed, those of a chunk are views of one memory, which lives as long as one of
    them: clone the few that you keep. Take all of them. If this rank stops in the middle, the
    source waits until its deadline, and the communicator takes no other transfer.

    Args:
        metas: name, shape and dtype of each weight, in order, as ``describe`` gives them.
        communicator: see ``refdist.weights``.
        src: the rank that sends.
        packed: as on the source. So is ``buffer_bytes``.
        buffer_bytes: the bytes after which a broadcast is made.
        timeout: in seconds, for each broadcast; see ``send_weights``. It also runs while the source
            gathers or packs what comes next.

    Raises:
        ValueError: an argument is wrong; at once.
        CollectiveError, MessageError: of the communicator, while iterating. The text begins with
            the weights that were being received, of which the caller has got none. Or, at once, the
            last transfer over the communicator did not end.
    """
    found = weights_of_metas(metas)
    received = _received(found, communicator, src, packed, buffer_bytes, timeout)
    return (
        (weight.name, tensor)
        for moved in received
        for weight, tensor in unpack(moved.weights, moved.memory)
    )


def receive_into(
    weights: NamedTensors,
    communicator: Any,
    src: int,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    timeout: float | None = None,
) -> None:
    """Receive the weights that rank ``src`` sends into tensors that are there.

    One by one, a contiguous tensor on the communicator's device is written by the communicator
    itself, without a copy. After an error, some tensors are new, some old, and one may be both.

    Args:
        weights: pairs of a name and a dense tensor, or a mapping; in the order of the source, with
            its shapes and dtypes. Any view is written to, except an expanded one. Two names may
            share memory if they do so on the source.
        communicator: as all other arguments, see ``receive_weights``.
        src: the rank that sends.
        packed: as on the source.
        buffer_bytes: as on the source.
        timeout: in seconds, for each broadcast.

    Raises:
        ValueError, CollectiveError, MessageError: as ``receive_weights``.
    """
    found = list(weights_of(weights))
    for weight in found:
        _check_not_expanded(weight)
    for moved in _received(found, communicator, src, packed, buffer_bytes, timeout):
        if not moved.in_place:
            unpack_into(moved.weights, moved.memory)
        del moved  # with its memory, which the next chunk gets


def _check_not_expanded(weight: Weight) -> None:
    tensor = weight.tensor
    if tensor is None or tensor.is_contiguous():
        return
    if any(size > 1 and not step for size, step in zip(weight.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"weight {weight.name!r} of shape {weight.shape} and strides {tensor.stride()}: is "
            f"expanded, so it has no memory to receive into"
        )


def _received(
    weights: Sequence[Weight],
    communicator: Any,
    src: int,
    packed: bool,
    buffer_bytes: int,
    timeout: float | None,
) -> "Iterator[_Moving]":
    """Check the arguments, and receive on demand."""
    channel = channel_of(communicator, src, timeout)
    if channel.src == channel.rank:
        raise ValueError(f"src={src}: must be another rank than this one, which receives")
    return _moved(cut(weights, packed, check_buffer_bytes(buffer_bytes)), packed, channel)


def _moved(chunks: Iterable[Chunk], packed: bool, channel: Channel) -> "Iterator[_Moving]":
    """Begin the broadcasts of chunks in order, and yield each one that has ended.

    The next ``channel.ahead`` of them are under way then.
    """
    under_way = deque[_Moving]()
    try:
        for chunk in chunks:
            if len(under_way) > channel.ahead:
                under_way[0].wait()
                yield under_way.popleft()
            under_way.append(_Moving(chunk, packed, channel))
            under_way[-1].start()  # not before: what has begun must be among those that are left
            del chunk  # with its tensors, before those of the next one are made
        while under_way:
            under_way[0].wait()
            if len(under_way) == 1:
                channel.end()  # also if the caller does not ask for more than it gets
            yield under_way.popleft()
    except Exception:
        with suppress(Exception):  # once this has raised, the caller may change the tensors
            for moving in under_way:
                moving.wait()
        raise
    finally:
        for moving in under_way:
            channel.leave(moving.memory)


class _Moving:
    """A chunk on its way, in the tensor of its only weight, or in other memory.

    It holds this memory until the broadcast has ended: on a GPU, freed memory may be used again
    before the broadcast has read it. It holds no weights that it has packed.
    """

    def __init__(self, chunk: Chunk, packed: bool, channel: Channel) -> None:
        self._channel, sends = channel, channel.src == channel.rank
        self.weights = () if sends else chunk.weights
        self._what = f"rank {channel.rank}, {'sending' if sends else 'receiving'} {chunk}"
        with _naming(self._what):
            memory = None
            if len(chunk.weights) == 1:
                memory = bytes_in_place(chunk.weights[0], channel.device)
            self.in_place = memory is not None
            if memory is None:
                # not packed, the caller may keep one tensor; it must not keep more memory than that
                again = packed or sends
                memory = channel.memory.take(chunk.num_bytes, channel.device, again)
                if sends:
                    pack(chunk.weights, memory)
        self.memory: torch.Tensor = memory
        self._finish: Finish = lambda: None

    def start(self) -> None:
        """Begin the broadcast."""
        with _naming(self._what):
            self._finish = self._channel.start(self.memory)

    def wait(self) -> None:
        """Wait until the broadcast has ended. One that has failed is not waited for again."""
        finish, self._finish = self._finish, lambda: None
        with _naming(self._what):
            finish()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Begin the text of an error with what was on the way. Its class stays."""
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{what}: {error.args[0]}", *error.args[1:])
        else:
            error.add_note(what)
        raise
