"""Groups in vLLM's protocol, in which some ranks run vLLM's own class."""

import os
import pickle
import re
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, RankFailedError, interrupt, run_ranks, run_threads, until, until_signed
from torch.distributed import PrefixStore, TCPStore
from vllm_module import NEWEST, each_version, import_vllm, needs_vllm

from refdist import (
    BarrierError,
    GroupCreationError,
    InsecureGroupWarning,
    MessageError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.objects.unique_id import NcclUniqueId
from refdist.torch_groups import collectives
from refdist.vllm_wire.messages import encode

OURS, THEIRS = "ours", "theirs"
SECONDS = 20
# who rank 0, rank 1, and so on are
LAYOUTS = [
    (OURS, THEIRS),
    (THEIRS, OURS),
    (THEIRS, THEIRS, OURS),
    (OURS, THEIRS, THEIRS, OURS),
    (OURS, OURS, OURS),
]


@contextmanager
def place(here, name="group"):
    """A port that rank 0 has bound, but does not listen on: vLLM 0.9.0 takes no socket."""
    if here.rank != 0:
        yield here.ask(f"bound/{name}")
        return
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOCAL, 0))
        here.tell(f"bound/{name}", bound.getsockname()[1])
        yield bound.getsockname()[1]


def group_of(here, layout, version, name="group", **options):
    """The group of all ranks, on this rank of the kind that the layout says."""
    with place(here, name) as port:
        arguments = LOCAL, port, here.rank, len(layout)
        options = {"store_timeout": SECONDS, **options}
        if layout[here.rank] == THEIRS:
            timeout = {"store_timeout": options["store_timeout"]}
            return import_vllm(version).StatelessProcessGroup.create(*arguments, **timeout)
        return StatelessProcessGroup.create(*arguments, wire="vllm", **options)


def keys_of(store):
    """What a store holds, with the names of barriers taken out."""
    return sorted(re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", key) for key in store.list_keys())


# Every method, on every rank, in every layout. All ranks get what a group of vLLM's alone gets, the
# counters are the same, and so are the keys that are left.


def _every_method(here, layout, version, deleting=()):
    group, rank, size = group_of(here, layout, version), here.rank, here.world_size
    seen = []
    for number in range(3):  # around a ring: one sender for each receiver
        group.send_obj({"from": rank, "number": number}, (rank + 1) % size)
        seen.append(group.recv_obj((rank - 1) % size))
    for source in range(size):
        given = [source, "broadcast"] if rank == source else None
        seen.append(group.broadcast_obj(given, source))
    group.barrier(timeout=SECONDS)
    seen.append(group.all_gather_obj((rank, b"x" * rank)))
    if version != "0.9.0":  # which has no tensors
        mine = torch.arange(6.0).reshape(2, 3) * (rank + 1)
        seen.append(group.all_reduce(mine).tolist())
        seen.append(group.all_reduce(mine, dist.ReduceOp.MAX).tolist())
        group.send(mine.to(torch.bfloat16), (rank + 1) % size)
        empty = torch.empty(2, 3, dtype=torch.bfloat16)
        seen.append(group.recv(empty, (rank - 1) % size).tolist())
        for source in range(size):
            tensor = torch.full((5,), source) if rank == source else torch.zeros(5).long()
            seen.append(group.broadcast(tensor, source).tolist())
        # objects after tensors: they are counted together
        group.send_obj("last", (rank + 1) % size)
        seen.append(group.recv_obj((rank - 1) % size))
    group.barrier(timeout=SECONDS)
    group.barrier()
    counters = [
        [group.send_dst_counter[r] for r in range(size)],
        [group.recv_src_counter[r] for r in range(size)],
        group.broadcast_send_counter,
        [group.broadcast_recv_src_counter[r] for r in range(size)],
    ]
    here.meet("done")
    keys = keys_of(group.store) if rank == 0 and hasattr(group.store, "list_keys") else []
    # a rank of refdist deletes the messages that it has read
    read = tuple(f"{kind}/{r}/" for kind in ("send_to", "send_tensor") for r in deleting)
    keys = [key for key in keys if not key.startswith(read)]
    here.meet("looked")
    return seen, counters, keys, [key for key, _ in group.entries]


# every version as rank 0, and as another rank; the newest one in every layout
CASES = [
    pytest.param(version.values[0], layout, marks=version.marks)
    for version in each_version()
    for layout in (LAYOUTS if version.values[0] == NEWEST else [(OURS, THEIRS), (THEIRS, OURS)])
]


@pytest.mark.parametrize(("version", "layout"), CASES)
def test_every_method_in_every_layout(version, layout):
    ours = [rank for rank, kind in enumerate(layout) if kind == OURS]
    alone = run_ranks(_every_method, len(layout), (THEIRS,) * len(layout), version, ours)
    mixed = run_ranks(_every_method, len(layout), layout, version)
    assert repr(mixed) == repr(alone)  # tensors of floats print all their digits here


def _large_objects(here, layout):
    group = group_of(here, layout, NEWEST, messages="pickle" if here.rank else None)
    torch.manual_seed(here.rank)
    mine = {"tensor": torch.randn(5, 2**20), "bytes": os.urandom(100)}  # 20 MiB
    gathered = group.all_gather_obj(mine)
    here.meet("done")
    return [float(one["tensor"].sum()) for one in gathered]


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(OURS, THEIRS), (THEIRS, OURS)])
def test_large_objects(layout):
    first, second = run_ranks(_large_objects, 2, layout)
    assert first == second and len(set(first)) == 2


