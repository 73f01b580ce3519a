"""Figures show the data they are given: read back from the drawn objects."""

import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.fit import Line
from refdist.benchmarks.ways import WAYS
from refdist.exploration import Event, Timeline
from refdist.lab.costs import BarrierCost
from refdist.lab.figures import (
    all_reduce_times,
    all_reduce_ways,
    barrier_timeline,
    buckets_over_time,
    cost_of_barriers,
    keys_over_time,
    remainder_map,
    ring_steps,
    schedule,
    size_name,
    times_over_ranks,
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
    assert bars(ax) == [(0, 0, 500), (0, 500, 250), (1, 250, 250)]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}
    assert len(looks) == 2  # a colour and a hatch for each phase
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert "milliseconds" in ax.get_xlabel()


def test_timeline_shows_the_last_requests_and_when_rank_0_left():
    events = [
        PhaseEvent(0, 1, "arrival", 100.0, 100.5),
        PhaseEvent(0, 1, "departure", 100.5, 100.75),
        PhaseEvent(1, 1, "arrival", 100.25, 100.8),
    ]
    (ax,) = barrier_timeline(events, since=100.25, last_requests=[100.5, 100.625]).axes
    for bar, drawn in zip(bars(ax), [(0, -250, 500), (0, 250, 250), (1, 0, 550)], strict=True):
        assert bar == pytest.approx(drawn)
    entered, made, left = ax.get_lines()
    assert [tuple(point) for point in entered.get_xydata()] == [(0, 1)]
    assert [tuple(point) for point in made.get_xydata()] == [(250, 0), (375, 1)]
    assert left.get_xdata()[0] == 500
    assert ax.get_xlim()[0] == 0
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"makes its last request", "rank 0 leaves"} <= set(legend)


def test_timeline_shows_a_wait_that_a_rank_gave_up_and_names_short_phases():
    events = [
        PhaseEvent(0, 1, "arrival", 100.5, 100.515625),
        PhaseEvent(1, 1, "arrival", 100.25, 100.265625),
        PhaseEvent(1, 1, "departure", 100.265625, 100.28125),
        PhaseEvent(2, 1, "arrival", 100.0, 102.0),
    ]
    (ax,) = barrier_timeline(events, gave_up=[102.5, None, None]).axes
    assert bars(ax)[-1] == (0, 515.625, 1984.375)  # hollow, unlike a phase
    assert ax.patches[-1].get_facecolor()[:3] == (1, 1, 1)
    texts = [text.get_text() for text in ax.texts]
    assert texts == [
        "waited 1984 ms in departure, and gave up",
        "arrival 15.62 ms, departure 15.62 ms",
    ]


def test_costs_have_a_line_for_each_barrier_and_say_its_requests():
    costs = [BarrierCost("a", 4, 16.4, 2.0), BarrierCost("a", 2, 8.0, 1.0)]
    costs += [BarrierCost("b", 2, 4.0, 0.5), BarrierCost("b", 4, 17.0, 4.0)]
    (ax,) = cost_of_barriers(costs, "title").axes
    drawn = {line.get_label(): [tuple(p) for p in line.get_xydata()] for line in ax.get_lines()}
    assert drawn == {
        "a: 16 requests with 4 ranks": [(2, 1), (4, 2)],
        "b: 17 requests with 4 ranks": [(2, 0.5), (4, 4)],
    }
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("ranks", "milliseconds a barrier")
    with pytest.raises(ValueError, match="costs: is empty"):
        cost_of_barriers([])


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


def test_a_ring_is_drawn_from_what_each_rank_has_at_first_to_whole_sums():
    drawn = [ax for ax in ring_steps().axes if ax.axison]
    cells = [[text.get_text() for text in ax.texts if text.get_text()] for ax in drawn]
    assert cells[0] == [str(rank) for rank in range(4) for _ in range(4)]
    assert [texts.count("all") for texts in cells] == [0, 0, 0, 4, 8, 12, 16]
    assert cells[1][3] == "0+3"  # rank 0 has received chunk 3 from rank 3
    assert drawn[1].get_title() == "after step 0: reduce-scatter"
    assert drawn[-1].get_title() == "after step 5: all-gather"
    # an arrow to each rank; the one from the last to the first has two parts
    assert [len(ax.texts) - 16 for ax in drawn] == [0, 5, 5, 5, 5, 5, 5]


def test_times_over_ranks_have_a_line_for_each_way_and_one_for_the_cores():
    times = {"1 KiB": {"ring": {2: 1e-3, 3: 2e-3}, "gloo's own": {2: 2e-3, 3: 4e-3}}}
    (ax,) = times_over_ranks(times, 3).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.lines[:2]}
    assert lines == {"ring": pytest.approx([1, 2]), "gloo's own": pytest.approx([2, 4])}
    assert list(ax.lines[2].get_xdata()) == [3, 3]
    assert (ax.get_title(), ax.get_ylabel()) == ("1 KiB", "time of one all-reduce (ms)")
    (ax,) = times_over_ranks(times, 8).axes
    assert len(ax.lines) == 2


def test_buckets_are_bars_at_their_times():
    figure = buckets_over_time({"alone": [(0.0, 1e-3), (1e-3, 3e-3)], "one": [(2e-3, 4e-3)]}, 2e-3)
    (ax,) = figure.axes
    assert bars(ax) == [
        (row, pytest.approx(left), pytest.approx(width))
        for row, left, width in [(0, 0, 2), (1, 0, 1), (1, 1, 2), (2, 2, 2)]
    ]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["gradients", "alone: 2 all-reduces", "one: 1 all-reduce"]
    assert [text.get_text() for text in ax.texts] == ["backward pass", "3.00 ms", "4.00 ms"]


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
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "3", "4", "4", "4"]
    assert list(ax.get_yticks()) == [*range(6)]
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
    said = "refdist.lab.figures needs matplotlib: pip install '.[notebooks]'"
    assert finished.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}"
