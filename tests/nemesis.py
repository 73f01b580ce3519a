"""A nemesis: it interrupts, stops, terminates and kills ranks at random, and reads all their logs.

Two to six processes form a group, pass barriers, gather and send, and form it anew when they have
lost it; one that was killed is started again. Each writes down what it does before and after each
call. At the end, the logs are checked:

early       a collective call returned before every rank had entered it
split       a collective call returned on one rank and raised on another
mixed       a gather returned objects of different calls
lost        a message was left out, came twice, or came out of order
hung        a rank did nothing for half a minute

``python tests/nemesis.py SECONDS [SEED]`` prints what it did and found.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, PrefixStore

from refdist import (
    BarrierError,
    MessageError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.errors import GroupCreationError
from refdist.store.listening import listen

LOCAL = "127.0.0.1"
TIMEOUT = 1.5
HANG_SECONDS = 30.0
LARGE = 300_000  # bytes: two chunks
_processes = multiprocessing.get_context("forkserver")
# as in ranks.py, whose processes come from the same one
_processes.set_forkserver_preload(["torch", "refdist", "pytest"])


class Terminated(BaseException):
    """What SIGTERM raises in a rank, at any place of a call."""


class Rank:
    """One process, through all groups that it forms."""

    def __init__(self, rank, size, port, log, seed, libuv, native, secret):
        self.rank, self.size, self.seed = rank, size, seed
        self.libuv, self.native, self.secret = libuv, native, secret
        self.board = create_tcp_store(LOCAL, port, timeout=timedelta(seconds=60))
        self.random = random.Random(f"{seed} {rank} {os.getpid()}")
        self.in_call = False
        signal.signal(signal.SIGINT, self.raise_in_call(KeyboardInterrupt))
        signal.signal(signal.SIGTERM, self.raise_in_call(Terminated))
        # the nemesis waits for this file
        self.log_file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def raise_in_call(self, kind):
        def handle(number, frame):
            if self.in_call:
                raise kind

        return handle

    def log(self, *event):
        os.write(self.log_file, (json.dumps([time.monotonic(), self.rank, *event]) + "\n").encode())

    def call(self, function):
        """What a call returned or raised; never raises."""
        try:
            self.in_call = True
            result = function()
            self.in_call = False
            return "returned", result
        except (KeyboardInterrupt, Terminated) as error:
            self.in_call = False
            return type(error).__name__, None
        except (BarrierError, MessageError) as error:
            self.in_call = False
            cause = error.__cause__ or error
            return "completed" if getattr(cause, "completed", False) else "raised", error
        except StoreConnectionError as error:
            self.in_call = False
            return "lost", error
        finally:
            self.in_call = False

    def run(self, end):
        number = self.next_group(int(self.board.get("number")))
        while time.monotonic() < end:
            try:
                with ExitStack() as stack:
                    group = self.form(number, stack)
                    self.log("formed", number)
                    while time.monotonic() < end and self.step(group, number):
                        pass
                    if time.monotonic() >= end:
                        return
            except (GroupCreationError, StoreConnectionError, DistError, OSError, ValueError) as e:
                self.log("not formed", number, repr(e)[:200])
            number = self.next_group(number)

    def next_group(self, number):
        """The number of the group that comes after one that this rank has lost, for all ranks."""
        return int(self.board.compare_set("number", str(number), str(number + 1)))

    def form(self, number, stack):
        if self.rank == 0:
            listener = stack.enter_context(listen(LOCAL, 0))
            self.board.set(f"port/{number}", str(listener.getsockname()[1]))
        else:
            listener = None
            self.board.wait([f"port/{number}"], timedelta(seconds=5))
        port = int(self.board.get(f"port/{number}"))
        options = {"store_timeout": 5, "listen_socket": listener, "secret": self.secret}
        if self.libuv:
            group = StatelessProcessGroup.create(LOCAL, port, self.rank, self.size, **options)
        else:
            # the server of old torch, below a prefix where the barrier is to use keys alone
            store = create_tcp_store(
                LOCAL, port, listener, is_master=self.rank == 0, use_libuv=False,
                timeout=timedelta(seconds=5),
            )  # fmt: skip
            store = store if self.native else PrefixStore("group", store)
            group = StatelessProcessGroup(self.rank, self.size, store)
        # the others may be dead, and the store with them
        stack.callback(self.call, lambda: group.close(timeout=0.5))
        return group

    def step(self, group, number):
        """A message to the next rank, a collective call, a message from the rank before."""
        there, back = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        went_on = self.send(group, number, there)
        return went_on and self.meet(group, number) and self.receive(group, number, back)

    def send(self, group, number, dst):
        message = group.send_dst_counter[dst]
        while group.send_dst_counter[dst] == message:
            obj = (number, self.rank, message, bytes(self.random.choice([0, 0, 0, LARGE])))
            how, _ = self.call(lambda obj=obj: group.send_obj(obj, dst))
            self.log("send", number, dst, message, how)
            if how in ("lost", "raised"):
                return False
            if how != "returned" and group.send_dst_counter[dst] > message:
                # its chunks may be cut off: then the receiver gets an error in its place
                break
        return True

    def receive(self, group, number, src):
        message = group.recv_src_counter[src]
        while True:
            how, obj = self.call(lambda: group.recv_obj(src, timeout=TIMEOUT))
            if how == "raised" and group.recv_src_counter[src] > message:
                self.log("recv", number, src, message, "cut off")
                return "its writer stopped" in str(obj)
            self.log("recv", number, src, obj[:3] if how == "returned" else message, how)
            if how == "returned" or how in ("lost", "raised"):
                return how == "returned"

    def meet(self, group, number):
        generation = group.generation
        kind = random.Random(f"{self.seed} {number} {generation}").choice(["barrier", "gather"])
        while True:
            value = (number, generation, self.rank, bytes(self.random.choice([0, 0, LARGE])))
            self.log("enter", number, generation, kind)
            if kind == "barrier":
                how, found = self.call(lambda: group.barrier(timeout=TIMEOUT))
            else:
                how, found = self.call(
                    lambda value=value: group.all_gather_obj(value, timeout=TIMEOUT)
                )
            found = [one[:3] for one in found] if isinstance(found, list) else repr(found)[:300]
            self.log("leave", number, generation, kind, how, found)
            if how in ("lost", "raised"):
                return False
            if group.generation > generation:
                return True


def _run(rank, size, port, log, seed, libuv, native, secret, seconds):
    torch.set_num_threads(1)
    signal.alarm(int(seconds) + 60)
    features = [] if native else [torch_versions.switched_off(torch_versions.STORE_BARRIER)]
    with ExitStack() as stack:
        for feature in features:
            stack.enter_context(feature)
        here = Rank(rank, size, port, log, seed, libuv, native, secret)
        end = time.monotonic() + seconds
        here.run(end)
        here.log("ended")


def one_run(seconds, seed, folder):
    """One group of processes under the nemesis. Returns what was done, and what is wrong."""
    choose = random.Random(seed)
    size = choose.randint(2, 6)
    libuv, native = choose.random() < 0.6, choose.random() < 0.5
    secret = choose.choice([None, "nemesis of the tests, for all ranks"]) if libuv else None
    native = native and torch_versions.store_features()[torch_versions.STORE_BARRIER]
    board = create_tcp_store(LOCAL, 0, is_master=True)
    board.set("number", "0")
    logs = []  # of each process
    log_of = {}  # the process that is a rank now
    done = Counter(runs=1)
    end = time.monotonic() + seconds

    def start(rank):
        left = max(0.5, end - time.monotonic())
        logs.append(Path(folder) / f"{seed}-{rank}-{len(logs)}.log")
        log_of[rank] = logs[-1]
        process = _processes.Process(
            target=_run,
            args=(rank, size, board.port, logs[-1], seed, libuv, native, secret, left),
            daemon=True,
        )
        process.start()
        return process

    ranks = [start(rank) for rank in range(size)]
    stopped = {}  # until when
    try:
        # a process takes a while to import torch; then it is fair game
        while (now := time.monotonic()) < end:
            time.sleep(choose.expovariate(1 / 0.06))
            for rank in [rank for rank, until in stopped.items() if until < now]:
                _signal(ranks[rank], signal.SIGCONT)
                del stopped[rank]
            rank = choose.randrange(size)
            what = choose.choices(
                [signal.SIGINT, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL], [80, 4, 2, 1]
            )[0]
            if rank in stopped or not log_of[rank].exists():
                continue
            _signal(ranks[rank], what)
            done[what.name] += 1
            if what == signal.SIGSTOP:
                stopped[rank] = now + choose.uniform(0, 2)
            if what == signal.SIGKILL:
                ranks[rank].join(10)
                ranks[rank] = start(rank)
        for process in ranks:
            _signal(process, signal.SIGCONT)
        for process in ranks:
            process.join(max(0.1, end + HANG_SECONDS - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (0, None)]
    finally:
        for process in ranks:
            process.kill()
            process.join(10)
    events = []
    for log in logs:
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
        events += [json.loads(line) for line in lines]
    violations = check(sorted(events), size)
    violations += [f"hung: rank {rank}" for rank in hung]
    violations += [f"failed: rank {rank}" for rank in failed]
    done["calls"] += sum(event[2] in ("send", "recv", "leave") for event in events)
    done["groups"] += len({event[3] for event in events if event[2] == "formed"})
    setting = f"seed {seed}: {size} ranks, {'libuv' if libuv else 'legacy'}, "
    setting += f"{'counters' if native else 'keys'}, {'a' if secret else 'no'} secret"
    return done, [f"{setting}: {violation}" for violation in violations]


def _signal(process, number):
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def check(events, size):
    """What is wrong with the events of all ranks, in order of time."""
    wrong = []
    entered, outcomes = defaultdict(dict), defaultdict(dict)
    received = defaultdict(int)
    before = {}
    for event in events:
        at, rank, what, *rest = event
        quiet = at - before.get(rank, at)
        if quiet > HANG_SECONDS:
            wrong.append(f"hung: rank {rank} for {quiet:.0f} s before {event}")
        before[rank] = at
        if what == "enter":
            number, generation, _ = rest
            entered[number, generation].setdefault(rank, at)
        elif what == "leave":
            number, generation, kind, how, found = rest
            outcomes[number, generation][rank] = how
            if how == "returned":
                there = entered[number, generation]
                if len(there) < size:
                    wrong.append(f"early: {event}, entered by {sorted(there)}")
                expected = [[number, generation, other] for other in range(size)]
                if kind == "gather" and found != expected:
                    wrong.append(f"mixed: {event}")
        elif what == "recv":
            number, src, message, how = rest
            place = number, src, rank
            if how == "returned":
                if message != [number, src, received[place]]:
                    wrong.append(f"lost: {event}, expected number {received[place]}")
                received[place] += 1
            elif how == "cut off":
                received[place] += 1
    for place, by_rank in outcomes.items():
        kinds = set(by_rank.values())
        if "returned" in kinds and "raised" in kinds:
            wrong.append(f"split: group and generation {place}: {by_rank}")
    return wrong


def run_for(seconds, seed=None, run_seconds=12.0, echo=lambda line: None):
    """Runs until the time is over. Returns what was done, and what is wrong."""
    seed = random.randrange(10**6) if seed is None else seed
    done, violations = Counter(), []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 3:
            more, wrong = one_run(min(run_seconds, left), seed, folder)
            done += more
            violations += wrong
            echo(f"seed {seed}: {dict(more)}" + "".join(f"\n  {line}" for line in wrong))
            seed += 1
    return done, violations


if __name__ == "__main__":
    given = [float(argument) for argument in sys.argv[1:]]
    total, found = run_for(
        given[0] if given else 600.0,
        int(given[1]) if len(given) > 1 else None,
        echo=lambda line: print(line, flush=True),
    )
    print(f"{dict(total)}\nviolations: {len(found)}")
    sys.exit(bool(found))
