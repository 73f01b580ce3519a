"""Signals at any moment of any call.

Python handles a signal as it begins a function, or as a function of C returns to one of Python.
Those moments are counted here in a call, and the call is repeated, with a signal at each of them.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from ranks import run_ranks, run_threads, until
from torch.distributed import HashStore

from refdist import BarrierError, MessageError, StatelessProcessGroup, StoreConnectionError

ROUNDS = 3  # calls of each kind, of which the second is struck


class Struck(BaseException):
    """What a handler raises that nobody knows."""


@contextmanager
def a_signal(moment, number):
    """Send a signal to this process at a moment of the block that is in refdist's code.

    Yields a list, to which the place of the moment is appended.
    """
    count = 0
    places = []

    def profile(frame, event, function):
        nonlocal count
        if event in ("call", "c_return") and "refdist/" in frame.f_code.co_filename:
            count += 1
            if count == moment:
                places.append(f"{frame.f_code.co_qualname}, line {frame.f_lineno}, {event}")
                os.kill(os.getpid(), number)

    sys.setprofile(profile)
    try:
        yield places
    finally:
        sys.setprofile(None)


def two_groups():
    store = HashStore()
    return [StatelessProcessGroup(rank, 2, store) for rank in range(2)]


# Each kind of call: what is done before; the call itself, in round n; whether it has taken place,
# where the caller was struck; and what the other side sees. Objects that the caller gets are kept.


class Sending:
    def __init__(self, method):
        self.groups = two_groups()
        self.method = method

    def call(self, number):
        group = self.groups[0]
        if self.method == "send":
            group.send(torch.tensor([number]), 1)
        elif self.method == "send_obj":
            group.send_obj(number, 1)
        else:
            group.broadcast_obj(number, 0)

    def count(self):
        group = self.groups[0]
        return group.send_dst_counter[1] + group.broadcast_send_counter

    def check(self, kept):
        for number in range(ROUNDS):
            receiver = self.groups[1]
            if self.method == "broadcast_obj":
                assert receiver.broadcast_obj(None, 0, timeout=1) == number
            else:
                assert receiver.recv_obj(0, timeout=1) == number


class Receiving:
    def __init__(self, method):
        self.groups = two_groups()
        self.method = method
        sender = self.groups[0]
        for number in range(ROUNDS):
            tensor = torch.tensor([number])
            {
                "recv_obj": lambda: sender.send_obj(number, 1),  # noqa: B023
                "recv": lambda: sender.send(tensor, 1),  # noqa: B023
                "broadcast_obj": lambda: sender.broadcast_obj(number, 0),  # noqa: B023
                "broadcast": lambda: sender.broadcast(tensor, 0),  # noqa: B023
            }[method]()

    def call(self, number):
        group, tensor = self.groups[1], torch.tensor([-1])
        if self.method == "recv_obj":
            return group.recv_obj(0, timeout=1)
        if self.method == "broadcast_obj":
            return group.broadcast_obj(None, 0, timeout=1)
        if self.method == "recv":
            return int(group.recv(tensor, 0))
        return int(group.broadcast(tensor, 0))

    def count(self):
        return None  # what it has not got comes again

    def check(self, kept):
        assert kept == list(range(ROUNDS))


class Together:
    """A collective call, with another rank in a thread."""

    seconds = 5.0

    def __init__(self, method):
        self.groups = two_groups()
        self.groups[0].store.set_timeout(timedelta(seconds=self.seconds))
        self.method = method
        self.other = []
        self.thread = threading.Thread(target=self.go_along, daemon=True)
        self.thread.start()

    def go_along(self):
        try:
            for number in range(ROUNDS):
                self.other.append(self.of(self.groups[1], number, self.seconds))
        except (BarrierError, MessageError) as error:
            self.other.append(error)

    def of(self, group, number, timeout):
        if self.method == "barrier":
            return group.barrier(timeout)
        if self.method == "realign":
            return group.realign(timeout)
        if self.method == "all_gather_obj":
            return group.all_gather_obj((number, group.rank), timeout)
        return int(group.all_reduce(torch.tensor([number])))

    def call(self, number):
        return self.of(self.groups[0], number, self.seconds)

    def count(self):
        return self.groups[0].generation

    def check(self, kept):
        self.thread.join(20)
        for number, (own, others) in enumerate(zip(kept, self.other, strict=True)):
            expected = {"all_gather_obj": [(number, 0), (number, 1)], "all_reduce": 2 * number}
            assert others == expected.get(self.method)
            assert own in (others, "struck after it took place")


KINDS = {
    **{f"{name} as sender": lambda n=name: Sending(n) for name in ["send_obj", "send"]},
    "broadcast_obj as sender": lambda: Sending("broadcast_obj"),
    **{
        name: lambda n=name: Receiving(n)
        for name in ["recv_obj", "recv", "broadcast_obj", "broadcast"]
    },
    **{
        name: lambda n=name: Together(n)
        for name in ["barrier", "realign", "all_gather_obj", "all_reduce"]
    },
}


def _strike(kind, moment, number):
    """One attempt. Returns the place that was struck, and what is wrong, if anything is."""
    scene = KINDS[kind]()
    kept = []
    place = None
    for turn in range(ROUNDS):
        before = scene.count()
        try:
            if turn == 1:
                with a_signal(moment, number) as places:
                    kept.append(scene.call(turn))
            else:
                kept.append(scene.call(turn))
        except (KeyboardInterrupt, Struck):
            # the caller repeats what has not taken place
            if before is None or scene.count() == before:
                try:
                    kept.append(scene.call(turn))
                except StoreConnectionError as error:
                    return places, _check_lost(scene, error)
            else:
                kept.append("struck after it took place")
        except StoreConnectionError as error:
            return places, _check_lost(scene, error)
        if turn == 1:
            place = places
    try:
        scene.check(kept)
    except (AssertionError, MessageError, ValueError) as error:
        return place, repr(error)
    return place, None


def _check_lost(scene, error):
    """A group that was lost says so, from then on."""
    text = "this rank has lost its group, because an exception from outside ended"
    if text not in str(error):
        return repr(error)
    for _ in range(2):
        try:
            scene.call(2)
            return "the call after the one that was lost went through"
        except StoreConnectionError as again:
            if text not in str(again):
                return repr(again)
    # the other rank ends too, without it
    if isinstance(scene, Together):
        scene.thread.join(20)
        if scene.thread.is_alive():
            return "the other rank hangs"
        rounds = [one for one in scene.other if isinstance(one, list)]
        if any({number for number, _ in one} != {turn} for turn, one in enumerate(rounds)):
            return f"objects of different calls: {rounds}"
    return None


def _strike_everywhere(here, kind, number, every):
    def raise_it(*_):
        raise Struck

    signal.signal(signal.SIGUSR1, raise_it)
    if number == signal.SIGUSR1:
        Together.seconds = 1.0  # that the other rank waits for one that has lost its group
    wrong, moments = [], 1
    while True:
        place, what = _strike(kind, moments, number)
        if not place:
            return moments, wrong
        if what:
            wrong.append((place, what))
        moments += every


# SIGINT: no message is lost, comes twice or out of order; a collective call can be told to have
# taken place by ``generation``, and if it has not, it can be repeated.


@pytest.mark.parametrize("kind", KINDS)
def test_sigint_at_any_moment(kind):
    ((moments, wrong),) = run_ranks(_strike_everywhere, 1, kind, signal.SIGINT, 1, deadline=100)
    assert moments > 30
    assert wrong == []


# A signal whose handler raises what it likes: the call ends clean, or the group is lost on this
# rank, which says so.


@pytest.mark.parametrize(
    "kind", ["send_obj as sender", "recv_obj", "recv", "barrier", "all_gather_obj"]
)
def test_another_signal_at_any_moment(kind):
    every = 7 if kind in ("barrier", "all_gather_obj") else 2
    ((moments, wrong),) = run_ranks(
        _strike_everywhere, 1, kind, signal.SIGUSR1, every, deadline=100
    )
    assert moments > 30
    assert wrong == []


# A storm: two ranks gather and send in turn, while another process interrupts both, 20,000 times in
# all. Every message arrives once, in order, and every gather is of one round.

INTERRUPTS = 4_000  # on each rank
HAMMER = """
import os, signal, sys, time
while os.getppid() == int(sys.argv[1]):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.0003)
"""


class Storm:
    def __init__(self, group):
        self.group = group
        self.may_raise = False
        self.raised = 0
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        if self.may_raise:
            self.may_raise = False
            self.raised += 1
            raise KeyboardInterrupt

    def call(self, function, count):
        """A call that may be interrupted, and is repeated then if it has not taken place."""
        before = count()
        try:
            self.may_raise = True
            result = function()
            self.may_raise = False
            return result
        except KeyboardInterrupt:
            if before is not None and count() > before:
                return None
            return function()


def _storm(here):
    with here.group() as group:
        storm = Storm(group)
        hammer = subprocess.Popen([sys.executable, "-c", HAMMER, str(os.getpid())])
        try:
            other, received, number, over = 1 - here.rank, 0, 0, False
            while not over:
                storm.call(
                    lambda n=number: group.send_obj(n, other),
                    lambda: group.send_dst_counter[other],
                )
                mine = (number, storm.raised >= INTERRUPTS)
                found = storm.call(
                    lambda mine=mine: group.all_gather_obj(mine), lambda: group.generation
                )
                if found is not None:
                    assert [n for n, _ in found] == [number, number]
                assert storm.call(lambda: group.recv_obj(other), lambda: None) == received
                received += 1
                number += 1
                if number % 50 == 0:
                    # not to be interrupted: both have to see the same
                    over = all(group.all_gather_obj(storm.raised >= INTERRUPTS))
        finally:
            hammer.kill()
            hammer.wait(20)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return storm.raised, group.generation > 0


@pytest.mark.timeout(240)
def test_a_storm():
    results = run_ranks(_storm, 2, deadline=200)
    assert all(raised >= INTERRUPTS for raised, _ in results)


# SIGINT ends a slow unpickling at once, and the next call gets the object.


class SlowToRead:
    """Takes its time the first time that it is unpickled."""

    slow = True

    def __reduce__(self):
        return _read_slowly, ()


def _read_slowly():
    if SlowToRead.slow:
        SlowToRead.slow = False
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)
    return "read"


@pytest.mark.parametrize("method", ["recv_obj", "broadcast_obj"])
def test_sigint_ends_a_slow_unpickling(method):
    ((seconds, obj),) = run_ranks(_unpickle_slowly, 1, method)
    assert obj == "read" and seconds < 20


def _unpickle_slowly(here, method):
    import time

    zero, one = two_groups()
    zero.send_obj(SlowToRead(), 1) if method == "recv_obj" else zero.broadcast_obj(SlowToRead(), 0)

    def receive():
        return one.recv_obj(0) if method == "recv_obj" else one.broadcast_obj(None, 0)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        receive()
    return time.monotonic() - start, receive()


# A pickle that raises what is no Exception: the caller gets that, twice, as it may have come from
# elsewhere, and the next call goes on.


class Exits:
    def __reduce__(self):
        return sys.exit, (3,)


def test_a_pickle_that_exits_blocks_nothing():
    zero, one = two_groups()
    zero.send_obj(Exits(), 1)
    zero.send_obj("next", 1)
    for _ in range(2):
        with pytest.raises(SystemExit):
            one.recv_obj(0)
    assert one.recv_obj(0) == "next"


# Errors of the user's own, in a chain that goes round, with frames that hold values and a generator
# that is suspended: a call that fails while one of them is handled leaves them alone.


def test_errors_of_the_user_are_not_touched():
    group = StatelessProcessGroup(0, 2, HashStore())
    closed = []

    def generate():
        try:
            yield 1
        finally:
            closed.append(True)

    def fail():
        kept, generator = "a value", generate()
        next(generator)
        raise ValueError(kept)

    try:
        fail()
    except ValueError as first:
        second = KeyError("second")
        first.__context__, second.__cause__ = second, first
        failed = []

        def call():
            with pytest.raises(BarrierError):
                group.barrier(timeout=0.1)
            failed.append(True)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(20)
        with pytest.raises(BarrierError):
            group.barrier(timeout=0.1)
        frame = first.__traceback__.tb_next.tb_frame
        assert failed and frame.f_locals["kept"] == "a value"
        assert next(frame.f_locals["generator"], None) is None and closed == [True]
        assert first.__context__ is second and second.__cause__ is first  # noqa: PT017


# What a handler of SIGINT raises keeps its cause.


def test_the_cause_of_what_a_handler_raises_stays():
    cause = ValueError("cause")

    def handle(*_):
        raise Struck from cause

    group = StatelessProcessGroup(0, 2, HashStore())
    found = signal.signal(signal.SIGINT, handle)
    try:
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(Struck) as caught:
            group.barrier(timeout=20)
    finally:
        signal.signal(signal.SIGINT, found)
    assert caught.value.__cause__ is cause


# A forked child cannot use the group of its parent, which goes on, whatever the child does.


def _fork(here):
    with here.group() as group:
        if here.rank == 1:
            child = os.fork()
            if child == 0:
                try:
                    group.barrier(timeout=1)
                except StoreConnectionError as error:
                    os._exit(7 if "was forked from it, cannot use it" in str(error) else 8)
                os._exit(9)
            ended, status = os.waitpid(child, 0)
            assert ended == child and os.waitstatus_to_exitcode(status) == 7
        group.barrier()
        return group.all_gather_obj(here.rank)


def test_a_forked_child():
    assert run_ranks(_fork, 2) == [[0, 1]] * 2


# Threads that wait for each other do not disturb what a thread has received and not yet got.


def test_a_thread_gets_its_own_object():
    zero, one = two_groups()
    zero.send_obj("object", 1)
    assert run_threads(lambda rank: one.recv_obj(0) if rank else until(lambda: True), 2)[1]
