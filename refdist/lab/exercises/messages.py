"""Checks of notebook 04: a mailbox, a gather, an agreement on who is alive, and a new group.

The first two and the last run the answer on the engines, where the notebook has defined it. Each
step is one call of all engines, so an answer that fails leaves no engine waiting for another.
"""

import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore

from refdist import StatelessProcessGroup, create_tcp_store
from refdist.exploration import (
    Exploration,
    Property,
    Snapshot,
    explore,
    nobody_waits_for_ever,
)
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import UnsolvedError, exercise, require

_SECONDS = 3.0  # for a message that has been sent before
_GATHER_SECONDS = 10.0
_GATHERS = 3
_CREATE_SECONDS: float = 5
_PATIENCE_SECONDS = 30.0


class CountedStore:
    """A store that counts the calls of its methods.

    Attributes:
        calls: how often each method was called, by name.
    """

    def __init__(self, store: Any) -> None:
        self.calls: Counter[str] = Counter()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            return method

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments, **options)

        return counted

    def count(self) -> int:
        """The number of calls so far."""
        return sum(self.calls.values())


def _answer(name: str) -> Any:
    """What the reader has defined on this engine."""
    try:
        return vars(sys.modules["__main__"])[name]
    except KeyError:
        raise NameError(f"name {name!r} is not defined on the engines") from None


# 4.1

_OBJECTS: tuple[Any, ...] = ("first", None, {"layers": [1, 2]}, b"", 0)


class _Post:
    """On one engine: the reader's mailbox, its store and the calls that it has made."""

    current: "_Post"

    def __init__(self, rank: int, name: str) -> None:
        group = _answer("group")
        self.raw = create_tcp_store(group.host, group.port)
        self.prefixed = PrefixStore(name, self.raw)
        self.store = CountedStore(self.prefixed)
        self.mailbox = _answer("Mailbox")(self.store, rank)


def _open(rank: int, world_size: int, name: str) -> int:
    _Post.current = _Post(rank, name)
    return int(_Post.current.raw.num_keys())


def _send_all(rank: int, world_size: int) -> list[int]:
    """Send all objects to all ranks. The calls of the store that each took."""
    post, calls = _Post.current, []
    for obj in _OBJECTS:
        for other in range(world_size):
            if other != rank:
                before = post.store.count()
                post.mailbox.send((rank, other, obj), other)
                calls.append(post.store.count() - before)
    return calls


def _receive_all(
    rank: int, world_size: int, seconds: float
) -> tuple[list[tuple[int, Any]], list[int]]:
    """Receive all objects, from the highest rank first. What came, and the calls that each took."""
    post, came, calls = _Post.current, [], []
    for _ in _OBJECTS:
        for other in reversed(range(world_size)):
            if other != rank:
                before = post.store.count()
                came.append((other, post.mailbox.receive(other, seconds)))
                calls.append(post.store.count() - before)
    return came, calls


def _count_keys(rank: int, world_size: int) -> int:
    return int(_Post.current.raw.num_keys())


def _wait_for_late(rank: int, world_size: int) -> tuple[Any, int]:
    """Rank 0 waits for a message that rank 1 sends half a second later. It, and the calls."""
    post = _Post.current
    before = post.store.count()
    if rank == 1:
        time.sleep(0.5)
        post.mailbox.send("late", 0)
    came = post.mailbox.receive(1, _PATIENCE_SECONDS) if rank == 0 else None
    return came, post.store.count() - before


def _wait_in_vain(rank: int, world_size: int) -> tuple[str, str, float]:
    """Rank 0 waits for rank 1, which sends nothing. The error, its text and the seconds."""
    if rank != 0:
        return "", "", 0.0
    start = time.monotonic()
    try:
        came = _Post.current.mailbox.receive(1, 0.3)
        return "", f"it returned {came!r}", time.monotonic() - start
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start


def _after_the_timeout(rank: int, world_size: int, seconds: float) -> Any:
    mailbox = _Post.current.mailbox
    if rank == 1:
        mailbox.send("after the timeout", 0)
    return _try_to_receive(mailbox, 1, seconds) if rank == 0 else None


