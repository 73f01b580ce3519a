"""Messages, broadcasts and gathers in vLLM's protocol.

An object is one value, its bare pickle. Its key has the number of the object: messages are counted
for each pair of ranks, broadcasts for each source, on both sides. Tensors have keys of their own,
but are counted with the objects. The source deletes what is old. A rank of refdist also deletes a
message that it has read: so the next rank that sends to it under the same key is not misread.
"""

import pickle
import time
import weakref
from io import BytesIO
from typing import Any, Self

from refdist.deadline import CancelledWaitError, Deadline, UserCodeError
from refdist.errors import MessageError, MessageTimeoutError, name_ranks
from refdist.objects.encoding import Loads, decode
from refdist.objects.gathering import Unusable
from refdist.objects.mailbox import Convert, converted
from refdist.objects.unique_id import NcclUniqueId, pickled_for_vllm
from refdist.store import keys
from refdist.store.client import StoreClient


def encode(obj: Any) -> bytes:
    """Pickle an object as vLLM's ranks read it.

    Raises:
        Exception: whatever pickle raises for an object that cannot be pickled.
    """
    if isinstance(obj, NcclUniqueId):
        return pickled_for_vllm(obj)
    stream = BytesIO()
    _Pickler(stream).dump(obj)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, NcclUniqueId):
            raise pickle.PicklingError("an NcclUniqueId inside another object: send it alone")
        return NotImplemented


class Messages:
    """The messages that a rank sends and receives. ``bind`` makes them those of a group."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store = store if isinstance(store, StoreClient) else StoreClient(store)
        self.rank, self.world_size = rank, world_size
        self.generation = 0

    def bind(self, group: Any, kept: dict[Any, Any], loads: Loads) -> Self:
        """Count in the counters of a group. Returns this object.

        Args:
            group: has the counters, ``entries`` and ``data_expiration_seconds``.
            kept: gets each object that is received, by its source.
            loads: unpickles it.
        """
        self.group: Any = weakref.proxy(group)  # a group that nothing else refers to ends
        self.kept, self.loads = kept, loads
        self.ended_by_user = ""  # the key whose unpickling was ended once by no Exception
        return self

    def send(self, value: bytes, destination: int, deadline: Deadline, tensor: bool) -> None:
        """Send a message.

        Raises:
            MessageError: another rank has sent to ``destination`` under the same key.
        """
        number = self.group.send_dst_counter[destination]
        key = keys.vllm_message(destination, number, tensor)
        if self.store.check([key]):
            raise MessageError(
                f"{key}: is taken by another rank's message to rank {destination}, read or not; "
                f"vLLM's protocol has one sender for each receiver, so nothing was sent"
            )
        self.write(key, value, deadline)
        self.group.send_dst_counter[destination] += 1

    def broadcast(self, value: bytes, number: int, deadline: Deadline, tensor: bool) -> None:
        """Send the broadcast with this number of this rank's."""
        self.write(keys.vllm_broadcast(self.rank, number, tensor), value, deadline)

    def receive(
        self, source: int, deadline: Deadline, convert: Convert | None, broadcast: bool = False
    ) -> Any:
        """Receive the next message or broadcast from a rank: a tensor, if ``convert`` is given.

        Raises:
            MessageTimeoutError: it did not come in time, or it has expired, or another rank has
                written over it.
            MessageError: it is no object.
            UserCodeError: its unpickling raised something that is no Exception. The next call tries
                again, once.
            CancelledWaitError: the deadline was cancelled.
        """
        name: Any = ("broadcast", source) if broadcast else source
        if name not in self.kept:
            tensor = convert is not None
            self.kept[name] = self.receive_next(source, deadline, tensor, broadcast)
        return converted(self.kept, name, convert)

    def receive_next(self, source: int, deadline: Deadline, tensor: bool, broadcast: bool) -> Any:
        """The next object from a rank. Raises as ``receive``."""
        if broadcast:
            received = self.group.broadcast_recv_src_counter
            key = keys.vllm_broadcast(source, received[source], tensor)
        else:
            received = self.group.recv_src_counter
            key = keys.vllm_message(self.rank, received[source], tensor)
        goes_on = False  # whether the next call waits for the same
        try:
            return self.read(key, source, deadline)
        except (MessageTimeoutError, CancelledWaitError):
            goes_on = True
            raise
        except UserCodeError:
            goes_on, self.ended_by_user = self.ended_by_user != key, key
            raise
        finally:
            if not goes_on:
                received[source] += 1
                if not broadcast:
                    self.store.delete_key(key)

    def gather(self, obj: Any, value: bytes | Exception, deadline: Deadline) -> list[Any]:
        """Broadcast an object, and receive those of all other ranks.

        An interrupted gather did not take place: this rank writes the same key in the next one. A
        gather that ends otherwise has one number on every rank, so that the next one is in step.

        Returns:
            The objects in rank order; an Unusable for what does not unpickle. Nothing, if ``value``
            says why this rank has no object to give: nothing is sent, and the others miss it.

        Raises:
            MessageTimeoutError: the objects of some ranks did not come in time.
            CancelledWaitError: the deadline was cancelled.
        """
        group, found, missing = self.group, [], []
        sources = range(0) if isinstance(value, Exception) else range(self.world_size)
        if not isinstance(value, Exception):
            key = keys.vllm_broadcast(self.rank, group.broadcast_send_counter, False)
            self.write(key, value, deadline)
        for source in sources:
            key = keys.vllm_broadcast(source, group.broadcast_recv_src_counter[source], False)
            try:
                found.append(obj if source == self.rank else self.read(key, source, deadline))
            except MessageTimeoutError:
                missing.append(source)
            except MessageError as error:
                found.append(Unusable(error.with_traceback(None)))
        group.broadcast_send_counter += 1
        for source in range(self.world_size):
            group.broadcast_recv_src_counter[source] += source != self.rank
        self.generation += 1
        if missing:
            raise MessageTimeoutError(
                f"all_gather_obj on rank {self.rank}: {name_ranks(missing)} of {self.world_size} "
                f"did not come in {deadline.elapsed():.2f} of {deadline.allowed:g} s",
                missing,
            )
        return found

    def read(self, key: str, source: int, deadline: Deadline) -> Any:
        """The object under a key, when it is there. Raises as ``receive``."""
        value = self.store.wait_for_value(key, deadline)
        if value is None:
            raise MessageTimeoutError(
                f"{key}: rank {self.rank} waited in vain for this from rank {source}: "
                f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
                [source],
            )
        return decode(key, value, [], deadline, self.loads)

    def write(self, key: str, value: bytes, deadline: Deadline) -> None:
        """Write an object, and remember when."""
        self.expire(deadline)
        self.group.entries.append((key, time.monotonic()))
        self.store.set(key, value)

    def expire(self, deadline: Deadline) -> None:
        """Delete what this rank wrote long ago."""
        oldest_kept = time.monotonic() - self.group.data_expiration_seconds
        while self.group.entries and self.group.entries[0][1] < oldest_kept:
            deadline.check()
            self.store.delete_key(self.group.entries[0][0])
            self.group.entries.popleft()
