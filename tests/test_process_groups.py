"""Groups of torch, gloo and NCCL, that no global state knows of."""

import os
import re
import socket
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, run_ranks
from torch.distributed import HashStore, PrefixStore

from refdist import (
    GroupCreationError,
    StoreConnectionError,
    init_gloo_process_group,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)

SLACK = 6.0


def form(here, name="group", members=None, backend="gloo", **options):
    """A torch group of all ranks, or of ``members``, in the order in which they are given."""
    members = range(here.world_size) if members is None else members
    rank = list(members).index(here.rank)
    with here.place(name, rank) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, rank, len(members), backend, listen_socket=listener, **options
        )


def registered(name):
    """The group that torch knows under a name, or None."""
    try:
        return torch._C._distributed_c10d._resolve_process_group(name)
    except RuntimeError:
        return None


# Everyone: sums through torch's function and through the group's own methods, without global state.


def _use_gloo(here):
    assert not dist.is_initialized()
    group = form(here)
    results = {"shape": (group.rank(), group.size())}

    tensor = torch.full((3,), 2.0**here.rank)
    dist.all_reduce(tensor, group=group)
    results["all_reduce"] = tensor.tolist()

    results["broadcast"] = []
    for source in range(here.world_size):
        tensor = torch.tensor([here.rank, source])
        group.broadcast(tensor, source).wait()
        results["broadcast"].append(tensor.tolist())

    parts = [torch.zeros(1) for _ in range(here.world_size)]
    group.allgather([parts], [torch.tensor([float(here.rank)])]).wait()
    results["allgather"] = [part.item() for part in parts]

    group.barrier().wait()
    if here.world_size > 1:
        successor, predecessor = (here.rank + 1) % here.world_size, here.rank - 1
        received = torch.zeros(2)
        work = group.send([torch.full((2,), float(here.rank))], successor, 7)
        group.recv([received], predecessor % here.world_size, 7).wait()
        work.wait()
        results["received"] = received.tolist()
    assert not dist.is_initialized()
    group.barrier().wait()
    stateless_destroy_torch_distributed_process_group(group)
    assert not dist.is_initialized()
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_collectives_without_global_state(world_size):
    for rank, results in enumerate(run_ranks(_use_gloo, world_size)):
        assert results["shape"] == (rank, world_size)
        assert results["all_reduce"] == [2.0**world_size - 1] * 3
        assert results["broadcast"] == [[source, source] for source in range(world_size)]
        assert results["allgather"] == list(range(world_size))
        if world_size > 1:
            assert results["received"] == [(rank - 1) % world_size] * 2


# Processes 3 and 1 form one group, and 2, 3, 0 and 1 another, in either order.

SMALL, LARGE = [3, 1], [2, 3, 0, 1]


def _overlap(here, small_first):
    groups = {}
    for name in ("small", "large") if small_first else ("large", "small"):
        members = SMALL if name == "small" else LARGE
        if here.rank in members:
            groups[name] = form(here, name, members)
    sums = {}
    for name, group in groups.items():
        tensor = torch.tensor([2**here.rank])
        dist.all_reduce(tensor, group=group)
        sums[name] = group.rank(), tensor.item()
    for group in groups.values():
        group.barrier().wait()
        stateless_destroy_torch_distributed_process_group(group)
    return sums


@pytest.mark.parametrize("small_first", [True, False])
def test_one_process_in_overlapping_groups(small_first):
    for process, sums in enumerate(run_ranks(_overlap, 4, small_first)):
        expected = {"large": (LARGE.index(process), 15)}
        if process in SMALL:
            expected["small"] = (SMALL.index(process), 2**3 + 2**1)
        assert sums == expected


# The specification's story: processes 1 to 8 form one group; 9 and 10 another, while that lives.
# They may be others, or some of the same: one of them, or both.

FIRST = range(8)
STORIES = {"others": [8, 9], "one of the same": [3, 8], "the same": [6, 2]}


def _tell_the_story(here, second):
    groups, sums = {}, {}
    for name, members in {"first": list(FIRST), "second": second}.items():
        if here.rank in members:
            groups[name] = form(here, name, members, group_name=name)
    for turn in range(3):
        # in either order: a group has its own connections
        for name in sorted(groups, reverse=bool(turn % 2)):
            tensor = torch.tensor([2**here.rank])
            dist.all_reduce(tensor, group=groups[name])
            sums[name] = tensor.item()
    ranks = {name: group.rank() for name, group in groups.items()}
    # the second group ends, and the first works on
    for name in ("second", "first"):
        if name in groups:
            dist.all_reduce(torch.ones(1), group=groups[name])
        here.meet(name)
        if name in groups:
            stateless_destroy_torch_distributed_process_group(groups.pop(name))
            assert registered(name) is None
    return ranks, sums


