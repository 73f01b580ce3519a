"""A gather: a barrier to which each rank brings an object.

Small objects are written on the roll of the barrier. Of a large one the roll holds the lengths, and
the chunks have keys of their own, which the ranks read after the barrier. Each rank deletes its own
in the next barrier, when all have arrived there and so have read them.
"""

from typing import Any

from refdist.barrier import Barrier
from refdist.barrier.phases import Record
from refdist.deadline import Deadline
from refdist.errors import MessageError
from refdist.objects import encoding
from refdist.objects.boxes import Boxes
from refdist.store import keys
from refdist.store.client import StoreClient


class Unusable:
    """What a rank gave to a gather, where it is no object."""

    def __init__(self, error: MessageError) -> None:
        self.error = error


class Gathering:
    """The gathers of one group, one after the other, as one of its ranks sees them."""

    def __init__(self, store: StoreClient, rank: int, barrier: Barrier) -> None:
        self._boxes = Boxes(store, barrier.seals)
        self._rank = rank
        self._barrier = barrier

    def gather(
        self,
        obj: Any,
        encoded: encoding.Encoded | Exception,
        deadline: Deadline,
        record: Record | None = None,
    ) -> list[Any | Unusable]:
        """Bring an object, or the reason why there is none, and return what each rank brought.

        Returns:
            The objects in rank order; at this rank's place, ``obj`` itself.

        Raises:
            BarrierError, CancelledWaitError, torch.distributed.DistError: as ``Barrier.wait``.
            MessageError: the roll holds what no rank writes.
        """
        number = self._barrier.generation
        written: list[str] = []
        if isinstance(encoded, Exception):
            value = encoding.failure(f"rank {self._rank} had no object to give: {encoded!r}")
        else:
            value = encoded.value
            own_key = keys.gathered_value(self._rank, number)
            written = encoding.chunk_keys(own_key, encoding.lengths_of(value))
        try:
            if not isinstance(encoded, Exception):
                encoding.write_chunks(self._boxes, own_key, encoded, deadline)
            values = self._barrier.gather(value, deadline, record)
        finally:
            if self._barrier.generation > number:
                # a rank that comes to the next barrier has read them, or never will
                self._barrier.delete_in_next(written)
            else:
                # interrupted before all were there: the next gather has this number again
                for key in written:
                    self._boxes.empty(key)
        return [
            obj if rank == self._rank else self._read(rank, number, theirs, deadline)
            for rank, theirs in enumerate(values)
        ]

    def _read(self, rank: int, number: int, value: bytes, deadline: Deadline) -> Any | Unusable:
        try:
            key = keys.gathered_value(rank, number)
            return encoding.read(self._boxes, key, value, deadline)
        except MessageError as error:
            return Unusable(error)
