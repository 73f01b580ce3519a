"""The checks of notebook 04 accept right answers, and say what is wrong with others."""

import json
import time
from contextlib import suppress
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError

from refdist import BarrierError
from refdist.barrier import plain
from refdist.lab.exercises import UnsolvedError, messages

pytestmark = pytest.mark.xdist_group("engines")

SETUP = """
import pickle, socket
from collections import Counter
from datetime import timedelta
from time import sleep
from torch.distributed import DistStoreError
from refdist import BarrierError, GroupCreationError, StatelessProcessGroup, StoreConnectionError
group = StatelessProcessGroup.create(host, port, rank, world_size, listen_socket=listen_socket)
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


# 4.1

MAILBOX = """
class Mailbox:
    def __init__(self, store, rank):
        self.store, self.rank = store, rank
        self.sent, self.received = Counter(), Counter()

    def send(self, obj, destination):
        key = f"mail/{self.rank}/{destination}/{self.sent[destination]}"
        self.store.set(key, pickle.dumps(obj))
        self.sent[destination] += 1

    def receive(self, source, timeout=5.0):
        key = f"mail/{source}/{self.rank}/{self.received[source]}"
        try:
            self.store.wait([key], timedelta(seconds=timeout))
        except DistStoreError:
            raise TimeoutError(f"nothing from rank {source}") from None
        value = self.store.get(key)
        self.store.delete_key(key)
        self.received[source] += 1
        return pickle.loads(value)
"""

# get waits by itself, so two requests are enough
MAILBOX_OF_GET = """
class Mailbox:
    def __init__(self, store, rank):
        self.store, self.rank, self.counts = store, rank, {}

    def send(self, obj, destination):
        pair = self.rank, destination
        self.store.set(f"{pair}{self.counts.get(pair, 0)}", pickle.dumps(obj))
        self.counts[pair] = self.counts.get(pair, 0) + 1

    def receive(self, source, timeout=5.0):
        pair = source, self.rank
        key = f"{pair}{self.counts.get(pair, 0)}"
        self.store.set_timeout(timedelta(seconds=timeout))
        try:
            value = self.store.get(key)
        except DistStoreError:
            raise TimeoutError(f"waited in vain for rank {source}")
        self.store.delete_key(key)
        self.counts[pair] = self.counts.get(pair, 0) + 1
        return pickle.loads(value)
"""

POLLING = """
        import time
        end = time.monotonic() + timeout
        while not self.store.check([key]):
            time.sleep(0.02)
            if time.monotonic() > end:
                raise TimeoutError(f"nothing from rank {source}")
"""

WAITING = MAILBOX[MAILBOX.index("        try:") : MAILBOX.index("        value =")]
COUNTING = "        self.received[source] += 1\n"


@pytest.mark.parametrize("source", [MAILBOX, MAILBOX_OF_GET], ids=["wait", "get"])
def test_a_right_mailbox_passes(engines, capsys, source):
    define(engines, source)
    messages.check_mailbox(engines)
    assert "4.1 a mailbox that loses nothing: solved. 120 messages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("self.store.set(key", "raise NotImplementedError; self.store.set(key")], "not written"),
        # the key has no source, as vLLM's
        (
            [("mail/{self.rank}/{destination}", "{destination}"), ("mail/{source}/", "")],
            "Which ranks does the key name|nothing from rank",
        ),
        ([("self.sent[destination] += 1", "pass")], "received|nothing from rank"),
        ([("self.store.delete_key(key)", "pass")], "keys were left"),
        ([(WAITING, POLLING)], "calls of its store; wanted: at most 3|Let the store wait"),
        ([("raise TimeoutError(f", "raise RuntimeError(f")], "wanted: a TimeoutError"),
        ([("nothing from rank {source}", "nothing came")], "whose text names rank 1"),
        # counts a message that has not come
        (
            [(COUNTING, ""), ("        try:", COUNTING + "        try:")],
            "after a timeout|nothing from rank",
        ),
        (
            [
                ("mail/{self.rank}/{destination}/", "{self.rank}{destination}"),
                ("mail/{source}/{self.rank}/", "{source}{self.rank}"),
            ],
            "put something between .*(on rank (23|3), your code raised|23 and 3 received)",
        ),
        # counts a message that could not be sent
        (
            [
                (
                    "        self.store.set(key",
                    "        self.sent[destination] += 1\n        self.store.set(key",
                ),
                ("(obj))\n        self.sent[destination] += 1", "(obj))"),
            ],
            "rank 1 sends a lock, .* wanted: 'after it'. Count a message only when it is sent",
        ),
        (
            [("self.store.set(key", "self.store.check([key]); self.store.set(key")],
            "send made 2 to 2 calls",
        ),
        # the package's own messages
        (
            [("self.store.set(key, pickle.dumps(obj))", "group.send_obj(obj, destination)")],
            "each rank sends 5 objects .* on rank 0, .* without the methods of `group`",
        ),
        # waits as long as the store does
        ([("self.store.wait([key], timedelta(seconds=timeout))", "self.store.get(key)")], "rank 1"),
        (
            [("            raise TimeoutError", "            sleep(60)\n            raise")],
            "with a timeout of 0.3 s, .* on rank 0, your code did not end within 2 s",
        ),
        ([("class Mailbox", "del Mailbox\nclass Postbox")], "Run the cells above"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_mailbox_is_refused(engines, monkeypatch, changes, told):
    monkeypatch.setattr(messages, "_SECONDS", 1.0)
    monkeypatch.setattr(messages, "_CALL_SECONDS", 2.0)
    define(engines, MAILBOX)
    define(engines, MAILBOX, *changes)
    engines.view.execute("keys = group.store.num_keys()", block=True)
    before = engines.gather("keys")
    with pytest.raises(UnsolvedError, match=told):
        messages.check_mailbox(engines)
    engines.view.execute("keys = group.store.num_keys()", block=True)
    assert engines.gather("keys") == before


# 4.2

BY_RANK_0 = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0):
    if rank != 0:
        mailbox.send(obj, 0)
        return mailbox.receive(0, timeout)
    objects = [obj, *(mailbox.receive(other, timeout) for other in range(1, world_size))]
    for other in range(1, world_size):
        mailbox.send(objects, other)
    return objects
"""