@pytest.mark.parametrize("story", list(STORIES))
def test_processes_1_to_8_and_9_and_10(story):
    second = STORIES[story]
    results = run_ranks(_tell_the_story, max(8, *(member + 1 for member in second)), second)
    for process, (ranks, sums) in enumerate(results):
        groups = {"first": list(FIRST), "second": second}
        mine = {name: members for name, members in groups.items() if process in members}
        assert ranks == {name: members.index(process) for name, members in mine.items()}
        assert sums == {name: sum(2**m for m in members) for name, members in mine.items()}


# The store of the group is returned when asked for, and is the caller's to use.


def _return_store(here):
    group, store = form(here, return_store=True)
    store.set(f"own/{here.rank}", "value")
    values = [store.get(f"own/{rank}") for rank in range(here.world_size)]
    group.barrier().wait()
    stateless_destroy_torch_distributed_process_group(group)
    return values


def test_the_store_is_returned():
    assert run_ranks(_return_store, 2) == [[b"value"] * 2] * 2


def test_port_0_takes_a_free_port():
    group, store = stateless_init_torch_distributed_process_group(
        LOCAL, 0, 0, 1, "gloo", return_store=True
    )
    assert store.underlying_store.port > 0
    assert group.size() == 1
    stateless_destroy_torch_distributed_process_group(group)


# The socket that rank 0 was given stays the caller's: it is open when the group is gone.


def _keep_socket(here):
    with here.place("group") as (port, listener):
        for _ in range(2):
            group = stateless_init_torch_distributed_process_group(
                LOCAL, port, here.rank, here.world_size, "gloo", listen_socket=listener
            )
            group.barrier().wait()
            stateless_destroy_torch_distributed_process_group(group)
            del group
        return listener.getsockname()[1] == port


def test_listen_socket_stays_the_callers():
    assert run_ranks(_keep_socket, 1) == [True]


# A name registers the group with torch until it is destroyed. Another group cannot take it.


def _name(here):
    group = form(here, "group", group_name="mine")
    known = registered("mine") is group and group.group_name == "mine"
    with pytest.raises(ValueError, match="group_name='mine': is taken by another group"):
        form(here, "refused", group_name="mine")
    unnamed = form(here, "unnamed")
    unnamed.barrier().wait()
    stateless_destroy_torch_distributed_process_group(unnamed)
    still_known = registered("mine") is group
    group.barrier().wait()
    stateless_destroy_torch_distributed_process_group(group)
    gone = registered("mine") is None
    again = form(here, "again", group_name="mine")
    again.barrier().wait()
    known_again = registered("mine") is again
    stateless_destroy_torch_distributed_process_group(again)
    return known, still_known, gone, known_again


def test_group_name():
    assert run_ranks(_name, 2) == [(True, True, True, True)] * 2


def _refuse(here):
    with here.place("group") as (port, listener):
        for name, options in BAD.items():
            arguments = {"rank": 0, "world_size": 1, "backend": "gloo"} | options
            with pytest.raises(ValueError, match=MESSAGES[name]):
                stateless_init_torch_distributed_process_group(
                    LOCAL, port, listen_socket=listener, **arguments
                )
    return True


BAD = {
    "unknown": {"backend": "nonsense"},
    "mpi": {"backend": "mpi"},
    "rank": {"rank": 1},
    "size": {"world_size": 0},
    "timeout": {"timeout": timedelta(seconds=-1)},
    "no time": {"timeout": timedelta(0)},
}
MESSAGES = {
    "unknown": "^backend='nonsense': must be one of gloo, nccl$",
    "mpi": "^backend='mpi': must be one of gloo, nccl$",
    "rank": re.escape("rank=1: must be in 0..0 (world_size=1)"),
    "size": "world_size=0: must be at least 1",
    "no time": r"timeout=0\.0: must be above 0 seconds",
    "timeout": r"timeout=-1\.0: must be (above|at least) 0",
}


def test_bad_input():
    assert run_ranks(_refuse, 1) == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nccl_needs_a_gpu():
    with pytest.raises(ValueError, match="backend='nccl': needs a CUDA GPU, and torch finds none"):
        stateless_init_torch_distributed_process_group(LOCAL, 0, 0, 1, "nccl")


# A rank is missing: who came gets an error in time. Rank 0 is missing: so does rank 1.


def _come_alone(here):
    start = time.monotonic()
    with (
        here.place("group") as (port, listener),
        pytest.raises(GroupCreationError, match=r"1 of 2 ranks came .* within 2 s.* rank 1"),
    ):
        stateless_init_torch_distributed_process_group(
            LOCAL, port, 0, 2, "gloo", listen_socket=listener, timeout=timedelta(seconds=2)
        )
    # bound, so that nobody else takes the port, but nothing listens
    with socket.socket() as silent:
        silent.bind((LOCAL, 0))
        port = silent.getsockname()[1]
        with pytest.raises(StoreConnectionError, match=f"no store answered on {LOCAL}:{port}"):
            stateless_init_torch_distributed_process_group(
                LOCAL, port, 1, 2, "gloo", timeout=timedelta(seconds=2)
            )
    return time.monotonic() - start


