"""Every key that refdist writes to a store: its format, its writer, and what deletes it.

Numbers in keys count from 0. A group has the store to itself or, with torch's PrefixStore, a
prefix of it.
"""

from typing import NamedTuple, Self


def member(rank: int) -> str:
    """The process that joined as this rank. Written by it when it joins and leaves; stays."""
    return f"member/{rank}"


def gone() -> str:
    """How many ranks have left for good. Added to by all but rank 0; goes with the store.

    In a part, also added to by its rank 0; the last deletes it with the others of the part.
    """
    return "gone"


def all_gone() -> str:
    """All ranks but 0 have left for good. Written by the last; goes with the store."""
    return "all_gone"


def told(rank: int) -> str:
    """A rank has read that the group was not formed. Written by it; goes with the store."""
    return f"told/{rank}"


def part(place: str, generation: int, first: int) -> str:
    """The prefix of the keys of a group that was split off. They go when all have closed it.

    Args:
        place: what those of the whole group begin with.
        generation: of the gather in which it was split.
        first: rank of its first member in the whole group.
    """
    return f"{place}part/{generation}/{first}/"


def meeting(place: str, era: int, number: int) -> str:
    """The prefix of the keys of a meeting, before a group shrinks or grows.

    They stay, except those of a part that has lost nobody.

    Args:
        place: what the keys of the first era begin with.
        era: how often the group has shrunk or grown before.
        number: of the meeting in this era.
    """
    return f"{place}meeting/{era}/{number}/"


def era(place: str, number: int, attempt: str) -> str:
    """The prefix of the keys of a group that has shrunk or grown ``number`` times.

    They stay as those of ``meeting`` do.

    Args:
        place: what those of the first era begin with.
        number: of the era.
        attempt: tells the attempts to begin it apart.
    """
    return f"{place}era/{number}/{attempt}/"


def asked() -> str:
    """How many processes have asked to be let in. Added to by each; goes with the store."""
    return "asked"


def ask(number: int) -> str:
    """A process asks to be let in. Written by it; goes with the store."""
    return f"ask/{number}"


def answer(number: int) -> str:
    """The answer to an ask. Written once, by rank 0, or by the process when it gives up.

    It goes with the store.
    """
    return f"answer/{number}"


def refused(rank: int) -> str:
    """A process with another secret than rank 0 came as this rank. Written by it; stays."""
    return f"refused/{rank}"


class PlainKeys(NamedTuple):
    """The keys of one try of a barrier. Deleted when all ranks have arrived at a later one.

    Attributes:
        roll: which ranks have arrived, what each brings to a gather, and which have left.
            Appended to by every rank.
        counter: arrivals and departures together. Added to by every rank.
        outcome: how the barrier ended. Written once, by the first rank that proposes one.
        all_left: all ranks have left. Written by the last of them, for rank 0.
    """

    roll: str
    counter: str
    outcome: str
    all_left: str

    @classmethod
    def of(cls, number: int) -> Self:
        """The keys of a try."""
        return cls(*(f"barrier/{number}/{field}" for field in cls._fields))


class Slot(NamedTuple):
    """The keys of a barrier that is built on ``Store.barrier``.

    Rank 0 resets them for a later barrier; after one that broke, it deletes them in the next that
    completes.

    Attributes:
        roll: as in ``PlainKeys``.
        counter: of the ranks that have arrived.
        state: the outcome, and which ranks know it: ``refdist.barrier.quick``.
        wake: for ranks that wait long. Written by the first rank to know the outcome, which also
            writes ``counter`` if it breaks the barrier.
        left: for rank 0, which waits for the others to leave. Written by the last of them.
    """

    roll: str
    counter: str
    state: str
    wake: str
    left: str

    @classmethod
    def of(cls, epoch: int, slot: int) -> Self:
        """The keys of a slot. After a broken barrier, a new epoch begins, with new names."""
        prefix = f"barrier/{epoch}/{slot}/"
        return cls(*(prefix + field for field in cls._fields))


def reason(epoch: int) -> str:
    """Why the barrier that ended an epoch broke. Written by the rank that broke it.

    Deleted by rank 0 with the slots of the epoch.
    """
    return f"barrier/{epoch}/reason"


def of_creation(world_size: int) -> list[str]:
    """Every key that may be there before all ranks have joined."""
    each = [of_rank(rank) for of_rank in (member, refused, told) for rank in range(world_size)]
    # an interrupted rank ends the first try of the barrier, and breaks the second
    tries = [key for number in (0, 1) for key in (*PlainKeys.of(number), *Slot.of(number, 0))]
    return [*each, *tries, reason(0), reason(1), gone(), all_gone()]


class ObjectKeys(NamedTuple):
    """The keys of one object.

    Attributes:
        own: of the object itself, or, of a large one, of its lengths.
        number: of the object among those between the same ranks.
        expired: of the highest number among these that has expired unread. Written by the source;
            stays.
    """

    own: str
    number: int
    expired: str

    def chunk(self, index: int) -> str:
        """A part of a large object. Written and deleted with it."""
        return f"{self.own}/chunk/{index}"

    @property
    def readers(self) -> str:
        """How many ranks have read a large broadcast. Added to by each; deleted by the last."""
        return f"{self.own}/readers"


def message(source: int, destination: int, number: int) -> ObjectKeys:
    """A message. Written by the source; deleted by the destination, or when it expires."""
    between = f"message/{source}/{destination}"
    return ObjectKeys(f"{between}/{number}", number, f"{between}/expired")


def broadcast(source: int, number: int) -> ObjectKeys:
    """A broadcast. Written by the source.

    Deleted by it in the first barrier or gather to which all ranks come that have read it, or when
    it expires. The last reader of a large one deletes its chunks.
    """
    between = f"broadcast/{source}"
    return ObjectKeys(f"{between}/{number}", number, f"{between}/expired")


def gathered(rank: int, generation: int) -> ObjectKeys:
    """A large object that a rank brought to a gather, of which the roll has the lengths.

    Written by the rank; deleted by it when all ranks have arrived at the next barrier or gather.
    """
    return ObjectKeys(f"gather/{rank}/{generation}", generation, f"gather/{rank}/expired")


# The keys of vLLM's protocol, as its versions 0.9 to 0.33 write them.


def vllm_message(destination: int, number: int, tensor: bool) -> str:
    """A message to a rank. Written by the source; deleted by it when it expires.

    The key does not name the source, so only one rank may send to each.
    """
    return f"{'send_tensor' if tensor else 'send_to'}/{destination}/{number}"


def vllm_broadcast(source: int, number: int, tensor: bool) -> str:
    """A broadcast, or a part of a gather. Written by the source; deleted by it when it expires."""
    return f"{'broadcast_tensor' if tensor else 'broadcast_from'}/{source}/{number}"


def vllm_arrival(barrier: str, rank: int) -> str:
    """A rank has arrived at a barrier. Written by it; deleted by rank 0 when all have left."""
    return f"arrival_{barrier}_{rank}"


def vllm_departure(barrier: str, rank: int) -> str:
    """A rank knows that all have arrived. Written by it; deleted by rank 0 when all have left."""
    return f"departure_{barrier}_{rank}"
