"""The layers of a pipeline stage, by the specification."""

import os
import re

from refdist.checks import check_integer

PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"


def get_pp_indices(num_hidden_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
    """The layers of pipeline stage ``pp_rank``, as a half-open range.

    Every stage gets ``num_hidden_layers // pp_size`` layers. The remaining layers go, one each, to
    the stages before the last, from the back to the front. The last stage gets none, because it
    holds the final norm and the output embedding. The first gets one only after all between have
    one, because it holds the input embedding.

    The environment variable ``VLLM_PP_LAYER_PARTITION`` overrides the rule with an explicit list
    of layers per stage, such as ``"15,15,16,15"``. It is read at each call.

    Args:
        num_hidden_layers: layers of the model, at least 0.
        pp_rank: the stage, 0 to ``pp_size - 1``.
        pp_size: number of stages, at least 1. A stage may be empty if there are more stages
            than layers.

    Returns:
        The range ``(start, end)``. The stage holds the layers ``start`` to ``end - 1``, and all
        stages together hold every layer exactly once, in order.

    Raises:
        ValueError: an argument is out of its range, or the override is malformed, has not
            ``pp_size`` entries, or does not sum to ``num_hidden_layers``.

    Source: the specification of ``vllm.distributed.utils``.
    """
    num_hidden_layers = check_integer("num_hidden_layers", num_hidden_layers)
    pp_rank, pp_size = check_integer("pp_rank", pp_rank), check_integer("pp_size", pp_size)
    if num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers={num_hidden_layers}: must be at least 0")
    if pp_size < 1:
        raise ValueError(f"pp_size={pp_size}: must be at least 1")
    if not 0 <= pp_rank < pp_size:
        raise ValueError(f"pp_rank={pp_rank}: must be in 0..{pp_size - 1} (pp_size={pp_size})")
    override = os.environ.get(PARTITION_VARIABLE)
    if override is None:
        layers_per_stage = spread_remainder(num_hidden_layers, pp_size)
    else:
        layers_per_stage = _parse_partition(override, num_hidden_layers, pp_size)
    start = sum(layers_per_stage[:pp_rank])
    return start, start + layers_per_stage[pp_rank]


def spread_remainder(num_hidden_layers: int, pp_size: int) -> list[int]:
    """The layers of each stage by the rule of ``get_pp_indices``, without the override."""
    quotient, remainder = divmod(num_hidden_layers, pp_size)
    layers_per_stage = [quotient] * pp_size
    for distance_from_end in range(2, remainder + 2):
        layers_per_stage[-distance_from_end] += 1
    return layers_per_stage


def _parse_partition(text: str, num_hidden_layers: int, pp_size: int) -> list[int]:
    where = f"{PARTITION_VARIABLE}={text!r}"
    entries = text.split(",")
    if not all(re.fullmatch(r"\s*[+-]?[0-9]+\s*", entry) for entry in entries):
        raise ValueError(f"{where}: must be integers separated by commas, such as '15,15,16,15'")
    layers_per_stage = [int(entry) for entry in entries]
    if min(layers_per_stage) < 0:
        raise ValueError(f"{where}: no stage can hold {min(layers_per_stage)} layers")
    if len(layers_per_stage) != pp_size:
        raise ValueError(f"{where}: has {len(layers_per_stage)} entries, but pp_size={pp_size}")
    if sum(layers_per_stage) != num_hidden_layers:
        raise ValueError(
            f"{where}: sums to {sum(layers_per_stage)}, but num_hidden_layers={num_hidden_layers}"
        )
    return layers_per_stage
