"""Groups that are split off another: who is in them, what they share with it, what they leave.

Ranks are threads with a connection each, where no rank has to die.
"""

import itertools
import os
import signal
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from ranks import LOCAL, run_ranks, run_threads
from torch.distributed import HashStore, PrefixStore

from refdist import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
    torch_versions,
)
from refdist.barrier import plain, quick
from refdist.nccl import NcclCommunicator
from refdist.store.listening import listen

SECRET = "a secret of tests for all ranks"
GPUS = torch.cuda.device_count()
NATIVE = torch_versions.store_features()[torch_versions.STORE_BARRIER]
BOTH_KINDS = pytest.mark.parametrize(
    "native",
    [
        pytest.param(
            True,
            id="quick",
            marks=pytest.mark.skipif(not NATIVE, reason="this torch has no Store.barrier"),
        ),
        pytest.param(False, id="plain"),
    ],
)


@contextmanager
def kind(native):
    """Groups made in this context have the one or the other kind of barrier."""
    with nullcontext() if native else torch_versions.switched_off(torch_versions.STORE_BARRIER):
        yield


def on_threads(function, world_size, **options):
    """Call ``function(group)`` on each rank of a group. Returns what each returned."""

    def run(rank):
        given = listener if rank == 0 else None
        with StatelessProcessGroup.create(
            LOCAL, listener.getsockname()[1], rank, world_size, listen_socket=given, **options
        ) as group:
            return function(group)

    with listen(LOCAL, 0) as listener:
        return run_threads(run, world_size)


def keys_of(group):
    """What the store of a group holds: all of it, also what is below other prefixes."""
    store = group.store
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return set(store.list_keys())


# Each rank gets the part with its color, and a rank without one gets None. In a part, the ranks are
# in the order of their keys, and of their ranks in the whole where these are equal. All colors of 3
# ranks, and several orders.


def test_colors_and_keys():
    all_colors = itertools.product((0, 7, None), repeat=3)
    orders = [(None, None, None), (0, 0, 0), (3, 2, 1), (0, -1, 0), (10**12, 0, -(10**12))]

    def split(group):
        found = []
        for colors, order in cases:
            part = group.split(colors[group.rank], order[group.rank])
            if part is None:
                found.append(None)
                continue
            with part:
                found.append((part.rank, part.world_size, part.all_gather_obj(group.rank)))
        return found

    cases = list(itertools.product(all_colors, orders))
    results = on_threads(split, 3)
    for (colors, order), found in zip(cases, zip(*results, strict=True), strict=True):
        keys = range(3) if order[0] is None else order
        by_key = sorted(range(3), key=lambda rank: (keys[rank], rank))
        for rank, color in enumerate(colors):
            members = [other for other in by_key if colors[other] == color]
            expected = (members.index(rank), len(members), members)
            assert found[rank] == (None if color is None else expected), (colors, order)


# A part is split again, and several parts are open at once. Each is a group of its own: its
# messages, counters and barriers are not those of another one, whatever the others do meanwhile.


