"""The memory of CPU tensors, kept out of their pickles as buffers of protocol 5."""

import copyreg
import ctypes
import pickle
from collections import ChainMap
from typing import Any

import torch


def _reduce_storage(storage: Any) -> Any:
    """Leave the memory of a CPU tensor to the caller, instead of copying it into the pickle.

    A tensor pickles its storage, and adds its dtype, shape and strides.
    """
    untyped = storage._untyped_storage
    # a storage that is elsewhere, or has no memory, pickles itself
    if untyped.device.type != "cpu" or not untyped.nbytes():
        return storage.__reduce__()
    return _storage_from, (pickle.PickleBuffer(_memory_of(untyped)), storage.dtype)


def _reduce_untyped(untyped: torch.UntypedStorage) -> Any:
    """As a typed one: TypedStorage knows not every dtype, so torch adds those of some tensors.

    For these, its own way of pickling the storage cannot be read.
    """
    typed: Any = torch.storage.TypedStorage
    return _reduce_storage(typed(wrap_storage=untyped, dtype=torch.uint8, _internal=True))


REDUCERS: Any = ChainMap(
    {torch.storage.TypedStorage: _reduce_storage, torch.UntypedStorage: _reduce_untyped},
    copyreg.dispatch_table,
)


def _memory_of(storage: torch.UntypedStorage) -> Any:
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory._storage = storage  # type: ignore[attr-defined]  # keeps it alive
    return memory


def _storage_from(memory: bytearray, dtype: torch.dtype) -> Any:
    untyped = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=untyped, dtype=dtype, _internal=True)
