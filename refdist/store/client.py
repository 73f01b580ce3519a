"""A store as refdist asks it: each request in one place, which waits in slices and ends in time.

The simple way is to call the store itself. But an error keeps the variables of all functions that
it has left, and a notebook keeps the last error. A store among them would go on to serve, and hold
its port. So every function has the client in its variables, and ``close`` takes the store out of
that. The group, whose attribute ``store`` is the user's, drops it at the same time.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

from refdist.deadline import Deadline
from refdist.store.sockets import connection_of, limit_of, limit_socket, numeric
from refdist.torch_versions import ERROR, WARNING, has_store_barrier, lists_keys, log_level

ANSWER_SECONDS = 1.0
"""How long a store may take to answer after a deadline, before its host counts as stopped."""

_ROUGHLY = 0.25  # seconds by which a limit may be off; each new one is a call of the kernel
_NEVER_WRITTEN, _NEVER_WRITTEN_EITHER = b"\0", b"\0\0"


class StoreClient:
    """A store that can be let go, with the requests that refdist makes.

    The requests share a connection, on which they take effect in the order in which they are made.
    A store that is no TCPStore has none, and no limit. Every request raises DistNetworkError when
    the store is lost or was let go.

    Args:
        store: any store of torch.
        prefix: goes before each key. A PrefixStore does the same, but is no TCPStore, so it has no
            ``Store.barrier`` in one request.
        of: another client of the store, which has the connection.

    Attributes:
        prefix: goes before each key.
        lost: why the store cannot be asked any more; empty as long as it can.
        timed_out: whether that is because it did not answer.
        shared: the limit of its socket, which other clients may have too.
    """

    def __init__(self, store: Store, prefix: str = "", of: "StoreClient | None" = None) -> None:
        self.prefix = prefix
        self.lost = ""
        self.timed_out = False
        self._store: Any = store
        self._is_own = of is None
        if of is None:
            self._connection = connection_of(store)
            self.shared = limit_of(self._connection)
            self.limit(0.0)
        else:
            self._connection, self.shared = of._connection, of.shared
        self.shared.clients.add(self)

    @property
    def store(self) -> Store:
        """The store itself. A caller that keeps it keeps it open."""
        store: Store = self._store
        if isinstance(store, _Lost):
            raise DistNetworkError(self.lost)
        return store

    @property
    def local_host(self) -> str | None:
        """The numeric address of this end of the connection, as far as torch tells it."""
        if self._connection is None:
            return None
        host = numeric(self._connection.getsockname())
        return host.removeprefix("::ffff:")  # of an IPv4 address, as torch writes it

    def at(self, prefix: str) -> "StoreClient":
        """A client of the same store and connection, with another prefix."""
        return StoreClient(self.store, prefix, self)

    @property
    def has_barrier(self) -> bool:
        """Whether the store has ``Store.barrier``: ``torch_versions.has_store_barrier``."""
        return has_store_barrier(self._store)

    def close(self) -> None:
        """Let the store go. If it is served here, it ends, unless something else refers to it."""
        self.lost = self.lost or "this rank has closed its group"
        self._store = _Lost(self.lost)
        if self._connection is not None and self._is_own:
            self._connection.close()
        self._connection = None

    def limit(self, seconds: float) -> None:
        """Let the kernel end each request ``ANSWER_SECONDS`` after so many seconds."""
        if self._connection is not None and abs(seconds - self.shared.seconds) > _ROUGHLY:
            limit_socket(self._connection, seconds + ANSWER_SECONDS)
            self.shared.seconds = seconds

    # Requests. No variable holds the store, or an error would keep it. The first three wait for no
    # answer; the others take one round trip.

    def append(self, key: str, value: bytes) -> None:
        """Append to the value of a key."""
        try:
            self._store.append(self.prefix + key, value)
        except DistNetworkError as error:
            self._lose(error)
            raise

    def set(self, key: str, value: bytes | str) -> None:
        """Write a value."""
        try:
            self._store.set(self.prefix + key, value)
        except DistNetworkError as error:
            self._lose(error)
            raise

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        """Write several values."""
        try:
            # before Python 3.12, a comprehension is one more call for a reader to follow
            self._store.multi_set(list(map(self.prefix.__add__, keys)), values)
        except DistNetworkError as error:
            self._lose(error)
            raise

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key, and return the sum."""
        try:
            return int(self._store.add(self.prefix + key, amount))
        except DistNetworkError as error:
            self._lose(error)
            raise

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Write a value if the present one is as expected. Returns the value that is there then."""
        try:
            value: bytes = self._store.compare_set(self.prefix + key, expected, desired)
            return value
        except DistNetworkError as error:
            self._lose(error)
            raise

    def delete_key(self, key: str) -> bool:
        """Delete a key. Whether it was there."""
        try:
            return bool(self._store.delete_key(self.prefix + key))
        except DistNetworkError as error:
            self._lose(error)
            raise

    def check(self, keys: Sequence[str]) -> bool:
        """Whether every key is there."""
        try:
            return bool(self._store.check([self.prefix + key for key in keys]))
        except DistNetworkError as error:
            self._lose(error)
            raise

    def num_keys(self) -> int:
        """How many keys there are, also those that torch hides."""
        try:
            return int(self._store.num_keys())
        except DistNetworkError as error:
            self._lose(error)
            raise

    def delete_all(self) -> None:
        """Delete every key with this client's prefix, where torch can list them."""
        if not lists_keys():
            return
        try:
            for key in self._store.list_keys():
                if key.startswith(self.prefix):
                    self._store.delete_key(key)
        except DistNetworkError as error:
            self._lose(error)
            raise

    def peek(self, key: str) -> bytes | None:
        """The value of a key, for which no rank waits, or None where it does not exist.

        ``get`` would wait for the key. ``compare_set`` with an expected value that nobody writes
        changes nothing. It answers with the present value, or with the expected one if there is
        none.
        """
        value = self.compare_set(key, _NEVER_WRITTEN, _NEVER_WRITTEN)
        return None if value == _NEVER_WRITTEN else value

    def decide(self, key: str, proposal: bytes) -> bytes:
        """Write ``proposal`` unless the key has a value. Returns the value that it has then."""
        value = self.compare_set(key, b"", proposal)
        if value == proposal:
            # the legacy server of TCPStore ends waits for a key on set, and not on compare_set
            self.set(key, proposal)
        return value

    # Requests that wait, for a slice at a time. Each raises CancelledWaitError within a slice of
    # the deadline's being cancelled.

    def wait(self, keys: Sequence[str], deadline: Deadline) -> bool:
        """Wait until every key is there. False when the deadline came first.

        A store that is slow to answer may let the last slice run out although the keys are there,
        so they are looked up once more then.
        """
        return self.in_slices(deadline, "wait", list(keys)) or self.check(keys)

    def wait_for_value(self, key: str, deadline: Deadline, once: bool = False) -> bytes | None:
        """Wait until a key has a value, and return it; None when the deadline came first.

        With ``once``, None also when a slice has passed.

        One request more than a wait. The libuv server of TCPStore also ends a wait when another
        client compares the key before it exists. Then this waits again, and looks with ``check``
        from then on: if it compared the key itself, such ranks would wake each other without end.
        """
        absent = False  # whether a wait has ended although the key was not there
        while True:
            in_time = self.in_slices(deadline, "wait", [key], once=once)
            if (absent or not in_time) and not self.check([key]):
                if not in_time:
                    return None
                continue
            never_written = _NEVER_WRITTEN_EITHER if absent else _NEVER_WRITTEN
            value = self.compare_set(key, never_written, never_written)
            if value != never_written:
                return value
            absent = True

    def barrier(self, key: str, count: int, deadline: Deadline) -> bool:
        """Add one to a key and wait until it is at least ``count``, or the slice is over.

        When the number reaches the count of one client, all that wait at the key go on, whatever
        count they gave; ``set`` does the same.
        """
        try:
            self._store.barrier(self.prefix + key, count, deadline.slice())
            return True
        except DistStoreError:
            return False
        except DistNetworkError as error:
            self._lose(error)
            raise

    def in_slices(
        self,
        deadline: Deadline,
        request: str,
        key: str | list[str],
        *arguments: Any,
        once: bool = False,
    ) -> bool:
        """Repeat ``wait`` or ``barrier`` until it succeeds. False when the deadline came first."""
        prefix = self.prefix
        named = prefix + key if isinstance(key, str) else [prefix + each for each in key]
        while True:
            try:
                getattr(self._store, request)(named, *arguments, deadline.slice())
                return True
            except DistStoreError:
                if deadline.after_slice is not None:
                    deadline.after_slice()
                left = deadline.remaining()
                self.limit(left)
                if once or left == 0:
                    return False
            except DistNetworkError as error:
                self._lose(error)
                raise

    def _lose(self, error: DistNetworkError) -> None:
        """No client of this connection makes a request from now on.

        An answer that comes late would be taken for that of the next request, whoever makes it.
        """
        for client in list(self.shared.clients):
            if not client.lost:
                client.timed_out = "Timeout" in str(error)
                client.lost = str(error).splitlines()[0]
            client._store = _Lost(client.lost)


