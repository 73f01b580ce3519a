"""Lets ``pytest --nbval -n 2 notebooks`` keep the cells of a notebook together."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By itself, xdist deals single cells to its workers, and each has a kernel of its own."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
