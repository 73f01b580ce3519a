"""Models, devices, the cost model, the best partition, and the measured case."""

import itertools
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from refdist.pipeline import (
    DEVICES,
    MODELS,
    OBJECTIVES,
    PARTITION_VARIABLE,
    RULES,
    Device,
    GroupedQueryAttention,
    Model,
    Serving,
    best_partition,
    compare,
    find_device,
    find_model,
    get_pp_indices,
    table,
)
from refdist.pipeline.__main__ import main
from refdist.pipeline.compare import shortened
from refdist.pipeline.cost import (
    batch_seconds,
    bubble_share,
    decode_seconds_per_stage,
    decode_tokens_per_second,
    kv_blocks,
    kv_blocks_per_stage,
    prefill_seconds_per_stage,
    prefill_tokens_per_second,
    room_bytes,
    sequences_per_micro_batch,
    weight_bytes_per_stage,
)
from refdist.pipeline.measured import VLLM_PR_6920, explain, fitted_room_bytes, prefill_share

LLAMA_70B, L4 = MODELS["llama-3.1-70b"], DEVICES["l4"]


def split(*counts):
    bounds = [0, *itertools.accumulate(counts)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


# The data.


def test_there_are_enough_models_and_devices():
    assert len(MODELS) >= 10 and len(DEVICES) >= 6
    for known in (MODELS, DEVICES):
        assert all(thing.name == name and thing.source for name, thing in known.items())


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_the_sizes_give_the_published_parameters(model):
    assert model.parameters == model.published_parameters
    weights = model.weights
    assert len(weights) == model.num_hidden_layers + 2
    tied_twice = model.embedding_parameters if model.tied_embeddings else 0
    assert sum(weights) == model.parameters + tied_twice


def test_parameters_of_a_layer_of_llama_70b():
    products = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert LLAMA_70B.weights[1] == products + 2 * 8192
    assert LLAMA_70B.weights[0] == 128256 * 8192
    assert LLAMA_70B.weights[-1] == 128256 * 8192 + 8192


def test_only_the_first_layers_of_deepseek_are_dense():
    weights = MODELS["deepseek-v3"].weights
    assert weights[1] == weights[3] < weights[4] == weights[61]


def test_the_active_parameters_are_those_that_the_names_promise():
    active = {
        name: model.layer_parameters(range(model.num_hidden_layers), model.experts_per_token)
        + 2 * model.embedding_parameters
        for name, model in MODELS.items()
        if model.num_experts
    }
    assert active["mixtral-8x7b"] == pytest.approx(12.9e9, rel=0.01)
    assert active["qwen3-235b-a22b"] == pytest.approx(22e9, rel=0.01)
    assert active["deepseek-v3"] == pytest.approx(37e9, rel=0.02)


def test_what_is_cached_for_a_token():
    elements = {name: model.attention.kv_elements for name, model in MODELS.items()}
    assert elements["llama-3.1-70b"] == 2 * 8 * 128
    assert elements["deepseek-v3"] == 576


def test_experts_touched():
    mixtral = MODELS["mixtral-8x7b"]
    assert mixtral.experts_touched(1) == pytest.approx(2)
    assert mixtral.experts_touched(2) == pytest.approx(8 - 8 * 0.75**2)
    assert mixtral.experts_touched(1000) == pytest.approx(8)
    assert LLAMA_70B.experts_touched(5) == 0


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"model='gpt-9': must be one of llama-3\.1-8b, .*deepsee"):
        find_model("gpt-9")
    with pytest.raises(ValueError, match=r"device='h300': must be one of l4, .*mi300x"):
        find_device("h300")
    assert find_model("phi-4") is MODELS["phi-4"] and find_device("l4") is L4


# Costs, by hand for a small model whose numbers are round.

TINY = Model("tiny", 4, 8, 10, GroupedQueryAttention(2, 1, 4), 100)
# attention 8*(2*2+2*1)*4 = 192, feed-forward 3*8*10 = 240, norms 16: 448; ends 800 and 808
TIED = replace(TINY, name="tied", tied_embeddings=True)
BOX = Device("box", 10_000, 100.0, 200.0, 50.0, "round numbers")
PLAIN = Serving(
    prompt_tokens=4,
    output_tokens=4,
    chunk_tokens=8,
    bytes_per_weight=1.5,
    bytes_per_end_weight=2,
    bytes_per_kv_element=2,
    block_tokens=2,
    memory_share=0.5,
)


