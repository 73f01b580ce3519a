"""Messages and broadcasts of one rank: sent, received, and expired when nobody reads them.

A small object is one value of the store, a large one several. Its reader deletes a message. A
broadcast has many readers, and the simple ways fail: a copy for each costs the source as many
requests, and a count of the readers costs each of them one more. So its source deletes it in a
later barrier, where each rank says how many broadcasts it has made and received: when all have come
past this one, as they do if they make the same calls in the same order.

An object that is still there after a while expires: its source deletes it, and writes its number
down, so that a rank that asks for it later learns why there is nothing, instead of waiting.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from refdist.barrier.plain import Barrier
from refdist.deadline import CancelledWaitError, Deadline, NoRoomError, UserCodeError
from refdist.errors import (
    AuthenticationError,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
)
from refdist.objects import encoding
from refdist.objects.encoding import Decoder, Encoded, Loads, decode
from refdist.store import keys
from refdist.store.keys import ObjectKeys

_EXPIRED_EACH = 64  # objects that one more may expire


Convert = Callable[[Any], Any]


class Mailbox:
    """The objects that a rank sends and receives.

    Args:
        barrier: of the group, which has its store, rank, seals and generation.
        group: has the counters, ``entries`` and ``data_expiration_seconds``.
        kept: gets each object that is received, by its source.
        loads: unpickles it.
    """

    def __init__(self, barrier: Barrier, group: Any, kept: dict[Any, Any], loads: Loads) -> None:
        self.barrier, self._store, self._rank = barrier, barrier.store, barrier.rank
        self._seconds = group.data_expiration_seconds
        self._entries: deque[tuple[str, float]] = group.entries
        self._sent: dict[int, int] = group.send_dst_counter
        self._received: dict[int, int] = group.recv_src_counter
        self._broadcasts: dict[int, int] = group.broadcast_recv_src_counter
        self._kept, self.loads = kept, loads
        # of what was sent: keys, number of chunks, and whether it is a broadcast. Plain tuples of
        # plain values cost the garbage collector nothing, and there may be many.
        self._unread: dict[str, tuple[tuple[str, int, str], int, bool]] = {}
        self._ended_by_user = ""  # the key whose unpickling was ended once by no Exception

    def send(
        self, encoded: Encoded, destination: int, deadline: Deadline, tensor: bool = False
    ) -> None:
        """Send a message. Tensors are objects like others here, and not in vLLM's protocol.

        Raises:
            CancelledWaitError: the deadline was cancelled. The reader gets a MessageError.
        """
        its = keys.message(self._rank, destination, self._sent[destination])
        self._sent[destination] += 1
        self._send(its, encoded, deadline, False)

    def broadcast(
        self, encoded: Encoded, number: int, deadline: Deadline, tensor: bool = False
    ) -> None:
        """Send the broadcast with this number of this rank's. Raises as ``send``."""
        its = keys.broadcast(self._rank, number)
        leftovers = self.barrier.leftovers
        leftovers.add_broadcast([its.own, its.readers] if encoded.count else [its.own])
        self._send(its, encoded, deadline, True)

    def receive(
        self, source: int, deadline: Deadline, convert: Convert | None, broadcast: bool = False
    ) -> Any:
        """Receive a message, or a broadcast, and convert it.

        A timeout, an interrupt or a lack of room leaves the object for the next call. An interrupt
        that comes later leaves it in ``kept``, also for the next call.

        Args:
            source: its sender, and its name in ``kept``; that of a broadcast is a pair.
            deadline: of the call.
            convert: the object into what is returned; it may raise MessageError.
            broadcast: whether it is one.

        Raises:
            MessageTimeoutError: it did not come in time, or not all of it.
            MessageExpiredError: it expired before this call.
            AuthenticationError: it is not from ``source``.
            MessageError: it is no object.
            NoRoomError: there is no room for it now.
            UserCodeError: its unpickling raised something that is no Exception. The next call tries
                again, once.
            CancelledWaitError: the deadline was cancelled.
        """
        name: Any = ("broadcast", source) if broadcast else source
        if name in self._kept:
            return converted(self._kept, name, convert)
        its, end = keys.message(source, self._rank, self._received[source]), self._end_message
        if broadcast:
            its, end = keys.broadcast(source, self._broadcasts[source]), self._end_broadcast
        decoder = None
        try:
            decoder = Decoder(its.own, self._wait_for(its.own, its, deadline))
            if decoder.chunks:
                self.read_chunks(its, decoder, deadline)
            payload, parts = decoder.payload, decoder.parts
            self._kept[name] = decode(its.own, payload, parts, deadline, self.loads)
        except (MessageTimeoutError, CancelledWaitError, NoRoomError, UserCodeError) as error:
            ends = isinstance(error, UserCodeError) and self._ended_by_user == its.own
            if ends:
                end(its, source, 0 if decoder is None else decoder.chunks)
            elif broadcast:
                self.barrier.leftovers.missed(source)
            if isinstance(error, UserCodeError) and not ends:
                # perhaps a signal's handler has raised it, and not the object
                self._ended_by_user = its.own
            if isinstance(error, MessageTimeoutError):
                rest = "this" if decoder is None else "the rest"
                raise MessageTimeoutError(
                    f"{its.own}: rank {self._rank} waited in vain for {rest} from rank {source}: "
                    f"{error}",
                    [source],
                ) from None
            raise
        except MessageError:
            end(its, source, 0 if decoder is None else decoder.chunks)
            raise
        end(its, source, decoder.chunks)
        return self._kept[name] if convert is None else converted(self._kept, name, convert)

    def _end_message(self, its: ObjectKeys, source: int, chunks: int) -> None:
        """A message is of no more use in the store."""
        self._received[source] += 1
        for index in range(chunks):
            self._store.delete_key(its.chunk(index))
        self._store.delete_key(its.own)

    def _end_broadcast(self, its: ObjectKeys, source: int, chunks: int) -> None:
        """This rank needs a broadcast no more. The last reader deletes its chunks."""
        self._broadcasts[source] += 1
        self.barrier.leftovers.received(source)
        count, there = self._store.add(its.readers, 1) if chunks else 0, True
        if chunks and count == self.barrier.world_size - 1:
            there = False
            for index in range(chunks):
                there |= self._store.delete_key(its.chunk(index))
        elif count == 1:
            there = self._store.check([its.chunk(0)])
        if not there:
            # it expired just now, and so did the count of those that had read it
            self._store.delete_key(its.readers)

    def _send(self, its: ObjectKeys, encoded: Encoded, deadline: Deadline, broadcast: bool) -> None:
        self.expire(deadline, 1 + _EXPIRED_EACH)
        # an object whose sending is interrupted expires all the same
        self._entries.append((its.own, time.monotonic()))
        self._unread[its.own] = (its.own, its.number, its.expired), encoded.count, broadcast
        self._write(its.own, encoded.value)
        self.write_chunks(its, encoded, deadline)

    def write_chunks(self, its: ObjectKeys, encoded: Encoded, deadline: Deadline) -> None:
        """Write the chunks of an object, if it has any. Raises as ``send``."""
        for index, chunk in enumerate(encoded.chunks()):
            try:
                deadline.check()
            except CancelledWaitError as error:
                why = f"its writer stopped, because of {error}"
                self._write(its.chunk(index), encoding.failure(why))
                raise
            self._write(its.chunk(index), chunk)

    def read_chunks(self, its: ObjectKeys, decoder: Decoder, deadline: Deadline) -> None:
        """Read the chunks of a large object. Raises as ``receive``."""
        for index in range(decoder.chunks):
            key = its.chunk(index)
            # no slice runs out while chunks come fast
            self._store.limit(deadline.remaining())
            decoder.add(key, self._wait_for(key, its, deadline))

    def _wait_for(self, key: str, its: ObjectKeys, deadline: Deadline) -> bytes:
        """The value of a key, when it is there, unless its object has expired."""
        while (value := self._store.wait_for_value(key, deadline, once=True)) is None:
            expired = self._look(its.expired) or b""
            if expired.isdigit() and len(expired) < 20 and int(expired) >= its.number:
                raise MessageExpiredError(f"{its.own}: expired unread after {self._seconds:g} s")
            if deadline.remaining() == 0:
                raise MessageTimeoutError(f"{deadline.elapsed():.2f} of {deadline.allowed:g} s")
        return self._unseal(key, value)

    def expire(self, deadline: Deadline, at_most: int | None = None) -> None:
        """Expire the objects that were sent long ago and are still there.

        Args:
            deadline: only an interrupt ends this before the end.
            at_most: number of objects to look at, not to be interrupted; None for all.

        Raises:
            CancelledWaitError: the deadline was cancelled. The rest expires the next time.
        """
        oldest_kept = time.monotonic() - self._seconds
        while self._entries and self._entries[0][1] < oldest_kept and at_most != 0:
            if at_most is None:
                deadline.check()
            else:
                at_most -= 1
            key, _ = self._entries.popleft()
            if key not in self._unread:
                continue  # no object of this rank
            fields, chunks, broadcast = self._unread.pop(key)
            its = ObjectKeys(*fields)
            there = self._store.delete_key(its.own)
            if broadcast:
                self.barrier.leftovers.forget(its.own)
                if chunks:
                    self._store.delete_key(its.readers)
            for index in range(chunks):
                # a broadcast may be gone, and its chunks still be read
                there |= self._store.delete_key(its.chunk(index))
            if there:
                self._write(its.expired, str(its.number).encode())

    def _write(self, key: str, value: bytes) -> None:
        seals = self.barrier.seals
        self._store.set(key, seals.seal(key, value) if seals.tag_bytes else value)

    def _unseal(self, key: str, value: bytes) -> bytes:
        seals = self.barrier.seals
        return seals.unseal(key, value) if seals.tag_bytes else value

    def _look(self, key: str) -> bytes | None:
        value = self._store.peek(key)
        try:
            return None if value is None else self._unseal(key, value)
        except AuthenticationError:
            return None


def converted(kept: dict[Any, Any], name: Any, convert: Convert | None) -> Any:
    """Convert an object that is kept under its name, and return it.

    Raises:
        MessageError: of ``convert``. The object is not kept.
        UserCodeError: ``convert`` raised something else.
    """
    try:
        return kept[name] if convert is None else convert(kept[name])
    except MessageError:
        del kept[name]
        raise
    except Exception as error:
        # the tensor cannot be written; the next call may bring another one
        raise UserCodeError(error) from error