class _Lost:
    """Stands in for a store that is lost or was let go: each request says so."""

    _reason = "a store cannot be copied"  # of an object that pickle makes

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, request: str) -> Any:
        raise DistNetworkError(self._reason)


class quiet:  # noqa: N801  # used as a function is
    """Keep torch's C++ code from writing warnings to stderr for what is expected here.

    A wait that times out warns twice, and a wait in slices times out once a slice. A connection
    attempt that fails warns with a stack trace, and is tried again. Only the default level,
    warnings, is raised, for as long as some thread is in here; a level that the user has chosen
    stays.
    """

    _lock = threading.Lock()
    _threads = 0  # that are in here because the level was at warnings

    def __enter__(self) -> None:
        level = log_level()
        with quiet._lock:
            self._raised = level is not None and (quiet._threads > 0 or level.value == WARNING)
            if level is not None and self._raised:
                quiet._threads += 1
                level.value = ERROR

    def __exit__(self, *error: object) -> None:
        level = log_level()
        with quiet._lock:
            if level is not None and self._raised and quiet._threads > 0:
                quiet._threads -= 1
                if quiet._threads == 0:
                    level.value = WARNING


def _be_loud() -> None:
    """A forked child has none of the other threads: none of them is in ``quiet``, or leaves it."""
    quiet._lock = threading.Lock()  # one of them may have held it
    level = log_level() if quiet._threads else None
    if level is not None:
        level.value = WARNING
    quiet._threads = 0


os.register_at_fork(after_in_child=_be_loud)
