"""Deadlines, the slices that long waits are made of, and what else ends a call before its end."""

import time
from datetime import timedelta

from refdist.checks import check_seconds, wait_of

SLICE_SECONDS = 1.0
"""The longest single wait. A longer one is made of several, and may be cancelled between them."""


class CancelledWaitError(Exception):
    """Whoever asked for this wait no longer wants it. The text says why.

    Attributes:
        completed: whether the barrier that waited was complete all the same.
    """

    completed = False


class NoRoomError(MemoryError):
    """There is no room for a large object now; it can be read again."""


class UserCodeError(Exception):
    """Carries what the user's code raised as an object was unpickled, and is no Exception.

    It never reaches the caller, who gets ``original``: SystemExit, for example.
    """

    def __init__(self, original: BaseException) -> None:
        super().__init__(repr(original))
        self.original = original


class Deadline:
    """A point in time, ``allowed`` seconds after its creation, on the monotonic clock.

    Attributes:
        allowed: seconds.
        cancelled: why the waits that end here are no longer wanted; None while they are.
        in_user_code: whether this process runs code of its user, which may be interrupted at once.
    """

    def __init__(self, allowed: float) -> None:
        self.allowed = check_seconds("timeout", allowed)
        if self.allowed < 0:
            raise ValueError(f"timeout={allowed}: must be finite seconds, at least 0")
        self.cancelled: str | None = None
        self.in_user_code = False
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the creation, or since the last restart."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.allowed - self.elapsed())

    def restart(self) -> None:
        """Allow as many seconds again, from now on."""
        self._start = time.monotonic()

    def cancel(self, reason: str) -> None:
        """Make the waits that end at this deadline raise CancelledWaitError, within a slice."""
        self.cancelled = reason

    def check(self) -> None:
        """Raise CancelledWaitError if the deadline was cancelled."""
        if self.cancelled is not None:
            raise CancelledWaitError(self.cancelled)

    def limit(self) -> timedelta:
        """How long a single wait may take now, cancelled or not."""
        return wait_of(min(self.remaining(), SLICE_SECONDS))

    def slice(self) -> timedelta:
        """How long a single wait may take now.

        Raises:
            CancelledWaitError: the deadline was cancelled.
        """
        self.check()
        return self.limit()
