"""Figures of plain data: barrier events, partitions, timings. Each function returns one Figure.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart, and every
distinction is also made by a hatch, a marker or a label.
"""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.fit import Line
from refdist.exploration import Event, Timeline
from refdist.observer import KeyCount
from refdist.phases import PhaseEvent

_BLUE, _ORANGE, _GREEN, _VERMILION, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
_GREY = "#EEEEEE"
_PHASES = {
    "arrival": (_SKY, "///"),
    "confirmation": (_ORANGE, "..."),
    "departure": (_GREEN, "xxx"),
}
_DPI = 110
_LABEL = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}


def barrier_timeline(events: Iterable[PhaseEvent], title: str = "") -> Figure:
    """One row a rank, one colour and hatch a phase; seconds since the first rank arrived.

    A phase that is too short to be seen at this scale shows as a line.
    """
    all_events = sorted(events, key=lambda event: (event.rank, event.start))
    if not all_events:
        raise ValueError("events: is empty; set group.events = [] before the barrier")
    origin = min(event.start for event in all_events)
    ranks = sorted({event.rank for event in all_events})
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.55 * len(ranks)), layout="constrained", dpi=_DPI)
    for event in all_events:
        colour, hatch = _PHASES[event.phase]
        start = event.start - origin
        ax.barh(
            event.rank, event.seconds, left=start, height=0.6, color=colour, hatch=hatch,
            edgecolor="black", linewidth=0.5,
        )  # fmt: skip
        if event.phase == "arrival":
            ax.plot(start, event.rank, marker=">", color="black", markersize=7, clip_on=False)
    ax.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    ax.invert_yaxis()
    ax.set_xlabel("seconds since the first rank arrived")
    ax.set_title(title)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", label=phase)
        for phase, (colour, hatch) in _PHASES.items()
    ]
    arrow = plt.Line2D([], [], marker=">", color="black", linestyle="", label="enters the barrier")
    ax.legend(handles=[arrow, *handles], loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _finished(fig)


_EVENTS = {
    "enters": (">", "white", "enters a call"),
    "asks": ("o", _SKY, "asks the store"),
    "waits": ("o", "white", "begins to wait"),
    "is woken": ("*", _ORANGE, "is woken"),
    "times out": ("D", _ORANGE, "has waited long enough"),
    "returns": ("s", _GREEN, "returns"),
    "raises": ("X", _VERMILION, "raises an error"),
    "dies": ("P", "black", "dies"),
}


def schedule(timeline: Timeline, title: str = "") -> Figure:
    """A schedule from top to bottom: one column a rank, one row for what a rank does or learns.

    A column's line is thick while the rank is in a call, and dotted while it waits. An arrow leads
    from the step that wakes a rank to that rank.
    """
    rows = list(enumerate(timeline.events))
    longest = max((len(event.text) for event in timeline.events), default=0)
    column = 0.7 + 0.062 * longest  # inches
    fig, ax = plt.subplots(
        figsize=(2.6 + column * timeline.world_size, 1.3 + 0.24 * len(rows)),
        layout="constrained", dpi=_DPI,
    )  # fmt: skip
    for rank in range(timeline.world_size):
        own = [(row, event) for row, event in rows if event.rank == rank]
        _draw_lifeline(ax, rank * column, own, len(rows))
        ax.text(rank * column, -1.2, f"rank {rank}", ha="center", weight="bold")
    for row, event in rows:
        marker, colour, _ = _EVENTS[event.kind]
        x = event.rank * column
        ax.plot(
            x, row, marker=marker, markersize=10 if marker == "*" else 7, color=colour,
            markeredgecolor="black", markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
        ax.text(x + 0.16, row, event.text, va="center", fontsize=8, bbox=_LABEL, zorder=4)
        if event.kind == "is woken":
            cause = next(at for at, other in rows if other.step == event.step)
            _draw_arrow(ax, (timeline.events[cause].rank * column, cause), (x, row))
    ax.set_xlim(-0.3, column * timeline.world_size)
    ax.set_ylim(len(rows) - 0.4, -1.6)
    steps: dict[int, int] = {}
    for row, event in rows:
        steps.setdefault(event.step, row)
    ax.set_yticks(list(steps.values()), [str(step) for step in steps])
    ax.set_ylabel("step")
    ax.set_xticks([])
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    ax.set_title(title, loc="left")
    if timeline.conclusion:
        ax.set_xlabel(f"Not so: {timeline.conclusion}", loc="left", weight="bold")
    kinds = {event.kind for event in timeline.events}
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=colour, markeredgecolor="black",
                   markersize=10 if marker == "*" else 7, label=label)
        for kind, (marker, colour, label) in _EVENTS.items() if kind in kinds
    ]  # fmt: skip
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return _finished(fig)


