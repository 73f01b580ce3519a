"""What the others see when a rank is killed, stopped or started again, in each step of each call.

Where rank 0 itself is the victim but not the host, the store is in the process of the test.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import psutil
import pytest
from ranks import LOCAL, Watched, run_ranks, until, until_signed
from torch.distributed import PrefixStore

from refdist import (
    BarrierError,
    GroupCreationError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.barrier import quick
from refdist.barrier.roll import Roll
from refdist.errors import name_ranks
from refdist.objects.encoding import CHUNK_BYTES
from refdist.store import keys
from refdist.store.keys import PlainKeys, Slot
from refdist.store.listening import listen
from refdist.store.seals import NO_SEALS

SLACK = 6.0  # seconds that a slow machine may take beyond a protocol's own deadline
TIMEOUT = 1.5
PATIENCE = 2.0  # how long about, beyond its timeout, a call waits for a store that says nothing
AT_ONCE = 16  # cases that run side by side: nearly all of their time, they wait
SMALL, LARGE = "small", bytes(3 * CHUNK_BYTES)

# These tests start many processes, so they run one after the other.
pytestmark = pytest.mark.xdist_group("failures")

# With what torch offers, and without, as on an old one: both kinds of barriers.
WITHOUT = (torch_versions.STORE_BARRIER,)
with_and_without = pytest.mark.parametrize(
    "without",
    [
        pytest.param(
            (),
            id="counters",
            marks=pytest.mark.skipif(
                not torch_versions.store_features()[torch_versions.STORE_BARRIER],
                reason="this torch has no Store.barrier",
            ),
        ),
        pytest.param(WITHOUT, id="keys"),
    ],
)

# World size, and the rank that something happens to: the first, one in between, or the last.
VICTIMS = {(): [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)], WITHOUT: [(3, 0), (3, 1), (3, 2)]}
NOT_RANK_0 = {
    without: [victim for victim in victims if victim[1] != 0]
    for without, victims in VICTIMS.items()
}


def _group(here, before, without=(), world_size=None, elsewhere=False):
    """A group made without ``create``, whose requests are seen by ``before``.

    Its store is on rank 0, or ``elsewhere``: that of the board, which no rank takes with it.
    """
    store = create_tcp_store(LOCAL, here.board.port) if elsewhere else here.store("group")
    with _do_without(without):
        watched = Watched(store, before)
        return StatelessProcessGroup(here.rank, world_size or here.world_size, watched)


@contextmanager
def _do_without(features):
    with ExitStack() as stack:
        for feature in features:
            stack.enter_context(torch_versions.switched_off(feature))
        yield


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(process: int) -> None:
    """Stop a process, and return when it has stopped: a signal takes its time on a busy machine."""
    os.kill(process, signal.SIGSTOP)
    until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    until(lambda: _is_gone(process))


def _keys_of(without, number=0):
    """The keys of a barrier, in a group of which none has broken."""
    return PlainKeys.of(number) if without else Slot.of(0, number)


def _signs_off(its, generation, request, key, value):
    """Whether a request is the entry on the roll that says that a rank has left."""
    signs = request == "append" and key == its.roll
    return signs and len(Roll.parse(value, generation, NO_SEALS, key).left) == 1


def _adds_itself(its, request, key, value):
    """Whether a request adds a rank to the state, which tells it the outcome."""
    return request == "add" and key == its.state and value & quick.COUNT == 1


def _confirms(its, rank, generation, request, key, value):
    """Whether a request is one of those with which a rank confirms, once it has arrived."""
    if isinstance(its, PlainKeys):
        return request == "compare_set" and key == its.outcome
    # rank 0 does not sign off
    signs_off = _signs_off(its, generation, request, key, value)
    return signs_off or (rank == 0 and _adds_itself(its, request, key, value))


def _counted(group, its) -> bool:
    """Whether someone is counted at a barrier. To read the count would wake those who wait."""
    return group.store._store.check([its.counter])


def _waiting(group, its) -> int:
    """How many ranks are asleep; without ``Store.barrier``, how many are counted, and wait."""
    if isinstance(its, Slot):
        return group.store._store.add(its.state, 0) // quick.ASLEEP
    return group.store._store.add(its.counter, 0)


def _outcome(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, or the error that it raises; and the seconds that it takes."""
    start = time.monotonic()
    try:
        result = call()
    except RuntimeError as error:
        result = error
    return result, time.monotonic() - start


def _meet(here, name, ranks):
    here.tell(f"{name}/{here.rank}")
    for rank in ranks:
        here.ask(f"{name}/{rank}")


def _check_cases(function, check, cases, killed: Callable[..., Sequence[int]] = lambda *_: ()):
    """Run ``function`` with the arguments of each case, which begin with the world size.

    Then call ``check`` with those and the results.
    """

    def run(case):
        try:
            world_size, *arguments = case
            results = run_ranks(function, world_size, *arguments, killed=killed(*case))
            check(*case, results)
        except Exception as error:
            return f"{case}: {error}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failures = [failure for failure in pool.map(run, cases) if failure]
    assert not failures, "\n".join(failures)


def _the_victim(world_size, victim, *_):
    return [victim]