def _alone(here):
    with place(here) as port:
        group = StatelessProcessGroup.create(LOCAL, port, 0, 1, wire="vllm")
    group.barrier()
    assert group.all_gather_obj("me") == ["me"]
    assert group.broadcast_obj("me", 0) == "me"
    assert torch.equal(group.all_reduce(torch.ones(2)), torch.ones(2))
    group.close()


def test_a_group_of_one():
    run_ranks(_alone, 1)


# Whoever meets the other protocol without having asked for it says so within seconds.


def _meet_the_other(here, wires, version):
    began = time.monotonic()
    try:
        with place(here) as port:
            if wires[here.rank] == THEIRS:
                group = import_vllm(version).StatelessProcessGroup.create(LOCAL, port, here.rank, 2)
                here.meet("over")
                return type(group).__module__
            StatelessProcessGroup.create(
                LOCAL, port, here.rank, 2, wire=wires[here.rank], store_timeout=4
            )
    except (GroupCreationError, StoreConnectionError, RuntimeError, OSError) as error:
        if THEIRS in wires:
            here.meet("over")
        assert time.monotonic() - began < 15
        return str(error)


@pytest.mark.parametrize("version", each_version())
def test_our_rank_0_meets_a_rank_of_vllm(version):
    ours, _ = run_ranks(_meet_the_other, 2, (None, THEIRS), version)
    says = r"a peer at 127.0.0.1:\d+ speaks vLLM's protocol: pass wire=\"vllm\", on all ranks of "
    assert re.match(says + "refdist", ours)


def _meet_rank_0_of_vllm(here, version):
    with place(here) as port:
        if here.rank == 0:
            # it waits for a rank that never comes, as ours does not count for it
            with pytest.raises(Exception, match=r"1/2|clients joined|descriptor"):
                import_vllm(version).StatelessProcessGroup.create(
                    LOCAL, port, 0, 2, store_timeout=6
                )
            return
        with pytest.raises(GroupCreationError, match=r"speaks vLLM's protocol: pass wire=\"vllm\""):
            StatelessProcessGroup.create(LOCAL, port, 1, 2)


@pytest.mark.parametrize("version", each_version())
def test_our_rank_meets_rank_0_of_vllm(version):
    run_ranks(_meet_rank_0_of_vllm, 2, version)


