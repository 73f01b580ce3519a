"""Barriers. Read ``plain`` first; ``quick`` is faster; ``roll`` is what their ranks write."""

from torch.distributed import Store

from refdist.barrier import plain, quick, roll
from refdist.store.client import StoreClient

__all__ = ["barrier_of", "plain", "quick", "roll"]


def barrier_of(store: Store | StoreClient, rank: int, world_size: int) -> plain.Barrier:
    """The quickest kind of barrier that a store allows. All ranks of a group use the same."""
    client = store if isinstance(store, StoreClient) else StoreClient(store)
    fits = client.has_barrier and world_size <= quick.COUNT
    kind = quick.Barrier if fits else plain.Barrier
    return kind(client, rank, world_size)


def __dir__() -> list[str]:
    return __all__
