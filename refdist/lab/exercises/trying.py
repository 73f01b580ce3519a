"""The tools of a check that tries an answer: the answer itself, and an end in time."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refdist.exploration import Snapshot
from refdist.lab.exercises import UnsolvedError


def defined_here(name: str) -> Any:
    """The object that the learner has defined on this engine; a NameError if there is none."""
    try:
        return vars(sys.modules["__main__"])[name]
    except KeyError:
        raise NameError(f"name {name!r} is not defined on the engines") from None


class LimitedStore:
    """A store for an answer that may ask again and again: an UnsolvedError ends that."""

    def __init__(self, store: Any, most: int) -> None:
        self._store, self._left = store, most

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UnsolvedError("a rank asks the store again and again: let it wait in the store")
        return getattr(self._store, name)


def no_call_raises(snapshot: Snapshot) -> bool:
    """No call raises an error."""
    errors = [call.error for calls in snapshot.calls for call in calls.values() if call.error]
    for error in errors:
        if isinstance(error, UnsolvedError):
            raise error
    return not errors


class TooLateError(Exception):
    """An answer took too long."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt this process, as Stop does, unless the block ends before."""
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, interrupt)
    timer.start()
    try:
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # an interrupt that is under way comes here
    except KeyboardInterrupt:
        if not late.is_set():
            raise
    if late.is_set():
        raise TooLateError(f"did not end within {seconds:g} s")
