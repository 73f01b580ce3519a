"""What one rank has sent and nobody has read yet, and what it has begun to read itself.

A message is put into one box, which only its destination reads. A broadcast is put into one box for
each reader. The chunks of a large object are written once, for all.

What is still unread after a while expires: the sender takes it out and puts a note in its place, so
that who asks for it later learns why there is nothing, instead of waiting.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from refdist.deadline import Deadline, UserCodeError
from refdist.errors import (
    AuthenticationError,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
)
from refdist.objects import encoding
from refdist.objects.boxes import Boxes
from refdist.store import keys


class Mailbox:
    """The messages and broadcasts of one rank."""

    def __init__(self, boxes: Boxes, rank: int, entries: deque[tuple[str, float]]) -> None:
        """``entries`` gets a key and the time, monotonic, of all that is sent."""
        self._boxes = boxes
        self._rank = rank
        self._entries = entries
        self._half_read: dict[str, bytes] = {}  # taken out, but the chunks are still to be read
        self._ended_by_user = ""  # the box whose unpickling was ended once by no Exception
        self._large: dict[str, tuple[list[str], list[str]]] = {}  # copies and chunks, by message

    def send(
        self, key: str, copies: list[str], encoded: encoding.Encoded, deadline: Deadline
    ) -> None:
        """Put copies of an object into boxes, and its chunks, if it takes any, under ``key``.

        Raises:
            CancelledWaitError: the deadline was cancelled. The readers get a MessageError.
        """
        now = time.monotonic()
        # an object whose sending is interrupted expires all the same
        chunk_keys = encoding.chunk_keys(key, encoding.lengths_of(encoded.value))
        if chunk_keys:
            self._large[key] = copies, chunk_keys
            self._entries.append((key, now))
        else:
            self._entries.extend((copy, now) for copy in copies)
        for copy in copies:
            self._boxes.put(copy, encoded.value)
        encoding.write_chunks(self._boxes, key, encoded, deadline)

    def receive(
        self,
        box: str,
        key: str,
        src: int,
        consume: Callable[[bytes | None], None],
        deadline: Deadline,
    ) -> Any:
        """Take the next object of ``src`` out of its box; the chunks of a large one are under key.

        ``consume`` gets what was in the box, or None if that has expired, or nothing if that was
        refused, once it is of no more use. A timeout, an interrupt or a lack of room for the chunks
        leaves it for the next call.

        Raises:
            MessageTimeoutError: it did not come in time, or not all of it.
            MessageExpiredError: it expired before this call.
            AuthenticationError: it is not from ``src``.
            MessageError: it is no object.
            NoRoomError: there is no room for it now.
            UserCodeError: its unpickling raised something that is no Exception. The next call tries
                again, once.
            CancelledWaitError: the deadline was cancelled.
        """
        try:
            value = self._half_read.get(box) or self._boxes.take(box, deadline)
        except AuthenticationError:
            consume(b"")
            raise
        if value is None:
            raise MessageTimeoutError(
                f"{box}: rank {self._rank} waited in vain for this from rank {src}: "
                f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
                [src],
            )
        # until it is of no more use, whatever ends this call
        self._half_read[box] = value
        try:
            obj = encoding.read(self._boxes, key, value, deadline)
        except MessageTimeoutError as error:
            text = f"rank {self._rank} waited in vain for the rest from rank {src}: {error}"
            raise MessageTimeoutError(text, [src]) from None
        except (MessageError, UserCodeError) as error:
            if isinstance(error, UserCodeError) and self._ended_by_user != box:
                # perhaps a signal's handler has raised it, and not the object
                self._ended_by_user = box
                raise
            del self._half_read[box]
            consume(None if isinstance(error, MessageExpiredError) else value)
            raise
        del self._half_read[box]
        consume(value)
        return obj

    def delete(self, some_keys: Sequence[str]) -> None:
        """Delete keys, each in one request."""
        for key in some_keys:
            self._boxes.empty(key)

    def expire(self, seconds: float, deadline: Deadline, at_most: int | None = None) -> None:
        """Expire what was sent more than ``seconds`` ago and is unread.

        Args:
            seconds: how long what was sent stays.
            deadline: only an interrupt ends this before the end.
            at_most: how many entries to look at, not to be interrupted; None for all.

        Raises:
            CancelledWaitError: the deadline was cancelled. What is left expires the next time.
        """
        oldest_kept = time.monotonic() - seconds
        looked_at = 0
        while self._entries and self._entries[0][1] < oldest_kept and looked_at != at_most:
            if at_most is None:
                deadline.check()
            looked_at += 1
            key, _ = self._entries.popleft()
            if key in self._large:
                self._expire_large(key, *self._large.pop(key), seconds)
            else:
                self._boxes.replace(key, encoding.expired(seconds))

    def _expire_large(
        self, key: str, copies: list[str], chunk_keys: list[str], seconds: float
    ) -> None:
        for copy in copies:
            self._boxes.replace(copy, encoding.expired(seconds))
        if copies != [key]:
            # a broadcast
            number = int(key.rpartition("/")[2])
            self._boxes.empty(keys.broadcast_readers(self._rank, number))
        there = False
        for chunk_key in chunk_keys:
            there |= self._boxes.empty(chunk_key)
        if there:
            # someone may be reading them
            encoding.write_expired(self._boxes, key, seconds)
