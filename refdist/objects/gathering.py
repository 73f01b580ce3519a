"""A gather: a barrier to which each rank brings an object.

Small objects are on the roll of the barrier. Of a large one the roll has the lengths, and the
chunks have keys of their own, which the ranks read after the barrier. Each rank deletes its own
when all have arrived at the next barrier, and so have read them.
"""

from collections.abc import Callable
from typing import Any

from refdist.deadline import Deadline
from refdist.errors import MessageError, MessageTimeoutError
from refdist.objects import encoding
from refdist.objects.encoding import Decoder, Encoded, decode
from refdist.objects.mailbox import Mailbox
from refdist.store import keys


class Unusable:
    """Stands for an object that could not be given or read."""

    def __init__(self, error: MessageError) -> None:
        self.error = error


def gather(
    mailbox: Mailbox,
    obj: Any,
    encoded: Encoded | Exception,
    deadline: Deadline,
) -> list[Any | Unusable]:
    """Bring an object, or the reason why there is none, and return the objects of all ranks.

    Returns:
        The objects in rank order; at this rank's place, ``obj`` itself.

    Raises:
        BarrierError, CancelledWaitError, torch.distributed.DistError: as ``Barrier.wait``.
        MessageError: there is something on the roll that no rank writes.
    """
    barrier = mailbox.barrier
    number, rank = barrier.generation, barrier.rank
    written: list[str] = []
    if isinstance(encoded, Exception):
        value = encoding.failure(f"had no object to give: {encoded!r}")
    else:
        value = encoded.value
    try:
        if isinstance(encoded, Encoded) and encoded.count:
            its = keys.gathered(rank, number)
            written = [its.chunk(index) for index in range(encoded.count)]
            mailbox.write_chunks(its, encoded, deadline)
        values = barrier.gather(value, deadline)
    finally:
        if written and barrier.generation > number:
            barrier.leftovers.add(written)
        elif written:
            # interrupted before all were there: the next gather has this number again
            for chunk in written:
                barrier.store.delete_key(chunk)
    objects: list[Any] = []
    for source, value in enumerate(values):
        try:
            if source == rank:
                objects.append(obj)
                continue
            key = f"gather {number}: rank {source}"
            decoder = Decoder(key, value)
            if decoder.chunks:
                mailbox.read_chunks(keys.gathered(source, number), decoder, deadline)
            payload, parts = decoder.payload, decoder.parts
            objects.append(decode(key, payload, parts, deadline, mailbox.loads))
        except MessageTimeoutError as error:
            text = f"gather {number}: rank {rank} waited in vain for the rest from rank {source}"
            objects.append(Unusable(MessageTimeoutError(f"{text}: {error}", [source])))
        except MessageError as error:
            objects.append(Unusable(error.with_traceback(None)))
    return objects


def try_to_encode(encode: Callable[[Any], Any], obj: Any) -> Any:
    """An object, encoded, or the reason why it cannot be."""
    try:
        return encode(obj)
    except Exception as error:
        return error


def usable(found: list[Any | Unusable], encoded: Any) -> list[Any]:
    """The objects of a gather; raises the error of one that could not be given or read."""
    error = encoded if isinstance(encoded, Exception) else None
    errors = [other.error for other in found if isinstance(other, Unusable)]
    try:
        if error is not None or errors:
            raise error or errors[0]
        return found
    finally:
        # an error that has a variable of its own traceback outlives its last user
        del error, errors, encoded, found
