"""Figures of the time of all-reduce."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.fit import Line
from refdist.lab.figures.style import BLUE, DPI, GREEN, SKY, VERMILION, finished


def all_reduce_times(
    timings: Sequence[AllReduceTiming],
    title: str = "",
    line: Line | None = None,
    limit: float | None = None,
) -> Figure:
    """Time and bus bandwidth of all-reduce against the message size, each on logarithmic axes.

    Args:
        timings: timings of one way, by size.
        title: the figure's title.
        line: line fitted to the times, drawn beside them.
        limit: bytes a second that a link carries each way, drawn beside the bandwidths.
    """
    if not timings:
        raise ValueError("timings: is empty")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", dpi=DPI)
    sizes = [timing.num_bytes for timing in timings]
    microseconds = [timing.seconds * 1e6 for timing in timings]
    left.loglog(sizes, microseconds, marker="o", color=BLUE, label="median")
    left.fill_between(
        sizes,
        [timing.fastest * 1e6 for timing in timings],
        [timing.slowest * 1e6 for timing in timings],
        color=SKY, alpha=0.35, label="fastest to slowest run",
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
        marker="s", color=VERMILION, label="bus bandwidth",
    )  # fmt: skip
    right.loglog(
        sizes, [timing.algorithm_bandwidth / 1e9 for timing in timings],
        marker="^", linestyle="--", color=GREEN, label="algorithm bandwidth",
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
    return finished(fig)


_WAYS = {
    "plain": (BLUE, "o", "-"),
    "graph": (BLUE, "o", ":"),
    "one-shot": (VERMILION, "^", "-"),
    "one-shot graph": (VERMILION, "^", ":"),
    "two-shot": (GREEN, "s", "-"),
    "two-shot graph": (GREEN, "s", ":"),
}


def all_reduce_ways(timings: Sequence[AllReduceTiming], title: str = "") -> Figure:
    """Time of all-reduce against the message size, a line for each way, on logarithmic axes.

    Ways that are replayed from a graph are dotted.
    """
    if not timings:
        raise ValueError("timings: is empty")
    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained", dpi=DPI)
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
    return finished(fig)


def _size_axis(ax: Axes, sizes: Sequence[int]) -> None:
    """Draw a logarithmic axis of message sizes, with a mark at each or every second size."""
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
