"""Names, shapes and dtypes of weights, on which all ranks agree before anything moves."""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any

import torch

from refdist.checks import check_integer, check_rank
from refdist.errors import MessageError, name_ranks
from refdist.group import StatelessProcessGroup

BUFFER_BYTES = 2**30
"""The size at which vLLM flushes a buffer, unless it is told another."""

WeightMeta = tuple[str, tuple[int, ...], str]
"""A name, a shape, and the name of a dtype, such as ``("lm_head", (151936, 896), "bfloat16")``."""

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
"""Weights: a ``state_dict()``, or pairs of a name and a tensor, such as ``named_parameters()``."""


@dataclass(slots=True, eq=False)
class Weight:
    """A named tensor on its way.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype.
        tensor: on the source, what is sent; on another rank, where it is to go, or None.
        num_bytes: bytes of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: torch.Tensor | None = None
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = math.prod(self.shape) * self.dtype.itemsize

    @property
    def meta(self) -> WeightMeta:
        """Its description."""
        return self.name, self.shape, str(self.dtype).removeprefix("torch.")

    @property
    def told(self) -> str:
        """Its description, as text."""
        return "{!r} of shape {} and {}".format(*self.meta)


def describe(weights: NamedTensors) -> list[WeightMeta]:
    """Describe weights for ``receive_weights``: name, shape and dtype of each, in order.

    The result is made of lists, tuples, str and int alone. So ``group.broadcast_obj`` can carry it
    in every mode, and JSON can too.

    Raises:
        ValueError: a pair is not a name and a dense tensor with content, or a name comes twice.
    """
    return [weight.meta for weight in weights_of(weights)]


def agree(
    metas: Iterable[WeightMeta] | None,
    group: StatelessProcessGroup,
    src: int,
    *,
    packed: bool = True,
    buffer_bytes: int = BUFFER_BYTES,
    timeout: float | None = None,
) -> list[WeightMeta]:
    """Compare what every rank of a group expects with what rank ``src`` is going to send.

    In the format of the weights themselves nothing tells which is which. So a rank that expects
    another order, shape, dtype or buffer size gets wrong numbers, or waits for ever, or, over gloo,
    is killed. This is noticed here, on all ranks, in two phases:

    announce
        All ranks gather ``src``, ``packed`` and the buffer size of each, and the description of
        rank ``src``. So all know whether they mean the same source and the same format.
    confirm
        All ranks gather what each objects to in the description. So all raise if one of them
        objects, and if none does, each knows that all others are ready to receive.

    Args:
        metas: as ``describe`` gives them. On rank ``src``, what it sends; elsewhere, what that rank
            expects, or None for whatever comes.
        group: all its ranks call this, with refdist. It may carry only plain data.
        src: the rank in this group that sends.
        packed: whether it sends them packed.
        buffer_bytes: its buffer size, if it does.
        timeout: in seconds, for each phase; None for that of the group's store.

    Returns:
        The description of rank ``src``, on every rank.

    Raises:
        MessageError: on all ranks, with one text, if they do not mean the same. A
            MessageTimeoutError, if a rank did not come in time.
        ValueError: an argument is wrong, on this rank; the others wait for it until their timeout.
    """
    if not isinstance(group, StatelessProcessGroup):
        raise ValueError(
            f"group is a {type(group).__name__} of {type(group).__module__}; agree() needs a "
            f"StatelessProcessGroup of refdist on every rank"
        )
    src = check_rank(src, group.world_size, "src")
    mine = None if metas is None else weights_of_metas(metas)
    if mine is None and group.rank == src:
        raise ValueError(f"metas=None on rank {src}: must be a description, because it sends")
    size = check_buffer_bytes(buffer_bytes) if packed else None  # else it has no meaning
    settings = {"src": src, "packed": bool(packed), "buffer_bytes": size}
    sent = [weight.meta for weight in mine or ()] if group.rank == src else None
    announced = group.all_gather_obj({**settings, "weights": sent}, timeout)
    for name in settings:
        _check_equal(name, announced)
    try:
        there, objection = weights_of_metas(announced[src]["weights"]), None
    except (KeyError, TypeError, ValueError) as error:
        there, objection = [], f"rank {src} announces no weights: {error}"
    if mine is not None and objection is None:
        here = f"on rank {group.rank}"
        pairs = enumerate(zip_longest(mine, there))
        texts = (difference(number, a, here, b, f"on rank {src}") for number, (a, b) in pairs)
        objection = next(filter(None, texts), None)
    objections = [text for text in group.all_gather_obj(objection, timeout) if text]
    if objections:
        more = "; and others" if len(objections) > 4 else ""
        raise MessageError(
            f"{len(objections)} of {group.world_size} ranks object to the weights of rank {src}: "
            f"{'; '.join(map(str, objections[:4]))}{more}"
        )
    return [weight.meta for weight in there]


def _check_equal(name: str, announced: Sequence[Any]) -> None:
    """Raise MessageError if the ranks do not all have one value of a setting."""
    ranks: dict[str, list[int]] = {}
    for rank, settings in enumerate(announced):
        value = settings.get(name) if isinstance(settings, dict) else settings
        ranks.setdefault(f"{value!r:.80}", []).append(rank)
    if len(ranks) > 1:
        each = (f"{value} on {name_ranks(some)}" for value, some in ranks.items())
        raise MessageError(f"the ranks do not mean the same {name}: {', '.join(each)}")


def difference(
    number: int, here: Weight | None, where: str, there: Weight | None, whose: str
) -> str | None:
    """Say how weight ``number`` differs in two places; None if it does not."""
    if here and there and here.meta == there.meta:
        return None
    a, b = ("none" if weight is None else weight.told for weight in (here, there))
    return f"weight {number} is {a} {where}, and {b} {whose}"


def check_buffer_bytes(buffer_bytes: Any) -> int:
    """``buffer_bytes`` as an int, at least 1; else a ValueError."""
    number = check_integer("buffer_bytes", buffer_bytes)
    if number < 1:
        raise ValueError(f"buffer_bytes={number}: must be at least 1")
    return number


def weights_of(weights: NamedTensors) -> Iterator[Weight]:
    """The records of weights, each when it is taken.

    Raises:
        ValueError: a pair is not a name and a tensor, a name comes twice, or the tensor has no
            memory of its own, one element after the other: it is sparse or quantized, on the meta
            device, or distributed, or its elements are smaller than a byte.
    """
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    return _each_once(_weight_of(pair, number) for number, pair in enumerate(pairs))


def _weight_of(pair: Any, number: int) -> Weight:
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"weight {number} is {pair!r:.80}: must be a tuple of a name and a tensor")
    name, tensor = pair
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"weight {number}, {name!r}: is {tensor!r:.80}, and must be a tensor")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"weight {name!r}: holds a part on each rank; send its full_tensor()")
    if tensor.layout is not torch.strided or tensor.is_meta or not _of_bytes(tensor.dtype):
        raise ValueError(
            f"weight {name!r} of {tensor.dtype}, {tensor.layout}, on {tensor.device}: must be "
            f"dense, not quantized, of whole bytes, and have content"
        )
    return Weight(name, tuple(tensor.shape), tensor.dtype, tensor.detach())


def weights_of_metas(metas: Iterable[Any]) -> list[Weight]:
    """The records of descriptions. The dtype may also be a ``torch.dtype``.

    Raises:
        ValueError: one is not a name, a shape and a dtype, or a name comes twice.
    """
    return list(_each_once(_weight_of_meta(meta, number) for number, meta in enumerate(metas)))


def _weight_of_meta(meta: Any, number: int) -> Weight:
    try:
        name, shape, dtype = meta
        sizes = tuple(map(operator.index, shape))
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        right = isinstance(name, str) and min(sizes, default=0) >= 0 and _of_bytes(dtype)
    except (TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise ValueError(
            f"description {number} is {meta!r:.80}: must be a name, a shape and a dtype of whole "
            f"bytes, as describe() gives them"
        )
    return Weight(name, sizes, dtype)


@cache
def _of_bytes(dtype: Any) -> bool:
    """Whether this is a dtype of whole bytes. Torch can neither copy nor view the others."""
    small_or_quantized = re.compile(r"torch\.(u?int[1-7]$|qu?int)")
    return isinstance(dtype, torch.dtype) and not small_or_quantized.match(str(dtype))


def _each_once(weights: Iterable[Weight]) -> Iterator[Weight]:
    seen: dict[str, int] = {}
    for number, weight in enumerate(weights):
        if seen.setdefault(weight.name, number) != number:
            raise ValueError(
                f"name {weight.name!r}: is that of weights {seen[weight.name]} and {number}; each "
                f"name must come once"
            )
        yield weight
