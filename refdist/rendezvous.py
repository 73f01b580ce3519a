"""How ranks meet: rank 0 opens a store, everyone joins it, and a barrier says who came."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError, Store, TCPStore

from refdist import keys
from refdist.barrier import Barrier
from refdist.calls import Calls
from refdist.checks import check_rank
from refdist.compat import has_store_barrier, quiet
from refdist.errors import (
    BarrierError,
    GroupCreationError,
    StoreConnectionError,
    letting_go,
    name_ranks,
)
from refdist.store import close_quietly, connect, listen, serve
from refdist.waiting import Deadline, decide, peek, wait_for_keys, wait_for_value

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
) -> tuple[TCPStore, Barrier, Calls]:
    """Open the store on rank 0, connect to it on the others, and wait until all ranks have.

    Returns:
        The store; the barriers of the group, the first of them passed; and its calls.

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
    calls = Calls()

    def attempt() -> tuple[TCPStore, Barrier]:
        return _meet(host, port, rank, world_size, deadline, listener, calls)

    return *calls.run("create", attempt, deadline), calls


def _meet(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    deadline: Deadline,
    listener: socket.socket | None,
    calls: Calls,
) -> tuple[TCPStore, Barrier]:
    timeout = timedelta(seconds=deadline.allowed)
    while True:
        # torch warns with a stack trace when it finds a store that is just ending
        with quiet():
            if rank == 0:
                assert listener is not None
                store = serve(host, listener, timeout, wait_for_workers=False)
            else:
                store = connect(host, port, deadline, timeout=timeout, wait_for_workers=False)
            calls.watch(store)
            try:
                where = f"{host}:{store.port}"
                return store, join(store, rank, world_size, deadline, where)
            except (StoreConnectionError, _LeftoverStoreError) as error:
                if deadline.given_up:
                    raise
                if rank == 0 or deadline.remaining() == 0:
                    raise GroupCreationError(f"rank {rank} was not let in: {error}") from error
        del store
        deadline.slice()
        time.sleep(_RETRY_SECONDS)


def join(store: Store, rank: int, world_size: int, deadline: Deadline, where: str) -> Barrier:
    """Meet the other ranks on an open store. See ``meet``."""
    try:
        _register(store, rank, world_size, deadline, where)
        barrier = Barrier(store, rank, world_size)
        barrier.wait(deadline, each_phase=False)
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


def leave(store: Store, rank: int, world_size: int, deadline: Deadline) -> None:
    """Say that this rank uses the store no more; rank 0 waits until all others have said so.

    Raises:
        BarrierError: on rank 0, when a rank did not say so in time. Where no time at all is
            allowed, it neither waits nor raises.
    """
    if rank != 0:
        # where the store is gone already, nobody waits for this
        with suppress(DistError), quiet():
            store.set(keys.member(rank), _GONE.decode())
            if store.add(keys.gone(), 1) == world_size - 1:
                store.set(keys.all_gone(), "")
        return
    if (
        world_size == 1
        or deadline.allowed == 0
        or wait_for_keys(store, [keys.all_gone()], deadline)
    ):
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
    me = process | {
        "world_size": world_size,
        "store_barrier": has_store_barrier(store),
        "torch": str(torch.__version__),
        "token": os.urandom(8).hex(),
    }
    proposal = json.dumps(me).encode()
    # a rank with another world size must not take the place of the right one
    if rank != 0:
        _check_rank_0(store, me, deadline, where)
    holder = decide(store, keys.member(rank), proposal)
    if holder == _GONE:
        raise _LeftoverStoreError(f"the group on {where} is ending")
    if holder != proposal:
        other = _read_member(holder, rank, where)
        taken = f"is taken on {where} by process {other.get('pid')} of {other.get('host')}"
        if process.items() <= other.items():
            # this process was that rank before; a group of its own is no rival of the next one
            raise _LeftoverStoreError(f"rank={rank}: {taken}, which is this one")
        raise ValueError(f"rank={rank}: {taken}; each rank of a group is one process")


def _check_rank_0(store: Store, me: dict[str, Any], deadline: Deadline, where: str) -> None:
    """Refuse to join a group whose rank 0 has another one in mind."""
    written = wait_for_value(store, keys.member(0), deadline)
    if written is None:
        raise GroupCreationError(
            f"rank 0 did not come to {where} within {deadline.allowed:g} s", missing=[0]
        )
    if written == _GONE:
        raise _LeftoverStoreError(f"the group on {where} is ending")
    rank_0 = _read_member(written, 0, where)
    world_size = me["world_size"]
    if rank_0.get("world_size") != world_size:
        raise ValueError(
            f"world_size={world_size}: rank 0 formed the group on {where} with "
            f"{rank_0.get('world_size')}"
        )
    if rank_0.get("store_barrier") != me["store_barrier"]:
        raise ValueError(
            f"torch {me['torch']}: rank 0 on {where} has torch {rank_0.get('torch')}, and only "
            f"one of them has Store.barrier; all ranks must have it, or none"
        )


def _read_member(written: bytes, rank: int, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(written))
    except (ValueError, TypeError) as error:
        raise GroupCreationError(
            f"rank {rank} on {where} is held by {written[:40]!r}, which no rank of refdist writes"
        ) from error


def _let_others_read(store: Store, rank: int, world_size: int, error: BarrierError) -> None:
    """Keep the store of rank 0 open until those who came have read why there is no group."""
    if rank != 0:
        store.set(keys.told(rank), "")
        return
    came = [keys.told(r) for r in range(1, world_size) if r not in error.missing]
    if came:
        wait_for_keys(store, came, Deadline(_GRACE_SECONDS))
