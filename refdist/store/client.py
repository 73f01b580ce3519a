"""A store as refdist asks it: every request ends in time, and the store can be let go.

The simple way is to call the store itself. It fails in two ways.

* While the process that hosts the store is stopped, a request waits for it to go on, and torch can
  neither interrupt nor limit that. A thread that closes the connection then has to know when; it
  does not exist in a forked child, and on rank 0 it does not help. The kernel does better: it ends
  a ``recv`` or ``send`` of the store's socket when the limit of the socket is over, and torch
  raises DistNetworkError. An answer that comes later would be taken for that of the next request,
  so no request follows: the store is lost.
* An error keeps the variables of all functions that it has left, and a notebook keeps the last
  error. A store among them would go on to serve, and hold its port. So what asks a store has a
  client in its variables, and ``close`` takes the store out of that. The group, whose attribute
  ``store`` is the user's, drops it at the same time.
"""

import re
import socket
import struct
import warnings
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, Store, TCPStore

from refdist.deadline import Deadline
from refdist.torch_versions import has_store_barrier, tcp_store_of

ANSWER_SECONDS = 1.0
"""How long a store may take to answer after a deadline, before its host counts as stopped."""

_ROUGHLY = 0.25  # seconds by which a limit may be off; each new one is a call of the kernel


class StoreClient:
    """A store that can be let go, with the requests that refdist makes.

    The requests share a connection, on which they take effect in the order in which they are made.
    A store that is no TCPStore has none, and no limit. Every request raises DistNetworkError when
    the store is lost or was let go.

    Attributes:
        deadline: of the present call; None where a request may take ``ANSWER_SECONDS``.
        lost: why the store cannot be asked any more; empty as long as it can.
        timed_out: whether that is because it did not answer.
    """

    def __init__(self, store: Store, deadline: Deadline | None = None) -> None:
        self.deadline = deadline
        self.lost = ""
        self.timed_out = False
        self._store: Any = store
        self._descriptor = _descriptor_of(store)
        self._limit = 0.0

    @property
    def store(self) -> Store:
        """The store itself. Whoever keeps it keeps it open."""
        if self._store is None:
            raise DistNetworkError(self.lost)
        store: Store = self._store
        return store

    def close(self) -> None:
        """Let the store go. Where it is served, it ends, unless someone else keeps it."""
        self.lost = self.lost or "this rank has closed its group"
        self._store = self._descriptor = None

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key, and return the sum."""
        return int(self._ask("add", key, amount))

    def append(self, key: str, value: bytes) -> None:
        """Append to the value of a key. No answer."""
        self._ask("append", key, value)

    def set(self, key: str, value: Any) -> None:
        """Write a value, text or bytes. No answer."""
        self._ask("set", key, value)

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        """Write several values. No answer."""
        self._ask("multi_set", keys, values)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        """Write a value if the present one is as expected; returns what is there then."""
        value: bytes = self._ask("compare_set", key, expected, desired)
        return value

    def delete_key(self, key: str) -> bool:
        """Delete a key. Whether it was there."""
        return bool(self._ask("delete_key", key))

    def check(self, keys: list[str]) -> bool:
        """Whether every key is there."""
        return bool(self._ask("check", keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until every key is there; DistStoreError after ``timeout``."""
        self._ask("wait", keys, timeout, waits=timeout.total_seconds())

    def barrier(self, key: str, world_size: int, timeout: timedelta) -> None:
        """Add one to a key and wait until it is at least ``world_size``; as ``wait``."""
        self._ask("barrier", key, world_size, timeout, waits=timeout.total_seconds())

    def _ask(self, request: str, *arguments: Any, waits: float = 0.0) -> Any:
        """Make a request, of which the store may answer only after ``waits`` seconds."""
        if self.lost:
            raise DistNetworkError(self.lost)
        if self._descriptor is not None:
            self._limit_to(waits)
        try:
            # no variable holds the store, or an error would keep it
            return getattr(self._store, request)(*arguments)
        except DistNetworkError as error:
            self.timed_out = "Timeout" in str(error)
            self.lost = str(error).splitlines()[0]
            raise

    def _limit_to(self, waits: float) -> None:
        """Let the kernel end a request ``ANSWER_SECONDS`` after the deadline, or its wait."""
        left = 0.0 if self.deadline is None else self.deadline.remaining() - waits
        limit = max(0.0, left) + ANSWER_SECONDS
        if abs(limit - self._limit) > _ROUGHLY:
            assert self._descriptor is not None
            with socket.socket(fileno=socket.dup(self._descriptor)) as connection:
                limit_socket(connection, limit)
            self._limit = limit


def has_barrier(store: StoreClient | Store) -> bool:
    """Whether a store, or that of a client, has ``Store.barrier``: ``has_store_barrier``."""
    return has_store_barrier(store.store if isinstance(store, StoreClient) else store)


def limit_socket(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end each ``send`` and ``recv`` of a socket after so many seconds.

    A listening socket hands its limit on to the connections that it accepts.
    """
    whole = int(seconds)
    limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _descriptor_of(store: Store) -> int | None:
    """The socket with which a TCPStore speaks to its server; None for another store.

    All groups on prefixes of one store share it, and are lost together. torch shows it in the text
    of the store alone (seen on 2.11 and 2.13). Where it does not, a warning says so.
    """
    try:
        server = tcp_store_of(store)
    except ValueError:
        return None
    found = re.search(r"client=.*?fd=(\d+)", repr(server))
    if found is None and type(server) is TCPStore:
        warnings.warn(
            f"refdist finds no socket in {server!r}: calls may hang while rank 0 is stopped",
            RuntimeWarning,
            stacklevel=3,
        )
    return None if found is None else int(found[1])
