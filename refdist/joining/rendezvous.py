"""How ranks meet: rank 0 opens a store, all ranks join it, and a barrier says which have come.

``form`` is the whole way, and the functions below it are its steps, in order.

That barrier is a gather, to which each rank but 0 brings the address of a socket that it has
reserved. If rank 0 dies, the others meet there: see ``shrinking``.

With a secret, each rank also brings a token, which is random, under seals that
only this creation has; and the seals of the group come from the secret and all tokens. So what an
earlier group of the same ranks wrote is refused, even if secret, port and keys were the same.
"""

import json
import os
import socket
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Self

from torch.distributed import DistError, Store

from refdist.barrier import barrier_of
from refdist.barrier.plain import Barrier
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
from refdist.joining.connection import Address, Connection, address_of
from refdist.joining.membership import LeftoverStoreError, Membership, refused
from refdist.joining.realigning import break_off
from refdist.joining.wires import OWN, VLLM, Wire
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import close_quietly, connect, listen, serve
from refdist.store.seals import Seals, warn_without_secret
from refdist.torch_versions import tcp_store_of
from refdist.vllm_wire.barrier import Barrier as VllmBarrier
from refdist.vllm_wire.meeting import open_store

_GRACE_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_TOKEN_BYTES = 32


class Joined(NamedTuple):
    """The parts of a group that has formed.

    Attributes:
        wire: its protocol.
        barrier: its barriers; in refdist's own protocol, the first of them passed.
        calls: its calls.
        connection: to its store.
        secret: of the group.
        addresses: of the sockets that the ranks have reserved; None for that which has the store,
            and where torch does not tell its connection.
        place: the prefix of its keys, before it shrank or grew.
        era: how often it has shrunk or grown.
        left_out: whether it has ever shrunk to fewer ranks.
    """

    wire: Wire
    barrier: Any
    calls: Calls
    connection: Connection
    secret: bytes | None = None
    addresses: tuple[Address | None, ...] = ()
    place: str = ""
    era: int = 0
    left_out: bool = False

    @classmethod
    def over(cls, store: Store, rank: int, world_size: int) -> Self:
        """The parts of a group whose ranks have a store already."""
        client = StoreClient(store)
        barrier = barrier_of(client, rank, world_size)
        connection = Connection(client)
        connection.root = barrier
        return cls(OWN, barrier, Calls(rank, client), connection, place=client.prefix)

    def remember(self, host: str, group: Any = None) -> None:
        """Remember a group by host, as the user gave it, port and rank.

        The next one there ends it, and all others on its store. Those of torch have no ``end``.
        """
        store = self.barrier.store.store
        place = host, tcp_store_of(store).port, self.barrier.rank
        _formed[place] = group or self.connection
        if group is None:
            _stores[place] = store

    def hand_over(self, group: Any, host: str, warn: bool) -> None:
        """Remember a group that consists of these parts, and warn if it has no secret."""
        self.remember(host)
        try:
            if group.socket is not None and warn:
                warn_without_secret(group.socket, group.messages, self.wire.name)
        except Warning:
            group.end()
            raise


# by host, port and rank
_formed: weakref.WeakValueDictionary[tuple[str, int, int], Any] = weakref.WeakValueDictionary()
_stores: weakref.WeakValueDictionary[tuple[str, int, int], Any] = weakref.WeakValueDictionary()


def form(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: float,
    listen_socket: socket.socket | None = None,
    secret: bytes | None = None,
    wire: Wire = OWN,
) -> Joined:
    """Open the store on rank 0, connect to it on the others, and wait until all ranks have.

    Raises:
        ValueError: an argument is out of its range, the rank is taken, rank 0 was given another
            world size, or this process is this rank already, in a group that cannot be ended.
        OSError: the host does not resolve, or on rank 0, cannot be listened on.
        GroupCreationError: a rank did not come within ``timeout`` seconds; or at once, on another
            rank than 0 which has another secret; or soon, because a rank speaks another protocol.
        StoreConnectionError: no store answered in time.
    """
    check_rank(rank, world_size)
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")
    given = listen_socket if rank == 0 else None
    _end_the_one_before(host, given.getsockname()[1] if given else port, rank)
    own = listen(host, port) if rank == 0 and given is None else None
    listener = own or given
    where = f"{host}:{port or (listener and listener.getsockname()[1])}"
    deadline = Deadline(timeout, whole=True)
    calls = Calls(rank)

    def attempts() -> Joined:
        while True:
            calls.client = None
            try:
                if wire is VLLM:
                    calls.client = open_store(host, port, rank, world_size, deadline, listener)
                    connection = Connection(calls.client)
                    connection.root = VllmBarrier(calls.client, rank, world_size)
                    return Joined(wire, connection.root, calls, connection)
                calls.client = _open(host, port, rank, deadline, listener)
                connection = Connection(calls.client)
                address = connection.reserve() if rank != 0 else None
                connection.root, addresses = join(
                    calls.client, rank, world_size, deadline, where, secret, address
                )
                return Joined(wire, connection.root, calls, connection, secret, addresses)
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
        joined = calls.run("create", deadline, attempts)
    except BaseException:
        if calls.client is not None:
            calls.client.close()
        close_quietly(own)  # the port is free again
        raise
    joined.connection.serves(listener, own is not None)
    return joined


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


