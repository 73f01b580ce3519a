"""Weights of a real model by ``NcclCommunicator``: one by one, and packed, beside a bare broadcast.

The bare broadcast sends as many bytes, which lie in one tensor, in pieces of the buffer size. All
ways take turns.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from refdist.benchmarks.weights import WAYS, WeightsTiming, qwen_weights
from refdist.nccl import NcclCommunicator
from refdist.weights import describe, receive_into, receive_weights, send_weights

WeightRounds = tuple[int, dict[str, list[float]]]
"""The bytes of the weights, and the seconds of each way in each round."""


def slowest_of(ranks: Sequence[WeightRounds], buffer_bytes: int) -> list[WeightsTiming]:
    """The timing of each way, from what each rank measured: a round ends with its last rank."""
    num_bytes = ranks[0][0]
    times = {
        way: [max(of_ranks) for of_ranks in zip(*(times[way] for _, times in ranks), strict=True)]
        for way in WAYS
    }
    return [
        WeightsTiming(
            way, len(ranks), num_bytes, buffer_bytes, median(times[way]),
            median(bare / own for bare, own in zip(times["bare"], times[way], strict=True)),
        )
        for way in WAYS
    ]  # fmt: skip


def time_weights(
    group: ProcessGroup,
    communicator: NcclCommunicator,
    buffer_bytes: int,
    layers: int,
    vocabulary: int,
    rounds: int,
) -> WeightRounds:
    """Time each way, on every rank at the same time. The time ends when the GPU is done.

    Raises:
        RuntimeError: weights arrived wrong.
    """
    weights = {
        name: tensor.to(communicator.device)
        for name, tensor in qwen_weights(layers, vocabulary).items()
    }
    run = _ways(weights, communicator, buffer_bytes)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-2, rounds):  # the first round verifies, the second warms up
        order = deque(WAYS)
        order.rotate(number)
        for way in order:
            if number == -2:
                for place, tensor in enumerate(weights.values()):
                    tensor.fill_(place % 250 + 1 if communicator.rank == 0 else 0)
            _meet(group, communicator.device)
            start = time.perf_counter()
            run[way]()
            torch.cuda.synchronize()
            if number >= 0:
                times[way].append(time.perf_counter() - start)
            elif number == -2 and way in ("one by one", "packed, into"):
                _check(weights, way)
    return sum(tensor.nbytes for tensor in weights.values()), times


def _ways(
    weights: dict[str, torch.Tensor], communicator: NcclCommunicator, buffer_bytes: int
) -> dict[str, Callable[[], None]]:
    metas = describe(weights)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    everything = torch.zeros(num_bytes, dtype=torch.uint8, device=communicator.device)

    def bare() -> None:
        for start in range(0, num_bytes, buffer_bytes):
            communicator.broadcast(everything[start : start + buffer_bytes], 0)

    def hand_over(packed: bool) -> None:
        options: dict[str, Any] = {"packed": packed, "buffer_bytes": buffer_bytes}
        if communicator.rank == 0:
            send_weights(weights, communicator, **options)
        else:
            receive_into(weights, communicator, 0, **options)

    def views() -> None:
        if communicator.rank == 0:
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


def _check(weights: dict[str, torch.Tensor], way: str) -> None:
    wrong = [
        name
        for place, (name, tensor) in enumerate(weights.items())
        if not bool((tensor == place % 250 + 1).all())
    ]
    if wrong:
        raise RuntimeError(f"{way}: {len(wrong)} weights arrived wrong, first {wrong[0]}")


def _meet(group: ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize()
