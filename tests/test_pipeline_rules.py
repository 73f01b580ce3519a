"""The rules of the field: the lists that are published, and every layer exactly once."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refdist.pipeline import (
    MODELS,
    PARTITION_VARIABLE,
    RULES,
    faults,
    get_pp_indices,
    own_count_times_rank,
)
from refdist.pipeline.balance import balanced_cuts
from refdist.pipeline.rules import lighter_ends

NAMES = list(RULES)
LAYERS, STAGES = range(201), range(1, 33)


def counts(name, num_layers, pp_size, weights=None):
    return [len(stage) for stage in RULES[name](num_layers, pp_size, weights)]


# The lists that pull requests and tests of the engines show, copied by hand.

PUBLISHED = [
    # vLLM pull request 46217 shows what its rule of then returns, and what it proposes
    ("specification", [15, 15, 16, 15]),
    ("specification", [23, 24, 24, 23]),
    ("end", [15, 15, 15, 16]),
    ("end", [23, 23, 24, 24]),
    # SGLang pull request 6666: DeepSeek-R1 before, and after with vLLM's rule
    ("remainder last", [7, 7, 7, 7, 7, 7, 7, 12]),
    ("specification", [7, 7, 8, 8, 8, 8, 8, 7]),
    # the tests of vLLM pull request 6920
    ("remainder last", [7]),
    ("remainder last", [10, 10, 10, 10]),
    ("remainder last", [7, 7, 7, 7, 11]),
    ("lighter ends", [7]),
    ("lighter ends", [3, 4]),
    ("lighter ends", [9, 11, 11, 9]),
    ("lighter ends", [6, 8, 9, 9, 7]),
    ("lighter ends", [6, 8, 8, 8, 7]),
    ("lighter ends", [7, 9, 9, 7]),
    # what the code of each returns for the models of notebook 02
    ("front", [8, 8, 8, 8, 8, 7, 7, 7]),
    ("front", [24, 24, 23, 23]),
    ("end", [7, 7, 7, 8, 8, 8, 8, 8]),
    ("lighter ends", [4, 8, 8, 9, 9, 9, 9, 5]),
    ("lighter ends", [11, 14, 14, 14, 15, 12]),
    ("lighter ends", [7, 11, 11, 11, 11, 11, 11, 7]),
    ("embedding and head counted", [7, 8, 8, 8, 8, 8, 8, 6]),
    ("embedding and head counted", [13, 14, 14, 14, 13, 12]),
    ("embedding and head counted", [23, 24, 24, 23]),
    ("embedding and head divisible", [23, 24, 24, 23]),
]


@pytest.mark.parametrize(("name", "expected"), PUBLISHED)
def test_published_lists(name, expected):
    assert counts(name, sum(expected), len(expected)) == expected


# Which cases a rule may refuse, said apart from the rules.

REFUSES = {
    "lighter ends": lambda layers, stages: (
        stages > 2
        and (layers // stages < (stages - 2) // 2 or (stages % 2 == 1 and layers % stages == 0))
    ),
    "embedding and head counted": lambda layers, stages: stages > layers + 2,
    "embedding and head divisible": lambda layers, stages: (layers + 2) % stages > 0,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_on_one_stage_in_order(name):
    refuses = REFUSES.get(name, lambda layers, stages: False)
    for num_layers in LAYERS:
        for pp_size in STAGES:
            if refuses(num_layers, pp_size):
                with pytest.raises(ValueError, match=str(pp_size)):
                    RULES[name](num_layers, pp_size)
                continue
            stages = RULES[name](num_layers, pp_size)
            assert len(stages) == pp_size
            assert [layer for stage in stages for layer in stage] == list(range(num_layers))
            empty = [number for number, stage in enumerate(stages) if not stage]
            said = f"stages without layers: {', '.join(map(str, empty))}"
            assert faults(stages, num_layers) == ([said] if empty else [])


def test_the_specification_is_get_pp_indices(monkeypatch):
    monkeypatch.delenv(PARTITION_VARIABLE, raising=False)
    for num_layers in LAYERS:
        for pp_size in STAGES:
            stages = RULES["specification"](num_layers, pp_size)
            found = [get_pp_indices(num_layers, stage, pp_size) for stage in range(pp_size)]
            assert [(stage.start, stage.stop) for stage in stages] == found


def test_the_rules_heed_no_environment(monkeypatch):
    monkeypatch.setenv(PARTITION_VARIABLE, "1,2")
    for name in NAMES:
        assert sum(counts(name, 6, 2)) == 6 and counts(name, 6, 2) != [1, 2], name


@pytest.mark.parametrize("name", ["specification", "remainder last", "front", "end"])
def test_where_nothing_remains_these_agree(name):
    for pp_size in STAGES:
        for layers in range(0, 201, pp_size):
            assert counts(name, layers, pp_size) == [layers // pp_size] * pp_size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2), "num_hidden_layers=-1: must be at least 0"),
        ((4, 0), "pp_size=0: must be at least 1"),
        (("4", 2), "num_hidden_layers='4': must be an integer, not str"),
        ((4, 2.0), "pp_size=2.0: must be an integer, not float"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RULES[name](*arguments)


# Where a rule breaks down, it says so.


def test_lighter_ends_leaves_the_first_stage_of_126_layers_on_16_without_any():
    stages = RULES["lighter ends"](126, 16)
    assert faults(stages, 126) == ["stages without layers: 0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((80, 32), "lighter ends: 80 layers on 32 stages: the ends would hold -13 layers"),
        ((36, 3), "lighter ends: 36 layers on 3 stages: the rule would deal out 37"),
    ],
)
def test_lighter_ends_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lighter_ends(*arguments)


def test_counting_the_ends_can_leave_them_without_layers():
    assert counts("embedding and head counted", 2, 4) == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="5 stages for 2 layers"):
        RULES["embedding and head counted"](2, 5)


# The wrong rule.


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "dropped"),
    [
        (10, 3, [6, 7]),  # mlx-lm issue 1688
        (7, 2, [3]),  # mlx-lm pull request 1816
        (62, 4, [30, 31]),
        (61, 8, [21, 22, 23]),
        (94, 4, [46, 47]),
        (80, 6, [52, 53, 54, 55]),
    ],
)
def test_own_count_times_rank_drops_layers(num_layers, pp_size, dropped):
    stages = own_count_times_rank(num_layers, pp_size)
    assert faults(stages, num_layers) == [f"layers on no stage: {', '.join(map(str, dropped))}"]


def test_own_count_times_rank_is_right_only_where_nothing_remains():
    for num_layers in LAYERS:
        for pp_size in STAGES:
            stages = own_count_times_rank(num_layers, pp_size)
            lost = num_layers - sum(map(len, stages))
            assert (lost > 0) == (num_layers % pp_size > 0)


def test_faults_name_what_is_held_twice():
    assert faults([range(0, 3), range(2, 4)], 5) == [
        "layers on no stage: 4",
        "layers on several stages: 2",
    ]


# By weight.


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_balanced_cuts_are_those_of_the_programme_written_out(weights, parts):
    assert balanced_cuts(tuple(map(float, weights)), parts) == written_out(weights, parts)


def written_out(weights, parts):
    """DeepSpeed's programme with plain loops: the last cut of each prefix into so many parts."""
    n = len(weights)
    if n <= parts:
        return [min(part, n) for part in range(parts + 1)]
    best = {(0, 0): (0, float("inf"), 0)}  # heaviest, lightest, last cut
    for end in range(1, n + 1):
        for count in range(1, min(end, parts) + 1):
            for cut in range(end):
                if (cut, count - 1) in best:
                    heaviest, lightest, _ = best[cut, count - 1]
                    weight = sum(weights[cut:end])
                    heaviest, lightest = max(heaviest, weight), min(lightest, weight)
                    old = best.get((end, count))
                    if old is None or heaviest - lightest <= old[0] - old[1]:
                        best[end, count] = heaviest, lightest, cut
    cuts = [n]
    for count in range(parts, 0, -1):
        cuts.append(best[cuts[-1], count][2])
    return cuts[::-1]


def test_the_programme_does_not_always_find_the_least_difference():
    weights = (2.0, 3.0, 5.0, 1.0, 7.0)
    cuts = balanced_cuts(weights, 4)
    assert cuts == [0, 2, 3, 4, 5]  # 5, 5, 1, 7: a difference of 6
    assert sum(weights[2:4]) == 6  # 2, 3, 6, 7 would differ by 5


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_by_weight_for_real_models(model):
    for pp_size in (1, 2, 3, 4, 8, 16, 32):
        stages = RULES["by weight"](model.num_hidden_layers, pp_size, model.weights)
        held = [layer for stage in stages for layer in stage]
        assert held == list(range(model.num_hidden_layers))


def test_by_weight_can_leave_the_embedding_alone():
    stages = RULES["by weight"](4, 4, [20, 5, 5, 5, 5, 20])
    assert faults(stages, 4) == ["stages without layers: 0, 3"]


@pytest.mark.parametrize("weights", [[1] * 5, [1] * 7, [1, 1, -1, 1, 1, 1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="must be 6 \\(embedding, layers, head\\)"):
        RULES["by weight"](4, 2, weights)
