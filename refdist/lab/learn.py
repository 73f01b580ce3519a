"""The learner's copies of the notebooks: without solutions and without outputs.

``python -m refdist.lab.learn notebooks learn`` writes one copy for each notebook of ``notebooks``
into ``learn``. A copy that is already there is never overwritten.

A solution is what a cell has between nbgrader's ``### BEGIN SOLUTION`` and ``### END SOLUTION``.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

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
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(notebooks.glob("*.ipynb")):
        copy, target = learners_copy(json.loads(path.read_text("utf-8"))), folder / path.name
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


def main() -> None:
    """Write the copies of the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m refdist.lab.learn", description=__doc__)
    parser.add_argument("notebooks", type=Path, help="folder of the solved notebooks")
    parser.add_argument("folder", type=Path, help="folder to write the learner's copies to")
    args = parser.parse_args()
    write_copies(args.notebooks, args.folder)


if __name__ == "__main__":
    main()
