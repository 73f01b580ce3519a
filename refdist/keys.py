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


def roll(rank: int) -> str:
    """The last barrier that a rank arrived at or left. Overwritten by the rank at each barrier."""
    return f"barrier/roll/{rank}"


def arrived(generation: int) -> str:
    """How many have arrived at a barrier. Added to by every rank; deleted by rank 0."""
    return f"barrier/arrived/{generation}"


def departed(generation: int) -> str:
    """How many have left a barrier. Added to by all but rank 0; deleted by rank 0."""
    return f"barrier/departed/{generation}"


def outcome(generation: int) -> str:
    """How a barrier ended. Written once, by whoever decides it; deleted by rank 0."""
    return f"barrier/outcome/{generation}"


def all_left(generation: int) -> str:
    """Everyone but rank 0 has left a barrier. Written by the last to leave; deleted by rank 0."""
    return f"barrier/all_left/{generation}"


def message(source: int, destination: int, number: int) -> str:
    """A message. Written by the source; deleted by the destination.

    If it expires, the source writes the reason in its place, which stays until it is read.
    """
    return f"message/{source}/{destination}/{number}"


def broadcast(source: int, number: int) -> str:
    """A broadcast. Written by the source; deleted by its last reader.

    If it expires, the source writes the reason in its place, which stays until all have read it.
    """
    return f"broadcast/{source}/{number}"


def broadcast_readers(source: int, number: int) -> str:
    """How many have read a broadcast. Added to by each reader; deleted by the last, if all read."""
    return f"broadcast/{source}/{number}/readers"


def gathered(number: int, rank: int) -> str:
    """What a rank gave to a gather. Written by it; deleted by it when a later gather is whole."""
    return f"gather/{number}/{rank}"


def chunk(key: str, index: int) -> str:
    """A part of a value that is too large for one. Written and deleted with the value."""
    return f"{key}/chunk/{index}"
