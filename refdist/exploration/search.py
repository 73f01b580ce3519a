"""A search through every schedule of a protocol, shortest first, until a property fails."""

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from refdist.checks import check_integer
from refdist.exploration.machine import Machine, State
from refdist.exploration.rank import Call, Protocol
from refdist.exploration.timeline import Timeline, replay
from refdist.exploration.words import Words

_MOST_RANKS = 10  # a rank is one digit of a schedule


@dataclass(frozen=True)
class Snapshot:
    """One state, as an observer of all ranks sees it.

    Attributes:
        calls: the calls that each rank has entered, by name, in order.
        names: names of the calls that every rank makes.
        dead: the ranks that have died.
        stuck: the ranks that wait without a timeout for an event that cannot come any more.
        ended: whether nothing can happen any more.
        values: the values in the store, by key.
        queues: the values in its queues, by key.
    """

    calls: tuple[Mapping[str, Call], ...]
    names: tuple[str, ...]
    dead: frozenset[int]
    stuck: tuple[int, ...]
    ended: bool
    values: Mapping[str, bytes]
    queues: Mapping[str, tuple[bytes, ...]]

    def named(self, name: str) -> dict[int, Call]:
        """The entered calls of this name, by rank."""
        return {rank: calls[name] for rank, calls in enumerate(self.calls) if name in calls}

    @property
    def collective(self) -> dict[str, dict[int, Call]]:
        """The entered calls of the names that every rank calls, by name and by rank."""
        return {name: self.named(name) for name in self.names}


Property = Callable[[Snapshot], bool]
"""Whether a condition holds in a state. Its docstring states the condition in one sentence."""


@dataclass(frozen=True)
class Counterexample:
    """A schedule after which a property does not hold. No shorter one was found.

    Attributes:
        violated: the property.
        schedule: its steps, for ``replay``.
        protocol: the explored protocol.
        world_size: its number of ranks.
    """

    violated: Property
    schedule: str
    protocol: Protocol = field(repr=False, compare=False)
    world_size: int

    def timeline(self, words: Words | None = None) -> Timeline:
        """The timeline of the schedule. See ``replay``."""
        told = replay(self.protocol, self.world_size, self.schedule, words)
        return replace(told, conclusion=self.sentence)

    @property
    def sentence(self) -> str:
        """The condition that does not hold."""
        return " ".join((self.violated.__doc__ or self.violated.__name__).split())


@dataclass(frozen=True)
class Exploration:
    """The result of an exploration. As a string, it is one line.

    Attributes:
        states: number of different states that were seen.
        schedules: number of different schedules until the end of a run. With a counterexample, or
            if ``complete`` is False, only those that were explored.
        steps: steps of the longest schedule.
        complete: whether all schedules were explored.
        counterexample: the first schedule that breaks a property, if any.
    """

    states: int
    schedules: int
    steps: int
    complete: bool
    counterexample: Counterexample | None

    def __str__(self) -> str:
        counts = f"{self.states:,} states"
        if self.counterexample is not None:
            found = self.counterexample
            return f"{counts} until {found.schedule}; not so: {found.sentence}"
        some = "" if self.complete else "some of them: "
        return f"{counts}, {self.schedules:,} schedules; {some}all properties hold"


