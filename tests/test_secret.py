"""Groups with a secret: what is refused, and what everyone is told. Groups without: the warning."""

import gc
import hmac
import os
import pickle
import re
import socket
import struct
import threading
import time
import warnings

import pytest
import torch
from ranks import LOCAL, Watched, entry, run_ranks, run_threads, with_secret
from torch.distributed import HashStore, PrefixStore

from refdist import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    InsecureGroupWarning,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
    StatelessProcessGroup,
    create_tcp_store,
    torch_versions,
)
from refdist.barrier import plain, quick
from refdist.barrier.roll import ENTRY
from refdist.deadline import Deadline
from refdist.joining.rendezvous import join
from refdist.objects import encoding
from refdist.store import keys
from refdist.store.client import StoreClient
from refdist.store.keys import PlainKeys, Slot
from refdist.store.seals import TAG_BYTES, VARIABLE, Seals, is_sealed, secret_from

SECRET = "correct horse battery staple"
SLACK = 6.0
COUNTERS = pytest.mark.skipif(
    not torch_versions.store_features()[torch_versions.STORE_BARRIER],
    reason="this torch has no Store.barrier",
)
LARGE = bytes(3 * encoding.CHUNK_BYTES)


def groups_on(store, world_size=2, secret=SECRET, **options):
    """A group with a secret for each rank, all in this process."""
    groups = [
        StatelessProcessGroup(rank, world_size, store, **options) for rank in range(world_size)
    ]
    return [with_secret(group, secret) for group in groups]


traces = []


class Trace:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return leave_trace, ()


def leave_trace():
    traces.append("unpickled")


FORGED = b"\x01" + pickle.dumps(Trace())


@pytest.fixture(autouse=True)
def no_trace():
    traces.clear()
    yield
    assert not traces


# Without a secret the same value does: so the tests below would see it.
def test_without_a_secret_a_forged_value_is_unpickled():
    store = HashStore()
    one = StatelessProcessGroup(1, 2, store)
    store.set(keys.message(0, 1, 0).own, FORGED)
    assert one.recv_obj(0) is None
    assert traces == ["unpickled"]
    traces.clear()


def refused(key, why):
    """What a call must raise: the key and the reason."""
    return pytest.raises(AuthenticationError, match=f"^{re.escape(key)}: .*{why}")


# Seals. Whatever is not exactly what was sealed, for this key and by this secret, is refused.


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000])
def test_what_is_sealed_can_be_unsealed(size):
    payload = bytes(range(256)) * 4
    seals, same = Seals(b"secret", "group", b"a"), Seals(b"secret", "group", b"a")
    sealed = seals.seal("key", payload[:size])
    assert is_sealed(sealed) and len(sealed) == 1 + TAG_BYTES + size
    assert same.unseal("key", sealed) == payload[:size]


def test_a_tag_is_hmac_sha256():
    def framed(*parts):
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)

    own_key = hmac.digest(b"secret", framed(b"group", b"one", b"two"), "sha256")
    expected = hmac.digest(own_key, framed("k\u00e9y".encode()) + b"payload", "sha256")
    seals = Seals(b"secret", "group", b"one", b"two")
    assert seals.seal("k\u00e9y", b"payload") == b"\x06" + expected + b"payload"


def test_every_flipped_bit_is_refused():
    seals = Seals(b"secret", "group")
    sealed = seals.seal("key", b"payload")
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with refused("key", "without a tag" if bit < 8 else "tag is wrong"):
            seals.unseal("key", bytes(flipped))


def test_every_other_length_is_refused():
    seals = Seals(b"secret", "group")
    sealed = seals.seal("key", b"payload")
    for length in range(len(sealed)):
        why = "without a tag" if length == 0 else "cut off"
        with refused("key", why):
            seals.unseal("key", sealed[:length])
    with refused("key", "tag is wrong"):
        seals.unseal("key", sealed + b"\0")


