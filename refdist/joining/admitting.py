"""How a process that restarted, or a new one, is let into a group that is running.

It cannot let itself in: the others are in the middle of their calls, and their counters say what
comes next. So it asks, and waits. When all ranks of the group call ``admit``, rank 0 tells all of
them who asks, and they pass a barrier together with those. If all come, they are a new group, and
else the old one goes on. What was sent to an earlier life of a process belongs to an older group.
"""

import json
import os
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch

from refdist.barrier import barrier_of
from refdist.barrier.plain import Barrier
from refdist.calls import Calls
from refdist.checks import check_seconds
from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
    name_ranks,
)
from refdist.joining.connection import Address, Connection
from refdist.joining.membership import GONE
from refdist.joining.realigning import break_off
from refdist.joining.rendezvous import Joined
from refdist.joining.shrinking import Meeting, Shrinking
from refdist.joining.splitting import made
from refdist.joining.wires import OWN
from refdist.objects.encoding import loads_of
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import connect
from refdist.store.seals import NO_SEALS, NoSeals, Seals, is_sealed, secret_from

_GIVEN_UP = "it had given up"
_MOST = 256  # asks that one call looks at: the count of them carries no tag, and a stranger may add


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
    def parse(cls, told: Any, who: str) -> Self:
        """The plan that somebody has told; ``who`` begins the text of an error.

        Raises:
            MessageError: it is none.
        """
        kinds = [int, int, str, int, str, list, list]
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
            meeting.wait(deadline)
        except CancelledWaitError as error:
            break_off(meeting, f"of {error}")  # it comes to another one, if at all
            raise

    def reserved(self) -> tuple[Address | None, ...]:
        """The addresses, as a group has them."""
        return tuple(one and (str(one[0]), int(one[1])) for one in self.addresses)


