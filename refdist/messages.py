"""Objects in a torch store: how one is written, read, removed and expired.

A value begins with one byte that says what follows: a pickled object, the number of chunks that
hold one, or the reason why there is none. Chunks exist because the libuv server of TCPStore closes
the connection to a client that sends more than 8 MiB at once. The chunks are written before the
value that counts them, so a reader who finds the value finds them all.
"""

import pickle
from typing import Any

from torch.distributed import Store

from refdist import keys
from refdist.errors import MessageError, MessageExpiredError
from refdist.waiting import peek

CHUNK_BYTES = 4 * 2**20

_OBJECT, _CHUNKS, _EXPIRED, _FAILED = b"\x01", b"\x02", b"\x03", b"\x04"


def encode(obj: Any) -> bytes:
    """Pickle an object.

    Raises:
        whatever pickle raises for an object that cannot be pickled.
    """
    return pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)


def keys_to_write(key: str, payload: bytes) -> list[str]:
    """All keys that ``write`` writes for an encoded object: ``key``, and those of its chunks."""
    if len(payload) <= CHUNK_BYTES:
        return [key]
    return [key, *(keys.chunk(key, i) for i in range(-(-len(payload) // CHUNK_BYTES)))]


def write(store: Store, key: str, payload: bytes) -> None:
    """Write an encoded object under ``key``."""
    _, *chunk_keys = keys_to_write(key, payload)
    if not chunk_keys:
        _set(store, key, _OBJECT + payload)
        return
    view = memoryview(payload)
    for index, chunk_key in enumerate(chunk_keys):
        start = index * CHUNK_BYTES
        _set(store, chunk_key, bytes(view[start : start + CHUNK_BYTES]))
    _set(store, key, _CHUNKS + str(len(chunk_keys)).encode())


def write_failure(store: Store, key: str, reason: str) -> None:
    """Write, in place of an object, why there is none."""
    _set(store, key, _FAILED + reason.encode())


def keys_of(key: str, value: bytes) -> list[str]:
    """All keys that hold the ``value`` of ``key``: itself, and those of its chunks."""
    kind, payload = value[:1], value[1:]
    chunks = int(payload) if kind == _CHUNKS and payload.isdigit() else 0
    return [key, *(keys.chunk(key, index) for index in range(chunks))]


def decode(store: Store, key: str, value: bytes) -> Any:
    """The object that ``value``, read from ``key``, stands for.

    Raises:
        MessageExpiredError: it expired before it was read.
        MessageError: the value is no object, or what wrote it had none to give.
    """
    kind, payload = value[:1], value[1:]
    if kind == _CHUNKS and payload.isdigit():
        payload = _join(store, key, keys_of(key, value)[1:])
    elif kind == _EXPIRED:
        raise MessageExpiredError(f"{key}: {payload.decode(errors='replace')}")
    elif kind == _FAILED:
        raise MessageError(f"{key}: {payload.decode(errors='replace')}")
    elif kind != _OBJECT:
        raise MessageError(f"{key}: holds {value[:40]!r}, which no rank of refdist writes")
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise MessageError(f"{key}: {len(payload)} bytes do not unpickle: {error!r}") from error


def delete(store: Store, all_keys: list[str]) -> None:
    """Delete a value with its chunks."""
    for key in all_keys:
        store.delete_key(key)


def expire(store: Store, key: str, reason: str) -> None:
    """Delete a value, and leave the reason in its place if it was still unread."""
    if store.delete_key(key) and "/chunk/" not in key:
        _set(store, key, _EXPIRED + reason.encode())


def _set(store: Store, key: str, value: bytes) -> None:
    store.set(key, value)  # type: ignore[arg-type]  # it takes bytes; its annotation says str


def _join(store: Store, key: str, chunk_keys: list[str]) -> bytes:
    chunks = [peek(store, chunk_key) for chunk_key in chunk_keys]
    if any(chunk is None for chunk in chunks):
        raise MessageExpiredError(f"{key}: expired while it was read")
    return b"".join(chunk for chunk in chunks if chunk is not None)
