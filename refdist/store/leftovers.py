"""Keys that one rank deletes once no rank needs them any more.

A barrier proves that. The roll tells how many broadcasts each rank had made and received when it
came, so a source knows whether all have come past one of its own. A rank that has missed a
broadcast, because its time was up, say, may still ask for it: until then, its count stands still.
"""

from collections import deque
from collections.abc import Callable, Sequence

from refdist.store.client import StoreClient

_MOST = 256  # keys that one barrier deletes, each of which takes a request


class Leftovers:
    """The keys that a rank has to delete.

    Attributes:
        broadcasts: that this rank has made and received, up to the first that it still misses.
        some: whether there are keys to delete.
    """

    def __init__(self, store: StoreClient) -> None:
        self.broadcasts = 0
        self.some = False
        self._store = store
        self._keys: list[str] = []
        self._unread: deque[tuple[int, Sequence[str]]] = deque()
        self._position = 0  # of the next broadcast among those of all ranks
        self._missed: set[int] = set()  # the sources of those that this rank still misses

    def add(self, keys: Sequence[str]) -> None:
        """Add keys that nobody needs when all ranks have arrived at a later barrier."""
        self._keys += keys
        self.some = True

    def add_broadcast(self, keys: Sequence[str]) -> None:
        """Add keys that nobody needs when all ranks have received this broadcast as well."""
        self._unread.append((self._position, keys))
        self.some = True
        self._go_past()

    def received(self, source: int) -> None:
        """This rank has received a broadcast."""
        if source not in self._missed:
            self._go_past()
            return
        self._missed.discard(source)
        if not self._missed:
            self.broadcasts = self._position

    def missed(self, source: int) -> None:
        """This rank has asked for a broadcast in vain, and may ask again."""
        if source not in self._missed:
            self._missed.add(source)
            self._position += 1

    def _go_past(self) -> None:
        self._position += 1
        if not self._missed:
            self.broadcasts = self._position

    def forget(self, key: str) -> None:
        """A broadcast has expired, whose keys are gone."""
        if self._unread and key in self._unread[0][1]:
            self._unread.popleft()

    def delete(self, read: Callable[[], Sequence[int]], at_most: int = _MOST) -> None:
        """Delete keys, as all ranks have arrived at a barrier; the rest another time.

        ``read`` looks up how many broadcasts each of them had made and received then.
        """
        least = min(read(), default=0) if self._unread else 0
        while self._unread and self._unread[0][0] < least:
            self._keys += self._unread.popleft()[1]
        for _ in range(min(at_most, len(self._keys))):
            self._store.delete_key(self._keys[-1])
            self._keys.pop()
        self.some = bool(self._keys or self._unread)
