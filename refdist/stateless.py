"""A group of processes that exchange small objects, without any global state."""

import socket as sockets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed import DistError, ReduceOp, Store

from refdist import keys, messages
from refdist.barrier import Barrier, PhaseEvent
from refdist.checks import check_integer, check_rank, check_seconds
from refdist.compat import quiet, tcp_store_of
from refdist.errors import (
    BarrierError,
    MessageError,
    MessageTimeoutError,
    StoreConnectionError,
    letting_go,
    name_ranks,
)
from refdist.rendezvous import leave, listening, meet
from refdist.waiting import Deadline, wait_for_keys

_GRACE_SECONDS = 1.0

_REDUCTIONS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}


@dataclass(eq=False)
class StatelessProcessGroup:
    """A store, and the rank and world size of this process in the group that shares it.

    It carries metadata between processes: objects and small CPU tensors. For the data plane,
    create a group of torch with ``stateless_init_torch_distributed_process_group``.

    A group touches nothing global, so a process may be in several groups at once, with a
    different rank in each. Make one with ``create``. All ranks call the collective methods
    (``barrier``, ``broadcast_obj``, ``all_gather_obj`` and those built on them) in the same order.
    A group is for one thread at a time.

    Every method that waits can be interrupted (SIGINT) within a second, and raises
    StoreConnectionError when the store is lost. Both, and all timeouts, hold as long as the process
    of rank 0 answers or is gone; while it is frozen, requests to its store wait for it.

    Objects travel as pickles: whoever can write to the store can run code on every rank, so let it
    listen only where you trust the network.

    Attributes:
        rank: this process, 0 to ``world_size - 1``.
        world_size: the number of processes.
        store: what they share. Rank 0 hosts it, unless it was made otherwise.
        socket: on rank 0, the socket that the store listens on; else None.
        data_expiration_seconds: how long an unread message stays.
        send_dst_counter: messages sent, for each destination.
        recv_src_counter: messages received, for each source.
        broadcast_send_counter: broadcasts sent.
        broadcast_recv_src_counter: broadcasts received, for each source.
        entries: keys that this rank has written and their times (monotonic), oldest first.
        events: set it to a list, and each phase of each barrier is appended as a PhaseEvent.

    Source: the specification of ``vllm.distributed.utils``.
    """

    rank: int
    world_size: int
    store: Store = field(repr=False)
    socket: sockets.socket | None = field(default=None, repr=False)
    data_expiration_seconds: int = 3600
    send_dst_counter: dict[int, int] = field(default_factory=dict, repr=False)
    recv_src_counter: dict[int, int] = field(default_factory=dict, repr=False)
    broadcast_send_counter: int = field(default=0, repr=False)
    broadcast_recv_src_counter: dict[int, int] = field(default_factory=dict, repr=False)
    entries: deque[tuple[str, float]] = field(default_factory=deque, repr=False)
    events: list[PhaseEvent] | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        self.rank = check_rank(self.rank, self.world_size)
        self.world_size = check_integer("world_size", self.world_size)
        _check_expiration(self.data_expiration_seconds)
        for counter in (
            self.send_dst_counter,
            self.recv_src_counter,
            self.broadcast_recv_src_counter,
        ):
            for rank in range(self.world_size):
                counter.setdefault(rank, 0)
        self._barrier = Barrier(self.store, self.rank, self.world_size)
        self._gathers = 0
        self._gathered_keys: list[str] = []  # of earlier gathers, not yet deleted
        self._closed = False
        self._release_socket: Callable[[], object] = lambda: (
            None
        )  # a socket that was passed in stays its owner's

    @staticmethod
    def create(
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: int = 3600,
        store_timeout: int = 300,
        listen_socket: sockets.socket | None = None,
    ) -> "StatelessProcessGroup":
        """Form a group with the other processes that call this with the same host and port.

        In place of ``torch.distributed.init_process_group``, which forms one group in a process
        and for good. With this function, processes A and B form a group, and then A, B, C and D
        form another. Blocks until all ``world_size`` ranks have come.

        Args:
            host: where rank 0 listens, and nowhere else: a name, an IPv4 or an IPv6 address.
            port: where rank 0 listens; 0 on rank 0 takes a free port, which ``group.port`` tells
                when the group is formed. To tell other ranks before, bind a socket to port 0 and
                pass it as ``listen_socket``.
            rank: this process, 0 to ``world_size - 1``.
            world_size: the number of processes.
            data_expiration_seconds: how long an unread message stays.
            store_timeout: seconds until creation fails, and until a wait of a later method does
                that has no timeout of its own.
            listen_socket: on rank 0, a bound TCP socket to listen on, in place of host and port.
                It stays the caller's. The other ranks ignore theirs.

        Raises:
            ValueError: an argument is out of its range, the rank is taken, or rank 0 was given
                another world size.
            OSError: the host does not resolve, or on rank 0, cannot be listened on.
            GroupCreationError: a rank did not come in time; the text says how many came.
            StoreConnectionError: on another rank than 0, when no store answered in time.
        """
        _check_expiration(data_expiration_seconds)
        seconds = check_seconds("store_timeout", store_timeout)
        if seconds <= 0:
            raise ValueError(f"store_timeout={store_timeout}: must be above 0 seconds")
        with listening(host, port, rank, listen_socket) as listener:
            store, barrier = meet(host, port, rank, world_size, seconds, listener)
            group = StatelessProcessGroup(
                rank, world_size, store, listener, data_expiration_seconds
            )
        group._barrier = barrier
        if listener is not None and listen_socket is None:
            group._release_socket = weakref.finalize(group, listener.close)
        return group

    @property
    def host(self) -> str:
        """The numeric address of the store."""
        with self._reporting("host"):
            return tcp_store_of(self.store).host

    @property
    def port(self) -> int:
        """The port of the store."""
        with self._reporting("port"):
            return tcp_store_of(self.store).port

    def close(self, timeout: float = 30.0) -> None:
        """Leave the group. Rank 0, whose store the others use, waits until they have left.

        A group that is not closed ends with its process, or when nothing refers to it. Closing
        again does nothing.

        Args:
            timeout: seconds that rank 0 waits; 0 to leave at once.

        Raises:
            BarrierError: on rank 0, when a rank did not leave in time. The group is closed.
        """
        if self._closed:
            return
        try:
            with letting_go(), self._reporting("close"):
                leave(self.store, self.rank, self.world_size, timeout)
        finally:
            self._closed = True
            del self.store, self._barrier
            self._release_socket()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        # others may still have to read why, a broken barrier's outcome say; but they may be dead
        with suppress(BarrierError):
            self.close(timeout=_GRACE_SECONDS)

    def barrier(self, timeout: float = 30.0) -> None:
        """Block until every rank has called this. See ``refdist.barrier`` for its three phases.

        Args:
            timeout: seconds, for each phase.

        Raises:
            BarrierError: on every rank, when one did not arrive in time; it names the missing
                ranks. A rank that comes later raises at once, and the next barrier works. On rank
                0 alone (``completed=True``) when a rank arrived but did not leave in time.
            ValueError: ``timeout`` is negative or not finite.
        """
        record = self.events.append if self.events is not None else None
        with self._reporting("barrier"):
            self._barrier.wait(timeout, record)

    def send_obj(self, obj: Any, dst: int) -> None:
        """Send an object to rank ``dst``. Does not wait for it to be received.

        Raises:
            ValueError: ``dst`` is outside the group, or this rank.
            Exception: whatever pickle raises for an object that cannot be pickled; nothing was
                sent, and the next message takes its number.
        """
        dst = self._check_peer("dst", dst)
        payload = messages.encode(obj)
        with self._reporting("send_obj"):
            self._expire_data()
            key = keys.message(self.rank, dst, self.send_dst_counter[dst])
            self.send_dst_counter[dst] += 1
            self._post(key, payload)

    def recv_obj(self, src: int, timeout: float | None = None) -> Any:
        """Receive the next object from rank ``src``, in the order in which it sent them.

        Args:
            src: the sender.
            timeout: seconds to wait; None for the store's own timeout.

        Raises:
            ValueError: ``src`` is outside the group, or this rank.
            MessageTimeoutError: nothing came; the next call waits for the same message.
            MessageExpiredError: the message expired before this call; the next call goes on.
            MessageError: what came is no object; the next call goes on.
        """
        src = self._check_peer("src", src)
        with self._reporting("recv_obj"):
            key = keys.message(src, self.rank, self.recv_src_counter[src])
            self._await([key], [src], timeout, f"message {self.recv_src_counter[src]}")

            def consume(read_keys: list[str]) -> None:
                self.recv_src_counter[src] += 1
                messages.delete(self.store, read_keys)

            return self._take(key, consume)

    def broadcast_obj(self, obj: Any | None, src: int, timeout: float | None = None) -> Any:
        """Give the object of rank ``src`` to every rank. What the others pass is ignored.

        Rank ``src`` does not wait for the others. The last reader removes the object.

        Args:
            obj: on rank ``src``, the object.
            src: the rank whose object it is.
            timeout: seconds that the others wait; None for the store's own timeout.

        Returns:
            The object; on rank ``src``, ``obj`` itself.

        Raises:
            ValueError: ``src`` is outside the group.
            MessageTimeoutError, MessageExpiredError, MessageError: as ``recv_obj``.
            Exception: on rank ``src``, whatever pickle raises for an object that cannot be
                pickled; nothing was sent, and the others go on waiting for the next object.
        """
        src = check_rank(src, self.world_size, "src")
        with self._reporting("broadcast_obj"):
            if src != self.rank:
                return self._receive_broadcast(src, timeout)
            if self.world_size > 1:
                payload = messages.encode(obj)
                self._expire_data()
                key = keys.broadcast(src, self.broadcast_send_counter)
                self.broadcast_send_counter += 1
                self._post(key, payload)
        return obj

    def _receive_broadcast(self, src: int, timeout: float | None) -> Any:
        number = self.broadcast_recv_src_counter[src]
        key = keys.broadcast(src, number)
        self._await([key], [src], timeout, f"broadcast {number}")

        def consume(read_keys: list[str]) -> None:
            self.broadcast_recv_src_counter[src] += 1
            readers = keys.broadcast_readers(src, number)
            if self.store.add(readers, 1) == self.world_size - 1:
                messages.delete(self.store, [*read_keys, readers])

        return self._take(key, consume)

    def all_gather_obj(self, obj: Any, timeout: float | None = None) -> list[Any]:
        """Give the object of each rank to every rank.

        A gather that failed on a rank is over for that rank, though not for one that comes late
        and finds all objects there. The next one works once every rank has made as many calls.

        Args:
            obj: this rank's object.
            timeout: seconds to wait for the others; None for the store's own timeout.

        Returns:
            The objects in rank order; at this rank's place, ``obj`` itself.

        Raises:
            MessageTimeoutError: a rank gave nothing in time; ``missing`` names it.
            MessageError: the object of a rank could not be pickled, or is no object.
            Exception: whatever pickle raises if ``obj`` cannot be pickled. The others get a
                MessageError, and the next gather works.
        """
        number = self._gathers
        self._gathers += 1
        own_key = keys.gathered(number, self.rank)
        own_keys = [own_key]
        all_keys = [keys.gathered(number, rank) for rank in range(self.world_size)]
        with self._reporting("all_gather_obj"):
            try:
                payload = messages.encode(obj)
                own_keys = messages.keys_to_write(own_key, payload)
                messages.write(self.store, own_key, payload)
            except BaseException as error:
                self._write_failure(own_key, f"had no object to give: {error!r}")
                raise
            finally:
                earlier, self._gathered_keys = self._gathered_keys, self._gathered_keys + own_keys
            self._await(all_keys, range(self.world_size), timeout, f"gather {number}")
            # everyone is in this gather, so nobody reads what was gathered before it
            messages.delete(self.store, earlier)
            self._gathered_keys = own_keys
            values = self.store.multi_get(all_keys)
            return [
                obj if rank == self.rank else messages.decode(self.store, key, value)
                for rank, (key, value) in enumerate(zip(all_keys, values, strict=True))
            ]

    def _post(self, key: str, payload: bytes) -> None:
        """Write a message. Should that be interrupted, its reader learns so and does not wait."""
        now = time.monotonic()
        self.entries.extend((written, now) for written in messages.keys_to_write(key, payload))
        try:
            messages.write(self.store, key, payload)
        except BaseException as error:
            self._write_failure(key, f"did not finish writing it: {error!r}")
            raise

    def _write_failure(self, key: str, reason: str) -> None:
        # where the store is gone, the reader learns it from that
        with suppress(DistError):
            messages.write_failure(self.store, key, f"rank {self.rank} {reason}")

    def _take(self, key: str, consume: Callable[[list[str]], None]) -> Any:
        """Read an object, then consume its keys. If reading is interrupted, nothing is lost."""
        value = self.store.get(key)
        try:
            obj = messages.decode(self.store, key, value)
        except MessageError:
            consume(messages.keys_of(key, value))
            raise
        consume(messages.keys_of(key, value))
        return obj

    def expire_data(self) -> None:
        """Remove what this rank sent more than ``data_expiration_seconds`` ago and nobody read.

        Who asks for it later gets a MessageExpiredError. Called by ``send_obj`` and
        ``broadcast_obj``. Time is monotonic: changing the clock on the wall expires nothing.
        """
        with self._reporting("expire_data"):
            self._expire_data()

    def _expire_data(self) -> None:
        reason = f"expired unread after {self.data_expiration_seconds} s"
        oldest_kept = time.monotonic() - self.data_expiration_seconds
        while self.entries and self.entries[0][1] < oldest_kept:
            messages.expire(self.store, self.entries.popleft()[0], reason)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send a small CPU tensor, of any shape and dtype, to rank ``dst``. See ``send_obj``."""
        self.send_obj(_own_copy(tensor), dst)

    def recv(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Receive a tensor from rank ``src`` into ``tensor``, and return that. See ``recv_obj``.

        Raises:
            ValueError: ``tensor`` is not on the CPU.
            MessageError: what came has another shape or dtype than ``tensor``.
        """
        _check_cpu(tensor)
        return _fill(tensor, self.recv_obj(src), f"from rank {src}")

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Give the tensor of rank ``src`` to every rank. See ``broadcast_obj``.

        ``tensor`` has the same shape and dtype on every rank, lies on the CPU, is filled on the
        others than ``src``, and is returned.
        """
        if self.rank == src:
            self.broadcast_obj(_own_copy(tensor), src)
            return tensor
        _check_cpu(tensor)
        return _fill(tensor, self.broadcast_obj(None, src), f"from rank {src}")

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """A new tensor: the tensors of all ranks reduced in rank order, bitwise the same for all.

        Args:
            tensor: on the CPU, the same shape and dtype on every rank; not changed.
            op: ``ReduceOp.SUM``, ``PRODUCT``, ``MIN`` or ``MAX``.

        Raises:
            ValueError: ``op`` is another one, or ``tensor`` is not on the CPU.
            MessageError: the tensors differ in shape or dtype.
        """
        reduction = next((f for known, f in _REDUCTIONS.items() if op == known), None)
        if reduction is None:
            raise ValueError(f"op={op}: must be ReduceOp.SUM, PRODUCT, MIN or MAX")
        own = _own_copy(tensor)
        gathered = self.all_gather_obj(own)
        for rank, other in enumerate(gathered):
            _check_like(own, other, f"from rank {rank}")
        result: torch.Tensor = reduce(reduction, gathered)
        return result

    def _await(self, all_keys: list[str], senders: Any, timeout: float | None, what: str) -> None:
        """Wait for keys, each written by the sender at its place."""
        if timeout is None:
            timeout = self.store.timeout.total_seconds()  # type: ignore[attr-defined]
        deadline = Deadline(timeout)
        if wait_for_keys(self.store, all_keys, deadline):
            return
        missing = [
            sender
            for sender, key in zip(senders, all_keys, strict=True)
            if not self.store.check([key])
        ]
        if not missing:
            return
        raise MessageTimeoutError(
            f"rank {self.rank} waited in vain for {what} from {name_ranks(missing)}: "
            f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
            missing,
        )

    def _check_peer(self, name: str, rank: int) -> int:
        rank = check_rank(rank, self.world_size, name)
        if rank == self.rank:
            raise ValueError(f"{name}={rank}: is this rank itself; it must be another one")
        return rank

    @contextmanager
    def _reporting(self, operation: str) -> Iterator[None]:
        """Say which operation of which rank lost the store, in place of torch's stack traces."""
        if self._closed:
            raise ValueError(f"{operation}: this group is closed")
        try:
            with quiet():
                yield
        except DistError as error:
            raise StoreConnectionError(
                f"{operation}: rank {self.rank} lost the store that rank 0 hosts: {error}"
            ) from error


def _check_expiration(seconds: int) -> None:
    if check_seconds("data_expiration_seconds", seconds) <= 0:
        raise ValueError(f"data_expiration_seconds={seconds}: must be above 0")


def _check_cpu(tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"tensor on {tensor.device}: this group carries CPU tensors; for the others use "
            f"stateless_init_torch_distributed_process_group"
        )


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: a pickled view would carry the whole storage that it looks into."""
    _check_cpu(tensor)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check_like(expected: torch.Tensor, received: Any, whence: str) -> None:
    if not isinstance(received, torch.Tensor):
        raise MessageError(f"{whence} came a {type(received).__name__}, not a tensor")
    if (received.shape, received.dtype) != (expected.shape, expected.dtype):
        raise MessageError(
            f"{whence} came a tensor of shape {tuple(received.shape)} and {received.dtype}, "
            f"but here it has shape {tuple(expected.shape)} and {expected.dtype}"
        )


def _fill(tensor: torch.Tensor, received: Any, whence: str) -> torch.Tensor:
    _check_like(tensor, received, whence)
    with torch.no_grad():
        tensor.copy_(received)
    return tensor
