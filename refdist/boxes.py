"""Boxes: places in a store for numbered values, which one reader takes out in order.

The key of a value ends in its number; what comes before names the box. There are two kinds, with
the same methods, because stores differ:

* With queues, a box is one queue. Waiting for a value, reading it and deleting it is one request.
* With plain keys, which every store has, each value has a key of its own, and that takes four.
"""

from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import Store

from refdist.compat import has_queues
from refdist.errors import MessageError
from refdist.waiting import Deadline, peek, wait_for_value, wait_in_slices


class Boxes(Protocol):
    """The boxes of one store, as one rank uses them."""

    def put(self, key: str, value: bytes) -> None:
        """Put a value into a box. Does not wait for an answer."""

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """Wait for a value, and take it out. None when the deadline came first.

        Raises:
            MessageError: the box holds what no rank of refdist writes. It is gone then, and the
                value is still to come.
        """

    def replace(self, key: str, value: bytes) -> bool:
        """Put a value in the place of one that nobody has taken. Whether there was one."""


class QueueBoxes:
    """Boxes of a store that has queues.

    Each value is preceded by its number. A writer that replaces a value puts the new one behind all
    others, so a reader keeps what comes too early.
    """

    def __init__(self, store: Store) -> None:
        self._store: Any = store
        self._early: dict[str, bytes] = {}
        self._last_number: dict[str, int] = {}  # put into each box

    def put(self, key: str, value: bytes) -> None:
        """One request, without an answer."""
        box, _, number = key.rpartition("/")
        self._last_number[box] = int(number)
        self._push(box, number, value)

    def _push(self, box: str, number: str, value: bytes) -> None:
        self._store.queue_push(box, number.encode() + b":" + value)

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """One request a slice."""
        box, _, number = key.rpartition("/")
        while key not in self._early:
            found = self._pop(box, deadline)
            if found is None:
                return None
            its_number, colon, value = found.partition(b":")
            if not (colon and its_number.isdigit()):
                raise MessageError(f"{box}: holds {found[:40]!r}, which no rank of refdist writes")
            # a lower number is a note about a value that came all the same
            if int(its_number) >= int(number):
                self._early[f"{box}/{its_number.decode()}"] = value
        return self._early.pop(key)

    def replace(self, key: str, value: bytes) -> bool:
        """One request for a value that was taken; three for one that was not, as a rule."""
        box, _, number = key.rpartition("/")
        length = self._store.queue_len(box)
        # the reader takes values in order, so those that are left are the last
        if int(number) <= self._last_number[box] - length:
            return False
        for _ in range(length):
            found = self._pop_at_once(box)
            if found is None:
                return False
            if found.startswith(number.encode() + b":"):
                self._push(box, number, value)
                return True
            self._store.queue_push(box, found)
        return False

    def _pop(self, box: str, deadline: Deadline) -> bytes | None:
        found: list[bytes] = []

        def pop(seconds: timedelta) -> None:
            # a pop waits for as long as the store says
            self._store.set_timeout(seconds)
            found.append(self._store.queue_pop(box))

        usual = self._store.timeout
        try:
            # a store that is slow to answer may let the last slice run out for nothing
            return found[0] if wait_in_slices(pop, deadline) else self._pop_at_once(box)
        finally:
            self._store.set_timeout(usual)

    def _pop_at_once(self, box: str) -> bytes | None:
        if self._store.queue_len(box) == 0:
            return None
        try:
            value: bytes = self._store.queue_pop(box, block=False)
            return value
        except RuntimeError as error:
            # torch's QueueEmptyError: someone was faster
            if "queue is empty" in str(error):
                return None
            raise


class KeyBoxes:
    """Boxes of any store.

    A reader and a writer that want the same value both compare it, and only one of them succeeds.
    """

    _TAKEN = b"\0taken"

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    def put(self, key: str, value: bytes) -> None:
        """One request, without an answer."""
        self._store.set(key, value)

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """One request a slice, and three more."""
        while (value := wait_for_value(self._store, key, deadline)) is not None:
            if self._store.compare_set(key, value, self._TAKEN) == self._TAKEN:
                self._store.delete_key(key)
                return value
        return None

    def replace(self, key: str, value: bytes) -> bool:
        """Two requests."""
        present = peek(self._store, key)
        if present is None or present == self._TAKEN:
            return False
        if self._store.compare_set(key, present, value) != value:
            return False
        self._store.set(key, value)  # wakes a reader that has begun to wait, on any server
        return True


def boxes_of(store: Store) -> Boxes:
    """The quickest kind of box that a store allows."""
    return QueueBoxes(store) if has_queues(store) else KeyBoxes(store)
