"""Figures of partitions: rules side by side, their imbalance, the gain of the best."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from refdist.lab.figures.style import BLUE, DPI, GREY, LABEL, ORANGE, SKY, VERMILION, finished
from refdist.pipeline import Assessment
from refdist.pipeline.study import Gain

_MANY_STAGES = 24  # with more, blocks are narrower than their numbers


def stages_of_models(partitions: Mapping[str, Mapping[int, Sequence[int]]]) -> Figure:
    """The layers of models on stages: a panel a model, a row for each number of stages.

    Args:
        partitions: for each model and number of stages, the layers of each stage in order.
    """
    columns = 3
    rows = -(-len(partitions) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(11, 0.8 + 3.4 * rows), layout="constrained", dpi=DPI, squeeze=False
    )
    for ax in axes.flat[len(partitions) :]:
        ax.remove()
    for ax, (model, by_size) in zip(axes.flat, partitions.items(), strict=False):
        _draw_stages(ax, by_size)
        ax.tick_params(labelsize=8)
        ax.set_title(f"{model}: {sum(next(iter(by_size.values())))} layers", fontsize=10)
    fig.supxlabel("layer")
    fig.supylabel("pipeline stages")
    fig.legend(handles=_stage_legend(), loc="outside upper center", ncols=2, frameon=False)
    return finished(fig)


def _draw_stages(ax: Axes, partitions: Mapping[int, Sequence[int]]) -> None:
    sizes = sorted(partitions)
    for row, size in enumerate(sizes):
        start, fewest = 0, min(partitions[size])
        for layers in partitions[size]:
            more = layers > fewest
            ax.barh(
                row, layers, left=start, height=0.76, color=ORANGE if more else SKY,
                hatch="////" if more else "", edgecolor="black", linewidth=0.5,
            )  # fmt: skip
            start += layers
    ax.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    ax.invert_yaxis()
    ax.set_xlim(0, sum(partitions[sizes[0]]))


def _stage_legend() -> list[Patch]:
    return [
        Patch(facecolor=SKY, edgecolor="black", label="fewest layers of the row"),
        Patch(facecolor=ORANGE, hatch="////", edgecolor="black", label="more than the fewest"),
    ]


def remainder_map(extra: Sequence[Sequence[int]], title: str = "") -> Figure:
    """The stages that get one layer more: a row for each remainder, a column for each stage.

    Args:
        extra: for each remainder 0, 1, ..., the extra layers of each stage (0 or 1).
        title: the figure's title.
    """
    rows, columns = len(extra), len(extra[0])
    fig, ax = plt.subplots(
        figsize=(1.8 + 0.5 * columns, 1.6 + 0.34 * rows), layout="constrained", dpi=DPI
    )
    for row, counts in enumerate(extra):
        for column, count in enumerate(counts):
            ax.barh(
                row, 0.92, left=column - 0.46, height=0.86, color=ORANGE if count else GREY,
                hatch="///" if count else "", edgecolor="black" if count else "white",
                linewidth=0.5,
            )  # fmt: skip
            if count:
                ax.text(
                    column, row, f"+{count}", ha="center", va="center", fontsize=8,
                    bbox=LABEL,
                )  # fmt: skip
    ax.set_xticks(range(columns))
    ax.set_yticks(range(rows))
    ax.invert_yaxis()
    ax.set_xlabel("stage")
    ax.set_ylabel("layers that remain")
    ax.set_title(title)
    for side in ax.spines.values():
        side.set_visible(False)
    return finished(fig)


def rules_side_by_side(rows: Sequence[Assessment], title: str = "") -> Figure:
    """The layers of each stage, a row for each rule. A rule that refuses shows its reason."""
    fig, ax = plt.subplots(figsize=(10, 1.3 + 0.42 * len(rows)), layout="constrained", dpi=DPI)
    num_layers = max(sum(row.layers_per_stage) for row in rows)
    for number, row in enumerate(rows):
        counts = row.layers_per_stage
        for stage, layers in zip(counts, row.stages, strict=True):
            more = stage > min(counts)
            ax.barh(
                number, stage, left=layers.start, height=0.76, edgecolor="black", linewidth=0.5,
                color=ORANGE if more else SKY, hatch="////" if more else "",
            )  # fmt: skip
            if stage and len(counts) <= _MANY_STAGES:
                ax.text(
                    layers.start + stage / 2, number, str(stage), ha="center", va="center",
                    fontsize=8, bbox=LABEL,
                )  # fmt: skip
        if row.remarks:
            beside = 1.01 if counts else 0.01
            ax.text(beside * num_layers, number, row.remarks[0], va="center", fontsize=7)
    ax.set_yticks(range(len(rows)), [row.rule for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, num_layers)
    ax.set_xlabel("layer")
    ax.set_title(title)
    handles = [
        Patch(facecolor=SKY, edgecolor="black", label="fewest layers of the row"),
        Patch(facecolor=ORANGE, hatch="////", edgecolor="black", label="more than the fewest"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return finished(fig)


def rates(rows: Sequence[Assessment], title: str = "") -> Figure:
    """Key-value blocks, prefill, decode and requests a second, as multiples of the first row."""
    kept = [row for row in rows if row.stages]
    panels: dict[str, list[float]] = {
        "KV blocks": [row.kv_blocks for row in kept],
        "prefill tokens/s": [row.prefill_tokens_per_second for row in kept],
        "decode tokens/s": [row.decode_tokens_per_second for row in kept],
        "requests/s": [row.requests_per_second for row in kept],
    }
    fig, axes = plt.subplots(
        1, len(panels), figsize=(11, 1.3 + 0.34 * len(kept)), layout="constrained", dpi=DPI,
        sharey=True,
    )  # fmt: skip
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        ratios = [value / values[0] if values[0] else math.nan for value in values]
        best = max((ratio for ratio in ratios if not math.isnan(ratio)), default=1)
        for number, ratio in enumerate(ratios):
            lead = ratio >= best * (1 - 1e-9)
            ax.barh(
                number, ratio, height=0.7, edgecolor="black", linewidth=0.5,
                color=ORANGE if lead else SKY, hatch="////" if lead else "",
            )  # fmt: skip
            ax.text(0.04 * best, number, f"{ratio:.2f}", va="center", fontsize=8, bbox=LABEL)
        ax.axvline(1, color="black", linestyle=":", linewidth=1)
        ax.set_xlabel(f"{name}\n(multiples of the first row)")
    axes[0].set_yticks(range(len(kept)), [row.rule for row in kept])
    axes[0].invert_yaxis()
    fig.suptitle(title)
    leads = Patch(facecolor=ORANGE, hatch="////", edgecolor="black", label="the most")
    fig.legend(handles=[leads], loc="outside lower center", frameon=False)
    return finished(fig)


def imbalance_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    layers: Sequence[int],
    sizes: Sequence[int],
    title: str = "",
) -> Figure:
    """The excess of the heaviest stage over the mean: a map for each rule.

    Args:
        maps: for each rule, a row for each number of stages, a column for each number of layers;
            NaN where the rule refuses or leaves a stage without layers.
        layers: numbers of layers.
        sizes: numbers of stages.
        title: the figure's title.
    """
    columns = 4
    rows = -(-len(maps) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(11.5, 0.9 + 2.5 * rows), layout="constrained", dpi=DPI,
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    colours = plt.get_cmap("cividis_r").with_extremes(bad=(0, 0, 0, 0))
    extent = (layers[0] - 0.5, layers[-1] + 0.5, sizes[0] - 0.5, sizes[-1] + 0.5)
    for ax in axes.flat[len(maps) :]:
        ax.remove()
    for ax, (name, values) in zip(axes.flat, maps.items(), strict=False):
        ax.patch.set(hatch="xxx", edgecolor="#BBBBBB")
        image = ax.imshow(
            values, origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=0, vmax=1,
            interpolation="nearest",
        )  # fmt: skip
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(name, fontsize=10)
    fig.supxlabel("layers")
    fig.supylabel("stages")
    bar = fig.colorbar(image, ax=fig.axes, extend="max", shrink=0.8)
    bar.set_label("heaviest stage over the mean, less 1")
    fig.suptitle(f"{title} (crossed: refuses, or leaves a stage without layers)", fontsize=11)
    return finished(fig)


def gain_against_room(gains: Sequence[Gain], title: str = "") -> Figure:
    """The gain of the best partition against the room that the weights leave; a point a case."""
    fig, axes = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", dpi=DPI, sharex=True, sharey=True
    )
    finite = [case for case in gains if math.isfinite(case.kv_blocks)]
    top = 1.6 * max(max(case.kv_blocks, case.requests_per_second) for case in finite)
    panels = (("KV blocks", "kv_blocks"), ("requests a second", "requests_per_second"))
    for ax, (name, attribute) in zip(axes, panels, strict=True):
        ax.scatter(
            [case.room_left for case in finite], [getattr(case, attribute) for case in finite],
            s=22, facecolors="none", edgecolors=BLUE, linewidths=0.9, label="both fit",
        )  # fmt: skip
        ax.scatter(
            [case.room_left for case in gains if case not in finite],
            [top] * (len(gains) - len(finite)),
            marker="^", color=VERMILION, label="only the best fits", zorder=3,
        )  # fmt: skip
        ax.set(xscale="log", yscale="log", ylim=(0.97, top * 1.2))
        ax.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"], minor=False)
        ax.minorticks_off()
        ax.set_xticks([0.3, 1, 3, 10, 30, 100, 300], ["0.3", "1", "3", "10", "30", "100", "300"])
        ax.set_xlabel("room left on a stage, in layers, embeddings or heads (the heaviest)")
        ax.set_ylabel(f"{name}: best over the specification")
        ax.grid(alpha=0.3)
    axes[0].legend(loc="upper right")
    fig.suptitle(title)
    return finished(fig)