def explore(
    protocol: Protocol,
    world_size: int,
    properties: Sequence[Property],
    *,
    timeouts: int = 1,
    crashes: int = 0,
    width: int | None = None,
    seed: int = 0,
    max_steps: int = 500,
    progress: Callable[[str], object] | None = None,
) -> Exploration:
    """Try every schedule of a protocol, the shortest first, until one breaks a property.

    Properties are checked whenever a rank enters or leaves a call or dies, and at the end.

    Args:
        protocol: ``protocol(store, rank, world_size)`` returns the calls that the rank makes, by
            name, in order. Its actions must depend only on the store's answers.
        world_size: 1 to 10 ranks.
        properties: each takes a Snapshot and returns whether it holds.
        timeouts: number of waits that may time out while another rank could go on. If no rank
            can go on, any number of waits may time out.
        crashes: number of ranks that may die.
        width: most states to keep after each step, drawn at random; None for all.
        seed: seed of that draw.
        max_steps: most steps of a schedule.
        progress: function that gets a line of text after each step of all schedules.

    Raises:
        ValueError: an argument is out of its range, a schedule is longer than ``max_steps``, or
            the protocol does not depend only on the answers of its store.

    Source: model checkers such as SPIN and TLC, which search all states of a model by breadth.
    """
    if not 1 <= check_integer("world_size", world_size) <= _MOST_RANKS:
        raise ValueError(f"world_size={world_size}: must be in 1..{_MOST_RANKS}")
    least = {"timeouts": (timeouts, 0), "crashes": (crashes, 0), "max_steps": (max_steps, 1)}
    if width is not None:
        least["width"] = width, 1
    for name, (value, minimum) in least.items():
        if check_integer(name, value) < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")
    search = _Search(Machine(protocol, world_size), properties)
    draw = random.Random(seed)
    layer = {search.machine.start(): 1}
    states, ended, complete = 1, 0, True
    for step in range(max_steps + 1):
        if progress is not None:
            progress(f"step {step}: {states:,} states, {ended:,} schedules ended")
        if not layer:
            return Exploration(states, ended, step - 1, complete, None)
        following, over = search.expand(layer, timeouts, crashes)
        ended += over
        states += len(following)
        if search.counterexample is not None:
            return Exploration(states, ended, step + 1, complete, search.counterexample)
        layer, all_kept = search.keep(following, width, draw)
        complete = complete and all_kept
    raise ValueError(
        f"max_steps={max_steps}: a schedule has more, so a rank may go on for ever: let it wait "
        f"instead of asking again and again"
    )


class _Search:
    """The search, layer by layer: all states after n steps, and the number of schedules to each."""

    def __init__(self, machine: Machine, properties: Sequence[Property]) -> None:
        self.machine = machine
        self.counterexample: Counterexample | None = None
        self._properties = properties
        # for each state of each layer: the place of the state before, and the step
        self._before: list[array[int]] = []
        self._steps: list[list[str]] = []
        self._places: dict[State, int] = {}

    def expand(
        self, layer: dict[State, int], timeouts: int, crashes: int
    ) -> tuple[dict[State, int], int]:
        """The next layer, and the number of schedules that have ended in this one."""
        following: dict[State, int] = {}
        before, steps = array("q"), []
        over = 0
        for place, (state, ways) in enumerate(layer.items()):
            end = True
            for step, after in self.machine.steps(state, timeouts, crashes):
                end = False
                if after in following:
                    following[after] += ways
                    continue
                following[after] = ways
                before.append(place)
                steps.append(step)
                violated = self._violated(state, after)
                if violated is not None:
                    schedule = self._schedule(place, step)
                    self.counterexample = Counterexample(
                        violated, schedule, self.machine.protocol, self.machine.world_size
                    )
                    return following, over
            over += ways if end else 0
        self._before.append(before)
        self._steps.append(steps)
        return following, over

    def keep(
        self, layer: dict[State, int], width: int | None, draw: random.Random
    ) -> tuple[dict[State, int], bool]:
        """At most ``width`` states of a layer, and whether these are all."""
        if width is None or len(layer) <= width:
            return layer, True
        places = sorted(draw.sample(range(len(layer)), width))
        states = list(layer.items())
        self._before[-1] = array("q", (self._before[-1][place] for place in places))
        self._steps[-1] = [self._steps[-1][place] for place in places]
        return dict(states[place] for place in places), False

    def _violated(self, before: State, after: State) -> Property | None:
        ended = self.machine.ended(after)
        if (
            not ended
            and before.dead == after.dead
            and all(
                old.calls is new.calls
                for old, new in zip(before.histories, after.histories, strict=True)
            )
        ):
            return None
        snapshot = take_snapshot(after, ended)
        return next((holds for holds in self._properties if not holds(snapshot)), None)

    def _schedule(self, place: int, last: str) -> str:
        steps = [last]
        for before, taken in zip(self._before[::-1], self._steps[::-1], strict=True):
            steps.append(taken[place])
            place = before[place]
        return "".join(reversed(steps))


def take_snapshot(state: State, ended: bool) -> Snapshot:
    """The snapshot of a state."""
    server = state.memory.server
    stuck = [r.rank for r in state.histories if ended and r.request is not None] if ended else []
    return Snapshot(
        calls=tuple({call.name: call for call in history.calls} for history in state.histories),
        names=tuple(
            n for n in state.histories[0].names if all(n in r.names for r in state.histories)
        ),
        dead=state.dead,
        stuck=tuple(rank for rank in stuck if rank not in state.dead),
        ended=ended,
        values=server.values,
        queues=server.queues,
    )
