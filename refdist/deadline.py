"""Deadlines, the slices that long waits are made of, and the exceptions that end a call early."""

import time
from collections.abc import Callable
from datetime import timedelta

from refdist.checks import MOST_SECONDS, check_seconds, wait_of

SLICE_SECONDS = 1.0
"""The longest single wait. A longer one is made of several, and may be cancelled between them."""

SLICE = timedelta(seconds=SLICE_SECONDS)


class CancelledWaitError(Exception):
    """The caller no longer wants this wait. The text says why."""


class NoRoomError(MemoryError):
    """There is no room for a large object now; it can be read again."""


class UserCodeError(Exception):
    """Carries an exception of the user's code, raised by unpickling, that is no Exception.

    It never reaches the caller, who gets ``original``: SystemExit, for example.
    """

    def __init__(self, original: BaseException) -> None:
        super().__init__(repr(original))
        self.original = original


class Deadline:
    """A point in time, ``allowed`` seconds after its creation, on the monotonic clock.

    Attributes:
        allowed: seconds.
        whole: whether they are for a whole call, and not for each of its phases.
        cancelled: why the waits that end here are no longer wanted; None while they are.
        in_user_code: whether this process runs code of its user, which may be interrupted at once.
        after_slice: is called when a slice of a wait has passed in vain; it may raise.

    Raises:
        ValueError: ``allowed`` is no finite number of seconds, or is below 0.
    """

    def __init__(self, allowed: float, whole: bool = False) -> None:
        if type(allowed) is not float or not 0 <= allowed <= MOST_SECONDS:
            seconds = check_seconds("timeout", allowed)
            if seconds < 0:
                raise ValueError(f"timeout={allowed}: must be finite seconds, at least 0")
            allowed = seconds
        self.allowed = allowed
        self.whole = whole
        self.cancelled: str | None = None
        self.in_user_code = False
        self.after_slice: Callable[[], object] | None = None
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the creation, or since the last restart."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.allowed - (time.monotonic() - self._start))

    def restart(self) -> None:
        """Allow as many seconds again for the next phase, unless they are for the whole call."""
        if not self.whole:
            self._start = time.monotonic()

    def cancel(self, reason: str) -> None:
        """Make the waits that end at this deadline raise CancelledWaitError, within a slice."""
        self.cancelled = reason

    def check(self) -> None:
        """Raise CancelledWaitError if the deadline was cancelled."""
        if self.cancelled is not None:
            raise CancelledWaitError(self.cancelled)

    def slice(self) -> timedelta:
        """The longest that a single wait may take now.

        Raises:
            CancelledWaitError: the deadline was cancelled.
        """
        if self.cancelled is not None:
            raise CancelledWaitError(self.cancelled)
        left = self.allowed - (time.monotonic() - self._start)
        if left >= SLICE_SECONDS:
            return SLICE
        return wait_of(left)
