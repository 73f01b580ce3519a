"""The requests of a barrier alone: a lower bound for any Python code around them.

``refdist.barrier`` arrives, confirms and departs. It also signs a roll and resets keys. Here the
same requests go to the store with nothing between them: no deadline, no outcome, no names. Each
step includes the steps before it, so the steps show the cost of each part of the protocol.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from refdist.barrier.roll import ENTRY

STEPS = ("arrive", "confirm", "depart", "sign", "reset")
"""``arrive`` alone is ``Store.barrier``."""

_MINUTES = timedelta(minutes=5)
_SIGNATURE = "." * ENTRY.size
_OPEN = 1 << 30  # more than the ranks add to a key that they wait for


def bare_barriers(store: Any, rank: int, world_size: int) -> dict[str, Callable[[], None]]:
    """For each step, a function that sends a barrier's requests up to this step.

    The name of such a function lists its steps, as in "arrive, confirm".

    Args:
        store: a store that has ``Store.barrier``.
        rank: rank of the caller; rank 0 departs last.
        world_size: number of ranks, which all call the same functions in the same order.
    """
    return {
        ", ".join(STEPS[:count]): _Bare(store, rank, world_size, STEPS[:count])
        for count in range(1, len(STEPS) + 1)
    }


class _Bare:
    def __init__(self, store: Any, rank: int, world_size: int, steps: tuple[str, ...]) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._steps = steps
        self._prefix = f"bare/{len(steps)}/"
        self._number = 0

    def __call__(self) -> None:
        # counts go on from one barrier to the next, so that only the last step resets keys
        self._number += 1
        everyone = self._number * self._world_size
        store, roll = self._store, f"{self._prefix}roll/{self._number % 3}"
        arrived, state, left = (self._prefix + key for key in ("arrived", "state", "left"))
        if "sign" in self._steps:
            store.append(roll, _SIGNATURE)
        store.barrier(arrived, everyone, _MINUTES)
        if "sign" in self._steps and self._rank != 0:
            store.append(roll, _SIGNATURE)
        if "confirm" in self._steps:
            last = store.add(state, 1) == everyone
        if "reset" in self._steps and self._rank == 0:
            before = f"{self._prefix}roll/{(self._number - 1) % 3}"
            others = ["reset/1", "reset/2", "reset/3", "reset/4"]
            store.multi_set([before, *others], ["", "0", "0", "0", "0"])
        if "depart" not in self._steps:
            return
        opened = self._number * _OPEN
        if last and self._rank != 0:
            store.set(left, str(opened))
        elif not last and self._rank == 0:
            store.barrier(left, opened, _MINUTES)
