"""nccl4py, which is imported when it is first needed, and what NCCL can do."""

import importlib
from functools import cache
from typing import Any

import torch
from torch.distributed import ReduceOp

SUCCESS, IN_PROGRESS = 0, 7
"""Two values of ``ncclResult_t``, from nccl.h. Most others are errors."""

DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        "int8", "uint8", "int32", "uint32", "int64", "uint64",
        "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
    )
)  # fmt: skip
"""The dtypes of ``ncclDataType_t``. Arithmetic with float8 needs a GPU of Hopper or later."""

_OPS: dict[Any, str] = {
    ReduceOp.SUM: "SUM",
    ReduceOp.PRODUCT: "PROD",
    ReduceOp.MIN: "MIN",
    ReduceOp.MAX: "MAX",
    ReduceOp.AVG: "AVG",
}


@cache
def load() -> Any:
    """``nccl.core``, the module of nccl4py. It uses the libnccl that torch has loaded.

    Raises:
        ImportError: it cannot be imported.
    """
    try:
        return importlib.import_module("nccl.core")
    except ImportError as error:
        raise ImportError(
            f"refdist.nccl needs nccl4py ({error}): pip install nccl4py cuda-bindings"
        ) from error


def check_device(device: int | str | torch.device) -> torch.device:
    """A CUDA device with its index; the current one if ``device`` has none.

    Raises:
        ValueError: torch finds no CUDA GPU, or not this one.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: needs a CUDA GPU, and torch finds none")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r}: must be a CUDA device, such as 'cuda:0'") from None
    if found.type != "cuda":
        raise ValueError(f"device={str(device)!r}: must be a CUDA device, such as 'cuda:0'")
    index = torch.cuda.current_device() if found.index is None else found.index
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"device={str(device)!r}: must be in cuda:0..cuda:{count - 1}")
    return torch.device("cuda", index)


def reduction(operation: str, op: Any) -> str:
    """The name that nccl4py gives to a reduction of torch.

    Raises:
        ValueError: NCCL has none.
    """
    kind = getattr(op, "op", op)  # ReduceOp.SUM, or an object ReduceOp(ReduceOp.SUM)
    name = _OPS.get(kind) if isinstance(kind, ReduceOp.RedOpType) else None
    if name is None:
        raise ValueError(
            f"{operation}: op={op!r}: must be SUM, PRODUCT, MIN, MAX or AVG of ReduceOp"
        )
    return name
