"""What holds for every stored notebook, besides that nbval passes."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
IGNORED, SKIPPED = "nbval-ignore-output", "nbval-skip"


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

    def test_stops_its_engines(self, path):
        sources = [cell.source for cell in code_cells(path)]
        if any("LocalEngines(" in source for source in sources):
            assert "engines.stop()" in sources[-1]
