"""The checks of notebook 03: what is right passes, and the obvious wrong answers do not."""

from collections import Counter
from time import monotonic

import pytest
import torch

from refdist.lab.exercises import UnsolvedError
from refdist.lab.exercises import all_reduce as checks

pytestmark = pytest.mark.xdist_group("engines")


def fails(check, *answers):
    with pytest.raises(UnsolvedError) as caught:
        check(*answers)
    return str(caught.value)


def stub(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("check", "number"),
    [
        (checks.check_ring_step, "3.1"),
        (lambda answer: checks.check_bandwidths(answer, answer), "3.3"),
        (checks.check_fit, "3.4"),
        (checks.check_buckets, "3.5"),
    ],
)
def test_a_stub_is_not_written_yet(check, number):
    text = fails(check, stub)
    assert text.startswith(f"Exercise {number} ")
    assert "not written yet" in text


# 3.1


def starts_with_own_chunk(rank, step, n):
    return (rank - step) % n, (rank - step - 1) % n


def ends_with_own_chunk(rank, step, n):
    return (rank - step - 1) % n, (rank - step - 2) % n


@pytest.mark.parametrize("ring_step", [starts_with_own_chunk, ends_with_own_chunk])
def test_two_schedules_are_right(ring_step, capsys):
    checks.check_ring_step(ring_step)
    assert "solved. On 2 to 9 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ring_step", "text"),
    [
        (lambda rank, step, n: ((rank - step) % 4, (rank - step - 1) % 4), "wanted chunks from 0"),
        (lambda rank, step, n: (rank - step, rank - step - 1), "wanted chunks from 0 to 1"),
        (lambda rank, step, n: ((rank + step) % n, (rank + step - 1) % n), "whole sums, wanted 1"),
        (lambda rank, step, n: ((rank - step) % n, (rank - step) % n), "must name the same chunk"),
        (lambda rank, step, n: (rank, (rank - 1) % n), "whole sums, wanted 2"),
        (lambda rank, step, n: (rank - step) % n, "wanted the chunk to send and the chunk"),
        # right in reduce-scatter, but all-gather begins one chunk too late
        (
            lambda rank, step, n: starts_with_own_chunk(rank, step + (step >= n - 1), n),
            "after the last step",
        ),
    ],
)
def test_wrong_schedules(ring_step, text):
    assert text in fails(checks.check_ring_step, ring_step)


# 3.2


