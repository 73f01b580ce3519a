"""Checks of notebook 04: a mailbox, a gather, an agreement on who is alive, and a new group.

All but the third run the answer on the engines, where the notebook has defined it. ``_try`` makes
each step one call of all engines, which ends in time, so an answer that fails leaves no engine
waiting for another. Messages go through a store of the checks, so none stay in that of the group.
"""

import socket
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from torch.distributed import HashStore, PrefixStore, TCPStore

from refdist import StatelessProcessGroup, create_tcp_store
from refdist.exploration import Snapshot, explore, nobody_waits_for_ever
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import UnsolvedError, exercise, require
from refdist.lab.exercises.trying import (
    LimitedStore,
    TooLateError,
    defined_here,
    interrupted_after,
    no_call_raises,
)
from refdist.lab.requests import LoggedStore

_SECONDS = 3.0  # for a message that has been sent before
_GATHER_SECONDS = 5.0
_CREATE_SECONDS: float = 5
_CALL_SECONDS = 10.0  # for all that an engine does in one step
_GATHERS = 3

_Address = tuple[str, int]
_Part = tuple[_Address, str]  # of a store: where it is, and the prefix of the keys


# How an answer is tried.

_WAITED = {
    "TimeoutError",
    "TooLateError",
    "MessageTimeoutError",
    "GroupCreationError",
    "StoreConnectionError",
}


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("this exercise is to be solved without the methods of `group`")


_REFUSED: dict[str, Any] = dict.fromkeys(
    ("all_gather_obj", "barrier", "broadcast_obj", "recv_obj", "send_obj"), _refuse
)


def _call(
    rank: int, world_size: int, seconds: float, function: Any, arguments: Sequence[Any]
) -> tuple[Any, str, str]:
    """On an engine: what a function returns; or the name of its error, and what happened."""
    try:
        with (
            patch.multiple(defined_here("group"), **_REFUSED),
            interrupted_after(seconds),
        ):
            return function(rank, world_size, *arguments), "", ""
    except (NameError, NotImplementedError):
        raise
    except TooLateError:
        return None, "TooLateError", f"did not end within {seconds:g} s"
    except Exception as error:
        return None, type(error).__name__, f"raised {type(error).__name__}: {error}"


def _run(
    engines: LocalEngines, ranks: Sequence[int], function: Any, *arguments: Any
) -> list[tuple[Any, str, str]]:
    """Call ``function(rank, world_size, *arguments)`` on some engines at once. See ``_call``."""
    results = [
        engines.client[rank].apply_async(_call, rank, engines.n, _CALL_SECONDS, function, arguments)
        for rank in ranks
    ]
    return [result.get() for result in results]


def _try(
    engines: LocalEngines,
    where: str,
    function: Any,
    *arguments: Any,
    ranks: Sequence[int] | None = None,
) -> list[Any]:
    """The results of ``_run`` on all engines, or on some.

    Raises:
        UnsolvedError: it raised. The text begins with ``where``, and names the rank; if others
            waited in vain for that rank, not one of those.
    """
    ranks = range(engines.n) if ranks is None else ranks
    ended = _run(engines, ranks, function, *arguments)
    failed = [
        (e in _WAITED, rank, text) for rank, (_, e, text) in zip(ranks, ended, strict=True) if e
    ]
    if failed:
        _, rank, text = min(failed)
        raise UnsolvedError(f"{where}: on rank {rank}, your code {text}")
    return [value for value, _, _ in ended]


class _Here:
    """On one engine: the store of the check, a mailbox with its calls, and a bound socket."""

    store: LoggedStore
    mailbox: Any
    number: int  # the mailbox's rank
    socket: socket.socket


@cache
def _server(host: str) -> TCPStore:
    return create_tcp_store(host, 0, is_master=True)


# a server of torch may not answer a connection that opens while others close, so this one stays
@cache
def _connect(address: _Address) -> TCPStore:
    return create_tcp_store(*address)


def _serve(rank: int, world_size: int) -> _Address:
    host = defined_here("group").host
    return host, _server(host).port if rank == 0 else 0


