"""The server of a TCPStore in Python, one request at a time.

It gives the same answers and wakes the same clients as torch's libuv server, even in odd cases:

* A wait counts its missing keys. Each request that touches such a key lowers the count by 1, even a
  ``compare_set`` that changes nothing. The wait ends at 0, even if the key is gone again.
* ``barrier(key, n)`` adds 1 to the key, and waits for a request that touches it, whatever number
  that request leaves there. But a ``barrier`` that has to wait wakes no client.
* ``queue_push`` wakes one client, and leaves it on the list of clients that wait for that key. If
  the client waits for another key at the next push, the push ends that wait.

Tests run random programs on this and on the real store, and compare every answer.
"""

import re
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

Client = tuple[int, int]
"""A connection: its rank, and a number, because a rank may have several."""

Answer = bytes | int | bool | None | tuple[bytes, ...] | tuple[str, ...]

_INTEGER = re.compile(rb"\s*([+-]?\d+)")


class Request(NamedTuple):
    """A request of one client to the server.

    Attributes:
        name: name of the method in torch's store.
        arguments: keys as str, values as bytes, in the order of that method.
        seconds: time that the client waits for the answer; None for ever.
        client: the connection.
    """

    name: str
    arguments: tuple[Any, ...]
    seconds: float | None = None
    client: Client = (0, 0)

    @property
    def waits(self) -> bool:
        """Whether its answer may depend on later requests. Other requests are answered at once."""
        return self.name in ("wait", "barrier")


class StillWaiting(Exception):  # noqa: N818  # no error: the answer comes later
    """The server has noted the request, and answers it when another client wakes this one."""


class ConnectionClosed(Exception):  # noqa: N818
    """The server has closed the connection to the client instead of answering."""


class Server:
    """A server's memory.

    Attributes:
        values: values by key.
        queues: queues by key; none is empty.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.queues: dict[str, tuple[bytes, ...]] = {}
        self._waiting: dict[str, tuple[Client, ...]] = {}  # by key; some clients may wait no more
        self._missing: dict[Client, int] = {}  # number of keys that a client misses
        self._woken: list[Client] = []

    def copy(self) -> "Server":
        """Another server with the same memory."""
        other = Server()
        other.values = dict(self.values)
        other.queues = dict(self.queues)
        other._waiting = dict(self._waiting)
        other._missing = dict(self._missing)
        return other

    def memory(self) -> Hashable:
        """The whole state: two servers with the same memory give the same answers for ever."""
        parts = (self.values, self.queues, self._waiting, self._missing)
        return tuple(frozenset(part.items()) for part in parts)

    def waits(self, rank: int) -> bool:
        """Whether a request of this rank waits for its answer."""
        return any(client[0] == rank for client in self._missing)

    def serve(self, request: Request) -> tuple[Answer, list[Client]]:
        """Serve a request. Returns the answer, and the clients whose waits have ended.

        Raises:
            StillWaiting: a later request ends the wait, and returns this client.
            ConnectionClosed: the value under the key is no integer, so nothing can be added.
        """
        self._woken = []
        method = getattr(self, f"_{request.name}")
        arguments = (request.client, *request.arguments) if request.waits else request.arguments
        answer: Answer = method(*arguments)
        return answer, self._woken

    def cancel(self, client: Client) -> None:
        """Forget that a client waits: its time is up, or its connection is closed."""
        self._missing.pop(client, None)
        for key, clients in list(self._waiting.items()):
            self._put_waiting(key, (other for other in clients if other != client))

    def disconnect(self, rank: int) -> None:
        """Forget the connections of a rank that has died."""
        waiting = {client for clients in self._waiting.values() for client in clients}
        for client in waiting | set(self._missing):
            if client[0] == rank:
                self.cancel(client)

    def _wake(self, key: str) -> None:
        for client in self._waiting.pop(key, ()):
            self._count_down(client)

    def _count_down(self, client: Client) -> bool:
        """Lower the number of keys that a client misses. Return whether its wait has ended."""
        if client not in self._missing:
            return False
        self._missing[client] -= 1
        if self._missing[client] > 0:
            return False
        del self._missing[client]
        self._woken.append(client)
        return True

    def _put_waiting(self, key: str, clients: Iterable[Client]) -> None:
        self._waiting[key] = tuple(clients)
        if not self._waiting[key]:
            del self._waiting[key]

    def _set(self, key: str, value: bytes) -> None:
        self.values[key] = value
        self._wake(key)

    def _multi_set(self, keys: tuple[str, ...], values: tuple[bytes, ...]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._set(key, value)

    def _append(self, key: str, value: bytes) -> None:
        self._set(key, self.values.get(key, b"") + value)

    def _add(self, key: str, amount: int) -> int:
        total = _signed(self._integer(key) + amount)
        self._set(key, str(total).encode())
        return total

    def _integer(self, key: str) -> int:
        """The integer at the beginning of a value; 0 if there is no value."""
        found = _INTEGER.match(self.values.get(key, b"0"))
        if found is None or int(found[1]) != _signed(int(found[1])):
            raise ConnectionClosed
        return int(found[1])

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        present = self.values.get(key)
        if present == expected or (present is None and not expected):
            self.values[key] = desired
        self._wake(key)
        # for a missing key, torch's server returns ``expected``
        return self.values.get(key, expected)

    def _get(self, key: str) -> bytes:
        return self.values.get(key, b"")

    def _multi_get(self, keys: tuple[str, ...]) -> tuple[bytes, ...]:
        return tuple(self._get(key) for key in keys)

    def _check(self, keys: tuple[str, ...]) -> bool:
        return all(key in self.values or key in self.queues for key in keys)

    def _delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    def _num_keys(self) -> int:
        return len(self.values)

    def _list_keys(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def _wait(self, client: Client, keys: tuple[str, ...]) -> None:
        if self._check(keys):
            return
        missing = [key for key in keys if key not in self.values]
        for key in missing:
            self._put_waiting(key, (*self._waiting.get(key, ()), client))
        self._missing[client] = len(missing)
        raise StillWaiting

    def _barrier(self, client: Client, key: str, world_size: int) -> None:
        count = _signed(self._integer(key) + 1)
        self.values[key] = str(count).encode()
        if count >= world_size:
            self._wake(key)
            return
        self._put_waiting(key, (*self._waiting.get(key, ()), client))
        self._missing[client] = 1
        raise StillWaiting

    def _queue_push(self, key: str, value: bytes) -> None:
        self.queues[key] = (*self.queues.get(key, ()), value)
        for client in self._waiting.get(key, ()):
            if self._count_down(client):
                break

    def _queue_pop(self, key: str) -> tuple[bytes, ...]:
        """The first value, or none."""
        first, *rest = self.queues.pop(key, ()) or (None,)
        if rest:
            self.queues[key] = tuple(rest)
        return () if first is None else (first,)

    def _queue_len(self, key: str) -> int:
        return len(self.queues.get(key, ()))


def _signed(number: int) -> int:
    """The number as a C++ int64_t."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
