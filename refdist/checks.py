"""Checks of arguments that several modules make. Each error names the value and the rule."""

import operator
from typing import Any


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
    """``value`` as a float.

    Raises:
        ValueError: it is no number; a timedelta is none.
    """
    if isinstance(value, (int, float)):
        return float(value)
    raise ValueError(f"{name}={value!r}: must be a number of seconds, not {type(value).__name__}")
