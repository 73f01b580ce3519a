"""A real pipeline: the parts of a cut transformer are the transformer, on real processes."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from refdist.benchmarks.pipeline import (
    SCORING,
    SMALL,
    measure_processor,
    micro_batch,
)
from refdist.benchmarks.transformer import Stage
from refdist.pipeline import RULES, GroupedQueryAttention, Model
from refdist.pipeline.cost import weight_bytes_per_stage

TINY = Model("tiny", 6, 32, 48, GroupedQueryAttention(4, 2, 8), 100)
SHORT = replace(SCORING, prompt_tokens=8, chunk_tokens=24, tokens_with_logits=8)


def logits_of_the_whole(number):
    with torch.inference_mode():
        whole = Stage(TINY, range(TINY.num_hidden_layers), True, True)
        return whole(micro_batch(TINY, SHORT, number))


@pytest.mark.parametrize("model", [TINY, SMALL], ids=lambda model: model.name)
def test_the_torch_modules_have_the_parameters_that_the_cost_model_counts(model):
    for name in ("specification", "end"):
        stages = RULES[name](model.num_hidden_layers, 4)
        for rank, num_bytes in enumerate(weight_bytes_per_stage(model, stages, SCORING)):
            stage = Stage(model, stages[rank], rank == 0, rank == 3)
            assert sum(p.numel() * p.itemsize for p in stage.parameters()) == num_bytes
    assert 40e6 < SMALL.parameters * 4 < 100e6


def test_the_logits_depend_on_every_layer_and_on_earlier_tokens_only():
    whole = logits_of_the_whole(0)
    assert whole.shape == (3, 8, 100)
    tokens = micro_batch(TINY, SHORT, 0)
    with torch.inference_mode():
        for layer in range(6):
            stage = Stage(TINY, range(6), True, True)
            stage.layers[layer] = torch.nn.Identity()
            assert not torch.allclose(stage(tokens), whole)
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 100
        after = Stage(TINY, range(6), True, True)(changed)
    assert torch.equal(after[:, :-1], whole[:, :-1])
    assert not torch.equal(after[:, -1], whole[:, -1])


def run_stage(rank, stages):
    first, last = rank.rank == 0, rank.rank == rank.world_size - 1
    stage = Stage(TINY, stages[rank.rank], first, last)
    with rank.group() as group, torch.inference_mode():
        given = micro_batch(TINY, SHORT, 0) if first else group.recv_obj(rank.rank - 1)
        result = stage(given)
        if not last:
            group.send_obj(result, rank.rank + 1)
        group.barrier()
    return result.tolist() if last else None


@pytest.mark.parametrize(
    "stages",
    [
        [range(6)],
        [range(2), range(2, 6)],
        RULES["specification"](6, 4),
        [range(1), range(1, 6), range(6, 6)],
    ],
    ids=str,
)
def test_however_it_is_cut_the_pipeline_computes_the_same(stages):
    *others, logits = run_ranks(run_stage, len(stages), stages)
    assert others == [None] * (len(stages) - 1)
    torch.testing.assert_close(torch.tensor(logits), logits_of_the_whole(0))


def test_a_processor_is_measured():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        device = measure_processor(TINY, SHORT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert min(device.flops_per_second, device.bytes_per_second, device.memory_bytes) > 0
