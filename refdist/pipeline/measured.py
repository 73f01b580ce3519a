"""The cost model, compared with a published measurement."""

from dataclasses import dataclass, replace

from refdist.pipeline.catalog import DEVICES, MODELS, Device
from refdist.pipeline.cost import (
    decode_tokens_per_second,
    kv_blocks,
    kv_bytes_per_token,
    prefill_tokens_per_second,
    room_bytes,
    weight_bytes_per_stage,
)
from refdist.pipeline.models import Model
from refdist.pipeline.rules import lighter_ends, remainder_last
from refdist.pipeline.serving import Serving


@dataclass(frozen=True)
class MeasuredCase:
    """One model on one machine, run twice with different partitions.

    Attributes:
        model: the model that was served.
        device: the device of each stage.
        serving: its serving settings, as far as known.
        stages: the layers of each stage, in the first run and in the second.
        kv_blocks: blocks of the key-value cache that the engine reported in each run.
        seconds: time of each run, end to end.
        source: source of the measurement.
    """

    model: Model
    device: Device
    serving: Serving
    stages: tuple[list[range], list[range]]
    kv_blocks: tuple[int, int]
    seconds: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Explanation:
    """The cost model's prediction of a case. Gains are the second run over the first.

    Attributes:
        room_gib: room for weights and cache of a stage, in GiB.
        kv_blocks: predicted blocks of each run.
        kv_gain: predicted gain of blocks.
        prefill_gain: predicted gain of prefill throughput.
        decode_gain: predicted gain of decode throughput.
    """

    room_gib: float
    kv_blocks: tuple[int, int]
    kv_gain: float
    prefill_gain: float
    decode_gain: float


_LLAMA_70B = MODELS["llama-3.1-70b"]

VLLM_PR_6920 = MeasuredCase(
    model=_LLAMA_70B,  # Llama 3 and 3.1 have the same sizes
    device=DEVICES["l4"],
    # token counts were not reported; these are usual for summaries of that data set
    serving=Serving(prompt_tokens=900, output_tokens=100, bytes_per_weight=1),
    stages=(
        remainder_last(_LLAMA_70B.num_hidden_layers, 8),
        lighter_ends(_LLAMA_70B.num_hidden_layers, 8),
    ),
    kv_blocks=(1476, 3078),
    seconds=(244.53, 167.68),
    source="vLLM pull request 6920, 2024-07-29: Llama-3-70B in FP8 on 8 x L4, summaries of 0.02% "
    "of CNN/DailyMail, even against lighter ends. Its text does not give the second partition, "
    "which is what its code returned.",
)
"""The measurement that drew attention to partitions."""


def fitted_room_bytes(case: MeasuredCase, run: int = 0) -> float:
    """The room of a stage for which the cost model predicts the blocks that one run reported.

    It is the one fitted number: the bytes of weights and reported blocks on the fullest stage.
    """
    stages, serving = case.stages[run], case.serving
    tokens = case.kv_blocks[run] * serving.block_tokens
    weights = weight_bytes_per_stage(case.model, stages, serving)
    return max(
        weight + tokens * kv_bytes_per_token(case.model, layers, serving)
        for weight, layers in zip(weights, stages, strict=True)
    )


def explain(case: MeasuredCase, room: float | None = None) -> Explanation:
    """Predict both runs.

    Args:
        case: the measured case.
        room: bytes of a stage for weights and cache; None for the device's own.
    """
    serving = case.serving
    if room is not None:
        serving = replace(serving, reserved_bytes=room_bytes(case.device, serving) - room)
    first, second = (kv_blocks(case.model, case.device, s, serving) for s in case.stages)
    prefill = [prefill_tokens_per_second(case.model, case.device, s, serving) for s in case.stages]
    decode = [decode_tokens_per_second(case.model, case.device, s, serving) for s in case.stages]
    return Explanation(
        room_bytes(case.device, serving) / 2**30,
        (first, second),
        second / first,
        prefill[1] / prefill[0],
        decode[1] / decode[0],
    )


def prefill_share(case: MeasuredCase, explanation: Explanation) -> float:
    """The share of prefill in the first run's time for which the gains give the second's time.

    It is a second fitted number, and no data is left to test it on. If it is outside 0..1, the
    gains cannot explain the times.
    """
    before, after = case.seconds
    in_prefill, in_decode = 1 / explanation.prefill_gain, 1 / explanation.decode_gain
    return (after / before - in_decode) / (in_prefill - in_decode)