def _many_ranks(rank: int, world_size: int, seconds: float) -> list[Any]:
    """Rank 0 plays ranks 1, 12, 23 and 3 of a larger group."""
    if rank != 0:
        return []
    kind = _answer("Mailbox")
    boxes = {number: kind(_Post.current.store, number) for number in (1, 12, 23, 3)}
    boxes[1].send("1 to 23", 23)
    boxes[12].send("12 to 3", 3)
    return [_try_to_receive(boxes[23], 1, seconds), _try_to_receive(boxes[3], 12, seconds)]


def _try_to_receive(mailbox: Any, source: int, seconds: float) -> Any:
    """What came, or the TimeoutError."""
    try:
        return mailbox.receive(source, seconds)
    except TimeoutError as error:
        return error


@exercise("4.1 a mailbox that loses nothing")
def check_mailbox(engines: LocalEngines) -> str:
    """Check the class ``Mailbox`` of the engines, which have a ``group``."""
    before = engines.run(_open, f"exercise 4.1 {uuid.uuid4()}")[0]
    sending = {calls for _ in range(2) for sent in engines.run(_send_all) for calls in sent}
    require(
        sending == {1},
        f"send made {min(sending)} to {max(sending)} calls of its store; wanted: 1, a set",
    )
    receiving = 0
    for _ in range(2):
        for rank, (came, calls) in enumerate(engines.run(_receive_all, _SECONDS)):
            others = [other for other in reversed(range(engines.n)) if other != rank]
            wanted = [(other, (other, rank, obj)) for obj in _OBJECTS for other in others]
            for (source, seen), (_, due) in zip(came, wanted, strict=True):
                require(
                    seen == due,
                    f"rank {rank} received {seen!r} from rank {source}; wanted: {due!r}, that is "
                    f"(source, destination, object). Which ranks does the key name?",
                )
            receiving = max(receiving, *calls)
    require(
        receiving <= 3,
        f"receive made up to {receiving} calls of its store; wanted: at most 3, one each to wait, "
        f"to read and to delete",
    )
    left = engines.run(_count_keys)[0] - before
    require(left == 0, f"{left} keys were left; wanted: 0. Delete what has been read")
    late, calls = engines.run(_wait_for_late)[0]
    require(
        late == "late" and calls <= 3,
        f"rank 0 waited for half a second, and got {late!r} with {calls} calls of its store; "
        f"wanted: 'late' with at most 3. Let the store wait",
    )
    kind, text, seconds = engines.run(_wait_in_vain)[0]
    require(
        kind == "TimeoutError" and "rank 1" in text and seconds < _SECONDS,
        f"no message came from rank 1 for 0.3 s: {kind or 'no error'}: {text} (after "
        f"{seconds:.1f} s); wanted: a TimeoutError whose text names rank 1",
    )
    came = engines.run(_after_the_timeout, _SECONDS)[0]
    require(
        came == "after the timeout",
        f"after a timeout, rank 0 received {came!r}; wanted: the message that it waited for before",
    )
    seen = engines.run(_many_ranks, _SECONDS)[0]
    require(
        seen == ["1 to 23", "12 to 3"],
        f"of ranks 1, 12, 23 and 3 of a larger group, two received {seen}; wanted: ['1 to 23', "
        f"'12 to 3']. Put something between the numbers in a key",
    )
    left = engines.run(_count_keys)[0] - before
    require(left == 0, f"{left} keys were left in the end; wanted: 0")
    messages = 2 * len(_OBJECTS) * engines.n * (engines.n - 1)
    return (
        f"{messages} messages between {engines.n} ranks; a send took 1 call, a receive at most "
        f"{receiving}; 0 keys left."
    )


# 4.2


class _CountedMailbox:
    """The messages of a group, by the methods of the reader's mailbox, and their number."""

    def __init__(self, rank: int, world_size: int, name: str) -> None:
        group = _answer("group")
        store = PrefixStore(name, create_tcp_store(group.host, group.port))
        self.sent = 0
        self._group = StatelessProcessGroup(rank, world_size, store)

    def send(self, obj: Any, destination: int) -> None:
        self._group.send_obj(obj, destination)
        self.sent += 1

    def receive(self, source: int, timeout: float = 5.0) -> Any:
        return self._group.recv_obj(source, timeout)


_Gathers = list[tuple[Any, int]]


