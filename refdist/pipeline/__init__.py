"""Pipeline partitions: the specification's function, the rules of engines, costs, and the best.

``specification`` has ``get_pp_indices``. ``rules`` has the rules that engines use, and ``balance``
has the dynamic programme of one rule. ``models`` and ``catalog`` have models and devices as data.
``cost`` computes the costs of a partition, and ``best`` finds the best partition. ``compare``
shows all of them side by side. ``measured`` compares the cost model with a measurement.
``python -m refdist.pipeline`` prints a comparison.
"""

from refdist.pipeline.best import OBJECTIVES, BestPartition, best_partition
from refdist.pipeline.catalog import DEVICES, MODELS, Device, find_device, find_model
from refdist.pipeline.compare import Assessment, assess, compare, table
from refdist.pipeline.models import GroupedQueryAttention, LatentAttention, Model
from refdist.pipeline.rules import RULES, Rule, faults, own_count_times_rank
from refdist.pipeline.serving import Serving
from refdist.pipeline.specification import PARTITION_VARIABLE, get_pp_indices

__all__ = [
    "DEVICES",
    "MODELS",
    "OBJECTIVES",
    "PARTITION_VARIABLE",
    "RULES",
    "Assessment",
    "BestPartition",
    "Device",
    "GroupedQueryAttention",
    "LatentAttention",
    "Model",
    "Rule",
    "Serving",
    "assess",
    "best_partition",
    "compare",
    "faults",
    "find_device",
    "find_model",
    "get_pp_indices",
    "own_count_times_rank",
    "table",
]


def __dir__() -> list[str]:
    return __all__
