"""Checks of notebook 01: a door for each use, seconds lost, a timeline, and requests counted."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore

from refdist import PhaseEvent
from refdist.barrier.plain import Barrier
from refdist.exploration import explore, nobody_returns_early, nobody_waits_for_ever
from refdist.lab.costs import BarrierFunction
from refdist.lab.exercises import exercise, require
from refdist.lab.exercises.trying import LimitedStore, no_call_raises
from refdist.lab.requests import LoggedStore, Request
from refdist.store.client import StoreClient

_PATIENCE_SECONDS = 20.0
_ALLOWED = {"add", "set", "wait", "delete_key", "check"}
_MOST_REQUESTS = 10  # of a rank for a use; a right answer makes fewer
_EXPLORED = ((1, 3), (2, 3), (3, 2))
"""World sizes and numbers of uses, of which every schedule is tried."""

_USES = 20


@exercise("1.1 a door for each use")
def check_numbered_door(barrier: BarrierFunction) -> str:
    """Every schedule of three small cases; then more ranks, whose requests are counted."""
    _try_alone(barrier)
    states = 0
    for world_size, uses in _EXPLORED:
        properties = [no_call_raises, nobody_returns_early, nobody_waits_for_ever]
        found = explore(_protocol(barrier, uses), world_size, properties, timeouts=0)
        told = found.counterexample and (
            f"with {world_size} ranks and {uses} uses, this does not hold: "
            f"{found.counterexample.sentence} The shortest schedule, one step a line, in which use "
            f"u0 is the first:\n{found.counterexample.timeline()}"
        )
        require(found.counterexample is None, str(told))
        states += found.states
    for world_size in (2, 3, 4, 8):
        log, keys = _run(
            world_size,
            lambda store, rank, size: [barrier(store, rank, size, use) for use in range(_USES)],
        )
        where = f"{_USES} uses by {world_size} ranks"
        others = {request.name for request in log} - _ALLOWED
        require(
            not others,
            f"{where} asked the store for {', '.join(sorted(others))}; add, set, wait and "
            f"delete_key are enough",
        )
        most = _USES * (2 * world_size + 2)
        names = Counter(request.name for request in log)
        told_names = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        require(
            len(log) <= most,
            f"{where} made {len(log)} requests ({told_names}), at most {most} are allowed, "
            f"{2 * world_size + 2} a use; does the rank that opens the door wait for it too?",
        )
        require(
            keys <= 4,
            f"{where} left {keys} keys in the store, at most 4 are allowed; which keys does no "
            f"rank need any more when all have arrived at the next use?",
        )
    return (
        f"{states} states of 1, 2 and 3 ranks, and no rank passed early or waited for ever; "
        f"{len(log) / _USES:g} requests a use of 8 ranks, {keys} keys left after {_USES} uses."
    )


def _protocol(barrier: BarrierFunction, uses: int) -> Callable[[Any, int, int], Any]:
    def protocol(store: Any, rank: int, world_size: int) -> Mapping[str, Callable[[], object]]:
        limited = LimitedStore(store, _MOST_REQUESTS * uses)

        def use(number: int) -> Callable[[], object]:
            return lambda: barrier(limited, rank, world_size, number)

        return {f"u{number}": use(number) for number in range(uses)}

    return protocol


def _try_alone(barrier: BarrierFunction) -> None:
    """Use a barrier once, alone: what it raises is the answer's own error."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=2))
    try:
        barrier(store, 0, 1, 0)
    except DistError:
        require(False, "one rank alone waits for ever; there is nobody whom it could wait for")


def _run(world_size: int, use: Callable[[Any, int, int], object]) -> tuple[list[Request], int]:
    """Run ranks, each a thread, over one store.

    Returns:
        The requests of all ranks, and the number of keys that they left.
    """
    shared = HashStore()
    shared.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
    stores = [LoggedStore(shared) for _ in range(world_size)]
    ends: list[Future[None]] = [Future() for _ in stores]

    def run(rank: int) -> None:
        try:
            use(stores[rank], rank, world_size)
        except BaseException as error:
            ends[rank].set_exception(error)
        else:
            ends[rank].set_result(None)

    for rank in range(world_size):
        threading.Thread(target=run, args=(rank,), daemon=True).start()
    for end in ends:
        end.result(2 * _PATIENCE_SECONDS)
    return [request for store in stores for request in store.log], shared.num_keys()


