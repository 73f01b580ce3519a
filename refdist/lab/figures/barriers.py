"""Figures of barriers, and of the keys in the store."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from refdist.lab.figures.style import BLUE, DPI, GREEN, LABEL, ORANGE, SKY, finished
from refdist.lab.observer import KeyCount
from refdist.phases import PhaseEvent

_PHASES = {
    "arrival": (SKY, "///"),
    "confirmation": (ORANGE, "..."),
    "departure": (GREEN, "xxx"),
}


def barrier_timeline(events: Iterable[PhaseEvent], title: str = "") -> Figure:
    """The phases of barriers: one row a rank, one colour and hatch a phase.

    The axis has seconds since the first rank arrived. A phase that is too short to be seen at this
    scale shows as a line.
    """
    all_events = sorted(events, key=lambda event: (event.rank, event.start))
    if not all_events:
        raise ValueError("events: is empty; set group.events = [] before the barrier")
    origin = min(event.start for event in all_events)
    ranks = sorted({event.rank for event in all_events})
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.55 * len(ranks)), layout="constrained", dpi=DPI)
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
    return finished(fig)


def keys_over_time(
    counts: Sequence[KeyCount], marks: Sequence[tuple[float, str]] = (), title: str = ""
) -> Figure:
    """The number of keys in a store over time, with moments marked from A on.

    Args:
        counts: counts of a KeyObserver.
        marks: moments on the same clock, and the event of each.
        title: the figure's title.
    """
    if not counts:
        raise ValueError("counts: is empty; observe the store for a while")
    origin = counts[0].at
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained", dpi=DPI)
    ax.step(
        [count.at - origin for count in counts],
        [count.keys for count in counts],
        where="post",
        color=BLUE,
    )
    top = max(count.keys for count in counts)
    ax.set_ylim(0, top * 1.25)
    for letter, (at, what) in zip("ABCDEFGHIJKLMNOP", sorted(marks), strict=False):
        ax.axvline(
            at - origin, color="black", linestyle=":", linewidth=1, label=f"{letter}  {what}"
        )
        ax.text(
            at - origin, top * 1.17, letter, ha="center", va="center", bbox=LABEL, weight="bold"
        )  # fmt: skip
    ax.set_xlabel("seconds")
    ax.set_ylabel("keys in the store")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    if marks:
        ax.legend(
            handlelength=0, handletextpad=0, loc="center left", bbox_to_anchor=(1.01, 0.5)
        )  # fmt: skip
    return finished(fig)
