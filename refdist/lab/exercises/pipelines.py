"""Checks of notebook 02: the specification's rule, costs, the best partition, and the override.

Also what the notebook takes from the package as plain numbers or prints as text.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from random import Random
from statistics import median
from typing import Any, NamedTuple, TypeVar

from refdist.lab.exercises import exercise, require
from refdist.pipeline import DEVICES, MODELS, RULES, Device, Model, Serving, best_partition
from refdist.pipeline import cost as package

Result = TypeVar("Result")
Cost = Callable[[int, int], float]
Round = Sequence[Sequence[tuple[float, float, float]]]
"""For each stage and micro-batch: start and end on the clock, and processor time, in seconds."""


class Work(NamedTuple):
    """The work for a micro-batch of prompts, and the speed of the device that does it."""

    layer_flops: float  # operations of one layer
    layer_bytes: float  # bytes that one layer reads
    head_flops: float  # the same of the final norm and the head
    head_bytes: float
    flops_per_second: float
    bytes_per_second: float


class Memory(NamedTuple):
    """Bytes: the room of a stage, and what its parts take."""

    room: int
    layer: int
    embedding: int
    head: int
    block: int  # a block of the key-value cache, for one layer


def prefill_work(model: Model, device: Device, serving: Serving) -> Work:
    """The work of a model whose layers are alike and have no experts."""
    tokens = serving.chunk_tokens
    layer = model.layer_parameters(range(1))
    pairs = tokens * serving.prompt_tokens / 2  # a token attends to half of its prompt, on average
    with_logits = tokens * min(1.0, serving.tokens_with_logits / serving.prompt_tokens)
    fp8 = device.fp8_flops_per_second if serving.bytes_per_weight <= 1 else None
    return Work(
        2 * tokens * layer + pairs * model.attention.flops_per_pair,
        layer * serving.bytes_per_weight
        + tokens * package.kv_bytes_per_token(model, range(1), serving),
        2 * with_logits * model.head_parameters,
        model.head_parameters * serving.bytes_per_end_weight,
        fp8 or device.flops_per_second,
        device.bytes_per_second,
    )


def stage_memory(model: Model, serving: Serving, room: float) -> Memory:
    """The bytes of a model whose layers are alike, with this room on a stage."""
    return Memory(
        int(room),
        int(model.layer_parameters(range(1)) * serving.bytes_per_weight),
        int(model.embedding_parameters * serving.bytes_per_end_weight),
        int(model.head_parameters * serving.bytes_per_end_weight),
        int(package.kv_bytes_per_token(model, range(1), serving) * serving.block_tokens),
    )


def gain_in_blocks(name: str, pp_size: int, gpu: str) -> str:
    """The KV blocks of a model in FP8 with the specification and with the best partition.

    Before them, what the weights leave on the fullest stage, and how many layers have as many
    bytes.
    """
    model, device, serving = MODELS[name], DEVICES[gpu], Serving(bytes_per_weight=1)
    usual = RULES["specification"](model.num_hidden_layers, pp_size)
    weights = max(package.weight_bytes_per_stage(model, usual, serving))
    left = package.room_bytes(device, serving) - weights
    layer = model.layer_parameters(range(model.num_hidden_layers - 1, model.num_hidden_layers))
    before = package.kv_blocks(model, device, usual, serving)
    best = best_partition(model, device, pp_size, "kv_blocks", serving)
    same = list(best.stages) == usual
    return (
        f"{name} on {pp_size} x {gpu}: {left / 2**30:.1f} GiB left, {left / layer:.1f} layers; "
        f"{before:,} blocks"
        + (", and no partition has more" if best.kv_blocks == before else "")
        + ("" if same or best.kv_blocks == before else f"; {best.kv_blocks:,} with {best.value}")
    )


def comparison(
    predicted: Mapping[str, float], rounds: Mapping[str, Sequence[Round]], one: str, other: str
) -> str:
    """The seconds of partitions, and whether two of them really differ.

    Args:
        predicted: the seconds that the roofline gives each partition.
        rounds: the measured rounds of each partition.
        one: the partition that is compared with the other.
        other: the other.
    """
    seconds = {name: [_elapsed(each) for each in some] for name, some in rounds.items()}
    measured = {name: median(each) for name, each in seconds.items()}
    worked = {name: _from_processor_time(some) for name, some in rounds.items()}
    ways = {"roofline": predicted, "processor": worked, "measured": measured}
    lines = [f"{'seconds':14}" + "".join(f"{way:>10}" for way in ways) + "   (fastest to slowest)"]
    for name in sorted(predicted, key=lambda name: predicted[name]):
        numbers = "".join(f"{found[name]:10.3f}" for found in ways.values())
        fastest, slowest = min(seconds[name]), max(seconds[name])
        lines.append(f"{name:14}{numbers}   ({fastest:.3f} to {slowest:.3f})")
    for way, found in ways.items():
        order = " < ".join(sorted(found, key=lambda name: found[name]))
        lines.append(f"{way:9} {one} {found[one] / found[other] - 1:+4.0%} of {other};  {order}")
    difference = abs(measured[one] - measured[other])
    spread = max(max(seconds[name]) - min(seconds[name]) for name in (one, other))
    wins = sum(a < b for a, b in zip(seconds[one], seconds[other], strict=True))
    lines += [
        f"{one} was faster than {other} in {wins} of {len(seconds[one])} rounds",
        f"the difference, {difference:.3f} s, is {'above' if difference > spread else 'NOT above'} "
        f"the spread of rounds, {spread:.3f} s",
    ]
    return "\n".join(lines)


def by_round(runs: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[Round]]:
    """The rounds of each partition, from what each rank has of them."""
    return {name: list(zip(*(of_rank[name] for of_rank in runs), strict=True)) for name in runs[0]}


def fastest_round(rounds: Sequence[Round]) -> Round:
    """The round that took the least time."""
    return min(rounds, key=_elapsed)


def _elapsed(one: Round) -> float:
    """Seconds from the start of the first stage to the end of the last."""
    return one[-1][-1][1] - one[0][0][0]


def _from_processor_time(rounds: Sequence[Round]) -> float:
    """Seconds of a pipeline whose stages take their least processor time."""
    stages = [
        min(batch[2] for one in rounds for batch in one[stage]) for stage in range(len(rounds[0]))
    ]
    return package.batch_seconds(stages, len(rounds[0][0]))


# What the checks need.


def _own(answer: Callable[..., Result], *arguments: object) -> Result:
    """The result of the answer, which must not hand its work on to refdist."""
    called: list[str] = []

    def see(frame: object, event: str, _: object) -> None:
        module = getattr(frame, "f_globals", {}).get("__name__", "")
        if event == "call" and module.startswith("refdist.pipeline"):
            called.append(f"{module}.{frame.f_code.co_name}")  # type: ignore[attr-defined]

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        result = answer(*arguments)
    finally:
        sys.setprofile(before)
    require(not called, f"your code calls {', '.join(called[:1])}. Write it without refdist.")
    return result


def _partitions(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    """Every partition in which each stage has a layer: the layers of each stage."""
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [after - before for before, after in pairwise([0, *cuts, num_layers])]


def _some(num_layers: int, num_stages: int, random: Random) -> list[int]:
    cuts = sorted(random.sample(range(1, num_layers), num_stages - 1))
    return [after - before for before, after in pairwise([0, *cuts, num_layers])]


def _ranges(counts: Sequence[int]) -> list[range]:
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [range(start, start + n) for start, n in zip(starts, counts, strict=True)]


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


_PLAIN = [model for model in MODELS.values() if not model.num_experts]


# The exercises.


@exercise("2.1 the layers of a stage")
def check_layers_of_stage(answer: Callable[[int, int, int], tuple[int, int]]) -> str:
    """Compare ``layers_of_stage`` with the specification, over all stages of many pipelines."""
    compared = 0
    for pp_size in range(1, 17):
        for layers in range(131):
            for stage, held in enumerate(RULES["specification"](layers, pp_size)):
                seen = _own(answer, layers, stage, pp_size)
                require(
                    isinstance(seen, tuple) and seen == (held.start, held.stop),
                    f"stage {stage} of {pp_size} with {_count(layers, 'layer')}: {seen!r}, but the "
                    f"specification has {(held.start, held.stop)}; here the quotient is "
                    f"{layers // pp_size} and the remainder {layers % pp_size}",
                )
                compared += 1
    return f"{compared:,} stages are as specified, of 1 to 16 stages and 0 to 130 layers."


@exercise("2.2 the time of a partition")
def check_seconds(
    stage_seconds: Callable[[int, bool, Work], float],
    batch_seconds: Callable[[Sequence[int], int, Work], float],
) -> str:
    """Compare both functions with refdist's cost model, over models, devices and partitions."""
    random, compared = Random(2), 0
    settings = {
        "to generate": Serving(),
        "to score": Serving(tokens_with_logits=1024),
        "in FP8": Serving(bytes_per_weight=1),
        "in micro-batches of 16 tokens": Serving(chunk_tokens=16),
    }
    for model in _PLAIN:
        for device in (DEVICES["l4"], DEVICES["h100"], DEVICES["mi300x"]):
            for name, serving in settings.items():
                work = prefill_work(model, device, serving)
                for num_stages in (1, 2, 3, 6, 8):
                    counts = _some(model.num_hidden_layers, num_stages, random)
                    wanted = package.prefill_seconds_per_stage(
                        model, device, _ranges(counts), serving
                    )
                    where = f"{model.name} on {device.name} {name}, layers {counts}"
                    for stage, n in enumerate(counts):
                        last = stage == num_stages - 1
                        _same(
                            _own(stage_seconds, n, last, work),
                            wanted[stage],
                            f"{where}: stage_seconds of stage {stage}",
                        )
                    for micro_batches in (1, 2, 20):
                        _same(
                            _own(batch_seconds, counts, micro_batches, work),
                            package.batch_seconds(wanted, micro_batches),
                            f"{where}: batch_seconds of {_count(micro_batches, 'micro-batch')}",
                        )
                    compared += 1
    return f"{compared} partitions take as long as in refdist's cost model."


