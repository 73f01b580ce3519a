"""Figures of plain data: barrier events, schedules, partitions, timings. Each returns one Figure.

A hatch, a marker or a label repeats every distinction by colour.
"""

try:
    import matplotlib  # noqa: F401  # so that one place reports its absence
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"refdist.lab.figures needs {error.name}: pip install '.[notebooks]'", name=error.name
    ) from None

from refdist.lab.figures.all_reduce import (
    all_reduce_times,
    all_reduce_ways,
    buckets_over_time,
    ring_steps,
    size_name,
    times_over_ranks,
)
from refdist.lab.figures.barriers import barrier_timeline, cost_of_barriers, keys_over_time
from refdist.lab.figures.groups import memberships
from refdist.lab.figures.hangs import call_grid
from refdist.lab.figures.pipelines import (
    memory_of_stages,
    pipeline_timeline,
    remainder_map,
)
from refdist.lab.figures.schedules import schedule
from refdist.lab.figures.strangers import attack_times, waits_of_hosts

__all__ = [
    "all_reduce_times",
    "all_reduce_ways",
    "attack_times",
    "barrier_timeline",
    "buckets_over_time",
    "call_grid",
    "cost_of_barriers",
    "keys_over_time",
    "memberships",
    "memory_of_stages",
    "pipeline_timeline",
    "remainder_map",
    "ring_steps",
    "schedule",
    "size_name",
    "times_over_ranks",
    "waits_of_hosts",
]


def __dir__() -> list[str]:
    return __all__
