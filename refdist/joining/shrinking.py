"""How the ranks that are left agree who they are, and go on in a smaller group.

The simple way fails: each rank goes on with those that it has heard of. Of a rank that is slow and
not dead some have heard and some have not, and then there are two groups.

A barrier is such an agreement already. If a rank does not come, it breaks for all, and each of them
learns the same missing ranks, also one that comes late and is among them. So the ranks *meet* at a
barrier. If it breaks, those that were there meet once more without the missing, and so on, until
all of them come: then all of them were alive after they had agreed. A rank that dies meanwhile
costs one meeting more. A rank that finds itself among the missing was left out. Nothing more has to
be agreed on: a rank that comes to a meeting which is over learns how it ended.

The barrier is ``plain``: its outcome is one value, so nobody has to ask who was missing.
"""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

from torch.distributed import DistNetworkError, Store

from refdist.barrier import plain
from refdist.barrier.roll import Try
from refdist.calls import Calls
from refdist.deadline import Deadline
from refdist.errors import (
    BarrierError,
    GroupCreationError,
    StoreConnectionError,
    name_ranks,
)
from refdist.joining.connection import Address, Connection
from refdist.joining.membership import introduce
from refdist.joining.splitting import Splitting
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.listening import connect, serve
from refdist.store.seals import NoSeals


class Shrinking(Splitting):
    """The methods of a group that has lost ranks."""

    store: Store
    events: Any
    _calls: Calls
    _end: Callable[[], None]

    @property
    def successor(self) -> Address | None:
        """Host and port at which the others meet if rank 0 dies, and the store with it.

        The first rank that does not host the store has kept them for that since the group formed.
        None for a group of one rank, for one that was split off another or formed over a store that
        was there, and where torch does not tell its connections.
        """
        return next((address for address in self._joined.addresses if address), None)

    def shrink(self, timeout: float = 30.0) -> Self:
        """Go on with the ranks that are left, in a smaller group. They all call it.

        Those that come get a new group on the same store, with new ranks in the old order, and new
        counters. The old one is ended on them, and its messages are not read. If all come, the new
        group has as many ranks as the old one.

        If the store is lost, because rank 0 has died, they meet at ``successor`` over a new store.
        At least half of the ranks must come there. Nobody can tell a rank 0 that is cut off from
        one that is dead: if it lives, it may go on too, with those that still reach it.

        Args:
            timeout: in seconds, of each meeting. One is enough if all come, and each time that
                ranks are missing takes one more.

        Raises:
            GroupCreationError: this rank came late, and the others have gone on without it;
                ``missing`` holds it. It may ask to be let in again: ``join``. Rank 0 serves the
                others until its process ends, unless it closes this group. Or too few came.
            StoreConnectionError: the store is lost, and no successor opened one in time.
            BarrierError: a stranger interferes.
            ValueError: the group speaks vLLM's protocol.

        Source: ``MPIX_Comm_shrink`` of Open MPI, for its name.
        """
        self._check_own("shrink")
        deadline = Deadline(timeout)
        return self._calls.run("shrink", deadline, self._shrink, deadline, kept="shrink")

    def _shrink(self, deadline: Deadline) -> Self:
        """The group that follows. An interrupt leaves it to the next call."""
        kept = self._calls.kept
        if kept.get("shrink") is None:
            try:
                everyone = list(range(self.world_size))
                kept["shrink"] = self._meet(self._connection, everyone, deadline)
            except DistNetworkError:
                with_address = [r for r, address in enumerate(self._joined.addresses) if address]
                if self.rank not in with_address:
                    raise
                kept["shrink"] = self._move(with_address, deadline)
        self._end()
        group: Self = kept["shrink"]
        return group

    def _meet(self, connection: Connection, ranks: list[int], deadline: Deadline) -> Self:
        """Agree with those of the ranks that come, and make their group."""
        joined, moves = self._joined, connection is not self._connection
        here = meet(
            connection.client.at(joined.place), self.rank, ranks, joined.era,
            self._barrier.seals.below("moved" if moves else "meeting"), deadline,
        )  # fmt: skip
        if self.rank not in here:
            connection.stay()
            raise GroupCreationError(
                f"rank {self.rank} came late, and was left out: {name_ranks(here)} met without it; "
                f"StatelessProcessGroup.join asks to be let in again",
                [self.rank],
            )
        if moves and (here[0] != ranks[0] or 2 * len(here) < self.world_size):
            raise GroupCreationError(
                f"only {name_ranks(here)} of {self.world_size} came to the successor's store, "
                f"which is less than half of them, or without the successor, rank {ranks[0]}",
                [rank for rank in ranks if rank not in here],
            )
        if moves:
            connection.take_over(self._connection, self.rank == ranks[0])
            if self.rank == ranks[0]:
                introduce(connection.client, joined.secret)
        prefix = keys.era(joined.place, joined.era + 1, "moved" if moves else "shrunk")
        barrier = self._barrier_at(prefix, here, connection)
        hosts = ranks[0] if moves else None
        addresses = joined.addresses and tuple(
            None if rank == hosts else joined.addresses[rank] for rank in here
        )
        left_out = joined.left_out or len(here) < self.world_size
        return self._followed_by(barrier, connection, addresses, left_out)

    def _move(self, ranks: list[int], deadline: Deadline) -> Self:
        """Meet over a store that the first of the ranks opens."""
        host, port = self._joined.addresses[ranks[0]]  # type: ignore[misc]
        deadline.restart()
        reserved = self._connection.reserved if self.rank == ranks[0] else None
        try:
            connection = Connection(_opened(host, port, reserved, deadline))
        except OSError as error:  # of the system, such as too many open files
            text = f"shrink: the successor's store on {host}:{port} cannot be reached: {error}"
            raise StoreConnectionError(text) from error
        deadline.restart()
        try:
            connection.client.store.set_timeout(self.store.timeout)  # type: ignore[attr-defined]
            connection.client.limit(deadline.allowed)
            return self._meet(connection, ranks, deadline)
        except BaseException:
            connection.client.close()
            raise

    def _followed_by(
        self,
        barrier: plain.Barrier,
        connection: Connection,
        addresses: tuple[Address | None, ...],
        left_out: bool,
    ) -> Self:
        """The group of the next era."""
        listener = None
        if connection.root is None or connection.root is self._barrier:  # else it is a part
            connection.root, listener = barrier, connection.listener
        group: Self = self._with(
            barrier, listener, era=self._joined.era + 1,
            connection=connection, addresses=addresses, left_out=left_out,
        )  # fmt: skip
        group.events = self.events
        return group


