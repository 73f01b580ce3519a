"""The cost of a barrier: requests to the store and milliseconds, for several world sizes.

Each rank is a process of this machine. A barrier may be a function of a notebook. It reaches the
processes as functions reach engines, so it can use its arguments and what it imports itself, and
besides ``timedelta``, but no other variables of the notebook.
"""

import builtins
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ipyparallel.serialize import can, uncan
from torch.distributed import PrefixStore, TCPStore

from refdist.barrier import barrier_of
from refdist.benchmarks.launch import run_ranks
from refdist.lab.requests import LoggedStore
from refdist.store.client import StoreClient, quiet

WORLD_SIZES = (2, 4, 8, 16)
REFDIST = "refdist"
_USES, _REPEATS = 15, 5
_PATIENCE_SECONDS = 60.0

BarrierFunction = Callable[[Any, int, int, int], object]
"""A barrier: a function of the store, the rank, the world size, and the number of the use."""


@dataclass(frozen=True)
class BarrierCost:
    """The cost of one barrier.

    Attributes:
        name: of the kind of barrier.
        world_size: number of ranks.
        requests: to the store, of all ranks together: the mean over several barriers.
        milliseconds: of one barrier. The slowest rank counts, in the fastest of several repeats.
    """

    name: str
    world_size: int
    requests: float
    milliseconds: float


def barrier_costs(
    functions: Mapping[str, BarrierFunction], world_sizes: Sequence[int] = WORLD_SIZES
) -> list[BarrierCost]:
    """Measure barriers of this notebook, and ``"refdist"`` before them, in turns.

    Args:
        functions: the barriers, by name.
        world_sizes: numbers of ranks.
    """
    packed = {name: pickle.dumps(can(function)) for name, function in functions.items()}
    costs = []
    for world_size in world_sizes:
        ranks = run_ranks(_measure, world_size, packed, seconds=_PATIENCE_SECONDS)
        for name in ranks[0]:
            requests = sum(rank[name][0] for rank in ranks) / _USES
            repeats = zip(*(rank[name][1] for rank in ranks), strict=True)
            seconds = min(max(repeat) for repeat in repeats) / _USES
            costs.append(BarrierCost(name, world_size, requests, seconds * 1e3))
    return costs


def _measure(
    rank: int, world_size: int, board: TCPStore, packed: Mapping[str, bytes]
) -> dict[str, tuple[int, list[float]]]:
    """For each barrier, the requests of this rank in a repeat, and the seconds of each repeat."""
    names = {"__builtins__": builtins, "timedelta": timedelta}
    functions = {name: uncan(pickle.loads(one), names) for name, one in packed.items()}
    logged: Any = {name: LoggedStore(PrefixStore(name, board)) for name in functions}
    logged = {REFDIST: LoggedStore(board), **logged}
    shipped = barrier_of(StoreClient(logged[REFDIST]), rank, world_size)
    times: dict[str, list[float]] = {name: [] for name in logged}
    counts: dict[str, int] = {}
    with quiet():
        for repeat in range(_REPEATS + 1):
            for name, store in logged.items():
                shipped.wait(_PATIENCE_SECONDS)
                store.log.clear()
                start = time.perf_counter()
                for number in range(repeat * _USES, (repeat + 1) * _USES):
                    if name == REFDIST:
                        shipped.wait(_PATIENCE_SECONDS)
                    else:
                        functions[name](store, rank, world_size, number)
                times[name].append(time.perf_counter() - start)
                counts[name] = len(store.log)
        shipped.wait(_PATIENCE_SECONDS)
    # the first repeat warms up
    return {name: (counts[name], times[name][1:]) for name in logged}