def _same(seen: float, wanted: float, what: str) -> None:
    require(
        isinstance(seen, (int, float)) and math.isclose(seen, wanted, rel_tol=1e-9),
        f"{what}: {seen!r} s, but the formula gives {wanted!r} s",
    )


@exercise("2.3 the best partition")
def check_best_counts(answer: Callable[[Cost, int, int], list[int]]) -> str:
    """Compare ``best_counts`` with all partitions of small models, and count calls for large."""
    random = Random(3)
    for _ in range(200):
        num_layers = random.randint(1, 9)
        num_stages = random.randint(1, num_layers)
        cost = _some_cost(num_layers, random, 9)
        least = min(_slowest(cost, p) for p in _partitions(num_layers, num_stages))
        _check_best(answer, cost, num_layers, num_stages, least)
    told = []
    for num_layers, num_stages in ((80, 8), (126, 16)):
        cost = _some_cost(num_layers, random, 1000)
        least = _least(cost, num_layers, num_stages)
        calls = _check_best(answer, cost, num_layers, num_stages, least)
        told.append(f"{calls:,} calls of cost for {num_layers} layers on {num_stages} stages")
    return f"The best of all partitions in 202 cases; {', '.join(told)}."


def _check_best(
    answer: Callable[[Cost, int, int], list[int]],
    cost: Cost,
    num_layers: int,
    num_stages: int,
    least: float,
) -> int:
    """Require the least cost within the allowed calls, and return their number."""
    case = f"{_count(num_layers, 'layer')} on {_count(num_stages, 'stage')}"
    calls, allowed = 0, num_layers**2 * num_stages

    def counted(start: int, stop: int) -> float:
        nonlocal calls
        calls += 1
        ways = math.comb(num_layers - 1, num_stages - 1)
        require(
            calls <= allowed,
            f"{case}: more than {allowed:,} calls of cost. There are "
            f"{_count(ways, 'partition')}; do not try each. See the hint.",
        )
        require(
            0 <= start < stop <= num_layers,
            f"{case}: cost({start}, {stop}) is no stage: 0 <= start < stop <= {num_layers}",
        )
        return cost(start, stop)

    counts = _own(answer, counted, num_layers, num_stages)
    require(
        isinstance(counts, list)
        and len(counts) == num_stages
        and all(isinstance(n, int) and n >= 1 for n in counts)
        and sum(counts) == num_layers,
        f"{case}: {counts!r} is no list of {_count(num_stages, 'number')} of at least 1 with "
        f"that sum",
    )
    seen = _slowest(cost, counts)
    require(
        seen <= least * (1 + 1e-9),
        f"{case}: the slowest stage of {counts} takes {seen:g} s, but {least:g} s is possible",
    )
    return calls


