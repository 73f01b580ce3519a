"""Checks of notebook 07: a recorder, the rank at fault, an order of buckets, shapes, a watchdog."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import permutations, takewhile
from typing import Any, ClassVar

import torch
from torch.distributed import PrefixStore, ProcessGroup

from refdist import StatelessProcessGroup, init_gloo_process_group
from refdist.errors import name_ranks
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import exercise, require
from refdist.lab.exercises.trying import TooLateError, defined_here, interrupted_after
from refdist.lab.stuck import in_thread
from refdist.torch_groups import collectives

Call = Mapping[str, Any]
"""A call: ``group``, its ``number`` there, ``operation``, ``shape``, and whether it is ``done``."""

_PATIENCE_SECONDS = 20.0
_JOBS = 300


def batches_of(rank: int) -> int:
    """The number of batches that a rank of notebook 07 has. Look only after you have found out."""
    return (3, 3, 2, 3)[rank]


def loss_of(rank: int, step: int) -> float:
    """The loss of a step on a rank of notebook 07. Look only after you have found out."""
    return float("nan") if (rank, step) == (1, 2) else 1.0 / (1 + step)


class _Here:
    """On one engine: the groups of the exercise, and the calls of its job."""

    group: StatelessProcessGroup
    gloo: ProcessGroup
    kept: ClassVar[list[ProcessGroup]] = []  # torch 2.6 may hang when a group is freed that failed
    calls: list[dict[str, Any]]


def _form(rank: int, world_size: int) -> None:
    address = defined_here("host"), defined_here("port"), rank, world_size
    _Here.group = StatelessProcessGroup.create(
        *address, listen_socket=defined_here("listen_socket")
    )


def _form_gloo(rank: int, world_size: int, seconds: float) -> None:
    store, timeout = PrefixStore("exercise", _Here.group.store), timedelta(seconds=seconds)
    _Here.gloo = init_gloo_process_group(store, rank, world_size, timeout)
    _Here.kept.append(_Here.gloo)


def _form_groups(engines: LocalEngines, seconds: float) -> None:
    engines.offer_port()
    engines.run(_form)
    engines.run(_form_gloo, seconds)


# 7.1


def _try_recorder(rank: int, world_size: int) -> dict[str, Any]:
    with interrupted_after(_PATIENCE_SECONDS):
        return _recorded()


def _recorded() -> dict[str, Any]:
    """The records of the reader's Recorder, while calls run and after them."""
    kind = defined_here("Recorder")
    seen: dict[str, Any] = {}

    recorder = kind()
    with recorder.call("A", "step 0", (4,)):
        seen["inside"] = [dict(record) for record in recorder.records]
    seen["after"] = [dict(record) for record in recorder.records]
    try:
        with recorder.call("A", "step 1", (4,)):
            raise KeyError("raised inside")
    except KeyError:
        seen["raised"] = recorder.records[-1]["done"]
    else:
        seen["raised"] = "swallowed"

    # a call in a thread is still inside when one that began before it ends
    recorder, entered, leave = kind(), threading.Event(), threading.Event()

    def stay() -> None:
        with recorder.call("A", "stays", (4,)):
            entered.set()
            leave.wait(_PATIENCE_SECONDS)

    with recorder.call("B", "passes", (4,)):
        thread = in_thread(stay)
        entered.wait(_PATIENCE_SECONDS)
    seen["two at once"] = [(record["operation"], record["done"]) for record in recorder.records]
    leave.set()
    thread.result(_PATIENCE_SECONDS)

    recorder = kind(limit=4)
    for group in "AAABBBBA":
        with recorder.call(group, "x", (4,)):
            pass
    seen["limited"] = [(record["group"], record["number"]) for record in recorder.records]
    return seen


