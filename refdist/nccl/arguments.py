"""Checks of the arguments of operations, made before NCCL sees them.

NCCL itself checks little: a tensor on another device or with gaps ends in an error of CUDA, which
ends the use of the GPU in this process, or in wrong numbers. Each function raises ValueError.
"""

import torch

from refdist.nccl.library import DTYPES


def check_tensor(operation: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """The tensor is one block on ``device``, of a dtype that NCCL has."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{operation}: {name} is {tensor!r:.60}; it must be a tensor")
    if tensor.device != device:
        raise ValueError(
            f"{operation}: {name} is on {tensor.device}; it must be on {device}, the device of "
            f"this communicator"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{operation}: {name} has dtype {tensor.dtype}, which NCCL lacks; to move it "
            f"unchanged, pass its view(torch.uint8)"
        )
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"{operation}: {name} with shape {tuple(tensor.shape)} and strides {tensor.stride()} "
            f"is not contiguous; pass its contiguous()"
        )


def check_like(
    operation: str,
    name: str,
    tensor: torch.Tensor,
    part_name: str,
    part: torch.Tensor,
    times: int = 1,
) -> None:
    """The tensor has the dtype of ``part``, and ``times`` as many elements."""
    if tensor.dtype != part.dtype:
        raise ValueError(
            f"{operation}: {name} has dtype {tensor.dtype}, and {part_name} has {part.dtype}; they "
            f"must be the same"
        )
    if tensor.numel() != times * part.numel():
        raise ValueError(
            f"{operation}: {name} has {tensor.numel()} elements, and {part_name} has "
            f"{part.numel()}; {name} must have {times} times as many"
        )


def check_stream(operation: str, stream: torch.cuda.Stream, device: torch.device) -> None:
    """The stream is one of ``device``."""
    if not isinstance(stream, torch.cuda.Stream):
        raise ValueError(f"{operation}: stream={stream!r}: must be a torch.cuda.Stream, or None")
    if stream.device != device:
        raise ValueError(
            f"{operation}: stream is on {stream.device}; it must be on {device}, the device of "
            f"this communicator"
        )
