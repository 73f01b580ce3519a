"""Boxes: keys that hold one value each, which one reader takes out, unless its writer does before.

Who deletes a key has what was in it: a store deletes a key once, and says whether it was there. So
reader and writer need no other agreement.

The queues that torch's store has from 2.11 on would need fewer requests, but cannot be used here. A
client that has waited for a queue stays listed there (seen on 2.13): the next push to that queue
ends whatever the client waits for then, be it a barrier.
"""

from refdist.deadline import Deadline
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS, NoSeals
from refdist.store.waiting import peek, wait_for_value


class Boxes:
    """The boxes of a store. What is in them is sealed, in a group that has a secret.

    What reads raises AuthenticationError for a value that has no such seal.
    """

    def __init__(self, store: StoreClient, seals: NoSeals = NO_SEALS) -> None:
        self._store = store
        self._seals = seals

    def put(self, key: str, value: bytes) -> None:
        """Put a value into a box. One request, without an answer."""
        self._store.set(key, self._seals.seal(key, value))

    def take(self, key: str, deadline: Deadline) -> bytes | None:
        """Wait for a value, and take it out. None when the deadline came first.

        One request a slice, and two more. What is refused is taken out too.
        """
        while (value := wait_for_value(self._store, key, deadline)) is not None:
            # if the writer was faster, it is about to put something else there
            if self._store.delete_key(key):
                return self._seals.unseal(key, value)
        return None

    def replace(self, key: str, value: bytes) -> bool:
        """Put a value in the place of one that nobody has taken. Whether there was one.

        A reader that is just about to take the first value may get it all the same. Then it takes
        the second one out with it. Two requests.
        """
        if not self._store.delete_key(key):
            return False
        self.put(key, value)
        return True

    def look(self, key: str) -> bytes | None:
        """What is in a box, or None. One request, which does not wait."""
        value = peek(self._store, key)
        return None if value is None else self._seals.unseal(key, value)

    def wait(self, key: str, deadline: Deadline) -> bytes | None:
        """Wait for a value, and leave it there. None when the deadline came first."""
        value = wait_for_value(self._store, key, deadline)
        return None if value is None else self._seals.unseal(key, value)

    def empty(self, key: str) -> bool:
        """Delete a key. Whether it was there. One request."""
        return self._store.delete_key(key)
