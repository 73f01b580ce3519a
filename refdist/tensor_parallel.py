"""Splitting numbers and tensors evenly, as tensor parallelism does."""

from collections.abc import Sequence

import torch


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Check that ``denominator`` divides ``numerator``.

    Raises:
        AssertionError: it does not. Callers rely on this type, and ``python -O`` keeps it.
        ValueError: ``denominator`` is 0.
    """
    if denominator == 0:
        raise ValueError(f"denominator=0: cannot divide {numerator} by it")
    if numerator % denominator != 0:
        raise AssertionError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """``numerator / denominator``, for numbers that divide without a remainder.

    Raises:
        AssertionError: ``denominator`` does not divide ``numerator``.
        ValueError: ``denominator`` is 0.
    """
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_along_last_dim(
    tensor: torch.Tensor,
    num_partitions: int,
    contiguous_split_chunks: bool = False,
) -> Sequence[torch.Tensor]:
    """Split a tensor into equal parts along its last dimension.

    Args:
        tensor: shape ``(..., n)``, at least one dimension, any dtype and device.
        num_partitions: number of parts, at least 1; must divide ``n``.
        contiguous_split_chunks: copy each part to contiguous memory where it is not already.

    Returns:
        ``num_partitions`` tensors of shape ``(..., n / num_partitions)``. They are views of
        ``tensor`` unless contiguous parts are asked for.

    Raises:
        AssertionError: ``num_partitions`` does not divide ``n``.
        ValueError: ``tensor`` has no dimension, or ``num_partitions`` is below 1.
    """
    if tensor.dim() == 0:
        raise ValueError("tensor: has no dimension to split; it must have at least one")
    if num_partitions < 1:
        raise ValueError(f"num_partitions={num_partitions}: must be at least 1")
    part_size = divide(tensor.size(-1), num_partitions)
    # narrow, not split: it also works for a last dimension of size 0
    parts = tuple(tensor.narrow(-1, i * part_size, part_size) for i in range(num_partitions))
    if contiguous_split_chunks:
        return tuple(part.contiguous() for part in parts)
    return parts


def is_weak_contiguous(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is one block that a kernel may read from its first byte on.

    True for a contiguous tensor, and for one (a transpose, say) whose storage ends exactly
    ``numel`` elements after its first element, whatever the order of the dimensions.
    """
    if tensor.is_contiguous():
        return True
    bytes_to_end = (
        tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    )
    # in the annotations of torch 2.15 a size may be a symbol
    return bool(bytes_to_end == tensor.numel() * tensor.element_size())