def _some_cost(num_layers: int, random: Random, most: int) -> Cost:
    """A stage's cost as by roofline: unequal layers, an embedding, a head; each computes, reads."""
    sums = []
    for _ in range(2):
        items = [random.randint(1, most) for _ in range(num_layers)]
        items[0] += random.randint(0, 2 * most)
        items[-1] += random.randint(0, 2 * most)
        sums.append([sum(items[:end]) for end in range(num_layers + 1)])
    return lambda start, stop: float(max(ends[stop] - ends[start] for ends in sums))


def _slowest(cost: Cost, counts: Sequence[int]) -> float:
    return max(cost(stage.start, stage.stop) for stage in _ranges(counts))


def _least(cost: Cost, num_layers: int, num_stages: int) -> float:
    """The least possible cost of the slowest stage."""
    best = [0.0] + [math.inf] * num_layers  # of the first layers, on the stages so far
    for _ in range(num_stages):
        best = [math.inf] + [
            min(max(best[start], cost(start, stop)) for start in range(stop))
            for stop in range(1, num_layers + 1)
        ]
    return best[-1]


@exercise("2.4 the memory of a partition")
def check_kv_blocks(answer: Callable[[str, int, int, Memory], int]) -> str:
    """Compare ``kv_blocks`` with refdist's cost model, and see that bad settings are refused."""
    random, compared, full = Random(4), 0, 0
    for model in (*_PLAIN, MODELS["mixtral-8x7b"]):
        layers = model.num_hidden_layers
        for serving in (Serving(), Serving(bytes_per_weight=1, block_tokens=32)):
            for device in DEVICES.values():
                room = package.room_bytes(device, serving)
                memory = stage_memory(model, serving, room)
                for num_stages in (2, 4, 7, 8):
                    counts = _some(layers, num_stages, random)
                    if random.random() < 0.5:
                        counts = [len(s) for s in RULES["specification"](layers, num_stages)]
                    setting = ",".join(map(str, counts))
                    wanted = package.kv_blocks(model, device, _ranges(counts), serving)
                    seen = _own(answer, setting, layers, num_stages, memory)
                    require(
                        seen == wanted,
                        f"{model.name} on {num_stages} x {device.name}, {setting!r}: {seen!r} "
                        f"blocks, but the formula gives {wanted}",
                    )
                    compared, full = compared + 1, full + (wanted == 0)
    refused = _check_refusals(answer)
    return f"{compared} settings ({full} without room) and {refused} refusals are right."


def _check_refusals(answer: Callable[[str, int, int, Memory], int]) -> int:
    memory = Memory(1000, 10, 10, 10, 1)
    bad = {
        "10,10,10": "three numbers for four stages",
        "8,8,8,8,8": "five numbers for four stages",
        "10,10,10,11": "a sum of 41, not 40",
        "10,10,10,9": "a sum of 39, not 40",
        "20,20,10,-10": "a number below 1",
        "20,20,0,0": "a number below 1",
        "10,10,10,ten": "not a number",
        "10,10,,20": "not a number",
        "": "not a number",
    }
    for setting, reason in bad.items():
        try:
            seen = _own(answer, setting, 40, 4, memory)
        except ValueError:
            continue
        require(False, f"{setting!r} ({reason}) gave {seen!r}, but must raise ValueError")
    require(_own(answer, " 10, 10 ,10,10", 40, 4, memory) > 0, "spaces around a number are allowed")
    return len(bad)
