"""Groups that come from a group: its parts, and the one that follows it.

Each has the keys below a prefix of the same store, and with them counters, barriers and, where
there is a secret, tags of its own. So it needs no port, and what is left over from one group is
never read in another.
"""

from collections.abc import Callable
from typing import Any, Self

from torch.distributed import PrefixStore

from refdist.barrier.plain import Barrier
from refdist.calls import Calls
from refdist.checks import check_integer
from refdist.joining.connection import Connection
from refdist.joining.rendezvous import Joined
from refdist.store import keys


class Splitting:
    """The method of a group that parts it."""

    rank: int
    world_size: int
    data_expiration_seconds: int
    messages: str
    _barrier: Any
    _joined: Joined
    _connection: Connection
    all_gather_obj: Callable[..., list[Any]]

    def split(
        self, color: int | None, key: int | None = None, timeout: float | None = None
    ) -> Self | None:
        """Part the group. All ranks call it, and those with the same color form one part.

        A part is a group on the same store, with no port of its own; it may be split again. It
        shares the connection of this process to the store, on which one request waits for another,
        so use it in the same thread. The names are those of ``MPI_Comm_split``.

        Args:
            color: any integer; None for a rank that is to be in no part.
            key: ranks of a part are in the order of their keys, and of their ranks here where
                these are equal; None for this rank.
            timeout: in seconds, for each phase of the gather that this is; None for the store's.

        Returns:
            This rank's part, or None. Its ``rank`` and ``world_size`` are those in the part.

        Raises:
            ValueError: an argument is no integer, or the group speaks vLLM's protocol.
            MessageTimeoutError: as ``all_gather_obj``.
        """
        self._check_own("split")
        if color is not None:
            color = check_integer("color", color)
        own = self.rank if key is None else check_integer("key", key)
        everyone = self.all_gather_obj((color, own), timeout)
        if color is None:
            return None
        members = [rank for rank, (other, _) in enumerate(everyone) if other == color]
        # not below the keys of this group, which may be a part that is closed before
        whole = self._barrier.store.prefix.replace("/", ".")
        place = keys.part(whole, self._barrier.generation, members[0])
        members.sort(key=lambda rank: (everyone[rank][1], rank))
        barrier = self._barrier_at(place, members, self._connection)
        part: Self = self._with(barrier, addresses=(), place=place, era=0, left_out=False)
        return part

    def _check_own(self, what: str) -> None:
        if self._joined.wire.name is not None:
            raise ValueError(f"{what}: vLLM's protocol has no groups that split, shrink or grow")

    def _barrier_at(self, prefix: str, members: list[int], connection: Connection) -> Barrier:
        """The barrier of some ranks of this group, with keys that begin with a prefix."""
        client, seals = connection.client.at(prefix), self._barrier.seals.below(prefix)
        barrier: Barrier = type(self._barrier)(
            client, members.index(self.rank), len(members), seals
        )
        return barrier

    def _with(self, barrier: Barrier, listener: Any = None, **changes: Any) -> Any:
        """A group with another barrier and other parts, and the arguments of this one."""
        calls = Calls(barrier.rank, barrier.store)
        joined = self._joined._replace(barrier=barrier, calls=calls, **changes)
        return made(type(self), joined, listener, self.data_expiration_seconds, self.messages)


def made(kind: Any, joined: Joined, listener: Any, expiration_seconds: int, messages: str) -> Any:
    """A group that consists of these parts, below the prefix of its client."""
    barrier, store = joined.barrier, joined.barrier.store.store
    if prefix := joined.barrier.store.prefix:
        store = PrefixStore(prefix.removesuffix("/"), store)
    return kind(
        barrier.rank, barrier.world_size, store, listener, expiration_seconds,
        messages=messages, joined=joined,
    )  # fmt: skip
