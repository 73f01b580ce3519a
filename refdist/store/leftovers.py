"""Keys that one rank deletes once no rank needs them any more."""

from collections import deque
from collections.abc import Callable, Sequence

from refdist.store.client import StoreClient


class Leftovers:
    """The keys that a rank has to delete, some of them when all ranks have read a broadcast.

    Attributes:
        broadcasts: number of broadcasts that this rank has made and received.
        some: whether there are keys to delete.
    """

    def __init__(self, store: StoreClient) -> None:
        self.broadcasts = 0
        self.some = False
        self._store = store
        self._keys: list[str] = []
        self._unread: deque[tuple[int, Sequence[str]]] = deque()

    def add(self, keys: Sequence[str]) -> None:
        """Add keys that nobody needs when all ranks have arrived at a later barrier."""
        self._keys += keys
        self.some = True

    def add_broadcast(self, keys: Sequence[str]) -> None:
        """Add keys that nobody needs when all ranks have received this broadcast as well."""
        self._unread.append((self.broadcasts, keys))
        self.broadcasts += 1
        self.some = True

    def delete(self, read: Callable[[], Sequence[int]]) -> None:
        """Delete the keys, as all ranks have arrived at a barrier.

        ``read`` looks up how many broadcasts each of them had made and received then.
        """
        least = min(read(), default=0) if self._unread else 0
        while self._unread and self._unread[0][0] < least:
            self._keys += self._unread.popleft()[1]
        while self._keys:
            self._store.delete_key(self._keys.pop())
        self.some = bool(self._unread)
