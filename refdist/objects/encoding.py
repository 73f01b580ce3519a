"""The format of objects in the store. Only this module knows it.

A value begins with one byte that says what follows: a pickled object, or the lengths of the parts
of a large one, or the reason why there is none.

The parts of a large object are its pickle and, apart from it, the memory of its tensors, so that
nothing copies this into a pickle. They follow each other in chunks, each under a key of its own. A
reader takes the first chunks while the last are still being written. Chunks are of a size that
both servers of TCPStore move fast; the libuv server closes the connection to a client that sends
more than 8 MiB at once.
"""

import pickle
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from refdist.deadline import Deadline, NoRoomError, UserCodeError
from refdist.errors import MessageError
from refdist.objects import plain_data
from refdist.objects.storages import REDUCERS
from refdist.objects.unique_id import Unpickler

CHUNK_BYTES = 256 * 2**10
"""The most that is written under one key, besides a mark and a tag."""

MAX_BYTES = 1 << 32
"""The largest object. More belongs on the data plane, or is not from refdist."""

_APART_BYTES = 64 * 2**10  # memory of this size and more stays out of the pickle
OBJECT, _LARGE, _FAILED, _CHUNK = b"\x01", b"\x02", b"\x03", b"\x04"
_LENGTH = struct.Struct("<Q")


Loads = Callable[..., Any]
"""Unpickles: called as ``pickle.loads(payload, buffers=...)``."""