def test_nested_parts_at_once():
    def use(group):
        halves = group.split(group.rank % 2)
        alone = halves.split(halves.rank)
        again = group.split(0, key=-group.rank)
        nested = again.split(again.rank // 2).split(0)
        groups = {"whole": group, "halves": halves, "alone": alone, "again": again, "in": nested}
        for name, one in groups.items():
            one.events = []
            if one.world_size > 1:
                one.send_obj((name, group.rank), (one.rank + 1) % one.world_size)
        group.barrier()
        found = {}
        for name, one in reversed(groups.items()):
            if one.world_size > 1:
                found[name] = one.recv_obj((one.rank - 1) % one.world_size)
        nested.barrier()
        counts = {name: sum(one.send_dst_counter.values()) for name, one in groups.items()}
        events = {name: len(one.events) for name, one in groups.items()}
        for one in (halves, alone, again, nested):
            one.close()
        return found, counts, events

    results = on_threads(use, 4)
    before = [("whole", (3, 0, 1, 2)), ("halves", (2, 3, 0, 1)), ("again", (1, 2, 3, 0))]
    before.append(("in", (1, 0, 3, 2)))
    for rank, (found, counts, events) in enumerate(results):
        assert found == {name: (name, ranks[rank]) for name, ranks in before}
        assert counts == {"whole": 1, "halves": 1, "alone": 0, "again": 1, "in": 1}
        assert events["whole"] == events["in"] >= 2 and events["halves"] == events["again"] == 0


# A part has the kind of barrier of the whole, on any store. It has no socket, and host and port are
# those of the store.


@BOTH_KINDS
def test_the_kind_of_barrier(native):
    def split(group):
        with group.split(0) as part:
            assert type(part._barrier) is (quick.Barrier if native else plain.Barrier)
            part.barrier()
            assert part.generation == 1 and group.generation == 2
            assert (part.host, part.port) == (group.host, group.port)
            assert part.socket is None and part.successor is None

    with kind(native):
        on_threads(split, 2)


# Waits in a part have deadlines: without a message, in the receiver; without a rank, in the
# barrier, for all that are there, who get one and the same error. It names the rank in the part.
# Then the part goes on, and the whole had nothing to do with it.


def test_deadlines_in_a_part():
    def use(group):
        part = group.split(0, key=-group.rank)
        if part.rank == 0:
            return part.close() or group.barrier()
        with pytest.raises(MessageTimeoutError, match=r"from rank 0: 0\.\d+ of 0.1 s"):
            part.recv_obj(0, timeout=0.1)
        with pytest.raises(BarrierError, match="missing: rank 0 of 3") as raised:
            part.barrier(timeout=0.3)
        assert raised.value.missing == (0,)
        group.barrier()
        part.close()
        return str(raised.value)

    first, second, nothing = on_threads(use, 3)
    assert first == second and nothing is None


# With a secret, each part has seals of its own. A value that was copied from the whole, or from
# another part with the same ranks, to the same place in a part is refused.


@pytest.mark.parametrize("source", ["whole", "other part"])
def test_a_value_from_elsewhere(source):
    def use(group):
        part, other = group.split(0), group.split(0)
        elsewhere = group if source == "whole" else other
        if group.rank == 0:
            elsewhere.send_obj("for elsewhere", 1)
            value = elsewhere._barrier.store.peek("message/0/1/0")
            part._barrier.store.set("message/0/1/0", value)
            part.send_dst_counter[1] += 1
            part.send_obj("for here", 1)
        else:
            with pytest.raises(AuthenticationError, match=r"message/0/1/0: .* another group"):
                part.recv_obj(0)
            assert part.recv_obj(0) == "for here"
            assert elsewhere.recv_obj(0) == "for elsewhere"
        part.barrier()
        part.close()
        other.close()

    on_threads(use, 2, secret=SECRET)


# The whole, two parts and a part of the first may be closed in every order. Those that are still
# open work, and a rank has left with the last of them: then the store ends, and its port is free.


def test_closing_in_every_order():
    def use(rank, order, listener, port):
        with listener if rank == 0 else nullcontext():
            group = StatelessProcessGroup.create(
                LOCAL, port, rank, 2, listen_socket=listener if rank == 0 else None
            )
        first, second = group.split(0), group.split(rank)
        groups = [group, first, second, first.split(0, -rank)]
        for place in order:
            groups[place].close()
            with pytest.raises(ValueError, match="this group is closed"):
                groups[place].barrier()
            for one in groups:
                if not one._calls.closed:
                    one.barrier(timeout=2)

    for order in itertools.permutations(range(4)):
        listener = listen(LOCAL, 0)
        port = listener.getsockname()[1]
        run_threads(use, 2, order, listener, port)
        listen(LOCAL, port).close()  # nothing listens there


# Ranks that close them in unlike orders do not wait for one another, but for the last.


def test_closing_in_unlike_orders():
    def use(group):
        groups = [group, group.split(0), group.split(0)]
        groups.append(groups[1].split(0))
        for one in groups[group.rank :] + groups[: group.rank]:
            one.close()

    on_threads(use, 4)


# A message in a part of a part is there after the part around it was closed.


def test_a_part_outlives_the_part_around_it():
    def use(group):
        part = group.split(0)
        with part.split(0) as inner:
            if inner.rank == 0:
                inner.send_obj("still there", 1)
            part.close()
            group.barrier()
            if inner.rank == 1:
                assert inner.recv_obj(0, timeout=0.2) == "still there"

    on_threads(use, 2)


# What is in the store after a thousand splits and closes is exactly what was there before, also
# where barriers broke, messages were not read, or a part was split. With plain barriers, whose keys
# have numbers that grow, there are as many keys, but for one of the last barrier that is not always
# written.


@pytest.mark.skipif(not torch_versions.lists_keys(), reason="this torch does not list keys")
@BOTH_KINDS
def test_what_a_closed_part_leaves(native):
    def split(group, number):
        part = group.split(0)
        with part.split(number % 2) as nested:
            nested.all_gather_obj(number)
            if nested.rank == 0:
                nested.send_obj("not read", 1)
        part.broadcast_obj("not read either" if part.rank == 0 else None, 0)
        if number % 100 == 0 and part.rank:
            with pytest.raises(BarrierError):
                part.barrier(timeout=0)
        part.close()

    def watch(group):
        counts = []
        for count in (8, 1000 if native else 100):
            for number in range(count):
                split(group, number)
            group.barrier()
            paused.wait(20)
            counts.append(keys_of(group) if group.rank == 0 else None)
            paused.wait(20)
        return counts

    paused = threading.Barrier(2)
    with kind(native):
        (before, after), _ = on_threads(watch, 2)
    assert not [key for key in after if "part" in key]
    if native:
        assert before == after
    else:
        before, after = ([key for key in all_ if "all_left" not in key] for all_ in (before, after))
        assert len(before) == len(after)


# Nothing is left of the messages either, and a later part reads none of them.


def test_messages_of_a_closed_part():
    def use(group):
        for number in range(3):
            part = group.split(0)
            if part.rank == 0:
                with pytest.raises(MessageTimeoutError):
                    part.recv_obj(1, timeout=0)
                part.send_obj(number, 1)
                part.send_obj(number, 1)
            group.barrier()
            if part.rank == 1:
                assert part.recv_obj(0) == number
            part.close()

    on_threads(use, 2)


# A rank dies in a part. Those in the part learn it in their next barrier there, and those in
# another part do not notice. Then the whole shrinks, is split once more, and the parts from before
# go on.


def _dies_in_a_part(here):
    group = here.group()
    part = group.split(here.rank // 2)
    pair = group.split(0 if here.rank < 2 else None)
    if here.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if here.rank == 2:
        with pytest.raises(BarrierError) as raised:
            part.barrier(timeout=0.3)
        assert raised.value.missing == (1,)
        here.tell("missed")
    else:
        part.barrier()
    here.ask("missed")
    group = group.shrink(timeout=1.5)
    with group.split(0, -group.rank) as again:
        found = group.world_size, again.all_gather_obj(here.rank)
    if pair is not None:
        pair.barrier()
        assert pair.all_gather_obj(here.rank) == [0, 1]
        pair.close()
    part.close()  # also that of the dead rank
    group.close()
    return found


def test_a_rank_dies_in_a_part():
    *results, nothing = run_ranks(_dies_in_a_part, 4, killed=[3])
    assert results == [(3, [2, 1, 0])] * 3 and nothing is None


# All groups on a store have one connection to it. If the store does not answer one of them in time,
# they have lost it together: a late answer would be taken for that to the next request.


def _stopped_host(here):
    group = here.group()
    part = group.split(0)
    if here.rank == 0:
        here.tell("process", os.getpid())
        here.ask("done")
        return
    process = here.ask("process")
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(StoreConnectionError, match="did not answer"):
        part.barrier(timeout=0.1)
    os.kill(process, signal.SIGCONT)
    with pytest.raises(StoreConnectionError):
        group.barrier(timeout=0.1)
    here.tell("done")


def test_groups_lose_their_store_together():
    run_ranks(_stopped_host, 2)


# A wrong argument is an error of the rank that has it alone. It is not in the gather then, and the
# next split is as good as any.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("red",), "color='red': must be an integer"),
        ((1.0,), "color=1.0: must be an integer"),
        ((0, "first"), "key='first': must be an integer"),
        ((0, 0, -1), "timeout=-1: must be finite seconds, at least 0"),
        ((0, 0, float("nan")), "timeout=nan: must be finite seconds, at least 0"),
    ],
)
def test_wrong_arguments(arguments, text):
    def use(group):
        if group.rank == 0:
            with pytest.raises(ValueError, match=f"^{text}"):
                group.split(*arguments)
        with group.split(0) as part:
            return part.all_gather_obj(part.rank)

    assert on_threads(use, 2) == [[0, 1]] * 2


