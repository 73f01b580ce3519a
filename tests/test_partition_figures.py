"""Figures of pipelines: read back from the drawn objects."""

import pytest

from refdist.lab.figures import memory_of_stages, pipeline_timeline
from refdist.pipeline import MODELS, RULES, Serving

FP8 = Serving(bytes_per_weight=1)


def bars(ax):
    return [
        (round(b.get_y() + b.get_height() / 2, 6), b.get_x(), b.get_width()) for b in ax.patches
    ]


def test_memory_of_stages_adds_up():
    model = MODELS["llama-3.1-70b"]
    stages = RULES["specification"](80, 8)
    (ax,) = memory_of_stages(model, FP8, 12 * 2**30, {"even": (stages, 100)}).axes
    heights = [bar.get_height() for bar in ax.patches]
    layers, ends, cache = heights[:3]
    assert layers == pytest.approx(10 * model.weights[1] / 2**30)
    assert ends == pytest.approx(model.embedding_parameters * 2 / 2**30)
    assert cache == pytest.approx(100 * 16 * 10 * 2048 * 2 / 2**30)
    assert heights[4] == 0  # the second stage has no embedding
    assert "100 blocks" in ax.get_title()
    assert list(ax.lines[0].get_ydata()) == [12, 12]


def test_timeline_has_a_bar_for_each_micro_batch_in_milliseconds():
    busy = {
        "one": [[(10.0, 10.5), (10.5, 11.0)], [(10.5, 10.75), (11.0, 11.25)]],
        "two": [[(20.0, 21.0, 0.9)], [(21.0, 22.0, 0.8)]],
    }
    one, two = pipeline_timeline(busy).axes
    assert bars(one) == [(0, 0, 500), (0, 500, 500), (1, 500, 250), (1, 1000, 250)]
    assert bars(two) == [(0, 0, 1000), (1, 1000, 1000)]
    assert [text.get_text() for text in one.texts] == ["0", "1", "0", "1"]
    assert [bool(bar.get_hatch()) for bar in one.patches] == [False, True, False, True]
    assert "ms " in two.get_xlabel()