@pytest.mark.parametrize(
    "others",
    [
        Seals(b"other", "group", b"a", b"b"),
        Seals(b"secret", "creation", b"a", b"b"),
        Seals(b"secret", "group", b"a"),
        Seals(b"secret", "group", b"b", b"a"),
        Seals(b"secret", "group", b"ab", b""),
        Seals(b"secret", "group", b"ab"),
    ],
)
def test_seals_of_something_else_are_refused(others):
    seals = Seals(b"secret", "group", b"a", b"b")
    with refused("key", "another key or another group"):
        seals.unseal("key", others.seal("key", b"payload"))


# A key and a payload that look the same in a row are not the same.
def test_keys_and_payloads_do_not_mix():
    seals = Seals(b"secret", "group")
    assert seals.tag("a", b"bc") != seals.tag("ab", b"c")
    with refused("message/0/1/1", "copied from another key"):
        seals.unseal("message/0/1/1", seals.seal("message/0/1/", b"1payload"))


@pytest.mark.parametrize(
    ("given", "in_environment", "expected"),
    [
        (None, None, None),
        (None, "text" * 4, b"text" * 4),
        ("given" * 4, "text" * 4, b"given" * 4),
        (b"\0\xff" * 8, None, b"\0\xff" * 8),
        ("\u00e9" * 8, None, b"\xc3\xa9" * 8),
    ],
)
def test_where_a_secret_is_from(monkeypatch, given, in_environment, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    if in_environment is not None:
        monkeypatch.setenv(VARIABLE, in_environment)
    assert secret_from(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "secret='': must not be empty"),
        (b"", "secret=b'': must not be empty"),
        (12345, "secret: must be bytes or str, not int"),
        (None, f"{VARIABLE}='': must not be empty"),
    ],
)
def test_bad_secrets(monkeypatch, given, message):
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        StatelessProcessGroup.create(LOCAL, 0, 0, 1, secret=given)
    assert "12345" not in str(caught.value)


# A group with a secret does all that one without does, and nobody shows the secret.


def _use_everything(here, in_environment):
    if in_environment:
        os.environ[VARIABLE] = SECRET
    elif here.rank % 2:
        options = {"secret": SECRET}
    else:
        options = {"secret": SECRET.encode()}
    with here.group(**({} if in_environment else options)) as group:
        seen = []
        for size in (1, encoding.CHUNK_BYTES, 5 * encoding.CHUNK_BYTES + 1):
            own = here.rank, bytes(size)
            seen.append(
                group.all_gather_obj(own) == [(r, bytes(size)) for r in range(here.world_size)]
            )
            for source in range(here.world_size):
                seen.append(group.broadcast_obj(own, source) == (source, bytes(size)))
            for other in range(here.world_size):
                if other != here.rank:
                    group.send_obj(own, other)
            for other in range(here.world_size):
                if other != here.rank:
                    seen.append(group.recv_obj(other) == (other, bytes(size)))
            group.barrier()
        total = group.all_reduce(torch.ones(3))
        seen.append(total.tolist() == [here.world_size] * 3)
        left = here.count_keys(group)
        return all(seen), left, repr(group), SECRET in repr(vars(group))


