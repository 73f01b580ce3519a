"""Calls to a group: one at a time, and each whole or not at all.

A group's counters say what comes next, so no two calls may use them at once, and none may stop
between two steps of a protocol. Two things stop a call in the middle.

SIGINT
    The simple ways fail. Left alone, SIGINT raises KeyboardInterrupt between any two steps, and
    ranks are out of step. Blocked (``pthread_sigmask``), it does not end a wait. Run in another
    thread, a protocol is never interrupted, but every call pays for being handed over. So while a
    call runs, another handler stands in for that of the process. It runs the handler that was
    there, and keeps what that raises until the call has ended. The call ends early, between two
    waits, because its deadline is cancelled. Only the user's own code, which a call runs to
    unpickle an object, is interrupted at once.
Any other exception from outside, such as that of another signal's handler
    The simple way, to undo what the call has done, fails: that can be interrupted too. So such a
    call is *torn*, and its group is lost on this rank. All later calls say so, and the other ranks
    miss this one, as if it had died.
"""

# signal.signal looks every handler up in an enum, which would take longer than all else here
import _signal  # type: ignore[import-not-found]
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch.distributed import DistError, DistNetworkError

from refdist.deadline import CancelledWaitError, Deadline, NoRoomError, UserCodeError
from refdist.errors import (
    BarrierError,
    ConcurrentCallError,
    GroupCreationError,
    MessageError,
    StoreConnectionError,
)
from refdist.store.client import StoreClient, quiet

T = TypeVar("T")

_ENDS = (  # what a protocol raises at its end, and not in its middle
    BarrierError,
    CancelledWaitError,
    DistError,
    GroupCreationError,
    MessageError,
    NoRoomError,
    StoreConnectionError,
    UserCodeError,
)
FOLLOWED_BY = "shrink", "admit"
"""The calls that return the group which follows one."""

_set_handler, _get_handler = _signal.signal, _signal.getsignal
_SIGINT = int(signal.SIGINT)
_MAIN_THREAD = threading.main_thread().ident


