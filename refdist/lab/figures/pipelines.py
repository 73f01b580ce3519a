"""Figures of pipelines: the memory and the times of their stages."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from refdist.benchmarks.pipeline import StageTiming
from refdist.lab.figures.style import DPI, GREEN, LABEL, ORANGE, SKY, finished
from refdist.pipeline import Device, Model, Serving
from refdist.pipeline.cost import room_bytes, weight_bytes_per_stage

_GIB = 2**30
_PARTS = (
    ("layers (with their number)", SKY, ""),
    ("embedding or head", ORANGE, "////"),
    ("key-value cache", GREEN, "..."),
)


def memory_of_stages(
    model: Model,
    device: Device,
    serving: Serving,
    partitions: Mapping[str, tuple[Sequence[range], int]],
    title: str = "",
) -> Figure:
    """The memory of each stage: its layers, embedding or head, and the blocks of the cache.

    Args:
        model: the model that is served.
        device: device of each stage.
        serving: serving settings.
        partitions: by name, the layers of each stage, and the blocks of the pipeline.
        title: the figure's title.
    """
    fig, axes = plt.subplots(
        1, len(partitions), figsize=(11, 3.8), layout="constrained", dpi=DPI, sharey=True,
        squeeze=False,
    )  # fmt: skip
    room = room_bytes(device, serving) / _GIB
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
        ax.axhline(room, color="black", linestyle="--", linewidth=1)
        ax.set_title(f"{name}: {blocks:,} blocks", fontsize=10)
        ax.set_xlabel("stage")
        ax.set_xticks(range(len(stages)))
    axes[0, 0].set_ylabel("GiB")
    fig.suptitle(title)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="black", label=n) for n, c, h in _PARTS]
    line = plt.Line2D([], [], color="black", linestyle="--", linewidth=1, label="room")
    fig.legend(handles=[*handles, line], loc="outside lower center", ncols=4, frameon=False)
    return finished(fig)


def predicted_against_measured(
    timings: Mapping[str, Sequence[StageTiming]],
    predicted: Mapping[str, Sequence[float]],
    title: str = "",
) -> Figure:
    """The time of each stage of a real pipeline, beside the roofline's; a panel for each rule.

    Args:
        timings: for each rule, the measurements of each stage.
        predicted: for each rule, the seconds of each stage.
        title: the figure's title.
    """
    fig, axes = plt.subplots(
        1, len(timings), figsize=(11, 3.8), layout="constrained", dpi=DPI, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, (name, stages) in zip(axes.flat, timings.items(), strict=True):
        for timing in stages:
            _draw_stage_time(ax, timing, predicted[name][timing.rank])
        counts = [len(timing.layers) for timing in stages]
        ax.set_xticks(range(len(counts)), [f"{i}\n({n} layers)" for i, n in enumerate(counts)])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("stage")
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    axes[0, 0].set_ylabel("processor time of a micro-batch (ms)")
    fig.suptitle(title)
    handles = [
        Patch(facecolor=SKY, edgecolor="black", label="predicted by roofline"),
        Patch(facecolor=ORANGE, hatch="////", edgecolor="black", label="measured, median"),
        plt.Line2D([], [], color="black", linewidth=1.5, label="fastest to slowest run"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return finished(fig)


def _draw_stage_time(ax: Axes, timing: StageTiming, predicted: float) -> None:
    ax.bar(
        timing.rank - 0.2, predicted * 1e3, width=0.38, color=SKY, edgecolor="black", linewidth=0.5
    )
    ax.bar(
        timing.rank + 0.2, timing.seconds * 1e3, width=0.38, color=ORANGE, hatch="////",
        edgecolor="black", linewidth=0.5,
    )  # fmt: skip
    ax.plot(
        [timing.rank + 0.2] * 2, [timing.fastest * 1e3, timing.slowest * 1e3],
        color="black", linewidth=1.5,
    )  # fmt: skip


def pipeline_timeline(timings: Mapping[str, Sequence[StageTiming]], title: str = "") -> Figure:
    """The measured times of each stage on each micro-batch; a panel for each rule."""
    fig, axes = plt.subplots(
        len(timings), 1, figsize=(10, 0.7 + 1.5 * len(timings)), layout="constrained", dpi=DPI,
        sharex=True, squeeze=False,
    )  # fmt: skip
    for ax, (name, stages) in zip(axes.flat, timings.items(), strict=True):
        origin = min(timing.busy[0][0] for timing in stages)
        for timing in stages:
            for number, (start, end) in enumerate(timing.busy):
                ax.barh(
                    timing.rank, end - start, left=start - origin, height=0.8, edgecolor="black",
                    linewidth=0.5, color=(SKY, ORANGE)[number % 2],
                )  # fmt: skip
                ax.text(
                    (start + end) / 2 - origin, timing.rank, str(number), ha="center", va="center",
                    fontsize=7,
                )  # fmt: skip
        ax.set_yticks(range(len(stages)))
        ax.invert_yaxis()
        ax.set_title(name, fontsize=10)
        ax.set_ylabel("stage")
    axes.flat[-1].set_xlabel("seconds since the first micro-batch began")
    fig.suptitle(title)
    return finished(fig)
