"""Differences between torch 2.6 and 2.15, in one place, each with the versions it is for."""

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore

STORE_BARRIER = "Store.barrier: a barrier in one request"

_switched_off: set[str] = set()


def store_features() -> dict[str, bool]:
    """The abilities of the store of this torch, found by looking, with the versions seen."""
    return {
        # 2.13 and 2.15; not 2.6, 2.11
        STORE_BARRIER: hasattr(Store, "barrier") and STORE_BARRIER not in _switched_off,
        # 2.11 to 2.15; not 2.6; not used, as a client that has waited for a queue stays listed
        # there (seen on 2.13), and the next push ends whatever it waits for then, be it a barrier
        "Store.queue_push, queue_pop: queues of values": hasattr(Store, "queue_push"),
        # 2.11 to 2.15; not 2.6
        "Store.list_keys: what the store holds": hasattr(Store, "list_keys"),
        # all of 2.6 to 2.15
        "Store.multi_get: several values in one request": hasattr(Store, "multi_get"),
    }


@contextmanager
def switched_off(feature: str) -> Iterator[None]:
    """Do without a feature of ``store_features`` in groups made meanwhile, as an old torch would.

    All ranks of a group must do without it alike.
    """
    _switched_off.add(feature)
    try:
        yield
    finally:
        _switched_off.discard(feature)


def has_store_barrier(store: Store) -> bool:
    """Whether ``store.barrier`` is one request, on a counter that can be set and used again.

    So it is for a TCPStore. The other stores, PrefixStore among them, build it from several keys
    that cannot be reset.
    """
    return isinstance(store, TCPStore) and store_features()[STORE_BARRIER]


def lists_keys() -> bool:
    """Whether a store can say what it holds: on 2.11 to 2.15, not on 2.6."""
    return hasattr(Store, "list_keys")


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


def abort(group: ProcessGroup) -> None:
    """Give up NCCL's outstanding work on this rank. Gloo has nothing like it.

    A method of NCCL's backend on 2.6 to 2.15; ``ProcessGroup.abort`` exists on 2.13 and 2.15.
    """
    for device, backend in backends(group):
        if device.type == "cuda":
            backend.abort()


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
    for _, backend in backends(group):
        shutdown = getattr(backend, "_shutdown", None)
        if shutdown is not None:
            shutdown()


def backends(group: ProcessGroup) -> list[tuple[torch.device, Any]]:
    """The kinds of device of a group, and the backend of each, by names private on 2.6 to 2.15."""
    return [(device, group._get_backend(device)) for device in group._device_types]


def symmetric_memory(
    group: ProcessGroup, device: torch.device, dtype: torch.dtype, count: int
) -> torch.Tensor:
    """A tensor on each rank's GPU that all ranks of the group can read. All ranks call this.

    torch 2.11 to 2.15 find the group by the name under which it is registered. On 2.6 they look
    it up among the groups of the global state.

    Raises:
        ValueError: this torch cannot, or the group is not registered.
        RuntimeError: the GPUs cannot reach each other's memory.
    """
    if torch.__version__ < torch.torch_version.TorchVersion("2.11"):
        raise ValueError(f"torch {torch.__version__}: has symmetric memory for global groups only")
    from torch.distributed import _symmetric_memory as module

    if not hasattr(torch.ops.symm_mem, "two_shot_all_reduce_"):
        raise ValueError(f"torch {torch.__version__}: was built without symmetric memory")
    if registered_group(group.group_name) is not group:
        raise ValueError("group: is not registered; create it with a group_name")
    tensor = module.empty(count, dtype=dtype, device=device)
    module.rendezvous(tensor, group.group_name)
    return tensor


def registered_group(name: Any) -> ProcessGroup | None:
    """The group that torch knows under a name."""
    try:
        return c10d._resolve_process_group(name)
    except RuntimeError:
        return None


WARNING, ERROR = 1, 2


@cache
def log_level() -> ctypes.c_int | None:
    """The level from which torch's C++ code writes to stderr: 0 info, WARNING, ERROR.

    Exported as a plain integer by all of 2.6 to 2.15, and settable from Python in no other way
    once torch is imported.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        try:
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
        except (OSError, ValueError):
            continue
    return None