# A rank that does not come to a split is missed by the others, as in any gather.


def test_a_rank_does_not_come():
    def use(group):
        if group.rank == 1:
            with pytest.raises(MessageTimeoutError, match="missing: rank 0 of 2") as raised:
                group.split(0, timeout=0.1)
            assert raised.value.missing == (0,)
            missed.set()
        missed.wait(20)
        group.realign()
        with group.split(0) as part:
            return part.all_gather_obj(part.rank)

    missed = threading.Event()
    assert on_threads(use, 2) == [[0, 1]] * 2


# A group over a store that the user made is split as well: over a HashStore, and below a prefix.


@pytest.mark.parametrize("name", ["HashStore", "PrefixStore"])
def test_a_store_of_the_user(name):
    def use(rank):
        store = hashed
        if name == "PrefixStore":
            store = PrefixStore("below", create_tcp_store(LOCAL, server.port))
        with StatelessProcessGroup(rank, 2, store) as group:
            with group.split(0, -rank) as part:
                part.send_obj(rank, 1 - part.rank)
                found = part.all_gather_obj(rank), part.recv_obj(1 - part.rank)
            assert group.successor is None
            return found

    hashed, server = HashStore(), create_tcp_store(LOCAL, 0, is_master=True)
    assert run_threads(use, 2) == [([1, 0], 1), ([1, 0], 0)]


