"""A TCPStore that listens on one address only, IPv4 or IPv6, and whose creation ends in time."""

import errno
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from refdist import torch_versions
from refdist.checks import check_integer
from refdist.deadline import Deadline
from refdist.errors import StoreConnectionError
from refdist.store.client import ANSWER_SECONDS, quiet
from refdist.store.sockets import limit_socket, numeric

DEFAULT_TIMEOUT = timedelta(seconds=300)
_RETRY_SECONDS = 0.05
_NOT_OF_THIS_MACHINE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def create_tcp_store(
    host: str,
    port: int,
    listen_socket: socket.socket | None = None,
    **kwargs: Any,
) -> TCPStore:
    """Create a TCPStore that listens on ``host`` only, or connect to one.

    Blocks until the store answers. Waiting for other ranks is left to the caller, unless
    ``wait_for_workers=True`` and ``world_size`` are given. Any process that reaches the port may
    use the store; a secret guards the values that a group of refdist writes there, not the store.

    Args:
        host: name, IPv4 address or IPv6 address (``"::1"`` or ``"[::1]"``).
        port: 0 to 65535; 0 takes a free port, where ``is_master`` is True.
        listen_socket: a bound TCP socket for the server to listen on. The server works on a
            duplicate of it; the socket stays the caller's.
        kwargs: arguments of ``torch.distributed.TCPStore``: ``is_master`` (False), ``timeout``
            (timedelta, 300 s; for the connection, and for each later wait that names none),
            ``wait_for_workers`` (False), ``world_size``, ``use_libuv`` and others.

    Raises:
        ValueError: ``host`` or ``port`` is out of its range.
        OSError: ``host`` does not resolve, or cannot be listened on, or the port is taken.
        StoreConnectionError: no store answered in time.

    Source: ``vllm.distributed.utils`` of vLLM 0.19 to 0.33, for its name and signature.
    """
    timeout: timedelta = kwargs.setdefault("timeout", DEFAULT_TIMEOUT)
    kwargs.setdefault("wait_for_workers", False)
    if not kwargs.pop("is_master", False):
        return connect(host, port, Deadline(timeout.total_seconds()), **kwargs)
    if listen_socket is not None:
        return serve(host, listen_socket, **kwargs)
    with listen(host, port) as own_socket:
        return serve(host, own_socket, **kwargs)


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on ``host`` and ``port``, or on a free port for ``port=0``.

    Raises:
        ValueError: ``port`` is out of its range, or ``host`` is empty.
        OSError: ``host`` does not resolve or is not of this machine, or the port is taken.
    """
    candidates = _resolve(host, port)
    for place, (family, address) in enumerate(candidates):
        try:
            return _listen(family, address)
        except OSError as error:
            # a name may have addresses of other machines, and of a family that this one lacks
            if place + 1 < len(candidates) and error.errno in _NOT_OF_THIS_MACHINE:
                continue
            raise OSError(
                error.errno,
                f"cannot listen on host={host!r}, port={port}: {error.strerror}; rank 0 needs an "
                f"address of its own machine and a free port, or port=0 for any",
            ) from error
    raise AssertionError("a host that resolves has an address")


def reserve(host: str) -> socket.socket:
    """A TCP socket on a free port of a numeric address, which does not listen yet.

    Until it does, every connection is refused.
    """
    family, address = _resolve(host, 0)[0]
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.bind(address)
    return reserved


def _listen(family: socket.AddressFamily, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # a port that an ended group used may be taken again at once
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def serve(
    host: str,
    listener: socket.socket,
    timeout: timedelta,
    deadline: Deadline | None = None,
    unblock: Callable[[], object] | None = None,
    **kwargs: Any,
) -> TCPStore:
    """A TCPStore that listens on a duplicate of a bound socket. See ``create_tcp_store``.

    ``deadline``, of ``timeout`` if it is given, may be cancelled; raises CancelledWaitError then.
    With ``wait_for_workers``, torch waits on; each call of ``unblock`` is to be one worker for it.
    """
    address, port = numeric(listener.getsockname()), listener.getsockname()[1]
    if port == 0:
        raise ValueError("listen_socket: is not bound to a port")
    listener.listen(1024)
    # the legacy server would wait for the rest of a request, whatever else comes
    limit_socket(listener, ANSWER_SECONDS)
    # the store closes its descriptor when it ends, so it gets one of its own
    descriptor = socket.dup(listener.fileno())
    try:
        return _construct(
            lambda: torch_versions.open_server(
                descriptor, host_name=address, port=port, timeout=timeout, **kwargs
            ),
            deadline or Deadline(timeout.total_seconds()),
            f"the store on {host}:{port}",
            "was opened here, but this process itself could not reach it; does a firewall close "
            "the port?",
            grace=2.0,  # with wait_for_workers, torch itself says what it waited for, a second late
            unblock=unblock,
        )
    except (TypeError, NotImplementedError):
        # refused before the store took it
        socket.close(descriptor)
        raise


def connect(host: str, port: int, deadline: Deadline, **kwargs: Any) -> TCPStore:
    """A TCPStore that uses the one on ``host`` and ``port``. See ``create_tcp_store``.

    Raises:
        CancelledWaitError: the deadline was cancelled.
    """
    if port == 0:
        raise ValueError("port=0: only rank 0 can take any free port; tell the others which")
    address = _reach(host, port, deadline)
    # torch's own connection attempts cannot be interrupted; now the first one succeeds
    return _construct(
        lambda: TCPStore(host_name=address, port=port, **kwargs),
        deadline,
        f"{host}:{port}",
        "accepted a connection, but did not answer as a torch store does",
    )


def _reach(host: str, port: int, deadline: Deadline) -> str:
    """The first numeric address of ``host`` on which something listens."""
    candidates = _resolve(host, port)
    reason: OSError | str = "nothing listens"
    rounds = 0
    while True:
        rounds += 1
        for family, address in candidates:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(deadline.slice().total_seconds())
                try:
                    probe.connect(address)
                    # a port that nobody listens on can, by chance, be connected to itself
                    if probe.getsockname() != probe.getpeername():
                        return numeric(address)
                except TimeoutError:
                    reason = "nothing came back, as from a firewall or a dead link"
                except OSError as error:
                    reason = error
        if deadline.remaining() == 0:
            tried = ", ".join(numeric(address) for _, address in candidates)
            raise StoreConnectionError(
                f"no store answered on {host}:{port} within {round(deadline.allowed, 2):g} s "
                f"(tried {tried}, {rounds} times; last: {reason}); is rank 0 running?"
            )
        time.sleep(_RETRY_SECONDS)


def _construct(
    create: Callable[[], TCPStore],
    deadline: Deadline,
    where: str,
    silence: str,
    grace: float = 0.0,
    unblock: Callable[[], object] | None = None,
) -> TCPStore:
    """Call a constructor that may block for ever on a peer that never answers. ``silence`` says so.

    It runs in a thread of its own, so that this one gives up in time, ``grace`` seconds late.
    """
    result: list[TCPStore] = []
    failure: list[BaseException] = []
    done, given_up = threading.Event(), threading.Event()

    def run() -> None:
        try:
            # torch 2.6 warns where an address has no name
            with quiet():
                result.append(create())
        except BaseException as error:
            failure.append(error)
        done.set()
        if given_up.is_set():
            result.clear()  # nobody wants this store

    threading.Thread(target=run, daemon=True, name="refdist-store").start()
    try:
        while not done.wait(deadline.slice().total_seconds()):
            if deadline.elapsed() >= deadline.allowed + grace:
                raise StoreConnectionError(
                    f"{where} {silence} (waited {round(deadline.allowed, 2):g} s)"
                )
    except BaseException:
        given_up.set()
        while unblock is not None and not done.wait(_RETRY_SECONDS):
            unblock()
        result.clear()
        raise
    if failure:
        if isinstance(failure[0], DistError):
            raise StoreConnectionError(f"{where}: {failure[0]}") from failure[0]
        raise failure[0]
    return result.pop()


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """The socket addresses of a host: family and what ``bind`` and ``connect`` take.

    Loopback addresses come last: a machine may have one for its own name, where no other finds it.
    """
    if not isinstance(host, str) or not host:
        raise ValueError(f"host={host!r}: must name one address; '0.0.0.0' means all of IPv4")
    if not 0 <= check_integer("port", port) <= 65535:
        raise ValueError(f"port={port}: must be in 0..65535")
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        code = error.errno if isinstance(error, socket.gaierror) else socket.EAI_NONAME
        raise socket.gaierror(code, f"host={host!r} does not resolve: {error}") from error
    addresses = [(family, address) for family, _, _, _, address in found]
    return sorted(addresses, key=lambda found: ipaddress.ip_address(found[1][0]).is_loopback)


def close_quietly(listener: socket.socket | None) -> None:
    """Close a socket that may be closed already."""
    if listener is not None:
        with suppress(OSError):
            listener.close()
