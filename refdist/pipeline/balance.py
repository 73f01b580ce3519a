"""DeepSpeed's way to cut a row of weights into parts: a dynamic programme over prefixes.

The programme extends the best cut of each prefix by one part at a time. For each prefix, it keeps
the cut whose heaviest and lightest part differ least. This cut is not always a prefix of the best
cut of the whole row, because a later part may be heavier or lighter than all of its parts. So the
result is good, but its difference is not always the least. The tests show rows where it is not.
"""

from functools import lru_cache

import torch


def balanced_cuts(weights: tuple[float, ...], parts: int) -> list[int]:
    """Cut a row of weights into parts.

    Args:
        weights: weights of the items, each at least 0.
        parts: number of parts, at least 1. With no more items than parts, each item is a part, and
            the last parts are empty.

    Returns:
        ``parts + 1`` positions ``p``: part ``i`` holds the items ``p[i]`` to ``p[i + 1] - 1``.

    Source: ``partition_balanced`` in DeepSpeed's ``deepspeed/runtime/utils.py``.
    """
    if len(weights) <= parts:
        return [min(part, len(weights)) for part in range(parts + 1)]
    return _programme(weights).cuts(parts)


class _Programme:
    """One row of weights, with a table for each number of parts, made at its first use."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        sums = torch.tensor([0.0, *weights], dtype=torch.float64).cumsum(0)
        ends = torch.arange(len(sums))
        self._weight = sums[:, None] - sums[None, :]  # of the items from column to row - 1
        self._backwards = ends[None, :] >= ends[:, None]
        # of the best cut of each prefix; with no parts yet, only the empty prefix has a cut
        self._heaviest = torch.where(ends == 0, 0.0, torch.inf).double()
        self._lightest = torch.full_like(self._heaviest, torch.inf)
        self._last_cuts: list[list[int]] = []

    def cuts(self, parts: int) -> list[int]:
        while len(self._last_cuts) < parts:
            self._add_part()
        found = [len(self._heaviest) - 1]
        for last_cut in reversed(self._last_cuts[:parts]):
            found.append(last_cut[found[-1]])
        return found[::-1]

    def _add_part(self) -> None:
        heaviest = torch.maximum(self._heaviest[None, :], self._weight)
        lightest = torch.minimum(self._lightest[None, :], self._weight)
        difference = (heaviest - lightest).masked_fill(self._backwards, torch.inf)
        # DeepSpeed takes the last of equal cuts
        cut = difference.shape[1] - 1 - difference.flip(1).argmin(1)
        reached = difference.gather(1, cut[:, None])[:, 0].isfinite()
        self._heaviest = heaviest.gather(1, cut[:, None])[:, 0].where(reached, torch.inf)
        self._lightest = lightest.gather(1, cut[:, None])[:, 0].where(reached, torch.inf)
        self._last_cuts.append(cut.tolist())


_programme = lru_cache(maxsize=4)(_Programme)