class Admitting(Shrinking):
    """The methods with which a group takes in other processes."""

    @classmethod
    def join(
        cls,
        host: str,
        port: int,
        timeout: float = 300.0,
        data_expiration_seconds: int = 3600,
        *,
        secret: bytes | str | None = None,
        messages: str = "pickle",
    ) -> Self:
        """Ask a running group to let this process in, and wait until all its ranks call ``admit``.

        Args:
            host: of the group's store, which the group has as attributes ``host`` and ``port``.
            port: of the group's store.
            timeout: seconds to wait, for all.
            data_expiration_seconds: as in ``create``.
            secret: that of the group; None for REFDIST_SECRET of the environment.
            messages: as in ``create``.

        Returns:
            The group, in which this process has the last rank, or one of the last.

        Raises:
            ValueError: an argument is out of its range.
            OSError: the host does not resolve.
            MessageError, AuthenticationError: a stranger has answered.
            GroupCreationError: nobody let it in in time. Or soon: it has another secret, or a torch
                that does not fit.
            StoreConnectionError: no store answered in time, or it ended.
        """
        if check_seconds("timeout", timeout) <= 0:
            raise ValueError(f"timeout={timeout}: must be above 0 seconds")
        loads_of(messages)
        known, secret = secret_from(secret), None  # no traceback shows it
        deadline, calls = Deadline(timeout, whole=True), Calls(-1)

        def run() -> Joined:
            store = connect(
                host, port, deadline, timeout=timedelta(seconds=timeout), wait_for_workers=False
            )
            calls.client = StoreClient(store)
            calls.client.limit(deadline.remaining())
            return ask(Connection(calls.client), f"{host}:{port}", known, deadline)

        try:
            joined = calls.run("join", deadline, run)
        except BaseException:
            if calls.client is not None:
                calls.client.close()
            raise
        group: Self = made(cls, joined, None, data_expiration_seconds, messages)
        return group

    def admit(self, timeout: float = 30.0) -> Self:
        """Let in the processes that have asked for it. All ranks of the group call this.

        If there are any, they get the ranks behind the present ones, in a new group on the same
        store, and the old one is ended on this rank. If there is none, this is a barrier.

        Args:
            timeout: in seconds, of each phase of two barriers: one of this group, and one of the
                new group.

        Returns:
            The new group; or this one, if nobody asks.

        Raises:
            BarrierError: a rank of this group did not call it in time, as ``barrier``.
            MessageError: a rank called something else meanwhile.
            GroupCreationError: one that had asked did not come, or a rank has died meanwhile, or
                was interrupted; ``missing`` has its rank in the new group. This one goes on as it
                was.
            ValueError: the group speaks vLLM's protocol, or was split off another.
        """
        self._check_own("admit")
        self._calls.check_open("admit")
        if not self._calls.kept.get("next") and self._connection.root is not self._barrier:
            raise ValueError("admit: this group was split off another; call it on that one")
        deadline = Deadline(timeout)
        group: Self = self._calls.run("admit", deadline, self._admit, deadline, kept="next")
        if group is not self:
            self.end()
        return group

    def _admit(self, deadline: Deadline) -> Self:
        """The group that follows, or this one. An interrupt leaves it to the next call."""
        kept = self._calls.kept
        if kept.setdefault("next") is None:
            plan = self._planned(deadline)
            if plan is not None:
                kept["next"] = self._grown(plan, deadline)
        return kept["next"] or self

    def _planned(self, deadline: Deadline) -> Plan | None:
        """Learn from rank 0, in a gather, which group is to follow; None if nobody has asked.

        Those that have asked are told behind it: if it breaks, nobody comes to meet them.
        """
        barrier, joined = self._barrier, self._joined
        generation, told, asks = barrier.generation, b"null", []
        if self.rank == 0 and (asks := list(unanswered(self._connection, joined.secret))):
            mine = Plan(
                0, self.world_size + len(asks), joined.place, joined.era + 1,
                keys.era(joined.place, joined.era + 1, f"grown/{generation}"),
                [*(joined.addresses or [None] * self.world_size), *(own for _, _, own in asks)],
                [os.urandom(16).hex(), *(token for _, token, _ in asks)],
            )  # fmt: skip
            told = json.dumps(mine).encode()
        try:
            told = barrier.gather(told, deadline)[0]
        except BarrierError as error:
            if not error.completed or not asks:
                raise  # else the others have gone on to the next barrier
        if told == b"null":
            return None
        who = f"gather {generation}: did rank 0 call something else than admit? It"
        plan = Plan.parse(_loaded(told), who)
        for place, (number, _, _) in enumerate(asks):
            own = json.dumps(plan._replace(rank=self.world_size + place)).encode()
            key = keys.answer(number)
            # one that has given up meanwhile will be missed
            self._connection.client.decide(key, _seals(joined.secret, "answer").seal(key, own))
        return plan

    def _grown(self, plan: Plan, deadline: Deadline) -> Self:
        """Meet those that asked, and make the group of all."""
        connection, secret = self._connection, self._joined.secret
        deadline.restart()
        try:
            plan.meet(connection.client, self.rank, secret, deadline)
        except BarrierError as error:
            raise GroupCreationError(
                f"nobody was let in, and the group goes on as it was: of the {plan.world_size} "
                f"ranks of the new one, {name_ranks(error.missing)} did not come ({error})",
                error.missing,
            ) from error
        barrier = plan.barrier(connection.client, self.rank, secret)
        return self._followed_by(barrier, connection=connection, addresses=plan.reserved())


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
) -> Plan:
    """Wait for the answer to an ask. Take the ask back if none comes."""
    key, seals = keys.answer(number), _seals(secret, "answer")
    given_up = seals.seal(key, json.dumps(_GIVEN_UP).encode())
    try:
        answer = client.wait_for_value(key, deadline) or client.decide(key, given_up)
    except CancelledWaitError:
        client.decide(key, given_up)
        raise
    if answer == given_up:
        raise GroupCreationError(
            f"no group on {where} let this process in within {deadline.allowed:g} s; do all its "
            f"ranks call admit?"
        )
    told = _loaded(seals.unseal(key, answer))
    if isinstance(told, str):
        raise GroupCreationError(f"the group on {where} does not let this process in: {told}")
    return Plan.parse(told, f"the group on {where}")


def _loaded(text: bytes) -> Any:
    """What a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def unanswered(connection: Connection, secret: bytes | None) -> Any:
    """The asks that have no answer: number, token and address of each.

    One of a torch that does not fit gets its answer here. One that nobody with the secret wrote is
    passed over.
    """
    client = connection.client
    first = connection.answered
    for number in range(first, min(client.add(keys.asked(), 0), first + _MOST)):
        key, answer = keys.ask(number), keys.answer(number)
        written = client.peek(key)
        if written is None:
            continue
        if client.check([answer]):
            connection.answered += number == connection.answered
            continue
        try:
            token, address, has_barrier = json.loads(_seals(secret, "ask").unseal(key, written))
            address = address and (str(address[0]), int(address[1]))
        except (AuthenticationError, ValueError, TypeError, LookupError, RecursionError):
            continue
        if has_barrier is client.has_barrier:
            yield number, str(token), address
            continue
        why = f"torch {torch.__version__} here and its own do not both have Store.barrier"
        seals = _seals(secret, "answer")
        client.decide(answer, seals.seal(answer, json.dumps(why).encode()))


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