@pytest.mark.parametrize("in_environment", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_everything_with_a_secret(world_size, in_environment):
    for rank, (right, left, text, shown) in enumerate(
        run_ranks(_use_everything, world_size, in_environment)
    ):
        assert right
        assert left <= 17 + world_size
        assert text == f"StatelessProcessGroup(rank={rank}, world_size={world_size})".replace(
            ")", ", data_expiration_seconds=3600)"
        )
        assert not shown


# All values carry a tag, but counts, and marks that say no more than that they are there.

BARE = re.compile(r"(barrier/\d+/(\d+/)?(counter|state|wake|left|all_left)|broadcast/.*/readers)$")


def test_every_value_carries_a_tag():
    written = {}

    def before(request, key=None, value=b"", *rest):
        if request in ("set", "append"):
            written.setdefault(key, []).append((request, value))
        elif request == "multi_set":
            written.update({k: [("set", v)] for k, v in zip(key, value, strict=True) if v})

    zero, one = groups_on(Watched(HashStore(), before), data_expiration_seconds=100)
    for obj in ("small", LARGE):
        zero.send_obj(obj, 1)
        zero.broadcast_obj(obj, 0)
        assert one.recv_obj(0) == one.broadcast_obj(None, 0) == obj
        zero.send_obj(obj, 1)
        zero.entries[-1] = zero.entries[-1][0], -1e6
        zero.entries.rotate(1)
        zero.expire_data()
        with pytest.raises(MessageExpiredError):
            one.recv_obj(0)
    with pytest.raises(MessageTimeoutError):
        zero.all_gather_obj(LARGE, timeout=0.1)
    kinds = set()
    for key, values in written.items():
        if not BARE.match(key):
            kinds.add(re.sub(r"\d+", "0", key))
            for request, value in values:
                assert is_sealed(value) or request == "append", key
                assert SECRET.encode() not in value
    assert kinds == {
        "message/0/0/0",
        "message/0/0/0/chunk/0",
        "message/0/0/expired",
        "broadcast/0/0",
        "broadcast/0/0/chunk/0",
        "gather/0/0/chunk/0",
        "barrier/0/roll",
        "barrier/0/outcome",
    }


# A forged value in each place: refused by name and never unpickled, and the next call works.


def test_a_forged_message():
    store = HashStore()
    zero, one = groups_on(store)
    for turn, forge in enumerate((lambda v: FORGED, lambda v: v[:40], lambda v: v[:-1] + b"!")):
        zero.send_obj("real", 1)
        zero.broadcast_obj("real", 0)
        why = ("without a tag", "tag is wrong", "tag is wrong")[turn]
        message, broadcast = keys.message(0, 1, turn).own, keys.broadcast(0, turn).own
        for key in (message, broadcast):
            store.set(key, forge(store.get(key)))
        with refused(message, why):
            one.recv_obj(0, timeout=2)
        with refused(broadcast, why):
            one.broadcast_obj(None, 0, timeout=2)
    zero.send_obj("next", 1)
    zero.broadcast_obj("next", 0)
    assert one.recv_obj(0) == one.broadcast_obj(None, 0) == "next"
    assert store.num_keys() == 4  # the broadcasts, until the next barrier


def test_a_forged_chunk():
    store = HashStore()
    zero, one = groups_on(store)
    zero.send_obj(LARGE, 1)
    zero.broadcast_obj(LARGE, 0)
    for whole, receive in (
        (keys.message(0, 1, 0), lambda: one.recv_obj(0, timeout=2)),
        (keys.broadcast(0, 0), lambda: one.broadcast_obj(None, 0, timeout=2)),
    ):
        # the first in place of the second: the order is under the tag too
        store.set(whole.chunk(1), store.get(whole.chunk(0)))
        with refused(whole.chunk(1), "copied from another key"):
            receive()
    zero.send_obj("next", 1)
    assert one.recv_obj(0) == "next"
    assert store.num_keys() == 2  # of the broadcast, until the next barrier


# The lengths of a large object, forged: no memory is set aside for it, and no chunk waited for.
def test_forged_lengths():
    store = HashStore()
    _, one = groups_on(store)
    store.set(keys.message(0, 1, 0).own, b"\x02" + struct.pack("<Q", encoding.MAX_BYTES))
    start = time.monotonic()
    with refused(keys.message(0, 1, 0).own, "without a tag"):
        one.recv_obj(0, timeout=20)
    assert time.monotonic() - start < SLACK


# A note that a message expired, forged, for the rank that is in the middle of it: not believed.
def test_a_forged_note():
    store = HashStore()
    zero, one = groups_on(store)
    zero.send_obj(LARGE, 1)
    key = keys.message(0, 1, 0)
    third = store.get(key.chunk(2))
    store.delete_key(key.chunk(2))
    store.set(key.expired, b"0")
    with pytest.raises(MessageTimeoutError, match="waited in vain for the rest"):
        one.recv_obj(0, timeout=0.1)
    store.set(key.chunk(2), third)
    assert one.recv_obj(0, timeout=2) == LARGE


# A stranger puts a value on the roll of a gather, before or after the others: everyone refuses it,
# and passes the next one. A barrier does not look there.


@pytest.mark.parametrize("garbage", [entry(0, 1, FORGED), b"garbage", b"\0" * 28, b"\xff" * 100])
@pytest.mark.parametrize("size", [1, len(LARGE)])
def test_a_forged_roll(garbage, size):
    store = HashStore()
    groups = groups_on(store, 3)
    store.append(PlainKeys.of(0).roll, garbage)

    def meet(rank):
        with pytest.raises(MessageTimeoutError, match="missing: ranks 0, 1 and 2"):
            groups[rank].all_gather_obj(bytes(size), timeout=10)
        return groups[rank].all_gather_obj((rank, bytes(size)), timeout=10)

    assert run_threads(meet, 3) == [[(rank, bytes(size)) for rank in range(3)]] * 3


# After the others, the garbage does not hide them: a barrier passes, a gather is refused.
def test_a_forged_end_of_the_roll():
    store = HashStore()

    def before(request, key=None, *_):
        if request == "compare_set" and key.endswith("/outcome"):
            store.append(key.replace("outcome", "roll"), b"garbage")

    groups = groups_on(Watched(store, before), 2)

    def meet(rank):
        groups[rank].barrier(10)
        with refused(PlainKeys.of(1).roll, "no right tag"):
            groups[rank].all_gather_obj(rank, timeout=10)

    run_threads(meet, 2)


# A stranger changes counts, states and keys that are waited for, before any of the requests of a
# rank that is alone in a barrier or gather: it never passes, and fails in time.

ALONE = {
    plain: [
        lambda store, its: store.add(its.counter, 1),
        lambda store, its: store.set(its.counter, "2"),
        lambda store, its: store.set(its.outcome, "complete"),
        lambda store, its: store.set(its.all_left, ""),
        lambda store, its: store.append(its.roll, entry(0, 0)),
    ],
    quick: [
        lambda store, its: store.add(its.counter, 1),
        lambda store, its: store.set(its.counter, str(quick.OPEN)),
        lambda store, its: store.add(its.state, 1),
        lambda store, its: store.set(its.state, "1"),
        lambda store, its: store.set(its.wake, str(quick.OPEN)),
        lambda store, its: store.set(its.left, str(quick.OPEN)),
        lambda store, its: store.append(its.roll, entry(0, 0)),
    ],
}


def _alone(server, name, module, change, step, seconds, gathers):
    """The error of rank 1, which is alone, and of how many requests it was made."""
    count = [0]
    stranger = create_tcp_store(LOCAL, server.port)
    if module is plain:
        stranger = PrefixStore(name, stranger)

    def before(*_):
        count[0] += 1
        if count[0] == step:
            change(stranger, barrier.keys)

    store = create_tcp_store(LOCAL, server.port)
    if module is plain:
        store = PrefixStore(name, store)
    barrier = module.Barrier(Watched(store, before), 1, 2, Seals(b"secret", name))
    if module is quick:
        # keys that no other barrier of these tests uses
        barrier.slots = [Slot.of(name, number) for number in range(quick.SLOTS)]
        barrier.keys = barrier.slots[0]
    start = time.monotonic()
    with pytest.raises((BarrierError, MessageError)) as caught:
        barrier.gather(b"x", seconds) if gathers else barrier.wait(seconds)
    assert time.monotonic() - start < seconds + SLACK
    return caught.value, count[0]


@pytest.mark.parametrize("gathers", [False, True], ids=["barrier", "gather"])
@pytest.mark.parametrize("module", [plain, pytest.param(quick, marks=COUNTERS)])
def test_a_stranger_at_every_step(module, gathers):
    server = create_tcp_store(LOCAL, 0, is_master=True)
    for number, change in enumerate(ALONE[module]):
        step, requests = 1, 1
        while step <= requests:
            name = f"{number}-{step}"
            error, requests = _alone(server, name, module, change, step, 0.02, gathers)
            assert 0 in getattr(error, "missing", (0,)) or "trusted" in str(error), error
            step += 1
        assert step > 4


# The same to a rank that sleeps, which it does after a second.
@COUNTERS
def test_a_stranger_wakes_a_sleeper():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    cases = [(change, step) for change in ALONE[quick] for step in (3, 4, 5, 6)]

    def run(case):
        change, step = cases[case]
        _alone(server, f"asleep-{case}", quick, change, step, 1.2, case % 2)

    run_threads(run, len(cases))


# The reason for a broken barrier, forged or altered: who reads it learns that it is not to be
# trusted, and whom it names is not believed.


def test_a_forged_reason():
    store = HashStore()
    zero, one = groups_on(store)
    with pytest.raises(BarrierError, match="missing: rank 1"):
        zero.barrier(0.1)
    outcome = PlainKeys.of(0).outcome
    store.set(outcome, store.get(outcome)[1 + TAG_BYTES :])
    with pytest.raises(BarrierError, match=r"cannot be trusted: barrier/0/outcome: .*thout") as e:
        one.barrier(5)
    assert e.value.missing == ()


# Who is missing is read from the tags on the roll: a stranger cannot sign for a rank.
def test_a_forged_signature_does_not_hide_a_missing_rank():
    store = HashStore()
    zero, _ = groups_on(store)
    roll = PlainKeys.of(0).roll
    store.append(roll, entry(0, 1, b"", Seals(b"guess", "group"), roll))
    with pytest.raises(BarrierError) as caught:
        zero.barrier(0.1)
    assert 1 in caught.value.missing


# Replays. What was written under another key, in an earlier round or an earlier group is refused.


def test_a_message_under_another_key():
    store = HashStore()
    groups = groups_on(store, 3)
    for destination in (1, 2):
        groups[0].send_obj(f"for rank {destination}", destination)
    store.set(keys.message(0, 1, 0).own, store.get(keys.message(0, 2, 0).own))
    with refused(keys.message(0, 1, 0).own, "copied from another key"):
        groups[1].recv_obj(0, timeout=2)
    assert groups[2].recv_obj(0) == "for rank 2"


# An entry of gather 0 is played again in gather 3, in the same slot: same key, same ranks, another
# round. It hides the real ones that follow, so nobody passes.
@COUNTERS
def test_a_roll_of_an_earlier_round():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    groups = [
        with_secret(StatelessProcessGroup(rank, 2, create_tcp_store(LOCAL, server.port)), SECRET)
        for rank in range(2)
    ]
    roll = Slot.of(0, 0).roll
    kept = []
    turnstile = threading.Barrier(2, timeout=20)

    def meet(rank):
        for number in range(3):
            groups[rank].all_gather_obj("early", timeout=10)
            if number == 0 and rank == 0:
                size = ENTRY.size + len(encoding.encode("early").value) + TAG_BYTES
                kept.append(server.get(roll)[:size])
        turnstile.wait()
        if rank == 0:
            server.append(roll, kept[0])
            server.get(roll)  # append does not wait
        turnstile.wait()
        with pytest.raises(MessageTimeoutError, match="missing: ranks 0 and 1"):
            groups[rank].all_gather_obj("late", timeout=10)
        return groups[rank].all_gather_obj(rank, timeout=10)

    assert run_threads(meet, 2) == [[0, 1]] * 2


# Two groups of the same ranks, with the same secret and on the same port, one after the other.


def _keep_values(here):
    with here.place("group") as (port, listener):
        kept = None
        for _ in range(2):
            group = StatelessProcessGroup.create(
                LOCAL, port, here.rank, 2, listen_socket=listener, secret=SECRET
            )
            with group:
                if here.rank == 0:
                    group.send_obj("from this group", 1)
                    group.broadcast_obj("from this group", 0)
                    group.barrier()
                    continue
                group.barrier()
                both = keys.message(0, 1, 0).own, keys.broadcast(0, 0).own
                if kept is None:
                    kept = [group.store.get(key) for key in both]
                    continue
                for key, value in zip(both, kept, strict=True):
                    group.store.set(key, value)
                with refused(both[0], "another group"):
                    group.recv_obj(0, timeout=5)
                with refused(both[1], "another group"):
                    group.broadcast_obj(None, 0, timeout=5)


def test_values_of_an_earlier_group():
    run_ranks(_keep_values, 2)


# A stranger serves a store that plays an earlier creation again to rank 1: what rank 0 wrote then,
# and perhaps what rank 1 wrote itself. At most, a group forms that accepts nothing.


@pytest.mark.parametrize("own_signature", [True, False])
def test_an_earlier_creation(own_signature):
    def meet(store, rank):
        return join(StoreClient(store), rank, 2, Deadline(10), "there", SECRET.encode())[0]

    first = HashStore()
    its = PlainKeys.of(0)
    kept = {}

    def keep(request, key=None, *rest):
        if request == "add" and key == its.counter:
            kept.setdefault("roll", first.get(its.roll))

    barriers = run_threads(lambda rank: meet(Watched(first, keep), rank), 2)
    old = barriers[0].seals
    size = ENTRY.size + 32 + len("null") + TAG_BYTES
    roll = first.get(its.roll)
    entries = [roll[i * size : (i + 1) * size] for i in (0, 1)]
    by_rank = {ENTRY.unpack_from(some)[2]: some for some in entries}
    outcome = first.get(its.outcome)
    again = HashStore()

    def before(request, key=None, *rest):
        if request == "add" and key == its.counter:
            again.add(key, 1)
            if own_signature:
                again.set(its.roll, by_rank[0] + by_rank[1])
                again.set(its.outcome, outcome)

    again.set(keys.member(0), first.get(keys.member(0)))
    again.append(its.roll, by_rank[0])
    store = Watched(again, before)
    if own_signature:
        with pytest.raises(GroupCreationError, match="what it wrote for another group"):
            meet(store, 1)
        return
    barrier = meet(store, 1)
    with refused("message/0/1/0", "another group"):
        barrier.seals.unseal("message/0/1/0", old.seal("message/0/1/0", b"old"))


# A rank whose secret is another one, or that has none. It raises at once; the others miss it when
# their time is up, and are told why. Rank 0 has the group's secret, right or wrong.


def _come_with(here, secrets):
    here.meet("start")
    start = time.monotonic()
    with here.place("group") as (port, listener), pytest.raises(GroupCreationError) as caught:
        StatelessProcessGroup.create(
            LOCAL,
            port,
            here.rank,
            len(secrets),
            store_timeout=3,
            listen_socket=listener,
            secret=secrets[here.rank],
        )
    return str(caught.value), caught.value.missing, time.monotonic() - start


@pytest.mark.parametrize(
    ("secrets", "stranger", "message"),
    [
        (["a", "a", "b"], [2], "rank 2 has another secret than rank 0 on .*member/0: .*wrong"),
        (["a", "a", None], [2], "rank 2 has no secret, but rank 0 on .* has one"),
        ([None, None, "a"], [2], "rank 2 has a secret, but rank 0 on .* has none"),
        (["a", "b", "b"], [1, 2], r"rank \d has another secret than rank 0"),
        ([None, "b"], [1], "rank 1 has a secret, but rank 0 on .* has none"),
    ],
)
def test_another_secret(secrets, stranger, message):
    results = run_ranks(_come_with, len(secrets), secrets)
    names = "rank 1" if stranger == [1] else "rank 2" if stranger == [2] else "ranks 1 and 2"
    for rank, (text, missing, seconds) in enumerate(results):
        assert seconds < 3 + SLACK
        if rank in stranger:
            assert re.match(message, text), text
            assert f"on {LOCAL}:" in text and VARIABLE in text
        else:
            assert missing == tuple(stranger)
            assert f"missing: {names}" in text
            assert f"{names} came with another secret than rank 0, or one of them with none" in text


# Rank 1 comes with a wrong secret, and again with the right one while rank 0 still waits.


def _come_again(here):
    with here.place("group") as (port, listener):
        if here.rank == 1:
            with pytest.raises(GroupCreationError, match="rank 1 has another secret"):
                StatelessProcessGroup.create(LOCAL, port, 1, 2, secret="b" * 16)
        with StatelessProcessGroup.create(
            LOCAL, port, here.rank, 2, listen_socket=listener, secret="a" * 16
        ) as group:
            return group.all_gather_obj(here.rank)


def test_a_second_try_with_the_right_secret():
    assert run_ranks(_come_again, 2) == [[0, 1]] * 2


# Someone without the secret has taken a rank: who comes as it is told so.
def test_a_rank_taken_by_a_stranger():
    store = HashStore()
    store.set(keys.member(0), "{}")
    with pytest.raises(GroupCreationError, match=r"rank 0 is taken on there by someone with anot"):
        join(StoreClient(store), 0, 1, Deadline(2), "there", b"secret")


# A gather at creation that a stranger has written to: nobody is in a group.
def test_garbage_at_creation():
    store = HashStore()
    store.append(PlainKeys.of(0).roll, b"garbage")

    def meet(rank):
        with pytest.raises(GroupCreationError, match=r"0 of 2 ranks came .* its wait ended before"):
            join(StoreClient(store), rank, 2, Deadline(5), "there", b"secret")

    run_threads(meet, 2)


# Warnings: one, on rank 0, unless nobody else can reach the store or there is a secret.


@pytest.mark.parametrize(
    ("host", "secret", "expected"),
    [
        ("127.0.0.1", None, 0),
        ("127.3.2.1", None, 0),
        ("::1", None, 0),
        ("localhost", None, 0),
        ("0.0.0.0", None, 1),
        ("::", None, 1),
        ("0.0.0.0", SECRET, 0),
    ],
)
def test_warning(monkeypatch, host, secret, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    gc.collect()  # what other tests left behind warns now
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StatelessProcessGroup.create(host, 0, 0, 1, secret=secret).close()
    ours = [w for w in caught if w.category is InsecureGroupWarning]
    assert len(ours) == len(caught) == expected
    for warning in ours:
        assert f"listens on {host} without a secret" in str(warning.message)
        assert VARIABLE in str(warning.message) and "run code on every rank" in str(warning.message)
        assert warning.filename == __file__


def _own_address():
    """An address of this machine that others can reach; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


def _warn(here, host):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with here.place("group", host=host) as (port, listener):
            StatelessProcessGroup.create(host, port, here.rank, 2, listen_socket=listener).close()
    return [str(warning.message) for warning in caught]


def test_rank_0_alone_warns():
    address = _own_address()
    texts = run_ranks(_warn, 2, address)
    assert [len(some) for some in texts] == [1, 0]
    assert f"listens on {address} without a secret" in texts[0][0]


def test_a_warning_that_is_an_error_frees_the_port():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InsecureGroupWarning):
            StatelessProcessGroup.create("0.0.0.0", 0, 0, 1)


# The marks stay readable: what a stranger does to them is seen, but a secret cannot forbid it.
def test_a_stranger_can_delete():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    zero, one = groups_on(store)
    zero.send_obj("never read", 1)
    assert create_tcp_store(LOCAL, store.port).delete_key(keys.message(0, 1, 0).own)
    with pytest.raises(MessageTimeoutError, match="waited in vain for this from rank 0"):
        one.recv_obj(0, timeout=0.5)
    assert not store.check([keys.message(0, 1, 0).own])


# A creation that fails: no variable of refdist's in the traceback shows the secret.
@pytest.mark.parametrize("form", ["create", "from_env"])
def test_a_traceback_does_not_show_the_secret(form):
    secret = "a secret that nobody shall read"
    place = {"port": 0, "rank": 0, "world_size": 2, "store_timeout": 0.2, "secret": secret}
    with pytest.raises(GroupCreationError) as caught:
        getattr(StatelessProcessGroup, form)(host=LOCAL, **place)
    frames = [entry.frame for entry in caught.traceback]
    shown = [repr(frame.f_locals) for frame in frames if "refdist/" in str(frame.code.path)]
    assert len(shown) > 3
    assert not any(secret in text for text in shown)
