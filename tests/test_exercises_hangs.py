"""The tools and the checks of notebook 07: they find what hangs, and refuse wrong answers."""

import signal

import pytest
from ipyparallel.error import RemoteError

from refdist.lab.exercises import UnsolvedError, hangs
from refdist.lab.figures import call_grid
from refdist.lab.stacks import StackReader
from refdist.lab.stuck import Console

pytestmark = pytest.mark.xdist_group("engines")

SETUP = """
from collections import Counter
from contextlib import contextmanager
from refdist import *
from refdist.errors import name_ranks
from refdist.lab.stuck import in_thread, torch_records
from refdist.torch_groups import collectives
"""


@pytest.fixture(scope="module")
def engines(engines):
    engines.view.execute(SETUP, block=True)
    return engines


def define(engines, source, *changes):
    """Define an answer on the engines, with changes, each of which is a pair of texts."""
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    engines.view.execute(source, block=True)


# The tools.


def test_stacks_show_the_lines_of_cells_also_of_threads_and_whether_an_engine_is_stopped(engines):
    StackReader(engines)
    stacks = StackReader(engines)  # it takes over from the other
    assert stacks.look(still=0.1) == "ranks 0, 1, 2 and 3:\n    is in no cell"
    engines.view.execute("import threading, time\nleave = threading.Event()", block=True)
    rest = "def rest():\n    time.sleep(600)\n\nrest()"
    engines.client[0].execute(rest, silent=False, block=False)
    engines.client[1].execute(
        "def stay():\n    leave.wait(60)\nthreading.Thread(target=stay).start()",
        silent=False,
        block=True,
    )
    engines.signal(2, signal.SIGSTOP)
    try:
        assert stacks.look() == (
            "rank 0:\n    cell line 4  rest()\n    rest line 2  time.sleep(600)\n"
            "rank 1:\n    stay line 2  leave.wait(60)\n"
            "rank 2:\n    its engine is stopped\n"
            "rank 3:\n    is in no cell"
        )
    finally:
        engines.signal(2, signal.SIGCONT)
        engines.signal(0, signal.SIGINT)
    engines.view.execute("leave.set()", block=True)
    assert stacks.look(still=0.1) == "ranks 0, 1, 2 and 3:\n    is in no cell"


def test_a_console_answers_only_while_the_main_thread_is_free(engines):
    stacks, console = StackReader(engines), Console(engines, rank=1)
    assert console.ask("print(rank)") == "1"
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        console.ask("1 / 0")
    engines.view.execute("import threading; leave = threading.Event()", block=True)
    busy = engines.client[1].execute("leave.wait(60)", block=False)
    while "cell line 1" not in stacks.look(still=0.1):
        pass
    with pytest.raises(TimeoutError):
        console.ask("late = 'the question was kept'", timeout=0.2)
    engines.signal(1, signal.SIGINT)
    with pytest.raises(RemoteError, match="KeyboardInterrupt"):
        busy.get(20)
    engines.client[1].execute("job = in_thread(leave.wait, 60)", block=True)
    assert console.ask("print(job.done(), late)") == "False the question was kept"
    engines.client[1].execute("leave.set()", block=True)
    assert console.ask("print(job.result(20))") == "True"
    console.close()


def test_a_job_in_a_thread_hands_out_its_result_or_its_error(engines):
    source = "jobs = in_thread(divmod, 7, 2), in_thread(divmod, 7, 0)"
    engines.view.execute(source, block=True)
    assert engines.gather("jobs[0].result(20)") == [(3, 1)] * 4
    assert "ZeroDivisionError" in engines.gather("repr(jobs[1].exception(20))")[0]


def test_a_grid_needs_calls():
    with pytest.raises(ValueError, match="no rank has made a call"):
        call_grid([[], []])
    call = {"group": "A", "number": 1, "operation": "x", "shape": (4,), "done": False}
    assert call_grid([[call], []]).axes


# 7.1

RECORDER = """
class Recorder:
    def __init__(self, limit=64):
        self.records, self.limit, self.counts = [], limit, Counter()

    @contextmanager
    def call(self, group, operation, shape):
        self.counts[group] += 1
        record = {"group": group, "number": self.counts[group], "operation": operation,
                  "shape": shape, "done": False}
        self.records.append(record)
        del self.records[: -self.limit]
        yield
        record["done"] = True
"""

RECORDER_OF_A_DEQUE = """
from collections import deque

class Recorder:
    def __init__(self, limit=64):
        self.records, self.counts = deque(maxlen=limit), {}

    def call(self, group, operation, shape):
        self.counts[group] = number = self.counts.get(group, 0) + 1
        self.records.append(dict(
            group=group, number=number, operation=operation, shape=shape, done=False))
        return Call(self.records[-1])

class Call:
    def __init__(self, record):
        self.record = record
    def __enter__(self):
        pass
    def __exit__(self, kind, error, traceback):
        self.record["done"] = kind is None
"""

