"""The learner's copies of the notebooks: without solutions and without outputs.

``python -m refdist.lab.learn notebooks learn`` writes one copy for each notebook of ``notebooks``
into ``learn``. A copy that is already there is never overwritten.

A solution is what a cell has between nbgrader's ``### BEGIN SOLUTION`` and ``### END SOLUTION``.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refdist.command_line import Parser, run

_PROG = "python -m refdist.lab.learn"
_SOLUTION = re.compile(
    r"^( *)### BEGIN SOLUTION *\n.*?^ *### END SOLUTION *$", re.MULTILINE | re.DOTALL
)
_STUB = r"\1# your code here\n\1raise NotImplementedError"


def learners_copy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook, as JSON has it, with stubs in place of solutions, and without outputs."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            stub = _SOLUTION.sub(_STUB, "".join(cell["source"]))
            if "### BEGIN SOLUTION" in stub or "### END SOLUTION" in stub:
                raise ValueError(f"markers of a solution that do not match:\n{stub}")
            source = stub.splitlines(keepends=True)
            cell = cell | {"source": source, "outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def write_copies(notebooks: Path, folder: Path) -> None:
    """Write the copies that are not in the folder yet, and print what was done.

    Args:
        notebooks: folder of the solved notebooks.
        folder: folder of the copies; it is made if it is missing.

    Raises:
        ValueError: there are no notebooks, or one is none.
        OSError: a file cannot be read or written.
    """
    paths = sorted(notebooks.glob("*.ipynb"))
    if not paths:
        raise ValueError(f"{notebooks}: must be a folder with notebooks")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            copy, target = learners_copy(json.loads(path.read_text("utf-8"))), folder / path.name
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no copy can be made: {error!r}") from error
        if not target.exists():
            text = json.dumps(copy, indent=1, ensure_ascii=False) + "\n"
            part = target.with_suffix(".part")
            part.write_text(text, "utf-8")
            part.replace(target)
            print(f"{target}: new")
        elif _sources(target) == [cell["source"] for cell in copy["cells"]]:
            print(f"{target}: kept, nothing is written in it yet")
        else:
            print(f"{target}: kept as it is. To start it anew, delete it and run this again")


def _sources(path: Path) -> list[list[str]] | None:
    """The sources of a copy; None of a file that is no notebook."""
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        return ["".join(cell["source"]).splitlines(keepends=True) for cell in cells]
    except (ValueError, KeyError, TypeError):
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the copies of the folder that the command line names."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        write_copies(options.notebooks, options.folder)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=_PROG,
        description="Write a copy of each notebook for a learner: without solutions and outputs. "
        "A copy that is already there is never overwritten.",
        examples=[f"{_PROG} notebooks learn"],
    )
    parser.add_argument("notebooks", type=Path, help="folder of the solved notebooks")
    parser.add_argument("folder", type=Path, help="folder to write the learner's copies to")
    return parser


if __name__ == "__main__":
    run(main)
