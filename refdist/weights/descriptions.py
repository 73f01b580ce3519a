"""Descriptions of weights, as plain data, and what two of them differ in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch

WeightMeta = tuple[str, tuple[int, ...], str]
"""A name, a shape, and the name of a dtype, such as ``("lm_head", (151936, 896), "bfloat16")``."""

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
"""Weights: a ``state_dict()``, or pairs of a name and a tensor, such as ``named_parameters()``."""


class WeightsMismatchError(RuntimeError):
    """Ranks, or a rank and its own description, do not mean the same weights. The text says how."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A named tensor on its way.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype.
        tensor: on the source, what is sent; on another rank, where it is to go, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: torch.Tensor | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def meta(self) -> WeightMeta:
        """Its description."""
        return self.name, self.shape, str(self.dtype).removeprefix("torch.")


def describe(weights: NamedTensors) -> list[WeightMeta]:
    """What ``receive_weights`` needs to know of weights: name, shape and dtype of each, in order.

    The result is made of lists, tuples, str and int alone. So ``group.broadcast_obj`` can carry it
    in every mode, and JSON can too.

    Raises:
        ValueError: a pair is not a name and a dense tensor with content, or a name comes twice.
    """
    return [weight.meta for weight in all_weights_of(weights)]


def pairs_of(weights: NamedTensors) -> Iterable[tuple[str, torch.Tensor]]:
    """Weights as pairs."""
    return weights.items() if isinstance(weights, Mapping) else weights


def all_weights_of(weights: NamedTensors) -> list[Weight]:
    """Weights that are all there, as records.

    Raises:
        ValueError: as ``describe``.
    """
    found = [weight_of(pair, number) for number, pair in enumerate(pairs_of(weights))]
    _check_names(found)
    return found


def weight_of(pair: Any, number: int) -> Weight:
    """The record of a pair of a name and a tensor.

    Raises:
        ValueError: it is no such pair, or the tensor has no memory of its own, one element after
            the other: it is sparse or quantized, on the meta device, or distributed.
    """
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"weight {number} is {pair!r:.80}: must be a tuple of a name and a tensor")
    name, tensor = pair
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"weight {number}, {name!r}: is {tensor!r:.80}, and must be a tensor")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"weight {name!r}: holds a part on each rank; send its full_tensor()")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(
            f"weight {name!r} of {tensor.dtype}, {tensor.layout}, on {tensor.device}: must be "
            f"dense, not quantized, and have content"
        )
    return Weight(name, tuple(tensor.shape), tensor.dtype, tensor.detach())


def weights_of_metas(metas: Iterable[Any]) -> list[Weight]:
    """The records of descriptions. The dtype may also be a ``torch.dtype``.

    Raises:
        ValueError: one is not a name, a shape and a dtype, or a name comes twice.
    """
    found = [_weight_of_meta(meta, number) for number, meta in enumerate(metas)]
    _check_names(found)
    return found


def _weight_of_meta(meta: Any, number: int) -> Weight:
    rule = "must be a name, a shape and a dtype, as describe() gives them"
    try:
        name, shape, dtype = meta
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"description {number} is {meta!r:.80}: {rule}") from None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    right = isinstance(name, str) and isinstance(dtype, torch.dtype) and min(sizes, default=0) >= 0
    if not right or isinstance(shape, str):
        raise ValueError(f"description {number} is {meta!r:.80}: {rule}")
    return Weight(name, sizes, dtype)


def _check_names(weights: Sequence[Weight]) -> None:
    seen: dict[str, int] = {}
    for number, weight in enumerate(weights):
        if seen.setdefault(weight.name, number) != number:
            raise ValueError(
                f"name {weight.name!r}: is that of weights {seen[weight.name]} and {number}; each "
                f"name must come once"
            )


def difference_at(number: int, here: Weight | None, there: Weight | None, whose: str) -> str | None:
    """How weight ``number`` of ``whose`` differs from the one here; None if it does not."""
    if here is there or (here and there and here.meta == there.meta):
        return None
    return f"weight {number} is {_told(here)} here, and {_told(there)} {whose}"


def first_difference(here: Sequence[Weight], there: Sequence[Weight], whose: str) -> str | None:
    """How the weights of ``whose`` differ from those here; None if they do not.

    Tells of the first weight that differs, and of names that only one side has.
    """
    pairs = enumerate(zip_longest(here, there))
    found = (difference_at(number, a, b, whose) for number, (a, b) in pairs)
    first = next(filter(None, found), None)
    if first is None:
        return None
    mine, theirs = ({weight.name for weight in side} for side in (here, there))
    names = [
        f"only {where}: {_some(names)}"
        for where, names in (("here", mine - theirs), (whose, theirs - mine))
        if names
    ]
    if not names and [weight.name for weight in here] != [weight.name for weight in there]:
        names = ["the names are the same in another order"]
    return "; ".join([first, *names])


def _told(weight: Weight | None) -> str:
    if weight is None:
        return "none"
    name, shape, dtype = weight.meta
    return f"{name!r} of shape {shape} and {dtype}"


def _some(names: set[str]) -> str:
    few = ", ".join(map(repr, sorted(names)[:3]))
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"
