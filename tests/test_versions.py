"""The documents that name a version name that of the package."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_documents_name_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(line for line in changes if line.startswith("## "))
    assert newest.startswith(f"## [{version}]")
