"""An observer of the number of keys in a store, outside the group that uses it."""

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch.distributed import DistError

from refdist.store.listening import create_tcp_store

_PERIOD_SECONDS = 0.02


@dataclass(frozen=True)
class KeyCount:
    """The number of keys in a store at one moment.

    ``at`` is in seconds of ``time.monotonic()``, which all processes of a host share.
    """

    at: float
    keys: int


class KeyObserver:
    """Counts the keys of a store fifty times a second, in a thread with its own connection.

    As a context manager, it counts while the block runs.

    Args:
        host: host of the store.
        port: port of the store.

    Attributes:
        counts: the counts so far, in order.
    """

    def __init__(self, host: str, port: int) -> None:
        self.counts: list[KeyCount] = []
        self._store = create_tcp_store(host, port)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True, name="refdist-observer")

    def _count(self) -> None:
        over = False
        while not over:
            # count once more after the end, for a last count from then
            over = self._over.wait(_PERIOD_SECONDS)
            try:
                keys = self._store.num_keys()
            except DistError:
                return  # the store has ended
            self.counts.append(KeyCount(time.monotonic(), keys))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
