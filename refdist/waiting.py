"""Waiting for a store: on time, quietly, and in slices, so that a wait can be cancelled."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed import DistStoreError

from refdist.checks import check_seconds
from refdist.compat import quiet

if TYPE_CHECKING:
    from refdist.client import StoreClient

SLICE_SECONDS = 1.0
"""The longest single wait. A longer one is made of several, and may be cancelled between them."""

_NEVER_WRITTEN, _NEVER_WRITTEN_EITHER = "\0", "\0\0"


class CancelledWaitError(Exception):
    """Whoever asked for this wait no longer wants it. The text says why.

    Attributes:
        completed: whether the barrier that waited was complete all the same.
    """

    completed = False


class Deadline:
    """A point in time, ``allowed`` seconds after its creation, on the monotonic clock.

    Attributes:
        allowed: seconds.
        cancelled: why the waits that end here are no longer wanted; None while they are.
        in_user_code: whether this process runs code of its user, which may be interrupted at once.
    """

    def __init__(self, allowed: float) -> None:
        self.allowed = check_seconds("timeout", allowed)
        if not 0 <= self.allowed < math.inf:
            raise ValueError(f"timeout={allowed}: must be finite seconds, at least 0")
        self.cancelled: str | None = None
        self.in_user_code = False
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the creation, or since the last restart."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.allowed - self.elapsed())

    def restart(self) -> None:
        """Allow as many seconds again, from now on."""
        self._start = time.monotonic()

    def cancel(self, reason: str) -> None:
        """Make the waits that end at this deadline raise CancelledWaitError, within a slice."""
        self.cancelled = reason

    def check(self) -> None:
        """Raise CancelledWaitError if the deadline was cancelled."""
        if self.cancelled is not None:
            raise CancelledWaitError(self.cancelled)

    def limit(self) -> timedelta:
        """How long a single wait may take now, cancelled or not."""
        # a timeout of 0 would mean "for ever" to some stores
        return timedelta(seconds=max(0.001, min(self.remaining(), SLICE_SECONDS)))

    def slice(self) -> timedelta:
        """How long a single wait may take now.

        Raises:
            CancelledWaitError: the deadline was cancelled.
        """
        self.check()
        return self.limit()


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


def wait_for_keys(store: "StoreClient", keys: Sequence[str], deadline: Deadline) -> bool:
    """Wait until every key exists: one request a slice. See ``wait_in_slices``.

    A store that is slow to answer may let the last slice run out although the keys are there, so
    they are looked up once more then.
    """
    if wait_in_slices(lambda seconds: store.wait(list(keys), seconds), deadline):
        return True
    return check(store, keys)


def check(store: "StoreClient", keys: Sequence[str]) -> bool:
    """Whether every key exists: one request, which does not wait."""
    return store.check(list(keys))


def wait_for_value(store: "StoreClient", key: str, deadline: Deadline) -> bytes | None:
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


def peek(store: "StoreClient", key: str) -> bytes | None:
    """The value of a key, or None where it does not exist, in one request and without waiting.

    ``get`` would wait for the key. ``compare_set`` with an expected value that nobody writes
    answers with the present value and changes nothing.
    """
    return _peek(store, key, _NEVER_WRITTEN)


def _peek(store: "StoreClient", key: str, never_written: str) -> bytes | None:
    value: bytes = store.compare_set(key, never_written, never_written)
    return None if value == never_written.encode() else value


def decide(store: "StoreClient", key: str, proposal: bytes) -> bytes:
    """Write ``proposal`` unless the key has a value. Returns the value that it has then."""
    text: Any = proposal  # the store takes bytes; its annotations say str
    value: bytes = store.compare_set(key, "", text)
    if value == proposal:
        # the legacy server of TCPStore wakes those who wait for a key on set, not on compare_set
        store.set(key, text)
    return value


def set_several(store: "StoreClient", values: Mapping[str, str]) -> None:
    """Set several keys in one request, which waits for no answer."""
    store.multi_set(list(values), list(values.values()))