def _gather(rank: int, world_size: int, size: int, name: str, seconds: float) -> _Gathers:
    """Gather three times on the first ``size`` ranks. The results, and the messages of each."""
    found: _Gathers = []
    if rank >= size:
        return found
    mailbox = _CountedMailbox(rank, size, name)
    for number in range(_GATHERS):
        sent, mine = mailbox.sent, {"rank": rank, "number": number}
        result = _answer("all_gather")(mailbox, mine, rank, size, seconds)
        found.append((result, mailbox.sent - sent))
    return found


def _group_keys(rank: int, world_size: int) -> int:
    return int(_answer("group").store.num_keys()) if rank == 0 else 0


@exercise("4.2 a gather of fewer messages")
def check_all_gather(engines: LocalEngines) -> str:
    """Check the function ``all_gather`` of the engines, over the messages of their ``group``."""
    before = engines.run(_group_keys)[0]
    messages = 0
    for size in range(1, engines.n + 1):
        name = f"exercise 4.2 {uuid.uuid4()}"
        found = engines.run(_gather, size, name, _GATHER_SECONDS)[:size]
        for number in range(_GATHERS):
            wanted = [{"rank": rank, "number": number} for rank in range(size)]
            for rank, gathers in enumerate(found):
                require(
                    gathers[number][0] == wanted,
                    f"gather {number} of {size} ranks returned {gathers[number][0]!r} on rank "
                    f"{rank}; wanted: {wanted}",
                )
            messages = sum(gathers[number][1] for gathers in found)
            require(
                size - 1 <= messages <= 2 * (size - 1),
                f"{size} ranks sent {messages} messages; wanted: at most {2 * (size - 1)}, and "
                f"all objects in messages of the mailbox",
            )
    left = engines.run(_group_keys)[0] - before
    require(left == 0, f"{left} keys were left; wanted: 0. Is each message read that is sent?")
    each = engines.n * (engines.n - 1)
    return (
        f"{engines.n} ranks took {messages} messages, in place of {each} from each to each; 0 keys "
        f"left."
    )


# 4.3


class Agreed(list[int]):
    """A list that a rank has got, and the number of requests that it made for that."""

    requests = 0


_Agree = Callable[[Any, str, list[int]], list[int]]


def one_list(snapshot: Snapshot) -> bool:
    """All ranks that return from an agreement return the same list."""
    return all(
        len({repr(call.value) for call in calls.values() if call.returned}) <= 1
        for calls in snapshot.collective.values()
    )


def a_list_of_a_rank(snapshot: Snapshot) -> bool:
    """The list is one that a rank has proposed under this name."""
    proposed = {
        name: [_proposal(name, rank, len(snapshot.calls)) for rank in calls]
        for name, calls in snapshot.collective.items()
    }
    return all(
        call.value in proposed[name]
        for name, calls in snapshot.collective.items()
        for call in calls.values()
        if call.returned
    )


def nobody_raises(snapshot: Snapshot) -> bool:
    """No rank raises an error."""
    return not any(call.raised for calls in snapshot.calls for call in calls.values())


def _proposal(name: str, rank: int, world_size: int) -> list[int]:
    """What a rank proposes: without the next rank, or without itself."""
    absent = rank if name == "second" else (rank + 1) % world_size
    return [other for other in range(world_size) if other != absent]


def agreement_protocol(agree: _Agree, names: tuple[str, ...] = ("agree",)) -> Any:
    """The protocol of ranks that agree on lists under these names, for ``explore``."""

    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Callable[[], object]]:
        counted = CountedStore(store)

        def call(name: str) -> Agreed:
            before = counted.count()
            agreed = Agreed(agree(counted, name, _proposal(name, rank, world_size)))
            agreed.requests = counted.count() - before
            return agreed

        return {name: lambda name=name: call(name) for name in names}  # type: ignore[misc]

    return protocol


