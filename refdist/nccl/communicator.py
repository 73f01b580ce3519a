"""``NcclCommunicator``, with names and signatures of vLLM's ``PyNcclCommunicator``."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ReduceOp

from refdist.checks import check_integer, check_rank
from refdist.deadline import Deadline
from refdist.group import StatelessProcessGroup
from refdist.nccl.arguments import check_like, check_stream, check_tensor
from refdist.nccl.forming import form, share_unique_id, split
from refdist.nccl.handle import Handle, Launch
from refdist.nccl.library import check_device, load, reduction
from refdist.objects.unique_id import UNIQUE_ID_BYTES


class NcclCommunicator:
    """An NCCL communicator of the ranks of a group, one GPU each.

    All ranks create it, in the same place among their calls to the group. Rank 0 broadcasts the id
    of the communicator as an object of the group, all connect by it, and then they sum one float32
    up, which vLLM's ranks expect. The group is not used after that.

    An operation is launched on ``stream``, or on the current stream of ``device``, and returns when
    it is launched, as vLLM's do. Kernels that come later on that stream see its result. The CPU
    sees it after ``wait``, or after the stream is synchronized; only ``wait`` has a deadline. The
    first operation between two ranks is launched when both have called it, so two ranks that
    ``send`` to each other do so in a group, as NCCL demands.

    Tensors are contiguous, on ``device``, and of a dtype that NCCL has. With tensors that have no
    elements, nothing is done.

    A call that is not done within its ``timeout`` (in seconds; None for that of the communicator)
    aborts the communicator on this rank, and raises a CollectiveError that names the operation. An
    error that NCCL reports does the same. The error comes up to 5 seconds after the deadline,
    because NCCL gets this time to end. Other ranks are not told; their deadlines end their calls.
    After an abort, the GPU and its streams go on, and another communicator can be formed.

    KeyboardInterrupt leaves the communicator as it is in ``wait``, which can be called again. In
    any other call it aborts the communicator, as the operation may or may not have been launched.

    With one rank, NCCL copies the tensors: nothing is left out, and ``disabled`` is False, unlike
    in vLLM's. A communicator is for one thread at a time. Operations may be captured in a CUDA
    graph; ``wait`` and the deadlines do not know its replays, and it is deleted before ``destroy``.

    Attributes:
        rank: of this process, 0 to ``world_size - 1``.
        world_size: the number of ranks.
        device: the GPU of this rank, with its index.
        timeout: seconds for each call that names no other.

    Source: vLLM's ``PyNcclCommunicator``, for names, signatures and the order of calls at creation.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout: float
    _handle: Handle

    def __init__(
        self,
        group: StatelessProcessGroup,
        device: int | str | torch.device,
        *,
        timeout: float = 30.0,
    ) -> None:
        """Form it with all ranks of ``group``; see the class.

        Args:
            group: of the same ranks.
            device: of this rank, and of no other rank.
            timeout: seconds for the creation, and for later calls.

        Raises:
            ValueError: an argument is wrong, or torch finds no CUDA GPU.
            ImportError: nccl4py is not installed.
            MessageTimeoutError: the id of rank 0 did not come in time.
            MessageError: something else came, as the ranks' calls are not in the same order.
            CollectiveError: the ranks did not connect in time, or NCCL failed, as it does when two
                ranks have one GPU.
        """
        found, deadline = check_device(device), Deadline(timeout)
        load()
        unique_id_bytes = share_unique_id(group, deadline)
        self._adopt(form(unique_id_bytes, group.rank, group.world_size, found, deadline), timeout)

    @classmethod
    def from_unique_id_bytes(
        cls,
        unique_id_bytes: bytes,
        rank: int,
        world_size: int,
        device: int | str | torch.device,
        *,
        timeout: float = 30.0,
    ) -> "NcclCommunicator":
        """Form it with ranks that share no group: each got the bytes of one id in another way.

        Args:
            unique_id_bytes: 128 bytes, which one of them has from ``new_unique_id_bytes``.
            rank: this process, 0 to ``world_size - 1``.
            world_size: the number of processes.
            device: of this rank, and of no other rank.
            timeout: seconds for the creation, and for later calls.

        Raises:
            ValueError: as the constructor. So do ImportError and CollectiveError.
        """
        found, deadline = check_device(device), Deadline(timeout)
        load()
        if not isinstance(unique_id_bytes, bytes) or len(unique_id_bytes) != UNIQUE_ID_BYTES:
            raise ValueError(
                f"unique_id_bytes={unique_id_bytes!r:.60}: must be {UNIQUE_ID_BYTES} bytes, from "
                f"new_unique_id_bytes()"
            )
        rank, world_size = check_rank(rank, world_size), check_integer("world_size", world_size)
        communicator = cls.__new__(cls)
        communicator._adopt(form(unique_id_bytes, rank, world_size, found, deadline), timeout)
        return communicator

    def _adopt(self, handle: Handle, timeout: float) -> None:
        self._handle = handle
        self.rank, self.world_size, self.device = handle.rank, handle.world_size, handle.device
        self.timeout = timeout

    @property
    def disabled(self) -> bool:
        """Whether it was destroyed or aborted. Operations raise ValueError then."""
        return bool(self._handle.ended)

    @property
    def available(self) -> bool:
        """Whether it can be used."""
        return not self._handle.ended

    def all_reduce(
        self,
        in_tensor: torch.Tensor,
        out_tensor: torch.Tensor | None = None,
        op: Any = ReduceOp.SUM,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Combine a tensor over all ranks, and return the result.

        Args:
            in_tensor: has one size and dtype on all ranks.
            out_tensor: for the result, as large; ``in_tensor`` itself is allowed. None for a new
                tensor, as in vLLM's.
            op: of ``torch.distributed.ReduceOp``: SUM, PRODUCT, MIN, MAX or AVG.
            stream: to launch on.
            timeout: seconds to launch it.

        Raises:
            ValueError: an argument is wrong, or the communicator has ended. NCCL was not called.
            CollectiveError: it was not launched. All operations raise these two.
        """
        name, reduce = "all_reduce", getattr(load(), reduction("all_reduce", op))
        self._check(name, stream, in_tensor=in_tensor)
        if out_tensor is None:
            with torch.cuda.stream(stream):  # nothing for None
                out_tensor = torch.empty_like(in_tensor)
        result = out_tensor
        self._check(name, stream, out_tensor=result)
        check_like(name, "out_tensor", result, "in_tensor", in_tensor)
        self._launch(
            name, (in_tensor, result), stream, timeout,
            lambda comm, on: comm.allreduce(in_tensor, result, reduce, stream=on),
        )  # fmt: skip
        return result

    def all_gather(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Put the tensors of all ranks, in rank order, into ``output_tensor``.

        It has ``world_size`` times as many elements as ``input_tensor``.
        """
        name, n = "all_gather", self.world_size
        self._check(name, stream, output_tensor=output_tensor, input_tensor=input_tensor)
        check_like(name, "output_tensor", output_tensor, "input_tensor", input_tensor, n)
        self._launch(
            name, (output_tensor, input_tensor), stream, timeout,
            lambda comm, on: comm.allgather(input_tensor, output_tensor, stream=on),
        )  # fmt: skip

    def reduce_scatter(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        op: Any = ReduceOp.SUM,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Combine ``input_tensor`` over all ranks. Rank r gets the r-th of n equal parts."""
        name, n = "reduce_scatter", self.world_size
        reduce = getattr(load(), reduction(name, op))
        self._check(name, stream, output_tensor=output_tensor, input_tensor=input_tensor)
        check_like(name, "input_tensor", input_tensor, "output_tensor", output_tensor, n)
        self._launch(
            name, (output_tensor, input_tensor), stream, timeout,
            lambda comm, on: comm.reduce_scatter(input_tensor, output_tensor, reduce, stream=on),
        )  # fmt: skip

    def broadcast(
        self,
        tensor: torch.Tensor,
        src: int,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Copy the tensor of rank ``src`` into the tensor of every other rank."""
        self._check("broadcast", stream, tensor=tensor)
        src = check_rank(src, self.world_size, "src")
        self._launch(
            "broadcast", (tensor,), stream, timeout,
            lambda comm, on: comm.broadcast(tensor, tensor, src, stream=on),
        )  # fmt: skip

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Send a tensor to rank ``dst``, which calls ``recv`` with one of this size and dtype."""
        self._check("send", stream, tensor=tensor)
        dst = self._check_peer("dst", dst)
        self._launch(
            f"send to rank {dst}", (tensor,), stream, timeout,
            lambda comm, on: comm.send(tensor, dst, stream=on),
        )  # fmt: skip

    def recv(
        self,
        tensor: torch.Tensor,
        src: int,
        stream: torch.cuda.Stream | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Receive into a tensor what rank ``src`` sends."""
        self._check("recv", stream, tensor=tensor)
        src = self._check_peer("src", src)
        self._launch(
            f"recv from rank {src}", (tensor,), stream, timeout,
            lambda comm, on: comm.recv(tensor, src, stream=on),
        )  # fmt: skip

    def group_start(self) -> None:
        """Hold the operations of this thread back until ``group_end``, which launches them as one.

        All of them are of this communicator. An error in an argument leaves the group open:
        ``group_end`` launches those that were right.
        """
        self._handle.group_start()

    def group_end(self, *, timeout: float | None = None) -> None:
        """Launch what was called since ``group_start``. Raises as an operation."""
        self._handle.group_end(self._deadline(timeout))

    def wait(self, timeout: float | None = None) -> None:
        """Block until every operation that was launched has ended, on all streams.

        The seconds also run while a stream is busy with what came before an operation.

        Raises:
            ValueError: the communicator has ended, or this thread has begun a group.
            CollectiveError: the operation that it names has not ended in time, or NCCL reports an
                error.
        """
        self._handle.wait(self._deadline(timeout))

    def split(
        self, color: int | None, key: int | None = None, *, timeout: float | None = None
    ) -> "NcclCommunicator | None":
        """Form a communicator of the ranks that pass the same ``color``. All ranks call this.

        It is ``ncclCommSplit``, after a wait for the operations that were launched before. This
        communicator can still be used, and each is destroyed by itself.

        Args:
            color: 0 to 2^31 - 1; None on a rank that takes no part.
            key: the new ranks are in the order of the keys, and for equal keys in that of the ranks
                here. None for the rank here.
            timeout: seconds.

        Returns:
            The communicator, or None for ``color=None``.

        Raises:
            ValueError: an argument is wrong, or the communicator has ended.
            CollectiveError: an operation has not ended, or not all ranks have called this.
        """
        key = self.rank if key is None else key
        handle = split(self._handle, color, key, self._deadline(timeout))
        if handle is None:
            return None
        communicator = NcclCommunicator.__new__(NcclCommunicator)
        communicator._adopt(handle, self.timeout)
        return communicator

    def destroy(self, timeout: float | None = None) -> None:
        """Wait for the operations, then end the communicator. All ranks call this.

        A second call does nothing, nor does one after an abort. NCCL waits for the ranks of this
        host, as one may still read the memory of another; that takes at least half a second.

        Raises:
            CollectiveError: an operation has not ended in time, or the other ranks of this host
                have not called this. The communicator has ended in either case.
        """
        self._handle.destroy(self._deadline(timeout))

    def abort(self) -> None:
        """End the communicator on this rank now, with the operations that are under way."""
        self._handle.abort()

    def _check(
        self, operation: str, stream: torch.cuda.Stream | None, **tensors: torch.Tensor
    ) -> None:
        self._handle.check_usable(operation)
        for name, tensor in tensors.items():
            check_tensor(operation, name, tensor, self.device)
        if stream is not None:
            check_stream(operation, stream, self.device)

    def _launch(
        self,
        operation: str,
        tensors: tuple[torch.Tensor, ...],
        stream: torch.cuda.Stream | None,
        timeout: float | None,
        start: Callable[[Any, int], object],
    ) -> None:
        deadline, comm = self._deadline(timeout), self._handle.comm
        if not tensors[0].numel():
            return
        if stream is None:
            stream = torch.cuda.current_stream(self.device.index)  # faster than by device
        else:
            for tensor in tensors:  # its memory is not used again before this stream is done
                tensor.record_stream(stream)
        on, launches = stream.cuda_stream, [Launch(operation, stream, tensors)]
        self._handle.run(operation, deadline, lambda: start(comm, on), launches)

    def _check_peer(self, name: str, rank: int) -> int:
        rank = check_rank(rank, self.world_size, name)
        if rank == self.rank:
            raise ValueError(f"{name}={rank}: is this rank itself; it must be another one")
        return rank

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)
