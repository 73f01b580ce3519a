"""Objects in a torch store: how one is written, read, removed and expired.

A value begins with one byte that says what follows: a pickled object, or the lengths of the parts
of a large one, or the reason why there is none.

The parts of a large object are its pickle and, apart from it, the memory of its tensors, which is
so never copied into a pickle. They follow each other in chunks, each under a key of its own. A
reader takes the first chunks while the last are still being written. Chunks are of a size that
both servers of TCPStore move fast; the libuv server closes the connection to a client that sends
more than 8 MiB at once.
"""

import copyreg
import ctypes
import pickle
import struct
from collections import ChainMap
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import torch

from refdist.deadline import SLICE_SECONDS, CancelledWaitError, Deadline, NoRoomError, UserCodeError
from refdist.errors import (
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
)
from refdist.objects.boxes import Boxes
from refdist.store import keys

CHUNK_BYTES = 256 * 2**10
"""The most that is written under one key."""

MAX_BYTES = 1 << 32
"""The largest object. More belongs on the data plane, or is not from refdist."""

_APART_BYTES = 64 * 2**10  # memory of this size and more stays out of the pickle
_OBJECT, _LARGE, _EXPIRED, _FAILED, _CHUNK = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"
_LENGTH = struct.Struct("<Q")


class Encoded:
    """An object that is ready to be written.

    Attributes:
        value: what is written under the message's own key.
        parts: what is written in chunks; empty for a small object.
    """

    def __init__(self, parts: list[memoryview], obj: Any) -> None:
        self._owner = obj  # of the memory of the parts
        if len(parts) == 1 and parts[0].nbytes < CHUNK_BYTES:
            self.value = _OBJECT + parts[0]
            self.parts: list[memoryview] = []
            return
        self.value = _LARGE + b"".join(_LENGTH.pack(part.nbytes) for part in parts)
        self.parts = parts