@exercise("7.1 a flight recorder")
def check_recorder(engines: LocalEngines) -> str:
    """Check the class ``Recorder`` of the engines."""
    first = {"group": "A", "number": 1, "operation": "step 0", "shape": (4,), "done": False}
    limited = [("B", 2), ("B", 3), ("B", 4), ("A", 4)]
    for rank, seen in enumerate(engines.run(_try_recorder)):
        where = f"on rank {rank}, "
        require(
            seen["inside"] == [first],
            f"{where}while the first call runs, the records are {seen['inside']}; wanted: "
            f"{[first]}. A call that hangs never reaches what comes after it",
        )
        require(
            seen["after"] == [first | {"done": True}],
            f"{where}after the first call, the records are {seen['after']}; wanted: done is True",
        )
        require(
            seen["raised"] is False,
            f"{where}a call raised KeyError: done is {seen['raised']!r}; wanted: the error goes "
            f"on, and done is False",
        )
        wanted = [("passes", True), ("stays", False)]
        require(
            seen["two at once"] == wanted,
            f"{where}one call was still inside when another ended: {seen['two at once']}; wanted: "
            f"{wanted}. Which record belongs to the call that ended?",
        )
        require(
            seen["limited"] == limited,
            f"{where}limit=4, after three calls of A, four of B and one of A: {seen['limited']}; "
            f"wanted: {limited}, the last four, with numbers that count on in each group",
        )
    return "A call that runs, ends, raises or is one of two at once; of 8 calls, the last 4 kept."


# 7.2


def at_fault_in(
    records: Sequence[Sequence[Call]], members: Mapping[str, Sequence[int]]
) -> list[int]:
    """The ranks that others wait for and that wait for no rank themselves."""
    latest = [{call["group"]: call["number"] for call in calls} for calls in records]
    awaited: dict[int, set[int]] = {}
    for rank, calls in enumerate(records):
        for call in calls:
            if not call["done"]:
                absent = {
                    other
                    for other in members[call["group"]]
                    if latest[other].get(call["group"], 0) < call["number"]
                }
                awaited.setdefault(rank, set()).update(absent)
    waiting = {rank for rank, others in awaited.items() if others}
    return sorted(set().union(*awaited.values()) - waiting) if awaited else []


class _Job:
    """A simulated job: each rank makes its calls in order. A call waits for all its ranks."""

    def __init__(self, programs: list[list[str]], members: Mapping[str, Sequence[int]]) -> None:
        self.members = members
        self.records: list[list[dict[str, Any]]] = [[] for _ in programs]
        self._programs = [list(program) for program in programs]
        self._counts = [Counter[str]() for _ in programs]

    def run(self) -> None:
        """Until no rank can go on."""
        while any([self._enter(rank) for rank in range(len(self._programs))] + [self._finish()]):
            pass

    def _enter(self, rank: int) -> bool:
        if not self._programs[rank] or (self.records[rank] and not self.records[rank][-1]["done"]):
            return False
        group = self._programs[rank].pop(0)
        self._counts[rank][group] += 1
        number = self._counts[rank][group]
        self.records[rank].append(
            {"group": group, "number": number, "operation": "x", "shape": (4,), "done": False}
        )
        return True

    def _finish(self) -> bool:
        ended = False
        for group, ranks in self.members.items():
            last = [self.records[rank][-1] if self.records[rank] else None for rank in ranks]
            calls = [call for call in last if call and call["group"] == group and not call["done"]]
            if len(calls) == len(ranks) and len({call["number"] for call in calls}) == 1:
                for call in calls:
                    call["done"] = True
                ended = True
        return ended


_MEMBERS = {"all": [0, 1, 2, 3], "left": [0, 1], "right": [2, 3], "odd": [1, 3]}


def random_jobs(count: int = _JOBS, seed: int = 7) -> Iterator[_Job]:
    """Jobs of four ranks that have come to rest: some have ended, some hang, in several ways."""
    chance = random.Random(seed)
    for _ in range(count):
        calls = chance.choices(list(_MEMBERS), k=chance.randint(4, 12))
        programs = [[call for call in calls if rank in _MEMBERS[call]] for rank in range(4)]
        for program in programs:
            fault = chance.choice(["none", "none", "ends early", "skips one", "swaps two"])
            at = chance.randrange(len(program)) if program else 0
            if fault == "ends early":
                del program[at:]
            elif fault == "skips one":
                del program[at : at + 1]
            elif fault == "swaps two":
                program[at : at + 2] = reversed(program[at : at + 2])
        job = _Job(programs, _MEMBERS)
        job.run()
        kept = chance.choice([64, 3])
        job.records = [calls_of_rank[-kept:] for calls_of_rank in job.records]
        yield job


