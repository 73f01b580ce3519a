"""Calls to a group: one at a time, whole or not at all.

A group's counters say what comes next, so two calls must not use them at once, and none may stop
between two steps of a protocol. What ends a call in the middle is SIGINT, which
``refdist.interrupts`` holds back, and what no one can hold back: another signal's handler that
raises, or an exception that a thread gets from outside. The simple way, to undo what the call has
done, fails: that can be interrupted too. So such a call is *torn*, and its group is lost on this
rank. All later calls say so, and the other ranks miss this one, as if it had died.
"""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.distributed import DistError

from refdist.deadline import CancelledWaitError, Deadline, NoRoomError, UserCodeError
from refdist.errors import (
    BarrierError,
    ConcurrentCallError,
    GroupCreationError,
    MessageError,
    StoreConnectionError,
)
from refdist.interrupts import Interrupt, is_on_stack
from refdist.store.client import StoreClient

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


@dataclass(eq=False)
class _Call:
    """A call, which stays where ``Calls`` has it if it is torn."""

    what: str
    thread: int


class Calls:
    """The calls of one group, of which one runs at a time.

    Attributes:
        client: what the calls ask; None as long as the group has no store.
        kept: what was received and has not reached the caller yet, by mailbox.
    """

    def __init__(self, client: StoreClient | None = None) -> None:
        self.client = client
        self.kept: dict[Any, Any] = {}
        self._present: dict[str, _Call] = {}  # the call that runs, or was torn
        self._process = os.getpid()

    def run(
        self, what: str, function: Callable[[], T], deadline: Deadline, mailbox: Any = None
    ) -> T:
        """Call ``function``, and return what it returns.

        Args:
            what: the name of the call, for errors.
            function: its waits end at ``deadline``.
            deadline: is cancelled by SIGINT.
            mailbox: the entry of ``kept`` that the caller gets, and that ends with this call. It
                stays if an interrupt keeps the caller from getting it.

        Raises:
            ConcurrentCallError: another thread is in a call.
            StoreConnectionError: a call was torn before; or this process is forked from the one
                that formed the group.
            BaseException: what ``function`` raises, or what the handler of SIGINT raises.
        """
        call = _Call(what, threading.get_ident())
        interrupt = Interrupt(deadline)
        try:
            interrupt.hold()
            self._begin(call)
            if self.client is not None:
                self.client.deadline = deadline
            result, error = None, None
            try:
                result = function()
            except UserCodeError as raised:
                error = raised.original
            except _ENDS as raised:
                error = raised
        except BaseException:
            # refused; or torn, and then the call stays the present one
            interrupt.let_go()
            raise
        try:
            interrupt.let_go()
        except BaseException as late:
            interrupt.raised = late
        # Python looks for signals where it calls, and from here on nothing is called
        error = interrupt.raised or error
        if error is None and mailbox is not None:
            del self.kept[mailbox]
        del self._present["call"]
        if error is None:
            return result  # type: ignore[return-value]  # cast would be a call
        try:
            raise error
        finally:
            # an error that has a variable of its own traceback outlives its last user
            error = interrupt.raised = None

    def close(self) -> None:
        """Forget a call that was torn: what follows only leaves the group."""
        present = self._present.get("call")
        if present is not None and not _runs(present):
            self._present.pop("call", None)

    def _begin(self, call: _Call) -> None:
        """Make a call the present one, unless there is one."""
        if os.getpid() != self._process:
            raise StoreConnectionError(
                f"{call.what}: process {self._process} formed this group, and process "
                f"{os.getpid()}, which was forked from it, cannot use it; form a group of its own"
            )
        while (present := self._present.setdefault("call", call)) is not call:
            if _runs(present):
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


def _runs(call: _Call) -> bool:
    """Whether a call is on the stack of its thread."""
    frame = sys._current_frames().get(call.thread)
    return is_on_stack(frame, Calls.run.__code__, "call", call)