@exercise("1.2 seconds lost")
def check_seconds_lost(
    seconds_lost: Callable[[list[PhaseEvent]], float], measured: Sequence[PhaseEvent]
) -> str:
    """Events of a measured barrier, and of made ones: one rank, several barriers, any order."""
    cases = [
        ("the measured events", list(measured)),
        ("no events", []),
        ("one rank alone", _barrier([3.0], 0)),
        ("two ranks, 2 s apart", _barrier([10.0, 12.0], 0)),
        ("two barriers", _barrier([10.0, 10.5], 3) + _barrier([20.0, 19.0], 4)),
        ("a barrier of ranks 0 to 2 that broke", _barrier([5.0, 5.5, 5.25], 1, complete=False)),
    ]
    for number in range(20):
        chance = random.Random(number)
        events = [
            event
            for generation in range(chance.randint(1, 4))
            for event in _barrier(
                [chance.uniform(0, 9) + 20 * generation for _ in range(chance.randint(1, 6))],
                generation,
            )
        ]
        chance.shuffle(events)
        cases.append((f"shuffled events of {events[-1].generation + 1} or more barriers", events))
    for what, events in cases:
        wanted, given = _lost(events), list(events)
        found = seconds_lost(given)
        require(
            isinstance(found, (int, float)) and abs(found - wanted) < 1e-6,
            f"for {what}: returned {found!r}, wanted {wanted:.6f} rank-seconds; "
            f"the arrivals were\n{_arrivals(events)}",
        )
        require(given == list(events), f"for {what}: the list of events was changed")
    return f"The measured barrier lost {seconds_lost(list(measured)):.1f} rank-seconds."


def _lost(events: Sequence[PhaseEvent]) -> float:
    arrivals: dict[int, list[float]] = {}
    for event in events:
        if event.phase == "arrival":
            arrivals.setdefault(event.generation, []).append(event.start)
    return sum(len(starts) * max(starts) - sum(starts) for starts in arrivals.values())


def _arrivals(events: Sequence[PhaseEvent]) -> str:
    return "\n".join(
        f"  generation {event.generation}: rank {event.rank} from {event.start:.3f} to "
        f"{event.end:.3f} s"
        for event in sorted(events, key=lambda event: (event.generation, event.rank))
        if event.phase == "arrival"
    )


def _barrier(
    starts: Sequence[float | None],
    generation: int,
    complete: bool = True,
    ends: Sequence[float] = (),
    rank_0_gives_up: bool = False,
) -> list[PhaseEvent]:
    """Events of a barrier: when each rank entered, or None for a rank that did not."""
    last = max(start for start in starts if start is not None)
    events = []
    for rank, start in enumerate(starts):
        if start is None:
            continue
        now = max(start, ends[rank] if ends else last + 0.01 * (1 + rank))
        events.append(PhaseEvent(rank, generation, "arrival", start, now))
        events.append(PhaseEvent(rank, generation, "confirmation", now, now + 0.02))
        if complete and not (rank == 0 and rank_0_gives_up):
            events.append(PhaseEvent(rank, generation, "departure", now + 0.02, now + 0.03))
    return events


Reading = tuple[list[int], dict[int, float]]

_TIMELINES: list[tuple[str, list[PhaseEvent], int, Reading]] = [
    (
        "rank 1 came last",
        _barrier([10.0, 10.75, 10.5], 7),
        3,
        ([1], {0: 0.75, 1: 0.0, 2: 0.25}),
    ),
    (
        "rank 2 was stopped in arrival, and went on 5 s later",
        _barrier([10.0, 10.5, 10.25], 7, ends=[10.6, 10.6, 15.0]),
        3,
        ([1], {0: 0.5, 1: 0.0, 2: 0.25}),
    ),
    (
        "rank 0 gave up in departure",
        _barrier([3.0, 2.0, 2.5], 0, rank_0_gives_up=True),
        3,
        ([0], {0: 0.0, 1: 1.0, 2: 0.5}),
    ),
    ("one rank was alone", _barrier([4.0], 2), 1, ([0], {0: 0.0})),
    (
        "rank 2 did not come, and rank 0 broke off",
        _barrier([1.0, 1.5, None], 3, complete=False, ends=[2.0, 2.0]),
        3,
        ([2], {0: 1.0, 1: 0.5}),
    ),
    (
        "rank 0 came after rank 1 had broken off",
        _barrier([5.0, 1.0, 1.5], 3, complete=False, ends=[5.0, 2.0, 2.25]),
        3,
        ([0], {0: 0.0, 1: 1.0, 2: 0.75}),
    ),
    (
        "ranks 1 and 3 were late, and only rank 3 came at all",
        _barrier([0.0, None, 0.5, 8.0], 1, complete=False, ends=[1.0, 0, 1.0, 8.25]),
        4,
        ([1, 3], {0: 1.0, 2: 0.5, 3: 0.25}),
    ),
]


