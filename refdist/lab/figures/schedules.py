"""Figures of the schedules that an exploration finds."""

import textwrap
from collections.abc import Sequence

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
    "times out": ("D", ORANGE, "has waited long enough"),
    "returns": ("s", GREEN, "returns"),
    "raises": ("X", VERMILION, "raises an error"),
    "dies": ("P", "black", "dies"),
}


def schedule(timeline: Timeline, title: str = "") -> Figure:
    """A schedule from top to bottom: one column a rank, one row an event.

    A column's line is thick while the rank is in a call, and dotted while it waits. An arrow leads
    from the step that wakes a rank to that rank, from the left.
    """
    rows = list(enumerate(timeline.events))
    longest = max((len(event.text) for event in timeline.events), default=0)
    column = 0.7 + 0.062 * longest  # inches
    fig, ax = plt.subplots(
        figsize=(2.6 + column * timeline.world_size, 1.3 + 0.24 * len(rows)),
        layout="constrained", dpi=DPI,
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
        ax.text(x + 0.16, row, event.text, va="center", fontsize=8, bbox=LABEL, zorder=4)
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
        width = int((fig.get_figwidth() - 0.6) / 0.08)  # inches of a bold letter
        conclusion = textwrap.fill(f"Not so: {timeline.conclusion}", width)
        ax.set_xlabel(conclusion, loc="left", weight="bold")
    kinds = {event.kind for event in timeline.events}
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=colour, markeredgecolor="black",
                   markersize=10 if marker == "*" else 7, label=label)
        for kind, (marker, colour, label) in _EVENTS.items() if kind in kinds
    ]  # fmt: skip
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
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
