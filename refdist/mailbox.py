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

from refdist import keys, messages
from refdist.boxes import Boxes
from refdist.errors import (
    AuthenticationError,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
)
from refdist.waiting import CancelledWaitError, Deadline


class Mailbox:
    """The messages and broadcasts of one rank."""

    def __init__(self, boxes: Boxes, rank: int, entries: deque[tuple[str, float]]) -> None:
        """``entries`` gets a key and the time, monotonic, of all that is sent."""
        self._boxes = boxes
        self._rank = rank
        self._entries = entries
        self._half_read: dict[str, bytes] = {}  # taken out, but the chunks are still to be read
        self._large: dict[str, tuple[list[str], list[str]]] = {}  # copies and chunks, by message

    def send(
        self, key: str, copies: list[str], encoded: messages.Encoded, deadline: Deadline
    ) -> None:
        """Put copies of an object into boxes, and its chunks, if it takes any, under ``key``.

        Raises:
            CancelledWaitError: the deadline was cancelled. The readers get a MessageError.
        """
        now = time.monotonic()
        # an object whose sending is interrupted expires all the same
        chunk_keys = messages.chunk_keys(key, messages.lengths_of(encoded.value))
        if chunk_keys:
            self._large[key] = copies, chunk_keys
            self._entries.append((key, now))
        else:
            self._entries.extend((copy, now) for copy in copies)
        for copy in copies:
            self._boxes.put(copy, encoded.value)
        messages.write_chunks(self._boxes, key, encoded, deadline)

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
        refused, once it is of no more use. A timeout or an interrupt in the chunks leaves it for
        the next call.

        Raises:
            MessageTimeoutError: it did not come in time, or not all of it.
            MessageExpiredError: it expired before this call.
            AuthenticationError: it is not from ``src``.
            MessageError: it is no object.
            CancelledWaitError: the deadline was cancelled.
        """
        try:
            value = self._half_read.pop(box, None) or self._boxes.take(box, deadline)
        except AuthenticationError:
            consume(b"")
            raise
        if value is None:
            raise MessageTimeoutError(
                f"{box}: rank {self._rank} waited in vain for this from rank {src}: "
                f"{deadline.elapsed():.2f} of {deadline.allowed:g} s",
                [src],
            )
        try:
            obj = messages.read(self._boxes, key, value, deadline)
        except CancelledWaitError:
            self._half_read[box] = value
            raise
        except MessageTimeoutError as error:
            self._half_read[box] = value
            text = f"rank {self._rank} waited in vain for the rest from rank {src}: {error}"
            raise MessageTimeoutError(text, [src]) from None
        except MessageError as error:
            consume(None if isinstance(error, MessageExpiredError) else value)
            raise
        consume(value)
        return obj

    def delete(self, some_keys: Sequence[str]) -> None:
        """Delete keys, each in one request."""
        for key in some_keys:
            self._boxes.empty(key)

    def expire(self, seconds: float) -> None:
        """Expire what was sent more than ``seconds`` ago and is unread."""
        oldest_kept = time.monotonic() - seconds
        while self._entries and self._entries[0][1] < oldest_kept:
            key, _ = self._entries.popleft()
            if key in self._large:
                self._expire_large(key, *self._large.pop(key), seconds)
            else:
                self._boxes.replace(key, messages.expired(seconds))

    def _expire_large(
        self, key: str, copies: list[str], chunk_keys: list[str], seconds: float
    ) -> None:
        for copy in copies:
            self._boxes.replace(copy, messages.expired(seconds))
        if copies != [key]:
            # a broadcast
            number = int(key.rpartition("/")[2])
            self._boxes.empty(keys.broadcast_readers(self._rank, number))
        there = [self._boxes.empty(chunk_key) for chunk_key in chunk_keys]
        if any(there):
            # someone may be reading them
            messages.write_expired(self._boxes, key, seconds)
