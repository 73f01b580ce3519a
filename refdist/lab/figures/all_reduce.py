"""Figures of all-reduce: the steps of a ring, its time, and buckets of gradients."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.fit import Line
from refdist.lab.figures.style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, finished

_DPI = 88  # a notebook has several of these, and must stay small
_OF_CHUNKS = (SKY, ORANGE, GREEN, VERMILION)
_ROW = 1.5  # from a rank to the next, with room for an arrow


def ring_steps() -> Figure:
    """A ring all-reduce on four ranks: what each rank has at first, and after each step.

    A column is a chunk. A cell names the ranks whose numbers are in its sum. An arrow leads to the
    cell that a rank has just received.
    """
    n = 4
    fig, axes = plt.subplots(2, n, figsize=(11.5, 6), layout="constrained", dpi=_DPI)
    held: list[list[tuple[int, ...]]] = [[(rank,)] * n for rank in range(n)]
    panels = [ax for row in axes for ax in row]
    _chunks(panels[0], held, None, "at first")
    panels[n].set_axis_off()
    for step, ax in enumerate(panels[1:n] + panels[n + 1 :]):
        adds = step < n - 1
        moved = [held[rank][(rank - step) % n] for rank in range(n)]
        for rank in range(n):
            # a rank receives what its left neighbour sends
            received = (rank - 1 - step) % n
            own = held[rank][received] if adds else ()
            held[rank][received] = (*moved[rank - 1], *own)
        phase = "reduce-scatter" if adds else "all-gather"
        _chunks(ax, held, step, f"after step {step}: {phase}")
    return finished(fig)


def _chunks(ax: Axes, held: list[list[tuple[int, ...]]], step: int | None, title: str) -> None:
    n = len(held)
    for rank, chunks in enumerate(held):
        for chunk, ranks in enumerate(chunks):
            whole, new = len(ranks) == n, step is not None and chunk == (rank - 1 - step) % n
            ax.add_patch(
                Rectangle(
                    (chunk, rank * _ROW), 0.94, 1, linewidth=2.4 if new else 0.5,
                    facecolor=to_rgba(_OF_CHUNKS[chunk], 0.05 + 0.2 * len(ranks)),
                    edgecolor="black",
                )
            )  # fmt: skip
            text = "all" if whole else "+".join(map(str, sorted(ranks)))
            ax.text(
                chunk + 0.47, rank * _ROW + 0.5, text, ha="center", va="center",
                weight="bold" if whole else "normal", fontsize=8 if len(ranks) == 3 else 10,
            )  # fmt: skip
            if new:
                _arrow(ax, chunk + 0.47, rank * _ROW)
                if rank == 0:  # from the last rank
                    _arrow(ax, chunk + 0.47, n * _ROW)
    ax.set_xlim(-0.1, n)
    ax.set_ylim(n * _ROW + 0.05, -_ROW + 0.95)
    ax.set_xticks([chunk + 0.47 for chunk in range(n)], map(str, range(n)))
    ax.set_xlabel("chunk")
    ax.set_yticks([rank * _ROW + 0.5 for rank in range(n)], [f"rank {r}" for r in range(n)])
    ax.tick_params(length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11)


def _arrow(ax: Axes, x: float, end: float) -> None:
    style = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, end - 0.03), (x, end + 1 - _ROW + 0.03), arrowprops=style)


_LOOKS = ((VERMILION, "s", "--"), (BLUE, "o", "-"), (GREEN, "^", ":"))


def times_over_ranks(
    seconds: Mapping[str, Mapping[str, Mapping[int, float]]], cores: int | None, title: str = ""
) -> Figure:
    """Time of up to three ways to all-reduce against the number of ranks, a panel for each size.

    Args:
        seconds: ``seconds[size][way][ranks]``.
        cores: number of cores of the machine, drawn if it is between two numbers of ranks.
        title: the figure's title.
    """
    fig, axes = plt.subplots(
        1, len(seconds), figsize=(9.2, 3.6), layout="constrained", dpi=_DPI, squeeze=False
    )
    for ax, (size, ways) in zip(axes[0], seconds.items(), strict=True):
        for (way, times), (colour, marker, style) in zip(ways.items(), _LOOKS, strict=False):
            ax.plot(
                list(times), [value * 1e3 for value in times.values()],
                marker=marker, linestyle=style, color=colour, label=way,
            )  # fmt: skip
        ranks = sorted({n for times in ways.values() for n in times})
        if cores is not None and ranks[0] <= cores <= ranks[-1]:
            ax.axvline(cores, color="black", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
            ax.text(
                cores + 0.08, 0.97, f"{cores} cores", va="top", transform=ax.get_xaxis_transform()
            )
        ax.set_xticks(ranks)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("ranks")
        ax.set_ylabel("time of one all-reduce (ms)")
        ax.set_title(size)
        ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    fig.suptitle(title)
    return finished(fig)


def buckets_over_time(
    plans: Mapping[str, Sequence[tuple[float, float]]], backward_seconds: float, title: str = ""
) -> Figure:
    """The backward pass, and below it the all-reduces of each plan, as bars over time.

    Args:
        plans: start and end of each all-reduce in seconds, by the name of the plan.
        backward_seconds: end of the backward pass.
        title: the figure's title.
    """
    fig, ax = plt.subplots(figsize=(9.2, 2.8), layout="constrained", dpi=_DPI)
    ax.barh(0, backward_seconds * 1e3, color=GREY, edgecolor="black", linewidth=0.6)
    ax.text(backward_seconds * 500, 0, "backward pass", ha="center", va="center")
    for row, spans in enumerate(plans.values(), start=1):
        for number, (start, end) in enumerate(spans):
            ax.barh(
                row, (end - start) * 1e3, left=start * 1e3, edgecolor="black", linewidth=0.4,
                color=(BLUE, SKY)[number % 2],
            )  # fmt: skip
        end = spans[-1][1] * 1e3
        ax.text(end + 0.05, row, f"{end:.2f} ms", va="center")
    names = [
        f"{name}: {len(spans)} all-reduce{'s' if len(spans) > 1 else ''}"
        for name, spans in plans.items()
    ]
    ax.set_yticks(range(len(plans) + 1), ["gradients", *names])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1e3 * max(backward_seconds, *(spans[-1][1] for spans in plans.values())))
    ax.set_xlabel("time since the start of the backward pass (ms)")
    ax.set_title(title)
    return finished(fig)


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
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", dpi=_DPI)
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
    fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained", dpi=_DPI)
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
    """Draw a logarithmic axis of message sizes, with marks that leave room for their names."""
    shown: list[int] = []
    for size in sizes:
        if not shown or (size / shown[-1]) ** 7 >= sizes[-1] / sizes[0]:
            shown.append(size)
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
