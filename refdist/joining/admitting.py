"""How a process that restarted, or a new one, is let into a group that is running.

It cannot let itself in: the others are in the middle of their calls, and their counters say what
comes next. So it asks, and waits. When all ranks of the group call ``admit``, rank 0 tells all of
them who asks, and they pass a barrier together with those. If all come, they are a new group, and
else the old one goes on. What was sent to an earlier life of a process belongs to an older group.
"""

import json
import os
from contextlib import suppress
from datetime import timedelta
from typing import Self

from refdist.calls import Calls
from refdist.checks import check_seconds
from refdist.deadline import Deadline
from refdist.errors import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    name_ranks,
)
from refdist.joining.asking import Plan, answer, ask, seals_of_asks, unanswered
from refdist.joining.connection import Connection
from refdist.joining.realigning import break_off
from refdist.joining.rendezvous import Joined
from refdist.joining.shrinking import Shrinking
from refdist.joining.splitting import made
from refdist.objects.encoding import loads_of
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import connect
from refdist.store.seals import NO_SEALS, secret_from


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
            timeout: seconds for the whole call.
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
            joined = ask(Connection(calls.client), f"{host}:{port}", known, deadline)
            calls.kept["join"] = joined
            return joined

        try:
            joined = calls.run("join", deadline, run, kept="join")
        except BaseException as error:
            if "join" in calls.kept:  # the others count on this process
                barrier = calls.kept["join"].barrier
                why = f"it left the group because of {type(error).__name__}"
                break_off(barrier, why, [barrier.rank])
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

        An interrupt ends it early. If the new group had formed by then, this one is closed, and the
        next call returns the new one. If nobody had asked, it is as for ``barrier``: ``generation``
        tells whether it took place.

        Raises:
            BarrierError: a rank of this group did not call it in time, as ``barrier``. Or nobody is
                ``missing``: a stranger interfered, and this group is closed on this rank, which
                cannot know whether the others have the new one.
            MessageError: a rank called something else meanwhile.
            GroupCreationError: one that had asked did not come, or a rank has died meanwhile, or
                was interrupted; ``missing`` has its rank in the new group. If the time of one that
                asked runs out first, ``missing`` are all that had not come by then. This group
                goes on as it was.
            ValueError: the group speaks vLLM's protocol, or was split off another.
        """
        self._check_own("admit")
        if not self._calls.closed and self._connection.root is not self._barrier:
            raise ValueError("admit: this group was split off another; call it on that one")
        deadline = Deadline(timeout)
        return self._calls.run("admit", deadline, self._admit, deadline, kept="admit")

    def _admit(self, deadline: Deadline) -> Self:
        """The group that follows, or this one. An interrupt leaves the first to the next call."""
        kept = self._calls.kept
        kept["admit"] = kept.get("admit")  # the end of the call deletes it
        if kept["admit"] is None:
            plan = self._planned(deadline)
            if plan is None:
                return self
            kept["admit"] = self._grown(plan, deadline)
        self._end()
        group: Self = kept["admit"]
        return group

    def _planned(self, deadline: Deadline) -> Plan | None:
        """Learn from rank 0, in a gather, which group is to follow; None if nobody has asked.

        Those that have asked are told behind it: if it breaks, nobody comes to meet them.
        """
        barrier, joined, client = self._barrier, self._joined, self._connection.client
        generation, told = barrier.generation, b"null"
        seals, asks = NO_SEALS, []
        if self.rank == 0:
            with suppress(AuthenticationError):  # a stranger wrote over what rank 0 has told
                seals = seals_of_asks(client, joined.secret)
                asks = list(unanswered(self._connection, seals))
        if asks:
            addresses = joined.addresses or [None] * self.world_size
            mine = Plan(
                0, joined.place, joined.era + 1,
                keys.era(joined.place, joined.era + 1, f"grown/{generation}"),
                [*addresses, *(one.address for one in asks)],
                [os.urandom(16).hex(), *(one.token for one in asks)],
                self.store.timeout.total_seconds(),  # type: ignore[attr-defined]
            )  # fmt: skip
            told = json.dumps(mine).encode()
        try:
            told = barrier.gather(told, deadline)[0]
        except BarrierError as error:
            # completed: the others have the plan and will meet, so rank 0 must, too
            if not (error.completed and asks):
                raise
        if told == b"null":
            return None
        who = f"gather {generation}: did rank 0 call something else than admit? It"
        plan = Plan.parse(told, who)._replace(rank=self.rank)
        gone = [
            rank for rank, asked in enumerate(asks, self.world_size)
            if not answer(client, asked.number, plan._replace(rank=rank), seals)
        ]  # fmt: skip
        if gone:
            why = "a process that had asked has given up"
            break_off(plan.meeting(client, joined.secret), why, gone)
        return plan

    def _grown(self, plan: Plan, deadline: Deadline) -> Self:
        """Meet those that asked, and make the group of all."""
        connection, secret = self._connection, self._joined.secret
        deadline.restart()
        try:
            plan.meet(connection.client, secret, deadline)
        except BarrierError as error:
            if not error.missing:
                self._end()
                raise
            raise GroupCreationError(
                f"nobody was let in, and the group goes on as it was: of the {plan.world_size} "
                f"ranks of the new one, {name_ranks(error.missing)} did not come ({error})",
                error.missing,
            ) from error
        barrier = plan.barrier(connection.client, secret)
        return self._followed_by(barrier, connection, tuple(plan.addresses), self._joined.left_out)
