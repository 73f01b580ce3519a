"""A nemesis of groups that split, shrink and grow: it kills ranks, and restarts them, at random.

Four to eight processes form a group. They pass barriers, gather, split, and send messages; they
shrink when they have lost ranks, and let in the processes that were started again. Each writes down
what it does. At the end, the logs are checked. A group is told by its store and the prefix of its
keys there.

double      a group has other ranks for one process than for another, or one process twice
forked      two groups on one store follow one and the same group
lost        a process is in a group, but not where it is among what a gather there returned
mixed       a gather returned objects of another group or gather, or a part has wrong ranks
message     a message was left out, came twice, out of order, or from another group
hung        a process did nothing for half a minute
failed      a process ended with an error that it does not know

``python tests/regrouping_nemesis.py SECONDS [SEED]`` prints what it did and found.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from nemesis import HANG_SECONDS, LARGE, LOCAL, _processes, _signal
from torch.distributed import DistError

from refdist import (
    BarrierError,
    GroupCreationError,
    MessageError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.store.listening import listen

TIMEOUT = 0.8  # of a call to a group
MEETING = 2.0  # of shrink: by then, the others have noticed it too
ALONE = 5.0  # seconds after which a process that no group lets in begins a new life
SECRET = "nemesis of the tests, for all ranks"


class Process:
    """A process, through all groups in which it is.

    It finds them by a board, which is a store of the nemesis. A *life* begins with a group of all
    processes, and ends when nobody knows how to go on. During a life, the board has the place of
    the group: host and port.
    """

    def __init__(self, slot, slots, port, log, seed, options):
        self.me, self.slot, self.slots = [slot, os.getpid()], slot, slots
        self.options = options
        self.board = create_tcp_store(LOCAL, port, timeout=timedelta(seconds=60))
        self.random = random.Random(f"{seed} {slot} {os.getpid()}")
        self.seed, self.life, self.alone_since = seed, -1, None
        self.in_call = False
        signal.signal(signal.SIGINT, self.interrupted)
        # the nemesis waits for this file
        self.log_file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def interrupted(self, number, frame):
        if self.in_call:
            raise KeyboardInterrupt

    def log(self, *event):
        os.write(self.log_file, (json.dumps([time.monotonic(), self.me, *event]) + "\n").encode())

    def call(self, function):
        """What a call returned or raised."""
        try:
            self.in_call = True
            result = function()
            self.in_call = False
            return "returned", result
        except KeyboardInterrupt:
            return "interrupted", None
        except (BarrierError, MessageError) as error:
            cause = error.__cause__ or error
            how = "completed" if getattr(cause, "completed", False) else "raised"
            return how, error.with_traceback(None)
        except GroupCreationError as error:
            return "no group", error.with_traceback(None)
        except StoreConnectionError as error:
            return "lost", error.with_traceback(None)
        finally:
            self.in_call = False

    # Where to go

    def run(self, end):
        self.end = end
        while time.monotonic() < end:
            self.life = int(self.board.get("life"))
            place = f"place/{self.life}"
            got_in = self.join(place) if self.board.check([place]) else self.create(place)
            if got_in is not None:
                self.alone_since = None
                self.live(*got_in)

    def create(self, place):
        """Begin a life, with all processes. Nobody is interrupted here, or it would take long."""
        port = f"port/{self.life}"
        with listen(LOCAL, 0) if self.slot == 0 else nullcontext() as listener:
            if listener is not None:
                self.board.set(port, str(listener.getsockname()[1]))
            try:
                self.board.wait([port], timedelta(seconds=5))
                group = StatelessProcessGroup.create(
                    LOCAL, int(self.board.get(port)), self.slot, self.slots,
                    store_timeout=5, listen_socket=listener, **self.options,
                )  # fmt: skip
            except (RuntimeError, ValueError) as error:
                self.log("not created", self.life, repr(error)[:200])
                self.end_life()
                return None
        if self.slot == 0:
            self.board.set(place, json.dumps([group.host, group.port]))
        return group, "created", None

    def join(self, place):
        """Ask to be let in."""
        host, port = json.loads(self.board.get(place))
        how, group = self.call(
            lambda: StatelessProcessGroup.join(host, port, timeout=MEETING, **self.options)
        )
        if how == "returned":
            return group, "joined", None
        self.log("not let in", repr(group)[:200])
        now = time.monotonic()
        self.alone_since = self.alone_since or now
        if now - self.alone_since > ALONE:
            self.alone_since = None
            self.end_life()
        return None

    def end_life(self):
        self.board.compare_set("life", str(self.life), str(self.life + 1))

    def live(self, group, how, followed):
        """Stay in a group and in those that follow it, until this process is in none."""
        while group is not None:
            identity = self.enter(group, how, followed)
            following, how = None, "grown"
            if identity is not None:
                following = self.stay(group, identity)
            if following is None and self.goes_on() and not self.is_elsewhere(group):
                following, how = self.shrink(group), "shrunk"
            if following is None:
                self.call(group.end)
            group, followed = following, identity

    def goes_on(self):
        return time.monotonic() < self.end and int(self.board.get("life")) == self.life

    def enter(self, group, how, followed):
        """Note in which group this process is now. Returns what it is told by."""
        client = group._connection.client
        try:
            store = client.decide("nemesis", os.urandom(8).hex().encode()).decode()
        except DistError:
            return None
        identity = [store, group._barrier.store.prefix]
        self.log("group", identity, followed, how, group.rank, group.world_size)
        if group.socket is not None:
            self.board.set("host", str(self.slot))
        here = json.dumps([group.host, group.port])
        if group.rank == 0 and how == "shrunk":
            # only if it is the group of that place, or has most of the processes
            before = f"place/{self.life}"
            if 2 * group.world_size > self.slots or self.place == self.board.get(before).decode():
                self.board.set(before, here)
        self.place = here
        return identity

    def stay(self, group, identity):
        """Call the group until that fails, or lets others in. Returns the group that follows."""
        while self.goes_on() and not self.is_elsewhere(group):
            following = self.step(group, identity)
            if following is not group:
                return following
        return None

    def is_elsewhere(self, group):
        """Whether this is a small group, and another one goes on."""
        small = 2 * group.world_size <= self.slots
        return small and self.board.get(f"place/{self.life}").decode() != self.place

    def shrink(self, group):
        """Once more if the store was lost, as the successor may have been interrupted."""
        hows = []
        while hows[-1:] == ["interrupted"] or hows.count("lost") == len(hows) < 2:
            how, following = self.call(lambda: group.shrink(timeout=MEETING))
            self.log("shrink", how, repr(following)[:200])
            hows.append(how)
        return following if how == "returned" else None

    # What to do there

    def step(self, group, identity):
        """A message to the next rank, a collective call, a message from the rank before.

        Returns the group if it goes on, the one that follows it, or None if a call failed.
        """
        there, back = (group.rank + 1) % group.world_size, (group.rank - 1) % group.world_size
        alone = group.world_size == 1
        if not alone and not self.send(group, identity, there):
            return None
        following = self.meet(group, identity)
        if following is group and not alone and not self.receive(group, identity, back):
            return None
        return following

    def send(self, group, identity, dst):
        number = group.send_dst_counter[dst]
        while group.send_dst_counter[dst] == number:
            obj = [identity, group.rank, number, bytes(self.random.choice([0, 0, 0, LARGE]))]
            how, _ = self.call(lambda obj=obj: group.send_obj(obj, dst))
            self.log("send", identity, dst, number, how)
            if how not in ("returned", "interrupted"):
                return False
        return True

    def receive(self, group, identity, src):
        number = group.recv_src_counter[src]
        while True:
            how, obj = self.call(lambda: group.recv_obj(src, timeout=TIMEOUT))
            if how == "raised" and group.recv_src_counter[src] > number:
                self.log("recv", identity, src, number, "cut off", repr(obj)[:200])
                return "its writer stopped" in str(obj)
            self.log("recv", identity, src, obj[:3] if how == "returned" else number, how)
            if how != "interrupted":
                return how == "returned"

    def meet(self, group, identity):
        generation = group.generation
        choose = random.Random(f"{self.seed} {identity[1]} {generation}")
        kind = choose.choice(["barrier", "gather", "gather", "split", "admit", "admit"])
        if group.generation <= 1:
            kind = "gather"  # who is in it
        value = [identity, generation, self.me, bytes(self.random.choice([0, 0, LARGE]))]
        colors = [choose.choice([0, 1, None]) for _ in range(group.world_size)]
        call = {
            "barrier": lambda: group.barrier(timeout=TIMEOUT),
            "gather": lambda: group.all_gather_obj(value, timeout=TIMEOUT),
            "split": lambda: group.split(colors[group.rank], timeout=TIMEOUT),
            "admit": lambda: group.admit(timeout=TIMEOUT),
        }[kind]
        while True:
            how, found = self.call(call)
            shown = [one[:3] for one in found] if isinstance(found, list) else repr(found)[:200]
            self.log(kind, identity, generation, how, shown)
            if kind == "admit" and how in ("returned", "no group"):
                return found if how == "returned" else group
            if how == "returned" and found is not None and kind == "split":
                return group if self.use(found, identity, generation, colors, group.rank) else None
            if how not in ("returned", "interrupted", "completed"):
                return None
            if group.generation > generation and not (kind == "admit" and how == "interrupted"):
                return group

    def use(self, part, identity, generation, colors, rank):
        """Gather and send in a part, and close it."""
        members = [other for other, color in enumerate(colors) if color == colors[rank]]
        there, back = (part.rank + 1) % part.world_size, (part.rank - 1) % part.world_size
        value = [identity, generation, rank]

        def exchange():
            if part.world_size > 1:
                part.send_obj(value, there)
            found = part.all_gather_obj(value, timeout=TIMEOUT)
            return found, part.recv_obj(back, timeout=TIMEOUT) if part.world_size > 1 else value

        how, found = self.call(exchange)
        self.call(part.close)
        wrong = how == "returned" and (
            found[0] != [[identity, generation, other] for other in members]
            or found[1] != [identity, generation, members[back]]
        )
        self.log("part", identity, generation, how, members, repr(found)[:400] if wrong else None)
        return how in ("returned", "interrupted", "completed")


def _run(slot, slots, port, log, seed, native, options, seconds):
    torch.set_num_threads(1)
    signal.alarm(int(seconds) + 60)
    faulthandler.dump_traceback_later(seconds + HANG_SECONDS - 2)
    without = torch_versions.switched_off(torch_versions.STORE_BARRIER)
    with nullcontext() if native else without:
        process = Process(slot, slots, port, log, seed, options)
        try:
            process.run(time.monotonic() + seconds)
            process.log("ended")
        except BaseException:
            process.log("failed", traceback.format_exc())
            raise


def one_run(seconds, seed, folder):
    """Some processes under the nemesis. Returns what was done, and what is wrong."""
    choose = random.Random(seed)
    slots = choose.randint(4, 8)
    native = torch_versions.store_features()[torch_versions.STORE_BARRIER] and seed % 3 < 2
    options = {"secret": choose.choice([None, SECRET])}
    options["messages"] = choose.choice(["pickle", "plain"])
    board = create_tcp_store(LOCAL, 0, is_master=True)
    board.set("life", "0")
    board.set("host", "0")
    logs = []  # of each process
    log_of = {}  # of the process that has a slot now
    done = Counter(runs=1)
    end = time.monotonic() + seconds

    def start(slot):
        left = max(0.5, end - time.monotonic())
        logs.append(Path(folder) / f"{seed}-{slot}-{len(logs)}.log")
        log_of[slot] = logs[-1]
        process = _processes.Process(
            target=_run,
            args=(slot, slots, board.port, logs[-1], seed, native, options, left),
            daemon=True,
        )
        process.start()
        return process

    processes = [start(slot) for slot in range(slots)]
    stopped = {}  # until when
    try:
        while (now := time.monotonic()) < end:
            time.sleep(choose.expovariate(1 / 0.4))
            for slot in [slot for slot, until in stopped.items() if until < now]:
                _signal(processes[slot], signal.SIGCONT)
                del stopped[slot]
            host = int(board.get("host"))
            slot = host if choose.random() < 0.15 else choose.randrange(slots)
            what = choose.choices([signal.SIGINT, signal.SIGSTOP, signal.SIGKILL], [6, 1, 1])[0]
            # a process takes a while to import torch; then it is fair game
            if slot in stopped or not log_of[slot].exists():
                continue
            _signal(processes[slot], what)
            done[what.name] += 1
            if what == signal.SIGSTOP:
                stopped[slot] = now + choose.uniform(0, 4)
            if what == signal.SIGKILL:
                done["of the host"] += slot == host
                processes[slot].join(10)
                processes[slot] = start(slot)
        for process in processes:
            _signal(process, signal.SIGCONT)
        for process in processes:
            process.join(max(0.1, end + HANG_SECONDS - time.monotonic()))
        hung = [slot for slot, process in enumerate(processes) if process.exitcode is None]
        failed = [slot for slot, one in enumerate(processes) if one.exitcode not in (0, None)]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    events = []
    for log in logs:
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
        events += [json.loads(line) for line in lines]
    violations = check(sorted(events, key=lambda event: event[0]))
    violations += [f"hung: slot {slot}" for slot in hung]
    violations += [f"failed: slot {slot}" for slot in failed]
    done += count(events)
    done["restarts"] = done["SIGKILL"]
    done["lives"] = int(board.get("life")) + 1
    setting = f"seed {seed}: {slots} processes, {'counters' if native else 'keys'}, {options}"
    return done, [f"{setting}: {violation}" for violation in violations]


def count(events):
    """What the processes did."""
    done = Counter()
    groups = {}
    calls = ("barrier", "gather", "split", "admit", "send", "recv", "shrink", "part")
    for _, _, what, *rest in events:
        done["calls"] += what in calls
        done["received"] += what == "recv" and rest[3] == "returned"
        done["parts"] += what == "part" and rest[2] == "returned"
        done["left out"] += what == "shrink" and "was left out" in rest[1]
        if what == "group":
            identity, followed, how, *_ = rest
            moved = how == "shrunk" and followed and followed[0] != identity[0]
            done["joins"] += how == "joined"
            if how != "joined":
                groups[tuple(identity)] = "moved" if moved else how
    return done + Counter(groups=len(groups)) + Counter(groups.values())


def check(events):
    """What is wrong with the events of all processes, in order of time."""
    wrong = []
    before = {}
    members = defaultdict(dict)  # of each group, by rank
    sizes = defaultdict(set)
    following = defaultdict(set)  # the groups that follow each, by store
    received = Counter()
    for at, me, what, *rest in events:
        quiet = at - before.setdefault(tuple(me), at)
        before[tuple(me)] = at
        if quiet > HANG_SECONDS:
            wrong.append(f"hung: {me} for {quiet:.0f} s before {what} {rest}")
        if what == "failed":
            wrong.append(f"failed: {me}: {rest[0]}")
        if what == "group":
            identity, followed, how, rank, size = rest
            its = members[tuple(identity)]
            if its.setdefault(rank, me) != me or list(its.values()).count(me) > 1:
                wrong.append(f"double: {me} is rank {rank} of {identity}, {how}, with {its}")
            sizes[tuple(identity)].add(size)
            if len(sizes[tuple(identity)]) > 1:
                wrong.append(f"double: {identity} has sizes {sizes[tuple(identity)]}")
            if followed is not None:
                following[tuple(followed), identity[0]].add(identity[1])
        if what == "gather" and rest[2] == "returned":
            identity, generation, _, found = rest
            expected = [[identity, generation, list(one[2])] for one in found]
            if found != expected:
                wrong.append(f"mixed: {me} got {found} in gather {generation} of {identity}")
            its = members[tuple(identity)]
            if {rank: one[2] for rank, one in enumerate(found)} != its:
                wrong.append(f"lost: {me} got {found} of {identity}, which has {its}")
        if what == "part" and rest[4] is not None:
            wrong.append(f"mixed: {me} in a part of {rest}")
        if what == "recv":
            identity, src, message, how, *_ = rest
            place = *identity, src, *me
            if how == "returned" and message != [identity, src, received[place]]:
                wrong.append(f"message: {me} got {rest}, expected number {received[place]}")
            received[place] += how in ("returned", "cut off")
    for (followed, store), prefixes in following.items():
        if len(prefixes) > 1:
            wrong.append(f"forked: {followed} is followed by {prefixes} on store {store}")
    return wrong


def run_for(seconds, seed=None, run_seconds=30.0, echo=lambda line: None):
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