class Encoded:
    """An object that is ready to be written.

    Attributes:
        value: for the object's own key.
        parts: of a large object, for its chunks; empty for a small one.
        count: number of chunks.
    """

    def __init__(self, parts: list[memoryview], obj: Any) -> None:
        self._owner = obj  # of the memory of the parts
        if len(parts) == 1 and parts[0].nbytes < CHUNK_BYTES:
            self.value = OBJECT + parts[0]
            self.parts: list[memoryview] = []
            self.count = 0
            return
        self.value = _LARGE + b"".join(_LENGTH.pack(part.nbytes) for part in parts)
        self.parts = parts
        self.count = -(-sum(map(len, parts)) // CHUNK_BYTES)

    def chunks(self) -> Iterator[bytes]:
        """The values for the keys of the chunks, in order."""
        pieces: list[Any] = [_CHUNK]
        room = CHUNK_BYTES
        for part in self.parts:
            offset = 0
            while offset < part.nbytes:
                piece = part[offset : offset + room]
                pieces.append(piece)
                offset += piece.nbytes
                room -= piece.nbytes
                if room == 0:
                    yield b"".join(pieces)
                    pieces, room = [_CHUNK], CHUNK_BYTES
        if room < CHUNK_BYTES:
            yield b"".join(pieces)


def encode(obj: Any) -> Encoded:
    """Pickle an object.

    Raises:
        ValueError: the object takes more than ``MAX_BYTES``.
        Exception: whatever pickle raises for an object that cannot be pickled.
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
    pickler.dispatch_table = REDUCERS
    pickler.dump(obj)
    # not getbuffer(): a stream that dies before its buffer complains on stderr in Python 3.13
    parts = [memoryview(stream.getvalue()), *buffers]
    size = sum(map(len, parts))
    if size > MAX_BYTES:
        raise ValueError(
            f"object of {size} bytes: a group carries at most {MAX_BYTES}; send larger ones over "
            f"stateless_init_torch_distributed_process_group"
        )
    return Encoded(parts, obj)


def _anything(payload: Any, buffers: Any = None) -> Any:
    """As ``pickle.loads``: it runs what a message names. An id of vLLM's needs no vLLM."""
    try:
        return pickle.loads(payload, buffers=buffers)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "vllm":
            raise
        return Unpickler(BytesIO(payload), buffers=buffers).load()


_LOADS: dict[str, Loads] = {"pickle": _anything, "plain": plain_data.loads}


def loads_of(messages: str) -> Loads:
    """The function that unpickles the messages of a group.

    Raises:
        ValueError: it is neither ``"pickle"`` nor ``"plain"``.
    """
    if messages not in _LOADS:
        raise ValueError(f"messages={messages!r}: must be 'pickle' or 'plain'")
    return _LOADS[messages]


def failure(reason: str) -> bytes:
    """A value that says why there is no object, or no chunk."""
    return _FAILED + reason.encode()


class Decoder:
    """Puts an object together again: ``Decoder(key, value)``, ``add`` each chunk, then ``decode``.

    Attributes:
        chunks: how many the object has; 0 for a small one.
        payload: the pickle.
        parts: the memory of its tensors, apart from it.

    Raises:
        MessageError: the value stands for no object.
    """

    def __init__(self, key: str, value: bytes) -> None:
        self._lengths: list[int] = []
        self.parts: list[bytearray] = []
        if value[:1] == OBJECT:
            self.payload: memoryview | bytearray = memoryview(value)[1:]
        else:
            self._lengths = _lengths_of(key, value)
        self._room: list[memoryview] | None = None  # that is still to be filled
        self._left = sum(self._lengths)
        self.chunks = -(-self._left // CHUNK_BYTES)

    def add(self, key: str, value: bytes) -> None:
        """Add the next chunk, which is the value of a key.

        Raises:
            MessageError: it is no chunk, or of a wrong size.
            NoRoomError: the object finds no room.
        """
        _check_kind(key, value, _CHUNK)
        chunk = memoryview(value)[1:]
        if len(chunk) != min(self._left, CHUNK_BYTES):
            raise MessageError(f"{key}: holds {len(chunk)} bytes, not as many as it should")
        if self._room is None:
            # only now: lengths alone are no reason to take gigabytes
            try:
                self.payload, *self.parts = map(bytearray, self._lengths)
            except MemoryError as error:
                raise NoRoomError(f"no room for an object of {self._left} bytes") from error
            self._room = [memoryview(part) for part in (self.payload, *self.parts) if part]
        self._left -= len(chunk)
        while chunk:
            fits = min(len(self._room[0]), len(chunk))
            self._room[0][:fits] = chunk[:fits]
            self._room[0], chunk = self._room[0][fits:], chunk[fits:]
            if not self._room[0]:
                del self._room[0]


def decode(key: str, payload: Any, parts: list[bytearray], deadline: Deadline, loads: Loads) -> Any:
    """The object that was put together: its pickle, and apart from it, the memory of tensors.

    Raises:
        MessageError: it does not unpickle.
        UserCodeError: what is unpickled raised something that is no Exception.
        CancelledWaitError: the deadline was cancelled.
    """
    try:
        # it may take long, to import what the object is made of, say
        deadline.in_user_code = True
        if deadline.cancelled is not None:
            deadline.check()
        return loads(payload, buffers=parts or None)
    except BaseException as error:
        deadline.in_user_code = False
        deadline.check()  # an interrupt: the next call tries again
        if not isinstance(error, Exception):
            raise UserCodeError(error) from error
        why = str(error) if isinstance(error, MessageError) else repr(error)
        raise MessageError(f"{key}: {len(payload)} bytes do not unpickle: {why}") from error
    finally:
        deadline.in_user_code = False


def _lengths_of(key: str, value: bytes) -> list[int]:
    _check_kind(key, value, _LARGE)
    payload = value[1:]
    if payload and len(payload) % _LENGTH.size == 0:
        lengths = [length for (length,) in _LENGTH.iter_unpack(payload)]
        if 0 < sum(lengths) <= MAX_BYTES:
            return lengths
    raise MessageError(f"{key}: holds {value[:40]!r}, which no rank of refdist writes")


def _check_kind(key: str, value: bytes, expected: bytes) -> None:
    if value[:1] == _FAILED:
        raise MessageError(f"{key}: {value[1:].decode(errors='replace')}")
    if value[:1] != expected:
        raise MessageError(f"{key}: holds {value[:40]!r}, which no rank of refdist writes")
