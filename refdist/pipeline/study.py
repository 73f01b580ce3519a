"""Notebook 02's studies over many cases: imbalance of the rules, and gains of the best."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from refdist.pipeline.best import best_partition
from refdist.pipeline.catalog import Device
from refdist.pipeline.cost import (
    kv_blocks,
    requests_per_second,
    room_bytes,
    sequences_per_micro_batch,
    weight_bytes_per_stage,
)
from refdist.pipeline.models import Model
from refdist.pipeline.rules import Rule, specification
from refdist.pipeline.serving import Serving


def imbalance(stages: Sequence[range], weights: Sequence[float]) -> float:
    """The excess of the heaviest stage over the mean, as a share of the mean.

    Args:
        stages: the layers of each stage.
        weights: weights of the embedding, of each layer, and of norm and head.
    """
    per_stage = [sum(weights[1 + layer] for layer in stage) for stage in stages]
    per_stage[0] += weights[0]
    per_stage[-1] += weights[-1]
    mean = sum(weights) / len(stages)
    return max(per_stage) / mean - 1


def imbalance_map(
    rule: Rule, layers: Sequence[int], sizes: Sequence[int], end_weight: float
) -> list[list[float]]:
    """The imbalance of a rule, for each number of stages (rows) and of layers (columns).

    It is NaN where the rule refuses or leaves a stage without layers.

    Args:
        rule: the rule.
        layers: numbers of layers.
        sizes: numbers of stages.
        end_weight: weight of the embedding, and of the head, in layers.
    """
    rows = []
    for pp_size in sizes:
        row = []
        for num_layers in layers:
            weights = [end_weight, *[1.0] * num_layers, end_weight]
            try:
                stages = rule(num_layers, pp_size, weights)
            except ValueError:
                stages = []
            row.append(imbalance(stages, weights) if stages and all(stages) else math.nan)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Gain:
    """The gain of the best partition over the specification's, in one case.

    Attributes:
        model: name of the model.
        device: name of the device.
        pp_size: number of stages.
        room_left: bytes that the weights leave for the cache on the mean stage, over the bytes of
            the heaviest indivisible item: a layer, the embedding or the head.
        kv_blocks: the best number over the specification's; infinite if the latter has no room.
        requests_per_second: the best rate over the specification's; infinite in the same case.
    """

    model: str
    device: str
    pp_size: int
    room_left: float
    kv_blocks: float
    requests_per_second: float


def gain(model: Model, device: Device, pp_size: int, serving: Serving) -> Gain | None:
    """Compare the best partition with the specification's. None if there is no room for requests.

    There is room if each of ``pp_size`` micro-batches can have one request on average.
    """
    try:
        roomy = best_partition(model, device, pp_size, "kv_blocks", serving)
    except ValueError:
        return None
    if sequences_per_micro_batch(roomy.kv_blocks, pp_size, serving) < 1:
        return None
    fast = best_partition(model, device, pp_size, "mix", serving)
    usual = specification(model.num_hidden_layers, pp_size)
    weights = sum(weight_bytes_per_stage(model, usual, serving)) / pp_size
    left = room_bytes(device, serving) - weights
    ends = model.head_parameters * serving.bytes_per_end_weight
    item = max(ends, max(model.weights[1:-1]) * serving.bytes_per_weight)
    before = kv_blocks(model, device, usual, serving)
    rates = [requests_per_second(model, device, s, serving) for s in (usual, fast.stages)]
    return Gain(
        model.name,
        device.name,
        pp_size,
        left / item,
        roomy.kv_blocks / before if before else math.inf,
        rates[1] / rates[0] if before else math.inf,
    )


def gains(
    models: Iterable[Model], devices: Iterable[Device], sizes: Sequence[int], serving: Serving
) -> list[Gain]:
    """The gains for these models, devices and numbers of stages, in all cases with room."""
    cases = product(models, devices, sizes)
    found = [
        gain(model, device, pp_size, serving)
        for model, device, pp_size in cases
        if pp_size <= model.num_hidden_layers
    ]
    return [case for case in found if case is not None]