RECORD = """        record = {"group": group, "number": self.counts[group], "operation": operation,
                  "shape": shape, "done": False}
        self.records.append(record)
"""


@pytest.mark.parametrize("answer", [RECORDER, RECORDER_OF_A_DEQUE])
def test_recorders_that_are_right(engines, answer):
    define(engines, answer)
    hangs.check_recorder(engines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("self.counts[group] += 1", "raise NotImplementedError")], "not written yet"),
        ([(RECORD, ""), ("        yield\n", "        yield\n" + RECORD)], "while the first call"),
        ([('        record["done"] = True', "")], "wanted: done is True"),
        (
            [("        yield\n", "        try:\n            yield\n        finally:\n    ")],
            "a call raised KeyError: done is True",
        ),
        (
            [
                (
                    "        yield\n",
                    "        try:\n            yield\n        except KeyError: return\n",
                )
            ],
            "done is 'swallowed'",
        ),
        ([('        record["done"]', '        self.records[-1]["done"]')], "still inside"),
        ([("        del self.records[: -self.limit]", "")], "wanted: .*the last four"),
        ([("self.counts[group],", "len(self.records) + 1,")], "the last four, with numbers"),
        ([("self.counts[group]", "self.counts['']")], "numbers that count on in each group"),
        (
            [("self.counts[group],", "1 + sum(r['group'] == group for r in self.records),")],
            "numbers that count on",
        ),
    ],
)
def test_recorders_that_are_wrong(engines, changes, message):
    define(engines, RECORDER, *changes)
    with pytest.raises(UnsolvedError, match=f"Exercise 7.1 .*{message}"):
        hangs.check_recorder(engines)


# 7.2


def along_the_waits(records, members):
    """Another right answer: from each rank that waits, go on to those that it waits for."""

    def awaited(rank):
        return {
            other
            for call in records[rank]
            if not call["done"]
            for other in members[call["group"]]
            if not any(
                theirs["group"] == call["group"] and theirs["number"] >= call["number"]
                for theirs in records[other]
            )
        }

    found = {other for rank in range(len(records)) for other in awaited(rank)}
    return [rank for rank in sorted(found) if not awaited(rank)]


def all_that_are_awaited(records, members):
    latest = [{call["group"]: call["number"] for call in calls} for calls in records]
    return sorted(
        {
            other
            for calls in records
            for call in calls
            if not call["done"]
            for other in members[call["group"]]
            if latest[other].get(call["group"], 0) < call["number"]
        }
    )


def those_with_the_fewest_calls(records, members):
    fewest = min(map(len, records))
    if all(call["done"] for calls in records for call in calls):
        return []
    return [rank for rank, calls in enumerate(records) if len(calls) == fewest]


def those_that_do_not_wait(records, members):
    waits = [any(not call["done"] for call in calls) for calls in records]
    return [rank for rank, waiting in enumerate(waits) if not waiting] if any(waits) else []


@pytest.mark.parametrize("answer", [hangs.at_fault_in, along_the_waits])
def test_right_ranks_at_fault(engines, answer, capsys):
    hangs.check_at_fault(answer, engines)
    assert "one that hung on the engines" in capsys.readouterr().out


def missing_function(records, members):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (missing_function, "not written yet"),
        (all_that_are_awaited, "wanted: "),
        (those_with_the_fewest_calls, "WAITS"),
        (those_that_do_not_wait, "wanted: "),
        (lambda records, members: [2], "you name"),
        (lambda records, members: [], "you name"),
    ],
)
def test_wrong_ranks_at_fault(engines, answer, message):
    with pytest.raises(UnsolvedError, match=f"(?s)Exercise 7.2 .*{message}"):
        hangs.check_at_fault(answer, engines)


# 7.3


def upward(ready, launched, count):
    bucket = len(launched)
    while bucket in ready:
        bucket += 1
    return list(range(len(launched), bucket))


def downward(ready, launched, count):
    """Another right answer: the last layers become ready first."""
    now = []
    while (bucket := count - 1 - len(launched) - len(now)) in ready:
        now.append(bucket)
    return now


@pytest.mark.parametrize("answer", [upward, downward])
def test_right_orders(engines, answer):
    hangs.check_launch(answer, engines)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ready, launched, count: missing_function(ready, launched), "not written yet"),
        (lambda ready, launched, count: sorted(ready - set(launched)), "wait for each other"),
        (
            lambda ready, launched, count: sorted(ready) if len(ready) == count else [],
            "all up to the first that is not ready",
        ),
        (lambda ready, launched, count: upward(ready, launched, count)[:1], "each of them, once"),
        (lambda ready, launched, count: sorted(ready), "each once"),
        (lambda ready, launched, count: [len(launched)], "buckets that are ready"),
        (lambda ready, launched, count: [], "each of them, once"),
    ],
)
def test_wrong_orders(engines, answer, message):
    with pytest.raises(UnsolvedError, match=f"Exercise 7.3 .*{message}"):
        hangs.check_launch(answer, engines)