# A rank is killed in a step of a barrier. Each step is recognized by the request that it begins
# with, or by what the store says of a rank that waits. With counters, a rank confirms as it signs
# off and adds to the state, which tells it the outcome; only then it wakes the others, and resets
# keys. With keys, it reads the outcome or, as the last to arrive, proposes it, and wakes the
# others; it deletes keys, and only then signs off and is counted again. Rank 0 does not sign off.

SIGNED = "between signing the roll and arriving"
CONFIRMS = "after arrival, before it confirms"
CONFIRMS_AS_LAST = "after arrival as the last, before it confirms"
SIGNS_OFF = "after it knows the outcome, before it signs off"
COUNTS = "after it signed off, before it is counted"
WAKES = "after it knows the outcome, before it wakes the others"
LETS_GO = "after it signed off, before it lets rank 0 go"
RESETS = "after it knows the outcome, before it resets or deletes keys"


def _comes_to(step, rank, its, request, key, value, is_counted):
    """Whether a request to the second barrier, of which the keys are given, begins a step."""
    signs_off = _signs_off(its, 1, request, key, value)
    counts_in = request in ("barrier", "add") and key == its.counter and not is_counted
    confirms = _confirms(its, rank, 1, request, key, value)
    if isinstance(its, Slot):
        steps = {
            CONFIRMS: confirms,
            CONFIRMS_AS_LAST: confirms,
            COUNTS: _adds_itself(its, request, key, value),
            WAKES: request == "set" and key == its.wake,
            LETS_GO: request == "set" and key == its.left,
            RESETS: request == "multi_set" and key[0] == _keys_of((), 0).roll,
        }
    else:
        steps = {
            CONFIRMS: confirms,
            CONFIRMS_AS_LAST: confirms and value == b"",
            SIGNS_OFF: signs_off,
            COUNTS: request == "add" and key == its.counter and is_counted,
            WAKES: request == "set" and key == its.outcome,
            LETS_GO: request == "set" and key == its.all_left,
            RESETS: request == "delete_key",
        }
    steps |= {
        "before it arrives": request == "append" and key == its.roll and not signs_off,
        SIGNED: counts_in,
    }
    return steps.get(step, False)


def _dies_in_a_barrier(here, dead, step, without):
    others = [rank for rank in range(here.world_size) if rank != dead]
    its = _keys_of(without, 1)
    gate, last_gate = (its.outcome, its.all_left) if without else (its.wake, its.left)
    armed, asked, counted = [], [], []

    def before(request, key=None, value=None, *_):
        if not armed:
            return
        waits = request in ("barrier", "wait")
        if here.rank == 0 and waits and key in (last_gate, [last_gate]):
            here.tell("through/0")
            if step == LETS_GO:
                here.ask("dying")
        if here.rank != dead:
            return
        if waits and key in (gate, [gate]):
            asked.append(key)
            if len(asked) == (2 if without else 1):
                here.tell("asleep")
        if step == LETS_GO and _signs_off(its, 1, request, key, value):
            # it is the last to confirm
            for rank in others:
                here.ask(f"through/{rank}")
        if step in LATE and _comes_to("before it arrives", dead, its, request, key, value, False):
            until(lambda: _waiting(group, its) == len(others))
        if _comes_to(step, dead, its, request, key, value, bool(counted)):
            here.tell("dying")
            _die()
        if request in ("barrier", "add") and key == its.counter:
            counted.append(key)

    group = _group(here, before, without, elsewhere=dead == 0)
    group.barrier()
    armed.append(True)
    here.meet("second barrier")
    if here.rank == dead:
        here.tell("process", os.getpid())
        group.barrier()
        _die()
    if step in ("while it waits", "asleep"):
        if here.rank == others[0]:
            if step == "asleep":
                here.ask("asleep")
            until(lambda: _counted(group, its))
            _kill(here.ask("process"))
            here.tell("dead")
        here.ask("dead")
    elif step in (CONFIRMS, LETS_GO, SIGNS_OFF, COUNTS, RESETS):
        # who arrives last has to let the others know
        until(lambda: _counted(group, its))
    first = _outcome(lambda: group.barrier(3 * TIMEOUT if step in LATE else TIMEOUT))
    here.tell(f"through/{here.rank}")
    _meet(here, "first", others)
    second = _outcome(lambda: group.barrier(TIMEOUT))
    _meet(here, "second", others)
    return *first, *second


LATE = (CONFIRMS_AS_LAST, WAKES)  # the others wait when it comes


def _check_missing(errors, missing, generation):
    """All have one and the same error, which names who is missing."""
    assert {type(error) for error in errors} == {BarrierError}, errors
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert error.missing == missing and error.phase == "arrival" and not error.completed
        assert error.generation == generation and error.broken_by not in missing


def _check_next(results, dead):
    """The next barrier: the same error for all, within the timeout, and it names the dead rank."""
    survivors = [result for rank, result in enumerate(results) if rank != dead]
    assert results[dead] is None
    assert max(seconds for *_, seconds in survivors) < TIMEOUT + SLACK
    _check_missing([second for *_, second, _ in survivors], (dead,), 2)


# It dies before it has signed: the others raise one and the same error within their timeout. It
# names the rank.


def _check_broken(world_size, dead, step, without, results):
    survivors = [result for result in results if result is not None]
    _check_missing([first for first, *_ in survivors], (dead,), 1)
    assert max(seconds for _, seconds, *_ in survivors) < TIMEOUT + SLACK
    _check_next(results, dead)


