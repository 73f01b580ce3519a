"""What holds for every stored notebook, besides that nbval passes, and what handles notebooks."""

import base64
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
import store_notebooks
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEADLINE = 100.0
IGNORED, SKIPPED = "nbval-ignore-output", "nbval-skip"
PICTURE_KIB, NOTEBOOK_KIB = 100, 500


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def has(cell, tag):
    marker = tag.replace("-", "_").upper()
    return tag in cell.metadata.get("tags", []) or marker in cell.source


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStored:
    def test_executed_from_top_to_bottom(self, path):
        counts = [cell.execution_count for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))

    def test_without_errors(self, path):
        outputs = [output for cell in code_cells(path) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output for output in outputs if output.get("name") == "stderr"]

    def test_few_outputs_are_ignored_and_no_cell_is_skipped(self, path):
        cells = code_cells(path)
        assert sum(has(cell, IGNORED) for cell in cells) <= 0.25 * len(cells)
        assert not [cell for cell in cells if has(cell, SKIPPED)]

    def test_an_ignored_output_is_followed_by_a_checked_cell(self, path):
        cells = code_cells(path)
        for cell, following in zip(cells, [*cells[1:], None], strict=True):
            if has(cell, IGNORED):
                assert following is not None
                assert "assert " in following.source
                assert not has(following, IGNORED)

    def test_names_no_path_of_the_machine_that_stored_it(self, path):
        text = path.read_text()
        assert str(Path.home()) not in text
        assert "site-packages" not in text

    def test_cells_are_short(self, path):
        assert all(len(cell.source.splitlines()) <= 25 for cell in code_cells(path))

    def test_is_small(self, path):
        outputs = [output for cell in code_cells(path) for output in cell.outputs]
        shown = [item for output in outputs for item in output.get("data", {}).items()]
        pictures = [base64.b64decode(value) for kind, value in shown if kind == "image/png"]
        assert max(map(len, pictures), default=0) <= PICTURE_KIB * 1024
        assert path.stat().st_size <= NOTEBOOK_KIB * 1024
        # widgets store a state; an SVG of many points is larger than its PNG
        assert "widgets" not in nbformat.read(path, as_version=4).metadata
        assert {kind for kind, _ in shown} <= {"image/png", "text/plain", "text/html"}

    def test_pictures_have_a_text_for_those_who_do_not_see_them(self, path):
        for cell in code_cells(path):
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                assert len(cell.metadata["mystnb"]["image"]["alt"]) > 40

    def test_stops_its_engines(self, path):
        sources = [cell.source for cell in code_cells(path)]
        if any("LocalEngines(" in source for source in sources):
            assert "engines.stop()" in sources[-1]


# What handles notebooks, with small ones.


def write(path, cells, **metadata):
    cells = [new_code_cell(cell, id=f"cell-{number}") for number, cell in enumerate(cells)]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


def test_storing_twice_gives_the_same_bytes(tmp_path):
    # the text comes in two pieces
    path = tmp_path / "some.ipynb"
    write(path, ["print('a', flush=True)\nimport time\ntime.sleep(1)\nprint('b')"])
    stored = []
    for _ in range(2):
        assert store_notebooks.main([str(path)]) == 0
        stored.append(path.read_text())
    assert stored[0] == stored[1]
    (printed,) = code_cells(path)
    assert [output.text for output in printed.outputs] == ["a\nb\n"]


def test_xdist_keeps_the_cells_of_a_notebook_together(tmp_path):
    # each cell needs the one before it
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
    for name in ("a", "b"):
        write(folder / f"{name}.ipynb", ["x = 1", "x *= 2", "x *= 2", "assert x == 4"])
    command = [sys.executable, "-m", "pytest", "--nbval", "-n2", "-p", "no:cacheprovider", folder]
    finished = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert "8 passed" in finished.stdout, finished.stdout


def status_of(address):
    end = time.monotonic() + DEADLINE
    while True:
        try:
            with urllib.request.urlopen(address, timeout=DEADLINE) as reply:
                return reply.status
        except urllib.error.URLError:  # Jupyter prints its address before it listens
            assert time.monotonic() < end, address
            time.sleep(0.1)


@pytest.mark.skipif(not shutil.which("make"), reason="make is missing")
def test_the_address_that_make_learn_prints_is_that_of_the_first_notebook(tmp_path):
    environment = {f"JUPYTER_{name}_DIR": str(tmp_path) for name in ("CONFIG", "DATA", "RUNTIME")}
    bin_folder = f"BIN={Path(sys.executable).parent}"
    recipe = subprocess.run(
        ["make", "-n", "--no-print-directory", "--old-file=.venv/.ready", "learn", bin_folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    command = recipe.stdout.splitlines()[-1]
    with subprocess.Popen(
        # one address: the port that is free on 127.0.0.1 may be taken on ::1
        f"exec {command} --no-browser --ip=127.0.0.1 --port=0",
        shell=True,
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        late = threading.Timer(DEADLINE, server.kill)
        late.start()
        try:
            printed, found = "", None
            while found is None:
                line = server.stderr.readline()
                assert line, f"the server has ended, or was too slow; it printed:\n{printed}"
                printed += line
                found = re.search(r"(http://\S+?/)(lab\S*)\?(token=\S+)", line)
            root, page, token = found.groups()
            assert page == "lab/tree/learn/00_start_here.ipynb"
            for address in (page, "api/contents/notebooks/00_start_here.ipynb"):
                assert status_of(f"{root}{address}?{token}") == 200
        finally:
            late.cancel()
            server.kill()
