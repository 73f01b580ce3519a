"""Boxes: keys that hold one value each, which one reader takes out, unless its writer does before.

Who deletes a key has what was in it: a store deletes a key once, and says whether it was there. So
reader and writer need no other agreement.

The queues that torch's store has from 2.11 on would need fewer requests, but cannot be used here. A
client that has waited for a queue stays listed there (seen on 2.13): the next push to that queue
ends whatever the client waits for then, be it a barrier.
"""

from torch.distributed import Store

from refdist.waiting import Deadline, wait_for_value


def put(store: Store, key: str, value: bytes) -> None:
    """Put a value into a box. One request, without an answer."""
    store.set(key, value)  # type: ignore[arg-type]  # it takes bytes; its annotation says str


def take(store: Store, key: str, deadline: Deadline) -> bytes | None:
    """Wait for a value, and take it out. None when the deadline came first.

    One request a slice, and two more.
    """
    while (value := wait_for_value(store, key, deadline)) is not None:
        # if the writer was faster, it is about to put something else there
        if store.delete_key(key):
            return value
    return None


def replace(store: Store, key: str, value: bytes) -> bool:
    """Put a value in the place of one that nobody has taken. Whether there was one. Two requests.

    A reader that is just about to take the first value may get it all the same. Then it takes the
    second one out with it.
    """
    if not store.delete_key(key):
        return False
    put(store, key, value)
    return True
