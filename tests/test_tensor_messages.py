"""Tensors as messages of a StatelessProcessGroup: which kinds travel, and which are refused."""

import pytest
import torch
from ranks import run_ranks

DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


def _same(tensor, other):
    return torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


def _make(dtype, count):
    """A tensor with some bits in it; None where torch has no such tensors, or cannot copy them."""
    torch.manual_seed(count)
    try:
        tensor = torch.empty(count, dtype=dtype)
        raw = torch.randint(0, 2, (count * tensor.element_size(),), dtype=torch.uint8)
        torch.empty(1, dtype=dtype).clone()
        return raw.view(dtype)
    except RuntimeError:
        return None


# A small tensor is in the pickle, and the memory of a large one is apart from it.


def _send_all(here, count):
    sent = []
    with here.group() as group:
        for dtype in DTYPES:
            tensor = _make(dtype, count)
            if tensor is None:
                continue
            if here.rank == 0:
                group.send(tensor, 1)
                group.broadcast(tensor, 0)
            else:
                received, spread = torch.empty_like(tensor), torch.empty_like(tensor)
                group.recv(received, 0)
                group.broadcast(spread, 0)
                assert _same(received, tensor) and _same(spread, tensor), dtype
            sent.append(str(dtype))
    return sent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [0, 5, 80_000])
def test_every_dtype_that_torch_copies(count):
    sent, received = run_ranks(_send_all, 2, count)
    assert sent == received
    new = {"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex32"}
    assert {f"torch.{name}" for name in new | {"float32", "bool", "bfloat16"}} <= set(sent)


# Views travel as what they show, and are filled so.


def _send_views(here):
    with here.group() as group:
        tensor = torch.tensor([[1 + 2j, 3], [here.rank * 1j, 5]])
        if here.rank == 0:
            group.send(tensor.mH, 1)
            group.send(torch._neg_view(tensor.real), 1)
        else:
            group.recv(tensor.mH, 0)
            after = torch.zeros(2, 2)
            group.recv(torch._neg_view(after), 0)
            assert after.tolist() == [[1, 3], [0, 5]]
        shown = tensor.clone().mH
        group.broadcast(shown if here.rank == 0 else tensor, 1)
        total = group.all_reduce(tensor.clone().mH)
    return tensor.tolist(), shown.tolist(), total.tolist()


def test_views():
    (zero, shown, total), (one, _, same) = run_ranks(_send_views, 2)
    assert zero == [[1 + 2j, 3], [0, 5]]
    # rank 1's tensor is now rank 0's adjoint, seen through its own: the same
    assert one == shown == zero
    assert total == same == [[2 - 4j, 0], [6, 10]]


# What torch cannot copy is refused by the sender. The group is as before.

REFUSED = {
    "torch.sparse_coo": lambda: torch.eye(2).to_sparse(),
    "torch.sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "torch.int4": lambda: torch.empty(2, dtype=torch.int4),
}


def _refuse(here, named, dtype_is_there):
    with here.group() as group:
        if here.rank == 0 and dtype_is_there:
            for run in (lambda t: group.send(t, 1), lambda t: group.broadcast(t, 0)):
                with pytest.raises(ValueError, match=rf"^tensor of .*{named}.*: must be dense"):
                    run(REFUSED[named]())
        tensor = torch.full((2,), here.rank)
        group.broadcast(tensor, 1)
        return tensor.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", REFUSED)
def test_what_torch_cannot_copy(named):
    there = hasattr(torch, named.removeprefix("torch."))
    assert run_ranks(_refuse, 2, named, there) == [[1, 1]] * 2
