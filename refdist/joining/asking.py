"""What a process that asks to be let in and rank 0 of the group write for each other.

Each ask has a number. The process counts itself, and writes a random token, the address that it has
reserved, and whether its torch has ``Store.barrier``. Rank 0 answers once: with the plan of the new
group, with why it does not let the process in, or that it is to ask again. The process gives up by
answering itself, and the first answer holds. All that come meet then, and are the new group if
nobody is missing.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch

from refdist.barrier import barrier_of
from refdist.barrier.plain import Barrier
from refdist.calls import Calls
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
)
from refdist.joining.connection import Address, Connection
from refdist.joining.membership import GONE
from refdist.joining.realigning import break_off
from refdist.joining.rendezvous import Joined
from refdist.joining.shrinking import Meeting
from refdist.joining.wires import OWN
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS, NoSeals, Seals, is_sealed

_GIVEN_UP = "it had given up"
_ASK_AGAIN = "rank 0 could not read who asks"
_MOST = 256  # asks that one call looks at: the count of them carries no tag, and a stranger may add


class Ask(NamedTuple):
    """What rank 0 knows of a process that asks: its number, its token, and its reserved address."""

    number: int
    token: str
    address: Address | None


class Plan(NamedTuple):
    """The group that is to follow, as rank 0 tells it to each rank.

    Attributes:
        rank: of the one that is told.
        world_size: of the new group.
        place: what the keys of its first era begin with.
        era: of the new group.
        prefix: what its keys begin with.
        addresses: that its ranks have reserved.
        tokens: from which, and from the secret, its seals come.
    """

    rank: int
    world_size: int
    place: str
    era: int
    prefix: str
    addresses: list[Any]
    tokens: list[str]

    @classmethod
    def parse(cls, text: bytes, who: str) -> Self:
        """The plan that somebody has told; ``who`` begins the text of an error.

        Raises:
            MessageError: it is none.
        """
        told, kinds = _loaded(text), [int, int, str, int, str, list, list]
        if not isinstance(told, list) or list(map(type, told)) != kinds:
            raise MessageError(f"{who} told {str(told)[:40]!r}, which is no plan of a group")
        return cls(*told)

    def barrier(self, client: StoreClient, rank: int, secret: bytes | None) -> Barrier:
        """The barrier of the new group."""
        barrier = barrier_of(client.at(self.prefix), rank, self.world_size)
        barrier.seals = _seals(secret, "grown", *self.tokens)
        return barrier

    def meet(
        self, client: StoreClient, rank: int, secret: bytes | None, deadline: Deadline
    ) -> None:
        """Wait until all have come. If one is interrupted, nobody is let in.

        Raises:
            BarrierError: on every rank, when one did not come in time.
            CancelledWaitError: on one that is interrupted before all have come.
        """
        place = keys.meeting(self.prefix, self.era, 0)
        seals = _seals(secret, "grown", *self.tokens).below(place)
        meeting = Meeting(client.at(place), rank, self.world_size, seals)
        try:
            deadline.check()
            meeting.wait(deadline)
        except CancelledWaitError as error:
            break_off(meeting, f"of {error}")  # it comes to another one, if at all
            raise

    def reserved(self) -> tuple[Address | None, ...]:
        """The addresses, as a group has them."""
        return tuple(one and (str(one[0]), int(one[1])) for one in self.addresses)


def ask(connection: Connection, where: str, secret: bytes | None, deadline: Deadline) -> Joined:
    """Ask until this process is let in. See ``Admitting.join``."""
    client = connection.client
    _check_secret(client, where, secret)
    while True:
        number = client.add(keys.asked(), 1) - 1
        about_me = [os.urandom(16).hex(), connection.reserve(), client.has_barrier]
        key = keys.ask(number)
        client.set(key, _seals(secret, "ask").seal(key, json.dumps(about_me).encode()))
        plan = _answer(client, number, where, secret, deadline)
        if plan is None:
            continue
        if about_me[0] not in plan.tokens:
            # else someone without the secret could play an earlier admission again
            raise AuthenticationError(f"{keys.answer(number)}: is the answer to another ask")
        try:
            plan.meet(client, plan.rank, secret, deadline)
            break
        except BarrierError as error:
            if deadline.remaining() == 0:
                raise GroupCreationError(
                    f"the group on {where} let this process in, but {error}", error.missing
                ) from error
    connection.root = barrier = plan.barrier(client, plan.rank, secret)
    calls = Calls(barrier.rank, barrier.store)
    return Joined(OWN, barrier, calls, connection, secret, plan.reserved(), plan.place, plan.era)


def _answer(
    client: StoreClient, number: int, where: str, secret: bytes | None, deadline: Deadline
) -> Plan | None:
    """Wait for the answer to an ask, which is None if it has to be made again.

    Takes the ask back if none comes. An interrupt that is late for that is left to the meeting.
    """
    key, seals = keys.answer(number), _seals(secret, "answer")
    given_up = seals.seal(key, json.dumps(_GIVEN_UP).encode())
    try:
        sealed = client.wait_for_value(key, deadline) or client.decide(key, given_up)
    except CancelledWaitError:
        sealed = client.decide(key, given_up)
        if sealed == given_up:
            raise
    if sealed == given_up:
        raise GroupCreationError(
            f"no group on {where} let this process in within {deadline.allowed:g} s; do all its "
            f"ranks call admit?"
        )
    told = seals.unseal(key, sealed)
    why = _loaded(told)
    if why == _ASK_AGAIN:
        return None
    if isinstance(why, str):
        raise GroupCreationError(f"the group on {where} does not let this process in: {why}")
    return Plan.parse(told, f"the group on {where}")


def unanswered(connection: Connection, secret: bytes | None) -> Iterator[Ask]:
    """The asks that have no answer.

    One of a torch that does not fit gets its answer here; and one that cannot be read, because a
    process has died before it wrote it, or a stranger did. So they are not looked at again.
    """
    client, seals = connection.client, _seals(secret, "ask")
    first = connection.answered
    for number in range(first, min(client.add(keys.asked(), 0), first + _MOST)):
        key = keys.ask(number)
        if client.check([keys.answer(number)]):
            connection.answered += number == connection.answered
            continue
        try:
            written = seals.unseal(key, client.peek(key) or b"")
            token, address, has_barrier = json.loads(written)
            address = address and (str(address[0]), int(address[1]))
        except (AuthenticationError, ValueError, TypeError, LookupError, RecursionError):
            why = _ASK_AGAIN
        else:
            if has_barrier is client.has_barrier:
                yield Ask(number, str(token), address)
                continue
            why = f"torch {torch.__version__} here and its own do not both have Store.barrier"
        answer(client, number, why, secret)


def answer(client: StoreClient, number: int, told: Plan | str, secret: bytes | None) -> None:
    """Answer an ask, unless the process has given up."""
    key = keys.answer(number)
    client.decide(key, _seals(secret, "answer").seal(key, json.dumps(told).encode()))


def _check_secret(client: StoreClient, where: str, secret: bytes | None) -> None:
    """Raise GroupCreationError if rank 0 has told the store of another secret."""
    key = keys.member(0)
    written = client.peek(key)
    if written is None or written == GONE:
        return
    if is_sealed(written) != (secret is not None):
        has, lacks = ("group", "process") if secret is None else ("process", "group")
        raise GroupCreationError(
            f"the group on {where}: the {has} has a secret, and the {lacks} has none; give all the "
            f"same"
        )
    try:
        _seals(secret, "member").unseal(key, written)
    except AuthenticationError as error:
        raise GroupCreationError(
            f"this process has another secret than the group on {where} ({error})"
        ) from error


def _seals(secret: bytes | None, purpose: str, *context: str) -> NoSeals:
    return NO_SEALS if secret is None else Seals(secret, purpose, *map(str.encode, context))


def _loaded(text: bytes) -> Any:
    """What a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
