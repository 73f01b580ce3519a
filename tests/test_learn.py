"""The course: its exercises, and the learner's copies of its notebooks."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from refdist.lab.learn import learners_copy, write_copies

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 100
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def tags(cell):
    return cell.metadata.get("tags", [])


@each_notebook
def test_a_notebook_has_three_to_five_exercises_with_a_hint_a_stub_and_a_check(path):
    cells = nbformat.read(path, as_version=4).cells
    checks = [place for place, cell in enumerate(cells) if "check" in tags(cell)]
    assert 3 <= len(checks) <= 5
    for number, place in enumerate(checks, start=1):
        solutions = [
            at for at, cell in enumerate(cells[:place]) if "### BEGIN SOLUTION" in cell.source
        ]
        statements = [
            cell.source
            for cell in cells[:place]
            if re.search(rf"(?m)^## Exercise {int(path.name[:2])}\.{number} · ", cell.source)
        ]
        assert len(statements) == 1
        assert "<details><summary>Hint</summary>" in statements[0]
        assert place - solutions[-1] <= 2


def names_of(source):
    """The names that a cell defines, and those that it uses."""
    if source.startswith("%%"):
        source = source.partition("\n")[2]
    defined, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
    return defined, used


def needed(cells):
    """The stubs, the checks, and the cells that define what these use."""
    kept, wanted = [], set()
    for cell in reversed([cell for cell in cells if cell.cell_type == "code"]):
        defined, used = names_of(cell.source)
        if "check" in tags(cell) or "# your code here" in cell.source or defined & wanted:
            kept.append(cell)
            wanted = (wanted - defined) | used
    return kept[::-1]


# one set of engines for all notebooks: each would start its own, of 3 to 8 processes
SHARED = """
from refdist.benchmarks.ways import WITHOUT_MULTICAST
from refdist.lab.engines import LocalEngines
from refdist.lab.stuck import RECORDING

shared = LocalEngines(4, environment={"SECRET_OF_06": "0" * 64} | WITHOUT_MULTICAST | RECORDING)


def new_engines():
    shared.offer_port()  # for the groups of the next notebook
    return shared
"""


def executed(sources, folder):
    """The cells of these sources, after one kernel has run them in this folder."""
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook.cells


def errors_in(cell):
    return [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.timeout(300)
def test_every_stub_fails_its_check_with_a_message_that_helps(tmp_path):
    # as make learn lays them out
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "learn").mkdir()
    sources, checks = [SHARED], {}
    for path in NOTEBOOKS:
        copied = json.dumps(learners_copy(json.loads(path.read_text())))
        number = 0
        for cell in needed(nbformat.reads(copied, as_version=4).cells):
            if "check" in tags(cell):
                number += 1
                checks[len(sources)] = f"Exercise {int(path.name[:2])}.{number} "
            sources.append(re.sub(r"LocalEngines\(.*\)", "new_engines()", cell.source))
    cells = executed([*sources, "shared.stop()"], tmp_path / "learn")
    assert errors_in(cells[0]) == errors_in(cells[-1]) == []
    for place, exercise in checks.items():
        (error,) = errors_in(cells[place])
        assert error.ename == "UnsolvedError", error.evalue
        assert error.evalue.startswith(exercise)
        assert "not written yet" in error.evalue


@each_notebook
def test_a_copy_finds_the_files_that_it_names(path):
    for name in re.findall(r'Path\(\\"([^"]+)\\"\)', path.read_text()):
        assert (ROOT / "learn" / ".." / name.removeprefix("../")).resolve().exists()
        assert name.startswith("../")


def small(source):
    return {
        "cells": [
            {
                "cell_type": "code",
                "metadata": {},
                "source": source.splitlines(keepends=True),
                "outputs": ["something"],
                "execution_count": 3,
            }
        ],
        "metadata": {"kernelspec": {"name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_a_copy_has_a_stub_for_each_solution_and_no_outputs():
    solved = """\
def double(x):
    \"\"\"Twice x.\"\"\"
    ### BEGIN SOLUTION
    y = x + x
    return y
    ### END SOLUTION


def half(x):
    ### BEGIN SOLUTION
    return x / 2
    ### END SOLUTION
print(double(2))"""
    copy = learners_copy(small(solved))
    (cell,) = copy["cells"]
    assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert (
        "".join(cell["source"])
        == """\
def double(x):
    \"\"\"Twice x.\"\"\"
    # your code here
    raise NotImplementedError


def half(x):
    # your code here
    raise NotImplementedError
print(double(2))"""
    )


def test_markers_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        learners_copy(small("def f():\n    ### BEGIN SOLUTION\n    return 1"))


def test_a_file_that_is_no_notebook_is_kept(tmp_path, capsys):
    solved, learn = tmp_path / "notebooks", tmp_path / "learn"
    solved.mkdir()
    learn.mkdir()
    (solved / "a.ipynb").write_text(json.dumps(small("1")))
    (learn / "a.ipynb").write_text("half of")
    write_copies(solved, learn)
    assert (learn / "a.ipynb").read_text() == "half of"
    assert "kept as it is" in capsys.readouterr().out


def test_the_work_of_a_learner_is_never_overwritten(tmp_path, capsys):
    solved, learn = tmp_path / "notebooks", tmp_path / "learn"
    solved.mkdir()
    for name in ("a", "b"):
        text = json.dumps(small("### BEGIN SOLUTION\n1\n### END SOLUTION"))
        (solved / f"{name}.ipynb").write_text(text)
    write_copies(solved, learn)
    work = (learn / "a.ipynb").read_text().replace("raise NotImplementedError", "my work")
    (learn / "a.ipynb").write_text(work)
    write_copies(solved, learn)
    assert (learn / "a.ipynb").read_text() == work
    told = capsys.readouterr().out.splitlines()
    assert "kept as it is" in told[2]
    assert "nothing is written" in told[3]
