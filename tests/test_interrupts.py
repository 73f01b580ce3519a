"""Interrupts: SIGINT at a chosen moment of a call, and two threads that want to call at once.

SIGINT is real, and comes from another process. The rank that it is for says when, and goes on once
it is there. The waits, of which a call makes one a second, are where the call ends.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
from ranks import LOCAL, Watched, interrupt, run_ranks, second_group, until_signed
from torch.distributed import HashStore

from refdist import (
    BarrierError,
    ConcurrentCallError,
    GroupCreationError,
    MessageError,
    MessageTimeoutError,
    StatelessProcessGroup,
    create_tcp_store,
    torch_versions,
)
from refdist.barrier import quick
from refdist.objects import encoding
from refdist.store import keys

SLACK = 6.0  # seconds that a slow machine may take beyond a protocol's own deadline
LARGE = encoding.CHUNK_BYTES + 1  # two chunks
WAITS = ("wait", "barrier")  # requests that wait

# With what torch offers, and without, as on an old one.
BOTH_KINDS = pytest.mark.parametrize(
    "native",
    [
        pytest.param(
            True,
            id="native",
            marks=pytest.mark.skipif(
                not torch_versions.store_features()[torch_versions.STORE_BARRIER],
                reason="this torch has no Store.barrier",
            ),
        ),
        pytest.param(False, id="plain"),
    ],
)


@contextmanager
def features(native):
    """All groups made in this context use what the store of torch offers, or nothing of it."""
    with nullcontext() if native else torch_versions.switched_off(torch_versions.STORE_BARRIER):
        yield


def at_the_moment(here, rank, matches):
    """A hook: once, before the first request that ``matches``, ``rank`` lets itself be interrupted.

    It goes on once SIGINT has come, which another rank sends with ``send_sigint``.
    """

    def before(request, key=None, amount=None, *_):
        key = key[0] if isinstance(key, list) else key
        if here.rank == rank and not here.told("moment") and matches(request, key, amount):
            here.tell("moment", os.getpid())
            here.ask("interrupted")

    return before


def send_sigint(here):
    """Interrupt the rank that waits for it ``at_the_moment``."""
    here.tell("interrupted", interrupt(here.ask("moment")))


@contextmanager
def telling(here, name):
    """Tell the others that the block is over."""
    try:
        yield
    finally:
        here.tell(name)


def keys_of(native, number):
    """The keys of a barrier, of which no earlier one has broken."""
    return keys.Slot.of(0, number % quick.SLOTS) if native else keys.PlainKeys.of(number)


def leaves(native, number):
    """What tells whether a request is the first with which a rank leaves: it signs off."""
    roll = keys_of(native, number).roll
    signed = []

    def matches(request, key, amount):
        if (request, key) != ("append", roll):
            return False
        signed.append(key)
        return len(signed) == 2

    return matches


def count_keys(here, group):
    """How many keys the store of a group holds, without ``all_left`` of the last barrier.

    The last rank to leave writes that, unless it is rank 0.
    """
    last = keys.PlainKeys.of(group._barrier.tries - 1)
    return here.count_keys(group) - group.store.check([last.all_left])


# SIGINT to a rank that waits: KeyboardInterrupt within about a second, and the group still works,
# as if the call had not been made. Rank 0 waits; rank 1 interrupts it when it has begun to.


def _interrupt_rank_0(here, native, name):
    with features(native), here.group() as group:
        before = at_the_moment(here, 0, lambda request, *_: request in WAITS)
        again = second_group(here, group, native, before)
        if here.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                CALLS[name](again)
            seconds = time.monotonic() - here.ask("interrupted")
        else:
            send_sigint(here)
            seconds = 0.0
        here.meet("interrupted")
        assert again.generation == 0
        result = THEN[name](again)
        again.barrier()
        return result, seconds


CALLS = {
    "barrier": lambda group: group.barrier(timeout=60),
    "recv_obj": lambda group: group.recv_obj(1, timeout=60),
    "broadcast_obj": lambda group: group.broadcast_obj(None, 1, timeout=60),
    "all_gather_obj": lambda group: group.all_gather_obj(0, timeout=60),
}


def _message(group):
    return group.recv_obj(1) if group.rank == 0 else group.send_obj("sent later", 0)


THEN = {
    "barrier": lambda group: group.barrier(),
    "recv_obj": _message,
    "broadcast_obj": lambda group: group.broadcast_obj("sent later", 1),
    "all_gather_obj": lambda group: group.all_gather_obj(("next", group.rank)),
}
RESULTS = {
    "barrier": None,
    "recv_obj": "sent later",
    "broadcast_obj": "sent later",
    "all_gather_obj": [("next", 0), ("next", 1)],
}


@BOTH_KINDS
@pytest.mark.parametrize("name", list(CALLS))
def test_sigint_ends_a_wait(name, native):
    (result, seconds), _ = run_ranks(_interrupt_rank_0, 2, native, name)
    assert result == RESULTS[name]
    assert seconds < 1 + SLACK


# Rank 2 does not come, but interrupts rank 1, which waits for it. Rank 0: GroupCreationError at
# once, naming rank 1's interrupt. Then all form the group on the same port.


def _interrupt_creation(here, native):
    with features(native), here.place("group") as (port, listener):
        here.tell(f"process/{here.rank}", os.getpid())
        options = {"store_timeout": 60, "listen_socket": listener}
        start = time.monotonic()
        seconds = None
        if here.rank == 0:
            with pytest.raises(GroupCreationError, match=r"by rank 1 .* of KeyboardInterrupt"):
                StatelessProcessGroup.create(LOCAL, port, 0, 3, **options)
            assert time.monotonic() - start < 1 + 2 * SLACK
        elif here.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                StatelessProcessGroup.create(LOCAL, port, 1, 3, **options)
            seconds = time.monotonic() - here.ask("interrupted")
        else:
            store = create_tcp_store(LOCAL, port)
            until_signed(store, (0, 1))
            here.tell("interrupted", interrupt(here.ask("process/1")))
            del store
        here.meet("second attempt")
        with StatelessProcessGroup.create(LOCAL, port, here.rank, 3, **options) as group:
            return group.all_gather_obj(here.rank), seconds


@BOTH_KINDS
def test_sigint_ends_a_creation(native):
    results = run_ranks(_interrupt_creation, 3, native)
    assert [gathered for gathered, _ in results] == [[0, 1, 2]] * 3
    assert results[1][1] < 1 + SLACK


# A rank is interrupted in its arrival: KeyboardInterrupt, and the others go on waiting, also
# rank 2, which comes later; when it comes again, the barrier completes. Rank 1 is interrupted as it
# leaves, or rank 0 while it waits for that: KeyboardInterrupt as well, but the barrier completes,
# and the rank is told that it was there. The barriers after that complete on all, and the store
# holds as many keys as before.


def _interrupt_barrier(here, native, victim, phase):
    with features(native), here.group() as group:
        its = keys_of(native, 6)
        left = its.left if native else its.all_left
        leaving = leaves(native, 6)
        moments = {
            "roll": lambda request, *_: request == "append",
            "arrival": lambda request, key, _: request in WAITS,
            "confirmation": leaving,
            "departure": lambda request, key, _: request in WAITS and key == left,
        }
        hook = at_the_moment(here, victim, moments[phase])

        def before(request, key=None, amount=None, *_):
            if on:
                if here.rank == 1 and request in WAITS:
                    here.tell("rank 1 waits")
                hook(request, key, amount)
                if phase == "departure" and here.rank == 1 and leaving(request, key, amount):
                    # rank 0 waits for this rank, and is interrupted in that
                    send_sigint(here)
                    here.ask("raised/0")

        # the first slot is used again from the fourth barrier on
        on = False
        again = second_group(here, group, native, before)
        for _ in range(6):
            again.barrier()
        keys_before = count_keys(here, again)
        on = True
        outcome = None
        if here.rank == 2 and phase in ("roll", "arrival"):
            send_sigint(here)
            here.ask(f"raised/{victim}")
        elif here.rank == 2:
            # the last to arrive must not be held up, or nobody confirms
            here.ask("rank 1 waits")
        before_it = again.generation
        try:
            again.barrier(timeout=60)
        except KeyboardInterrupt:
            outcome = "had been there" if again.generation > before_it else "had not"
            here.tell(f"raised/{here.rank}")
            if again.generation == before_it:
                again.barrier(timeout=60)
        if here.rank == 2 and phase == "confirmation":
            send_sigint(here)
        here.meet("after")
        on = False
        for _ in range(6):
            again.barrier()
        return outcome, count_keys(here, again) - keys_before


@BOTH_KINDS
@pytest.mark.parametrize(
    ("victim", "phase"),
    [(0, "roll"), (1, "roll"), (0, "arrival"), (1, "arrival"), (1, "confirmation")],
)
def test_an_interrupt_in_a_barrier_puts_nothing_out_of_step(victim, phase, native):
    results = run_ranks(_interrupt_barrier, 3, native, victim, phase)
    told = "had been there" if phase == "confirmation" else "had not"
    assert [outcome for outcome, _ in results] == [
        told if rank == victim else None for rank in range(3)
    ]
    assert [more for _, more in results] == [0, 0, 0]


@BOTH_KINDS
def test_an_interrupt_of_rank_0_in_departure_leaves_nothing_behind(native):
    results = run_ranks(_interrupt_barrier, 3, native, 0, "departure")
    assert results == [("had been there", 0), (None, 0), (None, 0)]


# Rank 0 gets a second SIGINT, in the same wait, or while it leaves the barrier because of the
# first. It raises one KeyboardInterrupt, and the next barriers complete.


def _interrupt_twice(here, native, when):
    with features(native), here.group() as group:
        stops = []

        def before(request, key=None, *_):
            second = request == "compare_set" if when == "breaking" else request in WAITS
            if here.rank == 0 and (second if stops else request in WAITS) and len(stops) < 2:
                stops.append(request)
                here.tell(f"process/{len(stops)}", os.getpid())
                here.ask(f"interrupted/{len(stops)}")
                if when == "at once":
                    stops.append(request)

        again = second_group(here, group, native, before)
        if here.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                again.barrier(timeout=60)
            here.tell("raised")
        else:
            for number in (1,) if when == "at once" else (1, 2):
                process = here.ask(f"process/{number}")
                interrupt(process)
                if when == "at once":
                    interrupt(process)
                here.tell(f"interrupted/{number}")
            here.ask("raised")
        for _ in range(4):
            again.barrier()
        return len(stops)


@BOTH_KINDS
@pytest.mark.parametrize("when", ["at once", "breaking"])
def test_two_interrupts_do_no_harm(when, native):
    assert run_ranks(_interrupt_twice, 2, native, when) == [2, 0]


# A process that handles SIGINT itself, without raising: the wait goes on, and the barrier
# completes when rank 1 comes. It comes once rank 0 has handled it and waits again.


def _handle_sigint(here, native):
    handled = []
    with features(native), here.group() as group:

        def before(request, *_):
            if here.rank == 0 and request in WAITS:
                here.tell("waits", os.getpid())
                if handled:
                    here.tell("handled, and waits")

        again = second_group(here, group, native, before)
        if here.rank == 0:
            signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
        else:
            interrupt(here.ask("waits"))
            here.ask("handled, and waits")
        again.barrier()
        again.barrier()
    return handled


@BOTH_KINDS
def test_a_handler_that_does_not_raise_ends_no_wait(native):
    assert run_ranks(_handle_sigint, 2, native) == [[signal.SIGINT], []]


# One that raises something else: the wait ends with that. Rank 1 leaves the group because of it,
# and rank 0, which waits for it, learns that at once.


class StopError(Exception):
    """What a process may raise on SIGINT."""


def _raise_on_sigint(number, frame):
    raise StopError(f"signal {number}")


def _raise_something_else(here, native):
    with features(native), here.group() as group:
        before = at_the_moment(here, 1, lambda request, *_: request in WAITS)
        again = second_group(here, group, native, before)
        if here.rank == 1:
            signal.signal(signal.SIGINT, _raise_on_sigint)
            with pytest.raises(StopError, match="signal 2"), again, telling(here, "raised"):
                again.barrier(timeout=60)
            assert signal.getsignal(signal.SIGINT) is _raise_on_sigint
        else:
            send_sigint(here)
            here.ask("raised")
            text = r"by rank 1 at .* because it left the group because of StopError; missing: rank"
            with pytest.raises(BarrierError, match=text):
                again.barrier(timeout=60)
        group.barrier()


@BOTH_KINDS
def test_a_handler_that_raises_something_else_ends_a_wait_with_that(native):
    run_ranks(_raise_something_else, 2, native)


# SIGINT is ignored in rank 0: it stays so, and the wait goes on until rank 1 comes.


def _ignore_sigint(here):
    with here.group() as group:
        before = at_the_moment(here, 0, lambda request, *_: request in WAITS)
        again = here.watched_group(group, before)
        if here.rank == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            send_sigint(here)
        again.barrier()
        return signal.getsignal(signal.SIGINT)


def test_sigint_may_be_ignored():
    assert run_ranks(_ignore_sigint, 2)[0] == signal.SIG_IGN


# Whatever handles SIGINT before a call handles it afterwards, however the call ended.


@pytest.mark.parametrize(
    "handler", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, _raise_on_sigint]
)
def test_the_handler_of_sigint_is_restored(handler):
    calls = [
        (lambda group: group.send_obj("obj", 1), None),
        (lambda group: group.barrier(timeout=0.1), BarrierError),
        (lambda group: group.recv_obj(1, timeout=0.1), MessageError),
        (lambda group: group.all_gather_obj(1, timeout=0.1), MessageError),
        (lambda group: group.barrier(timeout=-1), ValueError),
    ]
    before = signal.signal(signal.SIGINT, handler)
    try:
        group = StatelessProcessGroup(0, 2, HashStore())
        for call, error in calls:
            with nullcontext() if error is None else pytest.raises(error):
                call(group)
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


# SIGINT at any point of a call, by turns at each: Python handles a signal as it begins a function
# of refdist, or as a function of C returns to one. The call raises KeyboardInterrupt, and the next
# call works as if nothing had been. Alone in its group, a process can interrupt itself.


def _call_and_interrupt(group, index):
    """Interrupt a barrier at point number ``index``.

    Returns whether it raised KeyboardInterrupt, and where the point is; None where there are not as
    many.
    """
    count = 0
    where = None

    def profile(frame, event, function):
        nonlocal count, where
        if event in ("call", "c_return") and "refdist/" in frame.f_code.co_filename:
            count += 1
            if count == index:
                after = f"after {function.__name__}" if event == "c_return" else "at its beginning"
                where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}, {after}"
                os.kill(os.getpid(), signal.SIGINT)

    raised = False
    try:
        sys.setprofile(profile)
        group.barrier(timeout=20)
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.setprofile(None)
    return raised, where


def _interrupt_everywhere(here):
    unheard, harmed = Counter(), Counter()
    index, where = 0, ""
    while where is not None:
        index += 1
        group = StatelessProcessGroup(0, 1, HashStore())
        group.barrier()
        raised, where = _call_and_interrupt(group, index)
        if where is not None and not raised:
            unheard[where] += 1
        try:
            group.barrier(timeout=1)
        except ConcurrentCallError:
            harmed[where] += 1
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            harmed[where] += 1
    return index, unheard, harmed


def test_sigint_at_any_point_leaves_the_group_usable():
    ((points, unheard, harmed),) = run_ranks(_interrupt_everywhere, 1)
    assert points > 50
    assert harmed == {}
    assert unheard == {}


# Two threads use one group. The second gets a ConcurrentCallError that says what runs, whatever
# it calls. The first is not disturbed: what it waits for comes. Afterwards the second may call.


def _two_threads(here, native):
    with features(native), here.group() as group:
        waiting = threading.Event()

        def before(request, *_):
            if request in WAITS:
                waiting.set()

        again = second_group(here, group, native, before)
        if here.rank == 1:
            here.ask("refused")
            again.send_obj("comes", 0)
            again.barrier()
            return None
        received = []
        thread = threading.Thread(target=lambda: received.append(again.recv_obj(1)), daemon=True)
        thread.start()
        assert waiting.wait(20)
        calls = {
            "barrier": lambda: again.barrier(timeout=1),
            "recv_obj": lambda: again.recv_obj(1, timeout=1),
            "send_obj": lambda: again.send_obj("obj", 1),
            "all_gather_obj": lambda: again.all_gather_obj("obj", timeout=1),
            "close": lambda: again.close(timeout=1),
        }
        for name, call in calls.items():
            text = f"^{name}: recv_obj is running in thread {thread.ident}; .* create a group for"
            with pytest.raises(ConcurrentCallError, match=text):
                call()
        here.tell("refused")
        thread.join(20)
        again.barrier()
        return received


@BOTH_KINDS
def test_two_threads_cannot_call_at_once(native):
    assert run_ranks(_two_threads, 2, native)[0] == ["comes"]


# The sender is interrupted before the message itself, before the first chunk or before the second.
# It raises KeyboardInterrupt, between two chunks; the receiver learns of it at once, or has the
# message if it was complete, and gets the next one.


def _interrupt_send(here, native, number):
    with features(native), here.group() as group:
        writes = []

        def matches(request, key, _):
            if request == "set":
                writes.append(key)
            return len(writes) == number

        again = second_group(here, group, native, at_the_moment(here, 0, matches))
        if here.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                again.send_obj(bytes(LARGE), 1)
            again.send_obj("next", 1)
            here.ask("received")  # rank 0 hosts the store
            return None
        send_sigint(here)
        try:
            received = len(again.recv_obj(0, timeout=60))
        except MessageError as error:
            received = str(error)
        received = received, again.recv_obj(0)
        here.tell("received")
        return received


@BOTH_KINDS
@pytest.mark.parametrize(
    ("number", "stopped_at"), [(1, "message/0/1/0/chunk/0"), (2, "message/0/1/0/chunk/1"), (3, "")]
)
def test_an_interrupted_send(number, stopped_at, native):
    _, (received, following) = run_ranks(_interrupt_send, 2, native, number)
    text = f"{stopped_at}: its writer stopped, because of KeyboardInterrupt"
    assert received == (text if stopped_at else LARGE)
    assert following == "next"


# A reader is interrupted before one of its requests. The next call reads the same message.


def _interrupt_receive(here, request_name, method):
    with here.group() as group:
        before = at_the_moment(here, 1, lambda request, *_: request == request_name)
        again = second_group(here, group, True, before)
        obj = bytes(LARGE)
        if here.rank == 0:
            again.send_obj(obj, 1) if method == "recv_obj" else again.broadcast_obj(obj, 0)
            send_sigint(here)
            again.barrier()
            return None

        def receive():
            return again.recv_obj(0) if method == "recv_obj" else again.broadcast_obj(None, 0)

        with pytest.raises(KeyboardInterrupt):
            receive()
        received = len(receive())
        again.barrier()
        return received


@pytest.mark.parametrize("request_name", ["wait", "compare_set", "delete_key"])
@pytest.mark.parametrize("method", ["recv_obj", "broadcast_obj"])
def test_an_interrupted_receive(request_name, method):
    assert run_ranks(_interrupt_receive, 2, request_name, method)[1] == LARGE


# Rank 1 is started with a wrong world size and refused. Rank 0 still waits, and lets the right one
# in, which is the same process here.


def _start_again(here):
    with here.place("group") as (port, listener):
        if here.rank == 1:
            with pytest.raises(ValueError, match="world_size=3: rank 0 formed the group"):
                StatelessProcessGroup.create(LOCAL, port, 1, 3)
        with StatelessProcessGroup.create(
            LOCAL, port, here.rank, 2, store_timeout=20, listen_socket=listener
        ) as group:
            return group.all_gather_obj(here.rank)


def test_a_refused_rank_takes_nobodys_place():
    assert run_ranks(_start_again, 2) == [[0, 1]] * 2


# Inside a with block, rank 2 does not come to a barrier. Rank 0 raises and leaves the block, which
# closes its store; rank 1 has still read why.


def _break_inside_with(here, native):
    try:
        with features(native), here.group() as group:
            here.meet("formed")
            if here.rank == 2:
                here.ask("over/0")
            else:
                group.barrier(timeout=1)
    except BarrierError as error:
        return error.missing
    finally:
        here.tell(f"over/{here.rank}")
    return None


@BOTH_KINDS
def test_everyone_learns_why_a_barrier_broke_before_rank_0_closes(native):
    assert run_ranks(_break_inside_with, 3, native) == [(2,), (2,), None]


# SIGINT to one rank in a gather of large objects: as it reads the chunks, or as rank 0 resets or
# deletes keys before it leaves. It alone raises. The others have the objects, the next calls match,
# and no chunk stays.


def _interrupt_large_gather(here, native, victim, moment):
    sent = []

    def before(request, key=None, *_):
        key = str(key[0] if isinstance(key, list) else key)
        if moment == "reading":
            now = request == "compare_set" and "/chunk/" in key
        else:
            now = request == ("multi_set" if native else "delete_key")
        if now and here.rank == victim and not sent:
            sent.append(key)
            signal.raise_signal(signal.SIGINT)

    with features(native), here.group() as group:
        again = second_group(here, group, native, before)
        again.barrier()
        try:
            outcome = [len(obj) for obj in again.all_gather_obj(bytes(LARGE), timeout=20)]
        except KeyboardInterrupt:
            outcome = "SIGINT"
        gathered = again.all_gather_obj(here.rank, timeout=20)
        chunks = [keys.gathered(r, 1).chunk(0) for r in range(here.world_size)]
        left = [key for key in chunks if again.store.check([key])] if here.rank == 0 else []
        again.barrier(timeout=20)
        return outcome, gathered, left


@BOTH_KINDS
@pytest.mark.parametrize(
    ("victim", "moment"), [(0, "reading"), (1, "reading"), (0, "leaving")], ids=str
)
def test_interrupts_one_rank_in_a_large_gather(victim, moment, native):
    outcomes = [[LARGE] * 3] * 3
    outcomes[victim] = "SIGINT"
    results = run_ranks(_interrupt_large_gather, 3, native, victim, moment)
    assert results == [(outcome, [0, 1, 2], []) for outcome in outcomes]


# Rank 2 is slow to leave a gather of large objects, and rank 0 gives up waiting for it to leave.
# The others have the objects, and what they gather next is of the same round on all.


def _slow_to_leave(here, native):
    leaving = leaves(native, 0)

    def before(request, key=None, amount=None, *_):
        if here.rank == 2 and leaving(request, key, amount):
            here.ask("rank 0 gave up")

    with features(native), here.group() as group:
        again = second_group(here, group, native, before)
        here.meet("formed")  # which may take long where names are resolved slowly
        try:
            outcome = len(again.all_gather_obj(bytes(LARGE), timeout=1))
        except MessageTimeoutError as error:
            outcome = error.missing, "to leave" in str(error)
            here.tell("rank 0 gave up")
        rounds = [again.all_gather_obj((number, here.rank), timeout=20) for number in range(2)]
        again.barrier(timeout=20)
        return outcome, rounds


@BOTH_KINDS
def test_one_rank_is_slow_in_a_large_gather(native):
    rounds = [[(number, rank) for rank in range(3)] for number in range(2)]
    results = run_ranks(_slow_to_leave, 3, native)
    assert results == [(((2,), True), rounds), (3, rounds), (3, rounds)]


# SIGINT in expire_data: what is left expires the next time.


def test_interrupts_expire_data():
    deleted = []

    def before(request, key=None, *_):
        if request == "delete_key":
            deleted.append(key)
            if len(deleted) == 3:
                signal.raise_signal(signal.SIGINT)

    group = StatelessProcessGroup(0, 2, Watched(HashStore(), before))
    for number in range(10):
        group.send_obj(number, 1)
    aged = [(key, written - 3601) for key, written in group.entries]
    group.entries.clear()
    group.entries.extend(aged)
    # a shell lets what it runs in the background ignore SIGINT
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            group.expire_data()
    finally:
        signal.signal(signal.SIGINT, found)
    assert len(deleted) == 3 and len(group.entries) == 7
    group.expire_data()
    assert len(deleted) == 10 and not group.entries


# A handler of SIGINT may set another one, as those do that end the process at the second signal.


def test_a_handler_that_sets_another():
    def first(number, frame):
        signal.signal(signal.SIGINT, second)

    def second(number, frame):
        raise KeyboardInterrupt

    def before(request, *_):
        if request == "append" and due:
            due.clear()
            signal.raise_signal(signal.SIGINT)

    due = [True]  # once in each barrier
    found = signal.signal(signal.SIGINT, first)
    try:
        group = StatelessProcessGroup(0, 1, Watched(HashStore(), before))
        group.barrier(timeout=5)
        assert signal.getsignal(signal.SIGINT) is second
        due.append(True)
        with pytest.raises(KeyboardInterrupt):
            group.barrier(timeout=5)
        assert signal.getsignal(signal.SIGINT) is second
    finally:
        signal.signal(signal.SIGINT, found)


# SIGINT belongs to a function of C, which Python does not know: it goes on doing so.

HANDLER_OF_C = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
handler = ctypes.cast(libc.abs, ctypes.c_void_p)
libc.signal(2, handler)
# as it begins, this module looks at what handles each signal
del sys.modules["_signal"]
import _signal
import signal
import subprocess
assert signal.getsignal(signal.SIGINT) is None
from torch.distributed import HashStore
from refdist import StatelessProcessGroup
StatelessProcessGroup(0, 1, HashStore()).barrier(timeout=5)
assert libc.signal(2, handler) == handler.value
"""


def test_a_handler_that_is_not_from_python_stays():
    subprocess.run([sys.executable, "-c", HANDLER_OF_C], check=True, timeout=60)