SETUP = """
from datetime import timedelta
import torch.distributed as dist
from refdist import init_gloo_process_group, stateless_init_torch_distributed_process_group
from refdist.lab.exercises.all_reduce import CountedGroup

everyone, store = stateless_init_torch_distributed_process_group(
    host, port, rank, world_size, "gloo", listen_socket=listen_socket, return_store=True)
groups, counted = {world_size: everyone}, CountedGroup(everyone)
soon_lost = init_gloo_process_group(
    prefix_store=dist.PrefixStore("soon lost", store), group_rank=rank, group_size=world_size,
    timeout=timedelta(seconds=5))

def ring(group, tensor, first=0):
    n, rank = group.size(), group.rank()
    chunks = list(tensor.view(-1).tensor_split(n))
    received = torch.empty_like(chunks[0])
    for step in range(2 * (n - 1)):
        out, into = ((rank - step - shift - first) % n for shift in (0, 1))
        target = chunks[into] if step >= n - 1 else received[:chunks[into].numel()]
        sending = group.send([chunks[out]], (rank + 1) % n, step)
        group.recv([target], (rank - 1) % n, step).wait()
        sending.wait()
        if step < n - 1:
            chunks[into] += target

def first_rank_receives_first(group, tensor):
    from refdist.torch_groups import collectives
    n, rank = group.size(), group.rank()
    chunks = list(torch.tensor_split(tensor.flatten(), n))
    for step in range(2 * (n - 1)):
        out, into = ((rank + step + shift) % n for shift in (0, 1))
        got = torch.empty_like(chunks[into])
        send = lambda: collectives.send(chunks[out], (rank - 1) % n, group)
        recv = lambda: collectives.recv(got, (rank + 1) % n, group)
        # rank 0 breaks the circle, also among an odd number of ranks
        for call in (recv, send) if rank == 0 else (send, recv):
            call()
        chunks[into] = chunks[into] + got if step < n - 1 else got
    tensor.copy_(torch.cat(chunks).view_as(tensor))

def stub(group, tensor):
    raise NotImplementedError

def to_rank_0(group, tensor):
    n, got = group.size(), torch.empty_like(tensor)
    if group.rank() > 0:
        group.send([tensor], 0, 0).wait()
        group.recv([tensor], 0, 1).wait()
        return
    for rank in range(1, n):
        group.recv([got], rank, 0).wait()
        tensor += got
    for work in [group.send([tensor], rank, 1) for rank in range(1, n)]:
        work.wait()

def whole_tensors(group, tensor):
    n, rank = group.size(), group.rank()
    passed, got = tensor.clone(), torch.empty_like(tensor)
    for step in range(n - 1):
        sending = group.send([passed], (rank + 1) % n, step)
        group.recv([got], (rank - 1) % n, step).wait()
        sending.wait()
        passed.copy_(got)
        tensor += got

def if_n_divides(group, tensor):
    n, flat = group.size(), tensor.view(-1)
    width = len(flat) // n
    if width:
        ring(group, flat[:width * n])

def neighbours_chunk(group, tensor):
    n, rank = group.size(), group.rank()
    chunks = list(tensor.view(-1).tensor_split(n))
    for step in range(2 * (n - 1)):
        out, into = ((rank - step - shift) % n for shift in (0, 1))
        sending = group.send([chunks[out]], (rank + 1) % n, step)
        group.recv([chunks[into]], (rank - 1) % n, step).wait()  # over what is there
        sending.wait()

def waits_for_its_send(group, tensor):
    if group.size() > 1:
        n, rank = group.size(), group.rank()
        group.send([tensor], (rank + 1) % n, 0).wait()
        group.recv([tensor], (rank - 1) % n, 0).wait()

def returns_a_new_one(group, tensor):
    copy = tensor.clone()
    ring(group, copy)
    return copy

def cheats(group, tensor):
    dist.all_reduce(tensor, group=group._group)

def sums_in_everyone(group, tensor):
    dist.all_reduce(tensor, group=everyone)

def sums_in_groups(group, tensor):
    groups[4].allreduce([tensor]).wait()

def sends_in_counted(group, tensor):
    ring(counted, tensor)

def sums_in_one_that_is_hidden_from_checks(group, tensor, other=soon_lost):
    dist.all_reduce(tensor, group=other)

def other_collective(group, tensor):
    group.allreduce([tensor]).wait()
"""


@pytest.fixture(scope="module")
def engines(engines):
    engines.view.execute(SETUP, block=True)
    return engines


@pytest.mark.parametrize("name", ["ring", "first_rank_receives_first"])
def test_two_rings_are_right(engines, name, capsys):
    checks.check_ring(engines, name)
    printed = capsys.readouterr().out
    assert "Exact on 1, 2, 3 and 4 ranks" in printed
    assert "1.5000 of its tensor, in 6 messages" in printed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stub", "not written yet"),
        ("missing", "is not defined on engine 0. Run the cells above"),
        ("to_rank_0", "on 3 ranks, with a tensor of shape (120,) of int64, rank 0 sent 1920 bytes"),
        ("whole_tensors", "wanted at most 2 (n - 1) chunks"),
        ("if_n_divides", "on 2 ranks, with a tensor of shape (1,) of float32, rank 0 has a wrong"),
        ("neighbours_chunk", "rank 0 has a wrong sum"),
        ("waits_for_its_send", "waited 3 s in vain. Does every rank wait for the end of its send"),
        ("returns_a_new_one", "it is not in the same tensor"),
        ("cheats", "use no other way to the other ranks"),
        ("other_collective", "AttributeError: 'CountedGroup' object has no attribute"),
    ],
)
def test_wrong_rings(engines, name, text):
    assert text in fails(checks.check_ring, engines, name)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("sums_in_everyone", "everyone"),
        ("sums_in_groups", "groups[4]"),
        ("sends_in_counted", "counted"),
    ],
)
def test_another_group_is_neither_used_nor_lost(engines, name, used):
    start = monotonic()
    text = fails(checks.check_ring, engines, name)
    assert f"on 1 rank, with a tensor of shape (120,) of int64, your code uses `{used}`" in text
    assert monotonic() - start < 10
    engines.view.execute("tensor = torch.ones(3)\ncheats(counted, tensor)", block=True)
    assert [tensor.tolist() for tensor in engines.gather("tensor")] == [[4.0] * 3] * 4


