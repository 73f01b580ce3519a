"""What a stranger writes into the store of a group, and how its ranks bear it.

``aim`` puts one input at a time where a rank is about to read. ``storm`` lets another process write
what it likes, wherever it likes, while three ranks work. Both count what they did, and raise at the
first thing that must not happen: a call that does not end in time, an error that is not refdist's,
a wrong object accepted or anything unpickled where there is a secret, or a group that does not work
afterwards. ``tests/fuzz.py`` runs them for long, ``test_fuzzing.py`` for a short time.
"""

import os
import pickle
import random
import resource
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from ranks import LOCAL, Rank, entry, with_secret
from torch.distributed import DistError, TCPStore

from refdist import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
)
from refdist.barrier import barrier_of, quick
from refdist.deadline import Deadline
from refdist.joining.membership import LeftoverStoreError
from refdist.joining.rendezvous import join
from refdist.objects import encoding
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.keys import PlainKeys, Slot

OURS = (MessageError, BarrierError, StoreConnectionError)
AT_CREATION = (GroupCreationError, StoreConnectionError, LeftoverStoreError, ValueError)
SECRET = "a secret of the fuzzing"
LARGE = bytes(encoding.CHUNK_BYTES + 1)  # two chunks
OVERSIZED = 9 * 2**20
_BRIEF = 0.05  # seconds to wait for what is there already
_SLACK = 8.0  # seconds that a slow machine may take beyond a deadline


class Trace:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


