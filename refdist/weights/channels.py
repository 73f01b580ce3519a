"""Broadcasts by any communicator: how each kind begins one, and waits for its end.

Over a communicator of a GPU, broadcasts have a stream of their own. So they overlap the copies of
other chunks, which the caller's stream makes.
"""

import inspect
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup

from refdist import torch_versions
from refdist.checks import check_rank, check_seconds, wait_of
from refdist.errors import CollectiveError, failure
from refdist.polling import sched_yield
from refdist.torch_groups import collectives
from refdist.weights.memory import past_of

_cuda: Any = torch.cuda  # parts of it have no annotations
_SPIN_SECONDS, _POLL_SECONDS = 1e-2, 1e-4
"""A sleep takes at least as long as a GPU takes for 50 MB; a broadcast of 1 GiB takes 3 ms."""
_INTERRUPT_SECONDS = 0.2
"""Torch waits for this long without a look at Ctrl-C."""
_CUDA_SECONDS = 300.0
"""For a communicator of a GPU whose own timeout is unknown: vLLM's has none, torch's tells none."""

Finish = Callable[[], None]
"""Waits for the end of a broadcast that has begun."""


class Channel:
    """One transfer over a communicator with ``broadcast(tensor, src)``, which blocks.

    Attributes:
        rank: rank of this process.
        src: the rank that sends.
        device: the device of the tensors that it carries.
        memory: for chunks.
        ahead: the number of broadcasts that are under way while the one before them is waited for.
            Over gloo this gains nothing: its threads and the copies share the processors.
    """

    device = torch.device("cpu")
    ahead = 0

    def __init__(self, communicator: Any, src: int | None, timeout: float | None) -> None:
        self._communicator, self._timeout = communicator, timeout
        self.rank, self._size = _place(communicator)
        self.src = check_rank(self.rank if src is None else src, self._size, "src")
        takes = timeout is not None and takes_timeout(communicator)
        self._options = {"timeout": timeout} if takes else {}
        self._past, self._token = past_of(communicator), object()
        self.memory = self._past.memory
        self._check_past()

    def _check_past(self) -> None:
        """Raise if another transfer has not ended: a rank may take this one for the rest of it."""
        if self._past.unfinished not in (None, self._token):
            raise CollectiveError(
                f"rank {self.rank} can neither send nor receive: the last transfer over this "
                f"communicator did not end; destroy it and form another",
                operation="broadcast",
            )

    def start(self, tensor: torch.Tensor) -> Finish:
        """Begin to broadcast a contiguous uint8 tensor on ``device``, in place."""
        self._check_past()
        self._past.unfinished = self._token
        return self._start(tensor)

    def end(self) -> None:
        """Say that every broadcast of this transfer has ended well."""
        self._past.unfinished = None
        self.memory.trim()

    def _start(self, tensor: torch.Tensor) -> Finish:
        sent = tensor
        if self.rank == self.src and not hasattr(self._communicator, "device"):
            sent = tensor.clone()  # a view that is pickled would take along all that it looks into
        received = self._communicator.broadcast(sent, self.src, **self._options)
        if self.rank != self.src and isinstance(received, torch.Tensor) and received is not tensor:
            tensor.copy_(received)
        return lambda: None

    def leave(self, tensor: torch.Tensor) -> None:
        """Say that nobody waits for the broadcast of a tensor, whose memory may be freed."""

    def _failure(self, began: float, seconds: float | None, reason: Exception) -> CollectiveError:
        elapsed = time.monotonic() - began
        return failure("broadcast", self.rank, self._size, elapsed, seconds, reason)


class GlooChannel(Channel):
    """A transfer over a gloo group of torch, whose broadcasts run in threads of its own."""

    def _start(self, tensor: torch.Tensor) -> Finish:
        options, began = c10d.BroadcastOptions(), time.monotonic()
        options.rootRank = self.src
        if self._timeout is not None:
            # gloo's thread gives up too, or destroying the group would wait for its own timeout
            options.timeout = wait_of(self._timeout)
        try:
            work = self._communicator.broadcast([tensor], options)
        except RuntimeError as error:
            raise self._failure(began, self._timeout, error) from error
        return lambda: self._wait_for(work, began)

    def _wait_for(self, work: Any, began: float) -> None:
        """Wait in pieces: Ctrl-C does nothing while torch waits."""
        end = math.inf if self._timeout is None else time.monotonic() + self._timeout
        while not work.is_completed() and (left := end - time.monotonic()) > 0:
            with suppress(RuntimeError):  # the piece has passed, or the work has failed
                work.wait(wait_of(min(left, _INTERRUPT_SECONDS)))
        try:
            work.wait(wait_of(0))
        except RuntimeError as error:
            raise self._failure(began, self._timeout, error) from error


