"""Weights of a real model by ``NcclCommunicator``: one by one, and packed, beside a bare broadcast.

The bare broadcast sends as many bytes, which lie in one tensor, in pieces of the buffer size. All
ways take turns.
"""

import time
from collections import deque

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from refdist.benchmarks.weights import (
    WAYS,
    WeightRounds,
    check_weights,
    fill,
    ways_of,
)
from refdist.nccl import NcclCommunicator


def time_weights(
    group: ProcessGroup,
    communicator: NcclCommunicator,
    buffer_bytes: int,
    weights: dict[str, torch.Tensor],
    rounds: int,
) -> WeightRounds:
    """Time each way, on every rank at the same time. The time ends when the GPU is done.

    Raises:
        RuntimeError: weights arrived wrong.
    """
    sends = communicator.rank == 0
    run = ways_of(
        weights, communicator, sends, buffer_bytes, lambda part: communicator.broadcast(part, 0)
    )
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-2, rounds):  # the first round verifies, the second warms up
        order = deque(WAYS)
        order.rotate(number)
        for way in order:
            if number == -2:
                fill(weights, communicator.rank)
            _meet(group, communicator.device)
            start = time.perf_counter()
            run[way]()
            torch.cuda.synchronize()
            if number >= 0:
                times[way].append(time.perf_counter() - start)
            elif number == -2 and way in ("one by one", "packed, into"):
                check_weights(weights, way)
    return sum(tensor.nbytes for tensor in weights.values()), times


def _meet(group: ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize()