# 7.4

ALL_REDUCE = """
def checked_all_reduce(tensor, group, gloo):
    kinds = group.all_gather_obj((tuple(tensor.shape), str(tensor.dtype)))
    usual = Counter(kinds).most_common(1)[0][0]
    odd = [rank for rank, kind in enumerate(kinds) if kind != usual]
    if odd:
        raise ValueError(f"{name_ranks(odd)}: {kinds}")
    collectives.all_reduce(tensor, gloo)
"""

# over gloo alone, whose objects may have any length
OVER_GLOO = """
def checked_all_reduce(tensor, group, gloo):
    kinds = collectives.all_gather_object((list(tensor.shape), tensor.dtype), gloo)
    usual = max(kinds, key=kinds.count)
    odd = [rank for rank in range(len(kinds)) if kinds[rank] != usual]
    if odd:
        raise ValueError("not alike: " + name_ranks(odd))
    collectives.all_reduce(tensor, gloo)
"""


@pytest.mark.parametrize("answer", [ALL_REDUCE, OVER_GLOO])
def test_right_all_reduces(engines, answer):
    define(engines, answer)
    hangs.check_checked_all_reduce(engines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("    kinds =", "    raise NotImplementedError\n    kinds =")], "not written yet"),
        ([("if odd:", "if False:")], "a ValueError whose text names rank 2"),
        ([("if odd:", "if group.rank in odd:")], "on rank 0, .*wanted on every rank"),
        ([("tuple(tensor.shape)", "tensor.numel()")], "names rank 1"),
        ([(", str(tensor.dtype)", ",")], "names rank 3"),
        ([("usual = Counter(kinds).most_common(1)[0][0]", "usual = kinds[0]")], "names rank 0"),
        ([("name_ranks(odd)", "name_ranks(odd[:1])")], "names ranks 1 and 3"),
        ([("ValueError(", "RuntimeError(")], "a ValueError whose text names rank 2"),
        ([(": {kinds}", " and not rank 0")], "and no other rank"),
        ([("    collectives", "    group.barrier()\n    collectives")], "made 2 gathers"),
        ([("    if odd:", "    group.broadcast_obj(0, 1)\n    if odd:")], "sent 1 messages"),
        ([("    collectives.all_reduce(tensor, gloo)", "")], "wanted: the sum, 10.0"),
        ([("    kinds =", "    tensor += 1\n    kinds =")], "but its tensor is|wanted: the sum"),
    ],
)
def test_wrong_all_reduces(engines, changes, message):
    define(engines, ALL_REDUCE, *changes)
    with pytest.raises(UnsolvedError, match=f"Exercise 7.4 .*({message})"):
        hangs.check_checked_all_reduce(engines)


# 7.5

WATCHDOG = """
def who_is_missing(group, timeout):
    try:
        group.barrier(timeout)
    except BarrierError as error:
        return sorted(error.missing)
    except StoreConnectionError:
        return [0]
    return []
"""

WITH_A_GATHER = """
def who_is_missing(group, timeout):
    try:
        group.all_gather_obj(None, timeout)
    except (MessageTimeoutError, StoreConnectionError) as error:
        return list(getattr(error, "missing", [0]))
    return []
"""


@pytest.mark.parametrize("answer", [WATCHDOG, WITH_A_GATHER])
def test_right_watchdogs(engines, answer):
    define(engines, answer)
    hangs.check_who_is_missing(engines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("    try:", "    raise NotImplementedError\n    try:")], "not written yet"),
        ([("sorted(error.missing)", "[error.broken_by]")], "wanted: "),
        ([("sorted(error.missing)", "error.missing")], r"got \(3,\)"),
        ([("sorted(error.missing)", "sorted(error.missing)[:1]")], r"wanted: \[0, 2\]"),
        ([("sorted(error.missing)", "[r for r in error.missing if r != group.rank]")], "too late"),
        ([("sorted(error.missing)", "[3]")], r"wanted: \[0, 2\]"),
        ([("return [0]", "return []")], "rank 0, which hosts the store"),
        ([("StoreConnectionError", "KeyError")], "raised StoreConnectionError"),
        ([("barrier(timeout)", "barrier(timeout + 4.2)")], "waited for"),
    ],
)
def test_wrong_watchdogs(engines, changes, message):
    define(engines, WATCHDOG, *changes)
    with pytest.raises(UnsolvedError, match=f"Exercise 7.5 .*{message}"):
        hangs.check_who_is_missing(engines)
