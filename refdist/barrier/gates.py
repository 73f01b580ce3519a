"""Gates: keys of a store at which ranks wait until someone opens them.

A gate stays open until it is closed again, so a rank that comes late passes at once. There are two
kinds, with the same methods, because stores differ:

* With ``Store.barrier``, a gate is a counter that is open from a large number on. Closing it is one
  ``set``, which waits for no answer.
* With ``Store.wait``, which every store has, a gate is open when its key exists. Closing it takes a
  ``delete_key``, which waits for an answer.

The store adds to a count itself, so no rank can sign it. A count that a stranger has forged lets
ranks pass if it might be true; a value that is no number ends the connection of who counts there.
"""

from collections.abc import Sequence
from typing import Protocol, cast

from torch.distributed import DistStoreError, Store

from refdist.deadline import Deadline
from refdist.store.client import StoreClient, has_barrier
from refdist.store.waiting import set_several, wait_for_keys, wait_in_slices
from refdist.torch_versions import quiet

OPEN = 1 << 62
"""The count of an open gate. No number of ranks reaches it by arriving."""


class MeddledGateError(Exception):
    """A gate says what no rank can have said there."""


class Gates(Protocol):
    """The gates of one store, as ``Barrier`` uses them.

    Attributes:
        open_always: whether to open a gate also when nobody waits there, so that the number of
            keys does not depend on who was faster.
    """

    open_always: bool

    def count_in(self, key: str, world_size: int, deadline: Deadline) -> bool:
        """Add one to the count of a gate that opens by itself when the count is ``world_size``.

        Returns:
            Whether the gate is open. It may take a slice of waiting to know. No interrupt comes
            between, so the count has this rank in any case.

        Raises:
            MeddledGateError: it counts more, where the kind of gate can tell.
        """

    def open(self, key: str) -> None:
        """Let everyone pass: who waits already, and who comes until the gate is closed."""

    def wait(self, key: str, deadline: Deadline) -> bool:
        """Wait until the gate is open. False when the deadline came first."""

    def close(self, keys: Sequence[str]) -> None:
        """Close gates. Nobody must be waiting there, or be about to."""


class CounterGates:
    """Gates of a store that has ``Store.barrier``.

    ``barrier(key, n)`` adds 1 to the key and waits until the key is at least ``n``. The call that
    makes it so wakes everyone who waits there, whatever number they wait for, and so does ``set``.
    """

    open_always = False

    def __init__(self, store: StoreClient) -> None:
        self._store = store

    def count_in(self, key: str, world_size: int, deadline: Deadline) -> bool:
        """Arrive and wait, in one request; for a slice, because a second one would count again."""
        with quiet():
            try:
                self._store.barrier(key, world_size, deadline.limit())
                return True
            except DistStoreError:
                return False

    def open(self, key: str) -> None:
        """One request, without an answer."""
        self._store.set(key, str(OPEN))

    def wait(self, key: str, deadline: Deadline) -> bool:
        """One request a slice."""
        return wait_in_slices(
            lambda seconds: self._store.barrier(key, OPEN, seconds),
            deadline,
        )

    def close(self, keys: Sequence[str]) -> None:
        """One request, without an answer."""
        set_several(self._store, dict.fromkeys(keys, "0"))


class KeyGates:
    """Gates of any store."""

    open_always = True

    def __init__(self, store: StoreClient) -> None:
        self._store = store

    def count_in(self, key: str, world_size: int, deadline: Deadline) -> bool:
        """One request, which does not wait."""
        count = self._store.add(key, 1)
        if world_size < count < OPEN:
            raise MeddledGateError(f"{key} counts {count} of {world_size} ranks")
        return count >= world_size

    def open(self, key: str) -> None:
        """One request, without an answer."""
        self._store.set(key, str(OPEN))

    def wait(self, key: str, deadline: Deadline) -> bool:
        """One request a slice."""
        return wait_for_keys(self._store, [key], deadline)

    def close(self, keys: Sequence[str]) -> None:
        """One request for each gate."""
        for key in keys:
            self._store.delete_key(key)


def gates_of(store: StoreClient | Store) -> Gates:
    """The quickest kind of gate that a store allows."""
    kind = CounterGates if has_barrier(store) else KeyGates
    return kind(cast(StoreClient, store))
