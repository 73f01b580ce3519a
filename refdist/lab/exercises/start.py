"""Checks of notebook 00: a token around a ring, a maximum in few messages, a group that splits.

The answers are functions that the learner defined on the engines. ``_try`` calls one there, in a
new group, and the checks compare what it returned and which messages it sent.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from refdist import MessageTimeoutError, StatelessProcessGroup
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import exercise, require
from refdist.lab.exercises.trying import TooLateError, interrupted_after

SIZES = (4, 3, 2, 1)
COLOURS = ([7, 7, 7, 2], [7, 7, 7, 2], [3, 3, 3, 3], [0, 1, 2, 3], [70_000, 10**9, 70_000, 10**9])
"""In the second call the ports of the first are occupied, and the last colours are no ports."""

BACKWARDS = ([0, 1, 0, 1], [1, 0, 0, 1])  # where the last engine is rank 0
PATIENCE_SECONDS = 10.0
"""Seconds that an answer may wait for a message. In all, a call may take twice as long."""


@dataclass
class Tried:
    """One call of the learner's function on one rank.

    Attributes:
        value: what it returned, after ``use``.
        sent: messages that it sent, by destination.
        received: messages that it received, by source.
        collectives: its barriers, gathers and broadcasts.
        error: the name of the error that it raised, if any.
        text: what happened, if there was an error.
    """

    value: Any = None
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    collectives: int = 0
    error: str = ""
    text: str = ""


@exercise("0.1 a token around the ring")
def check_ring(engines: LocalEngines, name: str = "ring_sum") -> str:
    """Groups of 4 to 1 ranks, twice each; one message from each rank, to the next one."""
    for size in SIZES:
        rounds = [[random.randint(-99, 99) for _ in range(size)] for _ in range(2)]
        for numbers, where, tried in _try(engines, name, "numbers", rounds):
            sums = [sum(numbers[: rank + 1]) for rank in range(size)]
            _require_values(tried, [sums[-1], *sums[1:]], where)
            for rank, one in enumerate(tried):
                _require_messages_only(one, rank, where)
                following, previous = (rank + 1) % size, (rank - 1) % size
                for what, seen, wanted in (
                    ("sent", _told(one.sent, "to"), {following: 1}),
                    ("received", _told(one.received, "from"), {previous: 1}),
                ):
                    told = _told(wanted if size > 1 else {}, "to" if what == "sent" else "from")
                    require(seen == told, f"{where} rank {rank} {what} {seen}; wanted was {told}")
    return "The sums are right with 4, 3, 2 and 1 ranks; each rank sent 1 message, alone none."


@exercise("0.2 the maximum")
def check_maximum(engines: LocalEngines, name: str = "maximum") -> str:
    """Groups of 4 to 1 ranks; each rank has the largest number once, and all are negative."""
    counted = []
    for size in SIZES:
        most = 2 * (size - 1)
        rounds = [
            [random.randint(-49, -1) if rank == largest else random.randint(-99, -50)
             for rank in range(size)]
            for largest in range(size)
        ]  # fmt: skip
        for numbers, where, tried in _try(engines, name, "numbers", rounds):
            _require_values(tried, [max(numbers)] * size, where)
            for rank, one in enumerate(tried):
                _require_messages_only(one, rank, where)
            sent = sum(sum(one.sent.values()) for one in tried)
            received = sum(sum(one.received.values()) for one in tried)
            require(
                sent <= most,
                f"{where} the ranks sent {sent} messages in all; allowed are {most}",
            )
            require(
                sent == received,
                f"{where} the ranks sent {sent} messages and received {received}. The next call "
                f"would take the rest for its own",
            )
        counted.append(f"{sent} messages with {size} rank{'s' if size > 1 else ''}")
    return f"All ranks have the maximum, after {', '.join(counted)}."


@exercise("0.3 one group becomes several")
def check_split(engines: LocalEngines, name: str = "split") -> str:
    """Several ways to split a group of four, and a group in which the engines count backwards.

    All new groups of a group stay open until its last round. An answer whose ports depend only on
    the colours, the ranks or the old group's port takes a port again in a second equal call.
    """
    most = 0
    for rounds, backwards in ((COLOURS, False), (BACKWARDS, True)):
        for colours, where, tried in _try(engines, name, "colours", rounds, _use, backwards):
            for rank, one in enumerate(tried):
                _require_place(one, rank, colours, where)
                require(
                    one.collectives <= 2,
                    f"{where} rank {rank} made {one.collectives} collective calls in the old "
                    f"group; allowed are 2",
                )
                most = max(most, one.collectives)
    calls = f"{most} collective call{'s' if most > 1 else ''}"
    return f"Right in {len(COLOURS + BACKWARDS)} calls, with {calls} in the old group."


def _use(new: Any, old: StatelessProcessGroup, opened: list[StatelessProcessGroup]) -> Any:
    """On an engine: use the new group and the old one. The new one stays open."""
    if not isinstance(new, StatelessProcessGroup):
        return repr(new)
    others_are_open = all(map(_is_open, opened))
    opened.append(new)
    met = new.all_gather_obj(old.rank)
    return new.rank, new.world_size, met, old.all_gather_obj(old.rank), others_are_open


def _is_open(group: StatelessProcessGroup) -> bool:
    try:
        return group.port > 0
    except ValueError:
        return False


def _require_place(one: Tried, rank: int, colours: Sequence[int], where: str) -> None:
    """Require that the new group of one rank has the right members, and that both groups work."""
    require(
        isinstance(one.value, tuple),
        f"{where} rank {rank} returned {one.value}; wanted was a StatelessProcessGroup",
    )
    own, size, met, old, others_are_open = one.value
    members = [other for other, colour in enumerate(colours) if colour == colours[rank]]
    wanted = members.index(rank), len(members)
    require(
        (own, size) == wanted,
        f"{where} rank {rank} became rank {own} of {size}; wanted was {wanted[0]} of {wanted[1]}",
    )
    require(
        others_are_open,
        f"{where} rank {rank} lost the group of an earlier call, because the new one took its "
        f"port; take a port that the system says is free",
    )
    require(
        met == members,
        f"{where} rank {rank} has ranks {met} in its new group; wanted were {members}",
    )
    require(
        old == list(range(len(colours))),
        f"{where} a gather in the old group gave {old} on rank {rank} afterwards",
    )


def _require_values(tried: Sequence[Tried], wanted: list[int], where: str) -> None:
    values = [one.value for one in tried]
    require(values == wanted, f"{where} the ranks returned {values}; wanted was {wanted}")


def _require_messages_only(one: Tried, rank: int, where: str) -> None:
    require(
        one.collectives == 0,
        f"{where} rank {rank} made {one.collectives} collective calls (barriers, gathers or "
        f"broadcasts); use send_obj and recv_obj only",
    )


def _told(counts: dict[int, int], preposition: str) -> str:
    """``1 message to rank 2``, or ``nothing``."""
    parts = [
        f"{count} message{'s' if count > 1 else ''} {preposition} rank {peer}"
        for peer, count in counts.items()
    ]
    return " and ".join(parts) or "nothing"


# How an answer is tried.

_LATE = "late"


def _plain(value: Any, _: StatelessProcessGroup, __: list[StatelessProcessGroup]) -> Any:
    """On an engine: a number, or the text of anything else."""
    return value if isinstance(value, (int, float)) else repr(value)


Use = Callable[[Any, StatelessProcessGroup, list[StatelessProcessGroup]], Any]


def _try(
    engines: LocalEngines,
    name: str,
    what: str,
    rounds: Sequence[Sequence[int]],
    use: Use = _plain,
    backwards: bool = False,
) -> Iterator[tuple[Sequence[int], str, list[Tried]]]:
    """Call the learner's function in a new group, once in each round.

    Args:
        engines: at least as many as ranks.
        name: of the function on the engines; its arguments are the group and a number.
        what: a word for the numbers.
        rounds: the numbers of all ranks, for each round.
        use: is called with what the function returned, the group, and a list for groups that are
            to stay open until the last round; its result is the value.
        backwards: whether the last engine is rank 0.

    Yields:
        For each round its numbers, the beginning of an error's text, and the call of each rank.

    Raises:
        NotImplementedError: the function is a stub.
        UnsolvedError: it raised something else in the round that would be next.
    """
    size = len(rounds[0])
    require(engines.n >= size, f"there are {engines.n} engines; {size} are needed")
    engines.offer_port(rank=size - 1 if backwards else 0)
    found = engines.run(_on_engine, name, rounds, use, backwards, PATIENCE_SECONDS)[:size]
    ranks: list[list[Tried]] = found[::-1] if backwards else found
    for number, numbers in enumerate(rounds):
        again = ", once more" if numbers in rounds[:number] else ""
        where = f"{size} rank{'s' if size > 1 else ''}, {what} {numbers}{again}:"
        failed = [(rank, calls[-1]) for rank, calls in enumerate(ranks) if calls[-1].error]
        if any(len(calls) == number + 1 and calls[-1].error for calls in ranks):
            # where a rank has failed, the others may have waited in vain
            failed.sort(key=lambda item: item[1].error in (MessageTimeoutError.__name__, _LATE))
            rank, call = failed[0]
            if call.error == NotImplementedError.__name__:
                raise NotImplementedError
            require(False, f"{where} on rank {rank}, your code {call.text}")
        yield numbers, where, [calls[number] for calls in ranks]


def _on_engine(
    engine: int,
    _: int,
    name: str,
    rounds: Sequence[Sequence[int]],
    use: Use,
    backwards: bool,
    patience: float,
) -> list[Tried]:
    """The calls of one rank, up to the first that raises."""
    size = len(rounds[0])
    if engine >= size:
        return []
    names = vars(sys.modules["__main__"])
    if name not in names:
        raise NameError(f"name {name!r} is not defined on engine {engine}")
    rank = size - 1 - engine if backwards else engine
    calls: list[Tried] = []
    opened: list[StatelessProcessGroup] = []
    with StatelessProcessGroup.create(
        names["host"], names["port"], rank, size, listen_socket=names["listen_socket"]
    ) as group:
        group.store.set_timeout(timedelta(seconds=patience))
        for numbers in rounds:
            calls.append(_call(group, names[name], numbers[rank], use, 2 * patience, opened))
            if calls[-1].error:
                break
        for new in opened:
            new.close()
    return calls


def _call(
    group: StatelessProcessGroup,
    function: Callable[[StatelessProcessGroup, int], Any],
    number: int,
    use: Use,
    seconds: float,
    opened: list[StatelessProcessGroup],
) -> Tried:
    tried = Tried()
    sent, received = dict(group.send_dst_counter), dict(group.recv_src_counter)
    collectives = _collectives(group)
    try:
        with interrupted_after(seconds):
            returned = function(group, number)
            tried.collectives = _collectives(group) - collectives
            tried.sent = _more(group.send_dst_counter, sent)
            tried.received = _more(group.recv_src_counter, received)
            tried.value = use(returned, group, opened)
    except TooLateError:
        tried.error, tried.text = _LATE, f"did not end within {seconds:g} s"
    except Exception as error:
        tried.error = type(error).__name__
        tried.text = f"raised {tried.error}: {error}"
    return tried


def _collectives(group: StatelessProcessGroup) -> int:
    broadcasts = group.broadcast_send_counter + sum(group.broadcast_recv_src_counter.values())
    return group.generation + broadcasts


def _more(counts: dict[int, int], before: dict[int, int]) -> dict[int, int]:
    return {peer: count - before[peer] for peer, count in counts.items() if count > before[peer]}