@with_and_without
def test_killed_before_it_has_arrived(without):
    cases = [(*victim, "before it arrives", without) for victim in VICTIMS[without]]
    _check_cases(_dies_in_a_barrier, _check_broken, cases, _the_victim)


# It dies when it has signed, and is not counted among those that have left. The others return,
# except rank 0: in time, an error that says that the barrier completed, and names the rank; or all
# of the others, if all have signed off.


def _check_completed(world_size, dead, step, without, results):
    for rank, result in enumerate(results):
        if rank == dead:
            continue
        first, seconds, *_ = result
        if rank != 0:
            assert first is None
            continue
        assert isinstance(first, BarrierError) and first.completed and first.phase == "departure"
        missing = tuple(range(1, world_size)) if step == COUNTS else (dead,)
        assert first.missing == missing and f"in vain for {name_ranks(missing)} to" in str(first)
        assert seconds < (3 if step in LATE else 1) * 2 * TIMEOUT + SLACK
    _check_next(results, dead)


@with_and_without
def test_killed_after_it_has_arrived(without):
    steps = [SIGNED, "while it waits", "asleep", CONFIRMS, *([RESETS] if without else [])]
    cases = [(*victim, step, without) for victim in VICTIMS[without] for step in steps]
    if without:
        cases += [(*victim, SIGNS_OFF, without) for victim in NOT_RANK_0[without]]
    cases += [(*victim, COUNTS, without) for victim in NOT_RANK_0[without]]
    _check_cases(_dies_in_a_barrier, _check_completed, cases, _the_victim)


# The same, where it came last and the others wait, with counters asleep. Only it knew that all had
# arrived; with keys, it may have said so, and nobody has woken the others yet.


@with_and_without
def test_killed_after_it_has_arrived_as_the_last(without):
    steps = [CONFIRMS_AS_LAST, *([WAKES] if without else [])]
    cases = [(*victim, step, without) for victim in VICTIMS[without] for step in steps]
    _check_cases(_dies_in_a_barrier, _check_completed, cases, _the_victim)


# It dies when it is counted among those that have left: everyone else returns in time. So they do
# when it is rank 0 that dies before.


def _check_returned(world_size, dead, step, without, results):
    for first, seconds, *_ in filter(None, results):
        assert first is None
        assert seconds < (3 if step in LATE else 1) * TIMEOUT + TIMEOUT + SLACK
    _check_next(results, dead)


@with_and_without
def test_killed_after_it_has_confirmed(without):
    steps = ["after it has left", *([] if without else [WAKES])]
    cases = [(*victim, step, without) for victim in VICTIMS[without] for step in steps]
    cases += [(*victim, COUNTS, without) for victim in VICTIMS[without] if victim[1] == 0]
    cases += [(*victim, LETS_GO, without) for victim in NOT_RANK_0[without]]
    if not without:
        # rank 0 alone resets keys
        cases += [(world_size, 0, RESETS, without) for world_size in (2, 4)]
    _check_cases(_dies_in_a_barrier, _check_returned, cases, _the_victim)


# One rank does not come. Another one breaks the barrier for that, and is killed before it has said
# why, or before it has woken the others. They wait until their own time is up, and raise the same
# error: that who broke the barrier died; or what it wrote. So does the one that comes late. With
# keys, a rank breaks a barrier by saying why.


def _dies_while_it_breaks(here, dead, absent, step, without):
    survivors = [rank for rank in range(here.world_size) if rank != dead]
    its = _keys_of(without)
    reason = keys.reason(0)

    def before(request, key=None, *_):
        if without:
            last = request == "set" and key == its.outcome
        elif step == "before it says why":
            last = request == "set" and key == reason
        else:
            last = request == "multi_set" and its.wake in key
        if here.rank == dead and last:
            _die()

    group = _group(here, before, without)
    here.meet("barrier")
    if here.rank == absent:
        for rank in set(survivors) - {absent}:
            here.ask(f"raised/{rank}")
    first = _outcome(lambda: group.barrier(TIMEOUT if here.rank == dead else 3 * TIMEOUT))
    _meet(here, "raised", survivors)
    second = _outcome(lambda: group.barrier(TIMEOUT))
    _meet(here, "second", survivors)
    return *first, *second


def _check_who_breaks(world_size, dead, absent, step, without, results):
    errors = [result[0] for result in results if result is not None]
    assert {type(error) for error in errors} == {BarrierError}
    assert len({str(error) for error in errors}) == 1
    assert max(result[1] for result in results if result is not None) < 4 * TIMEOUT + SLACK
    for error in errors:
        if step == "before it says why":
            assert "barrier 0 was broken by a rank that died before it said why" in str(error)
        else:
            assert error.missing == (absent,) and error.broken_by == dead
    _check_missing([result[2] for result in results if result is not None], (dead,), 1)


@with_and_without
def test_killed_while_it_breaks_a_barrier(without):
    places = [(3, 1, 0), (3, 1, 2), (3, 2, 1), *([] if without else [(4, 1, 3), (4, 3, 0)])]
    steps = [*([] if without else ["before it says why"]), "before it wakes the others"]
    cases = [(*place, step, without) for place in places for step in steps]
    _check_cases(_dies_while_it_breaks, _check_who_breaks, cases, _the_victim)


