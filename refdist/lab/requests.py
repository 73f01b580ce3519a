"""Requests to a store, written down as they are made, and the ranks that wait inside a barrier."""

import time
from typing import Any, NamedTuple

from refdist.barrier.plain import Barrier
from refdist.barrier.roll import Roll
from refdist.group import StatelessProcessGroup


class Request(NamedTuple):
    """A request to a store. Times are seconds of ``time.monotonic()``.

    Attributes:
        name: of the method, such as ``"add"``.
        key: the key, or the first of several.
        sent: when it was made.
        answered: when it returned or raised.
    """

    name: str
    key: str
    sent: float
    answered: float


class LoggedStore:
    """A store that writes down each request in the list ``log``.

    It passes for a store of the same class. ``timeout`` and other properties are no requests.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.log: list[Request] = []

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._store)

    def __repr__(self) -> str:
        return repr(self._store)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if not callable(attribute):
            return attribute

        def request(*arguments: Any, **options: Any) -> Any:
            keys, sent = arguments[0] if arguments else "", time.monotonic()
            try:
                return attribute(*arguments, **options)
            finally:
                key = keys[0] if isinstance(keys, list) else str(keys)
                self.log.append(Request(name, key, sent, time.monotonic()))

        return request


def log_requests(group: StatelessProcessGroup) -> list[Request]:
    """The list to which each request of a group is appended from now on."""
    client = group._barrier.store
    if type(client._store) is not LoggedStore:
        client._store = LoggedStore(client._store)
    log: list[Request] = client._store.log
    log.clear()
    return log


def wait_until_inside(
    waited_for: StatelessProcessGroup | Barrier, count: int, seconds: float = 20.0
) -> list[int]:
    """Block until so many ranks have arrived at the barrier that this rank would enter next.

    Returns:
        These ranks, as the roll of the barrier names them.

    Raises:
        TimeoutError: they have not come in time.
    """
    barrier = waited_for if isinstance(waited_for, Barrier) else waited_for._barrier
    # a peek, which is a compare_set, would end the waits at a key
    store, keys = barrier.store.store, barrier.keys
    end = time.monotonic() + seconds
    while not store.check([keys.counter]) or int(store.get(keys.counter)) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"fewer than {count} ranks have arrived after {seconds:g} s")
        time.sleep(0.01)
    written = store.get(keys.roll)
    return sorted(Roll.parse(written, barrier.generation, barrier.seals, keys.roll).values)
