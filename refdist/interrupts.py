"""SIGINT, held back while a protocol runs.

The simple ways fail. Left alone, SIGINT raises KeyboardInterrupt between any two steps of a
protocol, and ranks are out of step. Blocked (``pthread_sigmask``), it does not end a wait. Run in
another thread, a protocol is never interrupted, but every call pays for being handed over.

So while a call runs, another handler stands in for that of the process. It runs the handler that
was there, and keeps what that raises until the call has ended. The call ends early, between two
waits, because its deadline is cancelled. Only the user's own code, which a call runs to unpickle an
object, is interrupted at once.
"""

# signal.signal looks every handler up in an enum, which would take longer than all else here
import _signal  # type: ignore[import-not-found]
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from refdist.deadline import Deadline

_set_handler, _get_handler = _signal.signal, _signal.getsignal
_SIGINT = int(signal.SIGINT)
_MAIN_THREAD = threading.main_thread()


class Interrupt:
    """Holds SIGINT back during one call. ``raised`` is what its handler raised meanwhile."""

    def __init__(self, deadline: Deadline) -> None:
        self.raised: BaseException | None = None
        self._deadline = deadline
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._caller: CodeType | None = None

    def hold(self) -> None:
        """Stand in for the handler of SIGINT, until ``let_go``.

        The function that calls this has the interrupt in a variable of this name.
        """
        # only the main thread gets signals, and only it may set a handler
        if threading.get_ident() != _MAIN_THREAD.ident:
            return
        handler = _get_handler(_SIGINT)
        # it is not if SIGINT is ignored, or ends the process, or belongs to code of C
        if callable(handler):
            self._caller = sys._getframe(1).f_code
            self._handler = handler
            _set_handler(_SIGINT, self._handle)

    def let_go(self) -> None:
        """Set the handler back that was there; an interrupt takes place from now on."""
        # a handler may have set another one
        if self._handler is not None and _get_handler(_SIGINT) == self._handle:
            _set_handler(_SIGINT, self._handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._handler is not None and self._caller is not None
        if not is_on_stack(frame, self._caller, "interrupt", self):
            # an exception from outside has ended the call before it could let go
            self.let_go()
            self._handler(number, frame)
            return
        try:
            self._handler(number, frame)
        except BaseException as error:
            self.raised = error
            self._deadline.cancel(type(error).__name__)
            if self._deadline.in_user_code:
                self._deadline.in_user_code = False
                raise


def is_on_stack(frame: FrameType | None, code: CodeType, name: str, value: Any) -> bool:
    """Whether a function runs in or above a frame that has ``value`` in the variable ``name``."""
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get(name) is value:
            return True
        frame = frame.f_back
    return False