# A rank is killed in a step of a message, of which the next rank is the other end.
#
# Who waits for a message that is not all there: within its timeout, an error that names the rank
# that should have sent it. Else it gets the message. A sender does not notice its reader's death.
# Messages between the others still come.


def _dies_in_a_message(here, dead, call, step, without):
    size = here.world_size
    peer = (dead + 1) % size
    others = [rank for rank in range(size) if rank != dead]
    its = _keys_of(without)
    large = "chunks" in step
    obj = LARGE if large else SMALL
    sent, got = keys.message(dead, peer, 0), keys.message(peer, dead, 0)
    given, read = keys.broadcast(dead, 0), keys.broadcast(peer, 0)
    brought, others_brought = keys.gathered(dead, 0), keys.gathered(peer, 0)
    waits = []

    def comes(request, key, value):
        writes = request == "set"
        peeks = request == "compare_set"
        return {
            ("send", "before"): writes and key == sent.own,
            ("send", "between its chunks"): writes and key == sent.chunk(1),
            ("recv", "between the chunks"): peeks and key == got.chunk(1),
            ("broadcast", "before"): writes and key == given.own,
            ("broadcast", "between its chunks"): writes and key == given.chunk(1),
            ("read", "between the chunks"): peeks and key == read.chunk(1),
            ("gather", "before"): request == "append" and key == its.roll,
            ("gather", "between its chunks"): writes and key == brought.chunk(1),
            ("gather", "arrived"): _confirms(its, dead, 0, request, key, value),
            ("gather", "between the others' chunks"): peeks and key == others_brought.chunk(1),
        }.get((call, step), False)

    def before(request, key=None, value=None, *_):
        if here.rank != dead:
            return
        if step == "waiting" and request == "wait":
            waits.append(key)
            if len(waits) == 2:
                here.tell("waits", os.getpid())
        if comes(request, key, value):
            _die()

    group = _group(here, before, without, elsewhere=dead == 0)
    here.meet("call")
    source = dead if call == "broadcast" else peer
    if step == "arrived" and here.rank != dead:
        until(lambda: _counted(group, its))
    if step == "waiting" and here.rank == peer:
        _kill(here.ask("waits"))
    if step == "waiting" and here.rank != dead and call == "read":
        here.ask("dead") if here.rank != peer else here.tell("dead")
    timeout = 30 if here.rank == dead else TIMEOUT
    calls = {
        ("send", dead): lambda: group.send_obj(obj, peer),
        ("send", peer): lambda: group.recv_obj(dead, timeout),
        ("recv", dead): lambda: group.recv_obj(peer, timeout),
        ("recv", peer): lambda: group.send_obj(obj, dead),
    }
    if call in ("broadcast", "read"):
        result = _outcome(lambda: group.broadcast_obj(obj, source, timeout))
    elif call == "gather":
        result = _outcome(lambda: group.all_gather_obj((here.rank, obj), timeout))
    else:
        result = _outcome(calls.get((call, here.rank), lambda: None))
    if here.rank == dead:
        _die()
    for rank in set(others) - {here.rank}:
        group.send_obj((here.rank, rank), rank)
    for rank in set(others) - {here.rank}:
        assert group.recv_obj(rank, 20) == (rank, here.rank)
    assert group.broadcast_obj("to all", others[-1], 20) == "to all"
    _meet(here, "done", others)
    return result


def _check_message(world_size, dead, call, step, without, results):
    obj = LARGE if "chunks" in step else SMALL
    peer = (dead + 1) % world_size
    others = [rank for rank in range(world_size) if rank != dead]
    for rank in others:
        result, seconds = results[rank]
        assert seconds < 2 * TIMEOUT + SLACK
        everything = [(r, obj) for r in range(world_size)]
        gets, misses = {
            ("send", "before"): ((), [peer]),
            ("send", "between its chunks"): ((), [peer]),
            ("send", "after"): ([peer], ()),
            ("broadcast", "before"): ((), others),
            ("broadcast", "between its chunks"): ((), others),
            ("broadcast", "after"): (others, ()),
            ("read", "waiting"): (others, ()),
            ("read", "between the chunks"): (others, ()),
            ("gather", "before"): ((), others),
            ("gather", "between its chunks"): ((), others),
            ("gather", "arrived"): ([r for r in others if r != 0], [0]),
            ("gather", "between the others' chunks"): (others, ()),
        }.get((call, step), ((), ()))
        if rank in misses:
            assert isinstance(result, MessageTimeoutError), f"{rank}: {result!r}"
            assert result.missing == (dead,) and f"rank {dead}" in str(result), f"{rank}: {result}"
        else:
            expected = everything if call == "gather" else obj
            assert result == (expected if rank in gets else None), f"{rank}: {result!r:.200}"


STEPS = {
    "send": ["before", "after"],
    "recv": ["waiting", "between the chunks"],
    "broadcast": ["before", "after"],
    "read": ["waiting", "between the chunks"],
    "gather": ["before", "between its chunks", "arrived", "between the others' chunks"],
}


@with_and_without
@pytest.mark.parametrize("call", list(STEPS))
def test_killed_in_a_message(call, without):
    cases = [(*victim, call, step, without) for victim in VICTIMS[without] for step in STEPS[call]]
    _check_cases(_dies_in_a_message, _check_message, cases, _the_victim)


