"""The checks of notebook 08 accept right answers, and say what is wrong with others."""

import pytest
import torch

from refdist.lab.exercises import UnsolvedError, weights

pytestmark = pytest.mark.xdist_group("engines")

SETUP = """
from itertools import zip_longest
from time import sleep
import torch
from refdist import StatelessProcessGroup
from refdist.weights import describe, receive_into, receive_weights, send_weights
group = StatelessProcessGroup.create(host, port, rank, world_size, listen_socket=listen_socket)
"""


@pytest.fixture(scope="module")
def engines(engines):
    engines.view.execute(SETUP, block=True)
    return engines


@pytest.fixture
def impatient(engines):
    """Engines on which a check gives up soon: for answers that let a rank wait in vain."""
    define(engines, "import refdist.lab.exercises.weights as checks")
    define(engines, "before = checks._SECONDS, checks._CALL_SECONDS")
    define(engines, "checks._SECONDS, checks._CALL_SECONDS = 2.0, 8.0")
    yield engines
    define(engines, "checks._SECONDS, checks._CALL_SECONDS = before")


def define(engines, source, *changes):
    """Define an answer on the engines, with changes, each of which is a pair of texts."""
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    engines.view.execute(source, block=True)


# 8.1


def cut(sizes, buffer_bytes):
    chunks, some = [], []
    for place in range(len(sizes)):
        some.append(place)
        if sum(sizes[n] for n in some) > buffer_bytes:
            chunks.append(some)
            some = []
    return [*chunks, some] if some else chunks


def cut_with_ranges(sizes, buffer_bytes):
    chunks, first, held = [], 0, 0
    for place, size in enumerate(sizes):
        held += size
        if held > buffer_bytes:
            chunks.append(range(first, place + 1))
            first, held = place + 1, 0
    if first < len(sizes):
        chunks.append(range(first, len(sizes)))
    return chunks


@pytest.mark.parametrize("answer", [cut, cut_with_ranges])
def test_a_right_cut_passes(capsys, answer):
    weights.check_cut(answer)
    told = capsys.readouterr().out
    assert "8.1 the chunks of a model: solved. 500 lists" in told
    assert "290 weights" in told and "1 with 1,024 MiB" in told


def stub(*_):
    raise NotImplementedError


def cut_when_full(sizes, buffer_bytes):
    return cut(sizes, buffer_bytes - 1)


def cut_before_it_is_too_much(sizes, buffer_bytes):
    chunks, some = [], []
    for place, size in enumerate(sizes):
        if some and sum(sizes[n] for n in some) + size > buffer_bytes:
            chunks.append(some)
            some = []
        some.append(place)
    return [*chunks, some] if some else chunks


def cut_without_the_rest(sizes, buffer_bytes):
    return [c for c in cut(sizes, buffer_bytes) if sum(sizes[n] for n in c) > buffer_bytes]


def cut_with_an_empty_chunk(sizes, buffer_bytes):
    return cut(sizes, buffer_bytes) or [[]]


def cut_without_empty_weights(sizes, buffer_bytes):
    return [chunk for chunk in cut(sizes, buffer_bytes) if sum(sizes[n] for n in chunk)]


def cut_of_small_ones(sizes, buffer_bytes):
    if len(sizes) > 100:
        return [list(range(len(sizes)))]
    return cut(sizes, buffer_bytes)


def cut_that_eats(sizes, buffer_bytes):
    found = cut(sizes, buffer_bytes)
    sizes.clear()
    return found


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stub, "not written yet"),
        (cut_when_full, r"cut\(\[4, 4, 4\], 8\) returned \[\[0, 1\], \[2\]\]; wanted: \[\[0, 1, 2"),
        (cut_before_it_is_too_much, r"cut\(\[4, 4, 4\], 10\) returned"),
        (cut_without_the_rest, "wanted"),
        (cut_with_an_empty_chunk, r"cut\(\[\], 8\)"),
        (cut_without_empty_weights, r"cut\(\[0, 0\], 8\)"),
        (cut_of_small_ones, "268,435,456 bytes came in 1 chunks; wanted: 4|in 1 chunks; wanted"),
        (cut_that_eats, "wanted"),
        (lambda sizes, buffer_bytes: None, "your code raised TypeError"),
    ],
)
def test_a_wrong_cut_is_refused(answer, told):
    with pytest.raises(UnsolvedError, match=told):
        weights.check_cut(answer)


# 8.2


def pack(tensors):
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def unpack(data, like):
    tensors, offset = [], 0
    for tensor in like:
        part = data[offset : offset + tensor.nbytes].clone()
        tensors.append(part.view(tensor.dtype).view(tensor.shape))
        offset += tensor.nbytes
    return tensors


def pack_into(tensors):
    data = torch.empty(sum(t.nbytes for t in tensors), dtype=torch.uint8)
    offset = 0
    for t in tensors:
        data[offset : offset + t.nbytes] = t.contiguous().view(-1).view(torch.uint8)
        offset += t.nbytes
    return data


