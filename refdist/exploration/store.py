"""The store that a rank's code gets. It asks the explorer instead of a server."""

# ruff: noqa: D102  # torch documents these methods

from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import DistStoreError, TCPStore

from refdist.exploration.server import Client, Request
from refdist.exploration.session import Session

STORE_SECONDS = 300.0
"""The timeout of a wait that has no other. It counts as waiting for ever."""

# torch 2.11 to 2.15
_QUEUE_EMPTY: type[Exception] = getattr(torch.distributed, "QueueEmptyError", DistStoreError)


class SimulatedStore:
    """The store of a rank. It passes for a TCPStore, and asks the explorer instead."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._client: Client = (session.rank, session.connections)
        session.connections += 1
        self._seconds = STORE_SECONDS

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return TCPStore

    libuvBackend = True  # noqa: N815  # torch's name

    @property
    def timeout(self) -> timedelta:
        """The timeout of a wait that names none."""
        return timedelta(seconds=self._seconds)

    def set_timeout(self, timeout: timedelta) -> None:
        """Change the timeout of this connection."""
        self._seconds = timeout.total_seconds()

    def clone(self) -> "SimulatedStore":
        """Another connection of the same rank."""
        return SimulatedStore(self._session)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._session.ask(Request(name, arguments, None, self._client))

    def _ask_and_wait(self, name: str, timeout: timedelta | None, *arguments: Any) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        limit = seconds if seconds < STORE_SECONDS else None
        self._session.ask(Request(name, arguments, limit, self._client))

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _bytes(value))

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        self._ask("multi_set", tuple(keys), tuple(map(_bytes, values)))

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _bytes(value))

    def add(self, key: str, amount: int) -> int:
        total: int = self._ask("add", key, amount)
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        value: bytes = self._ask("compare_set", key, _bytes(expected), _bytes(desired))
        return value

    def check(self, keys: list[str]) -> bool:
        found: bool = self._ask("check", tuple(keys))
        return found

    def delete_key(self, key: str) -> bool:
        found: bool = self._ask("delete_key", key)
        return found

    def num_keys(self) -> int:
        number: int = self._ask("num_keys")
        return number

    def list_keys(self) -> list[str]:
        return list(self._ask("list_keys"))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask_and_wait("wait", timeout, tuple(keys))

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._ask("get", key)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return list(self._ask("multi_get", tuple(keys)))

    def barrier(self, key: str, world_size: int, timeout: timedelta | None = None) -> None:
        self._ask_and_wait("barrier", timeout, key, world_size)

    def queue_push(self, key: str, value: str | bytes) -> None:
        self._ask("queue_push", key, _bytes(value))

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        if block:
            self.wait([key])
        found: tuple[bytes, ...] = self._ask("queue_pop", key)
        if not found:
            raise _QUEUE_EMPTY("queue is empty")
        return found[0]

    def queue_len(self, key: str) -> int:
        length: int = self._ask("queue_len", key)
        return length


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
