"""The timeline of a schedule: one column a rank, one line a step, with the answers to each rank."""

import re
from dataclasses import dataclass
from itertools import pairwise

from refdist.exploration.machine import History, Machine, State
from refdist.exploration.rank import Call, Protocol
from refdist.exploration.server import Request
from refdist.exploration.session import CLOSED
from refdist.exploration.words import Words, answer_in_words, request_in_words

_STEP = re.compile(r"[tx]?\d")


@dataclass(frozen=True)
class Event:
    """An action of one rank, or an answer to it, in one step.

    Attributes:
        step: the number of the step, from 1.
        rank: the rank.
        kind: ``"enters"``, ``"asks"``, ``"waits"``, ``"is woken"``, ``"times out"``, ``"dies"``,
            ``"returns"`` or ``"raises"``.
        text: the event in a few words.
    """

    step: int
    rank: int
    kind: str
    text: str


@dataclass(frozen=True)
class Timeline:
    """The events of a schedule. As a string, it has one column a rank.

    Attributes:
        world_size: number of ranks.
        schedule: the steps, as a string.
        events: the events, in order.
        conclusion: the condition that does not hold; empty if there is none.
    """

    world_size: int
    schedule: str
    events: tuple[Event, ...]
    conclusion: str = ""

    def __str__(self) -> str:
        ranks = range(self.world_size)
        texts = [[event.text for event in self.events if event.rank == rank] for rank in ranks]
        widths = [2 + max(map(len, [f"rank {rank}", *texts[rank]])) for rank in ranks]
        lines = ["step  " + "".join(f"rank {rank}".ljust(widths[rank]) for rank in ranks)]
        last = 0
        for event in self.events:
            number = "" if event.step == last else str(event.step)
            last = event.step
            lines.append(f"{number:>4}  {' ' * sum(widths[: event.rank])}{event.text}")
        if self.conclusion:
            lines.append(f"Not so: {self.conclusion}")
        return "\n".join(line.rstrip() for line in lines)


def replay(
    protocol: Protocol, world_size: int, schedule: str, words: Words | None = None
) -> Timeline:
    """Carry out a schedule and return its timeline.

    Args:
        protocol: as for ``explore``.
        world_size: as for ``explore``.
        schedule: its steps: ``0`` for the next request of rank 0, ``t0`` if its wait times out,
            ``x0`` if it dies.
        words: the texts of keys and values.

    Raises:
        ValueError: the schedule has a step that cannot happen.
    """
    states, steps = _carry_out(Machine(protocol, world_size), schedule)
    teller = _Teller(words or Words())
    events: list[Event] = []
    for number, ((before, after), step) in enumerate(zip(pairwise(states), steps, strict=True), 1):
        events += teller.events(number, step, before, after)
    return Timeline(world_size, schedule, tuple(events))


def _carry_out(machine: Machine, schedule: str) -> tuple[list[State], list[str]]:
    """The states that a schedule goes through, and its steps."""
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
    """Puts the events between two states into words."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def events(self, number: int, step: str, before: State, after: State) -> list[Event]:
        """The events of the rank that takes the step, and of the ranks that it wakes."""
        actor = int(step[-1])
        if step[0] == "x":
            return [Event(number, actor, "dies", "dies")]
        events: list[Event] = []
        everyone = range(len(after.histories))
        for rank in sorted(everyone, key=lambda rank: rank != actor):
            old, new = before.histories[rank], after.histories[rank]
            if old.request is None or (old is new and rank != actor):
                continue
            if old is new:
                text = f"{request_in_words(old.request, self._words)}: waits"
                events.append(Event(number, rank, "waits", text))
                continue
            kind = "is woken" if rank in before.memory.waiting else "asks"
            kind = "enters" if old.request.name == "enter" else kind
            kind = "times out" if step[0] == "t" and rank == actor else kind
            events.append(Event(number, rank, kind, self._text(kind, old.request, new)))
            events += _ends(number, old, new)
        return events

    def _text(self, kind: str, request: Request, new: History) -> str:
        text = request_in_words(request, self._words)
        if kind == "enters":
            return text
        if kind == "times out":
            return f"{text}: time is up"
        if new.reply.kind == CLOSED:
            return f"{text}: connection closed"
        return text + answer_in_words(request, new.reply.answer, self._words)


def _ends(number: int, old: History, new: History) -> list[Event]:
    """The events of the calls that have ended."""
    ended = [call for call in new.calls[sum(call.over for call in old.calls) :] if call.over]
    return [Event(number, new.rank, *_end(call)) for call in ended]


def _end(call: Call) -> tuple[str, str]:
    if call.error is not None:
        return "raises", f"raises {type(call.error).__name__} from {call.name}"
    value = "" if call.value is None else f" {call.value!r}"
    return "returns", f"returns{value} from {call.name}"
