"""Execute every notebook from top to bottom and store them with their outputs, all or none."""

import base64
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CELL_SECONDS = 300
PICTURED = "01_barrier_phases.ipynb"  # README shows its first figure


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and without what differs from run to run for no reason."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    # a kernel's own log would break the lines of progress; errors of cells come another way
    client.execute(stderr=subprocess.DEVNULL)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("collapsed", None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return notebook


def merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, where text that was printed at once is one: the kernel sends it in pieces."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def first_picture(notebook: nbformat.NotebookNode) -> bytes:
    """The first PNG among the outputs."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    pictures = (output.get("data", {}).get("image/png") for output in outputs)
    return base64.b64decode(next(picture for picture in pictures if picture))


def main(names: list[str]) -> int:
    """Execute the named notebooks, or all. Returns 0 if every cell ran."""
    paths = [Path(name) for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    executed = {}
    for number, path in enumerate(paths, start=1):
        print(f"[{number}/{len(paths)}] {path.name} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            executed[path] = execute(path)
        except CellExecutionError as error:
            print(f"failed\n{error}\nNothing was stored.")
            return 1
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    for path, notebook in executed.items():
        nbformat.write(notebook, path)
        if path.name == PICTURED:
            (NOTEBOOKS / "barrier.png").write_bytes(first_picture(notebook))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
