"""All ranks make sure that they mean the same weights, before any tensor moves."""

from collections.abc import Iterable
from typing import Any

from refdist.checks import check_rank
from refdist.group import StatelessProcessGroup
from refdist.weights.chunks import BUFFER_BYTES, check_buffer_bytes
from refdist.weights.descriptions import (
    Weight,
    WeightMeta,
    WeightsMismatchError,
    first_difference,
    weights_of_metas,
)


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
        Rank ``src`` broadcasts its description, packing and buffer size. Each rank compares.
    confirm
        All ranks gather what each objects to. So all raise if one of them objects, and if none
        does, each knows that all others are ready to receive.

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
        WeightsMismatchError: on all ranks, if one rank expects something else. The text has the
            first difference that each such rank sees.
        ValueError: an argument is wrong, on this rank; the others wait for it until their timeout.
        MessageTimeoutError: a rank did not come in time.
    """
    src = check_rank(src, group.world_size, "src")
    mine = None if metas is None else weights_of_metas(metas)
    if mine is None and group.rank == src:
        raise ValueError(f"metas=None on rank {src}: must be a description, because it sends")
    settings = {"packed": bool(packed), "buffer_bytes": check_buffer_bytes(buffer_bytes)}
    if not packed:
        del settings["buffer_bytes"]  # it has no meaning
    described = None if mine is None else [weight.meta for weight in mine]
    announced = group.broadcast_obj({"weights": described, **settings}, src, timeout)
    objection = _objection(mine, settings, announced, f"on rank {src}")
    objections = group.all_gather_obj(objection, timeout)
    texts = [f"rank {rank}: {text}" for rank, text in enumerate(objections) if text]
    if texts:
        raise WeightsMismatchError(
            f"rank {src} and {len(texts)} of {group.world_size - 1} other ranks do not mean the "
            f"same weights. {'. '.join(texts[:4])}{'. And others' if len(texts) > 4 else ''}"
        )
    return [weight.meta for weight in weights_of_metas(announced["weights"])]


def _objection(
    mine: list[Weight] | None, settings: dict[str, Any], announced: Any, whose: str
) -> str | None:
    """How what was announced differs from what this rank expects; None if it does not."""
    try:
        there = weights_of_metas(announced["weights"])
        for name, value in settings.items():
            if announced.get(name) != value:
                return f"{name} is {value} here, and {announced.get(name)} {whose}"
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        return f"what came is no announcement of weights: {announced!r:.80} ({error})"
    return None if mine is None else first_difference(mine, there, whose)
