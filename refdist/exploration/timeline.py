"""A schedule, told step by step: one column a rank, one line a step, and what each rank learns."""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from refdist.barrier_state import State as BarrierState
from refdist.exploration.machine import History, Machine, State
from refdist.exploration.rank import ANSWERED, CLOSED, Call, Protocol
from refdist.exploration.server import Answer, Request

_STEP = re.compile(r"[tx]?\d")
_MOST_CHARACTERS = 28  # of a value


class Words:
    """How keys and values are written in a timeline. Subclass it for a protocol of your own."""

    def key(self, key: str) -> str:
        """A key."""
        return key

    def value(self, key: str, value: bytes | int) -> str:
        """A value under a key, or an amount that is added to it."""
        if isinstance(value, int):
            return str(value)
        text = value.decode(errors="backslashreplace")
        text = text if text.isprintable() else repr(value)[2:-1]
        text = text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."
        return text or '""'


class BarrierWords(Words):
    """How the keys and values of ``refdist.barrier`` are written."""

    def key(self, key: str) -> str:
        """The parts of a key that differ within one barrier."""
        return re.sub(r"^barrier/(\d+/\d+/)?", "", key)

    def value(self, key: str, value: bytes | int) -> str:
        """The state in words; anything else as it is."""
        if key.endswith("/state"):
            try:
                return _state_in_words(BarrierState.of(int(value or 0)))
            except ValueError:
                pass
        if key.endswith(("/wake", "/left")) and value in (b"4611686018427387904", 1 << 62):
            return "open"
        return super().value(key, value)


def _state_in_words(state: BarrierState) -> str:
    if state.broken:
        return "broken"
    parts = [f"{state.left} left"] if state.left else []
    parts += [f"{state.asleep} asleep"] if state.asleep else []
    return ", ".join(parts) or "nothing yet"


@dataclass(frozen=True)
class Event:
    """What one rank does or learns in one step.

    Attributes:
        step: the number of the step, from 1.
        rank: whose event it is.
        kind: ``"enters"``, ``"asks"``, ``"waits"``, ``"is woken"``, ``"times out"``, ``"dies"``,
            ``"returns"`` or ``"raises"``.
        text: a few words.
    """

    step: int
    rank: int
    kind: str
    text: str


@dataclass(frozen=True)
class Timeline:
    """What happens in a schedule.

    Attributes:
        world_size: how many ranks there are.
        schedule: the steps, as a string.
        events: in order.
        conclusion: what should have held, if it does not.
    """

    world_size: int
    schedule: str
    events: tuple[Event, ...]
    conclusion: str = ""
    _column: int = field(default=44, repr=False)

    def __str__(self) -> str:
        width = self._column
        header = "step  " + "".join(f"rank {rank}".ljust(width) for rank in range(self.world_size))
        lines = [header.rstrip()]
        last = 0
        for event in self.events:
            step = str(event.step).rjust(4) if event.step != last else " " * 4
            last = event.step
            lines.append(f"{step}  {' ' * (width * event.rank)}{event.text}")
        if self.conclusion:
            lines.append(f"Not so: {self.conclusion}")
        return "\n".join(lines)


def replay(
    protocol: Protocol, world_size: int, schedule: str, words: Words | None = None
) -> Timeline:
    """Carry a schedule out, and tell what happens.

    Args:
        protocol: as for ``explore``.
        world_size: as for ``explore``.
        schedule: its steps: ``0`` for the next request of rank 0, ``t0`` if its wait times out,
            ``x0`` if it dies.
        words: how keys and values are written.

    Raises:
        ValueError: the schedule has a step that cannot happen.
    """
    states, steps = states_of(Machine(protocol, world_size), schedule)
    teller = _Teller(words or Words())
    events: list[Event] = []
    for number, ((before, after), step) in enumerate(zip(pairwise(states), steps, strict=True), 1):
        events += teller.events(number, step, before, after)
    return Timeline(world_size, schedule, tuple(events))


