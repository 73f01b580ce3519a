"""What a check needs to try an answer on an engine: the answer itself, and an end in time."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def defined_here(name: str) -> Any:
    """What the learner has defined on this engine; a NameError if it is nothing."""
    try:
        return vars(sys.modules["__main__"])[name]
    except KeyError:
        raise NameError(f"name {name!r} is not defined on the engines") from None


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
        yield
    except KeyboardInterrupt:
        if late.is_set():
            raise TooLateError(f"did not end within {seconds:g} s") from None
        raise
    finally:
        timer.cancel()
