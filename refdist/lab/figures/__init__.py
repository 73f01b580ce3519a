"""Figures of plain data: barrier events, schedules, partitions, timings. Each returns one Figure.

A hatch, a marker or a label repeats every distinction by colour.
"""

try:
    import matplotlib  # noqa: F401  # so that one place reports its absence
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"refdist.lab.figures needs {error.name}: pip install 'refdist[notebooks]'", name=error.name
    ) from None

from refdist.lab.figures.all_reduce import all_reduce_times, all_reduce_ways, size_name
from refdist.lab.figures.barriers import barrier_timeline, keys_over_time
from refdist.lab.figures.partitions import (
    gain_against_room,
    imbalance_maps,
    rates,
    remainder_map,
    rules_side_by_side,
    stages_of_models,
)
from refdist.lab.figures.pipelines import (
    memory_of_stages,
    pipeline_timeline,
    predicted_against_measured,
)
from refdist.lab.figures.schedules import schedule

__all__ = [
    "all_reduce_times",
    "all_reduce_ways",
    "barrier_timeline",
    "gain_against_room",
    "imbalance_maps",
    "keys_over_time",
    "memory_of_stages",
    "pipeline_timeline",
    "predicted_against_measured",
    "rates",
    "remainder_map",
    "rules_side_by_side",
    "schedule",
    "size_name",
    "stages_of_models",
]
