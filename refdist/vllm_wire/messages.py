"""Messages, broadcasts and gathers in vLLM's protocol.

An object is one value, its bare pickle. Its key has the number of the object: messages are counted
for each pair of ranks, broadcasts for each source, on both sides. Tensors have keys of their own,
but are counted with the objects. The readers delete nothing. The source deletes what is old.
"""

import pickle
import time
import weakref
from typing import Any

from refdist.deadline import CancelledWaitError, Deadline
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
    return pickled_for_vllm(obj) if isinstance(obj, NcclUniqueId) else pickle.dumps(obj)


class Messages:
    """What a rank sends and receives. ``bind`` makes them those of a group."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store = store if isinstance(store, StoreClient) else StoreClient(store)
        self.rank, self.world_size = rank, world_size
        self.generation = 0

    def bind(self, group: Any, kept: dict[Any, Any], loads: Loads) -> None:
        """Count in the counters of a group.

        Args:
            group: has the counters, ``entries`` and ``data_expiration_seconds``.
            kept: gets each object that is received, by its source.
            loads: unpickles it.
        """
        self.group: Any = weakref.proxy(group)  # a group that nothing else refers to ends
        self.kept, self.loads = kept, loads

    def send(self, value: bytes, destination: int, deadline: Deadline, tensor: bool) -> None:
        """Send a message.

        Raises:
            MessageError: another rank has sent to ``destination`` under the same key.
        """
        number = self.group.send_dst_counter[destination]
        key = keys.vllm_message(destination, number, tensor)
        if self.store.check([key]):
            raise MessageError(
                f"{key}: is taken by a message of another rank; vLLM's protocol has room for one "
                f"sender to rank {destination}, so nothing was sent"
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
            MessageTimeoutError: it did not come in time, or it has expired.
            MessageError: it is no object, or another rank sends to this one too.
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
            self._check_one_sender(key, source, received)
        try:
            obj = self.read(key, source, deadline)
        except (MessageTimeoutError, CancelledWaitError):
            raise  # the next call waits for the same
        except BaseException:
            received[source] += 1
            raise
        received[source] += 1
        return obj

    def _check_one_sender(self, key: str, source: int, received: dict[int, int]) -> None:
        others = [r for r, count in received.items() if r != source and count > received[source]]
        if others:
            raise MessageError(
                f"{key}: was read as the message of {name_ranks(others)}; vLLM's protocol has room "
                f"for one sender to rank {self.rank}, and rank {source} is another one"
            )

    def gather(self, obj: Any, value: bytes | Exception, deadline: Deadline) -> list[Any]:
        """Broadcast an object, and receive those of all other ranks.

        An interrupted gather did not take place: this rank writes the same key in the next one. A
        gather that ends otherwise has one number on every rank, so that the next one is in step.

        Returns:
            The objects in rank order; an Unusable for what does not unpickle. Nothing, and nothing
            is sent, if ``value`` says why this rank has no object to give.

        Raises:
            MessageTimeoutError: the objects of some ranks did not come in time.
            CancelledWaitError: the deadline was cancelled.
        """
        if isinstance(value, Exception):
            return []
        group, found, missing = self.group, [], []
        number = group.broadcast_send_counter
        self.write(keys.vllm_broadcast(self.rank, number, False), value, deadline)
        for source in range(self.world_size):
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


def mailbox(barrier: Messages, group: Any, kept: dict[Any, Any], loads: Loads) -> Messages:
    """The messages of a rank are those that its barrier uses."""
    barrier.bind(group, kept, loads)
    return barrier


def gather(
    barrier: Messages, mailbox: Messages, obj: Any, encoded: Any, deadline: Deadline
) -> list[Any]:
    """``Messages.gather``."""
    return mailbox.gather(obj, encoded, deadline)