# a list goes from rank to rank, and once more when it is full
IN_A_CHAIN = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0):
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    objects = mailbox.receive(before, timeout) if rank else []
    objects = [*objects, obj]
    if world_size == 1:
        return objects
    mailbox.send(objects, after)
    if rank != world_size - 1:
        objects = mailbox.receive(before, timeout)
        if rank != world_size - 2:
            mailbox.send(objects, after)
    return objects
"""

# the package's own gather, by its name and by another one
BY_GROUP = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0):
    return group.all_gather_obj(obj)
"""
UNLESS_ALONE = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0, other=group):
    return other.all_gather_obj(obj) if world_size > 1 else [obj]
"""
PAST_THE_METHODS = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0):
    return StatelessProcessGroup.all_gather_obj(group, obj)
"""

EACH_TO_EACH = """
def all_gather(mailbox, obj, rank, world_size, timeout=5.0):
    others = [other for other in range(world_size) if other != rank]
    for other in others:
        mailbox.send(obj, other)
    came = {other: mailbox.receive(other, timeout) for other in others}
    return [obj if other == rank else came[other] for other in range(world_size)]
"""


@pytest.mark.parametrize("source", [BY_RANK_0, IN_A_CHAIN], ids=["rank 0", "chain"])
def test_a_right_gather_passes(engines, capsys, source):
    define(engines, source)
    messages.check_all_gather(engines)
    assert "4 ranks took 6 messages, in place of 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            BY_RANK_0.replace("    if rank != 0", "    raise NotImplementedError\n    if 1"),
            "not wri",
        ),
        (EACH_TO_EACH, "3 ranks sent 6 messages; wanted: at most 4"),
        (BY_RANK_0.replace("return mailbox.receive(0, timeout)", "return None"), "on rank 1"),
        (BY_RANK_0.replace("[obj, *(", "[*(").replace("))]", ")), obj]"), "on rank 0"),
        (BY_RANK_0.replace("world_size)", "4)"), "your code raised"),
        (
            BY_RANK_0.replace(", timeout)", ")"),
            "rank 3 does not come, and timeout is 0.3 s: .* wanted: the error of receive",
        ),
        (BY_RANK_0.replace("    return objects", "    return objects[1:]"), "on rank 0"),
        # without messages
        (
            "def all_gather(mailbox, obj, rank, world_size, timeout):\n"
            "    return [{'rank': r, 'number': obj['number']} for r in range(world_size)]",
            "2 ranks sent 0 messages",
        ),
    ],
)
def test_a_wrong_gather_is_refused(engines, source, told):
    define(engines, source)
    with pytest.raises(UnsolvedError, match=told):
        messages.check_all_gather(engines)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (BY_GROUP, "1 rank: on rank 0, your code raised RuntimeError: .* methods of `group`"),
        (UNLESS_ALONE, "2 ranks: on rank 0, your code raised RuntimeError: .* methods of `group`"),
        (PAST_THE_METHODS, "1 rank: on rank 0, your code did not end within 2 s"),
    ],
)
def test_a_gather_of_the_group_is_refused_at_once_and_a_right_one_passes_then(
    engines, monkeypatch, capsys, source, told
):
    monkeypatch.setattr(messages, "_CALL_SECONDS", 2.0)
    define(engines, source)
    start = time.monotonic()
    with pytest.raises(UnsolvedError, match=told):
        messages.check_all_gather(engines)
    assert time.monotonic() - start < 10
    engines.view.execute("met = group.all_gather_obj(rank), group.generation", block=True)
    met = engines.gather("met")
    assert met == [([0, 1, 2, 3], met[0][1])] * 4
    define(engines, BY_RANK_0)
    messages.check_all_gather(engines)
    assert "4 ranks took 6 messages" in capsys.readouterr().out


