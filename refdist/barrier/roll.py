"""The roll of a barrier: what its ranks append there, and what it says to a reader.

Each rank appends an entry when it arrives, and another one when it leaves. With a secret, each
entry carries a tag.
"""

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import AuthenticationError, MessageError, name_ranks, outcome_of
from refdist.store.seals import NoSeals

COMPLETE, AGAIN = b"complete", b"again"
"""Two outcomes. Any other one is "broken" and says why. After "again", the ranks try again."""

ARRIVED, LEFT = 0, 1
ENTRY = struct.Struct("<QQIII")
"""Generation, number of broadcasts, rank, ARRIVED or LEFT, and length of the value that follows."""


class Roll(NamedTuple):
    """The readable part of a roll.

    Attributes:
        values: that the ranks brought when they arrived, by rank.
        broadcasts: that each of them had made and received then.
        left: the ranks that have left.
        rest: what follows the last entry that makes sense and has the right tag.
        key: of the roll.
        generation: of its barrier.
        sealed: whether entries carry tags.
    """

    values: dict[int, bytes]
    broadcasts: list[int]
    left: set[int]
    rest: bytes
    key: str
    generation: int
    sealed: bool

    @classmethod
    def parse(cls, written: bytes | None, generation: int, seals: NoSeals, key: str) -> Self:
        """Read what was written under a key; nothing, where it is None."""
        values: dict[int, bytes] = {}
        broadcasts: list[int] = []
        left: set[int] = set()
        rest = written or b""
        while len(rest) >= ENTRY.size:
            number, count, rank, kind, length = ENTRY.unpack_from(rest)
            end = ENTRY.size + length
            after = end + seals.tag_bytes
            again = rank in (left if kind else values)
            if number != generation or kind > LEFT or again or after > len(rest):
                break
            if seals.tag_bytes and not seals.fits(rest[end:after], key, rest[:end]):
                break
            if kind == LEFT:
                left.add(rank)
            else:
                values[rank] = rest[ENTRY.size : end]
                broadcasts.append(count)
            rest = rest[after:]
        return cls(values, broadcasts, left, rest, key, generation, seals.tag_bytes > 0)

    def missing(self, world_size: int) -> list[int]:
        """The ranks that have not arrived."""
        return [rank for rank in range(world_size) if rank not in self.values]

    def in_rank_order(self, world_size: int) -> list[bytes]:
        """The values of all ranks; a MessageError if there are others, or not all."""
        if self.rest and self.sealed:
            raise AuthenticationError(
                f"{self.key}: the last {len(self.rest)} bytes on the roll of gather "
                f"{self.generation} carry no right tag: forged, altered, cut off, or copied from "
                f"another round or group; they were not looked at"
            )
        if self.rest or max(self.values, default=0) >= world_size:
            end = f"the roll ends in {self.rest[-40:]!r}, which no rank of refdist writes"
            raise MessageError(f"gather {self.generation}: {end}")
        if not all(map(self.values.get, range(world_size))):
            empty = [rank for rank in range(world_size) if not self.values.get(rank)]
            why = f"{name_ranks(empty)} brought nothing; did another rank call barrier meanwhile?"
            raise MessageError(f"gather {self.generation}: {why}")
        return list(map(self.values.__getitem__, range(world_size)))


NOT_READ = Roll({}, [], set(), b"", "", 0, False)


@dataclass(slots=True)
class Try:
    """One try of a barrier, as one rank sees it.

    Attributes:
        keys: of this try.
        value: that this rank brings to a gather; empty for a barrier.
        deadline: of the present phase.
        seen: outcome that the rank has seen in arrival; in ``quick``, only that it may go on.
        interrupt: what has interrupted its arrival.
        roll: as read before the rank left, for a gather.
        state: in ``quick``, the number that the rank adds to the state, and then the sum.
    """

    keys: Any
    value: bytes
    deadline: Deadline
    seen: bytes | None = None
    interrupt: CancelledWaitError | None = None
    roll: Roll = NOT_READ
    state: int = 1

    def proposal(self, roll: Roll, rank: int, world_size: int) -> bytes:
        """The outcome that a rank proposes that has read this roll."""
        if self.interrupt is not None:
            return AGAIN
        missing, waited = roll.missing(world_size), self.deadline
        if not missing:
            return COMPLETE
        over = waited.remaining() == 0
        why = "its time was up" if over else "its wait ended before all had arrived"
        return outcome_of(rank, why, missing, waited.elapsed(), waited.allowed)
