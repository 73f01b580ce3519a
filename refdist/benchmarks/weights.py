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

LAYERS, VOCABULARY = 24, 151936
_HIDDEN, _INTERMEDIATE, _KEYS_AND_VALUES = 896, 4864, 128
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
    """

    way: str
    world_size: int
    num_bytes: int
    buffer_bytes: int
    seconds: float
    ratio: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes of the weights that reach each receiver in a second."""
        return self.num_bytes / self.seconds


def qwen_weights(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Weights of zeros with names and shapes of Qwen2.5-0.5B: 290 in bfloat16, 988 MB.

    Source: Qwen/Qwen2.5-0.5B, config.json; the output shares the embedding.
    """
    hidden, wide, narrow = _HIDDEN, _INTERMEDIATE, _KEYS_AND_VALUES
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
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
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes["norm.weight"] = (hidden,)
    return {
        f"model.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }


def time_weights(
    world_size: int = 2,
    buffer_bytes: int = BUFFER_BYTES,
    repeats: int = 9,
    layers: int = LAYERS,
    vocabulary: int = VOCABULARY,
) -> list[WeightsTiming]:
    """Time each way over gloo, on ranks that are processes of this machine.

    Raises:
        RuntimeError: a rank raised, died or did not end in time, or weights arrived wrong.
    """
    ranks = run_ranks(_time_as_rank, world_size, buffer_bytes, repeats, layers, vocabulary)
    num_bytes, _ = ranks[0]
    times = {
        way: [max(of_ranks) for of_ranks in zip(*(times[way] for _, times in ranks), strict=True)]
        for way in WAYS
    }
    return [
        WeightsTiming(
            way, world_size, num_bytes, buffer_bytes, median(times[way]),
            median(bare / own for bare, own in zip(times["bare"], times[way], strict=True)),
        )
        for way in WAYS
    ]  # fmt: skip


def _time_as_rank(
    rank: int,
    world_size: int,
    board: Store,
    buffer_bytes: int,
    repeats: int,
    layers: int,
    vocabulary: int,
) -> tuple[int, dict[str, list[float]]]:
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
        if sends:
            send_weights(weights, communicator, packed=packed, buffer_bytes=buffer_bytes)
        else:
            receive_into(weights, communicator, 0, packed=packed, buffer_bytes=buffer_bytes)

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
