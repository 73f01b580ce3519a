"""Every key that refdist writes to a store: its format, who writes it, who deletes it.

Numbers in keys count from 0. A group has the store to itself or, with torch's PrefixStore, a
prefix of it.
"""


def member(rank: int) -> str:
    """Who joined as this rank. Written by the rank when it joins and when it leaves; stays."""
    return f"member/{rank}"


def gone() -> str:
    """How many ranks have left for good. Added to by all but rank 0; goes with the store."""
    return "gone"


def all_gone() -> str:
    """Everyone but rank 0 has left for good. Written by the last; goes with the store."""
    return "all_gone"


def told(rank: int) -> str:
    """A rank has read that the group was not formed. Written by it; goes with the store."""
    return f"told/{rank}"


def refused(rank: int) -> str:
    """Who came as this rank has another secret than rank 0. Written by it; goes with the store."""
    return f"refused/{rank}"


SLOTS = 3
"""Barriers use this many sets of keys in turn. ``refdist.barrier`` says why three are enough."""


class Slot:
    """The keys of one barrier. They stay, and are reset by rank 0 before they are used again.

    ``epoch`` counts the barriers that broke. After one of those the keys start afresh under new
    names, and rank 0 deletes the old ones when a barrier completes.

    Attributes:
        roll: who has arrived, and what each brings to a gather. Appended to by every rank.
        arrived: how many have arrived. Counted up by every rank.
        state: who knows the outcome, as a number, negative if it is "broken". See
            ``refdist.barrier``.
        wake: the gate at which those wait who wait long. Opened by the first to know the outcome.
        left: the gate at which rank 0 waits for the others to leave. Opened by the last of them.
    """

    def __init__(self, epoch: int, slot: int) -> None:
        self.roll = f"barrier/{epoch}/{slot}/roll"
        self.arrived = f"barrier/{epoch}/{slot}/arrived"
        self.state = f"barrier/{epoch}/{slot}/state"
        self.wake = f"barrier/{epoch}/{slot}/wake"
        self.left = f"barrier/{epoch}/{slot}/left"


def slots(epoch: int) -> list[Slot]:
    """The slots of an epoch."""
    return [Slot(epoch, slot) for slot in range(SLOTS)]


def reason(epoch: int) -> str:
    """Why the barrier that ended this epoch broke. Written by the rank that broke it."""
    return f"barrier/{epoch}/reason"


def of_epoch(epoch: int) -> list[str]:
    """All keys of an epoch."""
    in_slots = [[s.roll, s.arrived, s.state, s.wake, s.left] for s in slots(epoch)]
    return [reason(epoch), *(key for some in in_slots for key in some)]


def message(source: int, destination: int, number: int) -> str:
    """A message. Put there by the source, taken out by the destination.

    If it expires, the source puts the reason in its place, which stays until it is read.
    """
    return f"message/{source}/{destination}/{number}"


def broadcast(source: int, number: int) -> str:
    """A broadcast. The chunks of a large one are under this key, for all its readers.

    Written by the source; deleted by the last reader, or by the source when it expires.
    """
    return f"broadcast/{source}/{number}"


def broadcast_copy(source: int, number: int, destination: int) -> str:
    """What one reader gets of a broadcast. As ``message``."""
    return f"broadcast/{source}/to/{destination}/{number}"


def broadcast_readers(source: int, number: int) -> str:
    """How many have read a large broadcast. Added to by each reader; deleted by the last."""
    return f"broadcast/{source}/{number}/readers"


def gathered_value(rank: int, number: int) -> str:
    """A large value that a rank gave to a gather. Deleted by it in the next barrier or gather."""
    return f"gather/{rank}/{number}"


def chunk(key: str, index: int) -> str:
    """A part of a value that is too large for one. Written and deleted with the value."""
    return f"{key}/chunk/{index}"


def expired(owner: str) -> str:
    """A large message or broadcast expired before all had read it. Written by the source.

    For who is in the middle of it. Deleted by the reader of a message, when it finds the note in
    its place; that of a broadcast stays, one for each source.
    """
    return f"{owner.rpartition('/')[0]}/expired"
