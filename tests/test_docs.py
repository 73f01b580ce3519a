"""What the pages of docs/ must have. That their links are right, `make docs` itself checks."""

import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"


def public_names():
    """The names of every ``__all__``, and the modules that have one."""
    for path in (ROOT / "refdist").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                yield module
                yield from (f"{module}.{name}" for name in ast.literal_eval(node.value))


# Sphinx leaves out, without a warning, what no page names. A name that is described by hand may be
# left over, as only autodoc looks for it in the package.


def test_each_public_name_has_an_entry_in_the_reference():
    text = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.rst")))
    from_docstrings = re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE)
    by_hand = re.findall(r"^\.\. py:data:: (\w+)\n +:module: ([\w.]+)", text, re.MULTILINE)
    data = [f"{module}.{name}" for name, module in by_hand]
    entries, public = [*from_docstrings, *data], set(public_names())
    assert len(public) > 100
    assert public - set(entries) == set()
    assert set(data) - public == set()
    assert sorted(entries) == sorted(set(entries))


# Notebook 00 tells the reader in which order to read them.


def test_the_course_has_each_notebook_in_reading_order():
    first = nbformat.read(NOTEBOOKS / "00_start_here.ipynb", as_version=4)
    told = re.findall(r"^\| \W+(\d\d) ", "\n".join(c.source for c in first.cells), re.MULTILINE)
    stems = {path.stem[:2]: path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert sorted(told) == sorted(stems)
    course = (DOCS / "course.md").read_text()
    shown = re.findall(r"^\.\./notebooks/(\w+)$", course, re.MULTILINE)
    listed = re.findall(r"^\| \[.*?\]\(\.\./notebooks/(\w+)\.ipynb\)", course, re.MULTILINE)
    assert shown == listed == [stems[number] for number in told]
