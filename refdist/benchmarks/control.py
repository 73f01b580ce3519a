"""The cost of the control plane: barriers and objects, beside others measured in the same run.

The others are vLLM's own ``StatelessProcessGroup`` if ``vllm`` can be imported, gloo's barrier, and
torch's bare ``Store.barrier`` if it has one. The same processes run all of them in turn, several
times, so that a disturbance of the machine affects all alike.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import log
from statistics import linear_regression, median
from typing import Any

import torch
from torch.distributed import TCPStore

from refdist.barrier import barrier_of
from refdist.benchmarks.bare import bare_barriers
from refdist.benchmarks.launch import LOCAL, place, run_ranks
from refdist.group import StatelessProcessGroup
from refdist.store.client import StoreClient
from refdist.store.listening import create_tcp_store
from refdist.torch_groups.process_groups import stateless_init_torch_distributed_process_group
from refdist.torch_versions import STORE_BARRIER, store_features

WORLD_SIZES = (2, 4, 8, 16, 32)
MANY_RANKS = (32, 64, 128, 256, 400)
LARGE_BYTES = 64 * 2**20
BARE = "bare: "
"""The name prefix of implementations that only send the requests of refdist's barrier."""

_MINUTES = timedelta(minutes=5)
_MANY_PROCESSES = 4


@dataclass(frozen=True)
class ControlTiming:
    """The timing of one operation of one implementation.

    Attributes:
        operation: name of the operation, such as ``"barrier"``.
        implementation: ``"refdist"`` or one of its peers.
        world_size: number of ranks.
        seconds: time of one operation, the median over the repeats. Each repeat does it many
            times in a row, and the slowest rank counts.
    """

    operation: str
    implementation: str
    world_size: int
    seconds: float


def time_control(
    world_sizes: Sequence[int] = WORLD_SIZES, repeats: int = 5, target_seconds: float = 0.1
) -> list[ControlTiming]:
    """Time barriers, gathers, broadcasts and ping-pongs of objects.

    Args:
        world_sizes: numbers of ranks, each a process of this machine.
        repeats: number of times that everything runs in turn.
        target_seconds: rough time of one implementation's part of a repeat.
    """
    timings = []
    for world_size in world_sizes:
        ranks = run_ranks(_time_operations, world_size, repeats, target_seconds)
        for (operation, implementation), _ in ranks[0].items():
            by_rank = [rank[operation, implementation] for rank in ranks]
            slowest = [max(times) for times in zip(*by_rank, strict=True)]
            timings.append(ControlTiming(operation, implementation, world_size, median(slowest)))
    return timings


def time_many_ranks(ranks: Sequence[int] = MANY_RANKS, repeats: int = 9) -> list[ControlTiming]:
    """Time one barrier of many ranks, and the four bare requests of any barrier.

    The ranks are threads of a few processes, each with its own connection to the store. The bare
    requests are ``set``, ``add``, ``wait`` and ``set``. The last rank to add sets the key that all
    wait for.
    """
    timings = []
    for count in ranks:
        processes = run_ranks(_time_threads, _MANY_PROCESSES, count, repeats)
        for name in processes[0]:
            by_process = [process[name] for process in processes]
            slowest = [max(times) for times in zip(*by_process, strict=True)]
            timings.append(ControlTiming("one barrier", name, count, median(slowest)))
    return timings


def exponent(timings: Sequence[ControlTiming]) -> float:
    """The exponent of the time's growth with the number of ranks: 1 if in proportion to it."""
    slope, _ = linear_regression(
        [log(timing.world_size) for timing in timings], [log(timing.seconds) for timing in timings]
    )
    return slope


def _time_operations(
    rank: int, world_size: int, board: TCPStore, repeats: int, target_seconds: float
) -> dict[tuple[str, str], list[float]]:
    """The seconds of each operation of each implementation on one rank, in each repeat."""
    times: dict[tuple[str, str], list[float]] = {}
    with _groups(rank, world_size, board) as (group, operations):
        counts: dict[tuple[str, str], int] = {}
        for repeat in range(repeats + 1):
            for name, operation in operations.items():
                # the first repeat warms up, and gives the number of calls for the others
                count = counts.get(name, 1 if name[0].startswith("64 MiB") else 10)
                group.barrier()
                start = time.perf_counter()
                for _ in range(count):
                    operation()
                # a broadcast from each rank is world_size broadcasts
                count *= world_size if name[0] == "broadcast_obj" else 1
                seconds = (time.perf_counter() - start) / count
                if repeat > 0:
                    times.setdefault(name, []).append(seconds)
                elif count > 1:
                    slowest = max(group.all_gather_obj(seconds))
                    counts[name] = max(10, min(2000, int(target_seconds / slowest)))
    return times


