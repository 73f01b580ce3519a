"""Checks of the exercises, one module for each notebook.

A check runs the learner's answer, on real engines or over every schedule, and prints what it
measured. If the answer misses a target, or is not there yet, an ``UnsolvedError`` says so.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UnsolvedError(AssertionError):
    """An answer that is missing or misses a target. The message says which, and by how much."""


def require(condition: object, text: str) -> None:
    """Raise an UnsolvedError with this text unless the condition holds."""
    if not condition:
        raise UnsolvedError(text)


def exercise(
    title: str,
) -> Callable[[Callable[Arguments, str]], Callable[Arguments, None]]:
    """Make a check of a function that returns what it measured: it prints that, after the title.

    An error that the answer raises becomes an UnsolvedError that names it. An answer that is still
    a stub raises NotImplementedError, on this process or on an engine.

    Args:
        title: number and name, such as "5.1 numbered doors".
    """

    def decorate(function: Callable[Arguments, str]) -> Callable[Arguments, None]:
        @wraps(function)
        def check(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            try:
                measured = function(*args, **kwargs)
            except UnsolvedError as error:
                raise UnsolvedError(f"Exercise {title}: {error}") from None
            except Exception as error:
                # an error of an engine has the name of the error there
                name = getattr(error, "ename", type(error).__name__)
                if name == "NotImplementedError":
                    text = "not written yet. Put your code in place of the line that raises"
                    raise UnsolvedError(
                        f"Exercise {title}: {text} NotImplementedError, run that cell, then this."
                    ) from None
                if name == "TooLateError":
                    text = f"your code {getattr(error, 'evalue', error)}"
                    raise UnsolvedError(f"Exercise {title}: {text}") from None
                if name == "NameError":
                    text = f"{getattr(error, 'evalue', error)}. Run the cells above first."
                    raise UnsolvedError(f"Exercise {title}: {text}") from error
                raise UnsolvedError(
                    f"Exercise {title}: your code raised {name}: {getattr(error, 'evalue', error)}"
                ) from error
            print(f"Exercise {title}: solved. {measured}")

        return check

    return decorate