def test_a_missing_rank():
    assert run_ranks(_come_alone, 1)[0] < 4 + SLACK


# init_gloo_process_group, with backend as the specification has it, and without as vLLM calls it.

LIMIT = timedelta(seconds=20)
CALLS = {
    "positional": lambda *a: init_gloo_process_group("gloo", *a, LIMIT),
    "backend object": lambda *a: init_gloo_process_group(dist.Backend("gloo"), *a, LIMIT),
    "keyword": lambda s, r, n: init_gloo_process_group(
        backend="gloo", prefix_store=s, group_rank=r, group_size=n, timeout=LIMIT
    ),
    "mixed": lambda s, r, n: init_gloo_process_group(
        "gloo", s, group_rank=r, group_size=n, timeout=LIMIT
    ),
    "without, positional": lambda *a: init_gloo_process_group(*a, LIMIT),
    "without, keyword": lambda s, r, n: init_gloo_process_group(
        prefix_store=s, group_rank=r, group_size=n, timeout=LIMIT
    ),
    "without, mixed": lambda *a: init_gloo_process_group(*a, timeout=LIMIT),
}


def _init_gloo(here):
    results = {}
    with here.group() as metadata:
        for name, call in CALLS.items():
            group = call(PrefixStore(name, metadata.store), here.rank, here.world_size)
            tensor = torch.tensor([here.rank + 1])
            dist.all_reduce(tensor, group=group)
            results[name] = tensor.item()
            group.barrier().wait()
            stateless_destroy_torch_distributed_process_group(group)
            del group
    return results, dist.is_initialized()


def test_init_gloo_in_every_form():
    assert run_ranks(_init_gloo, 2) == [(dict.fromkeys(CALLS, 3), False)] * 2


def test_init_gloo_with_bad_input():
    store = PrefixStore("group", HashStore())
    with pytest.raises(ValueError, match="backend='nccl': must be 'gloo'"):
        init_gloo_process_group("nccl", store, 0, 1, LIMIT)
    with pytest.raises(TypeError, match="missing prefix_store, group_rank, group_size, timeout"):
        init_gloo_process_group()
    with pytest.raises(TypeError, match="missing group_size, timeout"):
        init_gloo_process_group("gloo", store, 0)
    with pytest.raises(TypeError, match="missing timeout"):
        init_gloo_process_group(store, 0, 1)
    with pytest.raises(TypeError, match="missing timeout"):
        init_gloo_process_group(prefix_store=store, group_rank=0, group_size=1)


# Groups come and go, and nothing stays: after 200 rounds this process has as many descriptors and
# threads as after the first few, and torch knows of no group more.


def _come_and_go(here, rounds):
    counts = []
    known = len(dist.distributed_c10d._world.pg_map)
    for number in range(rounds):
        group = form(here, f"group/{number}", group_name=f"group {number}")
        dist.all_reduce(torch.ones(1), group=group)
        group.barrier().wait()
        stateless_destroy_torch_distributed_process_group(group)
        alive = weakref.ref(group)
        del group
        assert alive() is None
        assert registered(f"group {number}") is None
        here.meet(f"round {number}")
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert len(dist.distributed_c10d._world.pg_map) == known
    return counts


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_200_rounds_leave_nothing_behind():
    for counts in run_ranks(_come_and_go, 2, 200, deadline=100):
        # a thread of torch may end, and close a connection, a little later
        for kind in zip(*counts, strict=True):
            assert max(kind[-20:]) <= max(kind[1:20]) + 1, counts


def _metadata_groups_come_and_go(here, rounds):
    counts = []
    for number in range(rounds):
        with here.group(f"group/{number}") as group:
            group.all_gather_obj(here.rank)
        del group
        here.meet(f"round {number}")
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_closed_groups_leave_no_descriptor():
    for counts in run_ranks(_metadata_groups_come_and_go, 2, 15):
        assert max(counts[-8:]) <= max(counts[1:5]) + 1, counts


# Gloo's own connections use the address by which the store is reached, IPv6 too.


def _sum_on(here, host):
    with here.place("group", host=host) as (port, listener):
        group = stateless_init_torch_distributed_process_group(
            host, port, here.rank, here.world_size, "gloo", listen_socket=listener
        )
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=group)
    group.barrier().wait()
    stateless_destroy_torch_distributed_process_group(group)
    return tensor.item()


@pytest.mark.parametrize("host", ["::1", "127.0.0.2"])
def test_gloo_on_other_addresses(host):
    assert run_ranks(_sum_on, 2, host) == [2.0, 2.0]
