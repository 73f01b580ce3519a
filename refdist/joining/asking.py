"""The asks of processes that want to be let into a group, and the answers of its rank 0.

Each ask has a number. The process counts itself, and writes a random token, the address that it has
reserved, and whether its torch has ``Store.barrier``. Rank 0 answers once: the answer is the plan
of the new group, or a reason to refuse, or "ask again". A process that gives up answers itself, and
the first answer holds. All that have the plan meet then, and are the new group if all come.

With a secret, asks and answers carry tags. These depend on a random text of rank 0, so that those
of an earlier group are refused. The count of asks has none: a stranger who spoils it shuts all out.
"""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch

from refdist.barrier import barrier_of
from refdist.barrier.plain import Barrier
from refdist.calls import Calls
from refdist.checks import MOST_SECONDS
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
)
from refdist.joining.connection import Address, Connection, address_of
from refdist.joining.membership import seals_of_members, unseal_rank_0
from refdist.joining.realigning import break_off
from refdist.joining.rendezvous import Joined
from refdist.joining.shrinking import Meeting
from refdist.joining.wires import OWN
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS, NoSeals, Seals

_GIVEN_UP = "it had given up"
_ASK_AGAIN = "rank 0 could not read who asks"
_MOST = 256  # asks that one call looks at: the count of them carries no tag, and a stranger may add


class Ask(NamedTuple):
    """A process that asks, as rank 0 knows it: its number, its token, and its reserved address."""

    number: int
    token: str
    address: Address | None


class Plan(NamedTuple):
    """The group that is to follow, as rank 0 tells it to each rank.

    Attributes:
        rank: of the one that is told.
        place: what the keys of its first era begin with.
        era: of the new group.
        prefix: what its keys begin with.
        addresses: that its ranks have reserved, in rank order.
        tokens: one of each of its ranks, or more: its seals come from them, and from the secret.
        seconds: that the store waits, where a call names no others.
    """

    rank: int
    place: str
    era: int
    prefix: str
    addresses: list[Address | None]
    tokens: list[str]
    seconds: float

    @classmethod
    def parse(cls, text: bytes, who: str) -> Self:
        """The plan that somebody has told; ``who`` begins the text of an error.

        Raises:
            MessageError: it is none.
        """
        told, kinds = _loaded(text), [int, str, int, str, list, list, float]
        if isinstance(told, list) and list(map(type, told)) == kinds:
            plan = cls(*told)
            fits = 0 <= plan.rank < plan.world_size and 0 < plan.seconds < MOST_SECONDS
            if fits and all(isinstance(token, str) for token in plan.tokens):
                return plan._replace(addresses=list(map(address_of, plan.addresses)))
        raise MessageError(f"{who} told {str(told)[:40]!r}, which is no plan of a group")

    @property
    def world_size(self) -> int:
        """Of the new group."""
        return len(self.addresses)

    def seals(self, secret: bytes | None) -> NoSeals:
        """The seals of the new group."""
        return _seals(secret, "grown", *map(str.encode, self.tokens))

    def barrier(self, client: StoreClient, secret: bytes | None) -> Barrier:
        """The barrier of the new group."""
        barrier = barrier_of(client.at(self.prefix), self.rank, self.world_size)
        barrier.seals = self.seals(secret)
        return barrier

    def meeting(self, client: StoreClient, secret: bytes | None) -> Meeting:
        """The barrier at which all of them meet before there is a group."""
        place = keys.meeting(self.prefix, self.era, 0)
        seals = self.seals(secret).below(place)
        return Meeting(client.at(place), self.rank, self.world_size, seals)

    def meet(self, client: StoreClient, secret: bytes | None, deadline: Deadline) -> None:
        """Wait until all have come. If one is interrupted, nobody is let in.

        Raises:
            BarrierError: on every rank, when one did not come in time.
            CancelledWaitError: on one that is interrupted before all have come.
        """
        meeting = self.meeting(client, secret)
        try:
            deadline.check()
            meeting.wait(deadline)
        except CancelledWaitError as error:
            break_off(meeting, f"of {error}", [self.rank])  # it comes to another one, if at all
            raise


