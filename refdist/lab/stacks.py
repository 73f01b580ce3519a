"""The stacks of engines, read while they hang, and shortened to the lines of cells.

The simple ways fail. An engine that hangs answers no question, because the thread that answers is
the one that hangs. A handler of Python's ``signal`` module runs only when the call in C++ has
ended. ``faulthandler`` writes the stacks in C, in the moment of the signal. But while it writes
those of other threads, they run on, and the process may crash when one of them ends (seen on Python
3.11). So ``faulthandler`` writes the stack of the main thread. Python's handler, which runs next if
the main thread is free, adds the stacks of the other threads, while none of them can run.
"""

import faulthandler
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

from ipyparallel.error import EngineError
from IPython.core.getipython import get_ipython

from refdist.errors import name_ranks
from refdist.lab.engines import LocalEngines

_SIGNAL = signal.SIGUSR1
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
_OTHERS = "Other threads:\n"
_POLL_SECONDS = 0.02
_QUIET_LOOKS = 3  # a file that has not grown for so many looks is complete


class Line(NamedTuple):
    """A line of a cell that a thread is in."""

    function: str
    number: int
    text: str


class StackReader:
    """Reads the stacks of engines at any moment, also while they hang.

    Make it before the cells that may hang: it keeps the text of the cells that run from then on.
    Engines on other machines must find the folder of their profile, ``engines.folder``, there too.
    """

    def __init__(self, engines: LocalEngines) -> None:
        self._engines = engines
        self._folder = Path(tempfile.mkdtemp(prefix="refdist-stacks-", dir=engines.folder))
        weakref.finalize(self, shutil.rmtree, self._folder, True)
        engines.run(_write_stacks_at_a_signal, str(self._folder))

    def look(self, still: float = 0.5, timeout: float = 20.0) -> str:
        """The lines of cells in which the engines are, those with the same lines together.

        Args:
            still: seconds for which no rank may move. So a rank that only passes by is not shown.
            timeout: seconds after which the stacks are shown although a rank still moves.
        """
        end = time.monotonic() + timeout
        seen, since = self._lines(), time.monotonic()
        while time.monotonic() < min(since + still, end):
            time.sleep(still / 4)
            now = self._lines()
            if now != seen:
                seen, since = now, time.monotonic()
        alike: dict[str, list[int]] = {}
        for rank, text in enumerate(seen):
            alike.setdefault(text, []).append(rank)
        return "\n".join(f"{name_ranks(ranks)}:\n{text}" for text, ranks in alike.items())

    def _lines(self) -> list[str]:
        """The lines of each rank, or the state of its engine."""
        states = [self._engines.state(rank) for rank in range(self._engines.n)]
        dumps = self._dump([rank for rank, state in enumerate(states) if state is None])
        return [
            f"    its engine {state}" if state else self._text_of(dumps[rank])
            for rank, state in enumerate(states)
        ]

    def _text_of(self, dump: str) -> str:
        found = [
            [line for line in map(self._line, reversed(_FRAME.findall(thread))) if line]
            for thread in _THREAD.split(dump)
        ]
        rows = [(f"{line.function} line {line.number}", line.text) for line in chain(*found)]
        width = max((len(place) for place, _ in rows), default=0)
        lines = [f"    {place:{width}}  {text}".rstrip() for place, text in rows]
        return "\n".join(lines) or "    is in no cell"

    def _line(self, frame: tuple[str, str, str]) -> Line | None:
        """The line of a frame; None if the frame is of no cell."""
        path, number, function = Path(frame[0]), int(frame[1]), frame[2]
        if not path.parent.name.startswith("ipykernel_"):
            return None
        source = self._folder / path.name
        lines = source.read_text().splitlines() if source.exists() else []
        text = lines[number - 1].strip() if number <= len(lines) else ""
        return Line("cell" if function == "<module>" else function, number, text)

    def _dump(self, ranks: list[int], timeout: float = 5.0) -> dict[int, str]:
        """Let engines write their stacks, and return them; "" of one that wrote none in time."""
        files = {rank: self._folder / f"{rank}.stacks" for rank in ranks}
        for rank, file in files.items():
            os.truncate(file, 0)
            with suppress(EngineError):  # it may just have ended
                self._engines.signal(rank, _SIGNAL)
        end, looks, texts = time.monotonic() + timeout, 0, [""]
        while looks < _QUIET_LOOKS and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            before, texts = texts, [file.read_text() for file in files.values()]
            looks = looks + 1 if texts == before and all(map(_is_complete, texts)) else 0
        return dict(zip(ranks, texts, strict=False))


def _is_complete(dump: str) -> bool:
    # a main thread that waits for its next cell is free to add the other threads
    first = _FRAME.search(dump)
    is_free = first is not None and Path(first[1]).name == "selectors.py"
    return bool(dump) and (_OTHERS in dump or not is_free)


class _OnThisEngine:
    """The things that an engine keeps so that it can write its stacks."""

    file: TextIO | None = None
    keep_cell: Any = None


def _write_stacks_at_a_signal(rank: int, world_size: int, folder: str) -> None:
    """Runs on an engine: from now on it keeps its cells, and writes its stacks at a signal."""
    shell: Any = get_ipython()
    # "a": the reader empties the file, and the next stacks go to its beginning
    file = open(Path(folder, f"{rank}.stacks"), "a")  # noqa: SIM115

    def keep_cell(info: Any) -> None:
        # IPython names the file of a cell in the same way, so stacks have this name
        name = Path(shell.compile.get_code_name(info.raw_cell, info.raw_cell, 0)).name
        with suppress(FileNotFoundError):  # the reader may be gone, with its folder
            Path(folder, name).write_text(info.raw_cell)

    def add_other_threads(number: int, frame: FrameType | None) -> None:
        text = _OTHERS
        for thread, inner in sys._current_frames().items():
            if thread != threading.get_ident():
                text += f"Thread {thread}\n"
                for outer, line in traceback.walk_stack(inner):
                    code = outer.f_code
                    text += f'  File "{code.co_filename}", line {line} in {code.co_name}\n'
        file.write(text)
        file.flush()

    if _OnThisEngine.keep_cell is not None:
        shell.events.unregister("pre_run_cell", _OnThisEngine.keep_cell)
        faulthandler.unregister(_SIGNAL)
    shell.events.register("pre_run_cell", keep_cell)
    signal.signal(_SIGNAL, add_other_threads)
    faulthandler.register(_SIGNAL, file=file, all_threads=False, chain=True)
    if _OnThisEngine.file is not None:
        _OnThisEngine.file.close()
    _OnThisEngine.keep_cell, _OnThisEngine.file = keep_cell, file