def test_a_group_that_is_lost_is_told_with_the_repair(engines, monkeypatch):
    monkeypatch.setattr(checks, "PATIENCE_SECONDS", 1.0)
    text = fails(checks.check_ring, engines, "sums_in_one_that_is_hidden_from_checks")
    assert "your code took 5 s on rank 0" in text
    assert "run engines.offer_port(), then again the cell that forms the groups" in text


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (checks._Seen(exact=True, guarded=False), "rank 1 wrote beside its tensor"),
        (checks._Seen(exact=True, guarded=True, bits=1), "ranks 0 and 1 have sums of other bits"),
        (checks._Seen(exact=True, guarded=True, messages=3), "rank 1 sent 3 messages"),
    ],
)
def test_what_else_a_ring_must_not_do(second, text):
    first = checks._Seen(exact=True, guarded=True, sent=Counter({1: 16}))
    second.sent = Counter({0: 16})
    with pytest.raises(UnsolvedError, match=text):
        checks._require_ring([first, second], (4,), 4, "here")


# 3.3


def bandwidths(num_bytes, seconds, n):
    return num_bytes / seconds, num_bytes / seconds * 2 * (n - 1) / n


def seconds_of_ring(num_bytes, n, bus):
    return num_bytes * 2 * (n - 1) / n / bus


def test_the_right_bandwidths(capsys):
    checks.check_bandwidths(bandwidths, seconds_of_ring)
    assert "2 GPUs in 46.5 ms, 8 GPUs in 81.4 ms, 1024 GPUs in 92.9 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "two", "text"),
    [
        (lambda s, t, n: (s / t, 1.5 * s / t), seconds_of_ring, "the bus bandwidth"),  # for 4 ranks
        (lambda s, t, n: (s / t, 2 * s / t), seconds_of_ring, "the bus bandwidth"),
        (lambda s, t, n: (s / t, s / t * (n - 1) / n), seconds_of_ring, "the bus bandwidth"),
        (lambda s, t, n: bandwidths(s, t, n)[::-1], seconds_of_ring, "the algorithm bandwidth"),
        (lambda s, t, n: s / t, seconds_of_ring, "wanted the algorithm bandwidth and"),
        (bandwidths, lambda s, n, bus: s / bus, "and seconds_of_ring says"),
        (bandwidths, lambda s, n, bus: 81.4e-3, "and seconds_of_ring says"),
        (bandwidths, lambda s, n, bus: 2 * s / bus, "and seconds_of_ring says"),
    ],
)
def test_wrong_bandwidths(one, two, text):
    assert text in fails(checks.check_bandwidths, one, two)


# 3.4


def fit(sizes, seconds):
    rows = torch.tensor([[1 / t, s / t] for s, t in zip(sizes, seconds, strict=True)]).double()
    (xx, xy), (_, yy) = (rows.T @ rows).tolist()
    x, y = rows.sum(dim=0).tolist()
    alpha = (x * yy - y * xy) / (xx * yy - xy * xy)
    beta = (y * xx - x * xy) / (xx * yy - xy * xy)
    return alpha, beta, alpha / beta


