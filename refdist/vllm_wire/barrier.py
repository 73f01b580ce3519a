"""A barrier as vLLM's ranks make it.

Arrival
    Rank 0 broadcasts a name for this barrier. Each rank writes a key of its own, and waits for
    those of all others.
Confirmation
    Each rank writes another key: it knows that all have arrived.
Departure
    Rank 0 hosts the store, so it waits for these keys of all others, and deletes both kinds.

A rank that has waited in vain raises, but cannot take its arrival back. So a rank that comes late
finds all arrivals, and passes: there is no agreement. Each rank waits for each other rank, so the
requests of all of them grow with the square of their number.
"""

import pickle
import uuid
from collections.abc import Callable
from typing import Any

from refdist.deadline import CancelledWaitError, Deadline
from refdist.errors import BarrierError, MessageError, MessageTimeoutError, name_ranks, not_left
from refdist.store import keys
from refdist.vllm_wire.messages import Messages


class Barrier(Messages):
    """The barriers of a group, which ``generation`` counts, and its messages."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        super().__init__(store, rank, world_size)
        self.begun = ""  # the name of the barrier that this rank is in, or was interrupted in

    def wait(self, deadline: Deadline) -> None:
        """Block until all ranks have come; rank 0 until all have left. Seconds for each phase.

        Raises:
            BarrierError: on this rank alone. A rank did not arrive in time; or, on rank 0, with
                ``completed=True``, did not leave.
            MessageError: rank 0 has made another call.
            CancelledWaitError: the deadline was cancelled. If not all had arrived, the next call
                goes on with this barrier.
        """
        goes_on = False
        try:
            try:
                self.arrive(deadline)
            except CancelledWaitError:
                goes_on = True
                raise
            self.confirm(deadline)
            self.depart(deadline)
        finally:
            if not goes_on:
                self.begun = ""
                self.generation += 1

    def arrive(self, deadline: Deadline) -> None:
        """Learn the name of the barrier, say that this rank is there, and wait for all others."""
        if not self.begun:
            self.begun = self.name_it(deadline)
        self.store.set(keys.vllm_arrival(self.begun, self.rank), "1")
        self.wait_for(keys.vllm_arrival, deadline, self.missing)

    def name_it(self, deadline: Deadline) -> str:
        """The name of the next barrier, which rank 0 broadcasts."""
        if self.rank == 0:
            name = f"barrier_{uuid.uuid4()}"
            self.broadcast(pickle.dumps(name), self.group.broadcast_send_counter, deadline, False)
            self.group.broadcast_send_counter += 1
            return name
        try:
            told = self.receive_next(0, deadline, tensor=False, broadcast=True)
        except MessageTimeoutError as error:
            self.group.broadcast_recv_src_counter[0] += 1  # the next barrier has the next name
            raise self.missing([0], deadline) from error
        if not isinstance(told, str) or not told.startswith("barrier_"):
            raise MessageError(
                f"barrier on rank {self.rank}: rank 0 broadcast {repr(told)[:40]}, which names no "
                f"barrier; have the ranks made different calls?"
            )
        return told

    def confirm(self, deadline: Deadline) -> None:
        """Say that this rank knows that all have arrived."""
        self.store.set(keys.vllm_departure(self.begun, self.rank), "1")

    def depart(self, deadline: Deadline) -> None:
        """Rank 0 waits until all others have confirmed, and deletes the keys of the barrier."""
        if self.rank != 0:
            return
        deadline.restart()
        self.wait_for(keys.vllm_departure, deadline, self.not_left)
        for rank in range(self.world_size):
            self.store.delete_key(keys.vllm_arrival(self.begun, rank))
            self.store.delete_key(keys.vllm_departure(self.begun, rank))

    def wait_for(
        self,
        key_of: Callable[[str, int], str],
        deadline: Deadline,
        error_of: Callable[[list[int], Deadline], BarrierError],
    ) -> None:
        """Wait until every rank has written its key."""
        written = [key_of(self.begun, rank) for rank in range(self.world_size)]
        if not self.store.wait(written, deadline):
            missing = [rank for rank, key in enumerate(written) if not self.store.check([key])]
            if missing:
                raise error_of(missing, deadline)

    def missing(self, ranks: list[int], deadline: Deadline) -> BarrierError:
        """The error of a rank that has waited in vain for others to arrive."""
        return BarrierError(
            f"barrier {self.generation} failed on rank {self.rank} in arrival, after "
            f"{deadline.elapsed():.2f} of {deadline.allowed:g} s; missing: {name_ranks(ranks)} of "
            f"{self.world_size}; in vLLM's protocol, other ranks may have passed",
            phase="arrival",
            missing=ranks,
            elapsed=deadline.elapsed(),
            allowed=deadline.allowed,
            broken_by=self.rank,
            generation=self.generation,
        )

    def not_left(self, ranks: list[int], deadline: Deadline) -> BarrierError:
        """The error of rank 0, which has waited in vain for others to leave."""
        return not_left(ranks, self.generation, deadline.elapsed(), deadline.allowed)
