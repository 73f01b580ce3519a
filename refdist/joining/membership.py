"""Who is which rank of a group: what each writes about itself when it joins, and who may."""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.distributed import DistError

from refdist.deadline import Deadline
from refdist.errors import AuthenticationError, GroupCreationError, name_ranks
from refdist.store import keys
from refdist.store.client import StoreClient, has_barrier
from refdist.store.seals import NO_SEALS, VARIABLE, NoSeals, Seals, is_sealed
from refdist.store.waiting import decide, peek, wait_for_value

GONE = b"gone"
"""Stands in place of what a rank wrote about itself, once it has left."""


class _Process:
    """Tells this process from all others, also from one with its number on a host of its name."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.token = os.urandom(8).hex()


_process = _Process()


class LeftoverStoreError(Exception):
    """The store belongs to a group that is ending; that of the new group is still to come."""


def register(
    store: StoreClient,
    rank: int,
    world_size: int,
    deadline: Deadline,
    where: str,
    secret: bytes | None,
) -> bytes:
    """Take a rank that nobody else has, in a group of the size that rank 0 knows.

    Returns:
        What rank 0 has written about itself.
    """
    seals = NO_SEALS if secret is None else Seals(secret, "member")
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process.token,
        "world_size": world_size,
        "store_barrier": has_barrier(store),
        "torch": str(torch.__version__),
        "token": os.urandom(8).hex(),
    }
    about_me = json.dumps(me).encode()
    proposal = seals.seal(keys.member(rank), about_me)
    # a rank with another world size must not take the place of the right one
    rank_0 = about_me if rank == 0 else _check_rank_0(store, rank, me, deadline, where, seals)
    holder = decide(store, keys.member(rank), proposal)
    if holder == GONE:
        raise LeftoverStoreError(f"the group on {where} is ending")
    if holder != proposal:
        try:
            other = _read_member(seals.unseal(keys.member(rank), holder), rank, where)
        except AuthenticationError as error:
            raise GroupCreationError(
                f"rank {rank} is taken on {where} by someone with another secret, or none: {error}"
            ) from error
        taken = f"is taken on {where} by process {other.get('pid')} of {other.get('host')}"
        if other.get("process") == _process.token:
            # this process was that rank before; a group of its own is no rival of the next one
            raise LeftoverStoreError(f"rank={rank}: {taken}, which is this one")
        raise ValueError(f"rank={rank}: {taken}; each rank of a group is one process")
    return rank_0


def _check_rank_0(
    store: StoreClient,
    rank: int,
    me: dict[str, Any],
    deadline: Deadline,
    where: str,
    seals: NoSeals,
) -> bytes:
    """Refuse to join a group whose rank 0 has another one in mind. Returns what it wrote."""
    written = wait_for_value(store, keys.member(0), deadline)
    if written is None:
        raise GroupCreationError(
            f"rank 0 did not come to {where} within {deadline.allowed:g} s", missing=[0]
        )
    if written == GONE:
        raise LeftoverStoreError(f"the group on {where} is ending")
    about_rank_0 = _unseal_rank_0(store, rank, written, where, seals)
    rank_0 = _read_member(about_rank_0, 0, where)
    world_size = me["world_size"]
    if rank_0.get("world_size") != world_size:
        raise ValueError(
            f"world_size={world_size}: rank 0 formed the group on {where} with "
            f"{rank_0.get('world_size')}"
        )
    if rank_0.get("store_barrier") != me["store_barrier"]:
        raise ValueError(
            f"torch {me['torch']}: rank 0 on {where} has torch {rank_0.get('torch')}, and only "
            f"one of them has Store.barrier; all ranks must have it, or none"
        )
    return about_rank_0


def _unseal_rank_0(
    store: StoreClient, rank: int, written: bytes, where: str, seals: NoSeals
) -> bytes:
    """What rank 0 has written about itself, if it has the same secret as this rank, or none.

    Raises:
        GroupCreationError: it has not. The others will be told.
    """
    mine = bool(seals.tag_bytes)
    try:
        if mine == is_sealed(written):
            return seals.unseal(keys.member(0), written)
        text = "has a secret, but rank 0 has none" if mine else "has no secret, but rank 0 has one"
        cause = None
    except AuthenticationError as error:
        text, cause = f"has another secret than rank 0 ({error})", error
    if peek(store, keys.member(rank)) == GONE:
        raise LeftoverStoreError(f"the group on {where} is ending")
    store.set(keys.refused(rank), "")
    raise GroupCreationError(
        f"rank {rank} {text} on {where}; give all ranks the same, by secret= or {VARIABLE}"
    ) from cause


def _read_member(written: bytes, rank: int, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(written))
    except (ValueError, TypeError, RecursionError) as error:
        raise GroupCreationError(
            f"rank {rank} on {where} is held by {written[:40]!r}, which no rank of refdist writes"
        ) from error


def refused(store: StoreClient, missing: Sequence[int]) -> str:
    """Which missing ranks had come with another secret, as far as anyone can know."""
    ranks: list[int] = []
    with suppress(DistError):
        ranks += [rank for rank in missing if peek(store, keys.refused(rank)) is not None]
    if not ranks:
        return ""
    return f"; {name_ranks(ranks)} came with another secret than rank 0, or one of them with none"
