"""A group of processes that exchange small objects, without any global state."""

import ipaddress
import os
import socket as sockets
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.distributed import DistError, DistNetworkError, ReduceOp, Store, TCPStore

from refdist.barrier import Barrier
from refdist.barrier.phases import PhaseEvent
from refdist.calls import Calls
from refdist.checks import check_integer, check_rank, check_seconds
from refdist.deadline import Deadline
from refdist.errors import (
    BarrierError,
    ConcurrentCallError,
    InsecureGroupWarning,
    MessageError,
    MessageTimeoutError,
    StoreConnectionError,
)
from refdist.joining.launched import find_place
from refdist.joining.rendezvous import leave, listening, meet, remember
from refdist.objects import encoding
from refdist.objects.boxes import Boxes
from refdist.objects.gathering import Gathering, Unusable
from refdist.objects.mailbox import Mailbox
from refdist.objects.tensors import check_cpu, check_like, fill, own_copy, reduction
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.seals import VARIABLE, secret_from
from refdist.store.waiting import check
from refdist.torch_versions import tcp_store_of

T = TypeVar("T")
Convert = Callable[[Any], Any]

_GRACE_SECONDS = 1.0
_EXPIRED_EACH = 64  # entries that a message may expire, besides as many as it adds


def _as_it_is(obj: Any) -> Any:
    return obj