def _open(group: str) -> Call:
    return {"group": group, "number": 1, "operation": "x", "shape": (4,), "done": False}


_TWO_OPEN: tuple[list[list[Call]], dict[str, list[int]]] = (
    [[_open("left"), _open("right")], [], []],
    {"left": [0, 1], "right": [0, 2]},
)
"""A job in which rank 0 waits in two calls, in threads: for rank 1 and for rank 2."""


def _start_job(rank: int, world_size: int, culprit: int, skipped: int) -> None:
    """Four steps of an all-reduce in a thread; the culprit leaves one out, and ends early."""
    calls: list[dict[str, Any]] = []

    def run() -> None:
        for step in range(4):
            if (rank, step) != (culprit, skipped):
                number, operation = len(calls) + 1, f"step {step}"
                call = {"group": "all", "number": number, "operation": operation, "shape": (2,)}
                calls.append(call | {"done": False})
                _Here.gloo.allreduce([torch.ones(2)]).wait(timedelta(seconds=_PATIENCE_SECONDS))
                calls[-1]["done"] = True

    _Here.calls = calls
    in_thread(run)


def _calls(rank: int, world_size: int) -> list[dict[str, Any]]:
    return _Here.calls


def _make_up(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        _Here.gloo.allreduce([torch.ones(2)]).wait(timedelta(seconds=_PATIENCE_SECONDS))


def _real_job(engines: LocalEngines, culprit: int) -> list[list[dict[str, Any]]]:
    """The calls of a job that hangs on the engines; it has ended when this returns."""
    engines.run(_start_job, culprit, random.randrange(4))
    wanted = [(3, True) if rank == culprit else (4, False) for rank in range(engines.n)]
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        records = engines.run(_calls)
        if [(len(calls), bool(calls) and calls[-1]["done"]) for calls in records] == wanted:
            break
        if time.monotonic() > end:
            raise TimeoutError("the engines were too slow")
        time.sleep(0.05)
    engines.run(_make_up, culprit)
    return records


def _told(records: Sequence[Sequence[Call]]) -> str:
    def one(call: Call) -> str:
        return f"{call['group']} {call['number']} {'done' if call['done'] else 'WAITS'}"

    return "".join(
        f"\n  rank {rank}: {', '.join(map(one, calls)) or 'no call'}"
        for rank, calls in enumerate(records)
    )


_AtFault = Callable[[Sequence[Sequence[Call]], Mapping[str, Sequence[int]]], list[int]]


@exercise("7.2 the rank at fault")
def check_at_fault(at_fault: _AtFault, engines: LocalEngines) -> str:
    """Check the function on simulated jobs, and on one that hangs on the engines."""
    found: Counter[int] = Counter()
    jobs: list[tuple[Any, Any]] = [(job.records, job.members) for job in random_jobs()]
    for records, members in [*jobs, _TWO_OPEN]:
        answer, wanted = at_fault(records, members), at_fault_in(records, members)
        require(
            list(answer) == wanted,
            f"you name {answer}; wanted: {wanted}, of ranks with these calls, in groups of "
            f"{members}:{_told(records)}",
        )
        found[len(wanted)] += 1
    _form_groups(engines, _PATIENCE_SECONDS)
    culprit = random.randrange(engines.n)
    records = _real_job(engines, culprit)
    answer = at_fault(records, {"all": list(range(engines.n))})
    require(
        list(answer) == [culprit],
        f"a job on the engines hangs: you name {answer}; wanted: {[culprit]}:{_told(records)}",
    )
    several = sum(found.values()) - found[0] - found[1]
    return (
        f"{_JOBS} simulated jobs, of which {found[1]} had one rank at fault, {several} several and "
        f"{found[0]} none; and one that hung on the engines."
    )


# 7.3

_Launch = Callable[[set[int], list[int], int], list[int]]


def _launches(launch: _Launch, arrival: Sequence[int]) -> list[list[int]]:
    """The buckets launched so far, in order, after each one that became ready in this order."""
    ready: set[int] = set()
    launched: list[int] = []
    after = []
    for bucket in arrival:
        ready.add(bucket)
        now = list(launch(set(ready), list(launched), len(arrival)))
        require(
            set(now) <= ready - set(launched) and len(set(now)) == len(now),
            f"ready: {sorted(ready)}, launched: {launched}: you launch {now}; wanted: buckets that "
            f"are ready, each once",
        )
        launched = launched + now
        after.append(launched)
    return after


def _reduce_in_order(rank: int, world_size: int, orders: list[list[int]]) -> list[float]:
    """Reduce the buckets in this rank's order. The sums, by bucket."""
    sums = {}
    for bucket in orders[rank]:
        tensor = torch.tensor([float(bucket * 10 + rank)])
        collectives.all_reduce(tensor, _Here.gloo)
        sums[bucket] = float(tensor)
    return [sums[bucket] for bucket in sorted(sums)]


@exercise("7.3 one order for all")
def check_launch(launch: _Launch, engines: LocalEngines) -> str:
    """Check the function for every order of up to 6 buckets, and run one order on the engines."""
    tried = 0
    for count in (1, 2, 3, 4, 6):
        common = _launches(launch, range(count))[-1]
        for arrival in permutations(range(count)):
            after = _launches(launch, arrival)
            what = f"{count} buckets became ready in the order {list(arrival)}"
            require(
                sorted(after[-1]) == list(range(count)),
                f"{what}, and {after[-1]} were launched; wanted: each of them, once",
            )
            require(
                after[-1] == common,
                f"{what}, and were launched in the order {after[-1]}. When they became ready in "
                f"the order {list(range(count))}, they were launched in the order {common}. Two "
                f"such ranks wait for each other for ever. Wanted: one order",
            )
            for number, launched in enumerate(after, start=1):
                first = takewhile(set(arrival[:number]).__contains__, common)
                require(
                    launched == list(first),
                    f"{what}. After the first {number}, you had launched {launched}; wanted: "
                    f"of your order {common}, all up to the first that is not ready",
                )
            tried += 1
    _form_groups(engines, _PATIENCE_SECONDS)
    arrivals = [random.sample(range(6), 6) for _ in range(engines.n)]
    orders = [_launches(launch, arrival)[-1] for arrival in arrivals]
    wanted = [float(sum(bucket * 10 + rank for rank in range(engines.n))) for bucket in range(6)]
    for rank, sums in enumerate(engines.run(_reduce_in_order, orders)):
        require(sums == wanted, f"on the engines, rank {rank} has {sums}; wanted: {wanted}")
    return f"{tried} orders of up to 6 buckets, each launched as early as one order allows."


# 7.4

_Kind = tuple[tuple[int, ...], str]
_ALIKE: _Kind = ((4,), "float32")
_MIXED: list[tuple[list[_Kind], list[int]]] = [
    ([_ALIKE] * 4, []),
    ([_ALIKE, _ALIKE, ((8,), "float32"), _ALIKE], [2]),
    ([((3,), "float32"), _ALIKE, _ALIKE, _ALIKE], [0]),
    ([_ALIKE, _ALIKE, _ALIKE, ((4,), "int32")], [3]),
    ([((2, 3), "float32"), ((6,), "float32"), ((2, 3), "float32"), ((2, 3), "float32")], [1]),
    ([_ALIKE, ((5,), "float32"), _ALIKE, ((6,), "float32")], [1, 3]),
    ([((2, 3), "float64")] * 4, []),
]


def _try_reduce(rank: int, world_size: int, kinds: list[_Kind]) -> tuple[str, str, Any, int, int]:
    """Call the answer. The error and its text, the tensor, and the gathers and messages it took."""
    group, (shape, dtype) = _Here.group, kinds[rank]
    tensor = torch.full(shape, rank + 1, dtype=getattr(torch, dtype))
    generation, sent = group.generation, sum(group.send_dst_counter.values())
    sent += group.broadcast_send_counter
    kind, text = "", ""
    try:
        with interrupted_after(_PATIENCE_SECONDS):
            defined_here("checked_all_reduce")(tensor, group, _Here.gloo)
    except (NotImplementedError, TooLateError):
        raise
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    gathers = group.generation - generation
    messages = sum(group.send_dst_counter.values()) + group.broadcast_send_counter - sent
    return kind, text, sorted(set(tensor.flatten().tolist())), gathers, messages


@exercise("7.4 an all-reduce that names the odd rank")
def check_checked_all_reduce(engines: LocalEngines) -> str:
    """Check the function ``checked_all_reduce`` of the engines, in groups of their own."""
    _form_groups(engines, 2.0)  # a wrong answer hangs for so long
    most = 0
    for kinds, odd in _MIXED:
        what = f"shapes and dtypes {kinds}: "
        for rank, (kind, text, values, gathers, messages) in enumerate(
            engines.run(_try_reduce, kinds)
        ):
            seen = f"{what}on rank {rank}, {kind or 'no error'}{': ' * bool(kind)}{text}"
            if not odd:
                require(
                    not kind and values == [10.0],
                    f"{seen}, and the values are {values}; wanted: the sum, 10.0",
                )
            else:
                others = [f"rank {other}" for other in range(engines.n) if other not in odd]
                require(
                    kind == "ValueError"
                    and name_ranks(odd) in text
                    and not any(other in text for other in others),
                    f"{seen}; wanted on every rank: a ValueError whose text names "
                    f"{name_ranks(odd)}, and no other rank",
                )
                require(
                    values == [rank + 1],
                    f"{seen}, but its tensor is {values}; wanted: as it was, {[rank + 1]}",
                )
            require(
                gathers <= 1 and messages == 0,
                f"{what}rank {rank} made {gathers} gathers or barriers of `group`, and sent "
                f"{messages} messages; wanted: at most 1 and 0",
            )
            most = max(most, gathers)
    wrong = sum(bool(odd) for _, odd in _MIXED)
    return (
        f"{len(_MIXED) - wrong} sums were right, {wrong} times every rank named the odd ones, and "
        f"the gloo group went on working; at most {most} gather a call."
    )


# 7.5

_WATCH_SECONDS = 1.0
_SLACK_SECONDS = 4.0


def _watch(rank: int, world_size: int, present: list[int]) -> tuple[Any, float]:
    """Call the answer on the ranks that are present. What it returned, and the seconds."""
    if rank not in present:
        return None, 0.0
    start = time.monotonic()
    with interrupted_after(_PATIENCE_SECONDS):
        found = defined_here("who_is_missing")(_Here.group, _WATCH_SECONDS)
    return found, time.monotonic() - start


def _end_group(rank: int, world_size: int, host_rank: int) -> None:
    if rank == host_rank:
        _Here.group.end()


@exercise("7.5 a watchdog")
def check_who_is_missing(engines: LocalEngines) -> str:
    """Check the function ``who_is_missing`` of the engines, in a group of their own."""
    engines.offer_port()
    engines.run(_form)  # without a gloo group, which would keep the store of rank 0
    everybody = list(range(engines.n))
    steps = [
        (everybody, [], "all ranks called it"),
        ([0, 1, 2], [3], "rank 3 did not call it"),
        ([3], [3], "rank 3 called it too late"),
        (everybody, [], "all ranks called it again"),
        ([1, 3], [0, 2], "ranks 0 and 2 did not call it"),
        ([0, 2], [0, 2], "ranks 0 and 2 called it too late"),
        (everybody, [], "all ranks called it again"),
        ([1, 2, 3], [0], "rank 0, which hosts the store, had ended its group"),
    ]
    for number, (present, wanted, what) in enumerate(steps):
        if number == len(steps) - 1:
            engines.run(_end_group, 0)
        for rank, (found, seconds) in enumerate(engines.run(_watch, present)):
            if rank in present:
                require(
                    isinstance(found, list) and found == wanted,
                    f"{what}: rank {rank} got {found!r}; wanted: {wanted}",
                )
                require(
                    seconds < _WATCH_SECONDS + _SLACK_SECONDS,
                    f"{what}: rank {rank} waited for {seconds:.1f} s; the timeout was "
                    f"{_WATCH_SECONDS:g} s",
                )
    return (
        f"Nobody, one, two, or the host missing: each time all ranks named the same, within "
        f"{_WATCH_SECONDS + _SLACK_SECONDS:g} s, and could go on."
    )