def test_the_check_of_a_gather_brings_ranks_into_step(engines):
    engines.view.execute(
        "if rank == 1:\n"
        "    try: group.all_gather_obj(rank, timeout=0.1)\n"
        "    except Exception: pass",
        block=True,
    )
    define(engines, BY_RANK_0)
    messages.check_all_gather(engines)
    engines.view.execute("met = group.all_gather_obj(rank)", block=True)
    assert engines.gather("met") == [[0, 1, 2, 3]] * 4


# 4.3

SECOND = timedelta(seconds=1)


def those_here(store, rank, world_size, seconds=1.0):
    names = [f"here/{other}" for other in range(world_size)]
    store.set(names[rank], "")
    with suppress(DistStoreError):
        store.wait(names, timedelta(seconds=seconds))
    return [other for other in range(world_size) if store.check([names[other]])]


def first_holds(store, rank, world_size, seconds=1.0):
    here = json.dumps(those_here(store, rank, world_size, seconds))
    return json.loads(store.compare_set("list", "", here))


def in_two_requests(store, rank, world_size, seconds=1.0):
    store.compare_set("list", "", json.dumps(those_here(store, rank, world_size, seconds)))
    return json.loads(store.get("list"))


# a barrier that breaks names those that did not come
def by_barrier(store, rank, world_size, seconds=1.0):
    try:
        plain.Barrier(store, rank, world_size).wait(seconds)
    except BarrierError as error:
        if not error.completed:
            return [other for other in range(world_size) if other not in error.missing]
    return list(range(world_size))


@pytest.mark.parametrize("survivors", [first_holds, in_two_requests, by_barrier])
def test_a_right_agreement_passes(capsys, survivors):
    messages.check_survivors(survivors)
    assert "no two ranks had different lists" in capsys.readouterr().out


def stub(store, rank, world_size):
    raise NotImplementedError


def last_holds(store, rank, world_size):
    store.set("list", json.dumps(those_here(store, rank, world_size)))
    return json.loads(store.get("list"))


def look_then_write(store, rank, world_size):
    here = those_here(store, rank, world_size)
    if not store.check(["list"]):
        store.set("list", json.dumps(here))
    return json.loads(store.get("list"))


def a_ticket(store, rank, world_size):
    here = those_here(store, rank, world_size)
    if store.add("ticket", 1) == 1:
        store.set("list", json.dumps(here))
    return json.loads(store.get("list"))


# each tells the others what it has heard, and goes on with those of whom all have heard
def those_heard_by_all(store, rank, world_size):
    here = those_here(store, rank, world_size)
    store.set(f"heard/{rank}", json.dumps(here))
    told = [store.get(f"heard/{other}") for other in here if store.check([f"heard/{other}"])]
    return sorted(set(here).intersection(*map(json.loads, told)))


def nobody_waits(store, rank, world_size):
    store.set(f"here/{rank}", "")
    here = [other for other in range(world_size) if store.check([f"here/{other}"])]
    return json.loads(store.compare_set("list", "", json.dumps(here)))


# a rank that gives up takes itself for the only one
def alone_if_late(store, rank, world_size):
    store.set(f"here/{rank}", "")
    here = list(range(world_size))
    try:
        store.wait([f"here/{other}" for other in here], SECOND)
    except DistStoreError:
        here = [rank]
    return json.loads(store.compare_set("list", "", json.dumps(here)))


def a_millisecond(store, rank, world_size, seconds=1.0):
    return first_holds(store, rank, world_size, 0.001)


def always_a_second(store, rank, world_size, seconds=1.0):
    return first_holds(store, rank, world_size)


def everyone(store, rank, world_size):
    those_here(store, rank, world_size)
    return list(range(world_size))


def for_ever(store, rank, world_size):
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)])
    return list(range(world_size))


