"""A process's connection to a store, which groups share.

A group could end its store when it is closed. But those that were split off it, and the one that
follows it after a death, go on over the same store. So the store stays until the last of them is
closed, in any order, and only then does this rank say to the others that it leaves.
"""

import socket
import weakref
from typing import Any

from refdist.errors import MessageError
from refdist.store.client import StoreClient
from refdist.store.listening import close_quietly, reserve
from refdist.store.sockets import numeric

Address = tuple[str, int]

_hosts: set["Connection"] = set()  # whose stores others use until this process ends


def address_of(told: Any) -> Address | None:
    """The address that another process has told, or None.

    Raises:
        MessageError: it is none.
    """
    match told:
        case None:
            return None
        case [str(host), int(port)] if 0 < port < 65536:
            return host, port
    raise MessageError(f"{str(told)[:40]!r} is no address")


class Connection:
    """The connection that the groups of this process on one store share.

    Attributes:
        client: of the store.
        root: the barrier of the group whose ranks say when they leave the store: the first, and
            then each that follows it; never that of a part.
        open: the groups that have not ended.
        listener: the socket that the store listens on, if it is served here.
        reserved: a socket for a store that may have to be opened here.
        answered: a number of asks; the first so many have an answer.
        release: closes the sockets of this connection.
    """

    def __init__(self, client: StoreClient) -> None:
        self.client = client
        self.root: Any = None
        self.open = weakref.WeakSet[Any]()
        self.listener: socket.socket | None = None
        self.reserved: socket.socket | None = None
        self.answered = 0
        self._sockets: list[socket.socket] = []
        self.release = weakref.finalize(self, _close_all, self._sockets)

    def serves(self, listener: socket.socket | None, own: bool) -> None:
        """The store listens on this socket, which is to be closed with it if it is its ``own``."""
        self.listener = listener
        if listener is not None and own:
            self._sockets.append(listener)

    def reserve(self) -> Address | None:
        """The address of a socket that is bound where others can reach this process.

        It does not listen yet: it is kept for a store that this process may have to open. None
        where torch does not tell its own connection to the store.
        """
        host = self.client.local_host
        if self.reserved is None and host is not None:
            self.reserved = reserve(host)
            self._sockets.append(self.reserved)
        if self.reserved is None:
            return None
        address = self.reserved.getsockname()
        return numeric(address), int(address[1])

    def take_over(self, other: "Connection", serves: bool) -> None:
        """Get the reserved socket of another connection, on which the store ``serves`` or not."""
        reserved, other.reserved = other.reserved, None
        if reserved is not None:
            other._sockets.remove(reserved)
            self._sockets.append(reserved)
        self.listener, self.reserved = (reserved, None) if serves else (None, reserved)

    def stay(self) -> None:
        """Serve the others also without a group of this process: nothing tells when they end."""
        if self.listener is not None:
            _hosts.add(self)

    def end(self) -> None:
        """End every group, and with them the store, if it is served here."""
        for group in list(self.open):
            group.end()

    def drop(self, group: Any, client: StoreClient) -> None:
        """A group has ended. The last one lets the store go."""
        self.open.discard(group)
        if not self.open:
            self.root.store.close()
            self.client.close()
            self.release()
        if client not in (self.client, self.root.store):
            client.close()


def _close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        close_quietly(one)