def ask(connection: Connection, where: str, secret: bytes | None, deadline: Deadline) -> Joined:
    """Ask until this process is let in. See ``Admitting.join``."""
    client = connection.client
    try:
        seals = seals_of_asks(client, secret, where)
    except AuthenticationError as error:
        raise GroupCreationError(f"this process {error}") from error
    while True:
        number = client.add(keys.asked(), 1) - 1
        about_me = [os.urandom(16).hex(), connection.reserve(), client.has_barrier]
        key = keys.ask(number)
        client.set(key, seals.seal(key, json.dumps(about_me).encode()))
        plan = _answer(client, number, where, seals, deadline)
        if plan is None:
            continue
        if about_me[0] not in plan.tokens:
            # else someone without the secret could play an earlier admission again
            raise AuthenticationError(f"{keys.answer(number)}: is the answer to another ask")
        try:
            plan.meet(client, secret, deadline)
            break
        except BarrierError as error:
            if deadline.remaining() == 0:
                raise GroupCreationError(
                    f"the group on {where} let this process in, but {error}", error.missing
                ) from error
    client.store.set_timeout(timedelta(seconds=plan.seconds))
    connection.root = barrier = plan.barrier(client, secret)
    addresses, calls = tuple(plan.addresses), Calls(barrier.rank, barrier.store)
    return Joined(OWN, barrier, calls, connection, secret, addresses, plan.place, plan.era)


def _answer(
    client: StoreClient, number: int, where: str, seals: NoSeals, deadline: Deadline
) -> Plan | None:
    """Wait for the answer to an ask, which is None if it has to be made again.

    Takes the ask back if none comes. An interrupt that is late for that is left to the meeting.
    """
    key = keys.answer(number)
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
    if why == _ASK_AGAIN and deadline.remaining() > 0:
        return None
    if isinstance(why, str):
        raise GroupCreationError(f"the group on {where} does not let this process in: {why}")
    return Plan.parse(told, f"the group on {where}")


def unanswered(connection: Connection, seals: NoSeals) -> Iterator[Ask]:
    """The asks that have no answer.

    One of a torch that does not fit gets its answer here; and one that cannot be read, because a
    process has died before it wrote it, or a stranger did. So they are not looked at again.
    """
    client, first = connection.client, connection.answered
    for number in range(first, min(client.add(keys.asked(), 0), first + _MOST)):
        key = keys.ask(number)
        if client.check([keys.answer(number)]):
            if number == connection.answered:
                connection.answered += 1
            continue
        try:
            match json.loads(seals.unseal(key, client.peek(key) or b"")):
                case [str(token), address, bool(has_barrier)]:
                    asked = Ask(number, token, address_of(address))
                case _:
                    raise MessageError("no ask")
        except (AuthenticationError, MessageError, ValueError, RecursionError):
            why = _ASK_AGAIN
        else:
            if has_barrier is client.has_barrier:
                yield asked
                continue
            why = f"torch {torch.__version__} here and its own do not both have Store.barrier"
        answer(client, number, why, seals)


def answer(client: StoreClient, number: int, told: Plan | str, seals: NoSeals) -> bool:
    """Answer an ask. Whether the process had not given up."""
    key = keys.answer(number)
    sealed = seals.seal(key, json.dumps(told).encode())
    return client.decide(key, sealed) == sealed


def seals_of_asks(client: StoreClient, secret: bytes | None, where: str = "") -> NoSeals:
    """The seals of asks and answers.

    Raises:
        AuthenticationError: rank 0 has told the store of another secret.
    """
    written = client.peek(keys.member(0))
    about_rank_0 = written and unseal_rank_0(written, seals_of_members(secret), where)
    return _seals(secret, "ask", about_rank_0 or b"")


def _seals(secret: bytes | None, purpose: str, *context: bytes) -> NoSeals:
    return NO_SEALS if secret is None else Seals(secret, purpose, *context)


def _loaded(text: bytes) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
