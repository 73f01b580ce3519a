"""The exercises of notebook 00: right answers pass, and each wrong one is told why it fails."""

import re
import textwrap
from pathlib import Path

import nbformat
import pytest

import refdist
from refdist.lab.exercises import UnsolvedError, start

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "00_start_here.ipynb"
PLACES = """
    n, r = group.world_size, group.rank
    following, previous = (r + 1) % n, (r - 1) % n
    others = [other for other in range(n) if other != r]
"""

pytestmark = pytest.mark.xdist_group("engines")


@pytest.fixture(scope="module")
def engines(engines):
    engines.view.execute("import socket\nfrom refdist import StatelessProcessGroup", block=True)
    return engines


def answer(engines, name, body):
    """Define the answer on the engines, as a cell does."""
    code = f"def {name}(group, number):" + PLACES + textwrap.indent(textwrap.dedent(body), "    ")
    engines.view.execute(code, block=True)


def solution(name):
    """The function of that name in the solved notebook."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (cell,) = [cell for cell in cells if f"def {name}(" in cell.source and "BEGIN" in cell.source]
    return cell.source.removeprefix("%%px\n")


CHECKS = {
    "ring_sum": start.check_ring,
    "maximum": start.check_maximum,
    "split": start.check_split,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_missing_function_a_stub_and_the_solution(name, engines, capsys):
    engines.view.execute(f"globals().pop({name!r}, None)", block=True)
    with pytest.raises(UnsolvedError, match=rf"name '{name}' is not defined on engine 0.*Run the"):
        CHECKS[name](engines)
    answer(engines, name, "raise NotImplementedError")
    with pytest.raises(UnsolvedError, match=r"Exercise 0\.\d .*: not written yet"):
        CHECKS[name](engines)
    engines.view.execute(solution(name), block=True)
    CHECKS[name](engines)
    assert "solved" in capsys.readouterr().out


RING = """
    if n == 1:
        return number
    if r == 0:
        group.send_obj(number, following)
        return group.recv_obj(previous)
    total = group.recv_obj(previous) + number
    group.send_obj(total, following)
    return total
"""
RING_MAXIMUM = """
    if n == 1:
        return number
    largest = number if r == 0 else max(number, group.recv_obj(previous))
    group.send_obj(largest, following)
    if r < n - 1:
        largest = group.recv_obj(previous)
        if r < n - 2:
            group.send_obj(largest, following)
    return largest
"""
SPLIT = """
    with socket.create_server((group.host, 0)) as listener:
        offers = group.all_gather_obj((number, listener.getsockname()[1]))
        members = [other for other, offer in enumerate(offers) if offer[0] == number]
        return StatelessProcessGroup.create(
            group.host, offers[members[0]][1], members.index(r), len(members),
            store_timeout=2, listen_socket=listener)
"""
FIXED = """
    colours = group.all_gather_obj(number)
    members = [other for other in range(n) if colours[other] == number]
    return StatelessProcessGroup.create(
        group.host, {port}, members.index(r), len(members), store_timeout=2)
"""
SPLIT_BY_MESSAGES = """
    colours = group.all_gather_obj(number)
    members = [other for other in range(n) if colours[other] == number]
    listener = port = None
    if r == members[0]:
        listener = socket.create_server((group.host, 0))
        port = listener.getsockname()[1]
        for other in members[1:]:
            group.send_obj(port, other)
    else:
        port = group.recv_obj(members[0])
    return StatelessProcessGroup.create(
        group.host, port, members.index(r), len(members), listen_socket=listener)
