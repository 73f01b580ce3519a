"""The lines of the benchmarks' tables: a header for each kind of timing, and a row for each one."""

from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any

from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.control import ControlTiming
from refdist.benchmarks.nccl import NcclTiming
from refdist.benchmarks.secret import SecretTiming
from refdist.benchmarks.small import SmallSumTiming
from refdist.benchmarks.weights import WeightsTiming

HEADERS: dict[type, str] = {
    ControlTiming: f"{'ranks':>5}  {'operation':21} {'by':48} {'time (ms)':>9} {'/ refdist':>9}",
    AllReduceTiming: (
        f"{'bytes':>11}  {'dtype':9} {'way':15} {'time (us)':>10} {'fastest':>10} {'slowest':>10}"
        f" {'launch':>10} {'algorithm (GB/s)':>17} {'bus (GB/s)':>11}"
    ),
    SmallSumTiming: (
        f"{'ranks':>5} {'bytes':>7} {'cpu_all_reduce_ (us)':>21} {'gloo (us)':>10} {'ratio':>6}"
    ),
    SecretTiming: (
        f"{'ranks':>5}  {'operation':21} {'secret (ms)':>11} {'none (ms)':>9} {'ratio':>6}"
    ),
    WeightsTiming: (
        f"{'buffer':>8}  {'way':12} {'time (ms)':>10} {'GB/s':>7} {'bare time / time':>17}"
    ),
    NcclTiming: (
        f"{'operation':10} {'way':6} {'bytes':>11} {'refdist (us)':>13} {'torch (us)':>11} "
        f"{'ratio':>6} {'launch':>8} {'torch':>8} {'bus (GB/s)':>11} {'torch':>7}"
    ),
}


def rows(timings: Sequence[Any]) -> Iterator[str]:
    """The row of each timing. Those of ``control`` are compared with refdist's among them."""
    if timings and isinstance(timings[0], ControlTiming):
        return _compared(timings)
    return map(_row, timings)


def _compared(timings: Sequence[ControlTiming]) -> Iterator[str]:
    ours = {t.operation: t.seconds for t in timings if t.implementation == "refdist"}
    for t in timings:
        yield (
            f"{t.world_size:5}  {t.operation:21} {t.implementation:48} {t.seconds * 1e3:9.3f} "
            f"{t.seconds / ours[t.operation]:9.2f}"
        )


@singledispatch
def _row(timing: Any) -> str:
    raise TypeError(f"{type(timing).__name__}: has no table")


@_row.register
def _(timing: AllReduceTiming) -> str:
    times = (timing.seconds, timing.fastest, timing.slowest, timing.launch_seconds)
    return (
        f"{timing.num_bytes:11}  {timing.dtype:9} {timing.way:15} "
        f"{' '.join(f'{seconds * 1e6:10.2f}' for seconds in times)} "
        f"{timing.algorithm_bandwidth / 1e9:17.4g} {timing.bus_bandwidth / 1e9:11.4g}"
    )


@_row.register
def _(timing: SmallSumTiming) -> str:
    return (
        f"{timing.world_size:5} {timing.num_bytes:7} {timing.seconds * 1e6:21.1f} "
        f"{timing.gloo_seconds * 1e6:10.1f} {timing.ratio:6.2f}"
    )


@_row.register
def _(timing: SecretTiming) -> str:
    per_byte = f"  {timing.nanoseconds_per_byte:.2f} ns/byte" if timing.num_bytes else ""
    return (
        f"{timing.world_size:5}  {timing.operation:21} {timing.seconds * 1e3:11.3f} "
        f"{timing.plain_seconds * 1e3:9.3f} {timing.ratio:6.3f}{per_byte}"
    )


@_row.register
def _(timing: WeightsTiming) -> str:
    return (
        f"{timing.buffer_bytes // 2**20:4} MiB  {timing.way:12} {timing.seconds * 1e3:10.3f} "
        f"{timing.bytes_per_second / 1e9:7.2f} {timing.ratio:17.3f}"
    )


@_row.register
def _(timing: NcclTiming) -> str:
    return (
        f"{timing.operation:10} {timing.way:6} {timing.num_bytes:11} "
        f"{timing.seconds * 1e6:13.2f} {timing.torch_seconds * 1e6:11.2f} {timing.ratio:6.3f} "
        f"{timing.launch_seconds * 1e6:8.2f} {timing.torch_launch_seconds * 1e6:8.2f} "
        f"{timing.bus_bandwidth / 1e9:11.2f} {timing.torch_bus_bandwidth / 1e9:7.2f}"
    )
