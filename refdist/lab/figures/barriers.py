"""Figures of barriers, and of the keys in the store."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path

from refdist.lab.costs import BarrierCost
from refdist.lab.figures.style import BLUE, DPI, GREEN, LABEL, ORANGE, SKY, VERMILION, finished
from refdist.lab.observer import KeyCount
from refdist.phases import PhaseEvent

_PHASES = {
    "arrival": (SKY, "///"),
    "confirmation": (ORANGE, "..."),
    "departure": (GREEN, "xxx"),
}
_TIP = Path([(-1, -0.6), (0, 0), (-1, 0.6), (-1, -0.6)], closed=True)
"""An arrow head whose tip is at the moment: a short bar at its right stays visible."""

_SHORT, _LINE = 0.05, 0.003
"""Parts of the axis: a rank's bars get a text if they are shorter, and one bar a thick edge."""


def barrier_timeline(
    events: Iterable[PhaseEvent],
    title: str = "",
    *,
    since: float | None = None,
    last_requests: Sequence[float] | None = None,
    gave_up: Sequence[float | None] = (),
) -> Figure:
    """The phases of barriers: one row a rank, one colour and hatch a phase.

    The axis has milliseconds since the first rank entered. A phase that is too short to be seen at
    this scale shows as a line of its colour. Where all of a rank's phases of one barrier are short,
    a text has their milliseconds.

    Args:
        events: phases of barriers.
        title: the figure's title.
        since: the axis begins there instead; on the clock of the events.
        last_requests: when each rank made its last request to the store, on the same clock. Then a
            line shows when rank 0 left.
        gave_up: when each rank raised an error in departure, on the same clock, or None. Events
            have only phases that ended well, so this wait is a hollow bar with a label.
    """
    all_events = sorted(events, key=lambda event: (event.rank, event.start))
    if not all_events:
        raise ValueError("events: is empty; set group.events = [] before the barrier")
    origin = min(event.start for event in all_events) if since is None else since
    ranks = sorted({event.rank for event in all_events})
    fig, ax = plt.subplots(figsize=(9, 1.3 + 0.55 * len(ranks)), layout="constrained", dpi=DPI)
    raised = {rank: 1e3 * (at - origin) for rank, at in enumerate(gave_up) if at is not None}
    ends = [1e3 * (event.end - origin) for event in all_events]
    whole = max([*ends, *raised.values()])
    enters: dict[str, Any] = {"marker": _TIP, "markersize": 14, "linestyle": ""}
    for event in all_events:
        colour, hatch = _PHASES[event.phase]
        start, width = 1e3 * (event.start - origin), 1e3 * event.seconds
        edge = (colour, 2.5) if width < _LINE * whole else ("black", 0.5)
        ax.barh(
            event.rank, width, left=start, height=0.6, color=colour, hatch=hatch,
            edgecolor=edge[0], linewidth=edge[1],
        )  # fmt: skip
        if event.phase == "arrival" and start >= 0:
            ax.plot(start, event.rank, color="black", clip_on=False, **enters)
    if since is None and len({event.generation for event in all_events}) == 1:
        for rank in ranks:
            _label_short(ax, [e for e in all_events if e.rank == rank], origin, whole, raised)
    marks: list[tuple[str, dict[str, Any]]] = [("enters the barrier", enters)]
    first = "the first rank entered"
    if since is not None:
        first = "the last rank entered"
        ax.set_xlim(0, 1.04e3 * (max(event.end for event in all_events) - origin))
    if last_requests is not None:
        made = [1e3 * (at - origin) for at in last_requests]
        look: dict[str, Any] = {
            "marker": "D",
            "linestyle": "",
            "markerfacecolor": "white",
            "zorder": 3,
        }
        ax.plot(made, range(len(made)), color="black", **look)
        left = max(event.end for event in all_events if event.rank == 0)
        ax.axvline(1e3 * (left - origin), color="black", linestyle="--")
        marks += [("makes its last request", look), ("rank 0 leaves", {"linestyle": "--"})]
    ax.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    ax.tick_params(axis="y", length=0, pad=10)  # room for the mark of a rank that enters at 0
    ax.invert_yaxis()
    ax.set_xlabel(f"milliseconds since {first}")
    ax.set_title(title)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    handles: list[Any] = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", label=phase)
        for phase, (colour, hatch) in _PHASES.items()
    ]
    lines = [plt.Line2D([], [], color="black", label=label, **look) for label, look in marks]
    ax.legend(
        handles=[lines[0], *handles, *lines[1:]], loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    return finished(fig)


def _label_short(
    ax: Axes, events: Sequence[PhaseEvent], origin: float, whole: float, raised: dict[int, float]
) -> None:
    """Draw the unfinished wait of one rank, or write the milliseconds of phases that are short."""
    rank = events[0].rank
    start, end = 1e3 * (events[0].start - origin), 1e3 * (events[-1].end - origin)
    if rank in raised:
        ax.barh(
            rank, raised[rank] - end, left=end, height=0.6, facecolor="white",
            edgecolor="black", linestyle="--",
        )  # fmt: skip
        told = f"waited {raised[rank] - end:.0f} ms in departure, and gave up"
        ax.text((end + raised[rank]) / 2, rank, told, ha="center", va="center", bbox=LABEL)
    elif end - start < _SHORT * whole:
        told = ", ".join(f"{event.phase} {1e3 * event.seconds:.2f} ms" for event in events)
        before = (start + end) / 2 > whole / 2
        ax.annotate(
            told, (start if before else end, rank), (-14 if before else 6, 0), va="center",
            textcoords="offset points", ha="right" if before else "left", bbox=LABEL,
        )  # fmt: skip


_LOOKS = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", ":"), (ORANGE, "D", "-."))


def cost_of_barriers(costs: Iterable[BarrierCost], title: str = "") -> Figure:
    """Milliseconds of a barrier against the number of ranks, on logarithmic axes.

    One line a kind of barrier. The legend has the requests of all ranks, for the most ranks.
    """
    kinds: dict[str, list[BarrierCost]] = {}
    for cost in sorted(costs, key=lambda cost: cost.world_size):
        kinds.setdefault(cost.name, []).append(cost)
    if not kinds:
        raise ValueError("costs: is empty; measure barriers first")
    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained", dpi=DPI)
    for (name, some), (colour, marker, line) in zip(kinds.items(), _LOOKS, strict=False):
        sizes, times = [c.world_size for c in some], [c.milliseconds for c in some]
        label = f"{name}: {some[-1].requests:.0f} requests with {sizes[-1]} ranks"
        ax.plot(sizes, times, color=colour, marker=marker, linestyle=line, label=label)
    sizes = sorted({cost.world_size for some in kinds.values() for cost in some})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("ranks")
    ax.set_ylabel("milliseconds a barrier")
    ax.set_title(title)
    ax.grid(alpha=0.3, which="both")
    ax.legend(loc="upper left")
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
