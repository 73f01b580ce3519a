"""Checks of notebook 03: a ring all-reduce, its bandwidths, its costs, and buckets.

The ring runs on the engines, where the notebook has defined it, in groups that the check forms.
Their timeout is short, so a ring that waits for itself ends with an error on every engine.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf, isclose, sqrt
from time import monotonic
from typing import Any
from zlib import crc32

import torch
from torch.distributed import ProcessGroup

from refdist import (
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.benchmarks.allreduce import AllReduceTiming
from refdist.benchmarks.ways import SMALL_BYTES
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import UnsolvedError, exercise, require
from refdist.lab.exercises.trying import TooLateError, interrupted_after
from refdist.lab.figures import size_name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# 3.1: which chunk a rank sends and which it receives, in each step.

RingStep = Callable[[int, int, int], tuple[int, int]]
_MOST_RANKS = 9


@exercise("3.1 the schedule of a ring")
def check_ring_step(ring_step: RingStep) -> str:
    """Follow the schedule on 2 to 9 ranks, with the list of the ranks that are in each sum."""
    for n in range(2, _MOST_RANKS + 1):
        # how often each rank is in the sum: held[rank][chunk][of that rank]
        held = [[Counter({rank: 1}) for _ in range(n)] for rank in range(n)]
        for step in range(2 * (n - 1)):
            where = f"on {n} ranks, in step {step},"
            pairs = [_chunks(ring_step, rank, step, n) for rank in range(n)]
            moved = [held[rank][pairs[rank][0]].copy() for rank in range(n)]
            for rank, (_, received) in enumerate(pairs):
                left = (rank - 1) % n
                require(
                    received == pairs[left][0],
                    f"{where} rank {left} sends chunk {pairs[left][0]}, and rank {rank} to its "
                    f"right receives chunk {received}: both must name the same chunk",
                )
                adds = step < n - 1
                held[rank][received] = moved[left] + (held[rank][received] if adds else Counter())
            if step == n - 2:
                _require_whole(held, n, 1, f"on {n} ranks, after step {step},")
        _require_whole(held, n, n, f"on {n} ranks, after the last step, {2 * (n - 1) - 1},")
    return (
        f"On 2 to {_MOST_RANKS} ranks, each rank has one whole sum after n - 1 steps, and all "
        f"n sums after 2 (n - 1)."
    )


def _chunks(ring_step: RingStep, rank: int, step: int, n: int) -> tuple[int, int]:
    pair = ring_step(rank, step, n)
    call = f"ring_step({rank}, {step}, {n})"
    require(
        isinstance(pair, tuple) and len(pair) == 2,
        f"{call} returned {pair!r}, wanted the chunk to send and the chunk to receive",
    )
    for chunk in pair:
        require(
            isinstance(chunk, int) and 0 <= chunk < n,
            f"{call} returned {pair!r}, wanted chunks from 0 to {n - 1}",
        )
    return pair


def _require_whole(held: list[list[Counter[int]]], n: int, wanted: int, where: str) -> None:
    whole = Counter(dict.fromkeys(range(n), 1))
    for rank, chunks in enumerate(held):
        wrong = [chunk for chunk in range(n) if chunks[chunk] != whole]
        sums = chunks[wrong[0]] if wrong else whole
        require(
            n - len(wrong) >= wanted,
            f"{where} rank {rank} has {_count(n - len(wrong), 'whole sum')}, wanted {wanted}. "
            f"Its chunk "
            f"{wrong[:1]} has "
            + ", ".join(f"{count} x that of rank {other}" for other, count in sorted(sums.items())),
        )


# 3.2: the ring, on engines.

PATIENCE_SECONDS = 3.0
"""Seconds that an answer may wait for one message. In all, it may take four times as long."""

_CASES: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
    ((120,), torch.int64),
    ((1,), torch.float32),
    ((3, 5), torch.float32),
    ((1001,), torch.float64),
    ((100_003,), torch.float32),
)
_GUARD = 8


class CountedGroup:
    """A gloo group with rank, size, send and recv alone, which counts the bytes of this rank.

    Attributes:
        sent: bytes sent, by destination.
        received: bytes received, by source.
        messages: number of messages sent.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.messages = 0

    @property
    def _device_types(self) -> Any:  # refdist.torch_groups.collectives looks at it
        return self._group._device_types

    def rank(self) -> int:
        """Rank of this process in the group."""
        return int(self._group.rank())

    def size(self) -> int:
        """Number of ranks."""
        return int(self._group.size())

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any:
        """Start to send one tensor; the result has ``wait``."""
        self.sent[dst] += tensors[0].nbytes
        self.messages += 1
        return self._group.send(tensors, dst, tag)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        """Start to receive into one tensor; the result has ``wait``."""
        self.received[src] += tensors[0].nbytes
        return self._group.recv(tensors, src, tag)