def _store_of(address: _Address, name: str, seconds: float) -> PrefixStore:
    """On an engine: a part of the store. ``seconds`` limits waits that name no time."""
    store = PrefixStore(name, _connect(address))
    store.set_timeout(timedelta(seconds=seconds))
    return store


def _open_store(engines: LocalEngines) -> tuple[TCPStore, _Part]:
    """The store of the checks, on rank 0; and of the part for a new check, where it is."""
    address = _try(engines, "a store is opened", _serve)[0]
    return _connect(address), (address, uuid.uuid4().hex)


# 4.1

_OBJECTS: tuple[Any, ...] = ("first", None, {"layers": [1, 2]}, b"", 0)


class _LoggedStore(LoggedStore):
    """Does not write down how long it may wait, which is no request."""

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)


def _open(rank: int, world_size: int, part: _Part, seconds: float, numbers: Sequence[int]) -> None:
    """Make a mailbox of the rank ``numbers[rank]``."""
    _Here.number = numbers[rank]
    _Here.store = _LoggedStore(_store_of(*part, seconds))
    _Here.mailbox = defined_here("Mailbox")(_Here.store, _Here.number)


def _post(
    rank: int,
    world_size: int,
    sends: Sequence[tuple[int, int, Any]],
    receives: Sequence[tuple[int, int]],
    seconds: float,
    delay: float = 0.0,
) -> list[tuple[Any, int]]:
    """Make this rank's sends, by source, destination and object; then receive, by rank and source.

    Returns:
        The value that each call returned, and the calls of the store that it made.
    """
    own, box, log = _Here.number, _Here.mailbox, _Here.store.log
    calls = [partial(box.send, obj, other) for source, other, obj in sends if source == own]
    time.sleep(delay if calls else 0)
    calls += [partial(box.receive, source, seconds) for to, source in receives if to == own]
    found = []
    for call in calls:
        before = len(log)
        found.append((call(), len(log) - before))
    return found


@exercise("4.1 a mailbox that loses nothing")
def check_mailbox(engines: LocalEngines) -> str:
    """Check the class ``Mailbox`` of the engines, which have a ``group``."""
    store, part = _open_store(engines)
    before = store.num_keys()
    receiving, ranks = 0, range(engines.n)
    _try(engines, "a mailbox is made", _open, part, _SECONDS, ranks)
    pairs = [(rank, other) for rank in ranks for other in reversed(ranks) if other != rank]
    sends: list[tuple[int, int, Any]]
    sends = [(*pair, (*pair, obj)) for obj in _OBJECTS for pair in pairs]
    for _ in range(2):
        where = f"each rank sends {len(_OBJECTS)} objects to each other one"
        sent = _try(engines, where, _post, sends, [], _SECONDS)
        sending = {calls for made in sent for _, calls in made}
        require(
            sending == {1},
            f"send made {min(sending)} to {max(sending)} calls of its store; wanted: 1, a set",
        )
        where = "each rank receives what was sent to it, one of each in turn, highest rank first"
        receives = pairs * len(_OBJECTS)
        for rank, came in enumerate(_try(engines, where, _post, [], receives, _SECONDS)):
            wanted = [(other, to, obj) for obj in _OBJECTS for to, other in pairs if to == rank]
            for (seen, calls), due in zip(came, wanted, strict=True):
                require(
                    seen == due,
                    f"{where}: rank {rank} received {seen!r} from rank {due[0]}; wanted: {due!r}, "
                    f"that is (source, destination, object). Which ranks does the key name?",
                )
                receiving = max(receiving, calls)
    require(
        receiving <= 3,
        f"receive made up to {receiving} calls of its store; wanted: at most 3, one each to wait, "
        f"to read and to delete",
    )
    where = "rank 0 receives from rank 1, which sends 0.5 s later"
    found = _try(engines, where, _post, [(1, 0, "late")], [(0, 1)], _SECONDS, 0.5)
    late, calls = found[0][0]
    require(
        late == "late" and calls <= 3,
        f"{where}: it got {late!r} with {calls} calls of its store; wanted: 'late' with at most 3. "
        f"Let the store wait",
    )
    where = "rank 0 receives from rank 1 with a timeout of 0.3 s, and no message comes"
    start = time.monotonic()
    value, kind, text = _run(engines, ranks, _post, [], [(0, 1)], 0.3)[0]
    seconds = time.monotonic() - start
    require(
        kind == "TimeoutError" and "rank 1" in text and seconds < _SECONDS,
        f"{where}: after {seconds:.1f} s, on rank 0, your code {text or f'returned {value}'}; "
        f"wanted: a TimeoutError whose text names rank 1",
    )
    where = "after that timeout, rank 1 sends, and rank 0 receives again"
    came = _try(engines, where, _post, [(1, 0, "in time")], [(0, 1)], _SECONDS)[0][0][0]
    require(
        came == "in time",
        f"{where}: it got {came!r}; wanted: 'in time', the message that it waited for before",
    )
    where = "the engines play ranks 1, 12, 23 and 3; 1 sends to 23, and 12 to 3"
    _try(engines, where, _open, part, _SECONDS, (1, 12, 23, 3))
    sends = [(1, 23, "1 to 23"), (12, 3, "12 to 3")]
    where += " (put something between the numbers in a key)"
    _try(engines, where, _post, sends, [], _SECONDS)  # before a rank receives
    found = _try(engines, where, _post, [], [(23, 1), (3, 12)], _SECONDS)
    seen = [came[0][0] for came in found[2:]]
    require(seen == ["1 to 23", "12 to 3"], f"{where}: 23 and 3 received {seen}")
    left = store.num_keys() - before
    require(left == 0, f"{left} keys were left; wanted: 0. Delete what has been read")
    messages = 2 * len(_OBJECTS) * engines.n * (engines.n - 1)
    return (
        f"{messages} messages between {engines.n} ranks; a send took 1 call, a receive at most "
        f"{receiving}; 0 keys left."
    )


