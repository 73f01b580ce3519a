"""Figures of notebook 06: how long attacks took, and what the ranks of two hosts see."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from refdist.lab.attempts import Attempt
from refdist.lab.figures.style import BLUE, DPI, GREY, ORANGE, VERMILION, finished


def attack_times(attempts: Mapping[str, Attempt]) -> Figure:
    """The time that each attacked call took, and its end.

    Args:
        attempts: the attacked call by the name of the attack, in order from above.
    """
    figure, axes = plt.subplots(figsize=(8.6, 0.8 + 0.34 * len(attempts)), dpi=DPI - 20)
    for row, seen in enumerate(attempts.values()):
        colour, marker = (BLUE, "o") if seen.kind else (VERMILION, "X")
        came = seen.kind or "no error: the attack succeeded"
        axes.plot(seen.ms, row, marker, color=colour, markersize=9)
        text = f"{seen.ms:.2f} ms" if seen.ms < 10 else f"{seen.ms:,.0f} ms"
        beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{text}, {came}", (seen.ms, row), **beside)
    most = max(seen.ms for seen in attempts.values())
    axes.set_xscale("log")
    axes.set_xlim(min(seen.ms for seen in attempts.values()) / 2, most * 12000)
    axes.set_xticks([10.0**n for n in range(-1, 5) if axes.get_xlim()[0] <= 10.0**n <= 2 * most])
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
    axes.minorticks_off()
    axes.set_yticks(range(len(attempts)), list(attempts))
    axes.set_ylim(len(attempts) - 0.4, -0.6)
    axes.set_xlabel("until the attacked call ended (ms, logarithmic)")
    axes.grid(axis="x", color=GREY)
    axes.set_axisbelow(True)
    figure.tight_layout()
    return finished(figure)


def waits_of_hosts(attempts: Sequence[Attempt], hosts: Sequence[int], timeout: float) -> Figure:
    """The time that each rank waited in a barrier, and its error.

    Args:
        attempts: the barrier of each rank.
        hosts: the host of each rank.
        timeout: of the barrier, in seconds.
    """
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.5 * len(attempts)), dpi=DPI)
    for rank, (seen, host) in enumerate(zip(attempts, hosts, strict=True)):
        beyond = host != hosts[0]
        axes.barh(
            rank,
            seen.ms / 1000,
            height=0.62,
            color=ORANGE if beyond else BLUE,
            hatch="//" if beyond else None,
            edgecolor="white",
        )
        missing = f", missing {', '.join(map(str, seen.missing))}" if seen.missing else ""
        text = f"{seen.ms / 1000:.2f} s: {seen.kind or 'passed'}{missing}"
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (seen.ms / 1000, rank), **beside)
    axes.axvline(timeout, color="black", linewidth=1, linestyle="--")
    axes.annotate(
        f"timeout, {timeout:g} s", (timeout, -0.62), xytext=(4, 0), textcoords="offset points"
    )
    names = [f"rank {rank}, host {host}" for rank, host in enumerate(hosts)]
    axes.set_yticks(range(len(attempts)), names)
    axes.set_ylim(len(attempts) - 0.4, -1.0)
    axes.set_xlim(0, 1.4 * max(timeout, *(seen.ms / 1000 for seen in attempts)))
    axes.set_xlabel("from the start of the barrier until its error (s)")
    figure.tight_layout()
    return finished(figure)