def _draw_lifeline(ax: Axes, x: float, own: Sequence[tuple[int, Event]], length: int) -> None:
    """The line of a rank, from one of its events to the next."""
    ax.plot([x, x], [-0.8, length - 0.6], color="black", linewidth=0.6, alpha=0.4, zorder=1)
    inside = False
    for (row, event), (following, _) in zip(own, [*own[1:], (length - 0.6, None)], strict=True):
        if event.kind in ("returns", "raises", "dies", "enters"):
            inside = event.kind == "enters"
        if inside:
            style = ":" if event.kind == "waits" else "-"
            ax.plot([x, x], [row, following], color=_BLUE, linewidth=2.5, linestyle=style, zorder=1)


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate(
        "", xy=end, xytext=start, zorder=2,
        arrowprops={"arrowstyle": "->", "color": _ORANGE, "shrinkA": 6, "shrinkB": 7},
    )  # fmt: skip


def keys_over_time(
    counts: Sequence[KeyCount], marks: Sequence[tuple[float, str]] = (), title: str = ""
) -> Figure:
    """How many keys a store holds, as a line over time, with moments marked from A on.

    Args:
        counts: as a KeyObserver sees them.
        marks: moments on the same clock, and what happened then.
        title: the figure's title.
    """
    if not counts:
        raise ValueError("counts: is empty; observe the store for a while")
    origin = counts[0].at
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained", dpi=_DPI)
    ax.step(
        [count.at - origin for count in counts],
        [count.keys for count in counts],
        where="post",
        color=_BLUE,
    )
    top = max(count.keys for count in counts)
    ax.set_ylim(0, top * 1.25)
    for letter, (at, what) in zip("ABCDEFGHIJKLMNOP", sorted(marks), strict=False):
        ax.axvline(
            at - origin, color="black", linestyle=":", linewidth=1, label=f"{letter}  {what}"
        )
        ax.text(
            at - origin, top * 1.17, letter, ha="center", va="center", bbox=_LABEL, weight="bold"
        )  # fmt: skip
    ax.set_xlabel("seconds")
    ax.set_ylabel("keys in the store")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    if marks:
        ax.legend(
            handlelength=0, handletextpad=0, loc="center left", bbox_to_anchor=(1.01, 0.5)
        )  # fmt: skip
    return _finished(fig)


def stages_of_models(partitions: Mapping[str, Mapping[int, Sequence[int]]]) -> Figure:
    """How the layers of models fall on stages: a panel a model, a row for each number of stages.

    Args:
        partitions: for each model and number of stages, the layers of each stage in order.
    """
    columns = 3
    rows = -(-len(partitions) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(11, 0.8 + 3.4 * rows), layout="constrained", dpi=_DPI, squeeze=False
    )
    for ax in axes.flat[len(partitions) :]:
        ax.remove()
    for ax, (model, by_size) in zip(axes.flat, partitions.items(), strict=False):
        _draw_stages(ax, by_size)
        ax.tick_params(labelsize=8)
        ax.set_title(f"{model}: {sum(next(iter(by_size.values())))} layers", fontsize=10)
    fig.supxlabel("layer")
    fig.supylabel("pipeline stages")
    fig.legend(handles=_stage_legend(), loc="outside upper center", ncols=2, frameon=False)
    return _finished(fig)


def _draw_stages(ax: Axes, partitions: Mapping[int, Sequence[int]]) -> None:
    sizes = sorted(partitions)
    for row, size in enumerate(sizes):
        start, fewest = 0, min(partitions[size])
        for layers in partitions[size]:
            more = layers > fewest
            ax.barh(
                row, layers, left=start, height=0.76, color=_ORANGE if more else _SKY,
                hatch="////" if more else "", edgecolor="black", linewidth=0.5,
            )  # fmt: skip
            start += layers
    ax.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    ax.invert_yaxis()
    ax.set_xlim(0, sum(partitions[sizes[0]]))


def _stage_legend() -> list[Patch]:
    return [
        Patch(facecolor=_SKY, edgecolor="black", label="fewest layers of the row"),
        Patch(facecolor=_ORANGE, hatch="////", edgecolor="black", label="more than the fewest"),
    ]


