"""How a process that restarted, or a new one, is let into a group that is running.

It cannot let itself in: the others are in the middle of their calls, and their counters say what
comes next. So it asks, and waits. When all ranks of the group call ``admit``, rank 0 tells all of
them who asks, and they pass a barrier together with those. If all come, they are a new group, and
else the old one goes on. What was sent to an earlier life of a process belongs to an older group.
"""

import json
import os
from datetime import timedelta
from typing import Self

from refdist.calls import Calls
from refdist.checks import check_seconds
from refdist.deadline import Deadline
from refdist.errors import BarrierError, GroupCreationError, name_ranks
from refdist.joining.asking import Plan, answer, ask, unanswered
from refdist.joining.connection import Connection
from refdist.joining.rendezvous import Joined
from refdist.joining.shrinking import Shrinking
from refdist.joining.splitting import made
from refdist.objects.encoding import loads_of
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import connect
from refdist.store.seals import secret_from


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
        if self._calls.kept.get("next") is None:
            self._calls.check_open("admit")
            if self._connection.root is not self._barrier:
                raise ValueError("admit: this group was split off another; call it on that one")
        deadline = Deadline(timeout)
        return self._calls.run("admit", deadline, self._admit, deadline, kept="next")

    def _admit(self, deadline: Deadline) -> Self:
        """The group that follows, or this one. An interrupt leaves it to the next call."""
        kept = self._calls.kept
        if kept.setdefault("next") is None:
            plan = self._planned(deadline)
            if plan is not None:
                kept["next"] = self._grown(plan, deadline)
        if kept["next"] is not None:
            self.end()
        group: Self = kept["next"] or self
        return group

    def _planned(self, deadline: Deadline) -> Plan | None:
        """Learn from rank 0, in a gather, which group is to follow; None if nobody has asked.

        Those that have asked are told behind it: if it breaks, nobody comes to meet them.
        """
        barrier, joined = self._barrier, self._joined
        generation, told = barrier.generation, b"null"
        asks = list(unanswered(self._connection, joined.secret)) if self.rank == 0 else []
        if asks:
            mine = Plan(
                0, self.world_size + len(asks), joined.place, joined.era + 1,
                keys.era(joined.place, joined.era + 1, f"grown/{generation}"),
                [*(joined.addresses or [None] * self.world_size), *(one.address for one in asks)],
                [os.urandom(16).hex(), *(one.token for one in asks)],
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
        plan = Plan.parse(told, who)
        for rank, asked in enumerate(asks, self.world_size):
            # one that has given up meanwhile will be missed
            answer(self._connection.client, asked.number, plan._replace(rank=rank), joined.secret)
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