def fit_by_descent(sizes, seconds):
    # Cramer's rule above; here one parameter after the other, until nothing changes
    alpha, beta = 0.0, 0.0
    for _ in range(20_000):
        pairs = list(zip(sizes, seconds, strict=True))
        above = sum((1 - beta * s / t) / t for s, t in pairs)
        alpha = above / sum(1 / t**2 for _, t in pairs)
        more = sum((1 - alpha / t) * s / t for s, t in pairs) / sum((s / t) ** 2 for s, t in pairs)
        if abs(more - beta) <= 1e-13 * more:
            break
        beta = more
    return alpha, beta, alpha / beta


@pytest.mark.parametrize("answer", [fit, fit_by_descent])
def test_two_fits_are_right(answer, capsys):
    checks.check_fit(answer)
    assert "No line is nearer" in capsys.readouterr().out


def in_seconds(sizes, seconds):
    rows = torch.tensor([[1.0, size] for size in sizes]).double()
    scale = rows.norm(dim=0)
    found = torch.linalg.lstsq(rows / scale, torch.tensor(seconds).double()[:, None]).solution
    alpha, beta = (found.flatten() / scale).tolist()
    return alpha, beta, alpha / beta


def ends_only(sizes, seconds):
    alpha, beta = seconds[0], seconds[-1] / sizes[-1]
    return alpha, beta, alpha / beta


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (in_seconds, "square the errors as parts of the times"),
        (ends_only, "the misfit of your line"),
        (lambda sizes, seconds: fit(sizes, seconds)[:2], "wanted alpha, beta and the size"),
        (lambda sizes, seconds: (*fit(sizes, seconds)[:2], 2.0**20), "both must be equal"),
        (lambda sizes, seconds: (*fit(sizes, seconds)[1::-1], 1.0), "the misfit of your line"),
    ],
)
def test_wrong_fits(answer, text):
    assert text in fails(checks.check_fit, answer)


# 3.5


def buckets(ready, sizes, alpha, beta):
    best = [(0.0, [])]
    for last in range(1, len(sizes) + 1):
        best.append(
            min(
                (max(best[k][0], ready[last - 1]) + alpha + beta * sum(sizes[k:last]),
                 [*best[k][1], last - k])
                for k in range(last)
            )
        )  # fmt: skip
    return best[-1][1]


def test_the_best_buckets(capsys):
    checks.check_buckets(buckets)
    assert "each gradient alone at 7.08 ms, all in one bucket at 4.43 ms" in capsys.readouterr().out


def of_equal_length(length):
    def answer(ready, sizes, alpha, beta):
        count = len(sizes)
        return [min(length, count - first) for first in range(0, count, length)]

    return answer


def of_25_mib(ready, sizes, alpha, beta):
    joined, in_this = [0], 0
    for size in sizes:
        if in_this > 25 * 2**20:
            joined, in_this = [*joined, 0], 0
        joined[-1] += 1
        in_this += size
    return joined


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (of_equal_length(1), "is possible"),
        (of_equal_length(200), "is possible"),
        *((of_equal_length(length), "is possible") for length in (2, 4, 8, 16)),
        (of_25_mib, "is possible"),
        (lambda ready, sizes, *_: buckets(ready, sizes, 38.4e-6, 1 / 357e9), "is possible"),
        (lambda *_: [148], "148 gradients in buckets, not 1"),
        (lambda *_: 4, "wanted a list of numbers"),
        (lambda ready, *_: [len(ready), 0], "wanted a list of numbers from 1 on"),
    ],
)
def test_wrong_buckets(answer, text):
    assert text in fails(checks.check_buckets, answer)


def test_buckets_that_take_too_long():
    def answer(*_):
        while True:
            pass

    with pytest.raises(UnsolvedError, match="did not end within"), checks._in_time("x", 0.2):
        answer()