# waits for each of the others anew after each has come
def three_seconds(store, rank, world_size):
    for _ in range(3):
        here = those_here(store, rank, world_size)
    return json.loads(store.compare_set("list", "", json.dumps(here)))


def the_text(store, rank, world_size):
    return store.compare_set("list", "", json.dumps(those_here(store, rank, world_size)))


def backwards(store, rank, world_size):
    return first_holds(store, rank, world_size)[::-1]


def raises_if_left_out(store, rank, world_size):
    held = first_holds(store, rank, world_size)
    if rank not in held:
        raise RuntimeError("left out")
    return held


def polls(store, rank, world_size):
    while store.add("arrived", 0) < 100:
        pass
    return list(range(world_size))


@pytest.mark.parametrize(
    ("survivors", "told"),
    [
        (stub, "not written yet"),
        (those_here, "All ranks that return have the same list"),
        (last_holds, "All ranks that return have the same list"),
        (look_then_write, "All ranks that return have the same list"),
        (a_ticket, "no rank waits, without a timeout"),
        (those_heard_by_all, "All ranks that return have the same list|without a timeout"),
        (nobody_waits, "Each rank that is not on the list has died"),
        (alone_if_late, "Each rank that is not on the list has died"),
        (a_millisecond, "with 2 ranks and 0.25 seconds, .*\n(.*\n)*.* had ``seconds`` to come"),
        (always_a_second, "and 0.25 seconds, .*\n(.*\n)*Not so: No call waits longer than 0.5 s"),
        (everyone, "Each rank on the list has come"),
        (for_ever, "no rank waits, without a timeout"),
        (three_seconds, "No call waits longer than 2 s"),
        (the_text, "returned b'.*wanted: a list of ranks"),
        (backwards, "wanted: each rank once, in order"),
        (raises_if_left_out, "No call raises an error"),
        (polls, "asks the store again and again"),
    ],
)
def test_a_wrong_agreement_is_refused(survivors, told):
    with pytest.raises(UnsolvedError, match=told):
        messages.check_survivors(survivors)


# 4.4

GO_ON = """
def go_on(group, timeout):
    try:
        return group.admit(timeout)
    except GroupCreationError:
        return group
    except (BarrierError, StoreConnectionError):
        return group.shrink(timeout)
"""

STAYING = """\
        try:
            return group.shrink(timeout)
        except GroupCreationError:
            return group"""

# a barrier first, and newcomers only where it is whole
BARRIER_FIRST = """
def go_on(group, timeout):
    try:
        group.barrier(timeout)
    except (BarrierError, StoreConnectionError):
        return group.shrink(timeout)
    try:
        return group.admit(timeout)
    except GroupCreationError:
        return group
"""


@pytest.mark.parametrize("source", [GO_ON, BARRIER_FIRST], ids=["admit", "barrier"])
def test_a_right_job_goes_on(engines, capsys, source):
    define(engines, source)
    messages.check_go_on(engines)
    told = "Groups of the engines [0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3] again and [1, 2, 3]"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("    try:", "    raise NotImplementedError\n    try:")], "not written"),
        ([("return group.admit(timeout)", "group.admit(timeout)")], "returned None, and not a g"),
        # after a death, or that of rank 0, nobody goes on
        ([("(BarrierError, ", "(")], "rank 3 does not call go_on: .* raised BarrierError"),
        ([(", StoreConnectionError)", ",)")], "rank 0 .* ends, .* raised StoreConnectionError"),
        # goes on in the group in which a rank is missing
        (
            [("        return group.shrink(timeout)", "        return group")],
            "rank 3 does not call go_on: on rank 0, your code returned a group that does not work",
        ),
        # a newcomer that dies ends the job
        (
            [("    except GroupCreationError:\n        return group\n", "")],
            "a process has asked, and does not come, .* raised GroupCreationError",
        ),
        # a rank that was left out goes on by itself
        (
            [("        return group.shrink(timeout)", STAYING)],
            "without it: your code .*; wanted: the GroupCreationError of shrink",
        ),
        ([("group.admit(timeout)", "group.shrink(timeout)")], "nobody asks: .* another group"),
        # nobody is let in
        (
            [("return group.admit(timeout)", "group.barrier(timeout)\n        return group")],
            "asks to be let in",
        ),
        ([("def go_on", "del go_on\ndef on")], "Run the cells above"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_job_is_refused(engines, monkeypatch, changes, told):
    monkeypatch.setattr(messages, "_GO_ON_SECONDS", 0.5)
    monkeypatch.setattr(messages, "_CALL_SECONDS", 4.0)
    define(engines, GO_ON)
    define(engines, GO_ON, *changes)
    with pytest.raises(UnsolvedError, match=told):
        messages.check_go_on(engines)
