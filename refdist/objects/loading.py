"""What a group unpickles: anything, or plain data only."""

import pickle

from refdist.objects import plain_data
from refdist.objects.encoding import Loads

_LOADS: dict[str, Loads] = {"pickle": pickle.loads, "plain": plain_data.loads}


def loads_of(messages: str) -> Loads:
    """What unpickles the messages of a group.

    Raises:
        ValueError: it is neither ``"pickle"`` nor ``"plain"``.
    """
    if messages not in _LOADS:
        raise ValueError(f"messages={messages!r}: must be 'pickle' or 'plain'")
    return _LOADS[messages]
