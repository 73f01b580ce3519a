"""Notebook 02's checks: right answers pass, and each obvious wrong one fails with its reason."""

import math
import os
import re

import pytest

from refdist import get_pp_indices
from refdist.lab.exercises import UnsolvedError
from refdist.lab.exercises.pipelines import (
    Memory,
    by_round,
    check_best_counts,
    check_kv_blocks,
    check_layers_of_stage,
    check_seconds,
    comparison,
    fastest_round,
    gain_in_blocks,
    prefill_work,
    stage_memory,
)
from refdist.pipeline import DEVICES, MODELS, RULES, Serving, best_partition
from refdist.pipeline.cost import kv_blocks as package_kv_blocks


def fails(check, *answers, match):
    with pytest.raises(UnsolvedError, match=match):
        check(*answers)


def stub(*_):
    raise NotImplementedError


@pytest.mark.parametrize("check", [check_layers_of_stage, check_best_counts, check_kv_blocks])
def test_a_stub_is_not_written_yet(check):
    fails(check, stub, match=r"Exercise 2\.\d .*: not written yet")


# 2.1 the layers of a stage


def by_counts(counts):
    def answer(layers, stage, size):
        held = counts(layers, size)
        return sum(held[:stage]), sum(held[: stage + 1])

    return answer


