"""Checks of notebook 05: an explorer, and a barrier that is built step by step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from refdist.exploration import (
    BARRIER,
    Exploration,
    Property,
    Snapshot,
    everyone_is_woken,
    explore,
    nobody_returns_early,
    nobody_waits_for_ever,
    rank_0_leaves_last,
    within,
)
from refdist.lab.exercises import UnsolvedError, exercise, require
from refdist.lab.exercises.trying import LimitedStore
from refdist.lab.requests import LoggedStore

Step = Callable[[Any, int, int, int], object]
"""``step(store, rank, world_size, number)`` of the barrier with that number."""

_MOST_RUNS = 400
_KEYS = 4
_STEPS, _TIMES = 45, 3
_MOST_REQUESTS = 20  # of a rank for a barrier; a right answer makes fewer
_WIDTH = 5_000  # most states after each step; a right answer has fewer


@exercise("5.1 the search")
def search(answer: Callable[..., tuple[str | None, int]]) -> str:
    """Check an explorer: the numbers of states, a shortest schedule, and the runs of the code."""
    runs = 0

    def adds(store: Any, rank: int, world_size: int, *, requests: int) -> None:
        nonlocal runs
        runs += 1
        for number in range(requests):
            store.add(f"{rank}/{number}", 1)

    for world_size, requests in ((1, 1), (2, 1), (2, 3), (3, 3)):
        runs = 0
        told = answer(partial(adds, requests=requests), world_size, lambda *_: True)
        case = f"{world_size} ranks with {requests} requests each"
        wanted = (requests + 1) ** world_size
        require(told == (None, wanted), f"{case}: returned {told}, wanted {(None, wanted)}")
        require(
            runs <= _MOST_RUNS,
            f"{case}: {runs} runs of the protocol, at most {_MOST_RUNS} wanted. Is a state that "
            f"two schedules reach explored twice?",
        )

    def differ(store: Any, rank: int, world_size: int) -> None:
        store.set("key", str(rank))
        store.compare_set("key", "1", "x")

    told = answer(differ, 2, lambda *_: True)
    require(
        told == (None, 17),
        f"two ranks set a key, and compare it: returned {told}, wanted (None, 17). Memories may "
        f"differ where all answers are the same",
    )

    def waits(store: Any, rank: int, world_size: int) -> None:
        if rank == 0:
            store.wait(["door"])
        else:
            store.add("steps", 1)
            store.set("door", "")

    def rank_0_stays(requests: Sequence[object], answers: Sequence[tuple[object, ...]]) -> bool:
        require(
            len(requests) == 2 and isinstance(answers[1], tuple),
            "holds() gets the requests of all ranks, and a tuple of answers for each",
        )
        return requests[0] is not None

    first, _ = answer(waits, 2, rank_0_stays)
    require(first == "110", f"rank 0 waits for rank 1: returned {first!r}, wanted '110'")

    def uneven(store: Any, rank: int, world_size: int, *, soon: int) -> None:
        adds(store, rank, world_size, requests=1 if rank == soon else 4)

    def goes_on(requests: Sequence[object], _: object, soon: int) -> bool:
        return requests[soon] is not None

    for soon in (0, 1):
        first, _ = answer(partial(uneven, soon=soon), 2, partial(goes_on, soon=soon))
        require(
            first == str(soon),
            f"rank {soon} returns after one request, the other rank after four: returned "
            f"{first!r}, wanted '{soon}', as shorter schedules come first",
        )

    def either(store: Any, rank: int, world_size: int) -> None:
        if store.add("arrived", 1) == world_size:
            store.set("door", "")
        store.wait(["door"])

    first, _ = answer(either, 2, lambda requests, _: requests[0] is not None or requests[1] is None)
    require(
        first in ("0110", "1000"),
        f"a count and a door: returned {first!r}, and no schedule is shorter than '0110'",
    )
    return f"64 states of 3 ranks in {_most(adds, answer)} runs of the protocol."


def _most(adds: Callable[..., None], answer: Callable[..., object]) -> int:
    runs = 0

    def counted(*place: Any) -> None:
        nonlocal runs
        runs += 1
        adds(*place, requests=3)

    answer(counted, 3, lambda *_: True)
    return runs


def one_key_at_most(snapshot: Snapshot) -> bool:
    """In the end, the store holds at most one key."""
    return not snapshot.ended or len(snapshot.values) <= 1


@exercise("5.2 numbered doors")
def numbered_doors(answer: Step) -> str:
    """Check three barriers without timeouts: early returns, sleepers, and keys that are left."""
    properties = [nobody_returns_early, nobody_waits_for_ever, everyone_is_woken, one_key_at_most]
    cases = ((2, 1), (2, 2), (1, 3), (2, 3), (3, 3))
    found = [_explore(answer, n, properties, times=times) for n, times in cases]
    return f"{found[-1].schedules:,} schedules of 3 ranks, none breaks it; at most 1 key is left."


_UNTIL_CONFIRMED = [holds for holds in BARRIER if holds is not rank_0_leaves_last]


@exercise("5.3 the decision")
def decided(answer: Step) -> str:
    """Check arrival and confirmation, with timeouts and deaths, and count the requests."""
    found = _disturbed(answer, [*_UNTIL_CONFIRMED, within(1.0)])
    most = _requests(answer, 2)
    require(most <= 3, f"a rank made {most} requests, at most 3 wanted")
    return f"{found:,} schedules, none breaks it; at most {most} requests a rank."


@exercise("5.4 departure")
def depart(confirm: Step, answer: Step) -> str:
    """Check departure after a right ``decided``, and count its requests."""

    def both(store: Any, rank: int, world_size: int, number: int) -> None:
        confirm(store, rank, world_size, number)
        answer(store, rank, world_size, number)

    found = _disturbed(both, [*BARRIER, within(2.0), _others_wait_once])
    most = _requests(answer, 2)
    require(most <= 2, f"a rank made {most} requests to depart, at most 2 wanted")
    return f"{found:,} schedules, none breaks it; at most {most} requests a rank to depart."


def _others_wait_once(snapshot: Snapshot) -> bool:
    """Ranks other than 0 wait for at most a second, in arrival."""
    return all(c.seconds <= 1 for calls in snapshot.calls[1:] for c in calls.values())


def four_keys_at_most(snapshot: Snapshot) -> bool:
    """When the last barrier has returned everywhere, at most four keys are in the store."""
    last = [calls[snapshot.names[-1]] for calls in snapshot.calls if snapshot.names[-1] in calls]
    complete = len(last) == len(snapshot.calls) and all(call.returned for call in last)
    return not complete or len(snapshot.values) <= _KEYS


@exercise("5.5 your barrier")
def my_barrier(answer: Callable[[Any, int, int], Any]) -> str:
    """Check a class with ``wait``: all properties, keys that are left, and requests."""
    properties = [*BARRIER, within(2.0), four_keys_at_most]
    steps = _ask(_waits(answer, _TIMES), 2, properties, timeouts=0).steps
    require(steps <= _STEPS, f"{_TIMES} barriers took {steps} steps, at most {_STEPS} wanted")
    found = 0
    for world_size, times, timeouts, crashes in (
        (1, 2, 0, 0),
        (2, 3, 1, 0),
        (2, 2, 2, 0),
        (2, 2, 1, 1),
        (3, 1, 1, 1),
        (3, 2, 0, 0),
    ):
        limits = {"timeouts": timeouts, "crashes": crashes}
        found += _ask(_waits(answer, times), world_size, properties, **limits).schedules
    return f"{found:,} schedules, none breaks it; {_TIMES} barriers of 2 ranks in {steps} steps."


def _waits(answer: Callable[[Any, int, int], Any], times: int) -> Callable[..., dict[str, Any]]:
    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Any]:
        barrier = answer(LimitedStore(store, times * _MOST_REQUESTS), rank, world_size)
        return {f"barrier {number}": lambda: barrier.wait() and None for number in range(times)}

    return protocol


def _disturbed(step: Step, properties: Sequence[Property]) -> int:
    """The schedules of a step with timeouts and deaths; an error if one breaks a property."""
    cases = ((1, 1, 0, 0), (2, 2, 2, 0), (2, 2, 1, 1), (3, 1, 1, 0), (3, 1, 0, 1))
    return sum(
        _explore(step, n, properties, times=times, timeouts=timeouts, crashes=crashes).schedules
        for n, times, timeouts, crashes in cases
    )


def _explore(
    step: Step, world_size: int, properties: Sequence[Property], times: int, **limits: Any
) -> Exploration:
    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Any]:
        place = store, rank, world_size
        return {f"barrier {n}": partial(_call, step, *place, n) for n in range(times)}

    return _ask(protocol, world_size, properties, **{"timeouts": 0} | limits)


def _call(step: Step, store: Any, *place: Any) -> None:
    step(LimitedStore(store, _MOST_REQUESTS), *place)


def _ask(
    protocol: Any, world_size: int, properties: Sequence[Property], **limits: Any
) -> Exploration:
    checked = [_no_slip, no_sleep, *properties]
    found = explore(protocol, world_size, checked, width=_WIDTH, **limits)
    if found.counterexample is not None:
        case = ", ".join(f"{most} {what}" for what, most in limits.items() if most)
        timeline = found.counterexample.timeline()
        require(False, f"{world_size} ranks, {case or 'undisturbed'}: this breaks it.\n{timeline}")
    return found


def no_sleep(snapshot: Snapshot) -> bool:
    """A call takes time only in waits of the store that time out, and does not sleep."""
    return not any(
        call.seconds and not call.early and not call.stalled
        for calls in snapshot.calls
        for call in calls.values()
    )


def _no_slip(snapshot: Snapshot) -> bool:
    """No call raises an error of the program, such as a TypeError."""
    slips = (UnsolvedError, NotImplementedError, NameError, TypeError, AttributeError, LookupError)
    for calls in snapshot.calls:
        for call in calls.values():
            if isinstance(call.error, slips):
                raise call.error
    return True


def _requests(step: Step, world_size: int) -> int:
    """The most requests that a rank makes in any undisturbed schedule."""
    most = 0

    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Any]:
        asked = LoggedStore(store)

        def call() -> None:
            nonlocal most
            step(asked, rank, world_size, 0)
            most = max(most, len(asked.log))

        return {"call": call}

    explore(protocol, world_size, [], timeouts=0)
    return most
