"""An interrupt at the worst moment: just before a request, as when a signal comes between two."""

from contextlib import suppress

import pytest
from ranks import LOCAL, run_ranks

from refdist import BarrierError, MessageError, StatelessProcessGroup, keys, messages

LARGE = messages.CHUNK_BYTES + 1  # two chunks


class Interruption:
    """Raises KeyboardInterrupt once, before the first request that ``matches``."""

    def __init__(self, matches):
        self._matches = matches
        self._over = False

    def __call__(self, request, key=None, *arguments):
        if not self._over and self._matches(request, key):
            self._over = True
            raise KeyboardInterrupt


def interrupted(here, group, rank, matches):
    """The same ranks in a group where one of them is interrupted."""
    return here.watched_group(
        group, Interruption(matches) if here.rank == rank else lambda *arguments: None
    )


# Rank 1 is interrupted as it leaves, and goes on to the next barrier. Rank 0 waits for it for a
# second, and raises only if it was not there by then. The next barriers complete on all three.


def _interrupt_departure(here):
    with here.group() as group:
        again = interrupted(
            here, group, 1, lambda request, key: (request, key) == ("add", keys.departed(0))
        )
        if here.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                again.barrier()
        elif here.rank == 0:
            with suppress(BarrierError):
                again.barrier(timeout=1)
        else:
            again.barrier()
        once = [again.barrier() or here.count_keys(group) for _ in range(2)]
        return once[0] == once[1]


def test_an_interrupt_in_departure_puts_nothing_out_of_step():
    assert run_ranks(_interrupt_departure, 3) == [True] * 3


# Rank 0 is interrupted while it waits for the others to leave, or just before. It raises
# KeyboardInterrupt, the others return, and the next barrier completes and cleans up.


def _interrupt_rank_0_in_departure(here):
    with here.group() as group:
        again = interrupted(
            here, group, 0, lambda request, key: (request, key) == ("wait", [keys.all_left(0)])
        )
        if here.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                again.barrier()
        else:
            again.barrier()
        once = [again.barrier() or here.count_keys(group) for _ in range(2)]
        return once[0] == once[1]


def test_an_interrupt_of_rank_0_in_departure_leaves_nothing_behind():
    assert run_ranks(_interrupt_rank_0_in_departure, 3) == [True] * 3


# Rank 0 is interrupted again and again, also while it breaks the barrier. The others time out, and
# the next barrier completes.


def _interrupt_twice(here):
    with here.group() as group:
        times = []

        def before(request, key=None, *arguments):
            breaking = request == "compare_set" and key.startswith("barrier/roll")
            if here.rank == 0 and len(times) < 2 and (request == "wait" or breaking):
                times.append(request)
                raise KeyboardInterrupt

        again = here.watched_group(group, before)
        expected = KeyboardInterrupt if here.rank == 0 else BarrierError
        if here.rank != 1:
            with pytest.raises(expected):
                again.barrier(timeout=1)
        here.meet("interrupted")
        if here.rank == 1:
            with pytest.raises(BarrierError):
                again.barrier(timeout=1)
        again.barrier()
        return times


def test_a_second_interrupt_while_the_barrier_is_broken():
    assert run_ranks(_interrupt_twice, 3)[0] == ["wait", "compare_set"]


# The sender is interrupted before the first chunk, before the second, and before the last write.
# It raises; the receiver learns of it at once, and gets the next message.


def _interrupt_send(here, request_key):
    with here.group() as group:
        again = interrupted(
            here, group, 0, lambda request, key: (request, key) == ("set", request_key)
        )
        if here.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                again.send_obj(bytes(LARGE), 1)
            again.send_obj("next", 1)
            return None
        with pytest.raises(MessageError, match="rank 0 did not finish writing it: Keyboard"):
            again.recv_obj(0)
        return again.recv_obj(0)


@pytest.mark.parametrize("key", ["message/0/1/0/chunk/0", "message/0/1/0/chunk/1", "message/0/1/0"])
def test_an_interrupted_send(key):
    assert run_ranks(_interrupt_send, 2, key)[1] == "next"


# A reader is interrupted before each of its requests. The next call reads the same message.


def _interrupt_receive(here, request, method):
    with here.group() as group:
        again = interrupted(here, group, 1, lambda name, key: name == request)
        if here.rank == 0:
            again.send_obj(bytes(LARGE), 1) if method == "recv_obj" else None
            again.broadcast_obj(bytes(LARGE), 0) if method == "broadcast_obj" else None
            return None

        def receive():
            return again.recv_obj(0) if method == "recv_obj" else again.broadcast_obj(None, 0)

        with pytest.raises(KeyboardInterrupt):
            receive()
        return len(receive())


@pytest.mark.parametrize("request_name", ["wait", "get", "compare_set"])
@pytest.mark.parametrize("method", ["recv_obj", "broadcast_obj"])
def test_an_interrupted_receive(request_name, method):
    assert run_ranks(_interrupt_receive, 2, request_name, method)[1] == LARGE


# Rank 1 is started with a wrong world size and refused. Rank 0 still waits, and lets the right one
# in, which is the same process here.


def _start_again(here):
    with here.place("group") as (port, listener):
        if here.rank == 1:
            with pytest.raises(ValueError, match="world_size=3: rank 0 formed the group"):
                StatelessProcessGroup.create(LOCAL, port, 1, 3)
        with StatelessProcessGroup.create(
            LOCAL, port, here.rank, 2, store_timeout=20, listen_socket=listener
        ) as group:
            return group.all_gather_obj(here.rank)


def test_a_refused_rank_takes_nobodys_place():
    assert run_ranks(_start_again, 2) == [[0, 1]] * 2


# Inside a with block, rank 2 does not come to a barrier. Rank 0 raises and leaves the block, which
# closes its store; rank 1 has still read why.


def _break_inside_with(here):
    try:
        with here.group() as group:
            if here.rank == 2:
                here.ask("over/0")
            else:
                group.barrier(timeout=1)
    except BarrierError as error:
        return error.missing
    finally:
        here.tell(f"over/{here.rank}")
    return None


def test_everyone_learns_why_a_barrier_broke_before_rank_0_closes():
    assert run_ranks(_break_inside_with, 3) == [(2,), (2,), None]
