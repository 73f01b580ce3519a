"""A group of processes that exchange small objects, without any global state."""

import os
import socket as sockets
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from typing import Any

from torch.distributed import Store, TCPStore

from refdist.checks import check_integer, check_rank, check_seconds
from refdist.deadline import Deadline
from refdist.errors import BarrierError, MessageTimeoutError
from refdist.joining.admitting import Admitting
from refdist.joining.launched import find_place
from refdist.joining.leaving import Leaving
from refdist.joining.realigning import Realigning
from refdist.joining.rendezvous import Joined, form
from refdist.joining.splitting import made
from refdist.joining.wires import wire_of
from refdist.objects.encoding import loads_of
from refdist.objects.gathering import try_to_encode, usable
from refdist.objects.mailbox import Convert
from refdist.objects.tensors import TensorMethods
from refdist.phases import PhaseEvent, recorded
from refdist.store.seals import secret_from
from refdist.torch_versions import tcp_store_of


@dataclass(eq=False)
class StatelessProcessGroup(Leaving, Realigning, Admitting, TensorMethods):
    """A store, and the rank and world size of this process in the group that shares it.

    It carries metadata between processes: objects and small CPU tensors. For the data plane,
    create a group of torch with ``stateless_init_torch_distributed_process_group``. It touches
    nothing global, so a process may be in several groups, with a different rank in each.
    All ranks call the collective methods (``barrier``, ``broadcast_obj``, ``all_gather_obj`` and
    those built on them) in the same order. A group is for one thread at a time. Every method ends
    in time, and can be interrupted (SIGINT); ``refdist.calls`` says what holds then. It raises a
    StoreConnectionError if the store is lost, and a ConcurrentCallError if another thread is in a
    call. Objects travel as pickles, so a process that can forge one can run code on every rank:
    give a ``secret`` to ``create``, or trust the network; ``refdist.store.seals`` says what a
    secret does not do. Or take ``messages="plain"``, if plain data and tensors are enough.

    Attributes:
        rank: this process, 0 to ``world_size - 1``.
        world_size: the number of processes.
        store: what they share. Rank 0 hosts it, unless it was made otherwise.
        socket: on rank 0, the socket that the store listens on; else None.
        data_expiration_seconds: how long an unread object stays.
        send_dst_counter: messages sent, for each destination.
        recv_src_counter: messages received, for each source.
        broadcast_send_counter: broadcasts sent.
        broadcast_recv_src_counter: broadcasts received, for each source.
        entries: keys of what this rank has sent, read or not, and times (monotonic), oldest first.
        events: set it to a list, and each phase of each barrier is appended as a PhaseEvent.
        messages: what may come, ``"pickle"`` or ``"plain"``: see ``create``.

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
    _: KW_ONLY
    events: list[PhaseEvent] | None = field(default=None, repr=False)
    messages: str = field(default="pickle", repr=False)
    joined: InitVar[Joined | None] = None

    def __post_init__(self, joined: Joined | None) -> None:
        self.rank = check_rank(self.rank, self.world_size)
        self.world_size = check_integer("world_size", self.world_size)
        _check_expiration(self.data_expiration_seconds)
        counters = self.send_dst_counter, self.recv_src_counter, self.broadcast_recv_src_counter
        for counter in counters:
            for rank in range(self.world_size):
                counter.setdefault(rank, 0)
        loads = loads_of(self.messages)
        joined = joined or Joined.over(self.store, self.rank, self.world_size)
        self._joined, self._wire, self._barrier = joined, joined.wire, joined.barrier
        self._calls, self._connection = joined.calls, joined.connection
        self._connection.open.add(self)
        self._mailbox = self._wire.mailbox(self._barrier, self, self._calls.kept, loads)

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
        wire: str | None = None,
        messages: str | None = None,
    ) -> "StatelessProcessGroup":
        """Form a group with the other processes that call this with the same host and port.

        In place of ``torch.distributed.init_process_group``, which forms one group in a process
        and for good. Blocks until all ``world_size`` ranks have come. A group that this process
        formed before as the same rank on the same host and port is ended first.

        Args:
            host: where rank 0 listens, and nowhere else: a name, an IPv4 or an IPv6 address.
            port: where rank 0 listens; 0 on rank 0 takes a free port, which ``group.port`` tells.
                To tell other ranks before, bind a socket to port 0 and pass it.
            rank: this process, 0 to ``world_size - 1``.
            world_size: the number of processes.
            data_expiration_seconds: how long an unread object stays.
            store_timeout: seconds until creation fails; also for receives and gathers without any.
            listen_socket: on rank 0, a bound TCP socket to listen on; it stays the caller's.
            secret: the same on all ranks, as of ``secrets.token_hex()``; None for REFDIST_SECRET of
                the environment. Without one, rank 0 warns (InsecureGroupWarning) unless it listens
                on a loopback address.
            wire: ``"vllm"`` if some ranks are of vLLM's own class. ``refdist.vllm_wire`` says what
                its protocol does not have; it takes no secret. Else None.
            messages: ``"pickle"``, or ``"plain"`` to unpickle nothing but plain data and CPU
                tensors (``refdist.objects.plain_data``); the default with ``wire="vllm"``.

        Raises:
            ValueError: an argument is out of its range, the rank is taken, or rank 0 was given
                another world size.
            OSError: the host does not resolve, or on rank 0, cannot be listened on.
            GroupCreationError: a rank did not come in time; the text says how many came. Or at
                once: this rank has another secret than rank 0, or only one of them has one. Or
                within seconds: another rank has another ``wire``.
            StoreConnectionError: no store answered in time.
        """
        _check_expiration(data_expiration_seconds)
        seconds = check_seconds("store_timeout", store_timeout)
        if seconds <= 0:
            raise ValueError(f"store_timeout={store_timeout}: must be above 0 seconds")
        messages = messages or ("pickle" if wire is None else "plain")
        loads_of(messages)  # raises before ranks are waited for
        known, secret = secret_from(secret, wire), None  # no traceback shows it
        protocol = wire_of(wire)
        joined = form(host, port, rank, world_size, seconds, listen_socket, known, protocol)
        group: StatelessProcessGroup = made(
            StatelessProcessGroup, joined, joined.connection.listener, data_expiration_seconds,
            messages,
        )  # fmt: skip
        joined.hand_over(group, host, warn=known is None)
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
        """``create`` for the ranks that torchrun, mpirun or srun started.

        ``refdist.joining.launched`` says which environment variables tell what. Arguments take
        precedence over them; ``options`` are those of ``create``. Groups that live at the same time
        need a port each. Raises as ``create``, and ValueError if the variables do not tell all.
        """
        place = find_place(os.environ, host, port, rank, world_size)
        options["secret"] = secret_from(options.pop("secret", None), options.get("wire"))
        try:
            return StatelessProcessGroup.create(
                place.host, place.port, place.rank, place.world_size, **options
            )
        except (OSError, RuntimeError, ValueError) as error:
            place.explain(error)
            raise

    @property
    def generation(self) -> int:
        """The number of barriers and gathers that took place or broke, that of ``create`` first."""
        return int(self._barrier.generation)

    @property
    def host(self) -> str:
        """The numeric address of the store."""
        return str(self._server("host").host)

    @property
    def port(self) -> int:
        """The port of the store."""
        return int(self._server("port").port)

    def _server(self, what: str) -> TCPStore:
        self._calls.check_open(what)
        return tcp_store_of(self.store)

    def barrier(self, timeout: float = 30.0) -> None:
        """Block until every rank has called this. See ``refdist.barrier.plain`` for its phases.

        Raises:
            BarrierError: on every rank, when one did not arrive within ``timeout`` seconds, with
                the missing ranks. A rank that comes later raises at once, and the next barrier
                works. On rank 0 alone (``completed=True``) when a rank did not leave in that time.
        """
        deadline, wait = Deadline(timeout), self._barrier.wait
        try:
            if self.events is None:
                self._calls.run("barrier", deadline, wait, deadline)
            else:
                self._calls.run("barrier", deadline, self._recorded(wait), deadline)
        except BarrierError as error:
            self._advise(error)
            raise

    def send_obj(self, obj: Any, dst: int) -> None:
        """Send an object to rank ``dst``. Does not wait for it to be received.

        Raises:
            ValueError: ``dst`` is outside the group, or this rank; or the object takes over 4 GiB.
            Exception: of pickle, for an object that cannot be pickled. Nothing was sent.
        """
        self._send(obj, dst)

    def _send(self, obj: Any, dst: int, tensor: bool = False) -> None:
        dst, send = self._check_peer("dst", dst), self._mailbox.send
        encoded, deadline = self._wire.encode(obj), self._deadline("send_obj")
        self._calls.run("send_obj", deadline, send, encoded, dst, deadline, tensor)

    def recv_obj(self, src: int, timeout: float | None = None) -> Any:
        """Receive the next object from rank ``src``, in the order in which it sent them.

        Args:
            src: the sender.
            timeout: seconds to wait; None for the store's own timeout.

        Raises:
            ValueError: ``src`` is outside the group, or this rank.
            MessageTimeoutError: not all of it came; the next call waits for the same message.
            MessageExpiredError: the message expired before it was read; the next call goes on.
            MessageError: what came is no object, or has a wrong tag; the next call goes on.
            BaseException: unpickling raised what is no Exception; the next call tries it once more.
            MemoryError: there is no room for a large object; the next call tries it again.
        """
        return self._receive(src, timeout, None)

    def _receive(self, src: int, timeout: float | None, convert: Convert | None) -> Any:
        src, deadline = self._check_peer("src", src), self._deadline("recv_obj", timeout)
        receive = self._mailbox.receive
        return self._calls.run("recv_obj", deadline, receive, src, deadline, convert, kept=src)

    def broadcast_obj(self, obj: Any | None, src: int, timeout: float | None = None) -> Any:
        """Give the object of rank ``src`` to every rank, and return it; others' ``obj`` is ignored.

        Rank ``src`` does not wait for the others, and removes the object in the first barrier or
        gather to which all ranks come that have it. Raises as ``send_obj`` on rank ``src``, and as
        ``recv_obj`` on the others, which wait for ``timeout`` seconds.
        """
        src = check_rank(src, self.world_size, "src")
        if src != self.rank:
            return self._receive_broadcast(src, timeout, None)
        self._send_broadcast(obj, timeout)
        return obj

    def _send_broadcast(self, obj: Any, timeout: float | None, tensor: bool = False) -> None:
        def send() -> None:
            number = self.broadcast_send_counter
            self.broadcast_send_counter += 1
            self._mailbox.broadcast(encoded, number, deadline, tensor)

        deadline = self._deadline("broadcast_obj", timeout)
        if self.world_size > 1:
            encoded = self._wire.encode(obj)
            self._calls.run("broadcast_obj", deadline, send)

    def _receive_broadcast(self, src: int, timeout: float | None, convert: Convert | None) -> Any:
        deadline, name = self._deadline("broadcast_obj", timeout), ("broadcast", src)
        receive = self._mailbox.receive
        return self._calls.run(
            "broadcast_obj", deadline, receive, src, deadline, convert, True, kept=name
        )

    def all_gather_obj(self, obj: Any, timeout: float | None = None) -> list[Any]:
        """Return the objects of all ranks, in rank order. It is a barrier that carries objects.

        As in a barrier, either every rank gets the objects or none does, and a rank that comes late
        raises at once. Two exceptions: rank 0 raises when another rank got them but did not leave
        in time, and a rank that is interrupted raises that. Large objects are read after rank 0 has
        left, so let it close the group before it ends. They stay in the store until all ranks have
        arrived at the next barrier or gather. ``timeout`` is in seconds, for each phase.

        Raises:
            MessageTimeoutError: a rank did not come in time, or did not leave; ``missing`` names
                it, and the BarrierError that is its cause tells more.
            MessageError: the object of a rank could not be pickled, or is no object.
            Exception: as ``send_obj`` if ``obj`` cannot be sent, once the others have come, who
                get a MessageError.
        """
        deadline = self._deadline("all_gather_obj", timeout)
        encoded = try_to_encode(self._wire.encode, obj)
        function = self._recorded(self._wire.gather)
        try:
            found = self._calls.run(
                "all_gather_obj", deadline, function, self._mailbox, obj, encoded, deadline
            )
        except BarrierError as error:
            self._advise(error)
            text = f"all_gather_obj on rank {self.rank}: {error}"
            raise MessageTimeoutError(text, error.missing) from error
        try:
            return usable(found, encoded)
        finally:
            del found, encoded  # an error among them would keep this frame

    def expire_data(self) -> None:
        """Remove the objects that this rank sent over ``data_expiration_seconds`` ago, if unread.

        A rank that asks for one later gets a MessageExpiredError. Methods that send do the same for
        the oldest. One request for each object that is old enough, read or not.
        """
        deadline = self._deadline("expire_data")
        self._calls.run("expire_data", deadline, self._mailbox.expire, deadline)

    def _check_peer(self, name: str, rank: int) -> int:
        if type(rank) is not int or not 0 <= rank < self.world_size:
            rank = check_rank(rank, self.world_size, name)
        if rank == self.rank:
            raise ValueError(f"{name}={rank}: is this rank itself; it must be another one")
        return rank

    def _deadline(self, operation: str, timeout: float | None = None) -> Deadline:
        if self._calls.closed:
            self._calls.check_open(operation)
        if timeout is None:
            timeout = self.store.timeout.total_seconds()  # type: ignore[attr-defined]
        return Deadline(timeout)

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.events is None:
            return function
        return partial(recorded, self._barrier, self.events.append, function)


def _check_expiration(seconds: int) -> None:
    if check_seconds("data_expiration_seconds", seconds) <= 0:
        raise ValueError(f"data_expiration_seconds={seconds}: must be above 0")
