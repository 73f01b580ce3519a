"""Boxes: keys of a store that hold one value, for one reader, who takes it out.

There are two kinds, with the same methods, because stores differ:

* With queues, a value is a queue of one. Waiting for it, reading it and deleting it is one
  request, and two who want the value cannot both get it.
* With plain keys, which every store has, that takes three requests.
"""

from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import Store

from refdist.compat import has_queues
from refdist.waiting import Deadline, peek, wait_for_keys, wait_in_slices


class Boxes(Protocol):
    """The boxes of one store."""

    def put(self, key: str, value: bytes) -> None:
        """Put a value into a box that is empty. Does not wait for an answer."""

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """Wait for a value, and take it out. None when the deadline came first."""

    def withdraw(self, key: str) -> bool:
        """Empty a box that nobody has emptied. Whether there was something in it."""


class QueueBoxes:
    """Boxes of a store that has queues."""

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    def put(self, key: str, value: bytes) -> None:
        """One request, without an answer."""
        self._store.queue_push(key, value)

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """One request a slice."""
        taken: list[bytes] = []

        def pop(seconds: timedelta) -> None:
            # a pop waits for as long as the store says
            self._store.set_timeout(seconds)
            taken.append(self._store.queue_pop(key))

        usual = self._store.timeout
        try:
            return taken[0] if wait_in_slices(pop, deadline) else None
        finally:
            self._store.set_timeout(usual)

    def withdraw(self, key: str) -> bool:
        """Two requests."""
        if self._store.queue_len(key) == 0:
            return False
        try:
            self._store.queue_pop(key, block=False)
            return True
        except RuntimeError as error:
            # torch's QueueEmptyError: the reader was faster
            if "queue is empty" in str(error):
                return False
            raise


class KeyBoxes:
    """Boxes of any store."""

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    def put(self, key: str, value: bytes) -> None:
        """One request, without an answer."""
        self._store.set(key, value)

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """One request a slice, and two more."""
        while wait_for_keys(self._store, [key], deadline):
            value = peek(self._store, key)
            # false for one whose writer has just withdrawn it, and will put a note in its place
            if value is not None and self._store.delete_key(key):
                return value
        return None

    def withdraw(self, key: str) -> bool:
        """One request."""
        return bool(self._store.delete_key(key))


def boxes_of(store: Store) -> Boxes:
    """The quickest kind of box that a store allows."""
    return QueueBoxes(store) if has_queues(store) else KeyBoxes(store)
