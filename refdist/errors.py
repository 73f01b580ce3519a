"""The errors of refdist. Each says which rank waited, for what, how long, and for whom.

All are subclasses of RuntimeError, which is what the specification promises. Input that breaks a
rule of a signature is a ValueError instead, and an address that cannot be used is an OSError.

Every argument but the message has a default, so that an error can be pickled: it is made again from
its message, and then gets its attributes.
"""

import json
import time
from collections.abc import Sequence


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 1, 2 and 3``; ``no rank`` for none."""
    if not ranks:
        return "no rank"
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    *head, last = ranks
    return f"ranks {', '.join(map(str, head))} and {last}"


class StoreConnectionError(RuntimeError):
    """The store cannot be reached, or no longer: rank 0 hosts it and may have left or died.

    Or an exception from outside has ended a call in the middle, and this rank has lost its group.
    """


class ConcurrentCallError(RuntimeError):
    """A group was used by two threads at once. The call of the first goes on."""


class InsecureGroupWarning(UserWarning):
    """A group without a secret, or with a short one, listens where other machines may reach it."""


class GroupCreationError(RuntimeError):
    """A group was not formed. ``missing`` holds the ranks that did not come in time."""

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class CollectiveError(RuntimeError):
    """An operation of a torch group failed on this rank, or did not end in time.

    Attributes:
        operation: its name, such as ``"all_reduce"``.
        elapsed: seconds that it took.
    """

    def __init__(self, message: str, *, operation: str = "", elapsed: float = 0.0) -> None:
        super().__init__(message)
        self.operation = operation
        self.elapsed = elapsed


def failure(
    operation: str,
    rank: int,
    size: int,
    elapsed: float,
    allowed: float | None,
    reason: BaseException,
) -> CollectiveError:
    """The CollectiveError of an operation: its name, who saw it, after how long, and why."""
    limit = "" if allowed is None else f" of {allowed:g}"
    why = (str(reason).splitlines() or [type(reason).__name__])[0]
    return CollectiveError(
        f"{operation} failed on rank {rank} of {size} after {elapsed:.2f}{limit} s: {why}; the "
        f"group cannot be used again",
        operation=operation,
        elapsed=elapsed,
    )


class BarrierError(RuntimeError):
    """A barrier broke, or, with ``completed``, a rank did not leave it in time.

    Attributes:
        phase: the one that failed, ``"arrival"`` or ``"departure"``.
        missing: the ranks that were waited for in vain.
        elapsed: seconds that the rank which gave up had waited in that phase.
        allowed: seconds that it was ready to wait.
        broken_by: the rank that gave up.
        generation: the number of the barrier in its group; -1 for closing the group.
        completed: True when all ranks arrived and only the departure failed.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str = "",
        missing: Sequence[int] = (),
        elapsed: float = 0.0,
        allowed: float = 0.0,
        broken_by: int = -1,
        generation: int = -1,
        completed: bool = False,
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.missing = tuple(missing)
        self.elapsed = elapsed
        self.allowed = allowed
        self.broken_by = broken_by
        self.generation = generation
        self.completed = completed


UNTOLD, UNTRUSTED = b"untold", b"untrusted: "
"""Stand for an outcome of a barrier that is not there, and begin one that has a wrong tag."""


def outcome_of(
    rank: int, reason: str, missing: Sequence[int], elapsed: float, allowed: float
) -> bytes:
    """The outcome that a rank writes to break a barrier."""
    told = {"by": rank, "reason": reason, "missing": list(missing), "at": time.time()}
    return json.dumps(told | {"elapsed": elapsed, "allowed": allowed}).encode()


def error_of(outcome: bytes, generation: int, world_size: int) -> BarrierError:
    """The error that tells of a broken barrier, from what the rank wrote that broke it."""
    try:
        told = json.loads(outcome)
        by, missing, reason = int(told["by"]), list(map(int, told["missing"])), told["reason"]
        elapsed, allowed = float(told["elapsed"]), float(told["allowed"])
        at = time.strftime("%H:%M:%S", time.localtime(told["at"]))
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        text = f"for a reason that no rank of refdist writes: {outcome[:80]!r}"
        if outcome == UNTOLD:
            text = "by a rank that died before it said why"
        elif outcome.startswith(UNTRUSTED):
            why = outcome.removeprefix(UNTRUSTED).decode(errors="replace")
            text = f"for a reason that cannot be trusted: {why}"
        return BarrierError(
            f"barrier {generation} was broken {text}", phase="arrival", generation=generation
        )
    return BarrierError(
        f"barrier {generation} was broken in arrival by rank {by} at {at}, after "
        f"{elapsed:.2f} of {round(allowed, 2):g} s, because {reason}; "
        f"missing: {name_ranks(missing)} of {world_size}",
        phase="arrival",
        missing=missing,
        elapsed=elapsed,
        allowed=allowed,
        broken_by=by,
        generation=generation,
    )


def not_left(
    missing: Sequence[int], generation: int, elapsed: float, allowed: float
) -> BarrierError:
    """The error of rank 0, which has waited in vain for these ranks to leave."""
    return BarrierError(
        f"barrier {generation} completed, but in departure rank 0 waited in vain for "
        f"{name_ranks(missing)} to leave: {elapsed:.2f} of {allowed:g} s",
        phase="departure",
        missing=missing,
        elapsed=elapsed,
        allowed=allowed,
        broken_by=0,
        generation=generation,
        completed=True,
    )


class MessageError(RuntimeError):
    """A message arrived that cannot be used: not in the format of refdist, or not an object."""


class AuthenticationError(MessageError):
    """A value in the store is not from a rank of this group, which has a secret. It was not used.

    The text names the key, and why the value was refused.
    """


class MessageTimeoutError(MessageError):
    """A message did not come in time. ``missing`` holds the ranks that should have sent it."""

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class MessageExpiredError(MessageError):
    """A message was removed before it was read, because its expiration time had passed."""
