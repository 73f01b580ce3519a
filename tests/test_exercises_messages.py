"""The checks of notebook 04 accept right answers, and say what is wrong with others."""

import json
import time

import pytest

from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import UnsolvedError, messages

pytestmark = pytest.mark.xdist_group("messages")

SETUP = """
import pickle, socket
from collections import Counter
from datetime import timedelta
from torch.distributed import DistStoreError
from refdist import StatelessProcessGroup
group = StatelessProcessGroup.create(host, port, rank, world_size, listen_socket=listen_socket)
"""


@pytest.fixture(scope="module")
def engines():
    with LocalEngines(4) as four:
        four.view.execute(SETUP, block=True)
        yield four


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
            "put something between",
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
            [("            raise TimeoutError", "            while True: pass\n            raise")],
            "with a timeout of 0.3 s, .* on rank 0, your code did not end within 2 s",
        ),
        ([("class Mailbox", "del Mailbox\nclass Postbox")], "Run the cell above"),
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


def first_holds(store, name, mine):
    return json.loads(store.compare_set(name, "", json.dumps(mine)))


def first_holds_in_two_requests(store, name, mine):
    store.compare_set(name, "", repr(mine))
    return json.loads(store.get(name))


@pytest.mark.parametrize("agree", [first_holds, first_holds_in_two_requests])
def test_a_right_agreement_passes(capsys, agree):
    messages.check_agree(agree)
    assert "no rank returned another list" in capsys.readouterr().out


def stub(store, name, mine):
    raise NotImplementedError


def mine_holds(store, name, mine):
    store.check([name])
    return mine


def last_holds(store, name, mine):
    store.set(name, json.dumps(mine))
    return json.loads(store.get(name))


def look_then_write(store, name, mine):
    if not store.check([name]):
        store.set(name, json.dumps(mine))
    return json.loads(store.get(name))


def a_ticket(store, name, mine):
    if store.add(f"ticket {name}", 1) == 1:
        store.set(name, json.dumps(mine))
        return mine
    return json.loads(store.get(name))


def one_name(store, name, mine):
    return first_holds(store, "agreed", mine)


def all_ranks(store, name, mine):
    first_holds(store, name, mine)
    return [0, 2] if len(mine) == 2 else list(range(max(mine) + 1))


def an_empty_list(store, name, mine):
    return mine if name == "alone" else store.check([name]) and []


def the_text(store, name, mine):
    return store.compare_set(name, "", json.dumps(mine))


def three_requests(store, name, mine):
    store.check([name])
    store.check([name])
    return first_holds(store, name, mine)


@pytest.mark.parametrize(
    ("agree", "told"),
    [
        (stub, "not written yet"),
        (mine_holds, "return the same list"),
        (last_holds, "return the same list"),
        (look_then_write, "return the same list"),
        (a_ticket, "no rank waits, without a timeout"),
        (one_name, "that a rank has proposed under this name"),
        (all_ranks, "that a rank has proposed under this name"),
        (an_empty_list, "raises an error|a rank has proposed"),
        (the_text, "a rank alone proposed"),
        (three_requests, "1 or 2 requests"),
    ],
)
def test_a_wrong_agreement_is_refused(agree, told):
    with pytest.raises(UnsolvedError, match=told):
        messages.check_agree(agree)


# 4.4

REGROUP = """
def regroup(agreed, addresses, rank, spare, seconds=10):
    if rank not in agreed:
        return None
    host, port = addresses[min(agreed)]
    return StatelessProcessGroup.create(
        host, port, agreed.index(rank), len(agreed),
        store_timeout=seconds, listen_socket=spare if rank == min(agreed) else None,
    )
"""


def test_a_right_group_passes_also_without_a_rank_that_died(engines, capsys):
    define(engines, REGROUP)
    messages.check_regroup(engines)
    assert "Groups of [1, 2, 3], [0, 3], [0, 1, 2, 3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            [("    if rank not in", "    raise NotImplementedError\n    if rank not in")],
            "not written",
        ),
        ([("addresses[min(agreed)]", "addresses[0]")], "your code raised|has .* wanted"),
        # binds the address of its own socket once more
        (
            [("spare if rank == min(agreed) else None", "None")],
            r"agreed on \[1, 2, 3\].*rank 1 must listen on its own socket.* on rank 1, .* in use",
        ),
        ([("agreed.index(rank)", "rank")], "your code raised"),
        ([("len(agreed)", "len(addresses)")], "your code raised"),
        ([("return None", "raise SystemError('not on the list')")], "your code raised SystemError"),
        ([("return None", "return 'nothing'")], "wanted: None|your code raised"),
        ([("agreed.index(rank)", "agreed[::-1].index(rank)")], "has .* wanted|your code raised"),
        # a port that no other rank knows
        (
            [("spare if rank == min(agreed) else None", "None"), ("host, port,", "host, 0,")],
            "on rank 2, your code raised ValueError: port=0",
        ),
    ],
)
def test_a_wrong_group_is_refused(engines, monkeypatch, changes, told):
    monkeypatch.setattr(messages, "_CREATE_SECONDS", 0.4)
    define(engines, REGROUP, *changes)
    with pytest.raises(UnsolvedError, match=told):
        messages.check_regroup(engines)


def test_an_agreement_that_asks_again_and_again_is_refused_soon():
    def polls(store, name, mine):
        while store.add(name, 1) < 100:
            pass
        return mine

    with pytest.raises(UnsolvedError, match="asks the store again and again"):
        messages.check_agree(polls)
