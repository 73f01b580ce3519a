"""What is stored about a barrier: its state, why it broke, and what its ranks brought."""

import json
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

from refdist.errors import AuthenticationError, BarrierError, MessageError, name_ranks
from refdist.store.seals import NO_SEALS, NoSeals

LEFT, LEFT_SUM, WOKEN, ASLEEP, BROKEN = 1, 1 << 16, 1 << 47, 1 << 48, -(1 << 63)
MAX_WORLD_SIZE = 1 << 14

_SIGNATURE = struct.Struct("<QII")  # generation, rank, and the length of the value that follows


class State(NamedTuple):
    """What the state of a barrier says: one integer, to which the store can add.

    From the lowest bit: 16 bits count the ranks that have left, 31 hold the sum of their numbers,
    one says that the sleepers have been woken, and the rest counts them. Negative means broken; the
    bit of the sleepers says then that the ranks try again.
    """

    left: int
    left_sum: int
    woken: bool
    asleep: int
    broken: bool

    @classmethod
    def of(cls, value: int) -> Self:
        """Unpack the integer."""
        left, left_sum = value & (LEFT_SUM - 1), (value & (WOKEN - 1)) // LEFT_SUM
        return cls(left, left_sum, bool(value & WOKEN), value // ASLEEP, value < 0)

    @property
    def again(self) -> bool:
        """Whether it is broken only because a rank was interrupted, and the others try again."""
        return self.broken and self.woken

    @staticmethod
    def mark(rank: int) -> int:
        """What a rank adds to the state to confirm."""
        return LEFT + rank * LEFT_SUM

    @staticmethod
    def broken_by(rank: int, again: bool) -> int:
        """The state that a rank writes to break the barrier.

        It is unlike any other rank's, whatever marks were added to that, as each counts in LEFT.
        """
        return BROKEN + rank * LEFT_SUM + (WOKEN if again else 0)


def read_state(value: bytes | int, generation: int, world_size: int) -> State:
    """Unpack a state; an empty one is that of a slot that was never used.

    Raises:
        BarrierError: no rank has written it.
    """
    try:
        state = State.of(int(value or 0))
        if state.broken or max(state.left, state.asleep) <= world_size:
            return state
    except ValueError:
        pass
    raise BarrierError(
        f"barrier {generation} has a state that no rank of refdist writes: {value!r}",
        phase="confirmation",
        generation=generation,
    )


def write_reason(
    rank: int, reason: str, missing: Sequence[int], elapsed: float, allowed: float
) -> str:
    """What a rank writes about a barrier that it has broken."""
    return json.dumps(
        {
            "by": rank,
            "reason": reason,
            "missing": list(missing),
            "elapsed": elapsed,
            "allowed": allowed,
            "at": time.time(),
        }
    )


def read_reason(written: bytes | None, generation: int, world_size: int) -> BarrierError:
    """The error that says what ``write_reason`` wrote; or that there is nothing, for None."""
    if written is None:
        return BarrierError(
            f"barrier {generation} was broken by a rank that died before it said why",
            phase="arrival",
            generation=generation,
        )
    try:
        broken = json.loads(written)
        by, missing, at = int(broken["by"]), list(map(int, broken["missing"])), broken["at"]
        elapsed, allowed = float(broken["elapsed"]), float(broken["allowed"])
        when = time.strftime("%H:%M:%S", time.localtime(at))
        return BarrierError(
            f"barrier {generation} was broken in arrival by rank {by} at {when}, after "
            f"{elapsed:.2f} of {round(allowed, 2):g} s, because {broken['reason']}; "
            f"missing: {name_ranks(missing)} of {world_size}",
            phase="arrival",
            missing=missing,
            elapsed=elapsed,
            allowed=allowed,
            broken_by=by,
            generation=generation,
        )
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        return BarrierError(
            f"barrier {generation} was broken for a reason that no rank of refdist writes: "
            f"{written[:80]!r}",
            phase="arrival",
            generation=generation,
        )


def sign(
    generation: int, rank: int, value: bytes, seals: NoSeals = NO_SEALS, key: str = ""
) -> bytes:
    """What a rank appends to the roll: that it has arrived, and what it brings to a gather.

    Args:
        generation: of the barrier.
        rank: who signs.
        value: what it brings; empty to a barrier.
        seals: of the group.
        key: of the roll.
    """
    signature = _SIGNATURE.pack(generation, rank, len(value)) + value
    return signature + seals.tag(key, signature)


def signed_by(roll: bytes, generation: int, seals: NoSeals = NO_SEALS, key: str = "") -> set[int]:
    """The ranks that have signed a roll, as far as it can be read and its tags are right."""
    values, _ = _parse(roll, generation, seals, key)
    return set(values)


def read_roll(
    roll: bytes, generation: int, world_size: int, seals: NoSeals = NO_SEALS, key: str = ""
) -> list[bytes]:
    """The values of all ranks, in rank order.

    Raises:
        AuthenticationError: there is something that no rank of this group has signed.
        MessageError: not every rank brought a value, or there is something else.
    """
    values, rest = _parse(roll, generation, seals, key)
    if rest and seals.tag_bytes:
        raise AuthenticationError(
            f"{key}: the last {len(rest)} bytes on the roll of gather {generation} carry no right "
            f"tag: forged, altered, cut off, or copied from another round or group; they were not "
            f"looked at"
        )
    if rest or any(rank >= world_size for rank in values):
        raise MessageError(
            f"gather {generation}: the roll ends in {roll[-40:]!r}, which no rank of refdist writes"
        )
    missing = [rank for rank in range(world_size) if not values.get(rank)]
    if missing:
        raise MessageError(
            f"gather {generation}: {name_ranks(missing)} brought nothing; did another rank call "
            f"barrier meanwhile?"
        )
    return [values[rank] for rank in range(world_size)]


def _parse(
    roll: bytes, generation: int, seals: NoSeals, key: str
) -> tuple[dict[int, bytes], bytes]:
    """The value of each rank, and what comes after the last signature that makes sense."""
    values: dict[int, bytes] = {}
    offset = 0
    while offset + _SIGNATURE.size <= len(roll):
        number, rank, length = _SIGNATURE.unpack_from(roll, offset)
        start = offset + _SIGNATURE.size
        end = start + length
        after = end + seals.tag_bytes
        if number != generation or rank in values or after > len(roll):
            break
        if not seals.fits(roll[end:after], key, roll[offset:end]):
            break
        values[rank] = roll[start:end]
        offset = after
    return values, roll[offset:]