@dataclass(eq=False)
class StatelessProcessGroup:
    """A store, and the rank and world size of this process in the group that shares it.

    It carries metadata between processes: objects and small CPU tensors. For the data plane,
    create a group of torch with ``stateless_init_torch_distributed_process_group``.

    A group touches nothing global, so a process may be in several groups at once, with a
    different rank in each. Make one with ``create``. All ranks call the collective methods
    (``barrier``, ``broadcast_obj``, ``all_gather_obj`` and those built on them) in the same order.
    A group is for one thread at a time: a second one gets a ConcurrentCallError. Threads that wait
    at the same time need a group each, with a store of its own, as ``create`` makes it: a store
    serves one request of this process at a time.

    Every method that waits can be interrupted (SIGINT), which ends it within about a second, and
    the group works afterwards. A barrier or gather that not all ranks had come to has not taken
    place for the interrupted rank, which may call it again; ``generation`` tells. An object that
    had come goes to the next call. Whatever else raises in the middle of a call, such as the
    handler of another signal, costs this rank the group: later calls say so with a
    StoreConnectionError, and the other ranks miss this one within their timeouts.

    Every method ends in time. It raises StoreConnectionError when the store is lost, and also when
    the store has not answered a second after the timeout, because the process of rank 0 is stopped
    or out of reach. The group is lost then on this rank, and what the method began may still take
    place when rank 0 goes on. A timeout limits waiting: a large object takes its time to be
    written and read. A process that is forked from one in a group cannot use the group.

    Objects travel as pickles, so who can forge one can run code on every rank. With ``secret`` in
    ``create``, values carry tags, and what no rank of the group wrote is refused with an
    AuthenticationError before it is unpickled; the next call goes on with the next object. Without
    it, whoever can reach the port can forge, so let the store listen only where you trust the
    network. ``refdist.store.seals`` says what tags do not do: who can reach the port can still read
    what is sent, delete it, and change the counts of barriers, so that these fail or end early.
    Where that has put ranks out of step, form a new group.

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
        entries: what this rank has sent, as keys, and their times (monotonic), oldest first. What
            was read stays among them until it is old enough to expire.
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
        client = StoreClient(self.store)
        self._use(client, Barrier(client, self.rank, self.world_size), Calls(client))
        self._closed = False
        # a socket that was passed in stays its owner's
        self._release_socket: Callable[[], object] = lambda: None

    def _use(self, client: StoreClient, barrier: Barrier, calls: Calls) -> None:
        self._client, self._barrier, self._calls = client, barrier, calls
        self._mailbox = Mailbox(Boxes(client, barrier.seals), self.rank, self.entries)
        self._gathering = Gathering(client, self.rank, barrier)

    @staticmethod
    def create(
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: int = 3600,
        store_timeout: int = 300,
        listen_socket: sockets.socket | None = None,
        *,
        secret: bytes | str | None = None,
    ) -> "StatelessProcessGroup":
        """Form a group with the other processes that call this with the same host and port.

        In place of ``torch.distributed.init_process_group``, which forms one group in a process
        and for good. With this function, processes A and B form a group, and then A, B, C and D
        form another. Blocks until all ``world_size`` ranks have come. A group that this process
        formed before as the same rank on the same host and port is ended first.

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
            secret: the same on all ranks, long and random (``secrets.token_hex()``); None for that
                of the environment variable REFDIST_SECRET, or for none where this is not set.
                Without one, rank 0 warns (InsecureGroupWarning) unless it listens on a loopback
                address.

        Raises:
            ValueError: an argument is out of its range, the rank is taken, rank 0 was given another
                world size, or the group of before cannot be ended, because its store is kept.
            OSError: the host does not resolve, or on rank 0, cannot be listened on.
            GroupCreationError: a rank did not come in time; the text says how many came. Or this
                rank has another secret than rank 0, or only one of them has one: then it is raised
                at once, and the other ranks are told when their time is up.
            StoreConnectionError: on another rank than 0, when no store answered in time.
        """
        _check_expiration(data_expiration_seconds)
        seconds = check_seconds("store_timeout", store_timeout)
        if seconds <= 0:
            raise ValueError(f"store_timeout={store_timeout}: must be above 0 seconds")
        known, secret = secret_from(secret), None  # no traceback shows it
        with listening(host, port, rank, listen_socket) as listener:
            if listener is not None and known is None:
                _warn_unless_loopback(listener)
            client, barrier, calls = meet(host, port, rank, world_size, seconds, listener, known)
            group = StatelessProcessGroup(
                rank, world_size, client.store, listener, data_expiration_seconds
            )
        group._use(client, barrier, calls)
        remember(group, host, group.port, group.rank)
        if listener is not None and listen_socket is None:
            group._release_socket = weakref.finalize(group, listener.close)
        return group

    @staticmethod
    def from_env(
        *,
        host: str | None = None,
        port: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> "StatelessProcessGroup":
        """Form a group of the ranks that torchrun, mpirun or srun started. See ``create``.

        ``refdist.joining.launched`` says which environment variables tell what. The port is never
        that of torchrun's own store: it is ``REFDIST_PORT``, or else ``MASTER_PORT`` plus 1, or
        else it follows from the name of the job. Groups that live at the same time need a port
        each.

        Args:
            host: in place of what the variables tell. So are port, rank and world_size.
            port: see ``host``.
            rank: see ``host``.
            world_size: see ``host``.
            options: other arguments of ``create``.

        Raises:
            ValueError: the variables that are set do not tell all; the text names them.
            Exception: as ``create``. The text says where host and port come from.
        """
        place = find_place(os.environ, host, port, rank, world_size)
        options["secret"] = secret_from(options.pop("secret", None))
        try:
            return StatelessProcessGroup.create(
                place.host, place.port, place.rank, place.world_size, **options
            )
        except (OSError, RuntimeError, ValueError) as error:
            place.explain(error)
            raise

    @property
    def generation(self) -> int:
        """How many collective calls this rank has entered; the same on all ranks in step.

        An interrupted call is one of them only if all ranks had come to it, or it had broken.
        """
        return self._barrier.generation

    @property
    def host(self) -> str:
        """The numeric address of the store."""
        return self._open_store("host").host

    @property
    def port(self) -> int:
        """The port of the store."""
        return self._open_store("port").port

    def close(self, timeout: float = 30.0) -> None:
        """Leave the group. Rank 0, whose store the others use, waits until they have left.

        A group that is not closed ends with its process, or when nothing refers to it. Closing
        again does nothing.

        Args:
            timeout: seconds that rank 0 waits; 0 to leave at once.

        Raises:
            BarrierError: on rank 0, when a rank did not leave in time. The group is closed.
            ConcurrentCallError: another thread is in a call. The group is not closed.
        """
        self._close(timeout, None)

    def _close(self, timeout: float, reason: str | None) -> None:
        """Leave. With a reason, the others learn it if they wait in a barrier."""
        if self._closed:
            return
        deadline = Deadline(timeout)
        self._calls.close()

        def go() -> None:
            if reason is not None:
                self._barrier.break_off(reason)
            leave(self._client, self.rank, self.world_size, deadline)

        try:
            self._run("close", go, deadline)
        except ConcurrentCallError:
            raise
        except BaseException:
            self.end()
            raise
        self.end()

    def end(self) -> None:
        """End the group on this rank at once. On rank 0, its store ends, also for the others."""
        if self._closed:
            return
        self._closed = True
        # an error that is kept, as a notebook does, keeps the group, but the store must end
        self._client.close()
        del self.store
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
        # the others may have to read why; but they may be dead, and the store lost
        with suppress(BarrierError, ConcurrentCallError, StoreConnectionError):
            self._close(_GRACE_SECONDS, f"it left the group because of {kind.__name__}")

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
        self._check_open("barrier")
        deadline, barrier = Deadline(timeout), self._barrier
        self._run("barrier", lambda: barrier.wait(deadline, self._record()), deadline)

    def realign(self, timeout: float = 30.0) -> None:
        """Bring ranks into step that have made different numbers of collective calls.

        All ranks call it. It is a barrier that goes past those that have broken without this rank,
        where ``barrier`` raises. Ranks get out of step if one of them alone makes a call, and that
        times out. An interrupt does no such thing.

        Args:
            timeout: seconds, for all phases together.

        Raises:
            BarrierError: as ``barrier``.
        """
        self._check_open("realign")
        deadline, barrier = Deadline(timeout), self._barrier

        def meet() -> None:
            while True:
                barrier.skip_broken()
                try:
                    return barrier.wait(deadline, self._record(), each_phase=False)
                except BarrierError as error:
                    over = deadline.remaining() == 0 or error.broken_by == self.rank
                    if error.completed or over:
                        raise

        self._run("realign", meet, deadline)

    def send_obj(self, obj: Any, dst: int) -> None:
        """Send an object to rank ``dst``. Does not wait for it to be received.

        Raises:
            ValueError: ``dst`` is outside the group, or this rank; or the object takes more than
                4 GiB.
            Exception: whatever pickle raises for an object that cannot be pickled; nothing was
                sent, and the next message takes its number.
        """
        dst = self._check_peer("dst", dst)
        encoded = encoding.encode(obj)
        deadline = self._deadline("send_obj")

        def send() -> None:
            key = keys.message(self.rank, dst, self.send_dst_counter[dst])
            self.send_dst_counter[dst] += 1
            self._send(key, [key], encoded, deadline)

        self._run("send_obj", send, deadline)

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
            BaseException: what unpickling raises and is no Exception, such as SystemExit; the next
                call tries again, and the one after that goes on.
            MemoryError: there is no room for a large object; the next call tries it again.
        """
        return self._recv(src, timeout)

    def _recv(self, src: int, timeout: float | None = None, convert: Convert = _as_it_is) -> Any:
        src = self._check_peer("src", src)
        deadline = self._deadline("recv_obj", timeout)

        def receive() -> Any:
            key = keys.message(src, self.rank, self.recv_src_counter[src])

            def consume(value: bytes | None) -> None:
                self.recv_src_counter[src] += 1
                if value is None:
                    self._client.delete_key(keys.expired(key))
                else:
                    self._mailbox.delete(encoding.chunk_keys(key, encoding.lengths_of(value)))

            return self._mailbox.receive(key, key, src, consume, deadline)

        return self._receive("recv_obj", src, receive, deadline, convert)

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
            ValueError: ``src`` is outside the group, or the object takes more than 4 GiB.
            MessageTimeoutError, MessageExpiredError, MessageError: as ``recv_obj``.
            Exception: on rank ``src``, whatever pickle raises for an object that cannot be
                pickled; nothing was sent, and the others go on waiting for the next object.
        """
        src = check_rank(src, self.world_size, "src")
        deadline = self._deadline("broadcast_obj", timeout)
        if src != self.rank:
            return self._recv_broadcast(src, deadline)
        if self.world_size > 1:
            encoded = encoding.encode(obj)

            def send() -> None:
                number = self.broadcast_send_counter
                self.broadcast_send_counter += 1
                others = [rank for rank in range(self.world_size) if rank != src]
                copies = [keys.broadcast_copy(src, number, rank) for rank in others]
                self._send(keys.broadcast(src, number), copies, encoded, deadline)

            self._run("broadcast_obj", send, deadline)
        return obj

    def _recv_broadcast(self, src: int, deadline: Deadline, convert: Convert = _as_it_is) -> Any:
        def receive() -> Any:
            number = self.broadcast_recv_src_counter[src]
            key = keys.broadcast(src, number)

            def consume(value: bytes | None) -> None:
                self.broadcast_recv_src_counter[src] += 1
                chunk_keys = encoding.chunk_keys(key, encoding.lengths_of(value or b""))
                readers = keys.broadcast_readers(src, number)
                if not chunk_keys:
                    return
                count = self._client.add(readers, 1)
                if count == self.world_size - 1:
                    self._mailbox.delete([*chunk_keys, readers])
                elif count == 1 and not check(self._client, chunk_keys[:1]):
                    # it expired just now, and so did the count of those who had read it
                    self._mailbox.delete([readers])

            copy = keys.broadcast_copy(src, number, self.rank)
            return self._mailbox.receive(copy, key, src, consume, deadline)

        return self._receive("broadcast_obj", ("broadcast", src), receive, deadline, convert)

    def all_gather_obj(self, obj: Any, timeout: float | None = None) -> list[Any]:
        """Give the object of each rank to every rank. It is a barrier that carries objects.

        As in a barrier, either every rank gets the objects or none does, a rank that comes late
        raises at once, and the next gather works. Two exceptions: rank 0 raises when another rank
        got them but did not leave in time, and a rank that is interrupted raises that. Rank 0
        leaves last, but large objects are read after that, so let it close the group before it
        ends. They stay in the store until all ranks have arrived at the next barrier or gather.

        Args:
            obj: this rank's object.
            timeout: seconds for each phase; None for the store's own timeout.

        Returns:
            The objects in rank order; at this rank's place, ``obj`` itself.

        Raises:
            MessageTimeoutError: a rank did not come in time, or did not leave; ``missing`` names
                it, and the BarrierError that is its cause tells more.
            MessageError: the object of a rank could not be pickled, or is no object.
            ValueError: the object takes more than 4 GiB.
            Exception: whatever pickle raises if ``obj`` cannot be pickled, once the others have
                come. They get a MessageError.
        """
        deadline = self._deadline("all_gather_obj", timeout)
        encoded: encoding.Encoded | Exception
        try:
            encoded = encoding.encode(obj)
        except Exception as error:
            encoded = error

        def gather() -> list[Any]:
            return self._gathering.gather(obj, encoded, deadline, self._record())

        try:
            found = self._run("all_gather_obj", gather, deadline)
        except BarrierError as error:
            text = f"all_gather_obj on rank {self.rank}: {error}"
            raise MessageTimeoutError(text, error.missing) from error
        if isinstance(encoded, Exception):
            raise encoded
        for other in found:
            if isinstance(other, Unusable):
                raise other.error
        return found

    def _send(
        self, key: str, copies: list[str], encoded: encoding.Encoded, deadline: Deadline
    ) -> None:
        self._mailbox.expire(self.data_expiration_seconds, deadline, len(copies) + _EXPIRED_EACH)
        self._mailbox.send(key, copies, encoded, deadline)

    def _receive(
        self,
        operation: str,
        mailbox: Any,
        receive: Callable[[], Any],
        deadline: Deadline,
        convert: Convert,
    ) -> Any:
        """Receive an object and convert it. If this is interrupted, the next call returns it."""
        kept = self._calls.kept

        def receive_and_keep() -> Any:
            if mailbox not in kept:
                kept[mailbox] = receive()
            try:
                return convert(kept[mailbox])
            except MessageError:
                del kept[mailbox]
                raise

        return self._run(operation, receive_and_keep, deadline, mailbox)

    def expire_data(self) -> None:
        """Remove what this rank sent more than ``data_expiration_seconds`` ago and nobody read.

        Who asks for it later gets a MessageExpiredError. ``send_obj`` and ``broadcast_obj`` do
        the same for the oldest, more than they add. Time is monotonic: changing the clock on the
        wall expires nothing. One request for each that is old enough, also for those that were
        read, because only the store knows.
        """
        deadline = self._deadline("expire_data")
        self._run(
            "expire_data",
            lambda: self._mailbox.expire(self.data_expiration_seconds, deadline),
            deadline,
        )

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send a small CPU tensor, of any shape and dtype, to rank ``dst``. See ``send_obj``."""
        self.send_obj(own_copy(tensor), dst)

    def recv(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Receive a tensor from rank ``src`` into ``tensor``, and return that. See ``recv_obj``.

        Raises:
            ValueError: ``tensor`` is not on the CPU.
            MessageError: what came has another shape or dtype than ``tensor``.
        """
        check_cpu(tensor)
        filled: torch.Tensor = self._recv(
            src, convert=lambda obj: fill(tensor, obj, f"from rank {src}")
        )
        return filled

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Give the tensor of rank ``src`` to every rank. See ``broadcast_obj``.

        ``tensor`` has the same shape and dtype on every rank, lies on the CPU, is filled on the
        others than ``src``, and is returned.
        """
        if self.rank == src:
            self.broadcast_obj(own_copy(tensor), src)
            return tensor
        check_cpu(tensor)
        src = check_rank(src, self.world_size, "src")
        filled: torch.Tensor = self._recv_broadcast(
            src,
            self._deadline("broadcast_obj"),
            lambda obj: fill(tensor, obj, f"from rank {src}"),
        )
        return filled

    def all_reduce(self, tensor: torch.Tensor, op: Any = ReduceOp.SUM) -> torch.Tensor:
        """A new tensor: the tensors of all ranks reduced in rank order, bitwise the same for all.

        Args:
            tensor: on the CPU, the same shape and dtype on every rank; not changed.
            op: ``ReduceOp.SUM``, ``PRODUCT``, ``MIN`` or ``MAX``.

        Raises:
            ValueError: ``op`` is another one, or ``tensor`` is not on the CPU.
            MessageError: the tensors differ in shape or dtype.
        """
        combine = reduction(op)
        own = own_copy(tensor)
        gathered = self.all_gather_obj(own)
        for rank, other in enumerate(gathered):
            check_like(own, other, f"from rank {rank}")
        result: torch.Tensor = reduce(combine, gathered)
        return result

    def _check_peer(self, name: str, rank: int) -> int:
        rank = check_rank(rank, self.world_size, name)
        if rank == self.rank:
            raise ValueError(f"{name}={rank}: is this rank itself; it must be another one")
        return rank

    def _open_store(self, operation: str) -> TCPStore:
        self._check_open(operation)
        return tcp_store_of(self.store)

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ValueError(f"{operation}: this group is closed")

    def _deadline(self, operation: str, timeout: float | None = None) -> Deadline:
        """A deadline; for None, that of the store."""
        self._check_open(operation)
        if timeout is None:
            timeout = self.store.timeout.total_seconds()  # type: ignore[attr-defined]
        return Deadline(timeout)

    def _record(self) -> Callable[[PhaseEvent], None] | None:
        return None if self.events is None else self.events.append

    def _run(
        self, operation: str, function: Callable[[], T], deadline: Deadline, mailbox: Any = None
    ) -> T:
        """Run ``function`` as the only call, and report which operation of which rank failed."""
        self._check_open(operation)
        try:
            return self._calls.run(operation, function, deadline, mailbox)
        except DistNetworkError as error:
            text = f"rank {self.rank} lost the store that rank 0 hosts: {error}"
            if self._client.timed_out:
                text = (
                    f"the store did not answer, although the {deadline.allowed:g} s were over, so "
                    f"this rank gave it up: its host, rank 0, is stopped, overloaded or out of "
                    f"reach; form a new group"
                )
            raise StoreConnectionError(f"{operation}: {text}") from error
        except DistError as error:
            raise StoreConnectionError(
                f"{operation}: rank {self.rank} found in the store what no rank of refdist "
                f"writes: {error}"
            ) from error


def _warn_unless_loopback(listener: sockets.socket) -> None:
    address, port = listener.getsockname()[:2]
    if port == 0 or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    warnings.warn(
        f"the store listens on {address} without a secret: whoever can reach it there can forge "
        f"messages, which are pickles, and so run code on every rank. Give all ranks the same "
        f"secret=, or set {VARIABLE}, to a long random text such as secrets.token_hex()",
        InsecureGroupWarning,
        stacklevel=3,
    )


def _check_expiration(seconds: int) -> None:
    if check_seconds("data_expiration_seconds", seconds) <= 0:
        raise ValueError(f"data_expiration_seconds={seconds}: must be above 0")
