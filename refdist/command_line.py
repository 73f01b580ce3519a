"""The common part of all command lines: examples in the help, one line for a wrong argument."""

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with examples. A wrong argument is one line, and exit status 2.

    Argparse's own prints the usage before that line, which takes up to five more.
    """

    def __init__(self, *, description: str, examples: Sequence[str], **options: Any) -> None:
        super().__init__(
            description=textwrap.fill(description, 79),
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(
    kind: type[Number], fits: Callable[[Number], bool], rule: str
) -> Callable[[str], Number]:
    """Return a parser for an argument. Argparse puts the option's name before the error.

    Args:
        kind: ``int`` or ``float``.
        fits: whether a number may be given.
        rule: what ``fits`` demands, to follow "must be".
    """

    def read(text: str) -> Number:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
        return value

    read.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return read


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser for an integer that has a lower bound."""
    return number(int, lambda value: value >= least, f"at least {least}")


def run(main: Callable[[], None]) -> None:
    """Run the ``main`` of a command line. What ends it from outside leaves no traceback.

    Exits with 130 after Ctrl-C, and with 141 where what reads the output has ended, such as
    ``head``: 128 and the number of the signal, as shells count.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        sys.exit(128 + signal.SIGPIPE)