def backwards(layers, size):
    held = [layers // size] * size
    for stage in range(size - 2, size - 2 - layers % size, -1):
        held[stage] += 1
    return held


def in_closed_form(layers, stage, size):
    quotient, remainder = divmod(layers, size)

    def start(stage):
        return quotient * stage + max(0, min(stage, size - 1) - (size - 1 - remainder))

    return start(stage), start(stage + 1)


@pytest.mark.parametrize("answer", [by_counts(backwards), in_closed_form])
def test_layers_of_stage_is_solved(answer, capsys):
    check_layers_of_stage(answer)
    assert "17,816 stages are as specified" in capsys.readouterr().out


def counts_by(rule):
    return by_counts(lambda layers, size: [len(stage) for stage in RULES[rule](layers, size)])


def without_stage_0(layers, size):
    held = [layers // size] * size
    for number in range(layers % size):
        held[max(1, size - 2 - number) if size > 1 else 0] += 1
    return held


def last_included(layers, stage, size):
    start, end = in_closed_form(layers, stage, size)
    return start, end - 1


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (by_counts(lambda n, p: [n // p] * (p - 1) + [n // p + n % p]), "the quotient is 0"),
        (by_counts(lambda n, p: [n // p + (i < n % p) for i in range(p)]), "of 3 with 1 layer:"),
        (by_counts(lambda n, p: [n // p + (i >= p - n % p) for i in range(p)]), "of 2 with 1"),
        (by_counts(without_stage_0), "quotient is 0 and the remainder 1"),
        (lambda n, i, p: (13 * i, 13 * (i + 1)), "stage 0 of 1 with 0 layers"),
        (lambda n, i, p: list(in_closed_form(n, i, p)), "specification has"),
        (lambda n, i, p: backwards(n, p), "specification has"),
        (last_included, "specification has"),
        (get_pp_indices, r"calls refdist\.pipeline\.specification\.get_pp_indices"),
        (counts_by("specification"), "calls refdist"),
    ],
)
def test_layers_of_stage_is_not_solved(answer, match):
    fails(check_layers_of_stage, answer, match=match)


def test_an_override_changes_no_check(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2,3")
    check_layers_of_stage(in_closed_form)
    assert os.environ["VLLM_PP_LAYER_PARTITION"] == "1,2,3"
    assert "solved" in capsys.readouterr().out


# 2.2 the time of a partition


def stage_seconds(layers, last, work):
    flops = layers * work.layer_flops + last * work.head_flops
    num_bytes = layers * work.layer_bytes + last * work.head_bytes
    return max(flops / work.flops_per_second, num_bytes / work.bytes_per_second)


def times(counts, work):
    return [stage_seconds(n, i == len(counts) - 1, work) for i, n in enumerate(counts)]


def batch_seconds(counts, micro_batches, work):
    seconds = times(counts, work)
    return sum(seconds) + (micro_batches - 1) * max(seconds)


def parts(layers, last, work):
    """The larger parts, added."""
    own = stage_seconds(layers, False, work)
    return own + last * max(
        work.head_flops / work.flops_per_second, work.head_bytes / work.bytes_per_second
    )


def test_seconds_are_solved(capsys):
    check_seconds(stage_seconds, batch_seconds)
    assert "420 partitions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "all_of_them", "match"),
    [
        (stub, batch_seconds, "not written yet"),
        (stage_seconds, stub, "not written yet"),
        (parts, batch_seconds, "stage_seconds of stage"),
        (lambda n, last, w: stage_seconds(n, False, w), batch_seconds, "stage_seconds of stage 0"),
        (lambda n, last, w: stage_seconds(n, True, w), batch_seconds, "stage_seconds of stage 0"),
        (
            lambda n, last, w: (n * w.layer_flops + last * w.head_flops) / w.flops_per_second,
            batch_seconds,
            "in micro-batches of 16 tokens",
        ),
        (stage_seconds, lambda c, m, w: m * max(times(c, w)), "batch_seconds of"),
        (stage_seconds, lambda c, m, w: m * sum(times(c, w)), "batch_seconds of 2"),
        (
            stage_seconds,
            lambda c, m, w: (m + len(c) - 1) * max(times(c, w)),  # for equal stages only
            "batch_seconds of 1 micro",
        ),
        (stage_seconds, lambda c, m, w: None, "batch_seconds of 1 micro-batch: None"),
    ],
)
def test_seconds_are_not_solved(one, all_of_them, match):
    fails(check_seconds, one, all_of_them, match=match)


# 2.3 the best partition


def dynamic(cost, num_layers, num_stages):
    best = {0: (0.0, [])}
    for stage in range(num_stages):
        best = {
            stop: min(
                (max(slowest, cost(start, stop)), [*counts, stop - start])
                for start, (slowest, counts) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, num_layers + 1)
        }
    return best[num_layers][1]


def by_limit(cost, num_layers, num_stages):
    """Fill stages up to a limit, which is one of all costs: the least that works."""

    def filled(limit):
        counts, start = [], 0
        while start < num_layers and len(counts) < num_stages:
            left = num_stages - len(counts) - 1
            stop = start
            while stop < num_layers - left and known[start, stop + 1] <= limit:
                stop += 1
            if stop == start:
                return None
            counts.append(stop - start)
            start = stop
        return counts if start == num_layers and len(counts) == num_stages else None

    stages = [(a, b) for a in range(num_layers) for b in range(a + 1, num_layers + 1)]
    known = {stage: cost(*stage) for stage in stages}
    limits = sorted(set(known.values()))
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(limits[middle]) else (middle + 1, high)
    return filled(limits[low])


@pytest.mark.parametrize("answer", [dynamic, by_limit])
def test_the_best_partition_is_solved(answer, capsys):
    check_best_counts(answer)
    assert re.search(r"best of all partitions in 202 cases; [\d,]+ calls", capsys.readouterr().out)


def tried(cost, num_layers, num_stages):
    """All partitions, one by one."""

    def all_of(start, stages):
        if stages == 1:
            yield cost(start, num_layers), [num_layers - start]
            return
        for stop in range(start + 1, num_layers - stages + 2):
            own = cost(start, stop)
            for slowest, counts in all_of(stop, stages - 1):
                yield max(own, slowest), [stop - start, *counts]

    return min(all_of(0, num_stages))[1]


def to_the_mean(cost, num_layers, num_stages):
    mean, counts, start = cost(0, num_layers) / num_stages, [], 0
    for left in range(num_stages - 1, 0, -1):
        stop = start + 1
        while stop < num_layers - left and cost(start, stop) < mean:
            stop += 1
        counts.append(stop - start)
        start = stop
    return [*counts, num_layers - start]


def least_squares(cost, num_layers, num_stages):
    best = {0: (0.0, [])}
    for stage in range(num_stages):
        best = {
            stop: min(
                (total + cost(start, stop) ** 2, [*counts, stop - start])
                for start, (total, counts) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, num_layers + 1)
        }
    return best[num_layers][1]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (tried, "80 layers on 8 stages: more than 51,200 calls of cost. There are 2,898,753,715"),
        (to_the_mean, "is possible"),
        (least_squares, "is possible"),
        (lambda cost, n, p: backwards(n, p), "is possible"),
        (lambda cost, n, p: [n], "is no list of"),
        (lambda cost, n, p: [n - p + 1] + [1] * (p - 1), "is possible"),
        (lambda cost, n, p: [n] + [0] * (p - 1), "is no list of"),
        (lambda cost, n, p: tuple(dynamic(cost, n, p)), "is no list of"),
        (lambda cost, n, p: [cost(0, 0)], r"cost\(0, 0\) is no stage"),
        (
            lambda cost, n, p: [
                best_partition(MODELS["phi-4"], DEVICES["h100"], p, "prefill").kv_blocks
            ],
            "calls refdist",
        ),
    ],
)
def test_the_best_partition_is_not_solved(answer, match):
    fails(check_best_counts, answer, match=match)


# 2.4 the blocks of a setting


def kv_blocks(setting, num_layers, num_stages, memory, ends=True, least=0, checked=True):
    counts = [int(number) for number in setting.split(",")]
    wrong = len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1
    if checked and wrong:
        raise ValueError(setting)
    blocks = []
    for stage, n in enumerate(counts):
        left = memory.room - n * memory.layer
        if ends and stage == 0:
            left -= memory.embedding
        if ends and stage == num_stages - 1:
            left -= memory.head
        blocks.append(left // (n * memory.block) if n else math.inf)
    return blocks if least is None else max(least, min(blocks))


def of_the_sum(setting, num_layers, num_stages, memory):
    blocks = kv_blocks(setting, num_layers, num_stages, memory, least=None)
    return max(0, sum(blocks))


def in_floats(setting, num_layers, num_stages, memory):
    kv_blocks(setting, num_layers, num_stages, memory)
    n = max(map(int, setting.split(",")))
    return max(0, (memory.room - n * memory.layer) / (n * memory.block))


def of_refdist(setting, num_layers, num_stages, memory):
    counts = list(map(int, setting.split(",")))
    stages = [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
    return package_kv_blocks(MODELS["phi-4"], DEVICES["h100"], stages, Serving())


def test_the_blocks_are_solved(capsys):
    check_kv_blocks(kv_blocks)
    assert "512 settings (112 without room) and 9 refusals" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda *a: kv_blocks(*a, ends=False), "the formula gives"),
        (lambda *a: kv_blocks(*a, least=-math.inf), "the formula gives 0"),
        (of_the_sum, "the formula gives"),
        (in_floats, "the formula gives"),
        (lambda *a: kv_blocks(*a, checked=False), "three numbers for four stages.* must raise"),
        (of_refdist, "calls refdist"),
        (lambda *a: 1476, "1476 blocks, but the formula gives"),
    ],
)
def test_the_blocks_are_not_solved(answer, match):
    fails(check_kv_blocks, answer, match=match)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("8,8,8,8,8", "five numbers"),
        ("10,10,10,11", "sum of 41"),
        ("20,20,10,-10", "below 1"),
        ("20,20,0,0", "below 1"),
        ("", "not a number"),
    ],
)
def test_each_bad_setting_must_be_refused(setting, reason):
    def lenient(text, num_layers, num_stages, memory):
        return 5 if text == setting else kv_blocks(text, num_layers, num_stages, memory)

    fails(check_kv_blocks, lenient, match=reason)


def test_spaces_are_allowed():
    def strict(setting, *others):
        if " " in setting:
            raise ValueError(setting)
        return kv_blocks(setting, *others)

    fails(check_kv_blocks, strict, match="your code raised ValueError")


# What the notebook prints.


def test_the_numbers_are_those_of_the_model():
    model, serving = MODELS["llama-3.1-70b"], Serving(bytes_per_weight=1)
    memory = stage_memory(model, serving, 12e9)
    assert memory == Memory(12_000_000_000, 855654400, 2101346304, 2101362688, 65536)
    assert prefill_work(model, DEVICES["l4"], serving).flops_per_second == 242.5e12
    assert prefill_work(model, DEVICES["a100-80gb"], serving).flops_per_second == 312e12


def test_a_gain_in_blocks_is_told():
    text = gain_in_blocks("deepseek-v3", 4, "b200")
    assert "-10.3 GiB left, -1.0 layers; 0 blocks; 1,555 with 17,15,15,14" in text
    text = gain_in_blocks("deepseek-v3", 6, "h200")
    assert "8.5 GiB left, 0.8 layers; 44,878 blocks; 111,797 with" in text
    assert "no partition has more" in gain_in_blocks("mistral-large-2407", 6, "l4")


def test_rounds_are_compared_with_the_prediction():
    def one(seconds):  # two stages, two micro-batches
        half = seconds / 2
        return [[(5.0, 5.1, 0.1), (5.1, 5.2, 0.1)], [(5.1, 5.2, 0.3), (5.3, 5.0 + 2 * half, 0.3)]]

    rounds = {"a": [one(0.9), one(0.8), one(1.0)], "b": [one(2.0), one(2.2), one(0.85)]}
    runs = [{name: [both[rank] for both in rounds[name]] for name in "ab"} for rank in (0, 1)]
    assert by_round(runs) == {name: [tuple(both) for both in rounds[name]] for name in "ab"}
    text = comparison({"a": 1.0, "b": 2.0}, rounds, "a", "b")
    assert "a                  1.000     0.700     0.900   (0.800 to 1.000)" in text
    assert "roofline  a -50% of b;  a < b" in text
    assert "measured  a -55% of b;  a < b" in text
    assert "a was faster than b in 2 of 3 rounds" in text
    assert "the difference, 1.100 s, is NOT above the spread of rounds, 1.350 s" in text
    assert fastest_round(rounds["b"]) == one(0.85)
