"""An explorer that tries every schedule of a protocol over a store.

A *protocol* is a function of a store, a rank and the world size. It returns the calls that the rank
makes, by name. It runs unchanged, over a simulated store that answers as torch's does. A scheduler
decides every step: which rank goes next, which wait times out, which rank dies.

>>> from refdist.exploration import agreement, explore, replay
>>> def protocol(store, rank, world_size):
...     barrier = Barrier(store, rank, world_size)
...     return {"barrier": lambda: barrier.wait(1.0)}
>>> explore(protocol, 2, [agreement], timeouts=1, crashes=1)

A *property* is a condition that should hold. The *counterexample* is the shortest schedule after
which one does not hold: a string, which ``replay`` turns into a timeline.
"""

from refdist.exploration.properties import (
    BARRIER,
    REFDIST_BARRIER,
    agreement,
    each_is_in_its_group,
    everyone_is_woken,
    new_group_works,
    next_call_works,
    no_key_stays,
    no_latecomer_passes,
    nobody_else_is_told,
    nobody_returns_early,
    nobody_waits_for_ever,
    nothing_old_is_received,
    one_group_follows,
    one_reason,
    rank_0_leaves_last,
    who_is_left_out_is_told,
    within,
)
from refdist.exploration.rank import Call, Protocol
from refdist.exploration.search import Counterexample, Exploration, Property, Snapshot, explore
from refdist.exploration.timeline import Event, Timeline, replay
from refdist.exploration.words import RefdistWords, Words

__all__ = [
    "BARRIER",
    "REFDIST_BARRIER",
    "Call",
    "Counterexample",
    "Event",
    "Exploration",
    "Property",
    "Protocol",
    "RefdistWords",
    "Snapshot",
    "Timeline",
    "Words",
    "agreement",
    "each_is_in_its_group",
    "everyone_is_woken",
    "explore",
    "new_group_works",
    "next_call_works",
    "no_key_stays",
    "no_latecomer_passes",
    "nobody_else_is_told",
    "nobody_returns_early",
    "nobody_waits_for_ever",
    "nothing_old_is_received",
    "one_group_follows",
    "one_reason",
    "rank_0_leaves_last",
    "replay",
    "who_is_left_out_is_told",
    "within",
]


def __dir__() -> list[str]:
    return __all__
