"""Splitting numbers and tensors evenly, as tensor parallelism does."""

from collections.abc import Sequence

import torch


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Check that ``denominator`` divides ``numerator``.

    Raises:
        AssertionError: it does not. Callers rely on this type, and ``python -O`` keeps it.
        ValueError: ``denominator`` is 0.

    Source: the specification of ``vllm.distributed.utils``.
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

    Source: the specification of ``vllm.distributed.utils``.
    """
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def verify_group_size_divides_partition(
    input_size_per_partition: int,
    group_size: int,
    layer_name: str | None = None,
    extra_suggestion: str = "",
) -> None:
    """Check that the part of a layer's input which a rank holds is whole quantisation groups.

    Weights that are quantised in groups have one scale for each ``group_size`` inputs. A group
    that lay on two ranks would have no scale of its own on either.

    Args:
        input_size_per_partition: inputs of the layer on each rank.
        group_size: inputs per group; -1, one group for all of them, always divides.
        layer_name: for the error.
        extra_suggestion: for the error; continues "use a smaller tensor_parallel_size" as it is.

    Raises:
        ValueError: ``group_size`` does not divide ``input_size_per_partition``, or is 0.

    Source: ``vllm.distributed.utils`` of vLLM 0.27 to 0.33.
    """
    if group_size == 0:
        raise ValueError("group_size=0: a quantisation group must have at least one input")
    if input_size_per_partition % group_size != 0:
        layer = f" of layer {layer_name!r}" if layer_name else ""
        raise ValueError(
            f"input_size_per_partition={input_size_per_partition}{layer}: must be a multiple of "
            f"group_size={group_size}, so that each rank holds whole quantisation groups; "
            f"use a smaller tensor_parallel_size{extra_suggestion}"
        )


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

    Source: the specification of ``vllm.distributed.utils``.
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


def is_weak_contiguous(inp: torch.Tensor) -> bool:
    """Whether a tensor's memory is one block that a kernel may read from its first byte on.

    True for a contiguous tensor, and for one (a transpose, say) whose storage ends exactly
    ``numel`` elements after its first element, whatever the order of the dimensions.
    ``inp`` may have any shape, dtype and device.

    Source: ``vllm.distributed.utils`` of vLLM 0.27 to 0.33.
    """
    if inp.is_contiguous():
        return True
    bytes_to_end = inp.untyped_storage().nbytes() - inp.storage_offset() * inp.element_size()
    # in the annotations of torch 2.15 a size may be a symbol
    return bool(bytes_to_end == inp.numel() * inp.element_size())
