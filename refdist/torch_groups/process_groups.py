"""Torch process groups, gloo and NCCL, without global state."""

import socket
from datetime import timedelta
from typing import Any, Literal, overload

from torch._C import _distributed_c10d as c10d
from torch.distributed import Backend, PrefixStore, ProcessGroup, Store

from refdist import torch_versions
from refdist.checks import check_rank, check_timeout, wait_of
from refdist.joining.rendezvous import form
from refdist.joining.wires import wire_of
from refdist.torch_groups.backends import (
    address_towards,
    check_backend,
    create_group,
    default_timeout,
    end_group,
)


@overload
def init_gloo_process_group(
    backend: str | Backend,
    prefix_store: PrefixStore,
    group_rank: int,
    group_size: int,
    timeout: timedelta,
) -> ProcessGroup: ...
@overload
def init_gloo_process_group(
    *, prefix_store: PrefixStore, group_rank: int, group_size: int, timeout: timedelta
) -> ProcessGroup: ...
@overload
def init_gloo_process_group(
    backend: PrefixStore, prefix_store: int, group_rank: int, group_size: timedelta, /
) -> ProcessGroup: ...
@overload
def init_gloo_process_group(
    backend: PrefixStore, prefix_store: int, group_rank: int, /, *, timeout: timedelta
) -> ProcessGroup: ...
def init_gloo_process_group(
    backend: Any = "gloo",
    prefix_store: Any = None,
    group_rank: Any = None,
    group_size: Any = None,
    timeout: Any = None,
) -> ProcessGroup:
    """Create a gloo group over a store that all its ranks share, without global state.

    Blocks until all ranks have connected. vLLM dropped ``backend`` after the specification was
    written, so it may be left out, also with positional arguments.

    Args:
        backend: ``"gloo"``.
        prefix_store: a prefix of the store that no other group uses.
        group_rank: rank of this process, 0 to ``group_size - 1``.
        group_size: the number of processes.
        timeout: timeout of the connection, and default of the collectives.

    Raises:
        ValueError: ``backend`` is not ``"gloo"``.
        TypeError: an argument is missing.
        RuntimeError: a rank did not connect in time.

    Source: the specification of ``vllm.distributed.utils``.
    """
    given = [backend, prefix_store, group_rank, group_size, timeout]
    if isinstance(backend, Store) and None in given:
        # without backend, positional arguments are one place too early, up to the first None
        given.remove(None)
        backend, prefix_store, group_rank, group_size, timeout = "gloo", *given
    arguments = {
        "prefix_store": prefix_store,
        "group_rank": group_rank,
        "group_size": group_size,
        "timeout": timeout,
    }
    absent = [name for name, value in arguments.items() if value is None]
    if absent:
        raise TypeError(f"init_gloo_process_group: missing {', '.join(absent)}")
    if str(backend).lower() != "gloo":
        raise ValueError(f"backend={backend!r}: must be 'gloo'")
    check_rank(group_rank, group_size, "group_rank", "group_size")
    seconds = check_timeout("timeout", timeout)
    return create_group("gloo", prefix_store, group_rank, group_size, wait_of(seconds))


