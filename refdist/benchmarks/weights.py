"""Weights of a real model over gloo: one by one, and packed, beside a bare broadcast.

The bare broadcast sends as many bytes, which lie in one tensor, in pieces of the buffer size. All
ways run in turn on the same group, so that a disturbance of the machine affects all alike, and each
has its memory before the clock runs, as in a second step of training.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.distributed import Store

from refdist.benchmarks.data_plane import form_group
from refdist.benchmarks.launch import LOCAL, run_ranks
from refdist.torch_groups import collectives
from refdist.torch_groups.process_groups import stateless_destroy_torch_distributed_process_group
from refdist.weights import BUFFER_BYTES, describe, receive_into, receive_weights, send_weights

MODEL = "Qwen2.5-0.5B"
WAYS = ("bare", "one by one", "packed", "packed, into")


@dataclass(frozen=True)
class WeightsTiming:
    """The timing of one way to send the weights.

    Attributes:
        way: ``"bare"``; ``"one by one"``, received into tensors that are there; ``"packed"``, with
            the received tensors as views of the buffer; ``"packed, into"``, with these copied into
            tensors that are there.
        world_size: number of ranks.
        num_bytes: bytes of the weights.
        buffer_bytes: size of the buffer.
        seconds: time from a barrier to a barrier, the median over the repeats.
        ratio: the bare broadcast's time over this one's, the median over the repeats.
        model: a key of ``MODELS``.
    """

    way: str
    world_size: int
    num_bytes: int
    buffer_bytes: int
    seconds: float
    ratio: float
    model: str = MODEL

    @property
    def bytes_per_second(self) -> float:
        """Bytes of the weights that reach each receiver in a second."""
        return self.num_bytes / self.seconds


@dataclass(frozen=True)
class Qwen:
    """The sizes of a model. Source: its config.json in huggingface.co/Qwen.

    Attributes:
        layers: its layers, each of 12 weights.
        vocabulary: rows of the embedding.
        hidden: numbers for a token.
        wide: numbers for a token within the feed-forward part.
        narrow: numbers for the keys of a token, and for its values.
        has_head: whether the output has weights of its own; else it shares the embedding.
    """

    layers: int
    vocabulary: int
    hidden: int
    wide: int
    narrow: int
    has_head: bool


MODELS = {
    "Qwen2.5-0.5B": Qwen(24, 151936, 896, 4864, 128, has_head=False),
    "Qwen2.5-7B": Qwen(28, 152064, 3584, 18944, 512, has_head=True),
}
"""290 weights in bfloat16 of 0.99 GB, and 339 of 15.2 GB."""

LAYERS, VOCABULARY = MODELS[MODEL].layers, MODELS[MODEL].vocabulary


def qwen_weights(
    layers: int | None = None,
    vocabulary: int | None = None,
    model: str = MODEL,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Weights of zeros in bfloat16 with names and shapes of a model.

    Args:
        layers: how many; None for as many as the model has.
        vocabulary: rows of the embedding; None for those that it has.
        model: a key of ``MODELS``.
        device: where they are.
    """
    sizes = MODELS[model]
    hidden, wide, narrow = sizes.hidden, sizes.wide, sizes.narrow
    rows = sizes.vocabulary if vocabulary is None else vocabulary
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(sizes.layers if layers is None else layers):
        in_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.k_proj.bias": (narrow,),
            "self_attn.v_proj.weight": (narrow, hidden),
            "self_attn.v_proj.bias": (narrow,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if sizes.has_head:
        shapes["lm_head.weight"] = (rows, hidden)
    return {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=device)
        for name, shape in shapes.items()
    }


