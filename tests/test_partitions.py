"""Pure functions: layers over stages, tensors over ranks, and yielding the processor."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refdist import (
    USE_SCHED_YIELD,
    divide,
    ensure_divisibility,
    get_pp_indices,
    is_weak_contiguous,
    sched_yield,
    split_tensor_along_last_dim,
    tensor_parallel,
)

VARIABLE = "VLLM_PP_LAYER_PARTITION"


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def partition(num_layers, pp_size):
    """How many layers each stage has; the ranges must follow each other."""
    ranges = [get_pp_indices(num_layers, rank, pp_size) for rank in range(pp_size)]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == num_layers
    return [end - start for start, end in ranges]


# The partitions of pipelines in the field, written by hand.


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (61, [7, 7, 8, 8, 8, 8, 8, 7]),
        (94, [23, 24, 24, 23]),
        (80, [13, 13, 13, 14, 14, 13]),
        (32, [8, 8, 8, 8]),
        (126, [31, 32, 32, 31]),
        (62, [15, 16, 16, 15]),
        (5, [1, 1, 2, 1]),
        (6, [1, 2, 2, 1]),
        (7, [2, 2, 2, 1]),
        (3, [1, 1, 1, 0]),
        (2, [0, 1, 1, 0]),
        (1, [0, 0, 1, 0]),
        (0, [0, 0, 0, 0]),
        (7, [4, 3]),
        (11, [4, 4, 3]),
        (10, [3, 4, 3]),
        (9, [9]),
    ],
)
def test_known_partitions(num_layers, expected):
    assert partition(num_layers, len(expected)) == expected


def remainder_by_hand(num_layers, pp_size):
    """The rule of the specification as a deal: one layer each to the stages in order of claim."""
    claims = [*range(pp_size - 2, -1, -1), pp_size - 1]  # before the last one backwards; it is last
    sizes = dict.fromkeys(range(pp_size), 0)
    for _ in range(num_layers // pp_size):
        for stage in claims:
            sizes[stage] += 1
    for stage in claims[: num_layers % pp_size]:
        sizes[stage] += 1
    return [sizes[stage] for stage in range(pp_size)]


def test_every_partition_up_to_200_layers_and_32_stages():
    for pp_size in range(1, 33):
        for num_layers in range(201):
            sizes = partition(num_layers, pp_size)
            assert sizes == remainder_by_hand(num_layers, pp_size)
            # the properties that the specification names
            assert max(sizes) - min(sizes) <= 1
            remainder = num_layers % pp_size
            assert sizes[-1] == min(sizes)
            if pp_size > 2 and 0 < remainder <= pp_size - 2:
                assert sizes[0] == min(sizes)
                middle = sizes[1:-1]
                assert sum(middle) - len(middle) * min(sizes) == remainder
                assert middle == sorted(middle)


def test_override(monkeypatch):
    monkeypatch.setenv(VARIABLE, "5,0,10,6")
    assert partition(21, 4) == [5, 0, 10, 6]
    assert get_pp_indices(21, 2, 4) == (5, 15)
    monkeypatch.setenv(VARIABLE, " 1, 2 ")
    assert partition(3, 2) == [1, 2]
    monkeypatch.delenv(VARIABLE)
    assert partition(3, 2) == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5", "has 1 entries, but pp_size=4"),
        ("a,b,c,d", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5,5,5,", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5,5,,5", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5;5;5;5", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5.0,5,5,5", "must be integers separated by commas, such as '15,15,16,15'"),
        ("5,5,5", "has 3 entries, but pp_size=4"),
        ("4,4,4,4,4", "has 5 entries, but pp_size=4"),
        ("5,5,5,6", "sums to 21, but num_hidden_layers=20"),
        ("0,0,0,0", "sums to 0, but num_hidden_layers=20"),
        ("-1,7,7,7", "no stage can hold -1 layers"),
    ],
)
def test_malformed_override(monkeypatch, text, message):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{VARIABLE}={text!r}: {message}')}$"):
        get_pp_indices(20, 0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1), "num_hidden_layers=-1: must be at least 0"),
        ((4, 0, 0), "pp_size=0: must be at least 1"),
        ((4, 0, -2), "pp_size=-2: must be at least 1"),
        ((4, 2, 2), "pp_rank=2: must be in 0..1 (pp_size=2)"),
        ((4, -1, 2), "pp_rank=-1: must be in 0..1 (pp_size=2)"),
    ],
)
def test_bad_partition_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_pp_indices(*arguments)


# Division.


@given(st.integers(-(10**6), 10**6), st.integers(-(10**3), 10**3))
def test_divide(numerator, denominator):
    if denominator == 0:
        for function in (divide, ensure_divisibility):
            with pytest.raises(ValueError, match=f"denominator=0: cannot divide {numerator} by it"):
                function(numerator, denominator)
    elif numerator % denominator:
        for function in (divide, ensure_divisibility):
            with pytest.raises(
                AssertionError, match=f"^{numerator} is not divisible by {denominator}$"
            ):
                function(numerator, denominator)
    else:
        assert ensure_divisibility(numerator, denominator) is None
        assert divide(numerator, denominator) * denominator == numerator
        assert isinstance(divide(numerator, denominator), int)


# python -O removes assert statements; the check stays, as the error type that callers rely on.
def test_divisibility_is_checked_under_optimisation():
    path = Path(tensor_parallel.__file__)
    source = path.read_text() + "\ndebug = __debug__\n"
    names = {"__name__": "optimised"}
    exec(compile(source, path, "exec", optimize=1), names)  # as python -O compiles it
    assert names["debug"] is False
    with pytest.raises(AssertionError, match=r"^7 is not divisible by 2$"):
        names["ensure_divisibility"](7, 2)


# Splitting: the parts are equal, in order, and together the tensor; views unless asked otherwise.

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    num_partitions=st.integers(1, 6),
    part_size=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    contiguous=st.booleans(),
)
def test_split(leading, num_partitions, part_size, dtype, transposed, contiguous):
    shape = torch.Size([*leading, num_partitions * part_size])
    tensor = torch.arange(shape.numel()).to(dtype)
    if transposed:
        tensor = tensor.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    else:
        tensor = tensor.reshape(shape)
    parts = split_tensor_along_last_dim(tensor, num_partitions, contiguous)
    assert len(parts) == num_partitions
    assert all(part.shape == (*leading, part_size) for part in parts)
    assert all(part.dtype == dtype for part in parts)
    joined = torch.cat(list(parts), dim=-1)
    assert joined.shape == tensor.shape
    assert torch.equal(joined, tensor)
    own_storage = tensor.untyped_storage().data_ptr()
    for index, part in enumerate(parts):
        if contiguous:
            assert part.is_contiguous()
        else:
            assert part.untyped_storage().data_ptr() == own_storage
            assert part.stride() == tensor.stride()
            if part.numel():
                first = tensor[..., index * part_size]
                assert part[..., 0].data_ptr() == first.data_ptr()


def test_split_gives_views_by_default_and_copies_on_request():
    tensor = torch.arange(8).reshape(2, 4)
    views = split_tensor_along_last_dim(tensor, 2)
    copies = split_tensor_along_last_dim(tensor, 2, contiguous_split_chunks=True)
    tensor[0, 0] = 100
    assert views[0][0, 0] == 100
    assert copies[0][0, 0] == 0
    assert [view.is_contiguous() for view in views] == [False, False]


def test_split_is_differentiable():
    tensor = torch.ones(2, 4, requires_grad=True)
    parts = split_tensor_along_last_dim(tensor, 2)
    (parts[1] * 3).sum().backward()
    assert tensor.grad.tolist() == [[0, 0, 3, 3]] * 2


def test_split_on_another_device():
    parts = split_tensor_along_last_dim(torch.empty(3, 4, device="meta"), 4)
    assert [(part.shape, part.device.type) for part in parts] == [((3, 1), "meta")] * 4


def test_bad_split():
    with pytest.raises(AssertionError, match=r"^7 is not divisible by 2$"):
        split_tensor_along_last_dim(torch.zeros(4, 7), 2)
    with pytest.raises(ValueError, match=r"^tensor: has no dimension to split"):
        split_tensor_along_last_dim(torch.tensor(1), 1)
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"^num_partitions={number}: must be at least 1$"):
            split_tensor_along_last_dim(torch.zeros(4), number)


# Weakly contiguous: the memory from the first element to the end of the storage is the tensor's.

BASE = torch.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (BASE, True),
        (BASE[1], True),
        (BASE[:2], True),  # contiguous, although the storage goes on
        (BASE.t(), True),
        (BASE[2:].t(), True),  # up to the end of the storage
        (BASE[:2].t(), False),  # the storage goes on
        (BASE[:, :3], False),
        (BASE[:, 3:], False),
        (BASE[::2], False),
        (torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1), True),
        (torch.arange(3).expand(2, 3), False),
        (torch.tensor(1.0), True),
        (torch.empty(0), True),
    ],
)
def test_is_weak_contiguous(tensor, expected):
    assert is_weak_contiguous(tensor) is expected


# Yielding.


def test_use_sched_yield_follows_the_version():
    release = sys.version_info[:3]
    assert USE_SCHED_YIELD is (release >= (3, 11, 1) or (3, 10, 8) <= release < (3, 11))


def test_sched_yield_uses_what_is_safe(monkeypatch):
    import refdist.polling

    calls = []
    monkeypatch.setattr(os, "sched_yield", lambda: calls.append("sched_yield"), raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append(seconds))
    monkeypatch.setattr(refdist.polling, "USE_SCHED_YIELD", True)
    assert sched_yield() is None
    monkeypatch.setattr(refdist.polling, "USE_SCHED_YIELD", False)
    sched_yield()
    monkeypatch.setattr(refdist.polling, "USE_SCHED_YIELD", True)
    monkeypatch.delattr(os, "sched_yield")
    sched_yield()
    assert calls == ["sched_yield", 0, 0]


# Python would read these as 10 and 5; the override takes plain digits only.


@pytest.mark.parametrize("text", ["1_0,0", "\N{ARABIC-INDIC DIGIT FIVE},5", "5.0,5"])
def test_override_takes_plain_digits(monkeypatch, text):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", text)
    with pytest.raises(ValueError, match="must be integers separated by commas"):
        get_pp_indices(10, 0, 2)


def test_numbers_must_be_integers():
    with pytest.raises(ValueError, match="num_hidden_layers='10': must be an integer, not str"):
        get_pp_indices("10", 0, 2)
    with pytest.raises(ValueError, match=r"pp_rank=0\.0: must be an integer, not float"):
        get_pp_indices(10, 0.0, 2)