def test_our_two_protocols_meet():
    first, second = run_ranks(_meet_the_other, 2, ("vllm", None), NEWEST, deadline=60)
    assert "1 of 2 ranks came" in first
    assert 'speaks vLLM\'s protocol: pass wire="vllm"' in second
    first, second = run_ranks(_meet_the_other, 2, (None, "vllm"), NEWEST)
    assert 'speaks vLLM\'s protocol: pass wire="vllm"' in first


def _finds_our_own(here):
    with here.place("own") as (port, listener):
        if here.rank == 0:
            with pytest.raises(GroupCreationError, match="speaks vLLM's protocol"):
                StatelessProcessGroup.create(LOCAL, port, 0, 2, listen_socket=listener)
            return
        until_registered = TCPStore(LOCAL, port, is_master=False)
        until_registered.wait(["member/0"], timedelta(seconds=SECONDS))
        with pytest.raises(GroupCreationError, match=r"speaks refdist's own protocol: leave out"):
            StatelessProcessGroup.create(LOCAL, port, 1, 2, wire="vllm")


def test_a_rank_for_vllm_finds_our_own_rank_0():
    run_ranks(_finds_our_own, 2)


def _three_meet(here):
    with place(here) as port:
        if here.rank == 1:
            import_vllm(NEWEST).StatelessProcessGroup.create(LOCAL, port, 1, 3)
            here.meet("over")
            return "created"
        with pytest.raises(GroupCreationError, match="speaks vLLM's protocol: pass") as caught:
            StatelessProcessGroup.create(LOCAL, port, here.rank, 3)
        here.meet("over")
        return caught.value.missing


@needs_vllm(NEWEST)
def test_every_rank_of_refdist_learns_why():
    assert run_ranks(_three_meet, 3) == [(), "created", (1,)]


def _slow_to_leave(here):
    """Rank 2 is stopped as it leaves creation, while rank 1 sends: it is no other protocol."""
    with here.place("slow") as (port, listener):
        if here.rank == 2:
            here.tell("pid", os.getpid())
        if here.rank == 1:
            os.kill(pid := here.ask("pid"), 0)
            until_signed(TCPStore(LOCAL, port, is_master=False), [0, 2])
            os.kill(pid, signal.SIGSTOP)
        group = StatelessProcessGroup.create(LOCAL, port, here.rank, 3, listen_socket=listener)
        if here.rank == 1:
            group.send_obj("hello", 0)
            time.sleep(1.5)  # rank 0 waits for rank 2 to leave, for more than a slice
            os.kill(pid, signal.SIGCONT)
        assert here.rank or group.recv_obj(1) == "hello"
        group.close()


def test_a_slow_rank_is_no_other_protocol():
    run_ranks(_slow_to_leave, 3)


# Creation: rank 0 knows how many came, and its port is free again when it gives up.


def _rank_0_waits(here):
    with place(here) as port:
        with pytest.raises(
            GroupCreationError, match=r"1 of 3 ranks came to 127.0.0.1:\d+ within 1"
        ):
            StatelessProcessGroup.create(LOCAL, port, 0, 3, store_timeout=1, wire="vllm")
        group = StatelessProcessGroup.create(LOCAL, port, 0, 1, store_timeout=1, wire="vllm")
        group.close()


def test_creation_without_the_others():
    run_ranks(_rank_0_waits, 1)


def test_creation_without_rank_0():
    def create(rank):
        with socket.socket() as bound:
            bound.bind((LOCAL, 0))
            StatelessProcessGroup.create(
                LOCAL, bound.getsockname()[1], 1, 2, store_timeout=1, wire="vllm"
            )

    with pytest.raises(StoreConnectionError, match="is rank 0 running"):
        run_threads(create, 1)