@dataclass
class _Seen:
    """The actions of the answer with one tensor on one rank, or the error that it raised."""

    exact: bool = False
    guarded: bool = False
    bits: int = 0
    sent: Counter[int] = field(default_factory=Counter)
    received: int = 0
    messages: int = 0
    error: str = ""
    text: str = ""
    seconds: float = 0.0


@exercise("3.2 a ring all-reduce")
def check_ring(engines: LocalEngines, name: str = "ring_all_reduce") -> str:
    """Groups of 1, 2, 3 and all ranks; tensors of 1 element, of two dimensions, of many."""
    require(engines.n >= 4, f"there are {engines.n} engines, wanted at least 4")
    most = messages = 0
    try:
        for size in sorted({1, 2, 3, engines.n}):
            engines.offer_port()
            tried = engines.run(_try_ring, name, size, PATIENCE_SECONDS)[:size]
            most, messages = _require_rings(tried)
    finally:
        engines.offer_port()  # for the next group of the notebook
    count = torch.Size(_CASES[-1][0]).numel()
    return (
        f"Exact on 1, 2, 3 and {engines.n} ranks, with 1 to {count} elements. With {count} "
        f"elements on {engines.n} ranks, each rank sent at most {most} bytes, "
        f"{most / (4 * count):.4f} of its tensor, in {messages} messages."
    )


def _require_rings(tried: list[list[_Seen]]) -> tuple[int, int]:
    """Require right results of every case. Returns the most bytes and messages of the last one."""
    most = messages = 0
    for number, (shape, dtype) in enumerate(_CASES):
        type_name = str(dtype).removeprefix("torch.")
        where = f"on {_count(len(tried), 'rank')}, with a tensor of shape {shape} of {type_name},"
        # a rank that failed before has one result less
        seen = [results[number] for results in tried if number < len(results)]
        _require_no_error(seen, where)
        most = _require_ring(seen, shape, dtype.itemsize, where)
        messages = max(one.messages for one in seen)
    return most, messages


def _require_no_error(seen: list[_Seen], where: str) -> None:
    failed = [(rank, one) for rank, one in enumerate(seen) if one.error]
    # a rank waits in vain if another one has failed
    failed.sort(key=lambda item: item[1].error in ("RuntimeError", "CollectiveError", _LATE))
    for rank, one in failed:
        if one.error == NotImplementedError.__name__:
            raise NotImplementedError
        require(
            one.error != _OtherGroupError.__name__,
            f"{where} your code uses {one.text}. Use only the group that it is given, which may "
            f"have fewer ranks",
        )
        require(
            one.seconds < 2 * PATIENCE_SECONDS,
            f"{where} your code took {one.seconds:.0f} s on rank {rank}, and then raised "
            f"{one.error}: {one.text}. If it waited in a group of the notebook, that group is "
            f"lost: run engines.offer_port(), then again the cell that forms the groups",
        )
        require(
            "Timed out" not in one.text and "Connection closed" not in one.text,
            f"{where} rank {rank} waited {PATIENCE_SECONDS:g} s in vain. Does every rank wait for "
            f"the end of its send before it receives? The error: {one.text}",
        )
        require(False, f"{where} your code on rank {rank} raised {one.error}: {one.text}")


