"""A real pipeline: the parts of a cut transformer are the transformer, on real processes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks

from refdist.benchmarks.pipeline import (
    SCORING,
    SMALL,
    measure_processor,
    micro_batch,
    pipeline_seconds,
    time_pipeline,
)
from refdist.benchmarks.transformer import Stage
from refdist.pipeline import RULES, GroupedQueryAttention, Model
from refdist.pipeline.cost import batch_seconds, weight_bytes_per_stage

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


def run_pipeline(rank, stages):
    with rank.group() as group:
        timing, logits = time_pipeline(TINY, stages, group, SHORT, runs=2, micro_batches=3)
    assert torch.get_num_threads() == 1
    return timing, None if logits is None else logits.tolist()


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
    results = run_ranks(run_pipeline, len(stages), stages)
    assert [logits is None for _, logits in results] == [True] * (len(stages) - 1) + [False]
    torch.testing.assert_close(torch.tensor(results[-1][1]), logits_of_the_whole(0))
    for rank, (timing, _) in enumerate(results):
        assert (timing.rank, timing.layers) == (rank, stages[rank])
        assert 0 < timing.fastest <= timing.seconds <= timing.slowest
        assert (timing.transfer_seconds > 0) == (rank > 0)
        assert len(timing.busy) == 3
    for (before, _), (after, _) in pairwise(results):
        for (_, sent), (received, _) in zip(before.busy, after.busy, strict=True):
            assert sent <= received  # no stage begins what the one before has not ended


def refuse(rank):
    with rank.group() as group:
        with pytest.raises(ValueError, match="stages: 2 of them for 1 ranks"):
            time_pipeline(TINY, [range(3), range(3, 6)], group, SHORT)
        with pytest.raises(ValueError, match="runs=0, micro_batches=1: must be at least 1"):
            time_pipeline(TINY, [range(6)], group, SHORT, runs=0, micro_batches=1)


def test_bad_arguments_are_refused():
    run_ranks(refuse, 1)


def test_a_processor_is_measured():
    threads = torch.get_num_threads()
    device = measure_processor(TINY, SHORT)
    assert min(device.flops_per_second, device.bytes_per_second, device.memory_bytes) > 0
    assert torch.get_num_threads() == threads


def test_stages_that_share_cores_take_as_long_as_the_cores_need():
    seconds = [1.0, 3.0, 2.0, 2.0]
    assert pipeline_seconds(seconds, 10, 4) == batch_seconds(seconds, 10) == 35
    assert pipeline_seconds(seconds, 10, 64) == 35
    assert pipeline_seconds(seconds, 10, 2) == 40
    assert pipeline_seconds(seconds, 10, 1) == 80