# 4.2


class _CountedMailbox:
    """The messages of a group, by the methods of the reader's mailbox, and their number."""

    def __init__(self, rank: int, world_size: int, store: PrefixStore) -> None:
        self.sent = 0
        self._group = StatelessProcessGroup(rank, world_size, store)

    def send(self, obj: Any, destination: int) -> None:
        self._group.send_obj(obj, destination)
        self.sent += 1

    def receive(self, source: int, timeout: float = 5.0) -> Any:
        return self._group.recv_obj(source, timeout)


def _gather(
    rank: int, world_size: int, size: int, part: _Part, seconds: float
) -> list[tuple[Any, int]]:
    """Gather three times on the first ``size`` ranks. The results, and the messages of each."""
    found: list[tuple[Any, int]] = []
    if rank < size:
        store = PrefixStore(f"{size} ranks", _store_of(*part, seconds))
        mailbox = _CountedMailbox(rank, size, store)
        for number in range(_GATHERS):
            sent, mine = mailbox.sent, {"rank": rank, "number": number}
            result = defined_here("all_gather")(mailbox, mine, rank, size, seconds)
            found.append((result, mailbox.sent - sent))
    return found


@exercise("4.2 a gather of fewer messages")
def check_all_gather(engines: LocalEngines) -> str:
    """Check the function ``all_gather`` of the engines, which have a ``group``."""
    store, part = _open_store(engines)
    before = store.num_keys()
    engines.view.execute("group.realign(5)", block=True)  # some ranks may have made calls alone
    messages = 0
    for size in range(1, engines.n + 1):
        where = f"{size} rank{'s' if size > 1 else ''}"
        found = _try(engines, where, _gather, size, part, _GATHER_SECONDS)[:size]
        for number in range(_GATHERS):
            wanted = [{"rank": rank, "number": number} for rank in range(size)]
            for rank, gathers in enumerate(found):
                require(
                    gathers[number][0] == wanted,
                    f"gather {number} of {where} returned {gathers[number][0]!r} on rank {rank}; "
                    f"wanted: {wanted}",
                )
            messages = sum(gathers[number][1] for gathers in found)
            require(
                size - 1 <= messages <= 2 * (size - 1),
                f"{where} sent {messages} messages; wanted: at most {2 * (size - 1)}, and all "
                f"objects in messages of the mailbox",
            )
    left = store.num_keys() - before
    require(left == 0, f"{left} keys were left; wanted: 0. Is each message read that is sent?")
    each = engines.n * (engines.n - 1)
    return (
        f"{engines.n} ranks took {messages} messages, in place of {each} from each to each; 0 keys "
        f"left."
    )