def states_of(machine: Machine, schedule: str) -> tuple[list[State], list[str]]:
    """The states that a schedule goes through, and its steps.

    Raises:
        ValueError: as ``replay``.
    """
    steps = _STEP.findall(schedule)
    if "".join(steps) != schedule:
        raise ValueError(f"schedule={schedule!r}: must be of steps like 0, t0 and x0")
    states = [machine.start()]
    for number, step in enumerate(steps, 1):
        possible = dict(machine.steps(states[-1], timeouts=len(steps), crashes=len(steps)))
        if step not in possible:
            raise ValueError(
                f"schedule={schedule!r}: step {number} is {step}, but only "
                f"{', '.join(possible) or 'nothing'} can happen there"
            )
        states.append(possible[step])
    return states, steps


class _Teller:
    """Puts steps into words."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def events(self, number: int, step: str, before: State, after: State) -> list[Event]:
        """What happens in one step, to the rank whose step it is and to those that it wakes."""
        rank = int(step[-1])
        if step[0] == "x":
            return [Event(number, rank, "dies", "dies")]
        events: list[Event] = []
        others = [r for r in range(len(after.ranks)) if r != rank]
        for one in [rank, *others]:
            old, new = before.ranks[one], after.ranks[one]
            request = old.request
            if request is None or (old is new and one != rank):
                continue
            if old is new:
                events.append(Event(number, one, "waits", f"{self._request(request)}: waits"))
                continue
            kind = "is woken" if one in before.memory.waiting else "asks"
            kind = "times out" if step[0] == "t" and one == rank else kind
            events += self._told(number, kind, request, old, new)
        return events

    def _told(
        self, number: int, kind: str, request: Request, old: History, new: History
    ) -> list[Event]:
        rank, text = new.rank, self._request(request)
        if request.name == "enter":
            return [Event(number, rank, "enters", text), *self._left(number, rank, old, new)]
        if kind == "times out":
            text += ": time is up"
        elif new.reply.kind == CLOSED:
            text += ": connection closed"
        elif kind == "is woken":
            text += ": goes on"
        else:
            text += self._answer(request, new.reply.answer)
        return [Event(number, rank, kind, text), *self._left(number, rank, old, new)]

    def _left(self, number: int, rank: int, old: History, new: History) -> list[Event]:
        were_over = sum(call.over for call in old.calls)
        return [_left_event(number, rank, call) for call in new.calls[were_over:] if call.over]

    def _request(self, request: Request) -> str:
        words, (first, *rest) = self._words, request.arguments or ("",)
        if request.name == "enter":
            return f"enters {first}"
        if request.name in ("multi_set",):
            pairs = zip(first, rest[0], strict=True)  # type: ignore[call-overload]
            return "set " + ", ".join(
                f"{words.key(key)} = {words.value(key, value)}" for key, value in pairs
            )
        if isinstance(first, tuple):
            return f"{request.name} {', '.join(words.key(key) for key in first)}"
        key = str(first)
        values = [words.value(key, v) for v in rest if isinstance(v, bytes | int)]
        if request.name == "set":
            return f"set {words.key(key)} = {values[0]}"
        if request.name == "add":
            return f"add {values[0]} to {words.key(key)}"
        if request.name == "compare_set":
            if rest[0] == rest[1]:
                return f"look at {words.key(key)}"
            return f"set {words.key(key)} = {values[1]} if {values[0]}"
        if request.name == "barrier":
            return f"barrier {words.key(key)} of {values[0]}"
        return " ".join([request.name, words.key(key), *values])

    def _answer(self, request: Request, answer: Answer) -> str:
        if request.waits:
            return ": goes on"
        if answer is None:
            return ""
        key = str(request.arguments[0]) if request.arguments else ""
        if isinstance(answer, tuple):
            return f" -> {', '.join(self._words.value(key, v) for v in answer if v) or 'none'}"  # type: ignore[arg-type]
        if isinstance(answer, bool):
            return f" -> {'yes' if answer else 'no'}"
        if request.name == "compare_set" and answer == request.arguments[1] == b"\0":
            return " -> nothing there"
        return f" -> {self._words.value(key, answer)}"  # type: ignore[arg-type]


def _left_event(number: int, rank: int, call: Call) -> Event:
    if call.error is None:
        value = "" if call.value is None else f" {call.value!r}"
        return Event(number, rank, "returns", f"returns{value} from {call.name}")
    return Event(number, rank, "raises", f"raises {type(call.error).__name__} from {call.name}")
