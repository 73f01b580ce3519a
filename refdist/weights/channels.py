"""Broadcasts by any communicator: begun by one call, and waited for by another, with a deadline.

What differs between communicators is here alone: how a broadcast begins, how it ends, and what it
carries. A communicator of a GPU gets two streams in turn. Each chunk has one of them for its
memory, its copies and its broadcast, so the copies of one overlap the broadcast of the other.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup

from refdist import torch_versions
from refdist.checks import check_rank, check_seconds, wait_of
from refdist.errors import failure
from refdist.objects.tensors import own_copy
from refdist.torch_groups import collectives

_cuda: Any = torch.cuda  # parts of it have no annotations
_POLL_SECONDS = 1e-4
_CUDA_SECONDS = 300.0
"""For a communicator of a GPU whose own timeout is unknown: vLLM's has none, torch's tells none."""

Finish = Callable[[], None]
"""Waits for the end of a broadcast that has begun."""


class Channel:
    """A communicator with ``broadcast(tensor, src)`` that blocks, as the other modules see it.

    Attributes:
        rank: rank of this process.
        world_size: the number of ranks.
        src: the rank that sends.
        device: the device of the tensors that it carries.
        typed: whether a tensor travels with its shape and dtype, as an object. Else only bytes do.
        ahead: whether the next broadcast may begin before the last one has ended.
    """

    typed = False
    ahead = False
    device = torch.device("cpu")

    def __init__(self, communicator: Any, src: int | None, timeout: float | None) -> None:
        self._communicator, self._timeout = communicator, timeout
        self.rank, self.world_size = _place(communicator)
        self.src = check_rank(self.rank if src is None else src, self.world_size, "src")
        self.typed = not hasattr(communicator, "device")
        self._options = _timeout_argument(communicator, timeout)

    @contextmanager
    def turn(self, number: int, *used: torch.Tensor) -> Iterator[None]:
        """Take and fill the memory of chunk ``number`` in this, and begin its broadcast.

        ``used`` are tensors of the caller whose memory the chunk reads or writes.
        """
        yield

    def start(self, tensor: torch.Tensor) -> Finish:
        """Begin to broadcast a contiguous tensor on ``device``, in place."""
        # a view that travels as an object would take along all that it looks into
        sent = own_copy(tensor) if self.typed and self.rank == self.src else tensor
        received = self._communicator.broadcast(sent, self.src, **self._options)
        if isinstance(received, torch.Tensor) and received is not sent:
            tensor.copy_(received)
        return lambda: None

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Say that the caller is going to use memory that was taken in a turn."""


class GlooChannel(Channel):
    """A gloo group of torch, whose broadcasts run in threads of its own."""

    ahead = True

    def __init__(self, group: ProcessGroup, src: int | None, timeout: float | None) -> None:
        super().__init__(group, src, timeout)
        self.typed = False
        self._broadcast = c10d.BroadcastOptions()
        self._broadcast.rootRank = self.src
        if timeout is not None:
            # gloo's thread gives up too, or destroying the group would wait for its own timeout
            self._broadcast.timeout = wait_of(timeout)

    def start(self, tensor: torch.Tensor) -> Finish:
        """Hand the broadcast to gloo's threads."""
        began = time.monotonic()
        with self._naming(began):
            work = self._communicator.broadcast([tensor], self._broadcast)

        def finish() -> None:
            with self._naming(began):
                if self._timeout is None:
                    work.wait()
                else:
                    work.wait(wait_of(self._timeout))

        return finish

    @contextmanager
    def _naming(self, began: float) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            elapsed = time.monotonic() - began
            raise failure(
                "broadcast", self.rank, self.world_size, elapsed, self._timeout, error
            ) from error


