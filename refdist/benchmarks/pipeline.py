"""A model that is small enough for a real pipeline on one machine, and the roofline of a core."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from refdist.pipeline import Device, GroupedQueryAttention, Model, Serving

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


def micro_batch(model: Model, serving: Serving, number: int) -> torch.Tensor:
    """Token ids ``[sequences, tokens]``, drawn from the number of the micro-batch."""
    shape = serving.chunk_tokens // serving.prompt_tokens, serving.prompt_tokens
    generator = torch.Generator().manual_seed(number)
    return torch.randint(model.vocab_size, shape, generator=generator)


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
