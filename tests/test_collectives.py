"""Every collective, by rank in a group without global state: on gloo here, on NCCL in test_gpu."""

import functools
import itertools
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, run_ranks
from torch.distributed import ReduceOp

from refdist import (
    CollectiveError,
    cpu_all_reduce_,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.torch_groups import collectives

SLACK = 8.0


def form(here, name="group", backend="gloo", **options):
    if backend == "nccl":
        torch.cuda.set_device(here.rank)
    with here.place(name) as (port, listener):
        return stateless_init_torch_distributed_process_group(
            LOCAL, port, here.rank, here.world_size, backend, listen_socket=listener, **options
        )


# Each collective gets the rank r, the number of ranks n, the group and a function that makes a
# tensor on the group's device; it returns what this rank has afterwards. Beside it stands what that
# must be. The rank that is named is the last one, so that it is not 0 by chance.

TIMES = timedelta(seconds=30)


def _reduction(op):
    def run(r, n, group, tensor):
        mine = tensor([r + 2.0, -r - 1.0])
        collectives.all_reduce(mine, group, op)
        return mine.tolist()

    return run


def _broadcast(r, n, group, tensor):
    mine = tensor([r, 10 + r])
    collectives.broadcast(mine, n - 1, group, TIMES)
    return mine.tolist()


def _reduce(r, n, group, tensor):
    mine = tensor([r + 1, 1])
    collectives.reduce(mine, n - 1, group)
    return mine.tolist() if r == n - 1 else None


def _all_gather(r, n, group, tensor):
    parts = [tensor([0, 0]) for _ in range(n)]
    collectives.all_gather(parts, tensor([r, -r]), group)
    return [part.tolist() for part in parts]


def _all_gather_into_tensor(r, n, group, tensor):
    output = tensor([0] * 2 * n)
    collectives.all_gather_into_tensor(output, tensor([r, -r]), group)
    return output.tolist()


def _reduce_scatter_tensor(r, n, group, tensor):
    output = tensor([0, 0])
    collectives.reduce_scatter_tensor(output, tensor([r + i for i in range(2 * n)]), group)
    return output.tolist()


def _scatter(r, n, group, tensor):
    output = tensor([0, 0])
    parts = [tensor([i, i * i]) for i in range(n)] if r == n - 1 else None
    collectives.scatter(output, parts, n - 1, group)
    return output.tolist()


def _gather(r, n, group, tensor):
    outputs = [tensor([0, 0]) for _ in range(n)] if r == n - 1 else None
    collectives.gather(tensor([r, -r]), outputs, n - 1, group)
    return [part.tolist() for part in outputs] if r == n - 1 else None


def _all_to_all_single(r, n, group, tensor):
    output = tensor([0] * n)
    collectives.all_to_all_single(output, tensor([10 * r + i for i in range(n)]), group)
    return output.tolist()


def _send_and_recv(r, n, group, tensor):
    received = tensor([0, 0])
    # around the ring; the first sends before it receives, the others after
    if r > 0:
        collectives.recv(received, r - 1, group)
    collectives.send(tensor([r, r * r]), (r + 1) % n, group)
    if r == 0:
        collectives.recv(received, n - 1, group)
    return received.tolist()


def _barrier(r, n, group, tensor):
    collectives.barrier(group, TIMES)


def _broadcast_object(r, n, group, tensor):
    return collectives.broadcast_object({"from": r}, n - 1, group, TIMES)


def _all_gather_object(r, n, group, tensor):
    return collectives.all_gather_object("x" * r, group)


def _send_and_recv_object(r, n, group, tensor):
    received = collectives.recv_object(r - 1, group) if r > 0 else None
    if r < n - 1:
        collectives.send_object({"from": r}, r + 1, group)
    return received


def _product(values):
    return functools.reduce(lambda a, b: a * b, values)


COLLECTIVES = {
    "sum": (
        _reduction(ReduceOp.SUM),
        lambda r, n: [sum(range(2, n + 2)), -sum(range(1, n + 1))],
    ),
    "product": (
        _reduction(ReduceOp.PRODUCT),
        lambda r, n: [_product(range(2, n + 2)), _product(range(-n, 0))],
    ),
    "min": (_reduction(ReduceOp.MIN), lambda r, n: [2, -n]),
    "max": (_reduction(ReduceOp.MAX), lambda r, n: [n + 1, -1]),
    "broadcast": (_broadcast, lambda r, n: [n - 1, 9 + n]),
    "reduce": (_reduce, lambda r, n: [n * (n + 1) / 2, n] if r == n - 1 else None),
    "all_gather": (_all_gather, lambda r, n: [[i, -i] for i in range(n)]),
    "all_gather_into_tensor": (
        _all_gather_into_tensor,
        lambda r, n: [value for i in range(n) for value in (i, -i)],
    ),
    "reduce_scatter_tensor": (
        _reduce_scatter_tensor,
        lambda r, n: [sum(range(n)) + n * (2 * r + i) for i in (0, 1)],
    ),
    "scatter": (_scatter, lambda r, n: [r, r * r]),
    "gather": (_gather, lambda r, n: [[i, -i] for i in range(n)] if r == n - 1 else None),
    "all_to_all_single": (_all_to_all_single, lambda r, n: [10 * i + r for i in range(n)]),
    "send_and_recv": (_send_and_recv, lambda r, n: [(r - 1) % n, ((r - 1) % n) ** 2]),
    "barrier": (_barrier, lambda r, n: None),
    "broadcast_object": (_broadcast_object, lambda r, n: {"from": n - 1}),
    "all_gather_object": (_all_gather_object, lambda r, n: ["x" * i for i in range(n)]),
    "send_and_recv_object": (
        _send_and_recv_object,
        lambda r, n: {"from": r - 1} if r > 0 else None,
    ),
}
ALONE = set(COLLECTIVES) - {"send_and_recv"}  # a rank does not send to itself


def views(rank, dtype, device):
    """A function that makes tensors: as they are, negated, and with gaps, in turn."""
    turns = itertools.count(rank)

    def make(values):
        plain = torch.tensor(values, dtype=dtype, device=device)
        gaps = torch.stack([plain, torch.full_like(plain, 99)], dim=1)[:, 0]
        tensor = (plain, torch._neg_view(-plain), gaps)[next(turns) % 3]
        assert tensor.tolist() == values
        return tensor

    return make


def use_all(here, backend, factory=None):
    """What each collective gives on this rank, and the average, which not every backend has."""
    assert not dist.is_initialized()
    group = form(here, backend=backend, timeout=timedelta(seconds=40))
    device = "cuda" if backend == "nccl" else "cpu"
    tensor = functools.partial(torch.tensor, dtype=torch.float32, device=device)
    if factory is not None:
        tensor = factory(here.rank, torch.float32, device)
    r, n = here.rank, here.world_size
    names = COLLECTIVES if n > 1 else ALONE
    results = {name: COLLECTIVES[name][0](r, n, group, tensor) for name in names}
    average = tensor([r + 1.0])
    if backend == "nccl" or release(torch.__version__) >= (2, 13):
        collectives.all_reduce(average, group, ReduceOp.AVG)
        assert average.item() == (n + 1) / 2
    elif release(torch.__version__) == (2, 6):
        with pytest.raises(CollectiveError, match=r"all_reduce failed .*Cannot use ReduceOp.AVG"):
            collectives.all_reduce(average, group, ReduceOp.AVG)
    assert not dist.is_initialized()
    here.meet("done")
    stateless_destroy_torch_distributed_process_group(group)
    return results


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


def check_all(backend, world_size, factory=None, deadline=40.0):
    by_rank = run_ranks(use_all, world_size, backend, factory, deadline=deadline)
    for rank, results in enumerate(by_rank):
        assert set(results) == (set(COLLECTIVES) if world_size > 1 else ALONE)
        for name, result in results.items():
            assert result == COLLECTIVES[name][1](rank, world_size), (name, rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_collective(world_size):
    check_all("gloo", world_size)


# The same with views, whose memory is not what they show: another kind on each rank.


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_collective_with_views(world_size):
    check_all("gloo", world_size, views)


def _conjugate(here):
    group = form(here)
    results = []
    for run in (
        lambda tensor: collectives.broadcast(tensor, 0, group),
        lambda tensor: collectives.all_reduce(tensor, group),
        lambda tensor: cpu_all_reduce_(tensor, group),
    ):
        tensor = torch.tensor([[1 + 2j, 3], [here.rank * 1j, 5]])
        tensor = tensor.mH if here.rank == 0 else tensor  # transposed and conjugated
        run(tensor)
        results.append(tensor.tolist())
    # what lies in the gaps stays
    whole = torch.full((2, 3), here.rank + 1.0)
    collectives.broadcast(whole[:, 1], 1, group)
    weights = torch.ones(2, requires_grad=True)
    collectives.all_reduce(weights, group)
    here.meet("done")
    stateless_destroy_torch_distributed_process_group(group)
    return results, whole.tolist(), weights.tolist()


def test_conjugates_and_gaps():
    total = [[2, 3], [3 + 1j, 10]]
    results = [[[1 - 2j, 0], [3, 5]], total, total]
    wholes = [[[r + 1, 2, r + 1]] * 2 for r in range(2)]
    assert run_ranks(_conjugate, 2) == [(results, whole, [2, 2]) for whole in wholes]


# What torch's own functions make of a rank: never a global one; group_src on 2.13, not on 2.6.
# Those that name none work everywhere. The module's docstring says so.


def _use_torchs_own(here):
    group = form(here, timeout=timedelta(seconds=20))
    r, n = here.rank, here.world_size
    tensor = torch.tensor([r])
    with pytest.raises(ValueError, match="is not registered"):
        dist.broadcast(tensor, src=0, group=group)
    if release(torch.__version__) >= (2, 13):
        dist.broadcast(tensor, group_src=1, group=group)
        assert tensor.item() == 1
    elif release(torch.__version__) == (2, 6):
        with pytest.raises(ValueError, match="is not registered"):
            dist.broadcast(tensor, group_src=1, group=group)
    gathered = [None] * n
    dist.all_gather_object(gathered, {"rank": r}, group=group)
    assert gathered == [{"rank": i} for i in range(n)]
    dist.barrier(group=group)
    stateless_destroy_torch_distributed_process_group(group)


def test_torchs_own_functions():
    run_ranks(_use_torchs_own, 2)


def _refuse_ranks(here):
    group = form(here)
    tensor = torch.ones(1)
    for call, name in {
        lambda: collectives.broadcast(tensor, 1, group): "src",
        lambda: collectives.reduce(tensor, -1, group): "dst",
        lambda: collectives.scatter(tensor, [tensor], 1, group): "src",
        lambda: collectives.gather(tensor, [tensor], 1, group): "dst",
        lambda: collectives.send(tensor, 7, group): "dst",
        lambda: collectives.recv(tensor, 7, group): "src",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}=-?\d: must be in 0..0 \(group size=1\)"):
            call()


def test_ranks_out_of_range():
    run_ranks(_refuse_ranks, 1)


# A rank does not take part: the others get an error in time that names the operation. So they do,
# at the latest with the group's own timeout, when it has died.

OPERATIONS = {
    "all_reduce": lambda group, t: collectives.all_reduce(torch.ones(4), group, timeout=t),
    "broadcast": lambda group, t: collectives.broadcast(torch.ones(4), 1, group, t),
    "all_gather_into_tensor": lambda group, t: collectives.all_gather_into_tensor(
        torch.ones(8), torch.ones(4), group, t
    ),
    "barrier": lambda group, t: collectives.barrier(group, t),
    "recv from rank 1": lambda group, t: collectives.recv(torch.ones(4), 1, group, timeout=t),
}


def _wait_in_vain(here, name):
    group = form(here, timeout=timedelta(seconds=30))
    if here.rank == 1:
        here.ask("rank 0 gave up")
        return None
    start = time.monotonic()
    with pytest.raises(CollectiveError, match=rf"^{name} failed on rank 0 of 2 after .* of 1 s:"):
        OPERATIONS[name](group, timedelta(seconds=1))
    seconds = time.monotonic() - start
    with pytest.raises(CollectiveError) as caught:
        OPERATIONS[name](group, timedelta(seconds=1))
    assert caught.value.operation == name and caught.value.elapsed < 1 + SLACK
    here.tell("rank 0 gave up")
    stateless_destroy_torch_distributed_process_group(group)
    return seconds


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_timeout_names_the_operation(name):
    seconds = run_ranks(_wait_in_vain, 2, name)[0]
    assert 0.9 < seconds < 1 + SLACK


# A timeout of less than a millisecond is short. It is not the group's own, which torch takes for 0.


def _hurry(here, name, seconds):
    group = form(here, timeout=timedelta(seconds=20))
    if here.rank == 0:
        start = time.monotonic()
        with pytest.raises(CollectiveError, match=rf"^{name} failed on rank 0 of 2"):
            OPERATIONS[name](group, timedelta(seconds=seconds))
        assert time.monotonic() - start < SLACK
        here.tell("rank 0 gave up")
    here.ask("rank 0 gave up")


@pytest.mark.parametrize("seconds", [0, 0.0005])
@pytest.mark.parametrize("name", ["all_reduce", "recv from rank 1"])
def test_less_than_a_millisecond(name, seconds):
    run_ranks(_hurry, 2, name, seconds)


TIMEOUTS = {
    timedelta(seconds=-1): r"timeout=-1\.0: must be at least 0 and at most 1000000000 seconds",
    timedelta(days=10**6): r"timeout=86400000000\.0: must be at least 0 and at most",
    5.0: r"timeout=5\.0: must be a timedelta, not float",
}


def _refuse_timeouts(here):
    group = form(here)
    for timeout, message in TIMEOUTS.items():
        for run in (
            lambda timeout: collectives.all_reduce(torch.ones(1), group, timeout=timeout),
            lambda timeout: collectives.barrier(group, timeout),
            lambda timeout: cpu_all_reduce_(torch.ones(1), group, timeout),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                run(timeout)
    collectives.barrier(group, timedelta(seconds=1e9))


def test_bad_timeouts():
    run_ranks(_refuse_timeouts, 1)


def _outlive(here):
    group = form(here, timeout=timedelta(seconds=10))
    collectives.barrier(group)
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(CollectiveError, match=rf"all_reduce failed on rank {here.rank} of 3"):
        collectives.all_reduce(torch.ones(4), group)
    stateless_destroy_torch_distributed_process_group(group)
    del group
    return time.monotonic() - start


def test_a_group_whose_peer_died_can_be_destroyed():
    first, _, third = run_ranks(_outlive, 3, killed=[1])
    assert max(first, third) < 10 + SLACK
