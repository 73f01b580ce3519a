"""The simulated store answers as the real one: random programs on both, every answer compared.

Several clients carry out requests in a random order. A client that waits for others does so in a
thread of its own, through a relay which tells when its request is on its way to the server, so that
the order is the same on both stores. Client 0 waits for nobody, only for its timeouts.
"""

import random
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial

import pytest
from ranks import LOCAL
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from refdist import create_tcp_store
from refdist.exploration.machine import Machine
from refdist.exploration.session import TIMED_OUT
from refdist.store.client import quiet

CLIENTS, REQUESTS, SECONDS = 3, 40, 20.0
SHORT, LONG = timedelta(milliseconds=2), timedelta(seconds=SECONDS)

KEYS, QUEUES = ["a", "b", "c"], ["q", "r"]
NUMBERS, TEXTS = ["0", "3", "-2", " 7up"], ["", "x", "0"]


class Relay:
    """Forwards what one client sends to a server, and back, and counts what it has forwarded."""

    def __init__(self, port):
        self.forwarded = 0
        self._moved = threading.Condition()
        self._server = socket.create_connection((LOCAL, port))
        self._listener = socket.create_server((LOCAL, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        # torch tries whether something listens before it connects
        while True:
            client, _ = self._listener.accept()
            first = client.recv(1 << 16)
            if first:
                break
        self._listener.close()
        for end in (client, self._server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._pump, args=(self._server, client), daemon=True).start()
        self._send(first)
        self._pump(client, self._server)

    def _send(self, data):
        self._server.sendall(data)
        self._notify(len(data))

    def _notify(self, count):
        with self._moved:
            self.forwarded += count
            self._moved.notify_all()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if sink is self._server:
                    self._send(data)
                else:
                    sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def wait_for_more_than(self, count, future):
        """Until more is forwarded, or the client has its answer without asking the server."""
        future.add_done_callback(lambda _: self._notify(0))
        with self._moved:
            assert self._moved.wait_for(lambda: self.forwarded > count or future.done(), SECONDS)


class RealClients:
    """Clients of a real store, of which any number may be waiting."""

    def __init__(self):
        # of the two servers that torch has, the one that is simulated; on torch 2.6, the other one
        # is what create_tcp_store takes
        self.control = TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False, use_libuv=True)
        self._relays = [Relay(self.control.port) for _ in range(1, CLIENTS)]
        ports = [self.control.port, *(relay.port for relay in self._relays)]
        self._stores = [create_tcp_store(LOCAL, port) for port in ports]

    def start(self, client, request, timeout):
        """Begin a request; return when the server has served it, or noted that it waits."""
        future = Future()
        if client == 0:
            _answer(future, request, self._stores[0], timeout)
            return future
        relay = self._relays[client - 1]
        count = relay.forwarded
        threading.Thread(
            target=_answer, args=(future, request, self._stores[client], timeout), daemon=True
        ).start()
        relay.wait_for_more_than(count, future)
        # the server takes turns, so the second answer comes after it has seen the request
        for _ in range(2):
            self.control.check(["never"])
        return future


def _answer(future, request, store, timeout):
    with quiet():
        try:
            future.set_result(request(store, timeout))
        except Exception as error:
            future.set_exception(error)


class Ask:
    """A request, as a call of a client. All arguments but the timeout are given."""

    def __init__(self, name, *arguments):
        self.text = f"{name}{arguments}"
        self._name = name
        self._arguments = arguments

    def __call__(self, store, timeout):
        value = getattr(store, self._name)(*self._arguments, *self.last(store, timeout))
        if self._name in ("set", "multi_set", "append", "queue_push"):
            store.check(["never"])  # has an answer, which comes after the server has served this
        return value

    def last(self, store, timeout):
        return ()


class AskAndWait(Ask):
    """A request that is given a timeout."""

    def last(self, store, timeout):
        return (timeout,)


class WaitAndAsk(Ask):
    """A request that waits as long as its store says."""

    def last(self, store, timeout):
        store.set_timeout(timeout)
        return ()


def random_request(draw, client):
    key, other, queue = draw.choice(KEYS), draw.choice(KEYS), draw.choice(QUEUES)
    number, text = draw.choice(NUMBERS), draw.choice([*NUMBERS, *TEXTS])
    choices = [
        Ask("set", key, number),
        Ask("set", key, number),
        Ask("multi_set", [key, other], [number, "5"]),
        Ask("add", key, draw.choice([-1, 0, 1, 2, 1 << 62])),
        Ask("compare_set", key, text, number),
        Ask("compare_set", key, "\0", "\0"),
        Ask("delete_key", draw.choice([key, queue])),
        Ask("delete_key", key),
        Ask("check", [key, draw.choice([other, queue])]),
        Ask("num_keys"),
        AskAndWait("wait", [key]),
        AskAndWait("wait", [key, draw.choice([other, queue])]),
        WaitAndAsk("get", key),
        WaitAndAsk("multi_get", [key, other]),
    ]
    if hasattr(TCPStore, "append"):
        choices += [Ask("append", key, draw.choice(["", "1"]))]
    if hasattr(TCPStore, "barrier"):
        choices += 2 * [AskAndWait("barrier", key, draw.choice([1, 2, 2, 3, 1 << 62]))]
    if hasattr(TCPStore, "queue_push"):
        choices += 2 * [Ask("queue_push", queue, text), WaitAndAsk("queue_pop", queue)]
        choices += [Ask("queue_pop", queue, False)]
        # torch keeps the interpreter lock meanwhile, and a relay needs it
        choices += 2 * [Ask("queue_len", queue)] if client == 0 else []
    # client 0 waits for nobody, so someone can always go on
    return draw.choice(choices), client == 0 or draw.random() < 0.2


def outcome(function):
    try:
        return function()
    except (DistStoreError, DistNetworkError) as error:
        return type(error).__name__


class BothStores:
    """The same clients on the simulated store and on the real one."""

    def __init__(self, programs):
        self.programs = programs

        def protocol(store, rank, world_size):
            return {
                str(number): partial(request, store, LONG)
                for number, (request, _) in enumerate(programs[rank])
            }

        self.machine = Machine(protocol, CLIENTS)
        self.state = self.machine.start()
        self.real = RealClients()
        self.running: dict[int, Future] = {}  # the real requests of those who wait
        self.compared = []

    def idle(self):
        """The clients that wait for nothing and have something left to do."""
        return [
            rank.rank
            for rank in self.state.histories
            if rank.rank not in self.running and rank.request is not None
        ]

    def do_next(self, client):
        """The next request of a client, and whatever follows for those who waited."""
        number = len(self.state.histories[client].calls)
        request, gives_up = self.programs[client][number]
        self.state = self.machine.go(self.state, client)  # it enters the call
        self._go_on(client, number)
        gives_up = gives_up and client in self.state.memory.waiting
        self.running[client] = self.real.start(client, request, SHORT if gives_up else LONG)
        if gives_up:
            self.state = self.machine.time_out(self.state, client, TIMED_OUT)
        for rank in list(self.running):
            self._compare(rank)

    def _go_on(self, client, number):
        """Until the call is over, or waits."""
        while not self._over(client, number) and client not in self.state.memory.waiting:
            self.state = self.machine.go(self.state, client)
            for other in self.running:
                # whoever waited and does no more
                self._finish(other)

    def _finish(self, client):
        calls = self.state.histories[client].calls
        while calls and not calls[-1].over and client not in self.state.memory.waiting:
            self.state = self.machine.go(self.state, client)
            calls = self.state.histories[client].calls

    def _over(self, client, number):
        calls = self.state.histories[client].calls
        return len(calls) > number and calls[number].over

    def _compare(self, client):
        self._finish(client)
        call = self.state.histories[client].calls[-1]
        what = (
            f"client {client}, request {call.name}: {self.programs[client][int(call.name)][0].text}"
        )
        if not call.over:
            assert not self.running[client].done(), f"{what}: {self.running[client]}"
            return
        real = outcome(lambda: self.running.pop(client).result(SECONDS))
        simulated = type(call.error).__name__ if call.error else call.value
        assert real == simulated, what
        self.compared.append((what, real))


def random_programs(seed):
    draw = random.Random(seed)
    return [
        [random_request(draw, client) for _ in range(REQUESTS)] for client in range(CLIENTS)
    ], draw


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    programs, draw = random_programs(seed)
    both = BothStores(programs)
    while idle := both.idle():
        both.do_next(draw.choice(idle))
    assert len(both.compared) >= REQUESTS