# The same, killed between two chunks of a large message.


@with_and_without
@pytest.mark.parametrize("call", ["send", "broadcast"])
def test_killed_between_its_chunks(call, without):
    cases = [(*victim, call, "between its chunks", without) for victim in VICTIMS[without]]
    _check_cases(_dies_in_a_message, _check_message, cases, _the_victim)


# Nobody dies, but the source of a large broadcast is slow: both readers wait for the second chunk
# when it is written. They get the object.


def _writes_slowly(here):
    written = keys.broadcast(0, 0).chunk(1)

    def before(request, key=None, *_):
        if here.rank == 0 and request == "set" and key == written:
            here.ask("waits/1")
            here.ask("waits/2")
        if here.rank != 0 and request == "wait" and key == [written]:
            here.tell(f"waits/{here.rank}")
        if here.rank == 2 and request == "compare_set" and key == written:
            here.ask("waits/1")
            time.sleep(0.2)  # what rank 1 tells comes just before its request

    group = _group(here, before)
    here.meet("call")
    result = _outcome(lambda: group.broadcast_obj(LARGE, 0, timeout=20))
    here.meet("done")
    return result[0]


def test_a_slow_writer():
    assert run_ranks(_writes_slowly, 3) == [LARGE] * 3


# Rank 0 is killed, and the store with it, while the others are in a call, or before they make it.
# All of them: StoreConnectionError soon, which names the call and its rank. Only to leave the group
# nobody needs the store. Then they go on as a group of their own.


def _host_dies(here, call, when):
    others = list(range(1, here.world_size))
    seen = []

    def before(request, key=None, *_):
        waits = request in ("wait", "barrier")
        if call != "send_obj" and not waits:
            return
        if call == "send_obj" and key != keys.message(here.rank, 0, 0).chunk(1):
            return
        seen.append(request)
        if here.rank != 0 and len(seen) == (1 if call == "send_obj" else 2):
            # it has waited before, and goes on to
            here.tell(f"waits/{here.rank}")
            if call == "send_obj":
                until(lambda: _is_gone(process))

    group = _group(here, before)
    here.tell(f"process/{here.rank}", os.getpid())
    process = here.ask("process/0")
    here.meet("call")
    if here.rank == 0:
        for rank in others if when == "meanwhile" else []:
            here.ask(f"waits/{rank}")
        _die()
    if when == "before":
        until(lambda: _is_gone(process))
    peer = others[here.rank % len(others)]
    calls = {
        "barrier": lambda: group.barrier(30),
        "recv_obj": lambda: group.recv_obj(0 if here.rank == peer else peer, 30),
        "broadcast_obj": lambda: group.broadcast_obj(None, 0, 30),
        "all_gather_obj": lambda: group.all_gather_obj(SMALL, 30),
        "send_obj": lambda: group.send_obj(LARGE, 0),
        "expire_data": lambda: group.expire_data(),
        "close": lambda: group.close(30),
    }
    result = _outcome(calls[call])
    with here.group("survivors", members=others) as survivors:
        gathered = survivors.all_gather_obj(here.rank, 20)
    return *result, gathered


def _check_host(world_size, call, when, results):
    others = list(range(1, world_size))
    for rank in others:
        error, seconds, gathered = results[rank]
        assert seconds < 1 + SLACK and gathered == others
        if call == "close":
            assert error is None
            continue
        assert isinstance(error, StoreConnectionError), repr(error)
        assert str(error).startswith(f"{call}: rank {rank} lost the store that rank 0 hosts")


def test_the_host_is_killed():
    waits = ["barrier", "recv_obj", "broadcast_obj", "all_gather_obj"]
    cases = [(size, call, "meanwhile") for size in (2, 4) for call in [*waits, "send_obj"]]
    cases += [(size, call, "before") for size in (2, 3) for call in [*waits, "close", "send_obj"]]
    _check_cases(_host_dies, _check_host, cases, lambda *_: [0])


# The same while the others wait in create for one that does not come; it kills rank 0. They look
# for another store until their time is up.


def _host_dies_in_creation(here):
    with here.place("group") as (port, listener):
        here.tell(f"process/{here.rank}", os.getpid())
        if here.rank == here.world_size - 1:
            store = create_tcp_store(LOCAL, port)
            until_signed(store, range(here.world_size - 1))
            del store
            _kill(here.ask("process/0"))
            return None
        return _outcome(
            lambda: StatelessProcessGroup.create(
                LOCAL,
                port,
                here.rank,
                here.world_size,
                listen_socket=listener,
                store_timeout=30 if here.rank == 0 else 3,
            )
        )


@pytest.mark.parametrize("world_size", [3, 4])
def test_the_host_is_killed_in_creation(world_size):
    for error, seconds in run_ranks(_host_dies_in_creation, world_size, killed=[0])[1:-1]:
        assert isinstance(error, StoreConnectionError), repr(error)
        assert "no store answered on 127.0.0.1" in str(error)
        assert "is rank 0 running?" in str(error)
        assert seconds < 3 + SLACK


# A rank other than 0 is stopped until the others' timeout is over. The signals come from one more
# process, which is in no group.
#
# It has not arrived: the others raise one error that names it. When it goes on, it raises the same.
# It has arrived: the others return, except rank 0, which says who did not leave. When it goes on,
# it returns. Then the next barrier completes. How long it was stopped makes no difference, even if
# its own timeout is long over.


