"""The best partition under the cost model."""

from collections.abc import Mapping
from dataclasses import dataclass

from refdist.checks import check_integer
from refdist.pipeline.catalog import Device
from refdist.pipeline.cost import room_bytes, weight_bytes
from refdist.pipeline.models import Model
from refdist.pipeline.search import Search
from refdist.pipeline.serving import Serving
from refdist.pipeline.specification import PARTITION_VARIABLE

OBJECTIVES = ("kv_blocks", "prefill", "decode", "mix")
"""The objectives that have a name."""


@dataclass(frozen=True)
class BestPartition:
    """A partition, ready for use: ``print`` shows the setting, ``environment`` sets it.

    Attributes:
        stages: the layers of each stage.
        kv_blocks: blocks of the key-value cache that the pipeline has.
    """

    stages: tuple[range, ...]
    kv_blocks: int

    @property
    def value(self) -> str:
        """The value for ``VLLM_PP_LAYER_PARTITION``: the number of layers of each stage."""
        return ",".join(str(len(stage)) for stage in self.stages)

    @property
    def environment(self) -> dict[str, str]:
        """The setting for ``os.environ.update``."""
        return {PARTITION_VARIABLE: self.value}

    def __str__(self) -> str:
        return f"{PARTITION_VARIABLE}={self.value}"


def best_partition(
    model: Model,
    device: Device,
    pp_size: int,
    objective: str | Mapping[str, float] = "mix",
    serving: Serving | None = None,
) -> BestPartition:
    """The best partition of a model on ``pp_size`` equal devices, each with at least one layer.

    Args:
        model: the model to cut.
        device: the device of each stage.
        pp_size: number of stages.
        objective: ``"kv_blocks"`` for the largest cache; ``"prefill"`` or ``"decode"`` for tokens a
            second of the full pipeline; ``"mix"`` for requests a second, with the tokens of
            ``serving``; or weights such as ``{"prefill": 4, "decode": 1}``, for requests with
            tokens in that ratio.
        serving: serving settings; None for ``Serving()``.

    Returns:
        The best partition. Of equally good ones, it has the most even numbers of layers.

    Raises:
        ValueError: there are fewer layers than stages, the objective is unknown, or no partition
            leaves room for a block of the cache on every stage.
    """
    serving = serving or Serving()
    weights = _weights(objective, serving)
    if not 1 <= check_integer("pp_size", pp_size) <= model.num_hidden_layers:
        raise ValueError(
            f"pp_size={pp_size}: must be in 1..{model.num_hidden_layers} for {model.name}"
        )
    search = Search(model, device, pp_size, serving)
    most = search.most_blocks()
    if most < 1:
        raise ValueError(_no_room(model, device, pp_size, serving))
    stages = search.roomiest(most) if weights is None else search.fastest(most, weights)
    return BestPartition(tuple(stages), search.blocks_of(stages))


def _weights(objective: str | Mapping[str, float], serving: Serving) -> dict[str, float] | None:
    """The weights of prefill and decode tokens; None if the blocks count."""
    if isinstance(objective, str):
        named: dict[str, dict[str, float] | None] = {
            "kv_blocks": None,
            "prefill": {"prefill": 1, "decode": 0},
            "decode": {"prefill": 0, "decode": 1},
            "mix": {"prefill": serving.prompt_tokens, "decode": serving.output_tokens},
        }
        if objective not in named:
            raise ValueError(f"objective={objective!r}: must be one of {', '.join(OBJECTIVES)}")
        return named[objective]
    weights = {"prefill": 0.0, "decode": 0.0} | dict(objective)
    if len(weights) > 2 or min(weights.values()) < 0 or not any(weights.values()):
        raise ValueError(
            f"objective={dict(objective)}: must weigh 'prefill' and 'decode', at least one above 0"
        )
    return weights


def _no_room(model: Model, device: Device, pp_size: int, serving: Serving) -> str:
    layers = range(model.num_hidden_layers)
    needed, room = weight_bytes(model, layers, True, True, serving), room_bytes(device, serving)
    return (
        f"{model.name} on {pp_size} x {device.name}: no partition leaves room for the key-value "
        f"cache; the weights take {needed / 2**30:.1f} GiB, and a stage has {room / 2**30:.1f} GiB"
    )
