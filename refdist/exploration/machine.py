"""The states of a protocol on a simulated store, and the steps between them.

A state is the memory of the server, the replies to each rank so far, and the set of dead ranks. The
possible next steps depend only on the state. So schedules that lead to the same state are explored
as one from there on, without loss.

Steps
    ``0``: the next request of rank 0 reaches the server. The answer comes at once, or the rank
    waits until another one wakes it. A request without an answer, like ``set``, is a step of the
    same kind: a connection keeps its order, and no rank sees a request before it takes effect.
    ``t0``: a wait of rank 0 times out. This may happen before the server ends the wait, or although
    the server ends it, as with a store that is slow to answer.
    ``x0``: rank 0 dies. Its next request never reaches the server. The store lives on, as if
    another process hosted it.
"""

from collections.abc import Hashable, Iterator
from typing import NamedTuple

from refdist.exploration.rank import Call, Protocol, run
from refdist.exploration.server import (
    Client,
    ConnectionClosed,
    Request,
    Server,
    StillWaiting,
)
from refdist.exploration.session import ANSWERED, CLOSED, STALLED, TIMED_OUT, Reply


class History:
    """The replies to a rank so far: a node of a tree, whose children add one reply each.

    Attributes:
        calls: the calls of the rank so far.
        request: its next request; None at its end.
        names: names of all its calls.
        reply: the last reply.
        early: number of its waits that timed out while others could go on.
    """

    def __init__(
        self, machine: "Machine", rank: int, parent: "History | None", reply: Reply
    ) -> None:
        self._machine = machine
        self._parent = parent
        self.reply = reply
        self._children: dict[Reply, History] = {}
        self.rank = rank
        self.early: int = 0 if parent is None else parent.early + (reply.kind == TIMED_OUT)
        asked, replies = self._history()
        ran = run(machine.protocol, rank, machine.world_size, asked, replies)
        self.names, self.request = ran.names, ran.request
        same = parent is not None and parent.calls == ran.calls
        self.calls: tuple[Call, ...] = parent.calls if parent is not None and same else ran.calls

    def then(self, reply: Reply) -> "History":
        """The history with one more reply."""
        child = self._children.get(reply)
        if child is None:
            child = self._children[reply] = History(self._machine, self.rank, self, reply)
        return child

    def _history(self) -> tuple[list[Request], list[Reply]]:
        asked: list[Request] = []
        replies: list[Reply] = []
        node = self
        while node._parent is not None:
            request = node._parent.request
            assert request is not None
            asked.append(request)
            replies.append(node.reply)
            node = node._parent
        return asked[::-1], replies[::-1]


class Memory:
    """The memory of a server. Equal memories are one object, so comparing them is fast."""

    def __init__(self, server: Server, world_size: int) -> None:
        self.server = server
        self.waiting = tuple(rank for rank in range(world_size) if server.waits(rank))
        self.served: dict[Request, tuple[Memory, Reply | None, list[Client]]] = {}
        self.forgot: dict[Hashable, Memory] = {}


class State(NamedTuple):
    """A state of all ranks and of the server."""

    memory: Memory
    dead: frozenset[int]
    histories: tuple[History, ...]