def _is_stopped(here, world_size, stopped, when, stop, without):
    others = [rank for rank in range(world_size) if rank != stopped]
    its = _keys_of(without)

    def before(request, key=None, *_):
        arrives = request == "append" and key == its.roll
        if when == "in its call" and here.rank == stopped and arrives and not here.told("process"):
            here.tell("process", os.getpid())
            here.ask("go on")

    if here.rank == world_size:
        process = here.ask("process")
        _stop(process)
        here.tell("stopped")
        for rank in others:
            here.ask(f"raised/{rank}")
        if stop == "long":
            time.sleep(2 * TIMEOUT + PATIENCE)  # its own timeout, and more
        here.tell("go on")
        os.kill(process, signal.SIGCONT)
        return None
    group = _group(here, before, without, world_size)
    if here.rank == stopped:
        if when == "before its call":
            here.tell("process", os.getpid())
            here.ask("go on")
        if when == "while it waits":
            here.tell("its process", os.getpid())
    else:
        if when == "while it waits" and here.rank == others[0]:
            until(lambda: _counted(group, its))
            here.tell("process", here.ask("its process"))
        here.ask("stopped")
    # a busy machine may take a while to stop it
    patient = here.rank == stopped and (when, stop) == ("while it waits", "short")
    first = _outcome(lambda: group.barrier(20 if patient else TIMEOUT))
    here.tell(f"raised/{here.rank}")
    here.ask("go on")
    second = _outcome(lambda: group.barrier(5))[0]
    third = _outcome(lambda: group.all_gather_obj(here.rank, 5))[0]
    _meet(here, "done", range(world_size))
    return *first, second, third


def _check_stopped(processes, world_size, stopped, when, stop, without, results):
    *results, _ = results
    if when == "while it waits":
        (error, *_), *firsts = results
        assert isinstance(error, BarrierError) and error.completed, repr(error)
        assert error.missing == (stopped,)
        assert [first[0] for first in firsts] == [None] * (world_size - 1)
    else:
        _check_missing([first for first, *_ in results], (stopped,), 0)
    for rank, (_, seconds, second, third) in enumerate(results):
        assert rank == stopped or seconds < 2 * TIMEOUT + SLACK
        assert second is None and third == list(range(world_size)), (second, third)


@with_and_without
@pytest.mark.parametrize("when", ["before its call", "in its call", "while it waits"])
def test_stopped_across_a_timeout(when, without):
    cases = [
        (size + 1, size, rank, when, stop, without)
        for size, rank in NOT_RANK_0[without]
        for stop in ("short", "long")
    ]
    _check_cases(_is_stopped, _check_stopped, cases)


# A rank is stopped for less than the timeout, before it calls or, rank 0 too, while the others
# wait: everyone returns.


def _is_stopped_shortly(here, world_size, stopped, without):
    others = [rank for rank in range(world_size) if rank != stopped]

    def before(*_):
        if armed:
            here.tell(f"calls/{here.rank}")

    armed = []
    if here.rank == world_size:
        process = here.ask("process")
        _stop(process)
        here.tell("stopped")
        for rank in others:
            here.ask(f"calls/{rank}")
        here.tell("go on")
        os.kill(process, signal.SIGCONT)
        return None
    group = _group(here, before, without, world_size)
    group.barrier()
    if here.rank == stopped:
        here.tell("process", os.getpid())
        here.ask("go on")
    else:
        here.ask("stopped")
        armed.append(True)
    group.barrier(20)
    armed.clear()
    result = group.all_gather_obj(here.rank)
    group.send_obj(here.rank, (here.rank + 1) % world_size)
    result.append(group.recv_obj((here.rank - 1) % world_size, 20))
    _meet(here, "done", range(world_size))
    return result


def _check_stopped_shortly(processes, world_size, stopped, without, results):
    everyone = list(range(world_size))
    assert results[:-1] == [[*everyone, (rank - 1) % world_size] for rank in everyone]


@with_and_without
def test_stopped_shortly(without):
    cases = [(size + 1, size, rank, without) for size, rank in VICTIMS[without]]
    _check_cases(_is_stopped_shortly, _check_stopped_shortly, cases)


# Rank 0 is stopped, and the store with it, before the others call, or while it waits in a barrier.
# Each of them: StoreConnectionError within its timeout and about two seconds. A small message is
# only left for the store to read, so sending it raises nothing. When rank 0 goes on, its own
# barrier raises BarrierError in time. Then all form a new group.