"""


@pytest.mark.parametrize(
    ("name", "body"),
    [("maximum", RING_MAXIMUM), ("split", SPLIT_BY_MESSAGES)],
    ids=["a ring", "one gather and messages"],
)
def test_another_right_answer(name, body, engines, capsys):
    answer(engines, name, body)
    CHECKS[name](engines)
    assert "solved" in capsys.readouterr().out


# Each obvious wrong answer, and what its message says.
WRONG = {
    "all ranks receive first": (
        "ring_sum",
        "total = group.recv_obj(previous) + number\ngroup.send_obj(total, following)\nreturn total",
        r"on rank \d, your code raised MessageTimeoutError: .*rank \d",
    ),
    "the sums of the statement": (
        "ring_sum",
        "if n > 1: group.send_obj(0, following); group.recv_obj(previous)\n"
        "return [10, 3, 6, 10][r]",
        r"4 ranks, numbers .* the ranks returned \[10, 3, 6, 10\]; wanted was",
    ),
    "only for four ranks": (
        "ring_sum",
        RING.replace("group.world_size", "4")
        .replace("following", "(r + 1) % 4")
        .replace("previous", "(r - 1) % 4"),
        r"3 ranks, .*raised ValueError: .*=3: must be in 0\.\.2",
    ),
    "a group of one sends to itself": (
        "ring_sum",
        RING.replace("if n == 1", "if n == 0"),
        r"1 rank, .*raised ValueError: dst=0: is this rank itself",
    ),
    "the last rank sends to no one": (
        "ring_sum",
        "total = number if r == 0 else group.recv_obj(previous) + number\n"
        "if r < n - 1: group.send_obj(total, following)\nreturn total",
        r"the ranks returned",
    ),
    "rank 0 adds up, and sends to all": (
        "ring_sum",
        "if r:\n    group.send_obj(number, 0)\n    return group.recv_obj(0)\n"
        "sums = [number]\n"
        "for other in others: sums.append(sums[-1] + group.recv_obj(other))\n"
        "for other in others: group.send_obj(sums[other], other)\n"
        "return sums[-1]",
        r"rank 0 sent 1 message to rank 1 and 1 message to rank 2 and .*; wanted was 1 message to",
    ),
    "the package's gather": (
        "ring_sum",
        "numbers = group.all_gather_obj(number)\nreturn sum(numbers[: r + 1] if r else numbers)",
        r"rank 0 made 1 collective calls",
    ),
    "the naive maximum": (
        "maximum",
        "for other in others: group.send_obj(number, other)\n"
        "return max([number, *(group.recv_obj(other) for other in others)])",
        r"the ranks sent 12 messages in all; allowed are 6",
    ),
    "two whole rounds": (
        "maximum",
        RING_MAXIMUM.replace("r < n - 1", "True").replace("r < n - 2", "True"),
        r"the ranks sent 8 messages in all; allowed are 6",
    ),
    "an unread message": (
        "maximum",
        RING_MAXIMUM.replace("r < n - 2", "True"),
        r"sent 7 messages in all; allowed are 6",
    ),
    "larger than zero": (
        "maximum",
        "if r:\n    group.send_obj(number, 0)\n    return group.recv_obj(0)\n"
        "largest = max([0, number, *(group.recv_obj(other) for other in others)])\n"
        "for other in others: group.send_obj(largest, other)\nreturn largest",
        r"the ranks returned \[0, 0, 0, 0\]; wanted was \[-",
    ),
    "only rank 0 has it": (
        "maximum",
        "if r:\n    group.send_obj(number, 0)\n    return number\n"
        "return max([number, *(group.recv_obj(other) for other in others)])",
        r"the ranks returned",
    ),
    "a gather again": (
        "maximum",
        "return max(group.all_gather_obj(number))",
        r"collective calls .*use send_obj and recv_obj only",
    ),
    "an error on one rank": (
        "maximum",
        "if r == 2: 1 / 0\nif r: return group.recv_obj(2)\nreturn 0",
        r"on rank 2, your code raised ZeroDivisionError: division by zero",
    ),
    "it never ends": (
        "maximum",
        "while r == 0: pass",
        r"on rank 0, your code did not end within 2 s",
    ),
    "no group": ("split", "return None", r"rank 0 returned None; wanted was a StatelessProcessG"),
    "the old group": ("split", "return group", r"rank 0 became rank 0 of 4; wanted was 0 of 3"),
    "the order of the colours": (
        "split",
        SPLIT.replace("members.index(r)", "members[::-1].index(r)").replace(
            "offers[members[0]]", "offers[members[-1]]"
        ),
        r"rank 0 became rank 2 of 3; wanted was 0 of 3",
    ),
    "only two halves": (
        "split",
        SPLIT.replace("if offer[0] == number", "if other % 2 == r % 2"),
        r"colours \[7, 7, 7, 2\]: rank 0 became rank 0 of 2; wanted was 0 of 3",
    ),
    "the rank of the engine": (
        "split",
        SPLIT.replace("members.index(r)", "members.index(rank)"),
        r"on rank \d, your code raised ",
    ),
    "a port for each colour": (
        "split",
        FIXED.format(port="29500 + number"),
        # or another program of this machine has the port
        r"colours \[7, 7, 7, 2\].*: (rank \d lost the group of an earlier call|on rank \d, your)",
    ),
    "a port for each first rank, after the group's own": (
        "split",
        FIXED.format(port="group.port + 1 + members[0]"),
        # or another program of this machine has the port
        r"colours \[7, 7, 7, 2\].*: (rank \d lost the group of an earlier call|on rank \d, your)",
    ),
    "a port for each colour and call": (
        "split",
        FIXED.format(port="29500 + 10 * group.generation + number"),
        r"colours \[70000, 1000000000, .*\]: on rank \d, your code raised .*port",
    ),
    "a gather for each colour": (
        "split",
        "for _ in range(3): group.barrier()\n" + textwrap.dedent(SPLIT),
        r"rank 0 made 4 collective calls in the old group; allowed are 2",
    ),
    "a broadcast from each rank": (
        "split",
        "for other in range(n): group.broadcast_obj(number, other)\n" + textwrap.dedent(SPLIT),
        r"rank 0 made 5 collective calls in the old group; allowed are 2",
    ),
    "the old group is closed": (
        "split",
        textwrap.dedent(SPLIT).replace("return Stateless", "new = Stateless")
        + "group.close()\nreturn new",
        r"raised ",
    ),
}


HANG = (
    "only for four ranks",
    "all ranks receive first",
    "an error on one rank",
    "it never ends",
    "a port for each colour",
)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer(what, engines, monkeypatch):
    if what in HANG:
        monkeypatch.setattr(start, "PATIENCE_SECONDS", 1.0)
    name, body, told = WRONG[what]
    answer(engines, name, body)
    with pytest.raises(UnsolvedError, match=told):
        CHECKS[name](engines)


def test_too_few_engines(engines):
    with pytest.raises(UnsolvedError, match="4 engines; 5 are needed"):
        list(start._try(engines, "ring_sum", "numbers", [[0] * 5]))


def test_the_glossary_defines_the_words_of_the_package_as_its_docstring_does():
    listed = refdist.__doc__.partition("Words of its own")[2].partition("The others are")[0]
    words = re.findall(r"^(\w+)\n((?:    .*\n)+)", listed, re.MULTILINE)
    text = "".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    assert len(words) == 8
    for word, meaning in words:
        plain = " ".join(meaning.replace("``", "`").split())
        assert f"| **{word}** | {plain} |" in text, word
