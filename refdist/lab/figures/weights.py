"""Figures of weights that go from a trainer to inference ranks: chunks, times and losses."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from refdist.lab.figures.style import BLUE, GREEN, ORANGE, SKY, VERMILION, finished

_DPI = 88  # a notebook has several of these, and must stay small


def chunks_of_weights(
    sizes: Sequence[int], chunks: Sequence[Sequence[int]], buffer_bytes: int, title: str = ""
) -> Figure:
    """A bar for each chunk, with a box for each weight, as wide as its bytes.

    Args:
        sizes: the bytes of each weight.
        chunks: for each chunk, the places of its weights.
        buffer_bytes: drawn as a line.
        title: the figure's title.
    """
    height = 1.2 + 0.36 * len(chunks)
    fig, ax = plt.subplots(figsize=(9.2, height), layout="constrained", dpi=_DPI)
    for row, chunk in enumerate(chunks):
        left = 0.0
        for place in chunk:
            width = sizes[place] / 1024
            ax.barh(row, width, left=left, height=0.72, color=SKY, edgecolor="black", linewidth=0.5)
            left += width
        weights = f"{len(chunk)} weight{'s' if len(chunk) > 1 else ''}"
        text = f" {weights}, {left:,.0f} KiB"
        ax.text(left, row, text, va="center", ha="left", fontsize=9)
    ax.axvline(buffer_bytes / 1024, color=VERMILION, linestyle="--", linewidth=1.4)
    widest = max(sum(sizes[place] for place in chunk) for chunk in chunks) / 1024
    ax.set_xlim(0, 1.3 * widest)
    ax.set_yticks(range(len(chunks)), [f"chunk {row}" for row in range(len(chunks))])
    ax.invert_yaxis()
    ax.set_xlabel("KiB; the dashed line is the buffer size")
    ax.set_title(title)
    return finished(fig)


_LOOKS = ((VERMILION, "s", "--"), (ORANGE, "D", "-."), (BLUE, "o", "-"), (GREEN, "^", ":"))


def times_over_weights(seconds: Mapping[str, Mapping[int, float]], title: str = "") -> Figure:
    """Time of up to four ways to send the same bytes, by the number of weights they lie in.

    Args:
        seconds: ``seconds[way][weights]``.
        title: the figure's title.
    """
    fig, ax = plt.subplots(figsize=(8.4, 3.8), layout="constrained", dpi=_DPI)
    for (way, times), (colour, marker, style) in zip(seconds.items(), _LOOKS, strict=False):
        ax.loglog(
            list(times), [value * 1e3 for value in times.values()],
            marker=marker, linestyle=style, color=colour, label=way,
        )  # fmt: skip
    counts = sorted({count for times in seconds.values() for count in times})
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("weights in which the bytes lie")
    ms = [value * 1e3 for times in seconds.values() for value in times.values()]
    steps = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    shown = [step for step in steps if min(ms) / 2 < step < max(ms) * 2]
    ax.set_yticks(shown, [f"{step:g}" for step in shown])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(min(ms) / 1.3, max(ms) * 1.3)
    ax.set_ylabel("time of one hand-over (ms)")
    ax.grid(alpha=0.3)
    ax.set_title(title)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return finished(fig)


_MARKS = ("s", "x", "^", "+")


def losses_of_ranks(losses: Sequence[Sequence[tuple[int, float]]], title: str = "") -> Figure:
    """The loss of each rank against the steps of training: rank 0 as a line, others as marks.

    Args:
        losses: for each rank, pairs of a step and a loss.
        title: the figure's title.
    """
    fig, ax = plt.subplots(figsize=(8.4, 3.6), layout="constrained", dpi=_DPI)
    ax.plot(*zip(*losses[0], strict=True), color=BLUE, linewidth=1.6, label="rank 0, the trainer")
    for rank, pairs in enumerate(losses[1:], start=1):
        mark = _MARKS[(rank - 1) % len(_MARKS)]
        hollow = {"markerfacecolor": "none"} if mark in "s^" else {}
        ax.plot(
            *zip(*pairs, strict=True), linestyle="none", marker=mark, markersize=6 + 3 * (rank % 2),
            color=(VERMILION, GREEN)[rank % 2], label=f"rank {rank}", **hollow,
        )  # fmt: skip
    ax.set_xlabel("steps of training")
    ax.set_ylabel("held-out loss (nats a byte)")
    ax.grid(alpha=0.3)
    ax.set_title(title)
    ax.legend()
    return finished(fig)