def unpack_by_copies(data, like):
    parts = data.split([tensor.nbytes for tensor in like])
    found = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in like]
    for tensor, part in zip(found, parts, strict=True):
        tensor.view(-1).view(torch.uint8).copy_(part)
    return found


@pytest.mark.parametrize("answers", [(pack, unpack), (pack_into, unpack_by_copies)])
def test_a_right_pack_passes(capsys, answers):
    weights.check_pack(*answers)
    told = capsys.readouterr().out
    assert "8.2 tensors as bytes: solved." in told and "9 dtypes in 200 lists, bit by bit" in told


def by_values(tensors):
    return torch.cat([t.reshape(-1).to(torch.uint8) for t in tensors])


def in_memory_order(tensors):
    memories = [torch.tensor(t.untyped_storage().tolist(), dtype=torch.uint8) for t in tensors]
    return torch.cat([memory[: t.nbytes] for memory, t in zip(memories, tensors, strict=True)])


def last_first(tensors):
    return pack(tensors[::-1])


def with_gaps(tensors):
    found = []
    for t in tensors:
        found += [pack([t]), torch.zeros(-t.nbytes % 8, dtype=torch.uint8)]
    return torch.cat(found)


def as_floats(tensors):
    return torch.cat([t.reshape(-1).float() for t in tensors]).view(torch.uint8)


def a_list(tensors):
    return pack(tensors).tolist()


def not_contiguous(tensors):
    return torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])


def that_clears(tensors):
    data = pack(tensors)
    for tensor in tensors:
        tensor.zero_()
    return data


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stub, "not written yet"),
        (by_values, r"pack returned 6 bytes for float32 \(6,\); wanted: 24"),
        (in_memory_order, r"float32 \(3, 2\): byte 30 of 48 is wrong. .* row-major"),
        (last_first, "is wrong"),
        (with_gaps, "bytes for .* wanted"),
        (as_floats, "wanted"),
        (a_list, "pack returned a list for .* wanted: a uint8 tensor of one dimension"),
        (not_contiguous, "your code raised RuntimeError: .*stride"),
        (that_clears, "pack changed what it was given"),
    ],
)
def test_a_wrong_pack_is_refused(answer, told):
    with pytest.raises(UnsolvedError, match=told):
        weights.check_pack(answer, unpack)


def in_place(data, like):
    parts = data.split([tensor.nbytes for tensor in like])
    return [p.view(t.dtype).view(t.shape) for p, t in zip(parts, like, strict=True)]


def flat(data, like):
    return [tensor.view(-1) for tensor in unpack(data, like)]


def floats(data, like):
    return [tensor.float() for tensor in unpack(data, like)]


def one_less(data, like):
    return unpack(data, like)[:-1]


def into_like(data, like):
    for tensor, new in zip(like, unpack(data, like), strict=True):
        tensor.copy_(new)
    return like


def always_from_the_start(data, like):
    return [data[: t.nbytes].clone().view(t.dtype).view(t.shape) for t in like]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stub, "not written yet"),
        # torch looks at elements in place only where they are aligned
        (in_place, "your code raised RuntimeError: .*storage_offset|offset"),
        (flat, r"tensor 1 is a float32 tensor of shape \(6,\); wanted: .* \(3, 2\)"),
        (floats, r"wanted: a int64 tensor of shape \(\)"),
        (one_less, "returned 0 tensors"),
        (into_like, "unpack wrote to the tensors of `like`"),
        (always_from_the_start, "tensor 1 has other bits"),
    ],
)
def test_a_wrong_unpack_is_refused(answer, told):
    with pytest.raises(UnsolvedError, match=told):
        weights.check_pack(pack, answer)


# 8.3

SAME_ON_ALL = """
def same_on_all(metas, group):
    announced = group.broadcast_obj(metas, src=0)
    pairs = enumerate(zip_longest(metas, announced))
    objections = [f"{n}: {mine} is not {its}" for n, (mine, its) in pairs if mine != its]
    everyones = group.all_gather_obj(objections[:1])
    texts = [f"rank {rank}: {told[0]}" for rank, told in enumerate(everyones) if told]
    if texts:
        raise ValueError(". ".join(texts))
"""

# each rank compares all lists
BY_ONE_GATHER = """
def same_on_all(metas, group):
    texts, everyones = [], group.all_gather_obj(metas)
    for rank, other in enumerate(everyones):
        for there, here in zip_longest(everyones[0], other):
            if there != here:
                texts.append(f"rank {rank}: {here}, not {there}")
                break
    if texts:
        raise ValueError("; ".join(texts))
"""


@pytest.mark.parametrize("source", [SAME_ON_ALL, BY_ONE_GATHER])
def test_a_right_comparison_passes(engines, capsys, source):
    define(engines, source)
    weights.check_same_on_all(engines)
    assert "8.3 one order on all ranks: solved. 9 cases" in capsys.readouterr().out