def encode(obj: Any) -> Encoded:
    """Pickle an object.

    Raises:
        ValueError: the object takes more than ``MAX_BYTES``.
        whatever pickle raises for an object that cannot be pickled.
    """
    buffers: list[memoryview] = []

    def keep_in_pickle(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _APART_BYTES:
            return True
        buffers.append(view)
        return False

    stream = BytesIO()
    pickler = pickle.Pickler(stream, protocol=5, buffer_callback=keep_in_pickle)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(obj)
    # not getbuffer(): a stream that dies before its buffer complains on stderr in Python 3.13
    parts = [memoryview(stream.getvalue()), *buffers]
    size = sum(part.nbytes for part in parts)
    if size > MAX_BYTES:
        raise ValueError(
            f"object of {size} bytes: a group carries at most {MAX_BYTES}; send larger ones over "
            f"stateless_init_torch_distributed_process_group"
        )
    return Encoded(parts, obj)


def chunk_keys(key: str, lengths: list[int]) -> list[str]:
    """The keys of the chunks of a large object with parts of these lengths."""
    return [keys.chunk(key, index) for index in range(_count_chunks(lengths))]


def write_chunks(boxes: Boxes, key: str, encoded: Encoded, deadline: Deadline) -> None:
    """Write the chunks of an encoded object under ``key``, if it takes any.

    Raises:
        CancelledWaitError: the deadline was cancelled. The reader gets a MessageError.
    """
    for index, chunk in enumerate(_cut(encoded.parts)):
        try:
            deadline.slice()
        except CancelledWaitError as error:
            boxes.put(keys.chunk(key, index), failure(f"its writer stopped, because of {error}"))
            raise
        boxes.put(keys.chunk(key, index), chunk)


def failure(reason: str) -> bytes:
    """A value that says why there is no object, or no chunk."""
    return _FAILED + reason.encode()


def expired(seconds: float) -> bytes:
    """A value that says why there is no object any more."""
    return _EXPIRED + f"expired unread after {seconds:g} s".encode()


def write_expired(boxes: Boxes, key: str, seconds: float) -> None:
    """Tell who has begun to read the chunks under ``key`` that the rest has expired."""
    boxes.put(keys.expired(key), _number_of(key).encode() + b":" + expired(seconds))


def lengths_of(value: bytes) -> list[int]:
    """The lengths of the parts of a large object; none if the value is something else."""
    if value[:1] != _LARGE:
        return []
    payload = value[1:]
    if not payload or len(payload) % _LENGTH.size:
        return []
    lengths = [length for (length,) in _LENGTH.iter_unpack(payload)]
    return lengths if sum(lengths) <= MAX_BYTES else []


def read(boxes: Boxes, key: str, value: bytes, deadline: Deadline) -> Any:
    """The object that ``value`` stands for; the chunks of a large one are under ``key``.

    Raises:
        MessageExpiredError: it expired before it was read.
        MessageTimeoutError: its writer stopped in the middle of it.
        AuthenticationError: a chunk is not from its writer.
        MessageError: the value is no object, or what wrote it had none to give.
        NoRoomError: the parts find no room. It may be read again.
        UserCodeError: what is unpickled raised something that is no Exception.
        CancelledWaitError: the deadline was cancelled. It may be read again.
    """
    if value[:1] == _OBJECT:
        return _unpickle(key, memoryview(value)[1:], [], deadline)
    lengths = lengths_of(value)
    if not lengths:
        _raise_for(key, value, _OBJECT)
    payload, *parts = _read_parts(boxes, key, lengths, deadline)
    return _unpickle(key, payload, parts, deadline)


def _unpickle(
    key: str, payload: memoryview | bytearray, parts: list[bytearray], deadline: Deadline
) -> Any:
    try:
        # it may take long, to import what the object is made of, say
        deadline.in_user_code = True
        deadline.check()
        return pickle.loads(payload, buffers=parts)
    except BaseException as error:
        deadline.in_user_code = False
        deadline.check()  # an interrupt: the next call tries again
        if not isinstance(error, Exception):
            raise UserCodeError(error) from error
        raise MessageError(f"{key}: {len(payload)} bytes do not unpickle: {error!r}") from error
    finally:
        deadline.in_user_code = False


def _raise_for(key: str, value: bytes, expected: bytes) -> None:
    """Raise unless the value is of the expected kind."""
    kind, payload = value[:1], value[1:]
    if kind == _EXPIRED:
        raise MessageExpiredError(f"{key}: {payload.decode(errors='replace')}")
    if kind == _FAILED:
        raise MessageError(f"{key}: {payload.decode(errors='replace')}")
    if kind != expected:
        raise MessageError(f"{key}: holds {value[:40]!r}, which no rank of refdist writes")


def _count_chunks(lengths: list[int]) -> int:
    return -(-sum(lengths) // CHUNK_BYTES)


def _cut(parts: list[memoryview]) -> Iterator[bytes]:
    """Cut what follows each other into chunks of the same size, the last one perhaps shorter."""
    pieces: list[bytes] = [_CHUNK]
    room = CHUNK_BYTES
    for part in parts:
        offset = 0
        while offset < part.nbytes:
            piece = part[offset : offset + room]
            pieces.append(piece)  # type: ignore[arg-type]  # join takes it
            offset += piece.nbytes
            room -= piece.nbytes
            if room == 0:
                yield b"".join(pieces)
                pieces, room = [_CHUNK], CHUNK_BYTES
    if room < CHUNK_BYTES:
        yield b"".join(pieces)


def _read_parts(boxes: Boxes, key: str, lengths: list[int], deadline: Deadline) -> list[bytearray]:
    parts: list[bytearray] = []
    left = sum(lengths)
    for chunk_key in chunk_keys(key, lengths):
        chunk = _read_chunk(boxes, key, chunk_key, deadline)
        if len(chunk) != min(left, CHUNK_BYTES):
            raise MessageError(f"{chunk_key}: holds {len(chunk)} bytes, not as many as it should")
        if not parts:
            # only now: lengths alone are no reason to take gigabytes
            parts = _make_room(lengths)
            views = [memoryview(part) for part in parts if part]
        left -= len(chunk)
        while chunk:
            fits = min(len(views[0]), len(chunk))
            views[0][:fits] = chunk[:fits]
            views[0], chunk = views[0][fits:], chunk[fits:]
            if not views[0]:
                del views[0]
    return parts or _make_room(lengths)


def _make_room(lengths: list[int]) -> list[bytearray]:
    try:
        return [bytearray(length) for length in lengths]
    except MemoryError as error:
        raise NoRoomError(f"no room for an object of {sum(lengths)} bytes") from error


def _read_chunk(boxes: Boxes, key: str, chunk_key: str, deadline: Deadline) -> memoryview:
    deadline.slice()
    while (value := boxes.look(chunk_key)) is None:
        # it is still being written, or it has expired
        number, _, note = (boxes.look(keys.expired(key)) or b"").partition(b":")
        if number.isdigit() and len(number) < 20 and int(number) >= int(_number_of(key)):
            _raise_for(key, note, _CHUNK)
        deadline.slice()
        moment = Deadline(min(deadline.remaining(), SLICE_SECONDS))
        value = boxes.wait(chunk_key, moment)
        if value is not None:
            break
        if deadline.remaining() == 0:
            raise MessageTimeoutError(f"{chunk_key}: its writer did not write this in time")
    _raise_for(chunk_key, value, _CHUNK)
    return memoryview(value)[1:]


def _number_of(key: str) -> str:
    return key.rpartition("/")[2]


def _reduce_storage(storage: Any) -> Any:
    """Leave the memory of a CPU tensor to the caller, instead of copying it into the pickle.

    A tensor pickles its storage, and adds its dtype, shape and strides.
    """
    untyped = storage._untyped_storage
    # a storage that is elsewhere, or has no memory, pickles itself
    if untyped.device.type != "cpu" or not untyped.nbytes():
        return storage.__reduce__()
    return _storage_from, (pickle.PickleBuffer(_memory_of(untyped)), storage.dtype)


def _reduce_untyped(untyped: torch.UntypedStorage) -> Any:
    """As a typed one: TypedStorage knows not every dtype, so torch adds those of some tensors.

    For these, its own way of pickling the storage cannot be read.
    """
    typed: Any = torch.storage.TypedStorage
    return _reduce_storage(typed(wrap_storage=untyped, dtype=torch.uint8, _internal=True))


_REDUCERS: Any = ChainMap(
    {torch.storage.TypedStorage: _reduce_storage, torch.UntypedStorage: _reduce_untyped},
    copyreg.dispatch_table,
)


def _memory_of(storage: torch.UntypedStorage) -> Any:
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory._storage = storage  # type: ignore[attr-defined]  # keeps it alive
    return memory


def _storage_from(memory: bytearray, dtype: torch.dtype) -> Any:
    untyped = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=untyped, dtype=dtype, _internal=True)