class Meeting(plain.Barrier):
    """A barrier without departure: the store stays, and so do the keys.

    So a rank to whose meeting all have come goes on with them, whatever happens to it or to the
    others then. An interrupt after that waits until the call has ended.
    """

    def depart(self, this: Try) -> None:
        """Go on."""


def _opened(
    host: str, port: int, reserved: socket.socket | None, deadline: Deadline
) -> StoreClient:
    """A client of the successor's store, which is opened on the socket that this rank reserved."""
    options: Any = {"timeout": timedelta(seconds=deadline.allowed), "wait_for_workers": False}
    if reserved is not None:
        return StoreClient(serve(host, reserved, **options))
    return StoreClient(connect(host, port, deadline, **options))


def meet(
    client: StoreClient, rank: int, ranks: list[int], era: int, seals: NoSeals, deadline: Deadline
) -> list[int]:
    """Meet with those of the ranks that come in time. Returns them, the same on all.

    This rank is not among them if they have gone on without it.

    Args:
        client: of the keys of the group in its first era.
        rank: of this process, in the era that ends.
        ranks: that are waited for.
        era: that ends.
        seals: of the group, for this.
        deadline: of each meeting.

    Raises:
        BarrierError: a stranger interferes.
        CancelledWaitError: the deadline was cancelled; it can be called again.
    """
    number, here = 0, ranks
    while True:
        prefix = keys.meeting(client.prefix, era, number)
        meeting = Meeting(client.at(prefix), here.index(rank), len(here), seals.below(prefix))
        try:
            meeting.wait(deadline)
            return here
        except BarrierError as error:
            if not error.missing:
                raise
            here = [other for place, other in enumerate(here) if place not in error.missing]
            if rank not in here:
                return here
        number += 1
        deadline.restart()
