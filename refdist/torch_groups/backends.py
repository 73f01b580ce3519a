"""The backends of a torch process group, gloo and NCCL: their choice, creation and end."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, Store
from torch.distributed.constants import default_pg_timeout

from refdist import torch_versions
from refdist.errors import failure

_POLL_SECONDS = 1e-3


def _gloo_backend(
    store: Store, rank: int, size: int, timeout: timedelta, address: str | None
) -> Any:
    """Gloo on ``address``; for None or a GLOO_SOCKET_IFNAME of the user, gloo chooses it."""
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo  # its annotations leave out the options
    if address is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return gloo(store, rank, size, timeout=timeout)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl_backend(
    store: Store, rank: int, size: int, timeout: timedelta, address: str | None
) -> Any:
    """NCCL, on the current CUDA device of this process."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, size, options)


_BACKENDS: dict[str, tuple[str, timedelta, Callable[..., Any]]] = {
    # name: device of its tensors, torch's default timeout, constructor
    "gloo": ("cpu", default_pg_timeout, _gloo_backend),
    "nccl": ("cuda", timedelta(minutes=10), _nccl_backend),
}


def check_backend(backend: str) -> str:
    """The name of a backend, in lower case.

    Raises:
        ValueError: no backend here has this name, or it needs a GPU and there is none.
    """
    name = str(backend).lower()
    if name not in _BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(_BACKENDS)}")
    if name == "nccl" and not torch.cuda.is_available():
        raise ValueError("backend='nccl': needs a CUDA GPU, and torch finds none; use 'gloo'")
    return name


def default_timeout(backend: str) -> timedelta:
    """Torch's default timeout for a backend."""
    return _BACKENDS[backend][1]


def create_group(
    backend: str,
    store: Store,
    rank: int,
    size: int,
    timeout: timedelta,
    address: str | None = None,
) -> ProcessGroup:
    """A group with one backend for one kind of device, unknown to ``torch.distributed``."""
    device, _, construct = _BACKENDS[backend]
    group = ProcessGroup(store, rank, size)
    kind = getattr(ProcessGroup.BackendType, backend.upper())
    group._set_default_backend(kind)
    implementation = construct(store, rank, size, timeout, address)
    group._register_backend(torch.device(device), kind, implementation)
    return group


def end_group(group: ProcessGroup) -> None:
    """Shut the backend of a group down.

    NCCL work that is pending on the current stream gets half of the group's timeout to finish. Then
    it is aborted, because a rank may have died.

    Raises:
        CollectiveError: NCCL did not shut down within the group's timeout.
    """
    for device, backend in torch_versions.backends(group):
        if device.type == "cuda":
            return _end_nccl(group, backend.options._timeout.total_seconds())
    torch_versions.shut_down(group)


def _end_nccl(group: ProcessGroup, seconds: float) -> None:
    """Shut NCCL down in a thread of its own, so that this thread can give up in time."""
    began = time.monotonic()
    device = torch.cuda.current_device()
    events: Any = torch.cuda.Event  # has no annotations
    pending = events()
    pending.record()
    # NCCL's watchdog ends the process when work is as old as the timeout
    while not pending.query() and time.monotonic() < began + seconds / 2:
        time.sleep(_POLL_SECONDS)
    if not pending.query():
        torch_versions.abort(group)

    ended: Future[None] = Future()

    def shut_down() -> None:
        try:
            torch.cuda.set_device(device)
            torch_versions.shut_down(group)
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=shut_down, daemon=True, name="refdist-destroy").start()
    try:
        ended.result(max(0.0, began + seconds - time.monotonic()))
    except FutureTimeout as error:
        rank, size, elapsed = group.rank(), group.size(), time.monotonic() - began
        raise failure("destroy", rank, size, elapsed, seconds, error) from error


def address_towards(host: str, port: int) -> str | None:
    """The address from which this machine reaches ``host``; None if it is a wildcard."""
    if host in ("0.0.0.0", "::"):
        return None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # connecting a datagram socket sends nothing, but chooses the route
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