@exercise("4.3 the first proposal holds")
def check_agree(agree: _Agree) -> str:
    """Check the function in every schedule of 2 and 3 ranks of which one may die."""
    alone = HashStore()
    alone.set_timeout(timedelta(seconds=1))
    found = agree(alone, "alone", [0, 2])
    require(found == [0, 2], f"a rank alone proposed [0, 2] and got {found!r}; wanted: [0, 2]")
    properties = [nobody_raises, one_list, a_list_of_a_rank, nobody_waits_for_ever]
    schedules = [
        _explore(agree, world_size, names, properties).schedules
        for world_size, names in ((2, ("first", "second")), (3, ("first",)))
    ]
    _explore(agree, 2, ("first",), [_few_requests])
    return (
        f"In {schedules[0]:,} schedules of 2 ranks and {schedules[1]:,} of 3, of which one may "
        f"die, no rank returned another list, and none waited."
    )


def _explore(
    agree: _Agree, world_size: int, names: tuple[str, ...], properties: Sequence[Property]
) -> Exploration:
    protocol = agreement_protocol(agree, names)
    explored = explore(protocol, world_size, properties, timeouts=1, crashes=1)
    if explored.counterexample is not None:
        told = explored.counterexample.timeline()
        raise UnsolvedError(f"with {world_size} ranks, one schedule breaks it:\n{told}")
    return explored


def _few_requests(snapshot: Snapshot) -> bool:
    """An agreement takes a rank 1 or 2 requests."""
    return all(
        isinstance(call.value, Agreed) and 1 <= call.value.requests <= 2
        for calls in snapshot.calls
        for call in calls.values()
        if call.returned
    )


# 4.4


class _Spare:
    """On one engine: the socket that it has bound before."""

    socket: socket.socket


def _bind(rank: int) -> tuple[str, int]:
    _Spare.socket = socket.socket()
    _Spare.socket.bind((_answer("group").host, 0))
    host, port = _Spare.socket.getsockname()
    return host, port


def _regroup(
    rank: int, agreed: list[int], addresses: dict[int, tuple[str, int]], seconds: float
) -> Any:
    """Call the answer. What its group is, and what a gather there returns; None without one."""
    regroup = _answer("regroup")
    group = regroup(list(agreed), dict(addresses), rank, _Spare.socket, seconds)
    if group is None:
        return None
    with group:
        told = group.rank, group.world_size, (group.host, group.port)
        return (*told, group.all_gather_obj(f"was rank {rank}", seconds))


def _on(engines: LocalEngines, ranks: list[int], function: Any, *arguments: Any) -> list[Any]:
    """Call a function on some engines at once. Those that do not end are interrupted."""
    results = [engines.client[rank].apply_async(function, rank, *arguments) for rank in ranks]
    end = time.monotonic() + _PATIENCE_SECONDS
    for rank, result in zip(ranks, results, strict=True):
        if not result.wait(max(0.0, end - time.monotonic())):
            with suppress(ProcessLookupError):
                engines.signal(rank, signal.SIGINT)
    require(
        all(result.wait(_SECONDS) for result in results) and time.monotonic() < end,
        f"a rank had not ended after {_PATIENCE_SECONDS:g} s. Is store_timeout={_CREATE_SECONDS} "
        f"passed on, which the check gives as seconds?",
    )
    return [result.get() for result in results]


def _lists(alive: list[int]) -> Iterator[list[int]]:
    """Lists of survivors: without the lowest, without the middle, all."""
    yield alive[1:]
    yield [alive[0], alive[-1]]
    yield alive


@exercise("4.4 a new group")
def check_regroup(engines: LocalEngines) -> str:
    """Check the function ``regroup`` of those engines that answer, which have a ``group``."""
    alive = engines.answering()
    require(len(alive) >= 3, f"only {alive} answer; wanted: at least 3 engines. Start them again")
    addresses = dict(zip(alive, _on(engines, alive, _bind), strict=True))
    for agreed in _lists(alive):
        found = _on(engines, alive, _regroup, agreed, addresses, _CREATE_SECONDS)
        names = [f"was rank {rank}" for rank in agreed]
        for rank, told in zip(alive, found, strict=True):
            if rank not in agreed:
                require(
                    told is None,
                    f"agreed on {agreed}: rank {rank} returned {told!r}; wanted: None",
                )
                continue
            wanted = agreed.index(rank), len(agreed), addresses[agreed[0]], names
            require(
                told == wanted,
                f"agreed on {agreed}: rank {rank} has {told}; wanted: {wanted}, that is new rank, "
                f"world size, address, and what a gather returns",
            )
    return f"Groups of {', '.join(map(str, _lists(alive)))}, each where its lowest rank listens."