class CudaChannel(Channel):
    """A transfer over a communicator of a GPU, or over an NCCL group of torch."""

    ahead = 1

    def __init__(
        self, communicator: Any, src: int | None, timeout: float | None, device: torch.device
    ) -> None:
        super().__init__(communicator, src, timeout)
        self.device = device
        own = getattr(communicator, "timeout", None)
        own = float(own) if isinstance(own, (int, float)) else _CUDA_SECONDS
        self._seconds = own if timeout is None else timeout
        self._end: float | None = None
        self._stream = _cuda.Stream(device)

    def _start(self, tensor: torch.Tensor) -> Finish:
        """Launch the broadcast, after what the caller's stream has to do before.

        Among that is the packing of this chunk, and what was done with its memory before.
        """
        began = time.monotonic()
        self._stream.wait_stream(torch.cuda.current_stream(self.device.index))
        with torch.cuda.stream(self._stream):
            if isinstance(self._communicator, ProcessGroup):
                collectives.broadcast(tensor, self.src, self._communicator)
            else:
                self._communicator.broadcast(tensor, self.src, **self._options)
        ended = _cuda.Event()
        ended.record(self._stream)
        return lambda: self._wait_for(ended, began)

    def _wait_for(self, ended: Any, began: float) -> None:
        """Wait. After one that was late, those behind it get no deadline of their own."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        while not ended.query():
            if time.monotonic() > self._end:
                if hasattr(self._communicator, "wait"):
                    self._communicator.wait(0.0)  # aborts and raises, unless it has ended just now
                    break
                if isinstance(self._communicator, ProcessGroup):
                    torch_versions.abort(self._communicator)
                raise self._failure(began, self._seconds, TimeoutError("timed out"))
            if time.monotonic() - began < _SPIN_SECONDS:
                sched_yield()
            else:
                time.sleep(_POLL_SECONDS)
        self._end = None

    def leave(self, tensor: torch.Tensor) -> None:
        """Keep its memory from being used again before the broadcast has ended."""
        tensor.record_stream(self._stream)


def channel_of(communicator: Any, src: int | None, timeout: float | None) -> Channel:
    """The channel for one transfer over a communicator.

    Args:
        communicator: a ProcessGroup of torch, or an object with ``rank``, ``world_size`` and
            ``broadcast(tensor, src)``, which writes in place or returns the tensor.
        src: the rank that sends; None for this one.
        timeout: in seconds, for each broadcast; None for the communicator's own.

    Raises:
        ValueError: an argument is none of these, or the communicator has no timeout to set.
        CollectiveError: its last transfer did not end.
    """
    if timeout is not None and check_seconds("timeout", timeout) < 0:
        raise ValueError(f"timeout={timeout}: must be finite seconds, at least 0")
    device = torch.device(getattr(communicator, "device", "cpu"))
    if isinstance(communicator, ProcessGroup):
        if all(kind.type != "cuda" for kind in communicator._device_types):
            return GlooChannel(communicator, src, timeout)
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        return CudaChannel(communicator, src, timeout, device)
    channel = Channel(communicator, src, timeout)
    if timeout is not None and not takes_timeout(communicator):
        raise ValueError(
            f"timeout={timeout}: must be None for {type(communicator).__name__}, whose broadcast "
            f"takes no timeout and ends by one of its own"
        )
    return channel


def takes_timeout(communicator: Any) -> bool:
    """Whether its ``broadcast`` has an argument ``timeout``."""
    is_torch = isinstance(communicator, ProcessGroup)  # its options have it, and no signature
    return not is_torch and "timeout" in inspect.signature(communicator.broadcast).parameters


def _place(communicator: Any) -> tuple[int, int]:
    """Rank and world size."""
    if isinstance(communicator, ProcessGroup):
        return communicator.rank(), communicator.size()
    try:
        communicator.broadcast  # noqa: B018
        return communicator.rank, communicator.world_size
    except AttributeError as error:
        raise ValueError(
            f"communicator={communicator!r:.80}: must be a ProcessGroup of torch, or have rank, "
            f"world_size and broadcast(tensor, src); {error}"
        ) from None
