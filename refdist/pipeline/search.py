"""The exact search for the best partition, by dynamic programme.

Requests share the key-value cache. So a partition with more blocks decodes more requests at once,
and this changes the time of every stage. The search takes the possible numbers of blocks one by
one, the largest first. For each number, the programme finds the partition with at least that many
blocks whose slowest stage is fastest. The search stops when even a perfectly balanced pipeline with
the next number of blocks could not be faster than the best so far.

The search is exact because of two properties of the costs. A stage with more layers has no more
blocks and is no faster. A micro-batch with more requests takes no longer for each of them, so a
partition with all its blocks is at least as good as with the number in the search.
"""

import math
from collections.abc import Callable, Mapping

from refdist.pipeline.catalog import Device
from refdist.pipeline.cost import (
    sequences_per_micro_batch,
    stage_decode_seconds,
    stage_kv_blocks,
    stage_prefill_seconds,
)
from refdist.pipeline.models import Model
from refdist.pipeline.rules import specification
from refdist.pipeline.serving import Serving

_Cost = Callable[[range], float]
_Total = Callable[[float, float, range], float]  # total so far, cost and layers of the next stage


class Search:
    """The search over all partitions for a model, a device and a number of stages."""

    def __init__(self, model: Model, device: Device, pp_size: int, serving: Serving) -> None:
        self._model, self._device, self._serving = model, device, serving
        self._num_layers, self._pp_size = model.num_hidden_layers, pp_size
        self._blocks = self._remembered(self._stage_blocks)

    def most_blocks(self) -> int:
        """The most cache blocks of any partition; below 1 if there is no room."""
        even = specification(self._num_layers, self._pp_size)
        limit = -max(1, self.blocks_of(even))
        least, stages = self._programme(lambda layers: -self._blocks(layers), limit, _larger)
        return int(-least) if stages else 0

    def roomiest(self, blocks: int) -> list[range]:
        """The most even partition with at least this many blocks."""
        return self._most_even(lambda layers: -self._blocks(layers), -blocks)

    def blocks_of(self, stages: list[range]) -> int:
        """The cache blocks of a partition."""
        return int(min(map(self._blocks, stages)))

    def fastest(self, most: int, weights: Mapping[str, float]) -> list[range]:
        """The most even of the partitions whose slowest stage is fastest."""
        stages = self.roomiest(most)
        cost = self._cost(most, weights)
        least = max(map(cost, stages))
        # without decode, the number of blocks does not matter, if each stage has one
        for blocks in self._possible_blocks(most) if weights["decode"] else [1]:
            if self._least_mean(blocks, weights) >= least:
                break
            limit = math.nextafter(least, 0)
            _, faster = self._programme(self._cost(blocks, weights), limit, _larger)
            if faster:
                cost = self._cost(self.blocks_of(faster), weights)
                least = max(map(cost, faster))
        return self._most_even(cost, least)

    def _stage_blocks(self, layers: range) -> float:
        first, last = layers.start == 0, layers.stop == self._num_layers
        return stage_kv_blocks(self._model, self._device, layers, first, last, self._serving)

    def _cost(self, blocks: int, weights: Mapping[str, float]) -> _Cost:
        """The cost of a stage: its seconds for a request, infinite if it has fewer blocks."""
        sequences = sequences_per_micro_batch(blocks, self._pp_size, self._serving)

        def cost(layers: range) -> float:
            if self._blocks(layers) < blocks:
                return math.inf
            return self._seconds(layers, sequences, weights)

        return self._remembered(cost)

    def _seconds(self, layers: range, sequences: float, weights: Mapping[str, float]) -> float:
        model, device, serving = self._model, self._device, self._serving
        last, seconds = layers.stop == self._num_layers, 0.0
        if weights["prefill"]:
            prefill = stage_prefill_seconds(model, device, layers, last, serving)
            seconds += weights["prefill"] * prefill / serving.chunk_tokens
        if weights["decode"]:
            decode = stage_decode_seconds(model, device, layers, last, serving, sequences)
            seconds += weights["decode"] * decode / sequences
        return seconds

    def _possible_blocks(self, most: int) -> list[int]:
        """All numbers of blocks that a stage can have, from ``most`` downwards."""
        n = self._num_layers
        stages = (range(start, stop) for start in range(n) for stop in range(start + 1, n + 1))
        return sorted({int(b) for b in map(self._blocks, stages) if 1 <= b <= most}, reverse=True)

    def _least_mean(self, blocks: int, weights: Mapping[str, float]) -> float:
        """A lower bound for the slowest stage with these blocks: the model's seconds, shared."""
        sequences = sequences_per_micro_batch(blocks, self._pp_size, self._serving)
        return self._seconds(range(self._num_layers), sequences, weights) / self._pp_size

    def _remembered(self, cost: _Cost) -> _Cost:
        """The same cost, computed once for stages with equal layers of each kind and equal ends."""
        known: dict[tuple[int, int, bool, bool], float] = {}

        def remembered(layers: range) -> float:
            start, stop = layers.start, layers.stop
            dense = self._model.dense_among(layers)
            key = (dense, stop - start, start == 0, stop == self._num_layers)
            if key not in known:
                known[key] = cost(layers)
            return known[key]

        return remembered

    def _most_even(self, cost: _Cost, limit: float) -> list[range]:
        """The most even partition whose stages all cost at most ``limit``."""
        return self._programme(cost, limit, _add_square)[1]

    def _programme(self, cost: _Cost, limit: float, total: _Total) -> tuple[float, list[range]]:
        """The partition with the least total whose stages all cost at most ``limit``.

        Stage by stage, it keeps the best way to place the layers before each layer. A stage with
        more layers costs no less. So no stage is longer than the longest within the limit, or so
        short that the stages after it could not hold the rest.

        Returns:
            The total and the stages; infinity and none if no partition stays within the limit.
        """
        n, longest = self._num_layers, self._longest(cost, limit)
        tables: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for stages_after in reversed(range(self._pp_size)):
            reached: dict[int, tuple[float, int]] = {}
            for start, (before, _) in tables[-1].items():
                shortest = max(1, n - start - stages_after * longest)
                for stop in range(start + shortest, n - stages_after + 1):
                    layers = range(start, stop)
                    own = cost(layers)
                    if own > limit:
                        break
                    value = total(before, own, layers)
                    if stop not in reached or value < reached[stop][0]:
                        reached[stop] = value, start
            tables.append(reached)
        if not tables[-1]:
            return math.inf, []
        value, start = tables[-1][n]
        stages = [range(start, n)]
        for table in reversed(tables[1:-1]):
            stages.append(range(table[stages[-1].start][1], stages[-1].start))
        return value, stages[::-1]

    def _longest(self, cost: _Cost, limit: float) -> int:
        """The most layers that a stage can hold within the limit."""
        longest = 0
        for start in range(self._num_layers):
            while (
                start + longest < self._num_layers
                and cost(range(start, start + longest + 1)) <= limit
            ):
                longest += 1
        return longest


def _larger(so_far: float, own: float, layers: range) -> float:
    return max(so_far, own) if layers.start else own


def _add_square(so_far: float, own: float, layers: range) -> float:
    return so_far + len(layers) ** 2
