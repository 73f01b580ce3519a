"""A figure of the calls of a job that hangs."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from refdist.lab.figures.style import DPI, ORANGE, SKY, finished

_DONE, _WAITS, _ABSENT = "done", "waits", "has not come"
_LOOKS: dict[str, dict[str, Any]] = {
    _DONE: {"facecolor": SKY, "edgecolor": "black"},
    _WAITS: {"facecolor": ORANGE, "edgecolor": "black", "hatch": "//"},
    _ABSENT: {"facecolor": "white", "edgecolor": "black", "linestyle": "--"},
}


def call_grid(records: Sequence[Sequence[Mapping[str, Any]]], title: str = "") -> Figure:
    """The calls of all ranks: one row a rank, one column a call, numbered in its group.

    Args:
        records: of each rank, its calls: ``group``, ``number``, ``operation`` and ``done``.
        title: the figure's title.
    """
    columns = sorted({(call["group"], call["number"]) for calls in records for call in calls})
    if not columns:
        raise ValueError("records: are empty; no rank has made a call")
    size = (2.6 + 1.5 * len(columns), 1.3 + 0.5 * len(records))
    fig, ax = plt.subplots(figsize=size, layout="constrained", dpi=DPI)
    for rank, calls in enumerate(records):
        made = {(call["group"], call["number"]): call for call in calls}
        for place, column in enumerate(columns):
            call = made.get(column)
            state = _ABSENT if call is None else _DONE if call["done"] else _WAITS
            look = _LOOKS[state]
            ax.add_patch(Rectangle((place - 0.44, rank - 0.36), 0.88, 0.72, **look))
            if call is not None:
                back = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 1.5}
                text = str(call["operation"])
                ax.text(place, rank, text, ha="center", va="center", fontsize=9, bbox=back)
    ax.set_xlim(-0.6, len(columns) - 0.4)
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), [f"{group} {number}" for group, number in columns])
    ax.set_yticks(range(len(records)), [f"rank {rank}" for rank in range(len(records))])
    ax.set_xlabel("group and number of the call")
    ax.set_title(title, fontsize=11)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    handles = [Patch(label=state, **look) for state, look in _LOOKS.items()]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return finished(fig)
