"""One NCCL communicator, every call to which has a deadline.

The simple way fails: a communicator that blocks, as NCCL's do by default, waits for other ranks in
C, where neither a deadline nor SIGINT ends the wait. A thread for such a call does not help, as the
thread stays. So the communicator is one that does not block (``blocking=0`` in ``ncclConfig_t``):
NCCL hands each call to a thread of its own, and this module asks for the state.

A call has two ends, and each can be waited for:

launched
    NCCL has connected to the ranks that the operation needs, and the kernel is on the stream.
    ``run`` waits for this, because NCCL allows no other call before. The first operation between
    two ranks is launched when both have called it. Later ones do not wait for other ranks.
ended
    The kernel has ended on the GPU. ``wait`` waits for this, by a CUDA event after each operation.

If either takes too long, or NCCL reports an error, the communicator is aborted: NCCL ends its
kernels on this GPU, and the streams go on with what comes after them. ``ncclCommAbort`` and
``ncclCommDestroy`` do block, until the ranks of this host have closed their connections. So they
run in a thread, which is no longer waited for when its time is over, and ends when NCCL does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch

from refdist.deadline import Deadline
from refdist.errors import CollectiveError
from refdist.nccl.library import IN_PROGRESS, SUCCESS, load
from refdist.polling import sched_yield

ABORT_SECONDS = 5.0
"""How long an abort is waited for, after the deadline of the call that failed."""

_EAGER_POLLS = 100  # a launch takes some 50 us, and a poll half of one
_SPIN_SECONDS, _POLL_SECONDS = 2e-3, 2e-4
_MOST_EVENTS = 64
_new_event: Any = torch.cuda.Event  # has no annotations


class Launch(NamedTuple):
    """An operation, the stream that it is launched on, and its tensors.

    In an open group, nothing but this keeps their memory from being used again before the launch.
    """

    operation: str
    stream: torch.cuda.Stream
    tensors: tuple[torch.Tensor, ...] = ()


class _OpenGroup(threading.local):
    """The group of operations that this thread has begun. NCCL has one for each thread."""

    handle: "Handle | None" = None
    depth = 0


_open_group = _OpenGroup()


class Handle:
    """A communicator of nccl4py, and the operations that are under way on it.

    For one thread at a time.

    Attributes:
        comm: of nccl4py.
        rank: of this process in it.
        world_size: the number of its ranks.
        device: its GPU.
        ended: why it cannot be used any more; empty while it can.
    """

    def __init__(self, comm: Any, rank: int, world_size: int, device: torch.device) -> None:
        self.comm = comm
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.ended = ""
        self._grouped: list[Launch] = []
        self._under_way: deque[tuple[str, Any]] = deque()  # in the order of launches
        self._spare: list[Any] = []

    def run(
        self,
        operation: str,
        deadline: Deadline,
        start: Callable[[], object],
        launches: Sequence[Launch] = (),
    ) -> None:
        """Have NCCL start something, and wait until it is done or, on a stream, launched.

        In an open group, NCCL only notes the operation, and nothing is waited for.

        Raises:
            ValueError: the communicator has ended.
            CollectiveError: it failed or was not done in time. The communicator is aborted then,
                as it is by any other exception, such as KeyboardInterrupt.
        """
        self.check_usable(operation)
        try:
            start()
            if _open_group.handle is self:
                self._grouped += launches
                return
            self._settle(deadline)
            for launch in launches:
                self._note(launch)
        except BaseException as error:
            self._give_up(operation, deadline, error)

    def check_usable(self, operation: str) -> None:
        """Raise ValueError if the communicator has ended, or another's group is open here."""
        if self.ended:
            raise ValueError(f"{operation}: this communicator cannot be used: it {self.ended}")
        if _open_group.handle not in (None, self):
            raise ValueError(
                f"{operation}: this thread has begun a group of another communicator; call its "
                f"group_end first"
            )

    def _settle(self, deadline: Deadline) -> None:
        """Wait until NCCL has finished what it was asked for last."""
        polls = 0
        while self._state() == IN_PROGRESS:
            polls += 1
            if polls > _EAGER_POLLS:
                if not deadline.remaining():
                    raise TimeoutError("not all ranks that it needs have made the same call")
                _pause(deadline)

    def _state(self) -> int:
        state: int = self.comm.get_async_error()
        if state != SUCCESS and state != IN_PROGRESS:
            told = f"{load().get_error_string(state)}: {self.comm.get_last_error()}"
            raise RuntimeError(" ".join(told.split()))
        return state

    def _note(self, launch: Launch) -> None:
        """Have an event tell the end of an operation."""
        if torch.cuda.is_current_stream_capturing():
            return  # the operation runs when the graph does, and events cannot be asked now
        if len(self._under_way) >= _MOST_EVENTS:
            while self._under_way and self._under_way[0][1].query():
                self._spare.append(self._under_way.popleft()[1])
        event = self._spare.pop() if self._spare else _new_event()
        event.record(launch.stream)
        self._under_way.append((launch.operation, event))

    def wait(self, deadline: Deadline) -> None:
        """Wait until all operations that were launched have ended. Raises as ``run``.

        Only KeyboardInterrupt and the like leave the communicator as it is.
        """
        self.check_usable("wait")
        if _open_group.handle is self:
            raise ValueError("wait: this thread has begun a group; call group_end first")
        operation = "wait"
        try:
            while self._under_way:
                operation, event = self._under_way[0]
                if event.query():
                    self._spare.append(self._under_way.popleft()[1])
                    continue
                self._state()
                if not deadline.remaining():
                    raise TimeoutError(
                        "it was launched but has not ended, so a rank that it needs has not made "
                        "the same call, is stopped or has died, or the stream is busy"
                    )
                _pause(deadline)
        except Exception as error:
            self._give_up(operation, deadline, error)

    def group_start(self) -> None:
        """Begin a group in this thread, or another one within it."""
        self.check_usable("group_start")
        # in this order: an interrupt between them ends in an error, not in a group that none ends
        _open_group.handle = self
        _open_group.depth += 1
        load().group_start()

    def group_end(self, deadline: Deadline) -> None:
        """Launch the operations of the group. Raises as ``run``."""
        self.check_usable("group_end")
        if _open_group.handle is not self:
            raise ValueError("group_end: this thread has begun no group")
        if _open_group.depth > 1:
            load().group_end()
            _open_group.depth -= 1
            return

        def launch() -> None:
            load().group_end()
            _open_group.handle, _open_group.depth = None, 0

        launches, self._grouped = self._grouped, []
        names = ", ".join(launch.operation for launch in launches[:3]) or "nothing"
        more = f" and {len(launches) - 3} more" if len(launches) > 3 else ""
        self.run(f"group of {names}{more}", deadline, launch, launches)

    def destroy(self, deadline: Deadline) -> None:
        """End the communicator when its operations have ended. Raises as ``wait``."""
        if self.ended:
            return
        while _open_group.handle is self:
            self.group_end(deadline)
        self.wait(deadline)
        self.run("destroy", deadline, self.comm.finalize)
        self.ended = "was destroyed"
        why = self._in_thread(self.comm.destroy, max(deadline.remaining(), 1.0))
        if why:
            raise self._error("destroy", deadline, why)

    def abort(self, why: str = "was aborted") -> str:
        """End the communicator and its kernels now.

        Returns:
            Why NCCL has not freed its memory in time, or nothing if it has.
        """
        if self.ended:
            return ""
        self.ended = why
        self._leave_group()
        return self._in_thread(self.comm.abort, ABORT_SECONDS)

    def _leave_group(self) -> None:
        """End a group that this thread has begun; else NCCL keeps what comes after it back, too."""
        if _open_group.handle is not self:
            return
        _open_group.handle = None
        while _open_group.depth:
            _open_group.depth -= 1
            with suppress(Exception):
                load().group_end()

    def _in_thread(self, end: Callable[[], object], seconds: float) -> str:
        """Call what ends the communicator and blocks. Why it has not ended in time, or nothing."""
        ended: Future[None] = Future()

        def call() -> None:
            try:
                torch.cuda.set_device(self.device)
                end()
                ended.set_result(None)
            except BaseException as error:
                ended.set_exception(error)

        threading.Thread(target=call, daemon=True, name="refdist-nccl").start()
        try:
            error = ended.exception(seconds)
        except FutureTimeout:
            return (
                "other ranks on this host have not ended theirs, and NCCL frees its memory when "
                "they do"
            )
        return "" if error is None else _first_line(error)

    def _give_up(self, operation: str, deadline: Deadline, error: BaseException) -> NoReturn:
        """Abort the communicator, and raise the CollectiveError that tells why."""
        elapsed = deadline.elapsed()
        unfreed = self.abort(f"was aborted when {operation} failed")
        if not isinstance(error, Exception):
            raise error
        why = "; ".join(filter(None, [_first_line(error), unfreed]))
        raise self._error(operation, deadline, why, elapsed) from error

    def _error(
        self, operation: str, deadline: Deadline, why: str, elapsed: float | None = None
    ) -> CollectiveError:
        elapsed = deadline.elapsed() if elapsed is None else elapsed
        return CollectiveError(
            f"{operation} failed on rank {self.rank} of {self.world_size} after {elapsed:.2f} of "
            f"{deadline.allowed:g} s: {why}; this communicator has ended, so form another",
            operation=operation,
            elapsed=elapsed,
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pause(deadline: Deadline) -> None:
    """Let others run for a moment: a short one while the answer may come at once."""
    if deadline.elapsed() < _SPIN_SECONDS:
        sched_yield()
    else:
        time.sleep(_POLL_SECONDS)
