"""A line through timings: a latency for each message, and a time for each byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from refdist.benchmarks.allreduce import AllReduceTiming


@dataclass(frozen=True)
class Line:
    """The time of a message of S bytes, as ``alpha + beta * S``.

    Attributes:
        alpha: seconds that every message takes: the latency.
        beta: seconds that every byte takes: the inverse of a bandwidth.
        error: distance of the measured times from the line, as a part of the times: the root of
            the mean square.

    Source: Hockney, "The communication challenge for MPP", 1994.
    """

    alpha: float
    beta: float
    error: float

    def seconds(self, num_bytes: float) -> float:
        """The line's time for a message."""
        return self.alpha + self.beta * num_bytes

    @property
    def balance(self) -> float:
        """The size in bytes at which latency and bytes take equally long."""
        return self.alpha / self.beta


def fit_line(timings: Sequence[AllReduceTiming]) -> Line:
    """The line with the least squared errors, each measured as a part of the time.

    With errors in seconds, only the largest messages would count.

    Raises:
        ValueError: there are fewer than two sizes.
    """
    if len({timing.num_bytes for timing in timings}) < 2:
        raise ValueError(f"timings of {len(timings)} messages: must be of at least two sizes")
    # with x = S / t and y = 1 / t, the error of the line at a message is alpha y + beta x - 1
    x = [timing.num_bytes / timing.seconds for timing in timings]
    y = [1 / timing.seconds for timing in timings]
    xx, yy, xy = _dot(x, x), _dot(y, y), _dot(x, y)
    determinant = xx * yy - xy * xy
    alpha = (sum(y) * xx - sum(x) * xy) / determinant
    beta = (sum(x) * yy - sum(y) * xy) / determinant
    errors = [alpha * b + beta * a - 1 for a, b in zip(x, y, strict=True)]
    return Line(alpha, beta, sqrt(_dot(errors, errors) / len(errors)))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))