@contextmanager
def _groups(
    rank: int, world_size: int, board: TCPStore
) -> Iterator[tuple[StatelessProcessGroup, dict[tuple[str, str], Callable[[], object]]]]:
    """A group of refdist, and the timed functions, by operation and implementation."""

    def connect(name: str, create: Callable[..., Any]) -> Any:
        with place(rank, board, name) as (port, listener):
            return create(LOCAL, port, rank, world_size, listen_socket=listener)

    group = connect("refdist", StatelessProcessGroup.create)
    alone = barrier_of(StoreClient(_store(rank, world_size, board, "alone")), rank, world_size)
    gloo = connect("gloo", partial(stateless_init_torch_distributed_process_group, backend="gloo"))
    operations: dict[tuple[str, str], Callable[[], object]] = {
        ("barrier", "refdist"): group.barrier,
        ("barrier", "refdist, protocol alone"): lambda: alone.wait(60),
        ("barrier", "gloo"): lambda: gloo.barrier().wait(),
    }
    if store_features()[STORE_BARRIER]:
        steps = bare_barriers(_store(rank, world_size, board, "bare"), rank, world_size)
        for name, bare in steps.items():
            operations["barrier", "Store.barrier" if name == "arrive" else BARE + name] = bare
    groups = {"refdist": group}
    vllm = _vllm_group()
    if vllm is not None:
        groups["vLLM"] = connect("vllm", vllm)
        operations["barrier", "vLLM"] = groups["vLLM"].barrier
    operations["split and close", "refdist"] = partial(_split_and_close, group)
    obj = {"rank": rank, "address": "10.0.0.1:29500"}
    large = torch.rand(LARGE_BYTES // 4) if rank == 0 else None
    for name, some in groups.items():
        operations["all_gather_obj", name] = partial(some.all_gather_obj, obj)
    for name, some in groups.items():
        operations["broadcast_obj", name] = partial(_broadcast_from_each, some, obj)
    for name, some in groups.items():
        operations["ping-pong", name] = partial(ping_pong, some, obj)
    if world_size == 2:
        for name, some in groups.items():
            operations["64 MiB broadcast_obj", name] = partial(broadcast_and_wait, some, large)
    yield group, operations
    group.barrier()


def _broadcast_from_each(group: Any, obj: Any) -> None:
    """Broadcast from each rank in turn, so that no rank runs ahead; timed as one operation."""
    for source in range(group.world_size):
        group.broadcast_obj(obj, source)


def _split_and_close(group: StatelessProcessGroup) -> None:
    """Make a part of all ranks. The last of them to close it deletes its keys."""
    part = group.split(0)
    assert part is not None
    part.close()


def ping_pong(group: Any, obj: Any) -> None:
    """Send an object from rank 0 to rank 1 and back."""
    if group.rank == 0:
        group.send_obj(obj, 1)
        group.recv_obj(1)
    elif group.rank == 1:
        group.recv_obj(0)
        group.send_obj(obj, 0)


def broadcast_and_wait(group: Any, obj: Any) -> None:
    """Broadcast from rank 0, and wait until rank 1 has the object."""
    group.broadcast_obj(obj, 0)
    if group.rank == 1:
        group.send_obj(None, 0)
    else:
        group.recv_obj(1)


def _vllm_group() -> Callable[..., Any] | None:
    try:
        from vllm.distributed.utils import (  # type: ignore[import-not-found]
            StatelessProcessGroup as VllmGroup,
        )
    except ImportError:
        return None
    create: Callable[..., Any] = VllmGroup.create
    return create


def _store(rank: int, world_size: int, board: TCPStore, name: str) -> TCPStore:
    with place(rank, board, name) as (port, listener):
        return create_tcp_store(LOCAL, port, listener, is_master=rank == 0, timeout=_MINUTES)


def _time_threads(
    process: int, processes: int, board: TCPStore, ranks: int, repeats: int
) -> dict[str, list[float]]:
    """The seconds of one process from the start of a barrier until its threads have passed."""
    mine = range(process, ranks, processes)
    together = barrier_of(
        StoreClient(_store(process, processes, board, "processes")), process, processes
    )
    store = _store(process, processes, board, f"threads/{ranks}")
    stores = [store, *(create_tcp_store(LOCAL, store.port, timeout=_MINUTES) for _ in mine[1:])]
    barriers = [
        barrier_of(StoreClient(store), rank, ranks)
        for store, rank in zip(stores, mine, strict=True)
    ]

    def bare(index: int, turn: int) -> None:
        some, rank = stores[index], mine[index]
        some.set(f"bare/{turn}/{rank}", "arrived")
        if some.add(f"bare/{turn}", 1) == ranks:
            some.set(f"bare/{turn}/all", "")
        some.wait([f"bare/{turn}/all"], _MINUTES)
        some.set(f"bare/{turn}/{rank}", "left")

    def barrier(index: int, turn: int) -> None:
        barriers[index].wait(60)

    steps = {"refdist": barrier, "set, add, wait, set": bare}
    turns = [(name, turn) for turn in range(repeats + 1) for name in steps]
    # the threads and this one meet before and after each turn
    turnstile = threading.Barrier(len(mine) + 1, timeout=60)

    def run(index: int) -> None:
        try:
            for name, turn in turns:
                turnstile.wait()
                steps[name](index, turn)
                turnstile.wait()
        except BaseException:
            turnstile.abort()
            raise

    for index in range(len(mine)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    times: dict[str, list[float]] = {}
    for name, turn in turns:
        together.wait(60)
        start = time.perf_counter()
        turnstile.wait()
        turnstile.wait()
        # the first turn warms up
        if turn > 0:
            times.setdefault(name, []).append(time.perf_counter() - start)
    together.wait(60)
    return times