def _interrupted_in_create(here):
    if here.rank == 1:
        time_of_signal = here.ask("going in")
        # rank 0 listens, so it is in the middle of its call
        TCPStore(LOCAL, time_of_signal["port"], is_master=False)
        here.tell("sent", interrupt(time_of_signal["pid"]))
        return
    with place(here) as port:
        here.tell("going in", {"pid": os.getpid(), "port": port})
        with pytest.raises(KeyboardInterrupt):
            StatelessProcessGroup.create(LOCAL, port, 0, 5, wire="vllm")
        assert time.monotonic() - here.ask("sent") < 10
        # the port is free soon
        for _ in range(100):
            try:
                StatelessProcessGroup.create(LOCAL, port, 0, 1, wire="vllm").close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"port {port} stays taken")


def test_creation_is_interrupted():
    run_ranks(_interrupted_in_create, 2)


def _interrupted_on_a_socket_that_stays(here):
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        arguments = LOCAL, 0, 0, 3
        threading.Timer(0.3, interrupt, [os.getpid()]).start()
        with pytest.raises(KeyboardInterrupt):
            StatelessProcessGroup.create(*arguments, listen_socket=listener, wire="vllm")
        with pytest.raises(GroupCreationError, match="1 of 3 ranks came"):
            StatelessProcessGroup.create(
                *arguments, listen_socket=listener, wire="vllm", store_timeout=1
            )


def test_what_ended_the_creation_before_is_no_rank():
    run_ranks(_interrupted_on_a_socket_that_stays, 1)


# A barrier ends in time, names whom it misses, and the next one is in step.


def _late_at_a_barrier(here, layout):
    group = group_of(here, layout, NEWEST)
    if here.rank < 2:
        with pytest.raises(BarrierError, match="missing: rank 2 of 3; in vLLM's") as caught:
            group.barrier(timeout=1)
        error = caught.value
        assert (error.missing, error.phase, error.completed) == ((2,), "arrival", False)
        assert 1 <= error.elapsed < 10 and error.allowed == 1
        here.tell(f"gave up {here.rank}")
    else:
        here.ask("gave up 0")
        here.ask("gave up 1")
        group.barrier(timeout=SECONDS)  # passes alone, of either kind
    group.barrier(timeout=SECONDS)
    assert group.all_gather_obj(here.rank) == [0, 1, 2]
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(OURS, OURS, THEIRS), (OURS, OURS, OURS)])
def test_a_rank_that_comes_late_to_a_barrier(layout):
    run_ranks(_late_at_a_barrier, 3, layout)


def _rank_0_is_late(here, layout):
    group = group_of(here, layout, NEWEST)
    for number in range(2):  # each rank calls each barrier once
        if here.rank == 1:
            with pytest.raises(BarrierError, match="missing: rank 0 of 2") as caught:
                group.barrier(timeout=0.5)
            assert caught.value.missing == (0,)
            here.tell(f"gave up {number}")
        else:
            here.ask(f"gave up {number}")
            with pytest.raises(BarrierError, match="missing: rank 1 of 2"):
                group.barrier(timeout=0.5)
    here.meet("both late")
    group.barrier(timeout=SECONDS)
    assert group.broadcast_obj("next", 0) == "next"
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")


def test_rank_0_comes_late_to_a_barrier():
    run_ranks(_rank_0_is_late, 2, (OURS, OURS))


def _does_not_leave(here):
    group = group_of(here, (OURS, OURS), NEWEST)
    if here.rank == 0:
        with pytest.raises(
            BarrierError, match="in departure rank 0 waited in vain for rank 1"
        ) as caught:
            group.barrier(timeout=1)
        assert caught.value.completed and caught.value.missing == (1,)
        here.tell("gave up")
    else:
        # arrives as a rank that is killed before it leaves
        name = group._barrier.name_it(group._deadline("barrier"))
        group.store.set(f"arrival_{name}_1", "1")
        here.ask("gave up")
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")


def test_a_rank_that_does_not_leave():
    run_ranks(_does_not_leave, 2)


