"""The study of partitions, and its figures: read back from the drawn objects."""

import math

import pytest

from refdist.benchmarks.pipeline import StageTiming
from refdist.lab.figures import (
    gain_against_room,
    imbalance_maps,
    memory_of_stages,
    pipeline_timeline,
    predicted_against_measured,
    rates,
    rules_side_by_side,
)
from refdist.pipeline import DEVICES, MODELS, RULES, Assessment, Serving, best_partition, compare
from refdist.pipeline.cost import kv_blocks, requests_per_second
from refdist.pipeline.study import Gain, gain, gains, imbalance, imbalance_map

FP8 = Serving(bytes_per_weight=1)


# The study.


def test_imbalance_is_the_heaviest_over_the_mean():
    assert imbalance([range(0, 2), range(2, 3)], [5, 1, 1, 1, 4]) == pytest.approx(7 / 6 - 1)
    assert imbalance([range(0, 3)], [5, 1, 1, 1, 4]) == 0


def test_imbalance_map_marks_refusals_and_empty_stages():
    layers, sizes = range(3, 8), (1, 2, 4)
    found = imbalance_map(RULES["front"], layers, sizes, 1.5)
    assert found[0] == [0] * 5
    assert math.isnan(found[2][0]) and not any(map(math.isnan, found[1] + found[2][1:]))
    weights = [1.5, *[1.0] * 7, 1.5]
    assert found[2][4] == imbalance(RULES["front"](7, 4), weights)
    refused = imbalance_map(RULES["embedding and head divisible"], layers, (2,), 1.0)
    assert [math.isnan(value) for value in refused[0]] == [True, False, True, False, True]


def test_gain_is_the_best_over_the_specification():
    model, device = MODELS["llama-3.1-70b"], DEVICES["l4"]
    found = gain(model, device, 4, FP8)
    usual = RULES["specification"](80, 4)
    roomy = best_partition(model, device, 4, "kv_blocks", FP8)
    fast = best_partition(model, device, 4, "mix", FP8)
    assert found.kv_blocks == roomy.kv_blocks / kv_blocks(model, device, usual, FP8) > 1.3
    rate = requests_per_second(model, device, fast.stages, FP8)
    assert found.requests_per_second == rate / requests_per_second(model, device, usual, FP8) > 1.3
    assert gain(model, device, 2, FP8) is None  # does not fit


def test_where_only_the_best_fits_the_gain_is_infinite():
    found = gain(MODELS["deepseek-v3"], DEVICES["b200"], 4, FP8)
    assert found.kv_blocks == found.requests_per_second == math.inf


def test_a_partition_matters_only_where_little_room_is_left():
    found = gains(MODELS.values(), DEVICES.values(), (3, 4, 8), FP8)
    assert len(found) > 100
    assert all(case.kv_blocks >= 1 and case.requests_per_second >= 1 for case in found)
    roomy = [case for case in found if case.room_left > 16]
    assert len(roomy) > 50 and max(case.kv_blocks for case in roomy) < 1.05
    assert max(case.kv_blocks for case in found) > 2


# The figures.

ROWS = [
    Assessment("first", (range(2), range(2, 5)), 100, 10.0, 4.0, 1.0),
    Assessment("second", (range(3), range(3, 5)), 150, 5.0, 8.0, 3.0),
    Assessment("third", (), 0, 0.0, 0.0, 0.0, ("will not",)),
]


def bars(ax):
    return [
        (round(b.get_y() + b.get_height() / 2, 6), b.get_x(), b.get_width()) for b in ax.patches
    ]


def test_rules_have_a_block_for_each_stage_or_a_reason():
    (ax,) = rules_side_by_side(ROWS).axes
    assert bars(ax) == [(0, 0, 2), (0, 2, 3), (1, 0, 3), (1, 3, 2)]
    assert [text.get_text() for text in ax.texts] == ["2", "3", "3", "2", "will not"]
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True, True, False]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second", "third"]


def test_rates_are_multiples_of_the_first_row():
    axes = rates(ROWS).axes
    widths = [[bar.get_width() for bar in ax.patches] for ax in axes]
    assert widths == [[1, 1.5], [1, 0.5], [1, 2], [1, 3]]
    hatched = [[bool(bar.get_hatch()) for bar in ax.patches] for ax in axes]
    assert hatched == [[False, True], [True, False], [False, True], [False, True]]


def test_rates_where_the_first_row_does_not_fit():
    rows = compare(
        MODELS["llama-3.1-70b"], DEVICES["l4"], 8, "mix", Serving(reserved_bytes=2.5 * 2**30)
    )
    assert len(rates(rows).axes) == 4


def test_imbalance_maps_have_a_panel_for_each_rule():
    values = [[0.5, math.nan], [0.25, 1.5]]
    figure = imbalance_maps({"a": values, "b": values}, [8, 9], [2, 3])
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["a", "b"]
    drawn = panels[0].images[0].get_array()
    assert drawn.filled(-1).tolist() == [[0.5, -1], [0.25, 1.5]]
    assert "over the mean" in figure.axes[-1].get_ylabel()


def test_gains_are_drawn_against_room():
    found = [Gain("m", "d", 4, 3.0, 1.5, 1.25), Gain("m", "d", 8, 0.5, math.inf, math.inf)]
    left, right = gain_against_room(found).axes
    assert left.collections[0].get_offsets().tolist() == [[3.0, 1.5]]
    assert right.collections[0].get_offsets().tolist() == [[3.0, 1.25]]
    assert left.collections[1].get_offsets()[0][0] == 0.5


def test_memory_of_stages_adds_up():
    model, device = MODELS["llama-3.1-70b"], DEVICES["l4"]
    stages = RULES["specification"](80, 8)
    (ax,) = memory_of_stages(model, device, FP8, {"even": (stages, 100)}).axes
    heights = [bar.get_height() for bar in ax.patches]
    layers, ends, cache = heights[:3]
    assert layers == pytest.approx(10 * model.weights[1] / 2**30)
    assert ends == pytest.approx(model.embedding_parameters * 2 / 2**30)
    assert cache == pytest.approx(100 * 16 * 10 * 2048 * 2 / 2**30)
    assert heights[4] == 0  # the second stage has no embedding
    assert "100 blocks" in ax.get_title()


TIMINGS = {
    "one": [
        StageTiming(0, range(3), 0.03, 0.02, 0.05, 0.0, [(10.0, 10.5), (10.5, 11.0)]),
        StageTiming(1, range(3, 4), 0.01, 0.01, 0.01, 0.001, [(10.5, 10.75), (11.0, 11.25)]),
    ]
}


def test_predicted_and_measured_stand_side_by_side_in_milliseconds():
    (ax,) = predicted_against_measured(TIMINGS, {"one": [0.02, 0.005]}).axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([20, 30, 5, 10])
    assert list(ax.lines[0].get_ydata()) == pytest.approx([20, 50])
    assert "(ms)" in ax.get_ylabel()


def test_timeline_has_a_bar_for_each_micro_batch():
    (ax,) = pipeline_timeline(TIMINGS).axes
    assert bars(ax) == [(0, 0, 0.5), (0, 0.5, 0.5), (1, 0.5, 0.25), (1, 1, 0.25)]
    assert [text.get_text() for text in ax.texts] == ["0", "1", "0", "1"]
