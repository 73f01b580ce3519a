"""Torch groups without global state, and collectives on them."""

from refdist.torch_groups import collectives

__all__ = ["collectives"]


def __dir__() -> list[str]:
    return __all__