def _another_call(here, layout):
    group = group_of(here, layout, NEWEST)
    if here.rank == 0:
        group.broadcast_obj({"a": "plan"}, 0)
    else:
        with pytest.raises(MessageError, match=r"rank 0 broadcast \{'a': 'plan'\}, which names no"):
            group.barrier(timeout=SECONDS)
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(THEIRS, OURS), (OURS, OURS)])
def test_a_barrier_meets_a_broadcast(layout):
    run_ranks(_another_call, 2, layout)


# Messages and gathers that do not come.


def _nothing_comes(here, layout):
    group = group_of(here, layout, NEWEST, store_timeout=1 if layout[here.rank] == OURS else 20)
    if here.rank == 1:
        with pytest.raises(MessageTimeoutError, match="rank 1 waited in vain for this from rank 0"):
            group.recv_obj(0, timeout=0.5)
        with pytest.raises(
            MessageTimeoutError, match="broadcast_from/0/0: rank 1 waited"
        ) as caught:
            group.broadcast_obj(None, 0, timeout=0.5)
        assert caught.value.missing == (0,)
        with pytest.raises(
            MessageTimeoutError, match="all_gather_obj on rank 1: rank 0 of 2"
        ) as caught:
            group.all_gather_obj("mine", timeout=0.5)
        assert caught.value.missing == (0,)
        here.tell("gave up")
        assert group.recv_obj(0, timeout=SECONDS) == "late"
    else:
        here.ask("gave up")
        group.send_obj("late", 1)
        # this rank comes late to the gather, and finds what the other one has given
        assert group.all_gather_obj("too late") == ["too late", "mine"]
    group.barrier(timeout=SECONDS)
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(THEIRS, OURS), (OURS, OURS)])
def test_nothing_comes(layout):
    run_ranks(_nothing_comes, 2, layout)


def _nothing_to_give(here, layout):
    group = group_of(here, layout, NEWEST)
    if here.rank == 1:
        with pytest.raises(Exception, match="local object"):
            group.all_gather_obj(lambda: None)
    else:
        with pytest.raises(MessageTimeoutError) as caught:
            group.all_gather_obj("mine", timeout=0.5)
        assert caught.value.missing == (1,)
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")


def test_a_rank_has_nothing_to_give():
    run_ranks(_nothing_to_give, 2, (OURS, OURS))


def _senders_in_turn(here, layout):
    group = group_of(here, layout, NEWEST)
    for source in (1, 2):  # one of them after the other, as a barrier lies between
        if here.rank == source:
            group.send_obj(f"of rank {source}", 0)
        if here.rank == 0:
            assert group.recv_obj(source) == f"of rank {source}"
        group.barrier(timeout=SECONDS)
    here.meet("done")


@needs_vllm(NEWEST)
def test_senders_in_turn():
    run_ranks(_senders_in_turn, 3, (OURS, THEIRS, OURS))


def test_an_id_inside_another_object():
    with pytest.raises(pickle.PicklingError, match="an NcclUniqueId inside another object"):
        encode([NcclUniqueId()])


@pytest.mark.parametrize(("messages", "danger"), [("plain", False), ("pickle", True)])
def test_the_warning(messages, danger):
    with pytest.warns(InsecureGroupWarning, match="vLLM's protocol has no tags, so") as caught:
        StatelessProcessGroup.create("0.0.0.0", 0, 0, 1, wire="vllm", messages=messages).close()
    assert ("run code on every rank" in str(caught[0].message)) == danger


def _expires(here, layout):
    group = group_of(here, layout, NEWEST)
    if here.rank == 0:
        group.data_expiration_seconds = 0.01
        group.send_obj("old", 1)
        time.sleep(0.05)  # its age is what counts
        group.expire_data()
        assert not group.entries
        here.tell("expired")
    else:
        here.ask("expired")
        with pytest.raises(MessageTimeoutError, match="waited in vain"):
            group.recv_obj(0, timeout=0.5)
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(THEIRS, OURS), (OURS, OURS)])
def test_what_expires_does_not_tell(layout):
    run_ranks(_expires, 2, layout)


