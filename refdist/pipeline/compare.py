"""The rules and the best partition side by side, for a model on a number of devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from refdist.pipeline.best import best_partition
from refdist.pipeline.catalog import Device
from refdist.pipeline.cost import (
    decode_tokens_per_second,
    kv_blocks,
    prefill_tokens_per_second,
    requests_per_second,
)
from refdist.pipeline.models import Model
from refdist.pipeline.rules import RULES, faults
from refdist.pipeline.serving import Serving

BEST = "best"
"""The name of the row of ``best_partition``."""


@dataclass(frozen=True)
class Assessment:
    """The cost model's numbers for one partition.

    Attributes:
        rule: name of the partition's rule.
        stages: the layers of each stage; empty if the rule refused.
        kv_blocks: blocks of the pipeline; 0 if a stage has no room.
        prefill_tokens_per_second: rate of a pipeline that is always full.
        decode_tokens_per_second: the same, with as many requests as the cache has room for.
        requests_per_second: rate with both in turn.
        remarks: reason why the rule refused, or faults of its answer.
    """

    rule: str
    stages: tuple[range, ...]
    kv_blocks: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    requests_per_second: float
    remarks: tuple[str, ...] = ()

    @property
    def layers_per_stage(self) -> list[int]:
        """The number of layers of each stage."""
        return [len(stage) for stage in self.stages]


def assess(
    rule: str, model: Model, device: Device, stages: Sequence[range], serving: Serving
) -> Assessment:
    """Assess a partition with the cost model. ``rule`` is its name."""
    blocks = kv_blocks(model, device, stages, serving)
    remarks = faults(stages, model.num_hidden_layers)
    if not blocks:
        remarks.append("no room for the key-value cache")
    return Assessment(
        rule,
        tuple(stages),
        blocks,
        prefill_tokens_per_second(model, device, stages, serving),
        decode_tokens_per_second(model, device, stages, serving),
        requests_per_second(model, device, stages, serving),
        tuple(remarks),
    )


def compare(
    model: Model,
    device: Device,
    pp_size: int,
    objective: str | Mapping[str, float] = "mix",
    serving: Serving | None = None,
) -> list[Assessment]:
    """Assess every rule, then the best partition for the objective. See ``best_partition``.

    The row of a rule that refuses has no stages, and the reason as a remark.

    Raises:
        ValueError: an argument is out of its range, or there is no best partition.
    """
    serving = serving or Serving()
    rows = []
    for name, rule in RULES.items():
        try:
            stages = rule(model.num_hidden_layers, pp_size, model.weights)
        except ValueError as error:
            reason = str(error).removeprefix(f"{name}: ")  # the row has the name already
            rows.append(Assessment(name, (), 0, 0.0, 0.0, 0.0, (reason,)))
        else:
            rows.append(assess(name, model, device, stages, serving))
    best = best_partition(model, device, pp_size, objective, serving)
    return [*rows, assess(BEST, model, device, best.stages, serving)]


def table(rows: Sequence[Assessment]) -> str:
    """The rows as text: blocks and rates of each, with their ratios to the first row's."""
    stages = [shortened(row.layers_per_stage) for row in rows]
    width = max(len("layers"), *map(len, stages))
    lines = [
        f"{'rule':28}  {'layers':{width}}  {'KV blocks':>18}  {'prefill tokens/s':>17}  "
        f"{'decode tokens/s':>17}  {'requests/s':>17}"
    ]
    first = rows[0]
    for row, layers in zip(rows, stages, strict=True):
        cells = [f"{row.rule:28}  {layers:{width}}"]
        if row.stages:
            cells += [
                f"{row.kv_blocks:10,} {_ratio(row.kv_blocks, first.kv_blocks)}",
                _cell(row.prefill_tokens_per_second, first.prefill_tokens_per_second),
                _cell(row.decode_tokens_per_second, first.decode_tokens_per_second),
                _cell(row.requests_per_second, first.requests_per_second, ".3f"),
            ]
        lines.append("  ".join([*cells, "; ".join(row.remarks)]).rstrip())
    return "\n".join(lines)


def shortened(layers_per_stage: Sequence[int]) -> str:
    """``[7, 11, 11, 11, 7]`` as ``"7 3x11 7"``."""
    runs = [(count, len(list(run))) for count, run in groupby(layers_per_stage)]
    return " ".join(str(count) if times == 1 else f"{times}x{count}" for count, times in runs)


def _cell(value: float, reference: float, form: str = ",.0f") -> str:
    return f"{value:9{form}} {_ratio(value, reference)}"


def _ratio(value: float, reference: float) -> str:
    return f"(x{value / reference:.2f})" if reference else "       "