def _require_ring(seen: list[_Seen], shape: tuple[int, ...], item_bytes: int, where: str) -> int:
    """Require an exact sum and few bytes. Returns the bytes of the rank that sent most."""
    n, count = len(seen), torch.Size(shape).numel()
    most = 2 * (n - 1) * -(-count // n) * item_bytes
    fewest = 2 * (n - 1) * (count // n) * item_bytes
    for rank, one in enumerate(seen):
        require(one.exact, f"{where} rank {rank} has a wrong sum (or it is not in the same tensor)")
        require(one.guarded, f"{where} rank {rank} wrote beside its tensor")
        require(one.bits == seen[0].bits, f"{where} ranks 0 and {rank} have sums of other bits")
        sent = sum(one.sent.values())
        for verb, num_bytes in (("sent", sent), ("received", one.received)):
            require(
                num_bytes <= most,
                f"{where} rank {rank} {verb} {_count(num_bytes, 'byte')}, wanted at most "
                f"2 (n - 1) chunks, {_count(most, 'byte')}",
            )
        require(
            sent >= fewest,
            f"{where} rank {rank} sent {_count(sent, 'byte')} with the group's send, a ring needs "
            f"{fewest}: use no other way to the other ranks",
        )
        require(
            one.messages <= 2 * (n - 1),
            f"{where} rank {rank} sent {_count(one.messages, 'message')}, wanted at most "
            f"{2 * (n - 1)}",
        )
        require(
            len(one.sent) <= 1,
            f"{where} rank {rank} sent to the ranks {sorted(one.sent)}, wanted one neighbour",
        )
    return max(sum(one.sent.values()) for one in seen)


_LATE = "TimeoutError"


def _try_ring(rank: int, _: int, name: str, size: int, seconds: float) -> list[_Seen]:
    """On an engine: sum every case in a new group of the first ranks, up to the first error."""
    if rank >= size:
        return []
    names = vars(sys.modules["__main__"])
    if name not in names:
        raise NameError(f"name {name!r} is not defined on engine {rank}")
    group = stateless_init_torch_distributed_process_group(
        names["host"], names["port"], rank, size, "gloo",
        listen_socket=names["listen_socket"], timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    results: list[_Seen] = []
    try:
        for shape, dtype in _CASES:
            results.append(_sum_one(names[name], group, shape, dtype, seconds))
            if results[-1].error:
                return results
        with suppress(RuntimeError):  # another rank may have failed
            group.barrier().wait()
    finally:
        stateless_destroy_torch_distributed_process_group(group)
    return results


def _sum_one(
    ring: Callable[..., object],
    group: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seconds: float,
) -> _Seen:
    count = torch.Size(shape).numel()
    # sums of whole numbers have the same bits in every order of additions, others have not
    whole = dtype != torch.float64
    given = []
    for rank in range(group.size()):
        dice = torch.Generator().manual_seed(rank)
        numbers = torch.randint(-999, 1000, (count,), generator=dice).to(dtype)
        given.append((numbers if whole else numbers / 7).view(shape))
    around = torch.full((count + 2 * _GUARD,), -1, dtype=dtype)
    tensor = around[_GUARD:-_GUARD].view(shape)
    tensor.copy_(given[group.rank()])
    counted, seen, start = CountedGroup(group), _Seen(), monotonic()
    try:
        with interrupted_after(4 * seconds), _other_groups_hidden():
            ring(counted, tensor)
    except TooLateError:
        seen.error, seen.text = _LATE, f"did not end within {4 * seconds:g} s"
    except Exception as error:
        seen.error, seen.text = type(error).__name__, str(error)
    seen.seconds = monotonic() - start
    wanted = torch.stack(given).sum(dim=0)
    seen.exact = torch.equal(tensor, wanted) if whole else torch.allclose(tensor, wanted)
    seen.bits = crc32(tensor.numpy().tobytes())
    seen.guarded = bool((around[:_GUARD] == -1).all() and (around[-_GUARD:] == -1).all())
    seen.sent, seen.messages = counted.sent, counted.messages
    seen.received = sum(counted.received.values())
    return seen


class _OtherGroupError(Exception):
    """An answer uses another group than its argument."""


class _OtherGroup:
    """In place of another group: each use raises an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _: str) -> Any:
        raise _OtherGroupError(f"`{self._name}`")


@contextmanager
def _other_groups_hidden() -> Iterator[None]:
    """Hide the groups of the notebook: with fewer ranks, they would block until their timeout."""
    names = vars(sys.modules["__main__"])
    kinds, hidden = (ProcessGroup, CountedGroup), dict[str, Any]()
    for name, value in names.items():
        if isinstance(value, kinds):
            hidden[name] = _OtherGroup(name)
        elif isinstance(value, dict) and any(isinstance(one, kinds) for one in value.values()):
            hidden[name] = {key: _OtherGroup(f"{name}[{key!r}]") for key in value}
    before = {name: names[name] for name in hidden}
    names.update(hidden)
    try:
        yield
    finally:
        names.update(before)


# 3.3: two bandwidths, and the time that follows from one of them.


@exercise("3.3 two bandwidths")
def check_bandwidths(
    bandwidths: Callable[[float, float, int], tuple[float, float]],
    seconds_of_ring: Callable[[float, int, float], float],
) -> str:
    """Compare with a ring that is followed step by step, on 1 to 1024 ranks."""
    for n in (1, 2, 3, 4, 7, 8, 64, 1024):
        num_bytes, seconds = n * random.randint(1, 10**9), random.uniform(1e-5, 1.0)
        chunk = num_bytes // n
        sent = sum(chunk for _ in range(n - 1)) + sum(chunk for _ in range(n - 1))
        call = f"bandwidths({num_bytes}, {seconds:.6f}, {n})"
        pair = bandwidths(num_bytes, seconds, n)
        require(
            isinstance(pair, tuple) and len(pair) == 2,
            f"{call} returned {pair!r}, wanted the algorithm bandwidth and the bus bandwidth",
        )
        for kind, found, wanted in (
            ("algorithm", pair[0], num_bytes / seconds),
            ("bus", pair[1], sent / seconds),
        ):
            require(
                isclose(found, wanted, rel_tol=1e-6),
                f"{call} gave the {kind} bandwidth {found:.6g} bytes a second, wanted {wanted:.6g}",
            )
        if n > 1:
            again = seconds_of_ring(num_bytes, n, sent / seconds)
            require(
                isclose(again, seconds, rel_tol=1e-6),
                f"a ring of {n} ranks that sends {sent / seconds:.6g} bytes a second reduces "
                f"{num_bytes} bytes in {seconds:.6f} s, and seconds_of_ring says {again:.6f} s",
            )
    times = {n: seconds_of_ring(16e9, n, 344e9) * 1e3 for n in (2, 8, 1024)}
    require(abs(times[8] / 81.4 - 1) < 0.01, f"8 GPUs need {times[8]:.1f} ms, wanted 81.4 ms")
    told = ", ".join(f"{n} GPUs in {ms:.1f} ms" for n, ms in times.items())
    return f"16 GB at a bus bandwidth of 344 GB/s: {told}."


# 3.4: a line through times, each error as a part of its time.

Fit = Callable[[Sequence[float], Sequence[float]], tuple[float, float, float]]


def misfit(alpha: float, beta: float, sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Root of the mean square of the line's errors, each as a part of the measured time."""
    parts = [(alpha + beta * s) / t - 1 for s, t in zip(sizes, seconds, strict=True)]
    return sqrt(sum(part * part for part in parts) / len(parts))


@exercise("3.4 latency and bandwidth")
def check_fit(fit: Fit) -> str:
    """Fit 20 lines with noise of 15%, and one without. No other line may be nearer to the times."""
    dice, sizes = random.Random(3), [2.0**power for power in range(10, 31, 2)]
    worst = 0.0
    for number in range(21):
        alpha, beta = 10 ** dice.uniform(-6, -2), 10 ** dice.uniform(-12, -9)
        noise = 0.15 if number else 0.0
        seconds = [(alpha + beta * size) * dice.uniform(1 - noise, 1 + noise) for size in sizes]
        answer = fit(sizes, seconds)
        require(
            isinstance(answer, tuple) and len(answer) == 3,
            f"fit returned {answer!r}, wanted alpha, beta and the size at which both cost the same",
        )
        found, least = misfit(answer[0], answer[1], sizes, seconds), _least_misfit(sizes, seconds)
        where = f"for alpha {alpha:.3g} s, beta {beta:.3g} s a byte and noise of {noise:.0%},"
        require(
            found <= 1.001 * least + 1e-6,
            f"{where} the misfit of your line is {found:.1%}, the least is {least:.1%}: square the "
            f"errors as parts of the times, not in seconds",
        )
        require(
            isclose(answer[0], answer[1] * answer[2], rel_tol=1e-6),
            f"{where} a message of {answer[2]:.6g} bytes takes {answer[1] * answer[2]:.6g} s for "
            f"its bytes and {answer[0]:.6g} s for its latency: both must be equal",
        )
        worst = max(worst, abs(answer[0] / alpha - 1), abs(answer[1] / beta - 1))
    return f"No line is nearer to the times. alpha and beta were found to {worst:.0%} at worst."


def _least_misfit(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    rows = torch.tensor([[1 / t, s / t] for s, t in zip(sizes, seconds, strict=True)]).double()
    scale = rows.norm(dim=0)  # so that both columns are of one size
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    alpha, beta = (torch.linalg.lstsq(rows / scale, ones).solution.flatten() / scale).tolist()
    return misfit(alpha, beta, sizes, seconds)


def time_table(columns: Mapping[str, Sequence[AllReduceTiming]]) -> str:
    """Time of each size up to 16 MiB in microseconds, and in brackets the host's, by column."""
    lines = ["µs (host) " + " ".join(f"{name:>14}" for name in columns)]
    by_size = [{timing.num_bytes: timing for timing in some} for some in columns.values()]
    for size in (size for size in by_size[0] if size <= SMALL_BYTES):
        cells = (
            f"{of[size].seconds * 1e6:6.1f} ({of[size].launch_seconds * 1e6:4.1f})"
            for of in by_size
        )
        lines.append(f"{size_name(size):>9} " + " ".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


# 3.5: gradients that become ready one after another, joined in buckets.


@dataclass(frozen=True)
class Gradients:
    """Gradients in the order in which the backward pass finishes them.

    Attributes:
        ready: seconds after the start of the backward pass at which each is finished.
        sizes: bytes of each.
    """

    ready: tuple[float, ...]
    sizes: tuple[int, ...]


def gpt2_gradients(backward_seconds: float = 3e-3) -> Gradients:
    """The 148 gradients of GPT-2 with 124 million parameters, in float32.

    The time at which one is finished is proportional to the parameters up to then. The embedding,
    whose weights the last layer uses too, is finished at the end.
    """
    width, tokens, places = 768, 50257, 1024
    layer = [
        width, 4 * width * width, 4 * width, 4 * width * width, width, width,  # MLP and norm
        width, width * width, 3 * width, 3 * width * width, width, width,  # attention and norm
    ]  # fmt: skip
    counts = [width, width, *12 * layer, places * width, tokens * width]
    total, done, ready = sum(counts), 0, []
    for count in counts:
        done += count
        ready.append(backward_seconds * done / total)
    return Gradients(tuple(ready), tuple(4 * count for count in counts))


def all_reduces(
    joined: Sequence[int], gradients: Gradients, alpha: float, beta: float
) -> list[tuple[float, float]]:
    """Start and end of each all-reduce, if the first ``joined[0]`` gradients are sent as one, ...

    A bucket starts when its last gradient is finished and the bucket before it is reduced.
    """
    spans, first, free = [], 0, 0.0
    for count in joined:
        start = max(free, gradients.ready[first + count - 1])
        free = start + alpha + beta * sum(gradients.sizes[first : first + count])
        spans.append((start, free))
        first += count
    return spans


H200_LINE = (38.4e-6, 1 / 357e9)
"""alpha and beta of two H200s, from the recorded times of the notebook, rounded."""

Buckets = Callable[[Sequence[float], Sequence[int], float, float], list[int]]


@exercise("3.5 buckets")
def check_buckets(buckets: Buckets) -> str:
    """GPT-2 and other gradients, with latency only, bytes only, both, and all ready at once."""
    gpt2, dice = gpt2_gradients(), random.Random(5)
    waits = [dice.uniform(0, 1e-4) for _ in range(60)]
    some = Gradients(
        tuple(sum(waits[: i + 1]) for i in range(60)),
        tuple(dice.choice((4, 4096, 2**20, 2**24)) for _ in range(60)),
    )
    cases = (
        ("one gradient", Gradients((1e-3,), (4096,)), 4e-5, 3e-12),
        ("20 gradients that are ready at once", Gradients((1e-3,) * 20, (4096,) * 20), 4e-5, 3e-12),
        ("20 gradients without latency", Gradients(gpt2.ready[:20], gpt2.sizes[:20]), 0.0, 3e-12),
        ("60 gradients of mixed sizes", some, 5e-4, 3e-12),
        ("GPT-2 with a latency of 1 ms", gpt2, 1e-3, 2.8e-12),
        ("GPT-2", gpt2, *H200_LINE),
    )
    for name, gradients, alpha, beta in cases:
        count = len(gradients.sizes)
        with _in_time(name):
            joined = buckets(gradients.ready, gradients.sizes, alpha, beta)
        require(
            isinstance(joined, list) and all(isinstance(k, int) and k > 0 for k in joined),
            f"{name}: buckets returned {joined!r}, wanted a list of numbers from 1 on",
        )
        require(
            sum(joined) == count,
            f"{name}: {_count(sum(joined), 'gradient')} in buckets, not {count}",
        )
        end = all_reduces(joined, gradients, alpha, beta)[-1][1]
        least = _earliest_end(gradients, alpha, beta)
        require(
            end <= 1.01 * least,
            f"{name}: the last all-reduce ends at {end * 1e3:.3f} ms, and {least * 1e3:.3f} ms is "
            f"possible (1% later is enough)",
        )
    alone, one = (
        all_reduces(joined, gpt2, alpha, beta)[-1][1] * 1e3 for joined in ([1] * count, [count])
    )
    return (
        f"GPT-2 in {_count(len(joined), 'bucket')} ends at {end * 1e3:.2f} ms; each gradient "
        f"alone at {alone:.2f} ms, all in one bucket at {one:.2f} ms."
    )


@contextmanager
def _in_time(name: str, seconds: float = 10.0) -> Iterator[None]:
    try:
        with interrupted_after(seconds):
            yield
    except TooLateError:
        raise UnsolvedError(f"{name}: buckets did not end within {seconds:g} s") from None


def _earliest_end(gradients: Gradients, alpha: float, beta: float) -> float:
    """The earliest end of the last all-reduce, over all ways to join neighbours."""
    ends = [0.0]
    for last in range(1, len(gradients.sizes) + 1):
        ends.append(inf)
        num_bytes = 0
        for first in range(last - 1, -1, -1):
            num_bytes += gradients.sizes[first]
            start = max(ends[first], gradients.ready[last - 1])
            ends[last] = min(ends[last], start + alpha + beta * num_bytes)
    return ends[-1]