def _two_senders(here, layout):
    group = group_of(here, layout, NEWEST)
    if here.rank == 1:
        group.send_obj("of rank 1", 0)
        assert group.store.check(["send_to/0/0"])  # set does not wait, and is done now
        here.tell("sent")
    if here.rank == 2:
        here.ask("sent")
        if layout[2] == OURS:
            with pytest.raises(MessageError, match="send_to/0/0: is taken by another rank's"):
                group.send_obj("of rank 2", 0)
            assert group.send_dst_counter[0] == 0
        else:
            group.send_obj("of rank 2", 0)
            assert group.store.check(["send_to/0/0"])
        here.tell("sent twice")
    if here.rank == 0:
        here.ask("sent twice")
        got = group.recv_obj(1)
        assert got == ("of rank 1" if layout[2] == OURS else "of rank 2")
        # it is lost, and no message is read twice
        with pytest.raises(MessageTimeoutError, match=r"send_to/0/0: rank 0 waited in vain"):
            group.recv_obj(2, timeout=0.2)
        here.tell("read")
    if here.rank == 2:
        here.ask("read")
        group.send_obj("again", 0)
    if here.rank == 0:
        assert layout[2] == THEIRS or group.recv_obj(2) == "again"
    group.barrier(timeout=SECONDS)
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(OURS, THEIRS, OURS), (OURS, THEIRS, THEIRS)])
def test_two_senders(layout):
    run_ranks(_two_senders, 3, layout)


# Interrupts: the rank takes the call up again where it was.


