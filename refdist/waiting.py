"""Waiting for keys of a store: on time, interruptible and quiet."""

import math
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistStoreError, Store

from refdist.checks import check_seconds
from refdist.compat import quiet

SLICE_SECONDS = 1.0
"""A wait is cut into slices of this length, because signals are handled only between requests."""

_NEVER_WRITTEN = "\0"


class Deadline:
    """A point in time, ``allowed`` seconds after its creation, on the monotonic clock."""

    def __init__(self, allowed: float) -> None:
        self.allowed = check_seconds("timeout", allowed)
        if not 0 <= self.allowed < math.inf:
            raise ValueError(f"timeout={allowed}: must be finite seconds, at least 0")
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the creation."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.allowed - self.elapsed())


def wait_for_keys(store: Store, keys: Sequence[str], deadline: Deadline) -> bool:
    """Block until every key exists, or until the deadline.

    One request a slice of ``SLICE_SECONDS``, so SIGINT raises KeyboardInterrupt within a second.

    Returns:
        True when every key exists, False when the deadline came first.

    Raises:
        torch.distributed.DistNetworkError: the connection to the store is lost.
    """
    with quiet():
        while True:
            remaining = deadline.remaining()
            # a timeout of 0 would mean "for ever" to some stores
            seconds = max(0.001, min(remaining, SLICE_SECONDS))
            try:
                store.wait(list(keys), timedelta(seconds=seconds))
                return True
            except DistStoreError:
                if remaining <= SLICE_SECONDS:
                    return False


def peek(store: Store, key: str) -> bytes | None:
    """The value of a key, or None where it does not exist, in one request and without waiting.

    ``get`` would wait for the key. ``compare_set`` with an expected value that nobody writes
    answers with the present value and changes nothing.
    """
    value: bytes = store.compare_set(key, _NEVER_WRITTEN, _NEVER_WRITTEN)
    return None if value == _NEVER_WRITTEN.encode() else value


def decide(store: Store, key: str, proposal: bytes) -> bytes:
    """Write ``proposal`` unless the key has a value. Returns the value that it has then."""
    value: bytes = store.compare_set(key, "", proposal.decode())
    if value == proposal:
        # the legacy server of TCPStore wakes those who wait for a key on set, not on compare_set
        store.set(key, proposal.decode())
    return value
