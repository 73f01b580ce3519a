"""Membership: each rank writes about itself when it joins, and one process at most is each rank.

A refusal says why at once, on the rank that is refused.
"""

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
from refdist.store.client import StoreClient
from refdist.store.seals import NO_SEALS, VARIABLE, NoSeals, Seals, is_sealed

GONE = b"gone"
"""Stands in place of what a rank wrote about itself, once it has left."""


class _Process:
    """Identifies this process, even against the same pid on a host of the same name."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.token = os.urandom(8).hex()


_process = _Process()


class LeftoverStoreError(Exception):
    """The store belongs to a group that is ending; that of the new group is still to come."""


class Membership:
    """A rank as it joins a group, on an open store.

    Args:
        where: host and port, for errors.
        secret: of the group.
    """

    def __init__(
        self, store: StoreClient, rank: int, world_size: int, where: str, secret: bytes | None
    ) -> None:
        self._store, self._rank, self._world_size, self._where = store, rank, world_size, where
        self._seals = seals_of_members(secret)

    def register(self, deadline: Deadline) -> bytes:
        """Take a rank that no other process has, in a group of the size that rank 0 knows.

        Returns:
            The text that rank 0 has written about itself.

        Raises:
            ValueError: the rank is taken, or rank 0 has another world size, or another torch.
            GroupCreationError: rank 0 did not come, or has another secret.
            LeftoverStoreError: the store is that of a group which is ending.
        """
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process.token,
            "world_size": self._world_size,
            "store_barrier": self._store.has_barrier,
            "torch": str(torch.__version__),
            "token": os.urandom(8).hex(),
        }
        about_me = json.dumps(me).encode()
        # a rank with another world size must not take the place of the right one
        rank_0 = about_me if self._rank == 0 else self._read_rank_0(me, deadline)
        key = keys.member(self._rank)
        proposal = self._seals.seal(key, about_me)
        holder = self._store.decide(key, proposal)
        if holder != proposal:
            self._refuse_second(holder)
        return rank_0

    def _read_rank_0(self, me: dict[str, Any], deadline: Deadline) -> bytes:
        """The text of rank 0 about itself, if this rank may join its group."""
        written = self._store.wait_for_value(keys.member(0), deadline)
        if written is None:
            raise GroupCreationError(
                f"rank 0 did not come to {self._where} within {deadline.allowed:g} s", missing=[0]
            )
        about_rank_0 = self._unseal_rank_0(written)
        rank_0 = self._parse(about_rank_0, 0)
        if rank_0.get("world_size") != self._world_size:
            raise ValueError(
                f"world_size={self._world_size}: rank 0 formed the group on {self._where} with "
                f"{rank_0.get('world_size')}"
            )
        if rank_0.get("store_barrier") != me["store_barrier"]:
            raise ValueError(
                f"torch {me['torch']}: rank 0 on {self._where} has torch {rank_0.get('torch')}, "
                f"and only one of them has Store.barrier; all ranks must have it, or none"
            )
        return about_rank_0

    def _unseal_rank_0(self, written: bytes) -> bytes:
        """The text of rank 0, if it has the same secret as this rank, or neither has one.

        Otherwise the other ranks will be told.
        """
        try:
            return unseal_rank_0(written, self._seals, self._where)
        except AuthenticationError as error:
            self._check_not_ending(self._store.peek(keys.member(self._rank)))
            self._store.set(keys.refused(self._rank), "")
            raise GroupCreationError(f"rank {self._rank} {error}") from error

    def _refuse_second(self, holder: bytes) -> None:
        """Raise because another process is this rank already."""
        self._check_not_ending(holder)
        try:
            other = self._parse(self._seals.unseal(keys.member(self._rank), holder), self._rank)
        except AuthenticationError as error:
            raise GroupCreationError(
                f"rank {self._rank} is taken on {self._where} by someone with another secret, or "
                f"none: {error}"
            ) from error
        taken = f"is taken on {self._where} by process {other.get('pid')} of {other.get('host')}"
        if other.get("process") == _process.token:
            # this process was that rank before; a group of its own is no rival of the next one
            raise LeftoverStoreError(f"rank={self._rank}: {taken}, which is this one")
        raise ValueError(f"rank={self._rank}: {taken}; each rank of a group is one process")

    def _check_not_ending(self, written: bytes | None) -> None:
        if written == GONE:
            raise LeftoverStoreError(f"the group on {self._where} is ending")

    def _parse(self, written: bytes, rank: int) -> dict[str, Any]:
        try:
            return dict(json.loads(written))
        except (ValueError, TypeError, RecursionError) as error:
            raise GroupCreationError(
                f"rank {rank} on {self._where} is held by {written[:40]!r}, which no rank of "
                f"refdist writes"
            ) from error


def introduce(store: StoreClient, secret: bytes | None) -> None:
    """Write, for those that come later, that the store is that of a group with this secret."""
    key, about_me = keys.member(0), json.dumps({"token": os.urandom(8).hex()}).encode()
    store.set(key, seals_of_members(secret).seal(key, about_me))


def seals_of_members(secret: bytes | None) -> NoSeals:
    """The seals of what ranks write about themselves."""
    return NO_SEALS if secret is None else Seals(secret, "member")


def unseal_rank_0(written: bytes, seals: NoSeals, where: str) -> bytes:
    """The text of rank 0 on ``where`` about itself.

    Raises:
        AuthenticationError: it has another secret than these seals, or only one of both has one.
    """
    advice = f"give all ranks the same, by secret= or {VARIABLE}"
    if is_sealed(written) != (seals.tag_bytes > 0):
        mine, other = ("a secret", "none") if seals.tag_bytes else ("no secret", "one")
        raise AuthenticationError(f"has {mine}, but rank 0 on {where} has {other}; {advice}")
    try:
        return seals.unseal(keys.member(0), written)
    except AuthenticationError as error:
        text = f"has another secret than rank 0 on {where} ({error}); {advice}"
        raise AuthenticationError(text) from error


def refused(store: StoreClient, missing: Sequence[int]) -> str:
    """Which missing ranks had come with another secret, as far as anyone can know."""
    ranks: list[int] = []
    with suppress(DistError):
        ranks += [rank for rank in missing if store.peek(keys.refused(rank)) is not None]
    if not ranks:
        return ""
    return f"; {name_ranks(ranks)} came with another secret than rank 0, or one of them with none"
