"""Checks of arguments that several modules make. Each error names the value and the rule."""

import operator
from datetime import timedelta
from typing import Any

MOST_SECONDS = 1e9
"""The longest time to wait. Torch counts nanoseconds in 64 bits, which end after 292 years."""

_MOST = f"{MOST_SECONDS:.0f} seconds (31 years)"


def check_integer(name: str, value: Any) -> int:
    """``value`` as an int. A string, which ``os.environ`` gives, is none; nor is a float.

    Raises:
        ValueError: it is no integer.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(
            f"{name}={value!r}: must be an integer, not {type(value).__name__}"
        ) from None


def check_rank(
    rank: Any, world_size: Any, name: str = "rank", size_name: str = "world_size"
) -> int:
    """``rank`` as an int.

    Raises:
        ValueError: not both are integers, or not ``0 <= rank < world_size``.
    """
    number, size = check_integer(name, rank), check_integer(size_name, world_size)
    if size < 1:
        raise ValueError(f"{size_name}={size}: must be at least 1")
    if not 0 <= number < size:
        raise ValueError(f"{name}={number}: must be in 0..{size - 1} ({size_name}={size})")
    return number


def check_seconds(name: str, value: Any) -> float:
    """``value`` as a float; whether it may be 0 or less is the caller's rule.

    Raises:
        ValueError: it is no number (a timedelta is none), not finite, or beyond ``MOST_SECONDS``.
    """
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"{name}={value!r}: must be a number of seconds, not {type(value).__name__}"
        )
    if not abs(value) <= MOST_SECONDS:  # this way round: NaN fails every comparison
        raise ValueError(f"{name}={value}: must be finite seconds, at least 0, at most {_MOST}")
    return float(value)


def check_timeout(name: str, value: Any) -> float:
    """The seconds of a timedelta.

    Raises:
        ValueError: it is none, it is negative, or beyond ``MOST_SECONDS``.
    """
    if not isinstance(value, timedelta):
        raise ValueError(f"{name}={value!r}: must be a timedelta, not {type(value).__name__}")
    seconds = value.total_seconds()
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError(f"{name}={seconds}: must be at least 0 and at most {_MOST}")
    return seconds


def wait_of(seconds: float) -> timedelta:
    """A timeout for torch, which counts whole milliseconds and takes 0 for none at all."""
    return timedelta(seconds=max(0.001, seconds))
