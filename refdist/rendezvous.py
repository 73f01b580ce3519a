"""How ranks meet: rank 0 opens a store, everyone joins it, and a barrier says who came."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore

from refdist import keys
from refdist.barrier import Barrier
from refdist.checks import check_rank
from refdist.compat import quiet
from refdist.errors import (
    BarrierError,
    GroupCreationError,
    StoreConnectionError,
    letting_go,
    name_ranks,
)
from refdist.store import close_quietly, create_tcp_store, listen
from refdist.waiting import Deadline, decide, peek, wait_for_keys

_GONE = b"gone"
_GRACE_SECONDS = 1.0
_RETRY_SECONDS = 0.05


class _LeftoverStoreError(Exception):
    """The store belongs to a group that is ending; that of the new group is still to come."""


@contextmanager
def listening(
    host: str, port: int, rank: int, listen_socket: socket.socket | None
) -> Iterator[socket.socket | None]:
    """The socket that rank 0 listens on. If the body fails, its store ends and frees the port."""
    own_socket = listen(host, port) if rank == 0 and listen_socket is None else None
    try:
        with letting_go():
            yield own_socket or (listen_socket if rank == 0 else None)
    except BaseException:
        close_quietly(own_socket)
        raise


def meet(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: float,
    listener: socket.socket | None,
) -> tuple[TCPStore, Barrier]:
    """Open the store on rank 0, connect to it on the others, and wait until all ranks have.

    Returns:
        The store, and the barriers of the group, the first of them passed.

    Raises:
        ValueError: an argument is out of its range, the rank is taken, or rank 0 was given
            another world size.
        OSError: the host does not resolve.
        GroupCreationError: a rank did not come within ``timeout`` seconds.
        StoreConnectionError: on another rank than 0, when rank 0 did not come in time.
    """
    check_rank(rank, world_size)
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")
    deadline = Deadline(timeout)
    while True:
        # torch warns with a stack trace when it finds a store that is just ending
        with quiet():
            store = create_tcp_store(
                host,
                port,
                listener,
                is_master=rank == 0,
                timeout=timedelta(seconds=max(deadline.remaining(), 0.001)),
            )
            store.set_timeout(timedelta(seconds=timeout))
            try:
                return store, join(store, rank, world_size, deadline, f"{host}:{store.port}")
            except (StoreConnectionError, _LeftoverStoreError) as error:
                if rank == 0 or deadline.remaining() == 0:
                    raise GroupCreationError(f"rank {rank} was not let in: {error}") from error
        del store
        time.sleep(_RETRY_SECONDS)


def join(store: Store, rank: int, world_size: int, deadline: Deadline, where: str) -> Barrier:
    """Meet the other ranks on an open store. See ``meet``."""
    try:
        _register(store, rank, world_size, deadline, where)
        barrier = Barrier(store, rank, world_size)
        barrier.wait(deadline)
        return barrier
    except BarrierError as error:
        with suppress(DistError):
            _let_others_read(store, rank, world_size, error)
        if error.completed:
            text = f"all ranks came to {where}, but {error}"
            raise GroupCreationError(text, error.missing) from error
        came = world_size - len(error.missing)
        raise GroupCreationError(
            f"{came} of {world_size} ranks came to {where} within {deadline.allowed:g} s; "
            f"missing: {name_ranks(error.missing)} ({error})",
            error.missing,
        ) from error
    except DistError as error:
        raise StoreConnectionError(f"the store on {where} ended: {error}") from error


def leave(store: Store, rank: int, world_size: int, timeout: float) -> None:
    """Say that this rank uses the store no more; rank 0 waits until all others have said so.

    Raises:
        BarrierError: on rank 0, when a rank did not say so within ``timeout`` seconds. With a
            timeout of 0 it neither waits nor raises.
    """
    if rank != 0:
        # where the store is gone already, nobody waits for this
        with suppress(DistError):
            store.set(keys.member(rank), _GONE.decode())
            if store.add(keys.gone(), 1) == world_size - 1:
                store.set(keys.all_gone(), "")
        return
    deadline = Deadline(timeout)
    if world_size == 1 or timeout == 0 or wait_for_keys(store, [keys.all_gone()], deadline):
        return
    missing = [r for r in range(1, world_size) if peek(store, keys.member(r)) != _GONE]
    raise BarrierError(
        f"rank 0 closed the group, but waited in vain for {name_ranks(missing)} to close it: "
        f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
        phase="departure",
        missing=missing,
        elapsed=deadline.elapsed(),
        allowed=deadline.allowed,
        broken_by=0,
        completed=True,
    )


def _register(store: Store, rank: int, world_size: int, deadline: Deadline, where: str) -> None:
    """Take a rank that nobody else has, in a group of the size that rank 0 knows."""
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    me = process | {"world_size": world_size, "token": os.urandom(8).hex()}
    proposal = json.dumps(me).encode()
    # a rank with another world size must not take the place of the right one
    if rank != 0:
        _check_world_size(store, world_size, deadline, where)
    holder = decide(store, keys.member(rank), proposal)
    if holder == _GONE:
        raise _LeftoverStoreError(f"the group on {where} is ending")
    if holder != proposal:
        other = json.loads(holder)
        taken = f"is taken on {where} by process {other['pid']} of {other['host']}"
        if process.items() <= other.items():
            # this process was that rank before; a group of its own is no rival of the next one
            raise _LeftoverStoreError(f"rank={rank}: {taken}, which is this one")
        raise ValueError(f"rank={rank}: {taken}; each rank of a group is one process")


def _check_world_size(store: Store, world_size: int, deadline: Deadline, where: str) -> None:
    if not wait_for_keys(store, [keys.member(0)], deadline):
        raise GroupCreationError(
            f"rank 0 did not come to {where} within {deadline.allowed:g} s", missing=[0]
        )
    expected = json.loads(peek(store, keys.member(0)) or b"{}").get("world_size")
    if expected != world_size:
        raise ValueError(
            f"world_size={world_size}: rank 0 formed the group on {where} with {expected}"
        )


def _let_others_read(store: Store, rank: int, world_size: int, error: BarrierError) -> None:
    """Keep the store of rank 0 open until those who came have read why there is no group."""
    if rank != 0:
        store.set(keys.told(rank), "")
        return
    came = [keys.told(r) for r in range(1, world_size) if r not in error.missing]
    if came:
        wait_for_keys(store, came, Deadline(_GRACE_SECONDS))
