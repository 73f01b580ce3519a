"""Figures of pipelines: the layers, the memory and the times of their stages."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from refdist.lab.figures.style import DPI, GREEN, GREY, LABEL, ORANGE, SKY, finished
from refdist.pipeline import Model, Serving
from refdist.pipeline.cost import weight_bytes_per_stage

_GIB = 2**30
_PARTS = (
    ("layers (with their number)", SKY, ""),
    ("embedding or head", ORANGE, "////"),
    ("key-value cache", GREEN, "..."),
)


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


def memory_of_stages(
    model: Model,
    serving: Serving,
    room: float,
    partitions: Mapping[str, tuple[Sequence[range], int]],
    title: str = "",
) -> Figure:
    """The memory of each stage: its layers, embedding or head, and the blocks of the cache.

    Args:
        model: the model that is served.
        serving: serving settings.
        room: bytes of a stage for weights and cache.
        partitions: by name, the layers of each stage, and the blocks of the pipeline.
        title: the figure's title.
    """
    fig, axes = plt.subplots(
        1, len(partitions), figsize=(11, 3.8), layout="constrained", dpi=DPI, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, (name, (stages, blocks)) in zip(axes.flat, partitions.items(), strict=True):
        in_all = weight_bytes_per_stage(model, stages, serving)
        for number, (layers, total) in enumerate(zip(stages, in_all, strict=True)):
            own = model.layer_parameters(layers) * serving.bytes_per_weight / _GIB
            ends = total / _GIB - own
            elements = len(layers) * model.attention.kv_elements * serving.block_tokens
            cache = blocks * elements * serving.bytes_per_kv_element / _GIB
            bottom = 0.0
            for height, (_, colour, hatch) in zip((own, ends, cache), _PARTS, strict=True):
                ax.bar(
                    number, height, bottom=bottom, color=colour, hatch=hatch, edgecolor="black",
                    linewidth=0.5, width=0.8,
                )  # fmt: skip
                bottom += height
            ax.text(number, own / 2, str(len(layers)), ha="center", fontsize=8, bbox=LABEL)
        ax.axhline(room / _GIB, color="black", linestyle="--", linewidth=1)
        ax.set_title(f"{name}: {blocks:,} blocks", fontsize=10)
        ax.set_xlabel("stage")
        ax.set_xticks(range(len(stages)))
    axes[0, 0].set_ylabel("GiB")
    fig.suptitle(title)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="black", label=n) for n, c, h in _PARTS]
    line = plt.Line2D([], [], color="black", linestyle="--", linewidth=1, label="room")
    fig.legend(handles=[*handles, line], loc="outside lower center", ncols=4, frameon=False)
    return finished(fig)


def pipeline_timeline(
    busy: Mapping[str, Sequence[Sequence[Sequence[float]]]], title: str = ""
) -> Figure:
    """The times at which each stage works on each micro-batch; a panel for each partition.

    Args:
        busy: for each partition and stage, start and end of each micro-batch in seconds; what
            follows them is not drawn.
        title: the figure's title.
    """
    stages = len(next(iter(busy.values())))
    height = 0.9 + len(busy) * (0.6 + 0.35 * stages)
    fig, axes = plt.subplots(
        len(busy), 1, figsize=(9, height), layout="constrained", dpi=DPI, sharex=True,
        squeeze=False,
    )  # fmt: skip
    for ax, (name, batches) in zip(axes.flat, busy.items(), strict=True):
        origin = min(start for stage in batches for start, *_ in stage)
        for row, stage in enumerate(batches):
            for number, (start, end, *_) in enumerate(stage):
                start, end = (start - origin) * 1e3, (end - origin) * 1e3
                odd = number % 2
                ax.barh(
                    row, end - start, left=start, height=0.8, edgecolor="black", linewidth=0.5,
                    color=(SKY, ORANGE)[odd], hatch=("", "////")[odd],
                )  # fmt: skip
                ax.text(
                    (start + end) / 2, row, str(number), ha="center", va="center", fontsize=8,
                    bbox=LABEL,
                )  # fmt: skip
        ax.set_yticks(range(len(batches)))
        ax.invert_yaxis()
        ax.set_title(name, fontsize=10)
        ax.set_ylabel("stage")
    axes.flat[-1].set_xlabel("ms since the first micro-batch began")
    fig.suptitle(title)
    return finished(fig)