class Inputs:
    """Inputs of every kind, made of what is real. The same seed gives the same inputs."""

    def __init__(self, seed: str, trace: Path) -> None:
        self.random = random.Random(seed)
        self.kinds = Counter()
        self._old = [b"{}"]  # real values, of other keys, rounds and groups
        self._forged = pickle.dumps(Trace(trace))
        self._makers = [
            self._random, self._of_a_kind, self._flipped, self._flipped, self._truncated,
            self._extended, self._forge, self._forge_a_tag, self._replayed, self._crossed,
            self._lengths, self._nested,
        ]  # fmt: skip

    def make(self, real: bytes, old: bytes = b"") -> bytes:
        """An input in place of a real value, and unlike it; ``old`` is kept for replays."""
        self._old.append(old or real)
        del self._old[: -self.random.choice([50, 200])]
        while True:
            maker = self.random.choice(self._makers)
            value = maker(real)
            if value != real:
                self.kinds[maker.__name__.strip("_")] += 1
                return value

    def key(self) -> str:
        """The key of something in the early life of a group of three, or a random one."""
        ranks = range(3)
        slot = Slot.of(self.random.randrange(2), self.random.randrange(quick.SLOTS))
        plain = PlainKeys.of(self.random.randrange(40))
        one, other = self.random.sample(ranks, 2)
        number = self.random.randrange(40)
        some = [
            *slot, *plain, keys.reason(0), keys.reason(1), keys.gone(), keys.all_gone(),
            keys.told(one), keys.member(one), keys.message(one, other, number).own,
            keys.broadcast(one, number).own, keys.broadcast(one, number).readers,
            keys.broadcast(one, number).expired, keys.gathered(one, number).chunk(0),
            keys.message(one, other, number).chunk(0), keys.message(one, 0, 0).expired,
            self.random.randbytes(8).hex(), "", "\0", "k" * 5000,
        ]  # fmt: skip
        return self.random.choice(some)

    def _random(self, real):
        return self.random.randbytes(self.random.randrange(64))

    def _of_a_kind(self, real):
        return bytes([self.random.randrange(8)]) + self.random.randbytes(self.random.randrange(64))

    def _flipped(self, real):
        value = bytearray(real)
        for _ in range(self.random.randint(1, 8)):
            # mostly near the beginning, where lengths and tags are
            bit = self.random.randrange(8 * min(len(value), self.random.choice([64, 1 << 20])) or 1)
            if value:
                value[bit // 8] ^= 1 << bit % 8
        return bytes(value)

    def _truncated(self, real):
        return real[: self.random.randrange(len(real) + 1)]

    def _extended(self, real):
        return real + self.random.randbytes(self.random.randint(1, 40))

    def _forge(self, real):
        return b"\x01" + self._forged

    def _forge_a_tag(self, real):
        return b"\x06" + self.random.randbytes(32) + b"\x01" + self._forged

    def _replayed(self, real):
        return self.random.choice(self._old)

    def _crossed(self, real):
        cut = self.random.choice([1, 33, len(real) // 2])
        return real[:cut] + self.random.choice(self._old)[cut:]

    def _lengths(self, real):
        sizes = [self.random.randrange(1 << self.random.choice([4, 20, 33, 63])) for _ in range(3)]
        return b"\x02" + b"".join(struct.pack("<Q", size) for size in sizes)

    def _nested(self, real):
        return b"[" * self.random.choice([10, 100_000])


def _limit_memory() -> None:
    """A forged pickle may ask for any amount of memory: let it have little."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, resource.RLIM_INFINITY))


class Aim:
    """Two ranks, each with a connection to a server of this process; and a stranger's connection.

    Args:
        seed: of the inputs.
        secret: whether the group has one.
        libuv: whether the server is the libuv one.
        trace: the path of a file that a forged pickle creates.
    """

    def __init__(self, seed: str, secret: bool, libuv: bool, trace: Path) -> None:
        self.inputs = Inputs(seed, trace)
        self.random = self.inputs.random
        self.secret = secret
        self.counts = Counter()
        self._libuv = libuv
        self._threads = ThreadPoolExecutor(2)
        self._form()

    def _form(self) -> None:
        """A new server, and a new group; once more if that server says nothing."""
        try:
            self._form_once()
        except StoreConnectionError:
            self.counts["new server did not answer"] += 1
            self._form_once()

    def _form_once(self) -> None:
        self._lost = False
        self.server = create_tcp_store(LOCAL, 0, is_master=True, use_libuv=self._libuv)
        self.stranger = self._connect()
        self.groups = [StatelessProcessGroup(rank, 2, self._connect()) for rank in range(2)]
        if self.secret:
            for group in self.groups:
                with_secret(group, SECRET)

    def _connect(self) -> TCPStore:
        seconds = timedelta(seconds=10)
        return create_tcp_store(LOCAL, self.server.port, use_libuv=self._libuv, timeout=seconds)

    def run(self, inputs: int) -> Counter:
        """Take so many inputs, in batches. Returns what happened how often."""
        often, seldom = [self._message, self._broadcast], [self._chunk, self._note, self._reason]
        while self.counts["inputs"] < inputs:
            for _ in range(min(200, inputs - self.counts["inputs"])):
                dice = self.random.random()
                if dice < 0.8:
                    step = self.random.choice(often)
                elif dice < 0.98:
                    step = self._roll
                elif dice < 0.995:
                    step = self.random.choice(seldom)
                else:
                    step = self.random.choice([self._count, self._creation, self._oversized])
                self.counts["inputs"] += 1
                self.counts[step.__name__.strip("_")] += 1
                step()
                if self._lost:
                    self._form()
            self._check_that_it_works()
        return self.counts + Counter({f"input {k}": v for k, v in self.inputs.kinds.items()})

    def _try(self, call, timeout: float, genuine=None) -> Exception | None:
        """Call, and return the error; raise for what must not happen."""
        start = time.monotonic()
        error = None
        try:
            value = call()
            if self.secret:
                assert value == genuine, f"accepted {value!r:.200}"
        except OURS as raised:
            error = raised
        assert time.monotonic() - start < timeout + _SLACK, f"took too long: {error!r}"
        self.counts[type(error).__name__] += 1
        # what a forged pickle asks for may take so long that the rank gives its store up
        self._lost |= not self.secret and isinstance(error, StoreConnectionError)
        return error

    def _both(self, call, timeout: float, genuine=None) -> list[Exception | None]:
        """The same on both ranks at once."""
        futures = [
            self._threads.submit(self._try, lambda g=group: call(g), timeout, genuine)
            for group in self.groups
        ]
        return [future.result(timeout + 2 * _SLACK) for future in futures]

    def _aim(self, key: str) -> None:
        self._settle()
        self.stranger.set(key, self.inputs.make(StoreClient(self.stranger).peek(key) or b""))
        self._settle()

    def _settle(self) -> None:
        """Let the server take what was written without an answer, on each connection."""
        for store in (self.groups[0].store, self.stranger):
            store.num_keys()

    def _read(self, key: str, call, error_of: str) -> None:
        """Read what was aimed at: refused, where there is a secret; else an object or an error."""
        error = self._try(call, 5)
        if self.secret:
            assert isinstance(error, AuthenticationError) and error_of in str(error), repr(error)
        elif isinstance(error, MessageTimeoutError):
            # a stranger has announced chunks that never come, so this rank waits for ever
            self._form()

    def _message(self) -> None:
        zero, one = self.groups
        key = keys.message(0, 1, zero.send_dst_counter[1]).own
        zero.send_obj({"from": 0, "payload": key}, 1)
        self._aim(key)
        self._read(key, lambda: one.recv_obj(0, timeout=_BRIEF), key)

    def _broadcast(self) -> None:
        zero, one = self.groups
        key = keys.broadcast(0, zero.broadcast_send_counter).own
        zero.broadcast_obj({"from": 0, "payload": key}, 0)
        self._aim(key)
        self._read(key, lambda: one.broadcast_obj(None, 0, timeout=_BRIEF), key)

    def _chunk(self) -> None:
        zero, one = self.groups
        key = keys.message(0, 1, zero.send_dst_counter[1])
        zero.send_obj(LARGE, 1)
        chunk = key.chunk(self.random.randrange(2))
        self._aim(chunk)
        self._read(key.own, lambda: one.recv_obj(0, timeout=_BRIEF), chunk)

    def _note(self) -> None:
        zero, one = self.groups
        key = keys.message(0, 1, zero.send_dst_counter[1])
        zero.send_obj(LARGE, 1)
        self._settle()
        chunk = StoreClient(self.stranger).peek(key.chunk(1))
        assert self.stranger.delete_key(key.chunk(1))
        self.stranger.set(key.expired, self.inputs.make(b"%d" % key.number))
        self._settle()
        error = self._try(lambda: one.recv_obj(0, timeout=_BRIEF), 5)
        self.stranger.delete_key(key.expired)
        if isinstance(error, MessageTimeoutError):
            # the note was not believed, so the message is still to come
            self.stranger.set(key.chunk(1), chunk)
            self._settle()
            self._try(lambda: one.recv_obj(0, timeout=5), 5, LARGE)
        else:
            assert not self.secret, repr(error)

    def _roll(self) -> None:
        barrier = self.groups[0]._barrier
        roll = barrier.keys.roll
        real = entry(barrier.generation, 1, b"\x01real", barrier.seals, roll)
        value = self.inputs.make(real)
        if self.random.random() < 0.5:
            self.stranger.append(roll, value)
            self._both(lambda group: group.all_gather_obj("mine", timeout=2), 4, ["mine"] * 2)
        else:
            late = self._threads.submit(self._gather_first, roll, value)
            self._try(lambda: self.groups[1].all_gather_obj("mine", timeout=2), 4, ["mine"] * 2)
            late.result(4 + 2 * _SLACK)

    def _gather_first(self, roll: str, value: bytes) -> None:
        """The stranger writes while the other rank may have signed already."""
        self.stranger.set(roll, value)
        self._try(lambda: self.groups[0].all_gather_obj("mine", timeout=2), 4, ["mine"] * 2)

    def _reason(self) -> None:
        zero, one = self.groups
        barrier = zero._barrier
        native = isinstance(barrier, quick.Barrier)
        reason = keys.reason(barrier.epoch) if native else barrier.keys.outcome
        error = self._try(lambda: zero.barrier(0.01), 2)
        assert isinstance(error, BarrierError) or self._lost, repr(error)
        self._aim(reason)
        error = self._try(lambda: one.barrier(5), 5)
        assert isinstance(error, BarrierError) or self._lost, repr(error)
        if self.secret:
            assert "cannot be trusted" in str(error) and error.missing == (), repr(error)

    def _count(self) -> None:
        """Anything at any key, also the counts. Such a group may have to be formed anew."""
        key = self.inputs.key()
        value = self.random.choice(
            [self.inputs.make(b"3"), b"-1", b"1" * 30, b"4611686018427387904"]
        )
        with suppress(DistError):
            self.stranger.set(key, value)
        self._both(lambda group: group.barrier(0.3), 4)
        self._check_that_it_works(may_form_anew=True)
        # what is in the place of something to come would be found only then
        self._form()

    def _oversized(self) -> None:
        """More than the libuv server takes at once: in one piece, and in two."""
        zero, one = self.groups
        key = keys.message(0, 1, zero.send_dst_counter[1]).own
        with suppress(DistError):
            self.stranger.set(key, bytes(OVERSIZED))
            self.stranger.num_keys()
        self.stranger = self._connect()
        self.stranger.append(key, bytes(OVERSIZED // 2))
        self.stranger.append(key, bytes(OVERSIZED // 2 + 1))
        self._settle()
        self._read(key, lambda: one.recv_obj(0, timeout=5), key)
        zero.send_dst_counter[1] += 1  # its own message would have been in the same place

    def _creation(self) -> None:
        """Anything in the records that two ranks find when they meet."""
        server = create_tcp_store(LOCAL, 0, is_master=True, use_libuv=self._libuv)
        roll = barrier_of(server, 0, 2).keys.roll
        key = self.random.choice([keys.member(0), keys.member(1), roll])
        server.set(key, self.inputs.make(b'{"host": "here", "pid": 1, "world_size": 2}'))
        secret = SECRET.encode() if self.secret else None

        def meet(rank: int) -> None:
            store = create_tcp_store(LOCAL, server.port, use_libuv=self._libuv)
            start = time.monotonic()
            with suppress(*AT_CREATION):
                join(StoreClient(store), rank, 2, Deadline(0.3, whole=True), "here", secret)
                self.counts["joined"] += 1
            assert time.monotonic() - start < 2 + _SLACK

        for future in [self._threads.submit(meet, rank) for rank in range(2)]:
            future.result(2 + 2 * _SLACK)

    def _check_that_it_works(self, may_form_anew: bool = False) -> None:
        """Everything works; where the stranger has changed counts, at the latest in a new group."""
        for _ in range(3):
            errors = self._works()
            if errors == [None, None]:
                return
            assert may_form_anew or self._lost, f"does not work any more: {errors!r:.2000}"
        self.counts["formed anew"] += 1
        self._form()
        assert self._works() == [None, None]

    def _works(self) -> list[Exception | None]:
        def everything(group: StatelessProcessGroup):
            other = 1 - group.rank
            group.barrier(0.5)
            group.send_obj(("to", other), other)
            assert group.recv_obj(other, timeout=0.5) == ("to", group.rank)
            for source in range(2):
                assert group.broadcast_obj(("from", group.rank), source, 0.5) == ("from", source)
            return group.all_gather_obj(LARGE, timeout=2)

        return self._both(everything, 5, [LARGE, LARGE])


def aim(here: Rank, inputs: int, seed: str, secret: bool, libuv: bool, folder: str) -> Counter:
    """Run on a process of its own: aim inputs at two ranks."""
    trace = Path(folder) / f"trace-{secret}-{libuv}"
    if not secret:
        _limit_memory()
    counts = Aim(seed, secret, libuv, trace).run(inputs)
    # without a secret it must be there, or this would not notice
    assert trace.exists() != secret
    return counts


STORM = 100  # inputs of one storm


def storm(here: Rank, inputs: int, seed: str, secret: bool, libuv: bool, folder: str) -> Counter:
    """Run on four processes: ranks 0 to 2, and a stranger who writes while they work."""
    trace = Path(folder) / f"storm-{secret}-{libuv}"
    if not secret:
        _limit_memory()
    made = Inputs(seed, trace)
    counts = Counter()
    group = store = None
    for number in range(-(-inputs // STORM)):
        if store is None:
            store = here.store(f"store {seed} {number}", use_libuv=libuv)
            if here.rank < 3:
                group = StatelessProcessGroup(here.rank, 3, store)
                group = with_secret(group, SECRET) if secret else group
        here.meet(f"begin {number}")
        if here.rank == 3:
            store = _rage(store, made, counts)
            here.tell(f"over {number}")
        else:
            rounds = 0
            while not here.told(f"over {number}") or rounds == 0:
                _work(group, counts, secret)
                rounds += 1
        here.meet(f"over {number}")
        works = here.rank == 3 or _all_works(group, secret)
        here.tell(f"works {number} {here.rank}", works)
        if not all(here.ask(f"works {number} {rank}") for rank in range(4)):
            counts["formed anew"] += 1
            store = group = None
    assert not (secret and trace.exists())
    return counts


def _rage(store: TCPStore, inputs: Inputs, counts: Counter) -> TCPStore:
    """Write what one storm is made of. Returns a connection that still works."""
    port = store.port
    for _ in range(STORM):
        key = inputs.key()
        counts["inputs"] += 1
        try:
            real = StoreClient(store).peek(key) or b""
            value = inputs.make(real)
            request = inputs.random.choice(["set", "set", "append", "compare", "delete", "add"])
            if inputs.random.random() < 0.005:
                value = bytes(OVERSIZED)
            if request == "set":
                store.set(key, value)
            elif request == "append":
                store.append(key, value)
            elif request == "compare":
                store.compare_set(key, real, value)
            elif request == "delete":
                store.delete_key(key)
            else:
                store.add(key, inputs.random.choice([-1, 1, 7, 1 << 40]))
        except DistError:
            # the server does not speak to this connection any more
            counts["stranger lost"] += 1
            store = create_tcp_store(LOCAL, port)
    return store


def _work(group: StatelessProcessGroup, counts: Counter, secret: bool) -> None:
    """One round of everything; each part may fail, in time and with an error of refdist."""
    rank, others = group.rank, [r for r in range(3) if r != group.rank]

    def check(value, genuine) -> None:
        assert not secret or value == genuine, f"accepted {value!r:.200}"

    calls = [lambda: group.barrier(0.3)]
    calls += [lambda o=o: group.send_obj(("from", rank), o) for o in others]
    calls += [lambda o=o: check(group.recv_obj(o, timeout=0.2), ("from", o)) for o in others]
    calls += [
        lambda s=s: check(group.broadcast_obj(("all", rank), s, 0.2), ("all", s)) for s in range(3)
    ]
    calls.append(lambda: check(group.all_gather_obj(rank, timeout=0.3), [0, 1, 2]))
    for call in calls:
        start = time.monotonic()
        error = None
        try:
            call()
        except OURS as raised:
            error = raised
        assert time.monotonic() - start < 1 + _SLACK, f"took too long: {error!r}"
        counts[type(error).__name__] += 1


def _all_works(group: StatelessProcessGroup, secret: bool) -> bool:
    """Whether the group works as before, so that it need not be formed anew."""
    counts = Counter()
    for _ in range(2):
        counts.clear()
        _work(group, counts, secret)
    return counts == Counter({"NoneType": sum(counts.values())})