def remainder_map(extra: Sequence[Sequence[int]], title: str = "") -> Figure:
    """Which stages get one layer more: a row for each remainder, a column for each stage.

    Args:
        extra: for each remainder 0, 1, ..., the extra layers of each stage (0 or 1).
        title: the figure's title.
    """
    rows, columns = len(extra), len(extra[0])
    fig, ax = plt.subplots(
        figsize=(1.8 + 0.5 * columns, 1.6 + 0.34 * rows), layout="constrained", dpi=_DPI
    )
    for row, counts in enumerate(extra):
        for column, count in enumerate(counts):
            ax.barh(
                row, 0.92, left=column - 0.46, height=0.86, color=_ORANGE if count else _GREY,
                hatch="///" if count else "", edgecolor="black" if count else "white",
                linewidth=0.5,
            )  # fmt: skip
            if count:
                ax.text(
                    column, row, f"+{count}", ha="center", va="center", fontsize=8,
                    bbox=_LABEL,
                )  # fmt: skip
    ax.set_xticks(range(columns))
    ax.set_yticks(range(rows))
    ax.invert_yaxis()
    ax.set_xlabel("stage")
    ax.set_ylabel("layers that remain")
    ax.set_title(title)
    for side in ax.spines.values():
        side.set_visible(False)
    return _finished(fig)


def all_reduce_times(
    timings: Sequence[AllReduceTiming],
    title: str = "",
    line: Line | None = None,
    limit: float | None = None,
) -> Figure:
    """Time and bus bandwidth of all-reduce against the message size, each on logarithmic axes.

    Args:
        timings: of one way, by size.
        title: the figure's title.
        line: fitted to the times, drawn beside them.
        limit: bytes a second that a link carries each way, drawn beside the bandwidths.
    """
    if not timings:
        raise ValueError("timings: is empty")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", dpi=_DPI)
    sizes = [timing.num_bytes for timing in timings]
    microseconds = [timing.seconds * 1e6 for timing in timings]
    left.loglog(sizes, microseconds, marker="o", color=_BLUE, label="median")
    left.fill_between(
        sizes,
        [timing.fastest * 1e6 for timing in timings],
        [timing.slowest * 1e6 for timing in timings],
        color=_SKY, alpha=0.35, label="fastest to slowest run",
    )  # fmt: skip
    if line is not None:
        left.loglog(
            sizes, [line.seconds(size) * 1e6 for size in sizes],
            linestyle="--", color="black", linewidth=1,
            label=r"$\alpha + \beta \cdot$ size, fitted",
        )  # fmt: skip
    left.set_ylabel("time of one all-reduce (µs)")
    right.loglog(
        sizes, [timing.bus_bandwidth / 1e9 for timing in timings],
        marker="s", color=_VERMILION, label="bus bandwidth",
    )  # fmt: skip
    right.loglog(
        sizes, [timing.algorithm_bandwidth / 1e9 for timing in timings],
        marker="^", linestyle="--", color=_GREEN, label="algorithm bandwidth",
    )  # fmt: skip
    if limit is not None:
        label = f"limit of the links, {limit / 1e9:g} GB/s"
        right.axhline(limit / 1e9, color="black", linestyle=":", label=label)
    right.set_ylabel("bandwidth (GB/s)")
    left.legend(loc="upper left")
    right.legend(loc="lower right")
    for ax in (left, right):
        _size_axis(ax, sizes)
    fig.suptitle(title)
    return _finished(fig)


_WAYS = {
    "plain": (_BLUE, "o", "-"),
    "graph": (_BLUE, "o", ":"),
    "one-shot": (_VERMILION, "^", "-"),
    "one-shot graph": (_VERMILION, "^", ":"),
    "two-shot": (_GREEN, "s", "-"),
    "two-shot graph": (_GREEN, "s", ":"),
}


def all_reduce_ways(timings: Sequence[AllReduceTiming], title: str = "") -> Figure:
    """Time of all-reduce against the message size, a line for each way, on logarithmic axes.

    Ways that are replayed from a graph are dotted.
    """
    if not timings:
        raise ValueError("timings: is empty")
    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained", dpi=_DPI)
    for way, (colour, marker, style) in _WAYS.items():
        some = [timing for timing in timings if timing.way == way]
        if some:
            ax.loglog(
                [timing.num_bytes for timing in some],
                [timing.seconds * 1e6 for timing in some],
                marker=marker, linestyle=style, color=colour, label=way,
                markerfacecolor="white" if style == ":" else colour,
            )  # fmt: skip
    ax.set_ylabel("time of one all-reduce (µs)")
    _size_axis(ax, sorted({timing.num_bytes for timing in timings}))
    ax.set_title(title)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _finished(fig)


def _size_axis(ax: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis of message sizes, with a mark at each, or at every other of many."""
    shown = sizes[:: 1 if len(sizes) < 9 else 2]
    ax.set_xscale("log", base=2)
    ax.set_xticks(shown, [size_name(size) for size in shown])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("message size")
    ax.grid(alpha=0.3)


def size_name(num_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:g} GiB"


def _finished(figure: Figure) -> Figure:
    """Keep pyplot from showing the figure a second time."""
    plt.close(figure)
    return figure
