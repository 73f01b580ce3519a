"""What differs between torch 2.6 and 2.15, in one place, each with the versions it is for."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore


def store_features() -> dict[str, bool]:
    """What the store of this torch can do, found by looking, with the versions seen."""
    return {
        # 2.13 and 2.15; not 2.6, 2.11
        "Store.barrier: a barrier in one request": hasattr(Store, "barrier"),
        # 2.11 to 2.15; not 2.6
        "Store.queue_push, queue_pop: queues of values": hasattr(Store, "queue_push"),
        # 2.11 to 2.15; not 2.6
        "Store.list_keys: what the store holds": hasattr(Store, "list_keys"),
        # all of 2.6 to 2.15
        "Store.multi_get: several values in one request": hasattr(Store, "multi_get"),
    }


def tcp_store_of(store: Store) -> TCPStore:
    """The TCPStore below any number of prefixes.

    Raises:
        ValueError: there is none.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        raise ValueError(f"store={type(store).__name__}: is no TCPStore, so it has no address")
    return store


def open_server(listen_fd: int, **arguments: Any) -> TCPStore:
    """A TCPStore that serves on a listening descriptor, which it then owns.

    The libuv server takes a descriptor on torch 2.11, 2.13 and 2.15. On 2.6 it raises
    NotImplementedError, and the legacy server serves instead.
    """
    use_libuv = arguments.pop("use_libuv", None)
    if use_libuv is None:
        use_libuv = torch.__version__ >= torch.torch_version.TorchVersion("2.11")
    return TCPStore(is_master=True, master_listen_fd=listen_fd, use_libuv=use_libuv, **arguments)


def shut_down(group: ProcessGroup) -> None:
    """Shut down each backend of a group.

    ``ProcessGroup.shutdown`` exists on torch 2.13 and 2.15. On 2.6 only the NCCL backend has
    something to shut down, under a private name; gloo frees its resources with the object. There,
    the object waits for gloo's threads while it holds the interpreter lock, for which a thread may
    still wait in order to free the tensor of work that has ended.
    """
    if hasattr(group, "shutdown"):
        group.shutdown()
        return
    time.sleep(0.05)  # lets such a thread have the lock
    devices: list[torch.device] = group._device_types
    for device in devices:
        shutdown = getattr(group._get_backend(device), "_shutdown", None)
        if shutdown is not None:
            shutdown()


@cache
def _log_level() -> ctypes.c_int | None:
    """The level from which torch's C++ code writes to stderr: 0 info, 1 warning, 2 error.

    Exported as a plain integer by all of 2.6 to 2.15, and settable from Python in no other way
    once torch is imported.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        try:
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
        except (OSError, ValueError):
            continue
    return None


_WARNING, _ERROR = 1, 2
_quiet_lock = threading.Lock()
_quiet_threads = 0  # how many threads are in quiet() because the level was at warnings


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's C++ code from writing warnings to stderr for what is expected here.

    A wait that times out warns twice, and a wait in slices times out once a slice. A connection
    attempt that fails warns with a stack trace, and is tried again. Only the default level,
    warnings, is raised, for as long as some thread is in here; a level that the user has chosen
    stays.
    """
    global _quiet_threads
    level = _log_level()
    with _quiet_lock:
        raised = level is not None and (_quiet_threads > 0 or level.value == _WARNING)
        if level is not None and raised:
            _quiet_threads += 1
            level.value = _ERROR
    try:
        yield
    finally:
        with _quiet_lock:
            if level is not None and raised:
                _quiet_threads -= 1
                if _quiet_threads == 0:
                    level.value = _WARNING