def _host_is_stopped(here, world_size, call, where):
    members = range(world_size)
    if here.rank == world_size:
        process = here.ask("process")
        _stop(process)
        here.tell("stopped")
        for rank in members[1:]:
            here.ask(f"raised/{rank}")
        here.tell("go on")
        continued = time.monotonic()
        os.kill(process, signal.SIGCONT)
        return here.ask("rank 0 is back") - continued
    group = here.group(members=members, store_timeout=10)
    if here.rank == 0:
        here.tell("its process", os.getpid())
        if where == "before":
            here.tell("process", os.getpid())
            here.ask("go on")
        result = _outcome(lambda: group.barrier(TIMEOUT))
        here.tell("rank 0 is back", time.monotonic())
    else:
        if where == "in a barrier" and here.rank == 1:
            until(lambda: group.store.check([group._barrier.keys.counter]))
            here.tell("process", here.ask("its process"))
        here.ask("stopped")
        others = members[1:]
        peer = others[here.rank % len(others)]
        calls = {
            "barrier": lambda: group.barrier(TIMEOUT),
            "recv_obj": lambda: group.recv_obj(0 if peer == here.rank else peer, TIMEOUT),
            "broadcast_obj": lambda: group.broadcast_obj(None, 0, TIMEOUT),
            "all_gather_obj": lambda: group.all_gather_obj(SMALL, TIMEOUT),
            "send_obj, small": lambda: group.send_obj(SMALL, 0),
            "send_obj": lambda: group.send_obj(bytes(1 << 26), 0),
        }
        if call == "send_obj":
            group.store.set_timeout(timedelta(seconds=TIMEOUT))
        result = _outcome(calls[call])
        here.tell(f"raised/{here.rank}")
    here.ask("rank 0 is back")
    with here.group("next", members=members) as group:
        return *result, group.all_gather_obj(here.rank, 20)


def _check_host_stopped(processes, world_size, call, where, results):
    (at_0, _, gathered), *others, seconds_of_0 = results
    everyone = list(range(world_size))
    # what the others had asked for before they gave up may still have taken place
    assert at_0 is None or isinstance(at_0, BarrierError), repr(at_0)
    assert gathered == everyone
    assert seconds_of_0 < 2 * TIMEOUT + SLACK
    for error, seconds, gathered in others:
        assert gathered == everyone and seconds < TIMEOUT + PATIENCE + SLACK
        if call == "send_obj, small":
            assert error is None
            continue
        assert isinstance(error, StoreConnectionError), repr(error)
        assert re.match(
            rf"{call}: the store did not answer, although the 1.5 s were over.*rank 0, is stopped",
            str(error),
        )


@pytest.mark.parametrize("where", ["before", "in a barrier"])
def test_the_host_is_stopped(where):
    some = ["barrier", "recv_obj", "broadcast_obj", "all_gather_obj", "send_obj"]
    cases = [
        (size + 1, size, call, where) for size in (2, 3) for call in [*some, "send_obj, small"]
    ]
    cases += [(5, 4, "barrier", where), (5, 4, "recv_obj", where)]
    _check_cases(_host_is_stopped, _check_host_stopped, cases)


# The same for a group on a prefix of a store, which has the connection of that.


def _host_is_stopped_below_a_prefix(here):
    if here.rank == 2:
        process = here.ask("process")
        _stop(process)
        here.tell("stopped")
        here.ask("raised")
        os.kill(process, signal.SIGCONT)
        return None
    group = here.group("first", members=[0, 1])
    if here.rank == 0:
        here.tell("process", os.getpid())
        here.ask("raised")
        return None
    prefixed = StatelessProcessGroup(1, 2, PrefixStore("prefix", group.store))
    here.ask("stopped")
    result = _outcome(lambda: prefixed.barrier(TIMEOUT))
    here.tell("raised")
    return result


def test_the_host_is_stopped_below_a_prefix():
    error, seconds = run_ranks(_host_is_stopped_below_a_prefix, 3)[1]
    assert isinstance(error, StoreConnectionError), repr(error)
    assert seconds < TIMEOUT + PATIENCE + SLACK


# The same while another rank waits in create for one that does not come; that one sends the
# signals. Within its time and about two seconds, the other rank raises. When rank 0 goes on, it
# raises GroupCreationError in time. Then all form a group.


def _host_is_stopped_in_creation(here):
    last = here.world_size - 1
    with here.place("group") as (port, listener):
        here.tell(f"process/{here.rank}", os.getpid())
        if here.rank == last:
            store = create_tcp_store(LOCAL, port)
            until_signed(store, range(last))
            process = here.ask("process/0")
            _stop(process)
            for rank in range(1, last):
                here.ask(f"raised/{rank}")
            os.kill(process, signal.SIGCONT)
            result = None, time.monotonic()
        else:
            start = time.monotonic()
            with pytest.raises((GroupCreationError, StoreConnectionError)) as caught:
                StatelessProcessGroup.create(
                    LOCAL, port, here.rank, last + 1, listen_socket=listener, store_timeout=2
                )
            result = caught.value, time.monotonic() - (start if here.rank else 0)
            here.tell(f"raised/{here.rank}")
    with here.group("next") as group:
        return *result, group.all_gather_obj(here.rank, 20)


@pytest.mark.parametrize("world_size", [3, 4])
def test_the_host_is_stopped_in_creation(world_size):
    (at_0, end, _), *others, (_, continued, _) = results = run_ranks(
        _host_is_stopped_in_creation, world_size, deadline=15
    )
    assert [result[2] for result in results] == [list(range(world_size))] * world_size
    assert isinstance(at_0, GroupCreationError) and world_size - 1 in at_0.missing, repr(at_0)
    assert end - continued < 2 + SLACK
    for error, seconds, _ in others:
        assert seconds < 2 + PATIENCE + SLACK
        assert isinstance(error, StoreConnectionError), repr(error)


# A process joins, is killed, and is started again: it is told at once that its rank is taken, and
# by whom. A message to the dead process stays. The others go on as a smaller group; and
# with the new process as a new one, where nothing of the old group is read. Closing the old group,
# rank 0 says who did not.


