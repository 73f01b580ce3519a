"""A real pipeline of a small transformer, and the time of each of its stages.

Each rank of a group is one stage. Activations travel between the stages through a
StatelessProcessGroup. Its store is made for control messages. That is enough for a quarter of a
megabyte, but an engine works differently.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn import functional

from refdist.benchmarks.transformer import Stage
from refdist.group import StatelessProcessGroup
from refdist.pipeline import Device, GroupedQueryAttention, Model, Serving
from refdist.pipeline.cost import batch_seconds

SMALL = Model(
    "small", 14, 256, 768, GroupedQueryAttention(8, 4, 32), 16384,
    source="made for this measurement: 20 million parameters, 78 MB in float32",
)  # fmt: skip
"""A model whose head works as much as five of its layers."""

SCORING = Serving(
    prompt_tokens=128, output_tokens=0, chunk_tokens=256, tokens_with_logits=128,
    bytes_per_weight=4, bytes_per_end_weight=4, bytes_per_kv_element=4,
)  # fmt: skip
"""Two texts of 128 tokens a micro-batch, with the logits of every token, in float32."""


@dataclass(frozen=True)
class StageTiming:
    """The measurements of one stage.

    Attributes:
        rank: the stage.
        layers: its layers.
        seconds: processor time of a micro-batch while no other stage works, the median of the
            runs. It is the time on a core of its own, whatever else the machine does.
        fastest: the same for the fastest run.
        slowest: the same for the slowest run.
        transfer_seconds: time from sending a micro-batch to its arrival, the median; 0 on the
            first stage.
        busy: start and end of each micro-batch of the full pipeline, in seconds of
            ``time.monotonic``.
    """

    rank: int
    layers: range
    seconds: float
    fastest: float
    slowest: float
    transfer_seconds: float
    busy: list[tuple[float, float]]


def micro_batch(model: Model, serving: Serving, number: int) -> torch.Tensor:
    """Token ids ``[sequences, tokens]``, drawn from the number of the micro-batch."""
    shape = serving.chunk_tokens // serving.prompt_tokens, serving.prompt_tokens
    generator = torch.Generator().manual_seed(number)
    return torch.randint(model.vocab_size, shape, generator=generator)


@torch.inference_mode()
def time_pipeline(
    model: Model,
    stages: Sequence[range],
    group: StatelessProcessGroup,
    serving: Serving = SCORING,
    runs: int = 5,
    micro_batches: int = 6,
) -> tuple[StageTiming, torch.Tensor | None]:
    """Run a pipeline with one stage on each rank of a group. Every rank calls this.

    First, ``runs`` micro-batches pass one after the other, so that only one stage works at a time.
    One before them is not counted. Then ``micro_batches`` pass as fast as they can.

    Args:
        model: the model to cut; see ``Stage``.
        stages: the layers of each stage, one stage for each rank.
        group: the group that carries the activations.
        serving: gives the number of tokens of a micro-batch.
        runs: timed runs of each stage by itself, at least 1.
        micro_batches: micro-batches in the full pipeline, at least 1.

    Returns:
        The timing of this rank's stage, and on the last rank also the logits of micro-batch 0.

    Raises:
        ValueError: there are not as many stages as ranks, or ``runs`` or ``micro_batches`` is
            below 1.
    """
    rank, last = group.rank, group.world_size - 1
    if len(stages) != group.world_size:
        raise ValueError(f"stages: {len(stages)} of them for {group.world_size} ranks")
    if min(runs, micro_batches) < 1:
        raise ValueError(f"runs={runs}, micro_batches={micro_batches}: must be at least 1")
    stage = Stage(model, stages[rank], rank == 0, rank == last)
    transfers: list[float] = []

    def run(number: int) -> tuple[float, float, float, torch.Tensor]:
        if rank == 0:
            given = micro_batch(model, serving, number)
        else:
            sent, given = group.recv_obj(rank - 1)
            transfers.append(time.monotonic() - sent)
        start, worked = time.monotonic(), time.thread_time()
        result = stage(given)
        end, worked = time.monotonic(), time.thread_time() - worked
        if rank != last:
            group.send_obj((time.monotonic(), result), rank + 1)
        return start, end, worked, result

    with _one_thread():
        alone = []
        for _ in range(1 + runs):
            group.barrier()
            _, _, worked, result = run(0)
            alone.append(worked)
        seconds, transfer = alone[1:], median(transfers[1:] or [0.0])
        group.barrier()
        busy = [run(number)[:2] for number in range(micro_batches)]
    timing = StageTiming(
        rank, stages[rank], median(seconds), min(seconds), max(seconds), transfer, busy
    )
    return timing, result if rank == last else None


def measure_processor(model: Model = SMALL, serving: Serving = SCORING) -> Device:
    """One core of this machine for the roofline, with measured instead of nominal numbers.

    The peak is the rate of the largest matrix product of a layer. The bandwidth is the rate of a
    sum over a tensor that no cache holds.
    """
    x = torch.ones(serving.chunk_tokens, model.hidden_size)
    weight = torch.ones(model.intermediate_size, model.hidden_size)
    memory = torch.ones(2**24)
    with _one_thread():
        product_seconds = _fastest(lambda: functional.linear(x, weight))
        sum_seconds = _fastest(lambda: memory.sum())
    return Device(
        "one core of this machine",
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        2 * x.numel() * model.intermediate_size / product_seconds,
        None,
        memory.numel() * memory.itemsize / sum_seconds,
        "measured just now, in float32",
    )


def pipeline_seconds(stage_seconds: Sequence[float], micro_batches: int, processors: int) -> float:
    """Time of the full pipeline if the stages share the cores of a machine.

    With fewer cores than stages, not all stages work at a time, and the cores still have all the
    work to do.
    """
    shared = micro_batches * sum(stage_seconds) / min(processors, len(stage_seconds))
    return max(batch_seconds(stage_seconds, micro_batches), shared)


def _fastest(operation: Callable[[], object], runs: int = 20) -> float:
    def seconds() -> float:
        start = time.thread_time()
        operation()
        return time.thread_time() - start

    return min(seconds() for _ in range(runs))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: several stages share a machine, and each has one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