class Calls:
    """The calls of one group, of which one runs at a time.

    Attributes:
        rank: of this process in the group.
        client: of the store; None as long as the group has none.
        closed: whether the group is closed on this rank.
        kept: what has not reached the caller yet: objects that were received, by their source, and
            the group that follows this one, by the name of the call.
    """

    def __init__(self, rank: int, client: StoreClient | None = None) -> None:
        self.rank = rank
        self.client = client
        self.kept: dict[Any, Any] = {}
        self._present: dict[str, _Call] = {}  # the call that runs, or was torn
        self.closed = False
        self._process = os.getpid()

    def run(
        self,
        what: str,
        deadline: Deadline,
        function: Callable[..., T],
        *arguments: Any,
        kept: Any = None,
    ) -> T:
        """Call a function of a protocol, and return its result.

        Args:
            what: the name of the call, for errors.
            deadline: of the waits of the function; SIGINT cancels it.
            function: of a protocol.
            arguments: of the function.
            kept: the entry of ``self.kept`` that the function returns, and that ends with this
                call. It stays if an interrupt keeps the caller from getting it.

        Raises:
            ValueError: the group is closed, and nothing is kept for this call.
            ConcurrentCallError: another thread is in a call.
            StoreConnectionError: the store is lost. Or a call was torn before, or this process is
                forked from the one that formed the group.
            BaseException: of the function, or of the handler of SIGINT.
        """
        call = _Call(what, deadline)  # from now on, SIGINT is held back
        try:
            # what was kept may still have to reach the caller
            if (self.closed and self.kept.get(kept) is None) or os.getpid() != self._process:
                self._refuse(call)
            if self._present.setdefault("call", call) is not call:
                self._take_turn(call)
            if self.client is not None and self.client.shared.seconds != deadline.allowed:
                self.client.limit(deadline.allowed)
            result, error = None, None
            try:
                with quiet():
                    result = function(*arguments)
            except UserCodeError as raised:
                error = raised.original
            except _ENDS as raised:
                error = self._explained(raised, call) if isinstance(raised, DistError) else raised
        except BaseException:
            # refused; or torn, and then the call stays the present one
            call.let_go()
            raise
        try:
            call.let_go()
        except BaseException as late:
            call.raised = late
        # Python looks for signals where it calls, and from here on nothing is called
        error = call.raised or error
        if error is None and kept is not None:
            del self.kept[kept]
        del self._present["call"]
        if error is None:
            return result  # type: ignore[return-value]  # cast would be a call
        try:
            raise error
        finally:
            # an error that has a variable of its own traceback outlives its last user
            error = call.raised = None

    def close(self, operation: str, timeout: float, leave: Callable[..., None]) -> None:
        """Run the last call, which may follow one that was torn. Closing again does nothing."""
        if self.closed:
            return
        present = self._present.get("call")
        if present is not None and not present.runs() and self._present.get("call") is present:
            del self._present["call"]  # it is torn, so no other call takes its place
        deadline = Deadline(timeout)
        try:
            self.run(operation, deadline, leave, deadline)
        except ConcurrentCallError:
            raise
        except BaseException:
            self.closed = True
            raise
        self.closed = True

    def following(self) -> Any:
        """Take the group that follows this one, if an interrupt kept it from the caller."""
        kept = [self.kept.pop(name, None) for name in FOLLOWED_BY]
        return kept[0] or kept[1]

    def check_open(self, what: str) -> None:
        """Raise ValueError if the group is closed."""
        if self.closed:
            kept = [name for name in FOLLOWED_BY if self.kept.get(name)]
            advice = f"; call {kept[0]} again for the one that follows it" if kept else ""
            raise ValueError(f"{what}: this group is closed{advice}")

    def _refuse(self, call: "_Call") -> None:
        self.check_open(call.what)
        raise StoreConnectionError(
            f"{call.what}: process {self._process} formed this group, and process {os.getpid()}, "
            f"which was forked from it, cannot use it; form a group of its own"
        )

    def _take_turn(self, call: "_Call") -> None:
        """Make a call the present one, in place of one that has just ended; or refuse it."""
        while (present := self._present.setdefault("call", call)) is not call:
            if present.runs():
                raise ConcurrentCallError(
                    f"{call.what}: {present.what} is running in thread {present.thread}; a group "
                    f"is for one thread at a time, so create a group for each thread"
                )
            # one that has just ended is there no more
            if self._present.get("call") is present:
                raise StoreConnectionError(
                    f"{call.what}: this rank has lost its group, because an exception from outside "
                    f"ended {present.what} in the middle; form a new group"
                )

    def _explained(self, error: DistError, call: "_Call") -> StoreConnectionError:
        who = f"rank {self.rank}" if self.rank >= 0 else "this process"
        text = f"{who} found in the store what no rank of refdist writes: {error}"
        if isinstance(error, DistNetworkError):
            text = f"{who} lost the store that rank 0 hosts: {error}"
            if self.client is not None and self.client.timed_out:
                text = (
                    f"the store did not answer, although the {call.deadline.allowed:g} s were "
                    f"over, so this rank gave it up: its host, rank 0, is stopped, overloaded or "
                    f"out of reach; form a new group"
                )
        explained = StoreConnectionError(f"{call.what}: {text}")
        explained.__cause__ = error
        return explained


class _Call:
    """A call, which stays where ``Calls`` has it if it is torn. Holds SIGINT back until ``let_go``.

    Attributes:
        what: its name.
        deadline: of its waits.
        thread: that runs it.
        raised: by the handler of SIGINT meanwhile.
    """

    def __init__(self, what: str, deadline: Deadline) -> None:
        self.what = what
        self.deadline = deadline
        self.thread = threading.get_ident()
        self.raised: BaseException | None = None
        self._handler: Callable[[int, FrameType | None], object] | None = None
        # only the main thread gets signals, and only it may set a handler
        if self.thread == _MAIN_THREAD:
            handler = _get_handler(_SIGINT)
            # it is not if SIGINT is ignored, or ends the process, or belongs to code of C
            if callable(handler):
                self._handler = handler
                _set_handler(_SIGINT, self._handle)

    def let_go(self) -> None:
        """Set the handler back that was there; an interrupt takes place from now on."""
        # a handler may have set another one
        if self._handler is not None and _get_handler(_SIGINT) == self._handle:
            _set_handler(_SIGINT, self._handler)

    def runs(self) -> bool:
        """Whether it is on the stack of its thread."""
        return self._is_on(sys._current_frames().get(self.thread))

    def _is_on(self, frame: FrameType | None) -> bool:
        """Whether ``Calls.run`` runs this call in or above a frame."""
        while frame is not None:
            if frame.f_code is _RUN and frame.f_locals.get("call") is self:
                return True
            frame = frame.f_back
        return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._handler is not None
        if not self._is_on(frame):
            # an exception from outside has ended the call before it could let go
            self.let_go()
            self._handler(number, frame)
            return
        try:
            self._handler(number, frame)
        except BaseException as error:
            self.raised = error
            self.deadline.cancel(type(error).__name__)
            if self.deadline.in_user_code:
                self.deadline.in_user_code = False
                raise


_RUN: CodeType = Calls.run.__code__
