"""Checks of notebook 04: a mailbox, a gather, an agreement of survivors, a job that goes on.

All but the third run the answer on the engines, where the notebook has defined it. ``_try`` makes
each step one call of all engines, which ends in time, so an answer that fails leaves no engine
waiting for another. Messages go through a store of the checks, so none stay in that of the group.
"""

import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from typing import Any, cast
from unittest.mock import patch

from torch.distributed import HashStore, PrefixStore, TCPStore

from refdist import GroupCreationError, StatelessProcessGroup, create_tcp_store
from refdist.exploration import (
    Call,
    Protocol,
    Snapshot,
    explore,
    nobody_waits_for_ever,
    within,
)
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
from refdist.store.listening import listen

_SECONDS = 3.0  # for a message that has been sent before
_GATHER_SECONDS = 5.0
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
    "UnsolvedError",
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
    except UnsolvedError as error:
        return None, "UnsolvedError", str(error)
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
    played: Sequence[int] | None = None,
) -> list[Any]:
    """The results of ``_run`` on all engines, or on some, which may play other ranks.

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
        raise UnsolvedError(
            f"{where}: on rank {played[rank] if played else rank}, your code {text}"
        )
    return [value for value, _, _ in ended]


class _Here:
    """On one engine: the store of the check, a mailbox, and a group with its socket."""

    store: LoggedStore
    mailbox: Any
    number: int  # the mailbox's rank
    socket: socket.socket | None
    group: StatelessProcessGroup


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


def _send_a_lock(rank: int, world_size: int) -> bool:
    """On rank 1: send what cannot be sent, and then what can. Whether the first raised."""
    failed = False
    if rank == 1:
        try:
            _Here.mailbox.send(threading.Lock(), 0)
        except Exception:
            failed = True
        _Here.mailbox.send("after it", 0)
    return failed


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
    where = "rank 1 sends a lock, which cannot be pickled, and then 'after it', to rank 0"
    failed = _try(engines, where, _send_a_lock)[1]
    require(failed, f"{where}: send of the lock returned; wanted: the error of pickle")
    value, _, text = _run(engines, ranks, _post, [], [(0, 1)], _SECONDS)[0]
    require(
        value and value[0][0] == "after it",
        f"{where}: on rank 0, your code {text or f'received {value[0][0]!r}'}; wanted: 'after it'. "
        f"Count a message only when it is sent",
    )
    where = "the engines play ranks 1, 12, 23 and 3; 1 sends to 23, and 12 to 3"
    played = (1, 12, 23, 3)
    _try(engines, where, _open, part, _SECONDS, played)
    sends = [(1, 23, "1 to 23"), (12, 3, "12 to 3")]
    where += " (put something between the numbers in a key)"
    _try(engines, where, _post, sends, [], _SECONDS, played=played)  # before a rank receives
    found = _try(engines, where, _post, [], [(23, 1), (3, 12)], _SECONDS, played=played)
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
    *here, absent = range(engines.n)
    where = f"rank {absent} does not come, and timeout is 0.3 s"
    start = time.monotonic()
    ended = _run(engines, here, _gather, engines.n, _open_store(engines)[1], 0.3)
    seconds = time.monotonic() - start
    for rank, (value, kind, text) in zip(here, ended, strict=True):
        require(
            kind == "MessageTimeoutError" and seconds < _SECONDS,
            f"{where}: on rank {rank}, your code {text or f'returned {value}'}, after "
            f"{seconds:.1f} s; wanted: the error of receive, which is to wait for timeout seconds",
        )
    each = engines.n * (engines.n - 1)
    return (
        f"{engines.n} ranks took {messages} messages, in place of {each} from each to each; 0 keys "
        f"left."
    )


# 4.3

_MOST_REQUESTS = 20  # of a rank for an agreement; a right answer makes fewer
_WIDTH = 2_000  # most states after each step; a right answer has fewer
_AGREE_SECONDS = 2.0

_Survivors = Callable[..., list[int]]
_PATIENCE = 0.25  # seconds, which the check gives in place of 1


def one_list(snapshot: Snapshot) -> bool:
    """All ranks that return have the same list."""
    return len({tuple(listed) for _, listed in _lists(snapshot)}) <= 1


def all_have_come(snapshot: Snapshot) -> bool:
    """Each rank on the list has come."""
    return all(set(listed) <= set(calls) for calls, listed in _lists(snapshot))


def left_out_for_a_reason(snapshot: Snapshot) -> bool:
    """Each rank that is not on the list has died, or a wait has ended too early."""
    ranks = set(range(len(snapshot.calls)))
    if any(call.early for calls in snapshot.calls for call in calls.values()):
        return True
    return all(ranks - set(listed) <= snapshot.dead for _, listed in _lists(snapshot))


def all_had_time(snapshot: Snapshot) -> bool:
    """Each rank that is not on the list had ``seconds`` to come."""
    ranks = set(range(len(snapshot.calls)))
    return all(
        set(listed) == ranks or max(call.seconds for call in calls.values()) >= _PATIENCE
        for calls, listed in _lists(snapshot)
    )


def _lists(snapshot: Snapshot) -> list[tuple[dict[int, Call], list[int]]]:
    """Each list that a rank has returned, after the calls of all ranks in that agreement."""
    return [
        (calls, cast(list[int], call.value))
        for calls in snapshot.collective.values()
        for call in calls.values()
        if call.returned
    ]


def _agreement(survivors: _Survivors, *seconds: float) -> Protocol:
    def protocol(store: Any, rank: int, world_size: int) -> dict[str, Callable[[], object]]:
        limited = LimitedStore(store, _MOST_REQUESTS)
        return {"agreement": lambda: _checked(survivors(limited, rank, world_size, *seconds))}

    return protocol


def _checked(found: Any) -> list[int]:
    ranks = isinstance(found, list) and all(type(rank) is int for rank in found)
    require(ranks, f"returned {found!r}; wanted: a list of ranks")
    require(found == sorted(set(found)), f"returned {found}; wanted: each rank once, in order")
    return cast(list[int], found)


@exercise("4.3 one list of survivors")
def check_survivors(survivors: _Survivors) -> str:
    """Check the function in schedules of 1 to 3 ranks with timeouts and a death."""
    alone = HashStore()
    alone.set_timeout(timedelta(seconds=1))
    found = _checked(survivors(LimitedStore(alone, _MOST_REQUESTS), 0, 1))
    require(found == [0], f"a rank alone got {found}; wanted: [0]")
    properties = [
        no_call_raises,
        one_list,
        all_have_come,
        left_out_for_a_reason,
        nobody_waits_for_ever,
        within(_AGREE_SECONDS),
    ]
    schedules = {2: 0, 3: 0}

    def explore_all(world_size: int, timeouts: int, crashes: int, *seconds: float) -> None:
        explored = explore(
            _agreement(survivors, *seconds), world_size, properties,
            timeouts=timeouts, crashes=crashes, width=_WIDTH,
        )  # fmt: skip
        if explored.counterexample is not None:
            told = explored.counterexample.timeline()
            given = "".join(f" and {one:g} seconds" for one in seconds)
            raise UnsolvedError(f"with {world_size} ranks{given}, one schedule breaks it:\n{told}")
        schedules[world_size] += explored.schedules

    for size, timeouts, crashes in ((2, 0, 0), (2, 2, 1), (3, 0, 1), (3, 1, 0)):
        explore_all(size, timeouts, crashes)
    properties = [no_call_raises, all_had_time, within(2 * _PATIENCE)]
    explore_all(2, 1, 1, _PATIENCE)
    return (
        f"In {schedules[2]:,} schedules of 2 ranks and {schedules[3]:,} of 3, with a death or "
        f"waits that end too early, no two ranks had different lists."
    )


# 4.4

_GO_ON_SECONDS = 1.5
_ROUNDS = 4  # a newcomer is in within 4 times that


def _bind(rank: int, world_size: int, root: int) -> _Address:
    """Bind a socket for a store on the rank that is to host it."""
    host = defined_here("group").host
    _Here.socket = listen(host, 0) if rank == root else None
    return host, _Here.socket.getsockname()[1] if _Here.socket is not None else 0


def _form(rank: int, world_size: int, ranks: list[int], address: _Address) -> None:
    listener = _Here.socket
    _Here.group = StatelessProcessGroup.create(
        *address, ranks.index(rank), len(ranks), store_timeout=10, listen_socket=listener
    )
    if listener is not None:
        listener.close()


def _go_on(rank: int, world_size: int, seconds: float, wanted: int = 0) -> tuple[bool, list[int]]:
    """Call the answer once, or until the group has the wanted number of ranks.

    Returns:
        Whether the group is the one from before, and its engines in the order of their ranks.
    """
    before, end = _Here.group, time.monotonic() + _ROUNDS * seconds
    while True:
        group = defined_here("go_on")(_Here.group, seconds)
        if not isinstance(group, StatelessProcessGroup):
            raise TypeError(f"returned {group!r}, and not a group")
        _Here.group = group
        if wanted in (0, group.world_size) or time.monotonic() > end:
            return group is before, _listed(group, rank, seconds)


def _listed(group: StatelessProcessGroup, rank: int, seconds: float) -> list[int]:
    """The engines of a group."""
    try:
        return group.all_gather_obj(rank, seconds)
    except Exception as error:
        raise UnsolvedError(f"returned a group that does not work: {error}") from error


def _go_on_without_the_newcomer(rank: int, world_size: int, seconds: float) -> Any:
    error = GroupCreationError("nobody was let in, and the group goes on as it was")
    with patch.object(_Here.group, "admit", side_effect=error):
        return _go_on(rank, world_size, seconds)


def _join_or_go_on(
    rank: int, world_size: int, seconds: float, newcomer: int, address: _Address, wanted: int
) -> Any:
    if rank != newcomer:
        return _go_on(rank, world_size, seconds, wanted)
    _Here.group = StatelessProcessGroup.join(*address, timeout=_ROUNDS * seconds)
    return False, _listed(_Here.group, rank, seconds)


def _address(rank: int, world_size: int) -> _Address:
    return _Here.group.host, _Here.group.port


def _end(rank: int, world_size: int) -> None:
    _Here.group.end()


@exercise("4.4 a job that goes on")
def check_go_on(engines: LocalEngines) -> str:
    """Check the function ``go_on`` of those engines that answer, which have a ``group``."""
    alive = engines.answering()
    require(len(alive) >= 3, f"only {alive} answer; wanted: at least 3 engines. Start them again")
    first, *others = alive
    *early, late = alive
    address = _try(engines, "a socket is bound", _bind, first, ranks=alive)[0]
    _try(engines, "a group is formed", _form, alive, address, ranks=alive)
    seconds = _GO_ON_SECONDS

    where = "all call go_on, and nobody asks"
    _require_group(engines, where, alive, True, _go_on, seconds)

    where = f"rank {late} does not call go_on"
    _require_group(engines, where, early, False, _go_on, seconds)
    where = f"rank {late} calls go_on when the others have gone on without it"
    _, kind, text = _run(engines, [late], _go_on, seconds)[0]
    require(
        kind == "GroupCreationError",
        f"{where}: your code {text or 'returned'}; wanted: the GroupCreationError of shrink",
    )

    where = f"rank {late} asks to be let in, and the others call go_on"
    address = _try(engines, where, _address, ranks=early)[0]
    asks = _join_or_go_on, seconds, late, address, len(alive)
    _require_group(engines, where, alive, False, *asks)

    where = "a process has asked, and does not come, so admit raises a GroupCreationError"
    _require_group(engines, where, alive, True, _go_on_without_the_newcomer, seconds)

    where = f"rank 0 of the group ends, and with it the store; that is engine {first}"
    _try(engines, where, _end, ranks=[first])
    _require_group(engines, where, others, False, _go_on, seconds)
    _try(engines, "the group is ended", _end, ranks=others)
    return f"Groups of the engines {alive}, {early}, {alive} again and {others}."


def _require_group(
    engines: LocalEngines, where: str, ranks: list[int], same: bool, function: Any, *arguments: Any
) -> None:
    """Call a function on these engines, after which they are to be a group, all with one list."""
    found = _try(engines, where, function, *arguments, ranks=ranks)
    for rank, (is_same, listed) in zip(ranks, found, strict=True):
        require(
            listed == ranks,
            f"{where}: the group of rank {rank} has the engines {listed}; wanted: {ranks}",
        )
        require(
            is_same or not same, f"{where}: rank {rank} got another group; wanted: the same one"
        )
