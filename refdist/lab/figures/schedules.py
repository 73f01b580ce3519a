"""Figures of the schedules that an exploration finds."""

import textwrap
from collections.abc import Sequence
from itertools import accumulate

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refdist.exploration import Event, Timeline
from refdist.lab.figures.style import BLUE, DPI, GREEN, LABEL, ORANGE, SKY, VERMILION, finished

_EVENTS = {
    "enters": (">", "white", "enters a call"),
    "asks": ("o", SKY, "asks the store"),
    "waits": ("o", "white", "begins to wait"),
    "is woken": ("*", ORANGE, "is woken"),
    "times out": ("D", ORANGE, "its time is up"),
    "returns": ("s", GREEN, "returns"),
    "raises": ("X", VERMILION, "raises an error"),
    "dies": ("P", "black", "dies"),
}

_LETTER = 0.056  # inches


def schedule(timeline: Timeline, title: str = "") -> Figure:
    """A schedule from top to bottom: one column a rank, one row an event.

    A column's line is thick while the rank is in a call, and dotted while it waits. An arrow leads
    from the step that wakes a rank to that rank, from the left.
    """
    rows = list(enumerate(timeline.events))
    ranks = range(timeline.world_size)
    texts = [[len(event.text) for event in timeline.events if event.rank == r] for r in ranks]
    place = [0.0, *accumulate(0.7 + _LETTER * max(lengths, default=6) for lengths in texts)]
    fig, ax = plt.subplots(
        figsize=(max(7, 1 + place[-1]), 1.8 + 0.24 * len(rows)),
        layout="constrained", dpi=DPI,
    )  # fmt: skip
    for rank in ranks:
        own = [(row, event) for row, event in rows if event.rank == rank]
        _draw_lifeline(ax, place[rank], own, len(rows))
        ax.text(place[rank], -1.2, f"rank {rank}", ha="center", weight="bold")
    for row, event in rows:
        marker, colour, _ = _EVENTS[event.kind]
        x = place[event.rank]
        ax.plot(
            x, row, marker=marker, markersize=10 if marker == "*" else 7, color=colour,
            markeredgecolor="black", markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
        ax.text(x + 0.16, row, event.text, va="center", fontsize=8, bbox=LABEL, zorder=4)
        if event.kind == "is woken":
            cause, text = next((at, e.text) for at, e in rows if e.step == event.step)
            begin = place[timeline.events[cause].rank]
            if begin < x:
                begin += 0.16 + _LETTER * len(text)
            _draw_arrow(ax, (begin, cause), (x, row))
    ax.set_xlim(-0.3, max(6.4, place[-1]))
    ax.set_ylim(len(rows) - 0.4, -1.6)
    ax.set_yticks(range(len(rows)), [str(event.step) for event in timeline.events])
    ax.set_ylabel("step")
    ax.set_xticks([])
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    fig.suptitle(title, x=0.01, ha="left")
    if timeline.conclusion:
        width = int((fig.get_figwidth() - 0.6) / 0.08)  # inches of a bold letter
        conclusion = textwrap.fill(f"Not so: {timeline.conclusion}", width)
        ax.set_xlabel(conclusion, loc="left", weight="bold")
    kinds = {event.kind for event in timeline.events}
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=colour, markeredgecolor="black",
                   markersize=10 if marker == "*" else 7, label=label)
        for kind, (marker, colour, label) in _EVENTS.items() if kind in kinds
    ]  # fmt: skip
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8
    )
    return finished(fig)


def _draw_lifeline(ax: Axes, x: float, own: Sequence[tuple[int, Event]], length: int) -> None:
    """The line of a rank, from one of its events to the next."""
    ax.plot([x, x], [-0.8, length - 0.6], color="black", linewidth=0.6, alpha=0.4, zorder=1)
    inside = False
    for (row, event), (following, _) in zip(own, [*own[1:], (length - 0.6, None)], strict=False):
        if event.kind in ("returns", "raises", "dies", "enters"):
            inside = event.kind == "enters"
        if inside:
            style = ":" if event.kind == "waits" else "-"
            ax.plot([x, x], [row, following], color=BLUE, linewidth=2.5, linestyle=style, zorder=1)


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw along the row of the start, which has one label, then down where no column has any."""
    beside = end[0] - 0.22
    ax.plot(
        [start[0], beside, beside], [start[1], start[1], end[1]],
        color=ORANGE, linewidth=1.2, zorder=2, solid_joinstyle="round", label="arrow",
    )  # fmt: skip
    ax.annotate(
        "", xy=end, xytext=(beside, end[1]), zorder=2,
        arrowprops={
            "arrowstyle": "->", "color": ORANGE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 5
        },
    )  # fmt: skip