def _interrupted(here, call):
    group = group_of(here, (OURS, OURS), NEWEST)
    calls = {
        "barrier": lambda: group.barrier(timeout=SECONDS),
        "recv_obj": lambda: group.send_obj("me", 1) if here.rank == 0 else group.recv_obj(0),
        "all_gather_obj": lambda: group.all_gather_obj(here.rank),
    }
    if here.rank == (0 if call == "recv_obj" else 1):
        here.ask("interrupted")
    else:
        sent = []

        def interrupt_the_call():
            until(lambda: "call" in group._calls._present)
            sent.append(interrupt(os.getpid()))

        threading.Thread(target=interrupt_the_call, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            calls[call]()
        assert time.monotonic() - sent[0] < 10
        here.tell("interrupted")
    result = calls[call]()
    group.barrier(timeout=SECONDS)
    assert group.all_gather_obj(here.rank) == [0, 1]
    here.meet("done")
    return result


@pytest.mark.parametrize("call", ["barrier", "recv_obj", "all_gather_obj"])
def test_interrupts(call):
    results = run_ranks(_interrupted, 2, call)
    if call == "all_gather_obj":
        assert results == [[0, 1], [0, 1]]
    if call == "recv_obj":
        assert results[1] == "me"


# Plain data, unless the caller trusts what comes.


def _what_comes(here, layout, messages):
    group = group_of(here, layout, NEWEST, messages=messages)
    if here.rank == 0:
        for obj in (Fraction(1, 3), Counter("aab"), {"shape": (2, 3), "name": "w"}):
            group.send_obj(obj, 1)
        group.broadcast_obj(Fraction(1, 3), 0)
        result = []
    elif messages == "pickle":
        result = [group.recv_obj(0) for _ in range(3)] + [group.broadcast_obj(None, 0)]
    else:
        with pytest.raises(MessageError, match=r"send_to/1/0: .*fractions\.Fraction"):
            group.recv_obj(0)
        with pytest.raises(MessageError, match=r"send_to/1/1: .*collections\.Counter"):
            group.recv_obj(0)
        result = [group.recv_obj(0)]
        with pytest.raises(MessageError, match=r"broadcast_from/0/0: .*fractions\.Fraction"):
            group.broadcast_obj(None, 0)
    gathers = [group.all_gather_obj(here.rank)]
    if messages != "pickle" and layout[1] == OURS:
        mine = Fraction(1, 3) if here.rank == 0 else "plain"
        if here.rank == 1:
            with pytest.raises(MessageError, match=r"fractions\.Fraction"):
                group.all_gather_obj(mine)
        else:
            assert group.all_gather_obj(mine) == [mine, "plain"]
    gathers.append(group.all_gather_obj(here.rank))
    assert gathers == [[0, 1], [0, 1]]
    here.meet("done")
    return result


@needs_vllm(NEWEST)
@pytest.mark.parametrize("messages", ["pickle", None, "plain"])
def test_what_comes(messages):
    _, result = run_ranks(_what_comes, 2, (THEIRS, OURS), messages)
    last = {"shape": (2, 3), "name": "w"}
    if messages == "pickle":
        assert result == [Fraction(1, 3), Counter("aab"), last, Fraction(1, 3)]
    else:
        assert result == [last]


def _plain_in_our_own_protocol(here):
    group = here.group(messages="plain")
    assert group.messages == "plain"
    tensor = torch.arange(2.0**18)  # its memory travels apart from its pickle
    group.send_obj({"tensor": tensor, "rank": here.rank}, 1 - here.rank)
    received = group.recv_obj(1 - here.rank)
    assert torch.equal(received["tensor"], tensor) and received["rank"] == 1 - here.rank
    group.send_obj(Fraction(1, 3), 1 - here.rank)
    with pytest.raises(MessageError, match=r"fractions\.Fraction"):
        group.recv_obj(1 - here.rank)
    with pytest.raises(MessageError, match=r"fractions\.Fraction"):
        group.all_gather_obj(Fraction(1, 3))
    assert group.all_gather_obj([tensor[:3], here.rank])[1 - here.rank][1] == 1 - here.rank
    assert torch.equal(group.all_reduce(tensor), 2 * tensor)
    group.close()


def test_plain_data_in_our_own_protocol():
    run_ranks(_plain_in_our_own_protocol, 2)


def _unique_ids(here, layout):
    group = group_of(here, layout, NEWEST)
    content = bytes(range(128))
    kind = NcclUniqueId
    if layout[here.rank] == THEIRS:
        from vllm.distributed.device_communicators import pynccl_wrapper

        kind = pynccl_wrapper.ncclUniqueId
    mine = kind()
    mine.internal[:] = [byte - 256 * (byte > 127) for byte in content]
    found = group.broadcast_obj(mine if here.rank == 0 else None, 0)
    assert isinstance(found, kind) and bytes(found) == content
    gathered = group.all_gather_obj(mine)
    assert all(isinstance(one, kind) and bytes(one) == content for one in gathered)
    here.meet("done")


@needs_vllm(NEWEST)
@pytest.mark.parametrize("layout", [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)])
def test_unique_ids_of_nccl(layout):
    run_ranks(_unique_ids, 2, layout)


