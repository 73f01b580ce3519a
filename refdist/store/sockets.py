"""Limits in the kernel, so that a store that does not answer holds no rank for ever.

While the process that hosts the store is stopped, a request waits for it to go on, and torch can
neither interrupt nor limit that. The simple way, a thread that closes the connection, fails: it has
to know when, it does not exist in a forked child, and on rank 0 it does not help. The kernel does
better. It ends a ``recv`` or ``send`` of the store's socket when the limit of the socket is over,
and torch raises DistNetworkError. A later answer would be taken for that of the next request, so no
request follows: the store is lost.
"""

import os
import re
import socket
import struct
import warnings
from contextlib import suppress
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch.distributed import Store, TCPStore

from refdist.torch_versions import tcp_store_of


class Limit:
    """The limit of one socket, which all clients of groups on prefixes of one store share.

    Attributes:
        seconds: besides the time for an answer.
        clients: that share it, and lose their store together.
    """

    def __init__(self) -> None:
        self.seconds = -1.0
        self.clients = WeakSet[Any]()


_limits: WeakValueDictionary[int, Limit] = WeakValueDictionary()  # by inode


def limit_of(connection: socket.socket | None) -> Limit:
    """The limit of a socket; one of its own for none."""
    if connection is None:
        return Limit()
    return _limits.setdefault(os.fstat(connection.fileno()).st_ino, Limit())


def limit_socket(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end each ``send`` and ``recv`` of a socket after so many seconds.

    A listening socket hands its limit on to the connections that it accepts.
    """
    whole = int(seconds)
    limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def connection_of(store: Store) -> socket.socket | None:
    """A duplicate of the socket between a TCPStore and its server; None for another store.

    All groups on prefixes of one store share it, and are lost together. torch shows it in the text
    of the store alone (seen on 2.11 and 2.13). Where it does not, a warning says so.
    """
    try:
        server = tcp_store_of(store)
    except ValueError:
        return None
    found = re.search(r"client=.*?fd=(\d+)", repr(server))
    if found is not None:
        with suppress(OSError):
            return socket.socket(fileno=socket.dup(int(found[1])))
    if type(server) is TCPStore:
        warnings.warn(
            f"refdist finds no socket in {server!r}: calls may hang while rank 0 is stopped",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


def numeric(address: Any) -> str:
    """The host of a socket address; of a local one of a link, with the link."""
    host, scope = str(address[0]), address[3] if len(address) == 4 else 0
    return f"{host}%{scope}" if scope and "%" not in host else host
