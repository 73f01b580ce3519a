"""Waiting for a store: on time, quietly, and in slices, so that a wait can be cancelled."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError

from refdist.deadline import SLICE_SECONDS, Deadline
from refdist.store.client import StoreClient
from refdist.torch_versions import quiet

_NEVER_WRITTEN, _NEVER_WRITTEN_EITHER = "\0", "\0\0"


def wait_in_slices(request: Callable[[timedelta], None], deadline: Deadline) -> bool:
    """Repeat a request that waits for as long as it is told, until it succeeds.

    Returns:
        True when it succeeded, False when the deadline came first.

    Raises:
        CancelledWaitError: the deadline was cancelled.
        torch.distributed.DistNetworkError: the connection to the store is lost.
    """
    with quiet():
        while True:
            in_time = deadline.remaining() > SLICE_SECONDS
            try:
                request(deadline.slice())
                return True
            except DistStoreError:
                if not in_time:
                    return False


def wait_for_keys(store: StoreClient, keys: Sequence[str], deadline: Deadline) -> bool:
    """Wait until every key exists: one request a slice. See ``wait_in_slices``.

    A store that is slow to answer may let the last slice run out although the keys are there, so
    they are looked up once more then.
    """
    if wait_in_slices(lambda seconds: store.wait(list(keys), seconds), deadline):
        return True
    return check(store, keys)


def check(store: StoreClient, keys: Sequence[str]) -> bool:
    """Whether every key exists: one request, which does not wait."""
    return store.check(list(keys))


def wait_for_value(store: StoreClient, key: str, deadline: Deadline) -> bytes | None:
    """Wait until a key has a value, and return it; None when the deadline came first.

    Two requests. The libuv server of TCPStore also ends a wait when someone else compares the key
    before it exists, so this waits again where there is no value yet.
    """
    while wait_for_keys(store, [key], deadline):
        value = peek(store, key)
        if value is None:
            value = _peek(store, key, _NEVER_WRITTEN_EITHER)  # unless someone wrote the other
        if value is not None or deadline.remaining() == 0:
            return value
    return None


def peek(store: StoreClient, key: str) -> bytes | None:
    """The value of a key, or None where it does not exist, in one request and without waiting.

    ``get`` would wait for the key. ``compare_set`` with an expected value that nobody writes
    answers with the present value and changes nothing.
    """
    return _peek(store, key, _NEVER_WRITTEN)


def _peek(store: StoreClient, key: str, never_written: str) -> bytes | None:
    value: bytes = store.compare_set(key, never_written, never_written)
    return None if value == never_written.encode() else value


def decide(store: StoreClient, key: str, proposal: bytes) -> bytes:
    """Write ``proposal`` unless the key has a value. Returns the value that it has then."""
    text: Any = proposal  # the store takes bytes; its annotations say str
    value: bytes = store.compare_set(key, "", text)
    if value == proposal:
        # the legacy server of TCPStore wakes those who wait for a key on set, not on compare_set
        store.set(key, text)
    return value


def set_several(store: StoreClient, values: Mapping[str, str]) -> None:
    """Set several keys in one request, which waits for no answer."""
    store.multi_set(list(values), list(values.values()))
