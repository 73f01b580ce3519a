"""The two protocols that a group can speak with its store: refdist's own, and vLLM's."""

from collections.abc import Callable
from typing import Any, NamedTuple

from refdist.deadline import Deadline
from refdist.joining.leaving import leave
from refdist.joining.realigning import realign
from refdist.objects.encoding import encode
from refdist.objects.gathering import gather
from refdist.objects.mailbox import Mailbox
from refdist.vllm_wire.barrier import Barrier as VllmBarrier
from refdist.vllm_wire.messages import encode as vllm_encode


class Wire(NamedTuple):
    """A protocol: the strategies in which groups differ. Barriers are made when ranks meet.

    Attributes:
        name: as the argument ``wire`` has it; None for refdist's own.
        encode: an object into what is written.
        mailbox: the messages of a group, from its barrier, the group, what it keeps, and what
            unpickles.
        gather: as ``objects.gathering.gather``, of a mailbox.
        realign: as ``joining.realigning.realign``; None if there is no such thing.
        leave: as ``joining.leaving.leave``.
    """

    name: str | None
    encode: Callable[[Any], Any]
    mailbox: Callable[..., Any]
    gather: Callable[..., list[Any]]
    realign: Callable[[Any, Deadline], None] | None
    leave: Callable[[Any, str | None, Deadline], None]


def _just_leave(barrier: VllmBarrier, reason: str | None, deadline: Deadline) -> None:
    """A rank of vLLM does not say that it leaves, and is not told."""


OWN = Wire(None, encode, Mailbox, gather, realign, leave)
VLLM = Wire("vllm", vllm_encode, VllmBarrier.bind, VllmBarrier.gather, None, _just_leave)


def wire_of(name: str | None) -> Wire:
    """The protocol with a name.

    Raises:
        ValueError: there is none.
    """
    if name not in (None, "vllm"):
        raise ValueError(f"wire={name!r}: must be 'vllm', or None for refdist's own protocol")
    return OWN if name is None else VLLM