class CudaChannel(Channel):
    """A communicator of a GPU, or an NCCL group of torch."""

    ahead = True

    def __init__(
        self, communicator: Any, src: int | None, timeout: float | None, device: torch.device
    ) -> None:
        super().__init__(communicator, src, timeout)
        self.typed, self.device = False, device
        own = getattr(communicator, "timeout", None)
        own = float(own) if isinstance(own, (int, float)) else _CUDA_SECONDS
        self._seconds = own if timeout is None else timeout
        self._streams = [_cuda.Stream(device) for _ in range(2)]
        self._last: Any = None

    @contextmanager
    def turn(self, number: int, *used: torch.Tensor) -> Iterator[None]:
        """Make the stream of the chunk the current one, after what the caller has launched.

        The chunk before the last one had the same stream. So it has left memory that this one gets.
        """
        stream = self._streams[number % 2]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in used:
            if tensor.device == self.device:
                tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def start(self, tensor: torch.Tensor) -> Finish:
        """Launch the broadcast on the current stream, after the one that was launched before it.

        NCCL takes the operations of a communicator one by one, in one order on all ranks. The two
        streams must keep it.
        """
        began, stream = time.monotonic(), torch.cuda.current_stream(self.device)
        if self._last is not None:
            stream.wait_event(self._last)
        if isinstance(self._communicator, ProcessGroup):
            collectives.broadcast(tensor, self.src, self._communicator)
        else:
            self._communicator.broadcast(tensor, self.src, **self._options)
        ended = self._last = _cuda.Event()
        ended.record(stream)
        return lambda: self._wait_for(ended, began)

    def _wait_for(self, ended: Any, began: float) -> None:
        end = time.monotonic() + self._seconds
        while not ended.query():
            if time.monotonic() > end:
                self._give_up(time.monotonic() - began)
            time.sleep(_POLL_SECONDS)

    def _give_up(self, elapsed: float) -> None:
        if hasattr(self._communicator, "wait"):
            self._communicator.wait(0.0)  # aborts and raises, unless it has ended just now
            return
        if isinstance(self._communicator, ProcessGroup):
            torch_versions.abort(self._communicator)
        reason = TimeoutError("timed out")
        raise failure("broadcast", self.rank, self.world_size, elapsed, self._seconds, reason)

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Keep the memory from being used again before the caller's stream is done with it."""
        tensor.record_stream(torch.cuda.current_stream(self.device))


def channel_of(communicator: Any, src: int | None, timeout: float | None) -> Channel:
    """The channel for a communicator.

    Args:
        communicator: a ProcessGroup of torch, or an object with ``rank``, ``world_size`` and
            ``broadcast(tensor, src)``. If it has a ``device``, its broadcast goes by the bytes of
            the tensor alone, and in place; else it carries the tensor as an object.
        src: the rank that sends; None for this one.
        timeout: in seconds, for each broadcast; None for the communicator's own.

    Raises:
        ValueError: an argument is none of these, or the communicator has no timeout to set.
    """
    if timeout is not None and check_seconds("timeout", timeout) < 0:
        raise ValueError(f"timeout={timeout}: must be finite seconds, at least 0")
    if isinstance(communicator, ProcessGroup):
        if any(device.type == "cuda" for device in communicator._device_types):
            device = torch.device("cuda", torch.cuda.current_device())
            return CudaChannel(communicator, src, timeout, device)
        return GlooChannel(communicator, src, timeout)
    device = torch.device(getattr(communicator, "device", "cpu"))
    if device.type == "cuda":
        return CudaChannel(communicator, src, timeout, device)
    return Channel(communicator, src, timeout)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the text of an error with what was on the way. Its class stays."""
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{what}: {error.args[0]}", *error.args[1:])
        else:
            error.add_note(what)
        raise


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


def _timeout_argument(communicator: Any, timeout: float | None) -> dict[str, float]:
    """What hands the timeout on to a communicator's ``broadcast``."""
    if timeout is None or isinstance(communicator, ProcessGroup):
        return {}
    if "timeout" in inspect.signature(communicator.broadcast).parameters:
        return {"timeout": timeout}
    if torch.device(getattr(communicator, "device", "cpu")).type == "cuda":
        return {}
    raise ValueError(
        f"timeout={timeout}: must be None for {type(communicator).__name__}, whose broadcast takes "
        f"no timeout and ends by one of its own"
    )