def _starts_again(here, world_size, dead):
    members = [rank for rank in range(world_size) if rank != dead]
    if here.rank == world_size:
        process = here.ask("process")
        _kill(process)
        with here.place("group", rank=dead) as (port, _):
            result = _outcome_of_any(
                lambda: StatelessProcessGroup.create(LOCAL, port, dead, world_size, store_timeout=5)
            )
        here.tell("refused", process)
        with here.group("with the new one", members=[*members, here.rank]) as group:
            assert group.all_gather_obj(here.rank, 20) == [*members, here.rank]
            with pytest.raises(MessageTimeoutError):
                group.recv_obj(0, 0.5)
            assert group.recv_obj(0, 20) == "new"
        return *result, process
    group = here.group(members=range(world_size))
    if here.rank == 0:
        group.send_obj("old", dead)
    group.barrier()
    if here.rank == dead:
        here.tell("process", os.getpid())
        here.ask("nothing more")
    here.ask("refused")
    error = _outcome(lambda: group.barrier(TIMEOUT))[0]
    if here.rank == 0:
        assert group.store.delete_key(keys.message(0, dead, 0).own)
    with here.group("smaller", members=members) as smaller:
        smaller.barrier(20)
        gathered = smaller.all_gather_obj(here.rank, 20)
    with here.group("with the new one", members=[*members, world_size]) as again:
        assert again.all_gather_obj(here.rank, 20) == [*members, world_size]
        if again.rank == 0:
            time.sleep(1)  # the new process waits in vain for the old message
            again.send_obj("new", world_size - 1)
    closed = _outcome(lambda: group.close(TIMEOUT))[0]
    return error, gathered, closed


def _outcome_of_any(call):
    start = time.monotonic()
    try:
        result = call()
    except Exception as error:
        result = error
    return result, time.monotonic() - start


def _check_started_again(processes, world_size, dead, results):
    refused, seconds, process = results.pop()
    assert isinstance(refused, ValueError), repr(refused)
    assert f"rank={dead}: is taken on 127.0.0.1" in str(refused)
    assert f"by process {process} of" in str(refused) and seconds < 5 + SLACK
    members = [rank for rank in range(world_size) if rank != dead]
    survivors = [results[rank] for rank in members]
    _check_missing([error for error, *_ in survivors], (dead,), 2)
    assert [gathered for _, gathered, _ in survivors] == [members] * len(members)
    assert isinstance(survivors[0][2], BarrierError) and survivors[0][2].missing == (dead,)
    assert [closed for *_, closed in survivors[1:]] == [None] * (len(members) - 1)


def test_a_rank_starts_again():
    cases = [(size + 1, size, rank) for size, rank in NOT_RANK_0[()]]
    _check_cases(_starts_again, _check_started_again, cases, lambda _, __, dead: [dead])


# Some ranks die. The others learn from one and the same error who is missing, so they agree without
# a word who the members of the next group are, and exchange messages there.


def _go_on(here, dead):
    with here.group() as group:
        if here.rank in dead:
            _die()
        with pytest.raises(BarrierError) as caught:
            group.barrier(3 * TIMEOUT)  # the others must not be late, too
        here.tell(f"read/{here.rank}")
        members = [rank for rank in range(here.world_size) if rank not in caught.value.missing]
        with here.group("next", members=members) as smaller:
            smaller.barrier(20)
            for rank in set(range(len(members))) - {smaller.rank}:
                smaller.send_obj((smaller.rank, rank), rank)
            for rank in set(range(len(members))) - {smaller.rank}:
                assert smaller.recv_obj(rank, 20) == (rank, smaller.rank)
            assert smaller.broadcast_obj("to all", 0, 20) == "to all"
            result = smaller.all_gather_obj(here.rank, 20)
        _outcome(lambda: group.close(TIMEOUT))
        return caught.value, result


def _check_go_on(world_size, dead, results):
    members = [rank for rank in range(world_size) if rank not in dead]
    _check_missing([results[rank][0] for rank in members], dead, 1)
    assert [results[rank][1] for rank in members] == [members] * len(members)


def test_the_others_go_on():
    some = [(2, (1,)), (3, (1,)), (3, (2,)), (3, (1, 2)), (4, (2,)), (4, (1, 3)), (4, (1, 2, 3))]
    _check_cases(_go_on, _check_go_on, some, lambda _, dead: dead)


# A group is closed while the error of its last barrier is kept, as a notebook keeps it. The store
# ends all the same, so the next group forms at the same port.


def _form_where_an_error_is_kept(here):
    kept = []
    for _ in range(2):
        own = None
        if here.rank == 0:
            own = listen(LOCAL, here.ask("port") if kept else 0)
            here.tell("port", own.getsockname()[1])
        with own or nullcontext():
            group = StatelessProcessGroup.create(
                LOCAL, here.ask("port"), here.rank, 2, store_timeout=20, listen_socket=own
            )
        if here.rank == 0:
            with pytest.raises(BarrierError, match="missing") as raised:
                group.barrier(timeout=0.1)
            kept.append(raised)
        else:
            kept.append(None)
        here.meet(f"kept {len(kept)}")
        group.close(timeout=20)
    return True


def test_a_kept_error_keeps_no_port():
    assert run_ranks(_form_where_an_error_is_kept, 2) == [True, True]
