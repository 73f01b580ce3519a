"""How ranks meet: rank 0 opens a store, everyone joins it, and a barrier says who came.

With a secret, that barrier is a gather. Each rank brings a token, which is random, under seals that
only this creation has; and the seals of the group come from the secret and all tokens. So what an
earlier group of the same ranks wrote is refused, whatever was the same: secret, port, and keys.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

from torch.distributed import DistError

from refdist.barrier import Barrier
from refdist.calls import Calls
from refdist.checks import check_rank
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
    StoreConnectionError,
    name_ranks,
)
from refdist.joining.membership import GONE, LeftoverStoreError, refused, register
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import close_quietly, connect, listen, serve
from refdist.store.seals import Seals
from refdist.store.waiting import peek, wait_for_keys
from refdist.torch_versions import quiet

_GRACE_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_TOKEN_BYTES = 32


# by host, port and rank
_formed: WeakValueDictionary[tuple[str, int, int], Any] = WeakValueDictionary()
_stores: WeakValueDictionary[tuple[str, int, int], Any] = WeakValueDictionary()


def remember(group: Any, host: str, port: int, rank: int) -> None:
    """Note which group of this process is this rank of the group on a host and port.

    Args:
        group: with a ``store`` and a method ``end``, if it can be ended for the next one there.
        host: as the user gave it.
        port: of the store.
        rank: of this process.
    """
    _formed[host, port, rank] = group
    if hasattr(group, "end"):
        _stores[host, port, rank] = group.store


def _end_the_one_before(host: str, port: int, rank: int) -> None:
    """End what this process has on this place, as a cell of a notebook that is run again does not.

    Otherwise two stores would accept on one port, and each would get some of the ranks.
    """
    place = host, port, rank
    before = _formed.get(place)
    if before is not None and not hasattr(before, "end"):
        raise ValueError(
            f"rank={rank}: this process has a torch group on {host}:{port} that nobody has "
            f"deleted, and with it its store; destroy and del that one on all ranks, or take "
            f"another port"
        )
    if before is not None:
        before.end()
    if place in _stores:
        raise ValueError(
            f"rank={rank}: this process still has the store of its last group on {host}:{port}, "
            f"which was closed; delete what refers to group.store, or take another port"
        )


@contextmanager
def listening(
    host: str, port: int, rank: int, listen_socket: socket.socket | None
) -> Iterator[socket.socket | None]:
    """The socket that rank 0 listens on. If the body fails, the port is free again.

    Raises:
        ValueError: this process is this rank already, in a group that cannot be ended.
    """
    given = listen_socket if rank == 0 else None
    _end_the_one_before(host, given.getsockname()[1] if given else port, rank)
    own_socket = listen(host, port) if rank == 0 and given is None else None
    try:
        yield own_socket or given
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
    secret: bytes | None = None,
) -> tuple[StoreClient, Barrier, Calls]:
    """Open the store on rank 0, connect to it on the others, and wait until all ranks have.

    Returns:
        The store; the barriers of the group, the first of them passed; and its calls.

    Raises:
        ValueError: an argument is out of its range, the rank is taken, or rank 0 was given
            another world size.
        OSError: the host does not resolve.
        GroupCreationError: a rank did not come within ``timeout`` seconds; or at once, on another
            rank than 0 which has another secret.
        StoreConnectionError: on another rank than 0, when rank 0 did not come in time.
    """
    check_rank(rank, world_size)
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")
    deadline = Deadline(timeout)
    calls = Calls()

    def attempts() -> tuple[StoreClient, Barrier]:
        while True:
            calls.client = None
            try:
                calls.client = _open(host, port, rank, deadline, listener)
                where = f"{host}:{port or (listener and listener.getsockname()[1])}"
                return calls.client, join(calls.client, rank, world_size, deadline, where, secret)
            except (StoreConnectionError, LeftoverStoreError) as error:
                if rank == 0 or deadline.remaining() == 0:
                    if calls.client is None or calls.client.timed_out:
                        raise  # no store answered
                    raise GroupCreationError(f"rank {rank} was not let in: {error}") from error
                if calls.client is not None:
                    calls.client.close()
            deadline.check()
            time.sleep(_RETRY_SECONDS)

    try:
        return *calls.run("create", attempts, deadline), calls
    except BaseException:
        if calls.client is not None:
            calls.client.close()
        raise


def _open(
    host: str, port: int, rank: int, deadline: Deadline, listener: socket.socket | None
) -> StoreClient:
    timeout = timedelta(seconds=deadline.allowed)
    # torch warns with a stack trace when it finds a store that is just ending
    with quiet():
        if rank == 0:
            assert listener is not None
            return StoreClient(serve(host, listener, timeout, wait_for_workers=False), deadline)
        return StoreClient(
            connect(host, port, deadline, timeout=timeout, wait_for_workers=False), deadline
        )


def join(
    store: StoreClient,
    rank: int,
    world_size: int,
    deadline: Deadline,
    where: str,
    secret: bytes | None = None,
) -> Barrier:
    """Meet the other ranks on an open store. See ``meet``."""
    try:
        rank_0 = register(store, rank, world_size, deadline, where, secret)
        barrier = Barrier(store, rank, world_size)
        try:
            if secret is None:
                barrier.wait(deadline, each_phase=False)
            else:
                _meet_in_secret(barrier, rank, deadline, secret, rank_0)
        except CancelledWaitError as error:
            barrier.break_off(f"of {error}")
            raise
        return barrier
    except BarrierError as error:
        # asked before rank 0, which waits for the others to read, ends the store
        other_secret = refused(store, error.missing)
        with suppress(DistError):
            _let_others_read(store, rank, world_size, error)
        if error.completed:
            text = f"all ranks came to {where}, but {error}"
            raise GroupCreationError(text, error.missing) from error
        came = world_size - len(error.missing)
        raise GroupCreationError(
            f"{came} of {world_size} ranks came to {where} within {deadline.allowed:g} s; "
            f"missing: {name_ranks(error.missing)} ({error}){other_secret}",
            error.missing,
        ) from error
    except MessageError as error:
        raise GroupCreationError(
            f"all ranks came to {where}, but someone else writes to the store: {error}"
        ) from error
    except DistError as error:
        raise StoreConnectionError(f"the store on {where} ended: {error}") from error


def leave(store: StoreClient, rank: int, world_size: int, deadline: Deadline) -> None:
    """Say that this rank uses the store no more; rank 0 waits until all others have said so.

    Raises:
        BarrierError: on rank 0, when a rank did not say so in time. Where no time at all is
            allowed, it neither waits nor raises.
    """
    if rank != 0:
        # where the store is gone already, nobody waits for this
        with suppress(DistError), quiet():
            store.set(keys.member(rank), GONE.decode())
            if store.add(keys.gone(), 1) == world_size - 1:
                store.set(keys.all_gone(), "")
        return
    if (
        world_size == 1
        or deadline.allowed == 0
        or wait_for_keys(store, [keys.all_gone()], deadline)
    ):
        return
    missing = [r for r in range(1, world_size) if peek(store, keys.member(r)) != GONE]
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


def _meet_in_secret(
    barrier: Barrier, rank: int, deadline: Deadline, secret: bytes, rank_0: bytes
) -> None:
    """Pass the first barrier, and agree on the seals of the group. See above.

    Raises:
        MessageError: someone without the secret interferes.
    """
    token = os.urandom(_TOKEN_BYTES)
    barrier.seals = Seals(secret, "creation", rank_0)
    tokens = barrier.gather(token, deadline, each_phase=False)
    # the roll of an earlier group holds right tags, if someone plays all of it again
    if tokens[rank] != token:
        raise AuthenticationError(
            f"rank {rank} is on the roll with what it wrote for another group"
        )
    barrier.seals = Seals(secret, "group", *tokens)


def _let_others_read(store: StoreClient, rank: int, world_size: int, error: BarrierError) -> None:
    """Keep the store of rank 0 open until those who came have read why there is no group."""
    if rank != 0:
        store.set(keys.told(rank), "")
        return
    came = [keys.told(r) for r in range(1, world_size) if r not in error.missing]
    if came:
        wait_for_keys(store, came, Deadline(_GRACE_SECONDS))
