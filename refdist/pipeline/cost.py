"""The costs of a partition, stage by stage: memory, key-value blocks, and time by roofline.

This is a model of a pipeline that serves a language model. Nothing in it is fitted:

- The first stage also holds the embedding. The last stage also holds the final norm and the head.
  Both hold tied embeddings.
- The key-value cache has the room that the weights leave on a stage. A request needs its blocks on
  every stage, so the stage with the fewest blocks decides for all.
- A stage takes the time of its work at the device's peak, or the time to read its weights and
  cache at the peak bandwidth, whichever is longer. Embedding lookups are free.
- In a full pipeline, the slowest stage sets the pace. The pipeline holds as many micro-batches as
  stages, and they share the cache. Sending activations is free.

A real engine reaches only a part of the peaks. So ratios between partitions mean more than seconds.

Source: Williams, Waterman and Patterson, "Roofline", 2009.
"""

from collections.abc import Sequence

from refdist.pipeline.catalog import Device
from refdist.pipeline.models import Model
from refdist.pipeline.serving import Serving


def room_bytes(device: Device, serving: Serving) -> float:
    """Bytes that weights and key-value cache of a stage may take."""
    return serving.memory_share * device.memory_bytes - serving.reserved_bytes


def weight_bytes(model: Model, layers: range, first: bool, last: bool, serving: Serving) -> float:
    """Weight bytes of one stage, with the embedding on the first, norm and head on the last.

    A pipeline of one stage holds tied embeddings once.
    """
    ends = first * model.embedding_parameters + last * model.head_parameters
    if first and last and model.tied_embeddings:
        ends -= model.embedding_parameters
    return (
        model.layer_parameters(layers) * serving.bytes_per_weight
        + ends * serving.bytes_per_end_weight
    )


def kv_bytes_per_token(model: Model, layers: range, serving: Serving) -> float:
    """Bytes that the layers of a stage cache for a token."""
    return len(layers) * model.attention.kv_elements * serving.bytes_per_kv_element


def stage_kv_blocks(
    model: Model, device: Device, layers: range, first: bool, last: bool, serving: Serving
) -> float:
    """Blocks of the key-value cache that fit on one stage; below 0 if its weights do not fit.

    A stage without layers caches nothing, so any number of blocks fits if its weights fit.
    """
    left = room_bytes(device, serving) - weight_bytes(model, layers, first, last, serving)
    block_bytes = kv_bytes_per_token(model, layers, serving) * serving.block_tokens
    if block_bytes:
        return left // block_bytes
    return float("inf") if left >= 0 else -1.0


def roofline_seconds(flops: float, num_bytes: float, device: Device, serving: Serving) -> float:
    """The longer time of computing and reading at the peaks; FP8 if weights and device allow it."""
    peak = device.flops_per_second
    if serving.bytes_per_weight <= 1 and device.fp8_flops_per_second is not None:
        peak = device.fp8_flops_per_second
    return max(flops / peak, num_bytes / device.bytes_per_second)


def stage_prefill_seconds(
    model: Model, device: Device, layers: range, last: bool, serving: Serving
) -> float:
    """Time of one stage for a micro-batch of ``chunk_tokens`` tokens of prompts.

    A token attends to half of its prompt, on average.
    """
    tokens = serving.chunk_tokens
    pairs = tokens * serving.prompt_tokens / 2
    with_logits = tokens * min(1.0, serving.tokens_with_logits / serving.prompt_tokens)
    return _stage_seconds(model, device, layers, last, serving, tokens, pairs, with_logits, tokens)


def stage_decode_seconds(
    model: Model, device: Device, layers: range, last: bool, serving: Serving, sequences: float
) -> float:
    """Time of one stage for one token of each of ``sequences`` requests: a micro-batch."""
    cached = sequences * serving.mean_context_tokens
    return _stage_seconds(
        model, device, layers, last, serving, sequences, cached, sequences, cached
    )


def _stage_seconds(
    model: Model,
    device: Device,
    layers: range,
    last: bool,
    serving: Serving,
    tokens: float,
    pairs: float,
    with_logits: float,
    cached_tokens: float,
) -> float:
    used = model.layer_parameters(layers, model.experts_per_token)
    flops = 2 * tokens * used + pairs * len(layers) * model.attention.flops_per_pair
    read = model.layer_parameters(layers, model.experts_touched(tokens)) * serving.bytes_per_weight
    read += cached_tokens * kv_bytes_per_token(model, layers, serving)
    if last:
        flops += 2 * with_logits * model.head_parameters
        read += model.head_parameters * serving.bytes_per_end_weight
    return roofline_seconds(flops, read, device, serving)