# vLLM's protocol has no such groups.


def test_on_vllms_wire():
    with (
        listen(LOCAL, 0) as listener,
        StatelessProcessGroup.create(
            LOCAL, listener.getsockname()[1], 0, 1, listen_socket=listener, wire="vllm"
        ) as group,
    ):
        calls = {"split": lambda: group.split(0), "shrink": group.shrink, "admit": group.admit}
        for name, call in calls.items():
            with pytest.raises(ValueError, match=f"^{name}: vLLM's protocol has no groups that"):
                call()


# A part carries a group of gloo: its rank 0 binds a socket, and tells the port in the part.


def _gloo_in_parts(here):
    group = here.group()
    with group.split(here.rank % 2) as part:
        with listen(LOCAL, 0) if part.rank == 0 else nullcontext() as listener:
            port = part.broadcast_obj(listener.getsockname()[1] if listener else None, 0)
            gloo = stateless_init_torch_distributed_process_group(
                LOCAL, port, part.rank, part.world_size, "gloo", listen_socket=listener
            )
        tensor = torch.tensor([1.0 + here.rank])
        torch.distributed.all_reduce(tensor, group=gloo)
        part.barrier()
        stateless_destroy_torch_distributed_process_group(gloo)
    group.close()
    return tensor.item()


def test_a_part_carries_gloo():
    assert run_ranks(_gloo_in_parts, 4) == [4.0, 6.0, 4.0, 6.0]


# And one of NCCL, by a broadcast of its id.


def _nccl_in_a_part(here):
    group = here.group()
    part = group.split(0, -here.rank)
    communicator = NcclCommunicator(part, here.rank)
    total = communicator.all_reduce(torch.full((4,), 1.0 + here.rank, device=communicator.device))
    communicator.wait()
    found = communicator.rank, total.tolist()
    communicator.destroy()
    part.close()
    group.close()
    return found


@pytest.mark.skipif(GPUS < 2, reason="needs 2 CUDA GPUs and nccl4py")
@pytest.mark.xdist_group("gpu")
def test_a_part_carries_nccl():
    pytest.importorskip("nccl.core")
    assert run_ranks(_nccl_in_a_part, 2, deadline=90) == [(1, [3.0] * 4), (0, [3.0] * 4)]


# A group that has shrunk is left by the last of the groups on its store, as any: rank 0 waits for
# the others then, and all that they said is still read.


def test_a_part_outlives_a_group_that_has_shrunk():
    def use(group):
        shrunk = group.shrink(timeout=20)
        part = shrunk.split(0)
        shrunk.close()
        found = part.all_gather_obj(part.rank)
        part.close()
        return found

    assert on_threads(use, 2) == [[0, 1]] * 2


# Two ranks shrink a part, and close it. The third comes to it later, and is told.


def test_a_rank_that_comes_when_the_part_is_closed():
    closed = threading.Barrier(3)

    def use(group):
        part = group.split(0)
        if group.rank < 2:
            with part.shrink(timeout=0.5) as rest:
                assert rest.all_gather_obj(rest.rank) == [0, 1]
            closed.wait(20)
            return
        closed.wait(20)
        with part, pytest.raises(GroupCreationError, match="rank 2 came late, and was left out"):
            part.shrink(timeout=0.5)

    on_threads(use, 3)
