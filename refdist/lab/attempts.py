"""A call that may fail: what came of it, and how long it took."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Attempt(NamedTuple):
    """The result or the error of a call.

    Attributes:
        result: what it returned; None if it raised.
        kind: name of the error; empty if it returned.
        error: the whole text of the error; empty if it returned.
        missing: the ranks that the error names as missing.
        ms: milliseconds until it returned or raised.
    """

    result: Any
    kind: str
    error: str
    missing: tuple[int, ...]
    ms: float

    def __str__(self) -> str:
        if self.kind:
            return f"{self.kind} after {self.ms:.2f} ms: {self.error}"
        return f"returned {self.result!r} after {self.ms:.2f} ms"


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Attempt:
    """Call a function, and say what came of it. Only an Exception is kept."""
    start = time.perf_counter()
    try:
        result = function(*arguments, **options)
    except Exception as error:
        ms = 1000 * (time.perf_counter() - start)
        missing = tuple(getattr(error, "missing", ()))
        return Attempt(None, type(error).__name__, str(error), missing, ms)
    return Attempt(result, "", "", (), 1000 * (time.perf_counter() - start))
