"""How ranks meet in vLLM's protocol: the server of torch's store waits until all have connected.

It counts those that connect and name a world size, under a key that only torch can read. Nothing
else is written, so a rank other than 0 goes on as soon as rank 0 is there, and no rank learns which
ones are missing.
"""

import re
import socket
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import DistError, TCPStore

from refdist.deadline import Deadline
from refdist.errors import GroupCreationError, StoreConnectionError
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import connect, serve

_SOON_SECONDS = 0.2


def open_store(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    deadline: Deadline,
    listener: socket.socket | None,
) -> StoreClient:
    """Serve the store, and wait until all ranks have connected; or connect to it.

    Raises:
        GroupCreationError: on rank 0, not all ranks came in time, for which torch takes a second
            longer. On another, rank 0 speaks refdist's own protocol.
        StoreConnectionError: no store answered in time.
        CancelledWaitError: the deadline was cancelled.
    """
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=deadline.allowed),
        "world_size": world_size,
        "wait_for_workers": True,
    }
    where = f"{host}:{port or (listener and listener.getsockname()[1])}"
    if rank != 0:
        client = StoreClient(connect(host, port, deadline, **options))
        client.limit(deadline.remaining())
        # a rank 0 of refdist writes this soon after it has opened the store
        if client.wait([keys.member(0)], Deadline(_SOON_SECONDS)):
            client.close()
            raise GroupCreationError(
                f"rank 0 on {where} speaks refdist's own protocol: leave out wire='vllm' here, or "
                f"pass it on all ranks"
            )
        return client
    assert listener is not None
    try:
        # vLLM's ranks send any object as one value, and the libuv server takes 8 MiB at most
        unblock = partial(_count_as_rank, listener, world_size)
        return StoreClient(
            serve(host, listener, deadline=deadline, unblock=unblock, use_libuv=False, **options)
        )
    except StoreConnectionError as error:
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        if came is None:
            raise
        raise GroupCreationError(
            f"{came[1]} of {world_size} ranks came to {where} within {deadline.allowed:g} s; "
            f"vLLM's protocol does not tell which are missing"
        ) from error


def _count_as_rank(listener: socket.socket, world_size: int) -> None:
    """Let a server count one more rank, until it has all, ends, and its port is free again."""
    address, port = listener.getsockname()[:2]
    with suppress(DistError):
        TCPStore(address, port, world_size, False, timeout=timedelta(seconds=1))