ONLY_MINE = """
    if objections:
        raise ValueError(f"rank {group.rank}: {objections[0]}")
    group.barrier()
"""
AFTER = SAME_ON_ALL[SAME_ON_ALL.index("    everyones") :]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("    announced", "    raise NotImplementedError\n    announced")], "not written"),
        # the others wait for a rank that has raised
        ([(AFTER, ONLY_MINE)], "rank 0 BarrierError|rank 2 BarrierError|rank 0 returned None"),
        ([("mine != its", "False")], "rank 0 returned None .* wanted: a ValueError"),
        # the order of names, or what has the names, is not compared
        ([("(metas, announced)", "(sorted(metas), sorted(announced))")], "exchanges two weights"),
        ([("mine != its", "mine and its and mine[0] != its[0]")], "rank 3 has another dtype"),
        ([("mine != its", "mine and its and mine[::2] != its[::2]")], "transposed"),
        ([("mine != its", "mine and its and mine != its")], "lacks the last weight"),
        ([("zip_longest(metas, announced)", "zip_longest(metas, announced[:5])"),
          ("mine != its", "mine and mine != its")], "lacks the last weight"),
        ([("mine != its", "its and mine != its")], "has a weight more"),
        ([("raise ValueError", "raise RuntimeError")], "wanted: a ValueError"),
        ([("rank {rank}: {told[0]}", "{told[0]}")], 'whose text names "rank 1"'),
        ([("{told[0]}", "differs")], "names .* and 'query.weight'"),
        ([("enumerate(everyones) if told", "enumerate(everyones)"),
          ("{told[0]}", "{told}")], "all expect the same: rank 0 ValueError"),
        ([('(". ".join', '("not rank 2. " + ". ".join')], "without rank 2"),
        ([("    texts", "    group.barrier()\n    texts")], "a rank made 3 calls"),
        ([("    announced", "    sleep(60)\n    announced")], "did not end within"),
    ],
)  # fmt: skip
def test_a_wrong_comparison_is_refused(impatient, changes, told):
    define(impatient, SAME_ON_ALL, *changes)
    with pytest.raises(UnsolvedError, match=told):
        weights.check_same_on_all(impatient)


# 8.4

HAND_OVER = """
def hand_over(model, communicator, group, timeout=5.0):
    weights, came = model.state_dict(), True
    try:
        if group.rank == 0:
            send_weights(weights, communicator, packed=False, timeout=timeout)
        else:
            metas = describe(weights)
            spare = dict(receive_weights(metas, communicator, 0, packed=False, timeout=timeout))
    except RuntimeError:
        came = False
    everywhere = all(group.all_gather_obj(came))
    if everywhere and group.rank != 0:
        model.load_state_dict(spare)
    return everywhere
"""

# receives in place, and puts the old ones back
WITH_A_COPY = """
def hand_over(model, communicator, group, timeout=5.0):
    weights = model.state_dict()
    old = {name: tensor.clone() for name, tensor in weights.items()}
    try:
        if group.rank == 0:
            send_weights(weights, communicator, packed=False, timeout=timeout)
        else:
            receive_into(weights, communicator, 0, packed=False, timeout=timeout)
        came = True
    except RuntimeError:
        came = False
    if all(group.all_gather_obj(came)):
        return True
    model.load_state_dict(old)
    return False
"""


@pytest.mark.parametrize("source", [HAND_OVER, WITH_A_COPY])
def test_a_right_hand_over_passes(engines, capsys, source):
    define(engines, source)
    weights.check_hand_over(engines)
    assert "8.4 all of them or none: solved. 14 hand-overs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("    weights,", "    raise NotImplementedError\n    weights,")], "not written"),
        # half of the weights
        ([("spare = dict(receive_weights(metas, communicator, 0, packed",
           "receive_into(weights, communicator, 0, packed"),
          ("timeout=timeout))", "timeout=timeout)"),
          ("model.load_state_dict(spare)", "pass")],
         r"breaks before weight . of 4: rank [12] has .* wanted: 7 everywhere"),
        # each rank for itself
        ([("all(group.all_gather_obj(came))", "came")], "breaks before weight .* wanted: False"),
        ([("if everywhere and", "if came and")], "rank [12] has .* wanted: 7 everywhere"),
        ([("if everywhere and group.rank != 0", "if False")], "nothing breaks: rank 1 has"),
        ([("except RuntimeError", "except ZeroDivisionError")], "wanted: False on every rank"),
        ([("return everywhere", "return came")], "wanted: False on every rank"),
        ([("model.load_state_dict(spare)", "model.load_state_dict(spare, assign=True)")],
         "in other memory than before"),
        ([("came = False", "came = group.rank == 2")], "wanted: False"),
    ],
)  # fmt: skip
def test_a_wrong_hand_over_is_refused(impatient, changes, told):
    define(impatient, HAND_OVER, *changes)
    with pytest.raises(UnsolvedError, match=told):
        weights.check_hand_over(impatient)