# 4.3

_MOST_REQUESTS = 4  # of a rank for an agreement; more than 2 are refused


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


def _proposal(name: str, rank: int, world_size: int) -> list[int]:
    """The list that a rank proposes: without the next rank, or without itself."""
    absent = rank if name == "second" else (rank + 1) % world_size
    return [other for other in range(world_size) if other != absent]


def agreement_protocol(agree: _Agree, names: tuple[str, ...] = ("agree",)) -> Any:
    """The protocol of ranks that agree on lists under these names, for ``explore``."""

    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Callable[[], object]]:
        counted = LoggedStore(LimitedStore(store, _MOST_REQUESTS * len(names)))

        def call(name: str) -> Agreed:
            before = len(counted.log)
            agreed = Agreed(agree(counted, name, _proposal(name, rank, world_size)))
            agreed.requests = len(counted.log) - before
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
    wanted = [no_call_raises, one_list, a_list_of_a_rank, nobody_waits_for_ever]
    schedules = []
    for world_size, names, properties in (
        (2, ("first", "second"), wanted),
        (3, ("first",), wanted),
        (2, ("first",), [_few_requests]),
    ):
        protocol = agreement_protocol(agree, names)
        explored = explore(protocol, world_size, properties, timeouts=1, crashes=1)
        if explored.counterexample is not None:
            told = explored.counterexample.timeline()
            raise UnsolvedError(f"with {world_size} ranks, one schedule breaks it:\n{told}")
        schedules.append(explored.schedules)
    return (
        f"In {schedules[0]:,} schedules of 2 ranks and {schedules[1]:,} of 3, of which one may "
        f"die, no rank returned another list, and none waited."
    )


def _few_requests(snapshot: Snapshot) -> bool:
    """An agreement takes a rank 1 or 2 requests."""
    return all(
        isinstance(call.value, Agreed) and 1 <= call.value.requests <= 2
        for calls in snapshot.calls
        for call in calls.values()
        if call.returned
    )


# 4.4


def _bind(rank: int, world_size: int) -> _Address:
    _Here.socket = socket.socket()
    _Here.socket.bind((defined_here("group").host, 0))
    host, port = _Here.socket.getsockname()
    return host, port


def _regroup(
    rank: int, world_size: int, agreed: list[int], addresses: dict[int, _Address], seconds: float
) -> Any:
    """Call the answer. What its group is, and what a gather there returns; None without one."""
    regroup = defined_here("regroup")
    group = regroup(list(agreed), dict(addresses), rank, _Here.socket, seconds)
    if group is None:
        return None
    with group:
        told = group.rank, group.world_size, (group.host, group.port)
        return (*told, group.all_gather_obj(f"was rank {rank}", seconds))


@exercise("4.4 a new group")
def check_regroup(engines: LocalEngines) -> str:
    """Check the function ``regroup`` of those engines that answer, which have a ``group``."""
    alive = engines.answering()
    require(len(alive) >= 3, f"only {alive} answer; wanted: at least 3 engines. Start them again")
    bound = _try(engines, "each rank binds a socket", _bind, ranks=alive)
    addresses = dict(zip(alive, bound, strict=True))
    lists = [alive[1:], [alive[0], alive[-1]], alive]
    for agreed in lists:
        where = (
            f"agreed on {agreed}, seconds={_CREATE_SECONDS} (so rank {agreed[0]} must listen on "
            f"its own socket, and the others connect to its address)"
        )
        found = _try(engines, where, _regroup, agreed, addresses, _CREATE_SECONDS, ranks=alive)
        names = [f"was rank {rank}" for rank in agreed]
        for rank, told in zip(alive, found, strict=True):
            if rank not in agreed:
                require(told is None, f"{where}: rank {rank} returned {told!r}; wanted: None")
                continue
            wanted = agreed.index(rank), len(agreed), addresses[agreed[0]], names
            require(
                told == wanted,
                f"{where}: rank {rank} has {told}; wanted: {wanted}, that is new rank, world size, "
                f"address, and what a gather returns",
            )
    return f"Groups of {', '.join(map(str, lists))}, each where its lowest rank listens."