@overload
def stateless_init_torch_distributed_process_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str | Backend,
    group_name: str | None = None,
    return_store: Literal[False] = False,
    listen_socket: socket.socket | None = None,
    timeout: timedelta | None = None,
    *,
    wire: str | None = None,
) -> ProcessGroup: ...
@overload
def stateless_init_torch_distributed_process_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str | Backend,
    group_name: str | None = None,
    *,
    return_store: Literal[True],
    listen_socket: socket.socket | None = None,
    timeout: timedelta | None = None,
    wire: str | None = None,
) -> tuple[ProcessGroup, Store]: ...
def stateless_init_torch_distributed_process_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str | Backend,
    group_name: str | None = None,
    return_store: bool = False,
    listen_socket: socket.socket | None = None,
    timeout: timedelta | None = None,
    *,
    wire: str | None = None,
) -> ProcessGroup | tuple[ProcessGroup, Store]:
    """Form a torch group with the other processes that call this with the same host and port.

    It replaces ``torch.distributed.init_process_group``, which forms one permanent group in a
    process. Processes 1 to 8 can form one group, and two of them another one at the same time. The
    call blocks until all ranks have come.

    Functions that need no global rank work on the group, such as
    ``torch.distributed.all_reduce(tensor, group=group)``. Functions that take a rank
    (``broadcast``, ``send``, ``recv``) take a global rank, and this group has none.
    ``refdist.torch_groups.collectives`` has them all by rank in the group, on every torch:
    ``collectives.broadcast(tensor, 0, group)``. It also lists torch's own functions that take
    ``group_src`` or ``group_dst``, by torch version.

    A secret of ``StatelessProcessGroup.create``, or in REFDIST_SECRET, does not cover these groups.
    Gloo and NCCL exchange addresses through the store and tensors over their own connections. They
    check neither, so they need a network that you trust.

    Args:
        host: the only address on which rank 0 listens: a name, an IPv4 or an IPv6 address.
        port: port on which rank 0 listens. For a free one, bind a socket to port 0, tell the other
            ranks its port and pass it as ``listen_socket``.
        rank: rank of this process, 0 to ``world_size - 1``.
        world_size: the number of processes.
        backend: ``"gloo"`` for CPU tensors, or ``"nccl"`` for tensors on the current CUDA device
            of this process.
        group_name: name under which torch registers the group, for functional collectives and
            symmetric memory.
        return_store: whether to return the store of the group too.
        listen_socket: on rank 0, a bound TCP socket to listen on, in place of host and port. It
            stays the caller's.
        timeout: timeout of the creation, and default of the collectives; None for torch's
            default, 30 minutes for gloo and 10 for NCCL.
        wire: ``"vllm"`` if some ranks call vLLM's function of this name, with gloo; then all give
            the same text as host, and gloo itself chooses its address, as theirs does. Else None.

    Raises:
        ValueError: an argument is out of its range, the backend is unknown or needs a GPU that
            is not there, the name or the rank is taken, or rank 0 was given another world size.
        OSError: the host does not resolve, or rank 0 cannot listen on it.
        GroupCreationError, StoreConnectionError: a rank did not come in time, or has another
            ``wire``.

    Source: the specification of ``vllm.distributed.utils``.
    """
    name = check_backend(backend)
    if group_name is not None and torch_versions.registered_group(group_name) is not None:
        raise ValueError(f"group_name={group_name!r}: is taken by another group of this process")
    seconds = check_timeout("timeout", default_timeout(name) if timeout is None else timeout)
    protocol = wire_of(wire)
    if wire is not None and name != "gloo":
        raise ValueError(f"wire={wire!r}: must be None with backend={backend!r}; it knows gloo")
    joined = form(host, port, rank, world_size, seconds, listen_socket, wire=protocol)
    try:
        place = torch_versions.tcp_store_of(joined.connection.client.store)
        group_store: Store = PrefixStore("group", place)
        address = address_towards(place.host, place.port)
        if wire is not None:
            group_store, address = PrefixStore(_uri(host, place.port), place), None
        group = create_group(name, group_store, rank, world_size, wait_of(seconds), address)
    finally:
        # the store listens on its own duplicate
        joined.connection.release()
    joined.remember(host, group)
    if group_name is not None:
        _register(group, group_name)
    return (group, group_store if wire is None else place) if return_store else group


def stateless_destroy_torch_distributed_process_group(pg: ProcessGroup) -> None:
    """Destroy a group of ``stateless_init_torch_distributed_process_group``.

    It shuts the backend down and unregisters the group's name, if any. It does not wait for the
    other ranks. NCCL work that is pending on the current stream gets half of the group's timeout to
    finish. Then it is aborted, because a rank may have died.

    Raises:
        CollectiveError: NCCL did not shut down within the group's timeout.

    Source: the specification of ``vllm.distributed.utils``.
    """
    try:
        end_group(pg)
    finally:
        if torch_versions.registered_group(pg.group_name) is pg:
            c10d._unregister_process_group(pg.group_name)


def _uri(host: str, port: int) -> str:
    """The prefix of the keys of gloo in vLLM's protocol."""
    host = host.strip("[]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _register(group: ProcessGroup, name: Any) -> None:
    group._set_group_name(name)
    c10d._register_process_group(name, group)
