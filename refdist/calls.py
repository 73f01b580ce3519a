"""Calls to a group: one at a time, on time, and never torn apart by an interrupt.

A request to a store blocks until it is answered, and torch can neither interrupt it nor limit its
time. Three things follow, and each has its place here:

* A protocol must not be left between two of its steps. So SIGINT, while a call runs, only cancels
  the call's deadline. The call ends between two waits, in the order that its protocol prescribes,
  and then the interrupt takes place.
* While the process that hosts the store is stopped, a request waits for it to go on. So a thread
  watches the calls of this process. When a call's time is over and the store has said nothing for
  a second, it closes the connection under the request. The group is lost then, on this rank.
* A group's counters say what comes next, so two threads cannot use them at once.
"""

import _signal  # type: ignore[import-not-found]
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from torch.distributed import DistError, Store

from refdist.compat import tcp_store_of
from refdist.errors import ConcurrentCallError, StoreConnectionError
from refdist.waiting import ANSWER_SECONDS, Deadline

T = TypeVar("T")

_WATCH_SECONDS = 0.25
# signal.signal looks every handler up in an enum, which would take longer than all else here
_set_handler, _get_handler = _signal.signal, _signal.getsignal
_SIGINT = int(signal.SIGINT)
_MAIN_THREAD = threading.main_thread()


class Calls:
    """The calls of one group, of which one runs at a time."""

    def __init__(self, store: Store | None = None) -> None:
        self._running = threading.Lock()
        self._what = ("", 0)
        self._connection: int | None = None
        self._deadline: Deadline | None = None  # of the call that is running
        if store is not None:
            self.watch(store)

    def watch(self, store: Store) -> None:
        """Give calls up that this store does not answer, also the one that is running."""
        self._connection = _connection_of(store)
        self._be_watched()

    def run(
        self,
        what: str,
        function: Callable[[], T],
        deadline: Deadline,
        unclaimed: Callable[[T], object] | None = None,
    ) -> T:
        """Call ``function``, and return what it returns.

        Args:
            what: the name of the call, for errors.
            function: its waits end at ``deadline``.
            deadline: is cancelled by SIGINT.
            unclaimed: gets the result if an interrupt keeps the caller from getting it.

        Raises:
            ConcurrentCallError: another thread is in a call.
            StoreConnectionError: the store did not answer, not even that the time was over.
            BaseException: what ``function`` raises, or what the handler of SIGINT raises.
        """
        interrupt = _Interrupt(deadline)
        interrupt.hold()
        # from here to let_go, no interrupt can strike between two of these lines
        error: BaseException | None = None
        try:
            result = self._run_alone(what, function, deadline)
        except BaseException as raised:
            error = raised
        try:
            interrupt.let_go()
        except BaseException as late:
            interrupt.raised = late
        if interrupt.raised is not None:
            if error is None and unclaimed is not None:
                unclaimed(result)
            raise interrupt.raised from None
        if deadline.given_up and isinstance(error, DistError):
            raise StoreConnectionError(
                f"{what}: the store did not answer, although the {deadline.allowed:g} s were "
                f"over, so this rank gave it up: its host, rank 0, is stopped, overloaded or out "
                f"of reach; form a new group"
            ) from error
        if error is not None:
            raise error
        return result

    def _run_alone(self, what: str, function: Callable[[], T], deadline: Deadline) -> T:
        if not self._running.acquire(blocking=False):
            other, thread = self._what
            raise ConcurrentCallError(
                f"{what}: {other} is running in thread {thread}; a group is for one thread at a "
                f"time, so create a group for each thread"
            )
        try:
            self._what = what, threading.get_ident()
            self._deadline = deadline
            self._be_watched()
            return function()
        finally:
            _watchdog.watched.pop(id(self), None)
            self._deadline = None
            self._running.release()

    def _be_watched(self) -> None:
        if self._connection is not None and self._deadline is not None:
            _watchdog.watched[id(self)] = self, self._deadline
            _watchdog.start()

    def give_up(self) -> None:
        """Close the connection, under the request that waits for an answer."""
        if self._connection is not None:
            with suppress(OSError), socket.socket(fileno=socket.dup(self._connection)) as own:
                own.shutdown(socket.SHUT_RDWR)


class _Interrupt:
    """Holds SIGINT back while a protocol runs: its handler runs, but what it raises has to wait."""

    def __init__(self, deadline: Deadline) -> None:
        self.raised: BaseException | None = None
        self._deadline = deadline
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._came_early = False  # a signal, before the handler was known

    def hold(self) -> None:
        # only the main thread gets signals, and only it may set a handler
        if threading.get_ident() != _MAIN_THREAD.ident or _get_handler(_SIGINT) is None:
            # or the signal belongs to code that is not Python, and cannot be set back
            return
        handler = _set_handler(_SIGINT, self._handle)
        if callable(handler):
            self._handler = handler
        else:
            # SIGINT is ignored, or ends the process
            _set_handler(_SIGINT, handler)
        if self._came_early:
            signal.raise_signal(_SIGINT)

    def let_go(self) -> None:
        # a handler may have set another one
        if self._handler is not None and _get_handler(_SIGINT) == self._handle:
            _set_handler(_SIGINT, self._handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._handler is None:
            self._came_early = True
            return
        try:
            self._handler(number, frame)
        except BaseException as error:
            self.raised = error
            self._deadline.cancel(type(error).__name__)


class _Watchdog:
    """One thread of this process that looks, four times a second, for calls that hang."""

    def __init__(self) -> None:
        self.watched: dict[int, tuple[Calls, Deadline]] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # a forked child has this object, but not the thread
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, daemon=True, name="refdist-watchdog")
            self._thread.start()

    def _look(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(_WATCH_SECONDS)
            # this process was stopped itself, and the store may have answered meanwhile
            overslept = time.monotonic() - before > _WATCH_SECONDS + ANSWER_SECONDS / 2
            for calls, deadline in list(self.watched.values()):
                if overslept:
                    deadline.store_answers()
                if deadline.patience() <= 0 and not deadline.given_up:
                    deadline.given_up = True
                    calls.give_up()


_watchdog = _Watchdog()


def _connection_of(store: Store) -> int | None:
    """The socket with which a store speaks to a server in another process, if it can be told.

    All groups on prefixes of one store share it, and are lost together.

    torch shows it in the text of the store alone, in the same way on 2.6, 2.13 and 2.15.
    """
    try:
        tcp_store = tcp_store_of(store)
    except ValueError:
        return None
    found = re.search(r"fd=(\d+).*server=<nullptr>", repr(tcp_store))
    return int(found[1]) if found else None