def _open(
    host: str, port: int, rank: int, deadline: Deadline, listener: socket.socket | None
) -> StoreClient:
    timeout = timedelta(seconds=deadline.allowed)
    if rank == 0:
        assert listener is not None
        client = StoreClient(serve(host, listener, timeout, wait_for_workers=False))
    else:
        client = StoreClient(connect(host, port, deadline, timeout=timeout, wait_for_workers=False))
    client.limit(deadline.remaining())
    return client


def join(
    store: StoreClient,
    rank: int,
    world_size: int,
    deadline: Deadline,
    where: str,
    secret: bytes | None = None,
    address: Address | None = None,
) -> tuple[Barrier, tuple[Address | None, ...]]:
    """Take a rank on an open store, and meet the other ranks in the first barrier. See ``form``.

    Returns:
        The barrier, and the addresses that the ranks have brought.
    """
    deadline.after_slice = partial(_check_keys, store, rank, world_size, where)
    try:
        rank_0 = Membership(store, rank, world_size, where, secret).register(deadline)
        barrier = barrier_of(store, rank, world_size)
        try:
            value = json.dumps(address).encode()
            if secret is None:
                values = barrier.gather(value, deadline)
            else:
                values = _meet_in_secret(barrier, deadline, secret, rank_0, value)
        except (CancelledWaitError, GroupCreationError) as error:
            other_wire = isinstance(error, GroupCreationError)
            break_off(barrier, str(error) if other_wire else f"of {error}")
            if other_wire:
                there = [r for r in range(world_size) if store.check([keys.member(r)])]
                _let_others_read(store, rank, there)
            raise
        return barrier, addresses_of(values)
    except BarrierError as error:
        # asked before rank 0, which waits for the others to read, ends the store
        other_secret = refused(store, error.missing)
        with suppress(DistError):
            _let_others_read(store, rank, set(range(world_size)) - set(error.missing))
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


def _check_keys(store: StoreClient, rank: int, world_size: int, where: str) -> None:
    """Raise GroupCreationError if a rank uses the store that speaks vLLM's protocol.

    It writes nothing that shows, but torch counts it under a key that it hides. Rank 0 knows all
    others, and these know that a rank 0 of refdist writes about itself before anything else.
    """
    count = store.num_keys()
    if store.check([keys.member(r) for r in (range(world_size) if rank == 0 else [0])]):
        return
    known = keys.of_creation(world_size) if rank == 0 else []
    if count > sum(store.check([key]) for key in known):
        raise GroupCreationError(
            f'a peer at {where} speaks vLLM\'s protocol: pass wire="vllm", on all ranks of refdist '
            f"(or another program uses this store)"
        )


def _meet_in_secret(
    barrier: Barrier, deadline: Deadline, secret: bytes, rank_0: bytes, value: bytes
) -> list[bytes]:
    """Pass the first barrier, and agree on the seals of the group. Returns the ranks' values.

    Raises:
        MessageError: someone without the secret interferes.
    """
    token = os.urandom(_TOKEN_BYTES)
    barrier.seals = Seals(secret, "creation", rank_0)
    values = barrier.gather(token + value, deadline)
    tokens = [value[:_TOKEN_BYTES] for value in values]
    # the roll of an earlier group holds right tags, if someone plays all of it again
    if tokens[barrier.rank] != token:
        raise AuthenticationError(
            f"rank {barrier.rank} is on the roll with what it wrote for another group"
        )
    barrier.seals = Seals(secret, "group", *tokens)
    return [value[_TOKEN_BYTES:] for value in values]


def addresses_of(values: Iterable[bytes]) -> tuple[Address | None, ...]:
    """The addresses that ranks have brought, in rank order.

    Raises:
        MessageError: one is no address.
    """
    found: list[Address | None] = []
    for rank, value in enumerate(values):
        try:
            found.append(address_of(json.loads(value)))
        except (MessageError, ValueError, RecursionError) as error:
            raise MessageError(
                f"rank {rank} brought {value[:40]!r} in place of an address"
            ) from error
    return tuple(found)


def _let_others_read(store: StoreClient, rank: int, came: Iterable[int]) -> None:
    """Keep the store of rank 0 open until the ranks that came have read why there is no group."""
    if rank != 0:
        store.set(keys.told(rank), "")
        return
    told = [keys.told(other) for other in came if other != 0]
    if told:
        store.wait(told, Deadline(_GRACE_SECONDS))
