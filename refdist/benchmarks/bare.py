"""The requests of a barrier without the barrier: what no Python around them can undercut.

``refdist.barrier`` arrives, confirms and departs, and signs a roll and resets keys besides. Here
the same requests go to the store with nothing between them: no deadline, no outcome, no names. Step
by step, each with those before, they show what each part of the protocol costs.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

STEPS = ("arrive", "confirm", "depart", "sign", "reset")
"""``arrive`` alone is ``Store.barrier``."""

_MINUTES = timedelta(minutes=5)
_SIGNATURE = "." * 16  # as long as one of refdist
_OPEN = 1 << 30  # more than all add to a gate


def bare_barriers(store: Any, rank: int, world_size: int) -> dict[str, Callable[[], None]]:
    """For each step, a function that does what a barrier asks of the store for it and those before.

    The name of such a function says what it does, as in "arrive, confirm".

    Args:
        store: has ``Store.barrier``.
        rank: of the caller; rank 0 departs last.
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
        # counts go on from one barrier to the next, so that no step but the last resets anything
        self._number += 1
        everyone = self._number * self._world_size
        store, roll = self._store, f"{self._prefix}roll/{self._number % 3}"
        arrived, state, left = (self._prefix + key for key in ("arrived", "state", "left"))
        if "sign" in self._steps:
            store.append(roll, _SIGNATURE)
        store.barrier(arrived, everyone, _MINUTES)
        if "confirm" in self._steps:
            last = store.add(state, 1) == everyone
        if "reset" in self._steps and self._rank == 0:
            before = f"{self._prefix}roll/{(self._number - 1) % 3}"
            store.multi_set(["reset/1", "reset/2"], ["0", "0"])
            store.multi_set([before, "reset/3", "reset/4"], ["", "0", "0"])
        if "depart" not in self._steps:
            return
        opened = self._number * _OPEN
        if last and self._rank != 0:
            store.set(left, str(opened))
        elif not last and self._rank == 0:
            store.barrier(left, opened, _MINUTES)
