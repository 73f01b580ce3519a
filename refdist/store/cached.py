"""One client of a store for all callers in a process."""

import os
import socket

from torch.distributed import TCPStore

from refdist.store.listening import create_tcp_store
from refdist.store.sockets import connection_of

_clients: dict[tuple[str, int, int], TCPStore] = {}  # by host, port and process


def get_cached_tcp_store_client(host: str, port: int) -> TCPStore:
    """A client of the store on ``host`` and ``port``: the same one for every caller in a process.

    The first call connects, and blocks until the store answers, at most 300 s. Later calls return
    the same object. A call connects anew if the store has closed the connection, as it does when
    its process ends; and in a forked child. A host that is given by another name counts as another.

    The callers share one connection: while a request of one thread waits for a key, the requests
    of the others wait too, and the ``timeout`` of the client is that of all.

    Args:
        host: name or address of the host of the store, as for ``create_tcp_store``.
        port: 1 to 65535.

    Raises:
        ValueError: ``host`` or ``port`` is out of its range.
        OSError: ``host`` does not resolve.
        StoreConnectionError: no store answered in time.

    Source: ``vllm.distributed.utils`` of vLLM 0.19 to 0.33.
    """
    # a child that used its parent's connection would read the answers of its parent
    place = host, port, os.getpid()
    if place in _clients and _is_closed(_clients[place]):
        _clients.pop(place, None)
    return _clients.get(place) or _clients.setdefault(place, create_tcp_store(host, port))


def _is_closed(client: TCPStore) -> bool:
    """Whether the store has closed the connection of a client. Sends nothing, and never blocks."""
    connection = connection_of(client)
    if connection is None:
        return False
    with connection:
        try:
            return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