# What does not fit together is refused before anything else.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wire": "vLLM"}, "wire='vLLM': must be 'vllm', or None"),
        ({"messages": "json"}, "messages='json': must be 'pickle' or 'plain'"),
        ({"wire": "vllm", "secret": "x" * 20}, "secret: cannot be used with wire='vllm'"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        StatelessProcessGroup.create(LOCAL, 0, 0, 1, **options)


def test_from_env(monkeypatch):
    monkeypatch.setenv("REFDIST_SECRET", "a secret of other groups")
    with pytest.warns(InsecureGroupWarning, match="REFDIST_SECRET does not protect this group"):
        group = StatelessProcessGroup.from_env(
            host=LOCAL, port=0, rank=0, world_size=1, wire="vllm"
        )
    with pytest.raises(ValueError, match="realign: vLLM's protocol has nothing"):
        group.realign()
    group.events = []
    group.barrier()
    assert [event.phase for event in group.events] == ["arrival", "confirmation", "departure"]
    assert group.generation == 1 and group.messages == "plain"
    with pytest.raises(ValueError, match="has no tags"):
        StatelessProcessGroup.from_env(
            host=LOCAL, port=0, rank=0, world_size=1, wire="vllm", secret="x" * 20
        )
    group.close()
    with pytest.raises(ValueError, match="is closed"):
        group.barrier()


def _leaves_by_an_error(here):
    with group_of(here, (OURS, OURS), NEWEST) as group:
        group.barrier()
        raise ZeroDivisionError


def test_leaving_by_an_error():
    with pytest.raises(RankFailedError, match="ZeroDivisionError"):
        run_ranks(_leaves_by_an_error, 2)


# A torch group over gloo, by vLLM's rendezvous.


def _torch_group(here, layout, version, host=LOCAL):
    with place(here) as port:
        arguments = host, port, here.rank, len(layout), "gloo"
        if layout[here.rank] == THEIRS:
            utils = import_vllm(version)
            group = utils.stateless_init_torch_distributed_process_group(*arguments)
        else:
            group = stateless_init_torch_distributed_process_group(
                *arguments, wire="vllm", timeout=timedelta(seconds=SECONDS)
            )
    tensor = torch.full((1000,), here.rank + 1.0)
    dist.all_reduce(tensor, group=group)
    assert set(tensor.tolist()) == {sum(range(1, len(layout) + 1))}
    for source in range(len(layout)):
        tensor = torch.full((7,), float(here.rank))
        collectives.broadcast(tensor, source, group)
        assert set(tensor.tolist()) == {source}
    if layout[here.rank] == OURS:
        stateless_destroy_torch_distributed_process_group(group)
    here.meet("done")


TORCH_CASES = [
    pytest.param(version.values[0], layout, marks=version.marks)
    for version in each_version()
    for layout in [(OURS, THEIRS), (THEIRS, THEIRS, OURS)]
]


@pytest.mark.parametrize(("version", "layout"), TORCH_CASES)
def test_a_torch_group(version, layout):
    run_ranks(_torch_group, len(layout), layout, version)


@needs_vllm(NEWEST)
def test_a_torch_group_over_ipv6():
    run_ranks(_torch_group, 2, (OURS, THEIRS), NEWEST, "::1")


def _the_store_of_a_torch_group(here):
    layout = OURS, THEIRS
    with place(here) as port:
        init = stateless_init_torch_distributed_process_group
        options = {"wire": "vllm"}
        if layout[here.rank] == THEIRS:
            init = import_vllm(NEWEST).stateless_init_torch_distributed_process_group
            options = {}
        _, store = init(LOCAL, port, here.rank, 2, "gloo", return_store=True, **options)
    store.set(f"of {here.rank}", "value")
    assert store.get(f"of {1 - here.rank}") == b"value"
    here.meet("done")


@needs_vllm(NEWEST)
def test_the_store_of_a_torch_group():
    run_ranks(_the_store_of_a_torch_group, 2)


def test_a_torch_group_of_nccl_is_not_vllms():
    with pytest.raises(ValueError, match=r"needs a CUDA GPU|it knows gloo"):
        stateless_init_torch_distributed_process_group(LOCAL, 0, 0, 1, "nccl", wire="vllm")


def _torch_group_meets_ours(here):
    with place(here) as port:
        wire = "vllm" if here.rank else None
        with pytest.raises((GroupCreationError, StoreConnectionError, RuntimeError)) as caught:
            stateless_init_torch_distributed_process_group(
                LOCAL, port, here.rank, 2, "gloo", wire=wire, timeout=timedelta(seconds=SECONDS)
            )
        return str(caught.value)


def test_a_torch_group_meets_our_own_protocol():
    ours, _ = run_ranks(_torch_group_meets_ours, 2)
    assert "speaks vLLM's protocol" in ours


def test_a_store_with_a_prefix_is_no_stranger():
    store = PrefixStore("a", TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False))
    group = StatelessProcessGroup(0, 1, store, messages="plain")
    group.barrier()
    group.close()
