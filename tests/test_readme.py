"""README is short, its links resolve on a package index too, and its code runs.

Sphinx checks the links between the pages in docs. Those that name the repository it does not see.
"""

import os
import re
from pathlib import Path

from ranks import LOCAL, run_ranks

import refdist

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
REPOSITORY = "https://github.com/refdist/refdist"


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


LINKS = links(TEXT)


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 110
    assert len(TEXT.split()) <= 750


def anchors(page):
    """Of a page in Markdown, as GitHub makes them from its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check(link):
    """That a link leads to a file of this repository, and to a heading in it."""
    found = re.fullmatch(rf"{REPOSITORY}/(blob|raw)/main/([^#]+)(?:#(.+))?", link)
    assert found, f"{link}: a package index cannot resolve it"
    kind, path, anchor = found.groups()
    assert (ROOT / path).is_file(), link
    assert (kind == "raw") == path.endswith(".png"), link
    assert anchor is None or anchor in anchors(ROOT / path), link


def test_links_lead_to_files_of_this_repository():
    assert len(LINKS) > 20 and f"{REPOSITORY}/raw/main/notebooks/barrier.png" in LINKS
    for link in set(LINKS) - {REPOSITORY}:
        check(link)


def test_links_of_pages_that_name_the_repository():
    for page in (ROOT / "docs").glob("*.md"):
        for link in links(page.read_text()):
            if link.startswith(f"{REPOSITORY}/"):
                check(link)


def run_code(here, code):
    with here.place("README") as (port, listener):
        os.environ |= {"RANK": str(here.rank), "WORLD_SIZE": "2", "MASTER_ADDR": LOCAL}
        os.environ["REFDIST_PORT"] = str(port)
        names = {"listener": listener}
        exec(code.replace("from_env()", "from_env(listen_socket=listener)"), names)
    return names["pids"], names["plan"]


def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL)
    assert len(code.splitlines()) <= 10 and "from_env()" in code
    (pids, plan), other = run_ranks(run_code, 2, code)
    assert (pids, plan) == other
    assert len(set(pids)) == 2 and plan == {"steps": 10}


def test_the_glossary_defines_the_words_of_the_package_as_its_docstring_does():
    listed = refdist.__doc__.partition("Words of its own")[2].partition("The others are")[0]
    words = re.findall(r"^(\w+)\n((?:    .*\n)+)", listed, re.MULTILINE)
    assert len(words) == 8
    glossary = " ".join((ROOT / "docs" / "glossary.md").read_text().split())
    for word, meaning in words:
        plain = " ".join(meaning.replace("``", "`").split())
        assert f"{word} {plain}" in glossary
