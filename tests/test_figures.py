"""Figures show the data they are given: read back from the drawn objects."""

import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.fit import Line
from refdist.benchmarks.ways import WAYS
from refdist.exploration import Event, Timeline
from refdist.lab.figures import (
    all_reduce_times,
    all_reduce_ways,
    barrier_timeline,
    keys_over_time,
    remainder_map,
    schedule,
    size_name,
    stages_of_models,
)
from refdist.lab.figures.all_reduce import _WAYS
from refdist.lab.observer import KeyCount
from refdist.phases import PhaseEvent


def bars(ax):
    return [
        (round(bar.get_y() + bar.get_height() / 2, 6), round(bar.get_x(), 6), bar.get_width())
        for bar in ax.patches
    ]


def test_timeline_has_a_bar_for_each_phase_at_its_time():
    events = [
        PhaseEvent(0, 1, "arrival", 100.0, 100.5),
        PhaseEvent(0, 1, "departure", 100.5, 100.75),
        PhaseEvent(1, 1, "arrival", 100.25, 100.5),
    ]
    (ax,) = barrier_timeline(reversed(events), "title").axes
    assert bars(ax) == [(0, 0, 0.5), (0, 0.5, 0.25), (1, 0.25, 0.25)]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}
    assert len(looks) == 2  # a colour and a hatch for each phase
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert "seconds" in ax.get_xlabel()


def test_keys_over_time_shows_counts_and_marks():
    counts = [KeyCount(10.0, 3), KeyCount(10.5, 40), KeyCount(11.0, 3)]
    (ax,) = keys_over_time(counts, [(10.75, "second"), (10.25, "first")], "title").axes
    line, *marks = ax.get_lines()
    assert [tuple(point) for point in line.get_xydata()] == [(0, 3), (0.5, 40), (1, 3)]
    assert [mark.get_xdata()[0] for mark in marks] == [0.25, 0.75]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["A  first", "B  second"]
    with pytest.raises(ValueError, match="counts: is empty"):
        keys_over_time([])


def test_timeline_of_nothing_is_refused():
    with pytest.raises(ValueError, match="events: is empty"):
        barrier_timeline([])


def test_stages_have_the_width_of_their_layers():
    (ax,) = stages_of_models({"a": {1: [5], 2: [3, 2]}}).axes
    assert bars(ax) == [(0, 0, 5), (1, 0, 3), (1, 3, 2)]
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True, False]


def test_each_model_has_its_panel():
    figure = stages_of_models({"a": {1: [4], 2: [2, 2]}, "b": {1: [3]}})
    assert [ax.get_title() for ax in figure.axes] == ["a: 4 layers", "b: 3 layers"]
    assert [len(ax.patches) for ax in figure.axes] == [3, 1]


def test_remainder_map_marks_the_extra_layers():
    (ax,) = remainder_map([[0, 0, 0], [0, 1, 0], [1, 1, 0]]).axes
    assert [(text.get_position(), text.get_text()) for text in ax.texts] == [
        ((1, 1), "+1"),
        ((0, 2), "+1"),
        ((1, 2), "+1"),
    ]


def test_all_reduce_is_drawn_in_microseconds_and_gigabytes():
    timings = [AllReduceTiming(size, 4, 1e-3, 1e-3, 2e-3) for size in (1024, 2**20)]
    left, right = all_reduce_times(timings).axes
    assert list(left.lines[0].get_xdata()) == [1024, 2**20]
    assert list(left.lines[0].get_ydata()) == pytest.approx([1000, 1000])
    bus = [1.5 * size / 1e-3 / 1e9 for size in (1024, 2**20)]
    assert list(right.lines[0].get_ydata()) == pytest.approx(bus)
    with pytest.raises(ValueError, match="timings: is empty"):
        all_reduce_times([])


def test_all_reduce_is_drawn_beside_its_line_and_its_limit():
    timings = [AllReduceTiming(size, 2, 1e-3, 1e-3, 2e-3) for size in (1024, 2**20)]
    left, right = all_reduce_times(timings, line=Line(1e-3, 1e-9, 0.1), limit=450e9).axes
    assert list(left.lines[1].get_ydata()) == pytest.approx([1001.024, 1000 + 2**20 / 1000])
    assert list(right.lines[2].get_ydata()) == [450, 450]
    assert "limit of the links, 450 GB/s" in [t.get_text() for t in right.get_legend().get_texts()]


def test_every_way_has_a_line_of_its_own():
    timings = [
        AllReduceTiming(size, 2, seconds, seconds, seconds, way=way)
        for size in (1024, 4096)
        for way, seconds in (("plain", 3e-6), ("one-shot graph", 2e-6), ("graph", 1e-6))
    ]
    (ax,) = all_reduce_ways(timings, "title").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn == {
        "plain": pytest.approx([3, 3]),
        "graph": pytest.approx([1, 1]),
        "one-shot graph": pytest.approx([2, 2]),
    }
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 3
    assert set(_WAYS) == set(WAYS)
    with pytest.raises(ValueError, match="timings: is empty"):
        all_reduce_ways([])


@pytest.mark.parametrize(
    ("num_bytes", "name"),
    [(8, "8 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**24, "16 MiB"), (2**32, "4 GiB")],
)
def test_size_names(num_bytes, name):
    assert size_name(num_bytes) == name


def test_a_schedule_has_a_row_for_each_event_and_a_column_for_each_rank():
    events = (
        Event(1, 0, "enters", "enters it"),
        Event(2, 0, "waits", "waits"),
        Event(3, 1, "enters", "enters it"),
        Event(4, 1, "asks", "sets it"),
        Event(4, 0, "is woken", "goes on"),
        Event(4, 0, "returns", "returns"),
    )
    (ax,) = schedule(Timeline(2, "0011", events, "It is.")).axes
    heads, texts = ax.texts[:2], [text for text in ax.texts[2:] if text.get_text()]
    columns = [head.get_position()[0] for head in heads]
    assert [head.get_text() for head in heads] == ["rank 0", "rank 1"]
    for row, (event, text) in enumerate(zip(events, texts, strict=True)):
        x, y = text.get_position()
        assert (text.get_text(), y) == (event.text, row)
        assert columns[event.rank] < x < columns[event.rank] + 0.5
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "3", "4"]
    assert list(ax.get_yticks()) == [0, 1, 2, 3]
    (arrow,) = (text for text in ax.texts if not text.get_text())
    beside = columns[0] - 0.22
    assert (arrow.xyann, arrow.xy) == ((beside, 4), (columns[0], 4))
    (line,) = (line for line in ax.lines if line.get_label() == "arrow")
    assert line.get_xydata().tolist() == [[columns[1], 3], [beside, 3], [beside, 4]]
    assert ax.get_xlabel() == "Not so: It is."
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "is woken" in legend and "dies" not in legend


def test_a_long_conclusion_stays_in_the_figure():
    figure = schedule(Timeline(2, "0", (Event(1, 0, "enters", "enters it"),), "It is long. " * 20))
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].xaxis.label.get_window_extent().x1 < figure.bbox.x1


# Without matplotlib, the error says what to install.


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import refdist.lab.figures"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    said = "refdist.lab.figures needs matplotlib: pip install 'refdist[notebooks]'"
    assert finished.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}"