def time_weights(
    world_size: int = 2,
    buffer_bytes: int = BUFFER_BYTES,
    repeats: int = 9,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> list[WeightsTiming]:
    """Time each way over gloo, on ranks that are processes of this machine.

    Raises:
        RuntimeError: a rank raised, died or did not end in time, or weights arrived wrong.
    """
    ranks = run_ranks(_time_as_rank, world_size, buffer_bytes, repeats, layers, vocabulary)
    return slowest_of(ranks, buffer_bytes, MODEL)


WeightRounds = tuple[int, dict[str, list[float]]]
"""The bytes of the weights, and the seconds of each way in each round."""


def slowest_of(ranks: Sequence[WeightRounds], buffer_bytes: int, model: str) -> list[WeightsTiming]:
    """The timing of each way, from what each rank measured: a round ends with its last rank."""
    num_bytes = ranks[0][0]
    times = {
        way: [max(of_ranks) for of_ranks in zip(*(times[way] for _, times in ranks), strict=True)]
        for way in WAYS
    }
    return [
        WeightsTiming(
            way, len(ranks), num_bytes, buffer_bytes, median(times[way]),
            median(bare / own for bare, own in zip(times["bare"], times[way], strict=True)), model,
        )
        for way in WAYS
    ]  # fmt: skip


def _time_as_rank(
    rank: int,
    world_size: int,
    board: Store,
    buffer_bytes: int,
    repeats: int,
    layers: int | None,
    vocabulary: int | None,
) -> WeightRounds:
    """The bytes of the weights, and the seconds of each way in each repeat."""
    group, _ = form_group(rank, world_size, board, LOCAL, "gloo")
    weights = qwen_weights(layers, vocabulary)
    ways = ways_of(
        weights, group, rank == 0, buffer_bytes, lambda part: collectives.broadcast(part, 0, group)
    )
    times: dict[str, list[float]] = {way: [] for way in ways}
    # the first repeat warms up, and checks that all weights arrive
    for repeat in range(repeats + 1):
        order = deque(ways)
        order.rotate(repeat)
        for way in order:
            if repeat == 0:
                fill(weights, rank)
            collectives.barrier(group)
            start = time.perf_counter()
            ways[way]()
            collectives.barrier(group)
            if repeat > 0:
                times[way].append(time.perf_counter() - start)
            elif way in ("one by one", "packed, into"):
                check_weights(weights, way)
    stateless_destroy_torch_distributed_process_group(group)
    return sum(tensor.nbytes for tensor in weights.values()), times


def ways_of(
    weights: dict[str, torch.Tensor],
    communicator: Any,
    sends: bool,
    buffer_bytes: int,
    broadcast: Callable[[torch.Tensor], None],
) -> dict[str, Callable[[], None]]:
    """One function for each way of ``WAYS``. ``broadcast`` is the bare one, from rank 0."""
    metas, any_weight = describe(weights), next(iter(weights.values()))
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    everything = torch.zeros(num_bytes, dtype=torch.uint8, device=any_weight.device)

    def bare() -> None:
        for start in range(0, num_bytes, buffer_bytes):
            broadcast(everything[start : start + buffer_bytes])

    def hand_over(packed: bool) -> None:
        how: dict[str, Any] = {"packed": packed, "buffer_bytes": buffer_bytes}
        if sends:
            send_weights(weights, communicator, metas=metas, **how)
        else:
            receive_into(weights, communicator, 0, **how)

    def views() -> None:
        if sends:
            return hand_over(True)
        for _ in receive_weights(metas, communicator, 0, buffer_bytes=buffer_bytes):
            pass
        return None

    return {
        "bare": bare,
        "one by one": lambda: hand_over(False),
        "packed": views,
        "packed, into": lambda: hand_over(True),
    }


def _content(number: int) -> float:
    return float(number % 250 + 1)


def fill(weights: dict[str, torch.Tensor], rank: int) -> None:
    """A number of its own in each weight of the source, and zeros elsewhere."""
    for number, tensor in enumerate(weights.values()):
        tensor.fill_(_content(number) if rank == 0 else 0)


def check_weights(weights: dict[str, torch.Tensor], way: str) -> None:
    """Raise RuntimeError unless each weight has what ``fill`` gave it on the source."""
    wrong: Sequence[str] = [
        name
        for number, (name, tensor) in enumerate(weights.items())
        if not bool((tensor == _content(number)).all())
    ]
    if wrong:
        raise RuntimeError(f"{way}: {len(wrong)} weights arrived wrong, first {wrong[0]}")