def test_weights_per_stage():
    assert weight_bytes_per_stage(TINY, split(1, 2, 1), PLAIN) == [672 + 1600, 1344, 672 + 1616]
    assert weight_bytes_per_stage(TINY, split(4), PLAIN) == [4 * 672 + 1600 + 1616]
    # tied embeddings are on both ends, but not twice on one
    assert weight_bytes_per_stage(TIED, split(2, 2), PLAIN) == [1344 + 1600, 1344 + 1616]
    assert weight_bytes_per_stage(TIED, split(4), PLAIN) == [4 * 672 + 1616]


def test_blocks_are_the_least_over_the_stages():
    # a block takes 2 tokens * 2 bytes * 8 elements = 32 bytes a layer, of 5000 bytes a stage
    blocks = kv_blocks_per_stage(TINY, BOX, split(1, 2, 1), PLAIN)
    assert blocks == [(5000 - 2272) // 32, (5000 - 1344) // 64, (5000 - 2288) // 32]
    assert kv_blocks(TINY, BOX, split(1, 2, 1), PLAIN) == 57
    assert room_bytes(BOX, replace(PLAIN, reserved_bytes=1000)) == 4000
    assert kv_blocks(TINY, BOX, split(4, 0), PLAIN) == (5000 - 4288) // 128
    tight = replace(PLAIN, reserved_bytes=3000)
    assert kv_blocks(TINY, BOX, split(2, 2), tight) == 0
    assert min(kv_blocks_per_stage(TINY, BOX, split(0, 4), tight)) < 0


def test_prefill_by_roofline():
    # 8 tokens of 4-token prompts: 2 logits; each looks at 2 tokens, at 4*2*4 operations a pair
    work = 2 * 8 * 448 + 16 * 32
    read = 448 * 1.5 + 8 * 8 * 2
    first, last = prefill_seconds_per_stage(TINY, BOX, split(3, 1), PLAIN)
    assert first == pytest.approx(max(3 * work / 100, 3 * read / 50))
    assert last == pytest.approx(max((work + 2 * 2 * 808) / 100, (read + 808 * 2) / 50))
    scoring = replace(PLAIN, tokens_with_logits=4)
    _, last = prefill_seconds_per_stage(TINY, BOX, split(3, 1), scoring)
    assert last == pytest.approx((work + 8 * 2 * 808) / 100)


def test_decode_by_roofline():
    # a request has 4 + 2 tokens cached on average
    first, last = decode_seconds_per_stage(TINY, BOX, split(3, 1), PLAIN, 0.5)
    read = 448 * 1.5 + 3 * 8 * 2
    assert first == pytest.approx(3 * read / 50)
    assert last == pytest.approx((read + 808 * 2) / 50)


def test_fp8_counts_where_weights_and_device_have_it():
    busy = replace(PLAIN, bytes_per_weight=1, chunk_tokens=8000)
    (with_fp8,) = prefill_seconds_per_stage(TINY, BOX, split(4), busy)
    without = replace(BOX, fp8_flops_per_second=None)
    (in_bf16,) = prefill_seconds_per_stage(TINY, without, split(4), busy)
    assert in_bf16 == pytest.approx(2 * with_fp8)


def test_throughput():
    stages = split(2, 2)
    seconds = prefill_seconds_per_stage(TINY, BOX, stages, PLAIN)
    assert prefill_tokens_per_second(TINY, BOX, stages, PLAIN) == 8 / max(seconds)
    three = prefill_tokens_per_second(TINY, BOX, stages, PLAIN, micro_batches=3)
    assert three == pytest.approx(24 / (sum(seconds) + 2 * max(seconds)))
    sequences = sequences_per_micro_batch(kv_blocks(TINY, BOX, stages, PLAIN), 2, PLAIN)
    assert sequences == pytest.approx(kv_blocks(TINY, BOX, stages, PLAIN) * 2 / 6 / 2)
    slowest = max(decode_seconds_per_stage(TINY, BOX, stages, PLAIN, sequences))
    assert decode_tokens_per_second(TINY, BOX, stages, PLAIN) == sequences / slowest
    full = replace(PLAIN, reserved_bytes=4990)
    assert decode_tokens_per_second(TINY, BOX, stages, full) == 0


def schedule_end(stage_seconds, micro_batches):
    """When the last micro-batch leaves, each stage taking it up as soon as both are free."""
    free = [0.0] * len(stage_seconds)
    for _ in range(micro_batches):
        arrived = 0.0
        for stage, seconds in enumerate(stage_seconds):
            free[stage] = arrived = max(free[stage], arrived) + seconds
    return free[-1]


@pytest.mark.parametrize("micro_batches", [1, 2, 7, 50])
def test_the_time_of_a_batch_is_that_of_the_schedule(micro_batches):
    draw = random.Random(micro_batches)
    for stages in range(1, 8):
        seconds = [draw.uniform(0.1, 3) for _ in range(stages)]
        end = schedule_end(seconds, micro_batches)
        assert batch_seconds(seconds, micro_batches) == pytest.approx(end)
        waiting = stages * end - micro_batches * sum(seconds)
        assert bubble_share(seconds, micro_batches) == pytest.approx(waiting / stages / end)


def test_the_bubble_of_equal_stages():
    for stages, micro_batches in itertools.product((1, 2, 8), (1, 4, 100)):
        known = (stages - 1) / (micro_batches + stages - 1)
        assert bubble_share([0.3] * stages, micro_batches) == pytest.approx(known)
    # unequal stages wait for the slowest however many micro-batches there are
    assert bubble_share([1.0, 2.0], 10**6) == pytest.approx(0.25, abs=1e-5)


def test_serving_checks_itself():
    with pytest.raises(ValueError, match="prompt_tokens=0: must be above 0"):
        Serving(prompt_tokens=0)
    with pytest.raises(ValueError, match=r"memory_share=1\.2: must be at most 1"):
        Serving(memory_share=1.2)
    assert Serving(output_tokens=0).mean_context_tokens == 1024


# The best partition, against all of them.


def all_partitions(num_layers, pp_size):
    for cuts in itertools.combinations(range(1, num_layers), pp_size - 1):
        bounds = (0, *cuts, num_layers)
        yield [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def worth(model, device, stages, objective, serving):
    """What the objective is, from the public functions of the cost model; more is better."""
    blocks = kv_blocks(model, device, stages, serving)
    if objective == "kv_blocks" or not blocks:
        return blocks
    named = {
        "prefill": {"prefill": 1, "decode": 0},
        "decode": {"prefill": 0, "decode": 1},
        "mix": {"prefill": serving.prompt_tokens, "decode": serving.output_tokens},
    }
    weights = named[objective] if isinstance(objective, str) else objective
    sequences = sequences_per_micro_batch(blocks, len(stages), serving)
    prefill = prefill_seconds_per_stage(model, device, stages, serving)
    decode = decode_seconds_per_stage(model, device, stages, serving, sequences)
    seconds = [
        weights["prefill"] * p / serving.chunk_tokens + weights["decode"] * d / sequences
        for p, d in zip(prefill, decode, strict=True)
    ]
    return 1 / max(seconds)


def small_cases():
    """Models of a few layers, some with experts, on devices where now this and now that is tight"""
    draw = random.Random(6920)
    for number in range(60):
        experts = draw.choice([0, 0, 4])
        layers = draw.randint(1, 9)
        model = Model(
            f"case {number}",
            layers,
            draw.choice([8, 16]),
            draw.choice([8, 24, 64]),
            GroupedQueryAttention(2, draw.choice([1, 2]), 4),
            draw.choice([10, 100, 400]),
            tied_embeddings=draw.random() < 0.3,
            num_experts=experts,
            experts_per_token=2 if experts else 0,
            dense_layers=draw.randint(0, layers) if experts else 0,
            dense_intermediate_size=draw.choice([4, 200]),
        )
        serving = replace(
            PLAIN,
            bytes_per_weight=draw.choice([1, 2]),
            prompt_tokens=draw.choice([4, 40]),
            output_tokens=draw.choice([2, 30]),
            tokens_with_logits=draw.choice([1, 4]),
        )
        pp_size = draw.randint(1, layers)
        even = weight_bytes_per_stage(model, RULES["specification"](layers, pp_size), serving)
        memory = max(even) * 2 * draw.choice([1.05, 1.3, 2, 10])
        device = Device("box", memory, draw.choice([1e2, 1e3, 1e5]), None, 50.0, "made up")
        yield model, device, pp_size, serving


@pytest.mark.parametrize("objective", [*OBJECTIVES, {"prefill": 1, "decode": 5}], ids=str)
def test_no_partition_beats_the_best(objective):
    compared = 0
    for model, device, pp_size, serving in small_cases():
        partitions = list(all_partitions(model.num_hidden_layers, pp_size))
        values = [worth(model, device, p, objective, serving) for p in partitions]
        if not any(values):
            with pytest.raises(ValueError, match="no partition leaves room"):
                best_partition(model, device, pp_size, objective, serving)
            continue
        best = best_partition(model, device, pp_size, objective, serving)
        assert list(best.stages) in partitions
        assert best.kv_blocks == kv_blocks(model, device, best.stages, serving)
        value = worth(model, device, best.stages, objective, serving)
        assert value == pytest.approx(max(values), rel=1e-12)
        compared += len(partitions) > 1
    assert compared >= 20


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pp_size", [1, 2, 7, 16, 64, 126])
def test_the_best_is_no_worse_than_any_rule(pp_size, objective):
    serving = Serving(bytes_per_weight=1)
    model, device = MODELS["llama-3.1-405b"], replace(DEVICES["b200"], memory_bytes=1e12)
    best = best_partition(model, device, pp_size, objective, serving)
    value = worth(model, device, best.stages, objective, serving)
    for rule in RULES.values():
        try:
            stages = rule(126, pp_size, model.weights)
        except ValueError:
            continue
        if all(stages):
            assert worth(model, device, stages, objective, serving) <= value * (1 + 1e-12)


def test_of_equally_good_partitions_the_even_one():
    best = best_partition(MODELS["llama-3.1-8b"], DEVICES["h200"], 4, "prefill")
    assert best.value == "8,8,8,8"


def test_the_result_can_be_used_at_once(monkeypatch):
    best = best_partition(LLAMA_70B, L4, 8, "kv_blocks")
    assert str(best) == f"{PARTITION_VARIABLE}={best.value}"
    for name, value in best.environment.items():
        monkeypatch.setenv(name, value)
    held = [get_pp_indices(80, stage, 8) for stage in range(8)]
    assert held == [(stage.start, stage.stop) for stage in best.stages]


@pytest.mark.parametrize(
    ("pp_size", "objective", "message"),
    [
        (0, "mix", "pp_size=0: must be in 1..80 for llama-3.1-70b"),
        (81, "mix", "pp_size=81: must be in 1..80 for llama-3.1-70b"),
        (8.0, "mix", "pp_size=8.0: must be an integer, not float"),
        (8, "speed", "objective='speed': must be one of kv_blocks, prefill, decode, mix"),
        (8, {"prefill": 0}, "must weigh 'prefill' and 'decode', at least one above 0"),
        (8, {"training": 1}, "must weigh 'prefill' and 'decode', at least one above 0"),
        (8, {"prefill": -1, "decode": 2}, "must weigh 'prefill' and 'decode'"),
        (4, "mix", "llama-3.1-70b on 4 x l4: no partition leaves room for the key-value cache"),
    ],
)
def test_bad_questions(pp_size, objective, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        best_partition(LLAMA_70B, L4, pp_size, objective)


# The measured case.


def test_the_measured_case_is_as_published():
    layers = [[len(stage) for stage in stages] for stages in VLLM_PR_6920.stages]
    assert layers == [[10] * 8, [7, 11, 11, 11, 11, 11, 11, 7]]
    assert VLLM_PR_6920.kv_blocks == (1476, 3078) and VLLM_PR_6920.seconds == (244.53, 167.68)


def test_without_a_fit_the_gain_is_not_explained():
    naive = explain(VLLM_PR_6920)
    assert naive.kv_gain == pytest.approx(1.01, abs=0.005)
    assert naive.kv_blocks[0] > 10 * VLLM_PR_6920.kv_blocks[0]


def test_the_room_fitted_to_one_run_predicts_the_other():
    room = fitted_room_bytes(VLLM_PR_6920)
    assert room / 2**30 == pytest.approx(10.83, abs=0.005)
    fitted = explain(VLLM_PR_6920, room)
    assert fitted.kv_blocks[0] == 1476
    assert fitted.kv_blocks[1] == pytest.approx(3078, rel=0.005)
    assert 1 / fitted.prefill_gain == pytest.approx(1.10, abs=0.005)
    # prefill alone would lose and decode alone would gain more than what was seen
    before, after = VLLM_PR_6920.seconds
    assert fitted.prefill_gain < before / after < fitted.decode_gain
    share = prefill_share(VLLM_PR_6920, fitted)
    in_parts = share / fitted.prefill_gain + (1 - share) / fitted.decode_gain
    assert in_parts == pytest.approx(after / before)


# The comparison and the command.


def test_compare_has_a_row_for_each_rule_and_the_best():
    rows = compare(LLAMA_70B, L4, 8)
    assert [row.rule for row in rows] == [*RULES, "best"]
    refused = next(row for row in rows if row.rule == "embedding and head divisible")
    assert not refused.stages and "do not divide by 8 stages" in refused.remarks[0]
    (line,) = (line for line in table(rows).splitlines() if line.startswith(refused.rule))
    assert line.count(refused.rule) == 1
    blocks = kv_blocks(LLAMA_70B, L4, RULES["front"](80, 8), Serving())
    assert next(row.kv_blocks for row in rows if row.rule == "front") == blocks
    assert all(row.decode_tokens_per_second <= rows[-1].decode_tokens_per_second for row in rows)


def test_a_partition_that_does_not_fit_says_so():
    tight = Serving(reserved_bytes=2.5 * 2**30)
    rows = {row.rule: row for row in compare(LLAMA_70B, L4, 8, "kv_blocks", tight)}
    assert rows["specification"].remarks == ("no room for the key-value cache",)
    assert rows["specification"].kv_blocks == rows["specification"].decode_tokens_per_second == 0
    assert rows["best"].kv_blocks > 0 and not rows["best"].remarks
    assert "(x" in table(list(rows.values()))  # without a reference for the blocks


@pytest.mark.parametrize(
    ("layers", "text"), [([7, 11, 11, 11, 7], "7 3x11 7"), ([8, 8], "2x8"), ([3], "3"), ([], "")]
)
def test_shortened(layers, text):
    assert shortened(layers) == text


def test_the_command_prints_the_comparison_and_the_best(capsys):
    main(["--model", "llama-3.1-70b", "--device", "l4", "--stages", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama-3.1-70b (bf16 layers, bf16 ends) on 8 x l4, 20.24 GiB")
    for name in RULES:
        assert any(line.startswith(name) for line in lines)
    assert lines[-1] == str(best_partition(LLAMA_70B, L4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-9", "l4", "8"], "model='gpt-9': must be one of llama-3.1-8b"),
        (["phi-4", "h300", "8"], "device='h300': must be one of l4, rtx-4090"),
        (["llama-3.1-405b", "h100", "8"], "no partition leaves room"),
        (["phi-4", "l4", "41"], "argument --stages: 41: must be at most 40, the layers of phi-4"),
        (["phi-4", "l4", "0"], "argument --stages: 0: must be at least 1"),
        (["phi-4", "l4", "two"], "argument --stages: invalid int value: 'two'"),
        (["phi-4", "l4", "2", "--memory-share", "nan"], "--memory-share: nan: must be above 0"),
        (["phi-4", "l4", "2", "--reserved-gib", "inf"], "--reserved-gib: inf: must be finite"),
        (["phi-4", "l4", "2", "--output-tokens", "0"], "--output-tokens: 0: must be at least 1"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    model, device, stages, *others = arguments
    with pytest.raises(SystemExit) as ended:
        main(["--model", model, "--device", device, "--stages", stages, *others])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_python_m():
    command = [sys.executable, "-m", "refdist.pipeline", "--model=phi-4", "--device=l4"]
    finished = subprocess.run(
        [*command, "--stages=4", "--objective=kv_blocks", "--weights=fp8"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert finished.stderr == ""
    best = best_partition(MODELS["phi-4"], L4, 4, "kv_blocks", Serving(bytes_per_weight=1))
    assert finished.stdout.splitlines()[-1] == str(best)
