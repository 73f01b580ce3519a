"""Requests, answers and values in words, for timelines."""

import json
import pickle
import re
from typing import Any

from refdist.barrier.quick import ASLEEP, COUNT, OPEN, WOKEN
from refdist.barrier.roll import Roll
from refdist.errors import name_ranks
from refdist.exploration.server import Answer, Request
from refdist.store.seals import NO_SEALS

_MOST_CHARACTERS = 28  # of a value


class Words:
    """The texts of keys and values in a timeline. Subclass it for a protocol of your own."""

    def key(self, key: str) -> str:
        """The text of a key."""
        return key

    def value(self, key: str, value: bytes) -> str:
        """The text of the value of a key."""
        text = value.decode(errors="backslashreplace")
        text = text if text.isprintable() else repr(value)[2:-1]
        text = text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."
        return text or '""'

    def amount(self, key: str, amount: int) -> str:
        """The text of a number that is added to the value of a key."""
        return str(amount)


class RefdistWords(Words):
    """The texts of keys and values of refdist's barriers and messages."""

    def key(self, key: str) -> str:
        """The key without the epoch and the slot of a barrier."""
        return re.sub(r"^barrier/(\d+/)+", "", key)

    def value(self, key: str, value: bytes) -> str:
        """The text of a roll, state, object or key that ranks wait for; other values unchanged."""
        if key.endswith("/roll"):
            # a roll begins with the generation of its barrier
            roll = Roll.parse(value, int.from_bytes(value[:8], "little"), NO_SEALS, key)
            if not roll.values and not roll.left:
                return super().value(key, value)
            parts = [f"signed by {name_ranks(sorted(roll.values))}"] if roll.values else []
            parts += [f"left by {name_ranks(sorted(roll.left))}"] if roll.left else []
            return ", ".join(parts)
        if key.endswith("/state") and re.fullmatch(rb"-?\d+", value):
            return self.amount(key, int(value))
        if value == str(OPEN).encode():
            return "open"
        if value[:1] == b"{":  # an outcome that is neither "complete" nor "again"
            return f"broken by rank {json.loads(value)['by']}"
        if value[:1] == b"\x01":
            return repr(pickle.loads(value[1:]))
        return super().value(key, value)

    def amount(self, key: str, amount: int) -> str:
        """The text of a state; other numbers unchanged."""
        if not key.endswith("/state"):
            return super().amount(key, amount)
        return _state_in_words(amount)


def _state_in_words(state: int) -> str:
    """A state, or a number that is added to one, for people to read."""
    if state < -(1 << 60):
        return "broken"
    asleep = state // ASLEEP
    parts = [f"{state & COUNT} left"] if state & COUNT else []
    parts += [f"{asleep} asleep"] if asleep else []
    parts += ["woken"] if state & WOKEN else []
    return ", ".join(parts) or "nothing yet"


def request_in_words(request: Request, words: Words) -> str:
    """The text of a rank's request to its store."""
    if request.name == "enter":
        return f"enters {request.arguments[0]}"
    if not request.arguments:
        return request.name
    first, *rest = request.arguments
    if request.name == "multi_set":
        pairs = zip(first, rest[0], strict=True)
        return "set " + ", ".join(f"{words.key(k)} = {words.value(k, v)}" for k, v in pairs)
    if isinstance(first, tuple):
        return f"{request.name} {', '.join(map(words.key, first))}"
    key = words.key(first)
    values = [words.value(first, v) if isinstance(v, bytes) else v for v in rest]
    match request.name:
        case "set":
            return f"set {key} = {values[0]}"
        case "append" | "queue_push":
            return f"{request.name} to {key}: {values[0]}"
        case "add":
            return f"add {words.amount(first, rest[0])} to {key}"
        case "compare_set" if rest[0] == rest[1]:
            return f"look at {key}"
        case "compare_set":
            return f"if {key} is {values[0]}, set it to {values[1]}"
        case "barrier":
            number = "open" if values[0] == OPEN else values[0]
            return f"barrier {key} of {number}"
    return f"{request.name} {key}"


def answer_in_words(request: Request, answer: Answer, words: Words) -> str:
    """The text of an answer, as the end of a line."""
    if request.waits:
        return ": goes on"
    if answer is None:
        return ""
    keys: Any = request.arguments[0] if request.arguments else ""
    if isinstance(answer, bool):
        return f" -> {'yes' if answer else 'no'}"
    if isinstance(answer, int):
        return f" -> {words.amount(keys, answer)}"
    if isinstance(answer, bytes):
        unknown = request.name == "compare_set" and answer == request.arguments[1]
        nothing = unknown and answer == request.arguments[2] and not answer.strip(b"\0")
        return " -> nothing there" if nothing else f" -> {words.value(keys, answer)}"
    found = [words.value("", v) if isinstance(v, bytes) else v for v in answer]
    return f" -> {', '.join(found) or 'nothing'}"
