"""NcclCommunicator: its errors without CUDA, and its operations and deadlines on GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from ranks import interrupt, run_ranks
from torch.distributed import ReduceOp

from refdist import CollectiveError, MessageError, MessageTimeoutError
from refdist.benchmarks.__main__ import main
from refdist.benchmarks.ways import WITHOUT_MULTICAST
from refdist.nccl import NcclCommunicator, library, new_unique_id_bytes

try:
    import nccl.core as nccl4py
except ImportError:
    nccl4py = None

GPUS = torch.cuda.device_count()
DEADLINE = 110
SLACK = 8.0  # above refdist.nccl.handle.ABORT_SECONDS
ROUNDS = int(os.environ.get("REFDIST_NCCL_ROUNDS", "40"))
INTS = ("int8", "uint8", "int32", "uint32", "int64", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
DTYPES = [getattr(torch, name) for name in INTS + FLOATS]
REDUCTIONS = ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.AVG

without_gpu = pytest.mark.skipif(GPUS > 0, reason="is for a machine without a CUDA GPU")


def gpus(count):
    """For tests on this many GPUs, with nccl4py, one test at a time."""

    def mark(test):
        missing = count > GPUS or nccl4py is None
        reason = f"needs {count} CUDA GPUs and nccl4py, and this machine has {GPUS} GPUs"
        test = pytest.mark.skipif(missing, reason=reason)(test)
        return pytest.mark.timeout(180)(pytest.mark.xdist_group("gpu")(test))

    return mark


# Importing the package imports neither nccl4py nor CUDA.


def test_importing_needs_nothing():
    code = (
        "import sys, refdist.nccl, torch; print('nccl' in sys.modules, torch.cuda.is_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["False", "False"], ran.stderr


# Without a GPU, or without nccl4py, the error is one line that says what is needed.


@without_gpu
@pytest.mark.parametrize("device", ["cuda:0", 0, torch.device("cuda", 0)])
def test_without_a_gpu(device):
    text = r"^device='.*0': needs a CUDA GPU, and torch finds none$"
    with pytest.raises(ValueError, match=text):
        NcclCommunicator(None, device)
    with pytest.raises(ValueError, match=text):
        NcclCommunicator.from_unique_id_bytes(bytes(128), 0, 1, device)


def test_without_nccl4py(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "nccl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nccl", None)
    library.load.cache_clear()
    text = r"^refdist\.nccl needs nccl4py \(.*nccl.*\): pip install nccl4py cuda-bindings$"
    with pytest.raises(ImportError, match=text):
        new_unique_id_bytes()
    with pytest.raises(ImportError, match=text):
        library.load()


def test_reductions():
    for kind, name in zip(REDUCTIONS, ("SUM", "PROD", "MIN", "MAX", "AVG"), strict=True):
        assert library.reduction("all_reduce", kind) == name
        assert library.reduction("all_reduce", ReduceOp(kind)) == name
    for op in (ReduceOp.BAND, ReduceOp(ReduceOp.BAND), "sum", None, [], 0):
        with pytest.raises(ValueError, match=r"^all_reduce: op=.*: must be SUM, PRODUCT, MIN"):
            library.reduction("all_reduce", op)


def create(here, name="group", **options):
    """A communicator of all ranks over a group of refdist, each on the GPU of its number."""
    os.environ.update(WITHOUT_MULTICAST)
    torch.cuda.set_device(here.rank)
    group = here.group(name)
    return group, NcclCommunicator(group, here.rank, **options)


def alone(device=0, **options):
    """A communicator of one rank."""
    os.environ.update(WITHOUT_MULTICAST)
    return NcclCommunicator.from_unique_id_bytes(new_unique_id_bytes(), 0, 1, device, **options)


def check_works(communicator):
    """A sum over its ranks is right."""
    ones = torch.ones(1000, device=communicator.device)
    result = communicator.all_reduce(ones)
    communicator.wait()
    assert result.tolist() == [communicator.world_size] * 1000


# One rank: NCCL copies.


def _one_rank(here):
    group, communicator = create(here)
    device = communicator.device
    assert (communicator.rank, communicator.world_size, str(device)) == (0, 1, "cuda:0")
    assert communicator.available and not communicator.disabled
    given = torch.arange(6.0, device=device)
    results = [torch.zeros(6, device=device) for _ in range(3)]
    results.append(communicator.all_reduce(given))
    communicator.all_reduce(given, results[0], ReduceOp(ReduceOp.AVG))
    communicator.all_gather(results[1], given)
    communicator.reduce_scatter(results[2], given)
    communicator.broadcast(given, 0)
    communicator.wait()
    for result in results:
        assert result.tolist() == [0, 1, 2, 3, 4, 5]
    child = communicator.split(7)
    assert (child.rank, child.world_size) == (0, 1)
    assert communicator.split(None) is None
    for one in (child, communicator):
        check_works(one)
        one.destroy()
        one.destroy()
        one.abort()
        assert one.disabled and not one.available
        with pytest.raises(ValueError, match=r"^all_reduce: .* cannot be used: it was destroyed$"):
            one.all_reduce(given)
    group.close()


@gpus(1)
def test_one_rank():
    run_ranks(_one_rank, 1, deadline=DEADLINE)


# A tensor without elements is left alone; on another stream, the result is right too.


def _empty_and_streams(here):
    communicator = alone()
    empty = torch.empty(0, 3, device="cuda")
    assert communicator.all_reduce(empty).shape == (0, 3)
    communicator.broadcast(empty, 0)
    communicator.all_gather(empty, empty)
    stream = torch.cuda.Stream()
    given = torch.arange(1000, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    result = communicator.all_reduce(given, stream=stream)
    communicator.wait()
    assert result.tolist() == list(range(1000))
    communicator.destroy()


@gpus(1)
def test_empty_tensors_and_streams():
    run_ranks(_empty_and_streams, 1, deadline=DEADLINE)


# Bad input: one error before NCCL is called, and the communicator works on.


def _bad_input(here):
    group, communicator = create(here)
    good = torch.ones(4, device="cuda")
    other = torch.ones(4, dtype=torch.float64, device="cuda")
    call = communicator
    cases = [
        (lambda: call.all_reduce(torch.ones(4)), r"in_tensor is on cpu; it must be on cuda:0"),
        (lambda: call.all_reduce([1.0]), r"in_tensor is \[1\.0\]; it must be a tensor"),
        (lambda: call.all_reduce(good, torch.ones(4)), r"out_tensor is on cpu"),
        (lambda: call.all_reduce(good.short()), r"dtype torch\.int16, which NCCL lacks; .*uint8"),
        (lambda: call.all_reduce(good.bool()), r"dtype torch\.bool, which NCCL lacks"),
        (lambda: call.all_reduce(good[::2]), r"strides \(2,\) is not contiguous"),
        (lambda: call.broadcast(torch.ones(2, 3, device="cuda").t(), 0), r"not contiguous"),
        (
            lambda: call.all_reduce(good, good[:3]),
            r"out_tensor has 3 elements, and in_tensor has 4",
        ),
        (lambda: call.all_reduce(good, other), r"out_tensor has dtype torch\.float64, and in_te"),
        (lambda: call.all_reduce(good, op=ReduceOp.BXOR), r"op=.*: must be SUM, PRODUCT, MIN, MAX"),
        (lambda: call.all_gather(good, good[:3]), r"output_tensor must have 1 times as many"),
        (lambda: call.reduce_scatter(good[:3], good), r"input_tensor must have 1 times as many"),
        (lambda: call.broadcast(good, 1), r"src=1: must be in 0\.\.0"),
        (lambda: call.broadcast(good, "0"), r"src='0': must be an integer"),
        (lambda: call.send(good, 0), r"dst=0: is this rank itself"),
        (lambda: call.recv(good, -1), r"src=-1: must be in 0\.\.0"),
        (lambda: call.all_reduce(good, stream=3), r"stream=3: must be a torch\.cuda\.Stream"),
        (lambda: call.all_reduce(good, timeout=-1), r"timeout=-1: must be finite seconds"),
        (lambda: call.wait("1"), r"timeout='1': must be a number of seconds"),
        (lambda: call.split(-1), r"color=-1: must be in 0\.\."),
        (lambda: call.split(0, 2**31), r"key=2147483648: must be in"),
        (lambda: call.group_end(), r"group_end: this thread has begun no group"),
        (lambda: NcclCommunicator(group, 99), r"device='99': must be in cuda:0\.\.cuda:"),
        (lambda: NcclCommunicator(group, "cpu"), r"device='cpu': must be a CUDA device"),
        (lambda: NcclCommunicator(group, "gpu"), r"device='gpu': must be a CUDA device"),
        (lambda: NcclCommunicator(None, 0), r"group is a NoneType; it must be a StatelessProc"),
        (lambda: NcclCommunicator.from_unique_id_bytes(b"1", 0, 1, 0), r"must be 128 bytes"),
        (lambda: NcclCommunicator.from_unique_id_bytes(bytes(128), 1, 1, 0), r"rank=1: must be"),
    ]
    for case, text in cases:
        with pytest.raises(ValueError, match=text):
            case()
    check_works(communicator)
    communicator.destroy()
    group.close()


@gpus(1)
def test_bad_input():
    run_ranks(_bad_input, 1, deadline=DEADLINE)


# A group that was begun is told of; destroying or aborting ends it, so that NCCL goes on.


def _open_groups(here):
    first, second = alone(), alone()
    ones = torch.ones(4, device="cuda")
    first.group_start()
    first.group_start()
    result = first.all_reduce(ones)
    with pytest.raises(ValueError, match=r"^wait: this thread has begun a group; call group_end"):
        first.wait()
    with pytest.raises(ValueError, match=r"^all_reduce: .* begun a group of another communicator"):
        second.all_reduce(ones)
    first.group_end()
    first.group_end()
    first.wait()
    assert result.tolist() == [1] * 4
    for end in (first.destroy, second.abort):
        end.__self__.group_start()
        end.__self__.all_reduce(ones)
        end()
        check_works(third := alone())
        third.destroy()


@gpus(1)
def test_groups_that_are_open():
    run_ranks(_open_groups, 1, deadline=DEADLINE)


# A peer never comes: an error in time that names the operation, and the process goes on.


def _in_vain(here):
    unique_id = new_unique_id_bytes()
    start = time.monotonic()
    text = r"^create failed on rank 0 of 2 after 2\.\d\d of 2 s: not all ranks .* so form another$"
    with pytest.raises(CollectiveError, match=text) as caught:
        NcclCommunicator.from_unique_id_bytes(unique_id, 0, 2, 0, timeout=2)
    seconds = time.monotonic() - start
    assert caught.value.operation == "create" and 2 <= caught.value.elapsed < 3
    communicator = alone()
    check_works(communicator)
    communicator.destroy()
    return seconds


@gpus(1)
def test_a_peer_never_comes():
    assert 2 <= run_ranks(_in_vain, 1, deadline=DEADLINE)[0] < 2 + SLACK


# Rank 0 sends no id, or something else: the others say so.


def _no_id(here):
    group = here.group()
    if here.rank == 0:
        here.ask("waited")
        group.broadcast_obj("no id", src=0)
        here.meet("end")
        return
    with pytest.raises(MessageTimeoutError):
        NcclCommunicator(group, 0, timeout=1)
    here.tell("waited")
    with pytest.raises(MessageError, match="rank 0 broadcast a str and not the id of an NCCL"):
        NcclCommunicator(group, 0)
    here.meet("end")


@gpus(1)
def test_rank_0_sends_no_id():
    run_ranks(_no_id, 2, deadline=DEADLINE)


# Two ranks on one GPU: NCCL's error, at once, on both.


def _same_gpu(here):
    with pytest.raises(CollectiveError, match=r"^create failed on rank . of 2 .* s: ") as caught:
        NcclCommunicator(here.group(), 0, timeout=60)
    here.meet("failed")
    assert caught.value.elapsed < 30
    communicator = alone()
    check_works(communicator)
    communicator.destroy()
    return str(caught.value)


@gpus(1)
def test_two_ranks_on_one_gpu():
    for text in run_ranks(_same_gpu, 2, deadline=DEADLINE):
        assert "invalid usage" in text, text


# An operation does not end in time: the wait names it and aborts; the GPU is not lost.


def _slow_stream(here):
    communicator = alone()
    torch.cuda._sleep(10**10)  # cycles: some seconds
    ones = torch.ones(4, device="cuda")
    communicator.broadcast(ones, 0)
    communicator.all_reduce(ones)
    start = time.monotonic()
    text = r"^broadcast failed on rank 0 of 1 after 1\.\d\d of 1 s: it was launched but has not end"
    with pytest.raises(CollectiveError, match=text):
        communicator.wait(1)
    seconds = time.monotonic() - start
    with pytest.raises(ValueError, match=r"^wait: .*: it was aborted when broadcast failed$"):
        communicator.wait()
    communicator.destroy()
    check_works(another := alone())
    another.destroy()
    return seconds


@gpus(1)
def test_an_operation_that_does_not_end():
    assert 1 <= run_ranks(_slow_stream, 1, deadline=DEADLINE)[0] < 1 + SLACK


# SIGINT while rank 0 waits: KeyboardInterrupt soon. In wait, the communicator stays as it was; in
# a creation, it is aborted, and another one can be formed. Rank 1 interrupts and has no part else.


def _interrupted(here):
    if here.rank == 1:
        for name in ("wait", "create"):
            process = here.ask(name)
            time.sleep(0.5)  # the other rank is in its wait, or the interrupt is early: both end
            here.tell(f"{name} interrupted", interrupt(process))
        return
    communicator = alone()
    ones = torch.ones(4, device="cuda")
    torch.cuda._sleep(4 * 10**9)
    result = communicator.all_reduce(ones)
    here.tell("wait", os.getpid())
    with pytest.raises(KeyboardInterrupt):
        communicator.wait()
    waited = time.monotonic() - here.ask("wait interrupted")
    communicator.wait()
    assert result.tolist() == [1] * 4
    unique_id = new_unique_id_bytes()
    here.tell("create", os.getpid())
    with pytest.raises(KeyboardInterrupt):
        NcclCommunicator.from_unique_id_bytes(unique_id, 0, 2, 0)
    created = time.monotonic() - here.ask("create interrupted")
    check_works(communicator)
    communicator.destroy()
    return waited, created


@gpus(1)
def test_interrupts():
    waited, created = run_ranks(_interrupted, 2, deadline=DEADLINE)[0]
    assert waited < 2 and created < SLACK


# Every operation is right for every dtype and reduction that NCCL has. Rank 0 has 1, 2, 1, 2, ...,
# rank 1 has 3, 4, 3, 4, ...: all results are exact in float8.


def _values(rank, dtype, count=1000):
    return torch.tensor([1 + 2 * rank, 2 + 2 * rank]).repeat(count // 2).to(dtype).cuda()


def _numbers(tensor):
    return tensor.cpu().to(torch.float64).tolist()


def _every_operation(here):
    group, communicator = create(here)
    assert communicator.world_size == 2 and communicator.rank == here.rank
    expected = {
        ReduceOp.SUM: [4, 6], ReduceOp.PRODUCT: [3, 8], ReduceOp.MIN: [1, 2],
        ReduceOp.MAX: [3, 4], ReduceOp.AVG: [2, 3],
    }  # fmt: skip
    for dtype in DTYPES:
        given = _values(here.rank, dtype)
        for op, pair in expected.items():
            result = communicator.all_reduce(given, op=op)
            in_place = given.clone()
            assert communicator.all_reduce(in_place, in_place, op) is in_place
            part = torch.zeros(500, dtype=torch.uint8).to(dtype).cuda()
            communicator.reduce_scatter(part, given, op)
            communicator.wait()
            assert _numbers(result) == _numbers(in_place) == pair * 500, (dtype, op)
            assert _numbers(part) == pair * 250, (dtype, op)
        _check_moves(here, communicator, given, dtype)
    communicator.destroy()
    group.close()


def _check_moves(here, communicator, given, dtype):
    other = 1 - here.rank
    together = torch.cat([torch.zeros_like(given), torch.zeros_like(given)])
    communicator.all_gather(together, given)
    copies = [given.clone(), given.clone()]
    for src in (0, 1):
        communicator.broadcast(copies[src], src)
    received = [torch.zeros_like(given), torch.zeros_like(given)]
    communicator.group_start()
    communicator.send(given, other)
    communicator.recv(received[0], other)
    communicator.group_end()
    if here.rank == 0:
        communicator.send(given, 1)
    else:
        communicator.recv(received[1], 0)
    communicator.wait()
    ones, threes = _numbers(_values(0, dtype)), _numbers(_values(1, dtype))
    assert _numbers(together) == ones + threes, dtype
    assert [_numbers(copy) for copy in copies] == [ones, threes], dtype
    assert _numbers(received[0]) == (threes, ones)[here.rank], dtype
    assert _numbers(received[1]) == ([0.0] * 1000, ones)[here.rank], dtype


@gpus(2)
def test_every_operation():
    run_ranks(_every_operation, 2, deadline=DEADLINE)


# Ranks that share no group; ranks of other classes, which block, as vLLM's do.


def _by_id(here):
    os.environ.update(WITHOUT_MULTICAST)
    if here.rank == 0:
        here.tell("id", new_unique_id_bytes())
    communicator = NcclCommunicator.from_unique_id_bytes(here.ask("id"), here.rank, 2, here.rank)
    check_works(communicator)
    communicator.destroy()


def _with_a_blocking_rank(here):
    os.environ.update(WITHOUT_MULTICAST)
    torch.cuda.set_device(here.rank)
    group = here.group()
    if here.rank == 0:
        communicator = NcclCommunicator(group, 0)
        check_works(communicator)
        tensor = torch.arange(5.0, device="cuda")
        communicator.broadcast(tensor, 0)
        communicator.destroy()
    else:
        unique_id = nccl4py.UniqueId.from_bytes(bytes(group.broadcast_obj(None, src=0)))
        communicator = nccl4py.Communicator.init(2, 1, unique_id)
        for tensor in (torch.zeros(1).cuda(), torch.ones(1000).cuda()):
            communicator.allreduce(tensor, tensor, nccl4py.SUM)
            torch.cuda.synchronize()
        tensor = torch.zeros(5, device="cuda")
        communicator.broadcast(tensor, tensor, 0)
        torch.cuda.synchronize()
        assert tensor.tolist() == [0, 1, 2, 3, 4]
        communicator.destroy()


@gpus(2)
@pytest.mark.parametrize("function", [_by_id, _with_a_blocking_rank])
def test_other_peers(function):
    run_ranks(function, 2, deadline=DEADLINE)


# A CUDA graph: what it captures is done by each replay.


def _graph(here):
    group, communicator = create(here)
    tensor = torch.ones(1000, device="cuda")
    check_works(communicator)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        communicator.all_reduce(tensor, tensor)
    for _ in range(3):
        graph.replay()
    communicator.all_reduce(tensor, tensor)
    communicator.wait()
    assert tensor.tolist() == [16] * 1000
    del graph
    communicator.destroy()
    group.close()


@gpus(2)
def test_a_graph():
    run_ranks(_graph, 2, deadline=DEADLINE)


# split: by color, in the order of keys, and without a rank.


def _split(here):
    group, communicator = create(here)
    turned = communicator.split(0, key=-here.rank)
    assert (turned.rank, turned.world_size) == (1 - here.rank, 2)
    tensor = torch.full((4,), float(here.rank), device="cuda")
    turned.broadcast(tensor, 0)
    turned.wait()
    assert tensor.tolist() == [1] * 4
    single = communicator.split(here.rank)
    assert (single.rank, single.world_size) == (0, 1)
    part = communicator.split(None if here.rank == 0 else 5)
    assert (part is None) == (here.rank == 0)
    for one in (turned, single, part, communicator):
        if one is not None:
            check_works(one)
            one.destroy()
    group.close()


@gpus(2)
def test_split():
    run_ranks(_split, 2, deadline=DEADLINE)


# Rank 1 stays away from a call: rank 0 gets the error of this call in time. Both form another
# communicator over the same group.


def _sum_and_wait(communicator, tensor):
    communicator.all_reduce(tensor)
    communicator.wait(2)


def _receive(communicator, tensor):
    communicator.recv(tensor, 1, timeout=2)


def _exchange(communicator, tensor):
    communicator.group_start()
    communicator.send(tensor, 1)
    communicator.recv(tensor.clone(), 1)
    communicator.group_end(timeout=2)


def _split_alone(communicator, tensor):
    communicator.split(0, timeout=2)


def _stay_away(here, name, call):
    group, communicator = create(here)
    ones = torch.ones(4, device="cuda")
    check_works(communicator)
    seconds = 0.0
    if here.rank == 0:
        start = time.monotonic()
        with pytest.raises(CollectiveError, match=rf"^{name} failed on rank 0 of 2 .* of 2 s: "):
            call(communicator, ones)
        seconds = time.monotonic() - start
        assert communicator.disabled
    here.meet("failed")
    communicator.abort()
    another = NcclCommunicator(group, here.rank)
    check_works(another)
    another.destroy()
    group.close()
    return seconds


@gpus(2)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("all_reduce", _sum_and_wait),
        ("recv from rank 1", _receive),
        ("group of send to rank 1, recv from rank 1", _exchange),
        ("split", _split_alone),
    ],
)
def test_a_rank_stays_away(name, call):
    seconds = run_ranks(_stay_away, 2, name, call, deadline=DEADLINE)[0]
    assert 2 <= seconds < 2 + SLACK


# Rank 1 destroys late: rank 0 gets an error in time, and both can go on.


def _destroy_late(here):
    group, communicator = create(here)
    check_works(communicator)
    seconds = 0.0
    if here.rank == 0:
        start = time.monotonic()
        text = (
            r"^destroy failed on rank 0 of 2 after 2\.\d\d of 2 s: other ranks on this host have "
        )
        with pytest.raises(CollectiveError, match=text):
            communicator.destroy(2)
        seconds = time.monotonic() - start
        assert communicator.disabled
        here.tell("destroyed")
    else:
        here.ask("destroyed")
        communicator.destroy()
    another = NcclCommunicator(group, here.rank)
    check_works(another)
    another.destroy()
    group.close()
    return seconds


@gpus(2)
def test_a_rank_destroys_late():
    assert run_ranks(_destroy_late, 2, deadline=DEADLINE)[0] < 2 + SLACK


# Rank 1 is stopped, or dies, in the middle of an operation: rank 0 gets an error in time, and can
# use its GPU and make another communicator.


def _hit(here, number):
    _, communicator = create(here)
    tensor = torch.ones(2**26, device="cuda")
    check_works(communicator)
    if here.rank == 1:
        torch.cuda._sleep(3 * 10**10)  # cycles: its own kernel comes after this
        communicator.all_reduce(tensor)
        here.tell("launched", os.getpid())
        signal.pause()
    process = here.ask("launched")
    communicator.all_reduce(tensor)
    os.kill(process, number)
    start = time.monotonic()
    text = (
        r"^all_reduce failed on rank 0 of 2 after 2\.\d\d of 2 s: it was launched but has not end"
    )
    with pytest.raises(CollectiveError, match=text):
        communicator.wait(2)
    seconds = time.monotonic() - start
    check_works(another := alone())
    another.destroy()
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return seconds


@gpus(2)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_peer_is_hit(number):
    seconds = run_ranks(_hit, 2, number, killed=[1], deadline=DEADLINE)[0]
    assert 2 <= seconds < 2 + SLACK


# Communicators come and go, and nothing stays: no memory of the GPU, no descriptor, no thread. A
# round takes over half a second, most of it in NCCL.


def _come_and_go(here, rounds):
    os.environ.update(WITHOUT_MULTICAST)
    torch.cuda.set_device(here.rank)
    group = here.group()
    counts = []
    for number in range(rounds):
        communicator = NcclCommunicator(group, here.rank)
        check_works(communicator)
        communicator.destroy()
        if number % 5 == 4:
            here.meet(f"round {number}")
            used = -(torch.cuda.mem_get_info()[0] // 2**20)
            files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            counts.append((used, files, threads))
            here.meet(f"counted {number}")
    group.close()
    return counts


@gpus(2)
@pytest.mark.timeout(180 + 2 * ROUNDS)
def test_communicators_leave_nothing_behind():
    for counts in run_ranks(_come_and_go, 2, ROUNDS, deadline=max(DEADLINE, 2 * ROUNDS)):
        memory, files, threads = zip(*counts, strict=True)
        assert memory[-1] <= memory[1] + 8, counts
        assert files[-1] <= files[1] + 1 and threads[-1] <= threads[1] + 1, counts


@gpus(2)
def test_nccl_on_the_command_line(tmp_path, capsys):
    output = tmp_path / "nccl.jsonl"
    sizes = [2**16, 2**21]
    main(
        [
            "nccl", "--sizes", *map(str, sizes), "--repeats", "2", "--layers", "1",
            "--vocabulary", "1000", "--buffer-mib", "4", "--output", str(output),
        ]
    )  # fmt: skip
    records = [json.loads(line) for line in output.read_text().splitlines()]
    calls = [record for record in records if record["benchmark"] == "nccl"]
    assert [(call["operation"], call["way"], call["num_bytes"]) for call in calls] == [
        (operation, way, size)
        for size, ways in zip(sizes, (["alone", "row", "graph"], ["row"]), strict=True)
        for operation in ("all_reduce", "broadcast")
        for way in ways
    ]
    assert len([r for r in records if r["benchmark"] == "nccl weights"]) >= 2
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(records)