@exercise("1.3 read a timeline")
def check_read_timeline(
    read_timeline: Callable[[list[PhaseEvent], int], tuple[Any, Any]],
) -> str:
    """Barriers that completed or broke, with the events in every order of several."""
    for what, events, world_size, (late, waited) in _TIMELINES:
        for number in range(5):
            shuffled = random.Random(number).sample(events, len(events))
            found = read_timeline(shuffled, world_size)
            require(
                isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping),
                f"returned {found!r}, wanted a list of ranks and a dictionary",
            )
            where = f"{world_size} ranks, {what}:\n{_phases(events)}\n"
            require(list(found[0]) == late, f"{where}returned late ranks {found[0]}, wanted {late}")
            near = found[1].keys() == waited.keys() and all(
                abs(found[1][rank] - seconds) < 1e-6 for rank, seconds in waited.items()
            )
            require(near, f"{where}returned waits {dict(found[1])}, wanted {waited}")
    broken = sum(not any(e.phase == "departure" for e in events) for _, events, *_ in _TIMELINES)
    return f"{len(_TIMELINES)} timelines were read, {broken} of them of barriers that broke."


def _phases(events: Sequence[PhaseEvent]) -> str:
    return "\n".join(
        f"  rank {event.rank}: {event.phase} from {event.start:.2f} to {event.end:.2f} s"
        for event in sorted(events, key=lambda event: (event.rank, event.start))
    )


class _Ordered(Barrier):
    """A barrier in which rank 0 waits for the others to leave, or leaves when they all have."""

    rank_0_waits: bool
    moment: threading.Semaphore  # released by what has to come first, once for each that waits

    def depart(self, this: Any) -> None:
        others = self.world_size - 1
        for _ in range(self.rank_0_waits if self.rank else (not self.rank_0_waits) * others):
            require(self.moment.acquire(timeout=_PATIENCE_SECONDS), "a rank did not depart in time")
        super().depart(this)
        if self.rank and not self.rank_0_waits:
            self.moment.release()

    def wait_for_others(self, this: Any, *request: Any) -> None:
        if self.rank_0_waits:
            self.moment.release(self.world_size - 1)
        super().wait_for_others(this, *request)


@exercise("1.4 requests of N ranks")
def check_requests(
    requests_of_keys: Callable[[int], int],
    requests_of_plain: Callable[[int, bool], int],
    barrier_of_keys: BarrierFunction,
) -> str:
    """Predictions beside counted requests, also for numbers of ranks that the notebook lacks."""
    sizes = (1, 2, 3, 5, 8, 12)
    for world_size in sizes:
        log, _ = _run(world_size, lambda store, rank, size: barrier_of_keys(store, rank, size, 0))
        counted = [_compared("the barrier of keys", world_size, requests_of_keys(world_size), log)]
        for waits in (False, True)[: 1 + (world_size > 1)]:
            predicted = requests_of_plain(world_size, waits)
            does = "waits for the others" if waits else "leaves when all have left"
            log = _requests_of_plain(world_size, waits)
            name = f"the plain barrier in which rank 0 {does}"
            counted.append(_compared(name, world_size, predicted, log))
    keys, *plain = counted
    return (
        f"Exact for {', '.join(map(str, sizes))} ranks. For {sizes[-1]}: {keys} requests with a "
        f"key for each rank, {' or '.join(map(str, plain))} in the plain barrier."
    )


def _requests_of_plain(world_size: int, rank_0_waits: bool) -> list[Request]:
    """The requests of a barrier that is not the first."""
    moment = threading.Semaphore(0)

    def use(store: Any, rank: int, size: int) -> None:
        barrier = _Ordered(StoreClient(store), rank, size)
        barrier.rank_0_waits, barrier.moment = rank_0_waits, moment
        for _ in range(2):
            store.log.clear()
            barrier.wait(_PATIENCE_SECONDS)

    log, _ = _run(world_size, use)
    # the slices of one wait count once
    return [
        request
        for before, request in zip([None, *log], log, strict=False)
        if before is None
        or (request.name, request.key) != ("wait", before.key)
        or before.name != "wait"
    ]


def _compared(what: str, world_size: int, predicted: Any, log: Sequence[Request]) -> int:
    names = Counter(request.name for request in log)
    told = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
    require(
        predicted == len(log),
        f"{what}, {world_size} ranks: predicted {predicted!r}, counted {len(log)} requests: {told}",
    )
    return len(log)