class Machine:
    """A protocol that runs one step at a time."""

    def __init__(self, protocol: Protocol, world_size: int) -> None:
        self.protocol = protocol
        self.world_size = world_size
        self._memories: dict[Hashable, Memory] = {}

    def start(self) -> State:
        """The state before any step."""
        histories = [History(self, r, None, Reply(ANSWERED)) for r in range(self.world_size)]
        return State(self._remember(Server()), frozenset(), tuple(histories))

    def _remember(self, server: Server) -> Memory:
        memory = self._memories.get(server.memory())
        if memory is None:
            memory = self._memories[server.memory()] = Memory(server, self.world_size)
        return memory

    def steps(self, state: State, timeouts: int, crashes: int) -> Iterator[tuple[str, State]]:
        """The possible next steps, and the states after them.

        Args:
            state: the present state.
            timeouts: number of waits that may time out, in all, while others could go on.
            crashes: number of ranks that may die, in all.
        """
        waiting = state.memory.waiting
        early = sum(history.early for history in state.histories) < timeouts
        going = False
        waits: list[int] = []
        for history in state.histories:
            rank, request = history.rank, history.request
            if request is None or rank in state.dead:
                continue
            limited = request.seconds is not None
            if rank in waiting:
                if limited:
                    waits.append(rank)
                continue
            going = True
            yield str(rank), self.go(state, rank)
            if early and limited:
                yield f"t{rank}", self.time_out(state, rank, TIMED_OUT)
        if early or not going:
            kind = TIMED_OUT if going else STALLED
            for rank in waits:
                yield f"t{rank}", self.time_out(state, rank, kind)
        if len(state.dead) < crashes and (going or waits):
            for history in state.histories:
                if history.request is not None and history.rank not in state.dead:
                    yield f"x{history.rank}", self.die(state, history.rank)

    def go(self, state: State, rank: int) -> State:
        """The next request of a rank reaches the server."""
        history = state.histories[rank]
        request = history.request
        assert request is not None
        if request.name == "enter":
            left = tuple(
                r.rank for r in state.histories if _has_left(r.calls, request.arguments[0])
            )
            return _replace(state, state.memory, [(rank, history.then(Reply(ANSWERED, left)))])
        memory, reply, woken = self._serve(state.memory, request)
        changed = [] if reply is None else [(rank, history.then(reply))]
        changed += [(other, state.histories[other].then(Reply(ANSWERED))) for other, _ in woken]
        return _replace(state, memory, changed)

    def _serve(self, memory: Memory, request: Request) -> tuple[Memory, Reply | None, list[Client]]:
        served = memory.served.get(request)
        if served is None:
            server = memory.server.copy()
            reply: Reply | None
            woken: list[Client] = []
            try:
                answer, woken = server.serve(request)
                reply = Reply(ANSWERED, answer)
            except StillWaiting:
                reply = None
            except ConnectionClosed:
                reply = Reply(CLOSED)
            served = memory.served[request] = self._remember(server), reply, woken
        return served

    def time_out(self, state: State, rank: int, kind: str) -> State:
        """A wait of a rank times out; its request may not have reached the server before."""
        history = state.histories[rank]
        assert history.request is not None
        client = history.request.client
        if rank not in state.memory.waiting:
            # its request still takes effect, and may wake others
            memory, _, woken = self._serve(state.memory, history.request)
            changed = [(other, state.histories[other].then(Reply(ANSWERED))) for other, _ in woken]
            state = _replace(state, memory, changed)
        forgot = state.memory.forgot.get(client)
        if forgot is None:
            server = state.memory.server.copy()
            server.cancel(client)
            forgot = state.memory.forgot[client] = self._remember(server)
        return _replace(state, forgot, [(rank, history.then(Reply(kind)))])

    def die(self, state: State, rank: int) -> State:
        """A rank dies."""
        forgot = state.memory.forgot.get(rank)
        if forgot is None:
            server = state.memory.server.copy()
            server.disconnect(rank)
            forgot = state.memory.forgot[rank] = self._remember(server)
        return State(forgot, state.dead | {rank}, state.histories)

    def ended(self, state: State) -> bool:
        """Whether nothing can happen any more, except that a rank dies."""
        return all(
            history.request is None
            or history.rank in state.dead
            or (history.rank in state.memory.waiting and history.request.seconds is None)
            for history in state.histories
        )


def _has_left(calls: tuple[Call, ...], name: Hashable) -> bool:
    return any(call.name == name and call.over for call in calls)


def _replace(state: State, memory: Memory, changed: list[tuple[int, History]]) -> State:
    histories = list(state.histories)
    for rank, history in changed:
        histories[rank] = history
    return State(memory, state.dead, tuple(histories))
