"""Figure of groups that share processes."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from refdist.lab.figures.style import DPI, GREEN, GREY, LABEL, ORANGE, SKY, finished

_FILLS = ((SKY, "///"), (ORANGE, "..."), (GREEN, "xxx"))


def memberships(ranks: Sequence[Mapping[str, int | None]], title: str = "") -> Figure:
    """The groups of each process, and its rank in each: one column a process, one row a group.

    Args:
        ranks: for each process, its rank by the name of the group; None where it is not in it.
        title: the figure's title.
    """
    groups = list(ranks[0])
    fig, ax = plt.subplots(
        figsize=(2.2 + 1.3 * len(ranks), 0.9 + 0.55 * len(groups)), layout="constrained", dpi=DPI
    )
    for row, group in enumerate(groups):
        colour, hatch = _FILLS[row % len(_FILLS)]
        for column, of_process in enumerate(ranks):
            rank = of_process[group]
            inside = rank is not None
            box = Rectangle(
                (column - 0.46, row - 0.38), 0.92, 0.76, linewidth=0.8 if inside else 0,
                facecolor=colour if inside else GREY, hatch=hatch if inside else None,
                edgecolor="black",
            )  # fmt: skip
            ax.add_patch(box)
            text = f"rank {rank}" if inside else "not in it"
            ax.text(column, row, text, ha="center", va="center", bbox=LABEL if inside else None)
    ax.set_xlim(-0.55, len(ranks) - 0.45)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xticks(range(len(ranks)), [f"engine {number}" for number in range(len(ranks))])
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(groups)), groups)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title)
    return finished(fig)