def weight_bytes_per_stage(model: Model, stages: Sequence[range], serving: Serving) -> list[float]:
    """Weights of each stage, in bytes."""
    return [weight_bytes(model, s, *_place(i, stages), serving) for i, s in enumerate(stages)]


def kv_blocks_per_stage(
    model: Model, device: Device, stages: Sequence[range], serving: Serving
) -> list[float]:
    """Blocks of the key-value cache that fit on each stage."""
    return [
        stage_kv_blocks(model, device, layers, *_place(number, stages), serving)
        for number, layers in enumerate(stages)
    ]


def kv_blocks(model: Model, device: Device, stages: Sequence[range], serving: Serving) -> int:
    """Blocks of the whole pipeline: the least over its stages; 0 if a stage has no room."""
    return int(max(0.0, min(kv_blocks_per_stage(model, device, stages, serving))))


def prefill_seconds_per_stage(
    model: Model, device: Device, stages: Sequence[range], serving: Serving
) -> list[float]:
    """Time of each stage for a micro-batch of prompts."""
    return [
        stage_prefill_seconds(model, device, layers, _place(number, stages)[1], serving)
        for number, layers in enumerate(stages)
    ]


def decode_seconds_per_stage(
    model: Model, device: Device, stages: Sequence[range], serving: Serving, sequences: float
) -> list[float]:
    """Time of each stage for one token of each of ``sequences`` requests."""
    return [
        stage_decode_seconds(model, device, layers, _place(number, stages)[1], serving, sequences)
        for number, layers in enumerate(stages)
    ]


def sequences_per_micro_batch(blocks: float, pp_size: int, serving: Serving) -> float:
    """Requests in each of ``pp_size`` micro-batches that share the cache. It is a mean."""
    return blocks * serving.block_tokens / serving.mean_context_tokens / pp_size


def batch_seconds(stage_seconds: Sequence[float], micro_batches: int) -> float:
    """Time until ``micro_batches`` have passed all stages, each as soon as it can.

    The first passes every stage. The others follow at the pace of the slowest stage.
    """
    return sum(stage_seconds) + (micro_batches - 1) * max(stage_seconds)


def bubble_share(stage_seconds: Sequence[float], micro_batches: int) -> float:
    """Share of the stages' time in which they wait.

    For equal stages it is ``(P - 1) / (M + P - 1)``. For unequal stages it is more, and does not
    vanish with many micro-batches.
    """
    busy = micro_batches * sum(stage_seconds)
    return 1 - busy / len(stage_seconds) / batch_seconds(stage_seconds, micro_batches)


def prefill_tokens_per_second(
    model: Model,
    device: Device,
    stages: Sequence[range],
    serving: Serving,
    micro_batches: int | None = None,
) -> float:
    """Prompt tokens a second: of ``micro_batches``, or of a pipeline that is always full."""
    seconds = prefill_seconds_per_stage(model, device, stages, serving)
    if micro_batches is None:
        return serving.chunk_tokens / max(seconds)
    return micro_batches * serving.chunk_tokens / batch_seconds(seconds, micro_batches)


def decode_tokens_per_second(
    model: Model, device: Device, stages: Sequence[range], serving: Serving
) -> float:
    """Generated tokens a second, with as many requests as the cache has room for."""
    blocks = kv_blocks(model, device, stages, serving)
    sequences = sequences_per_micro_batch(blocks, len(stages), serving)
    if not sequences:
        return 0.0
    return sequences / max(decode_seconds_per_stage(model, device, stages, serving, sequences))


def requests_per_second(
    model: Model, device: Device, stages: Sequence[range], serving: Serving
) -> float:
    """Requests a second, if every stage works on prompts and on answers in turn.

    For a request, each stage does its share of prefill and decode. The slowest stage sets the pace.
    """
    blocks = kv_blocks(model, device, stages, serving)
    sequences = sequences_per_micro_batch(blocks, len(stages), serving)
    if not sequences:
        return 0.0
    prefill = prefill_seconds_per_stage(model, device, stages, serving)
    decode = decode_seconds_per_stage(model, device, stages, serving, sequences)
    prompts, answers = (
        serving.prompt_tokens / serving.chunk_tokens,
        serving.output_tokens / sequences,
    )
    return 1 / max(prompts * p + answers * d for p, d in zip(prefill, decode, strict=True))


def _place(number: int, stages: Sequence[range]) -> tuple[bool, bool]:
    """Whether a stage is the first, and whether it is the last."""
    return number == 0, number == len(stages) - 1
