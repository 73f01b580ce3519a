"""How a rank leaves a group: rank 0, whose store the others use, waits until they have left."""

from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from torch.distributed import DistError, DistNetworkError, Store

from refdist.barrier.plain import Barrier
from refdist.calls import Calls
from refdist.deadline import Deadline
from refdist.errors import BarrierError, ConcurrentCallError, StoreConnectionError, name_ranks
from refdist.joining.connection import Connection
from refdist.joining.membership import GONE
from refdist.joining.realigning import break_off
from refdist.store import keys

_GRACE_SECONDS = 1.0


class Leaving:
    """The methods of a group with which a rank leaves it; also at the end of a ``with`` block."""

    store: Store
    _barrier: Any
    _wire: Any
    _calls: Calls
    _connection: Connection
    _joined: Any

    def close(self, timeout: float = 30.0) -> None:
        """Leave the group. Rank 0, whose store the others use, waits until they have left.

        A group that was split off another may be closed before or after it, and waits for nobody:
        the last of all groups on the store is the one that leaves. A group that is not closed ends
        with its process, or when nothing refers to it. Closing again does nothing.

        If an interrupt has ended ``shrink`` or ``admit`` after the others got the new group, that
        one is closed too.

        Args:
            timeout: seconds that rank 0 waits; 0 to leave at once.

        Raises:
            BarrierError: on rank 0, when a rank did not leave in time. The group is closed.
            ConcurrentCallError: another thread is in a call. The group is not closed.
        """
        self._close(timeout, None)

    def _close(self, timeout: float, reason: str | None) -> None:
        """Leave. With a reason, the others learn it if they wait in a barrier."""
        if following := self._calls.following():
            following._close(timeout, reason)

        def leave(deadline: Deadline) -> None:
            barrier, connection = self._barrier, self._connection
            connection.open.discard(self)
            if barrier is not connection.root:
                # a rank that was left out, and has not learned it, still looks for the meeting
                lost = self._joined.left_out
                leave_part(barrier, barrier.store.prefix if lost else self._joined.place, reason)
            if not connection.open:
                own = reason if barrier is connection.root else None
                self._wire.leave(connection.root, own, deadline)
            elif reason is not None and barrier is connection.root:
                break_off(barrier, reason)

        try:
            self._calls.close("close", timeout, leave)
        finally:
            if self._calls.closed:
                self._end()

    def end(self) -> None:
        """End the group on this rank at once.

        With the last group on a store, the store ends; on rank 0, also for the others.
        """
        if following := self._calls.following():
            following.end()
        self._end()

    def _end(self) -> None:
        # an error that is kept, as a notebook does, keeps the group, but the store must end
        self._calls.closed = True
        if hasattr(self, "store"):
            del self.store
        self._connection.drop(self, self._barrier.store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        # the others may have to read why; but they may be dead, and the store lost
        with suppress(BarrierError, ConcurrentCallError, StoreConnectionError):
            self._close(_GRACE_SECONDS, f"it left the group because of {kind.__name__}")


def leave_part(barrier: Barrier, place: str, reason: str | None) -> None:
    """Leave a group that was split off another. The last rank deletes what it has in the store.

    ``place`` is where its keys were before it shrank, and below which they still are.
    """
    if reason is not None:
        break_off(barrier, reason)
    with suppress(DistError):
        if barrier.store.add(keys.gone(), 1) == barrier.world_size:
            barrier.store.at(place).delete_all()


def leave(barrier: Barrier, reason: str | None, deadline: Deadline) -> None:
    """Say that this rank uses the store no more; rank 0 waits until all others have said so.

    With a reason, the others learn it if they wait in a barrier.

    Raises:
        BarrierError: on rank 0, when a rank did not say so in time. Where no time at all is
            allowed, it neither waits nor raises.
    """
    if reason is not None:
        break_off(barrier, reason)
    store, rank, world_size = barrier.store, barrier.rank, barrier.world_size
    if rank != 0:
        # where the store is gone already, nobody waits for this
        with suppress(DistError):
            store.set(keys.member(rank), GONE)
            if store.add(keys.gone(), 1) == world_size - 1:
                store.set(keys.all_gone(), "")
        return
    if world_size == 1 or deadline.allowed == 0:
        return
    try:
        if store.wait([keys.all_gone()], deadline):
            return
        missing = [r for r in range(1, world_size) if store.peek(keys.member(r)) != GONE]
    except DistNetworkError:
        return  # another process served the store, and has ended: nobody uses it any more
    raise BarrierError(
        f"rank 0 closed the group, but waited in vain for {name_ranks(missing)} to close it: "
        f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
        phase="departure",
        missing=missing,
        elapsed=deadline.elapsed(),
        allowed=deadline.allowed,
        broken_by=0,
        completed=True,
    )
