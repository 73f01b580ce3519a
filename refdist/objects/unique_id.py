"""The id of an NCCL communicator, which vLLM's rank 0 sends to the others, without vLLM.

vLLM pickles it by the full name of a class of its own. Without vLLM, ``pickle.loads`` cannot read
such a message, and ``pickle.dumps`` refuses to write one, since it imports the class to compare.
So the name is looked up here when it is read, and written by hand.
"""

import ctypes
import pickle
import sys
from typing import Any

UNIQUE_ID_BYTES = 128
"""The size of NCCL's ``ncclUniqueId``."""

VLLM_NAME = "vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId"
"""The module and the class that vLLM's ranks name in a pickle."""


class NcclUniqueId(ctypes.Structure):
    """128 bytes that name an NCCL communicator; rank 0 makes them, all ranks pass them to NCCL.

    It has the memory and the field of vLLM's class ``ncclUniqueId``: ``NcclUniqueId()`` is all
    zeros, ``internal`` holds 128 signed bytes, and NCCL's functions take it as an argument.

    Attributes:
        internal: ``ctypes.c_byte * 128``.
    """

    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)

    @classmethod
    def from_bytes(cls, data: bytes) -> "NcclUniqueId":
        """The id of these 128 bytes.

        Raises:
            ValueError: they are more or fewer.
        """
        _check_size(data)
        return cls.from_buffer_copy(data)

    def __bytes__(self) -> bytes:
        return ctypes.string_at(ctypes.addressof(self), UNIQUE_ID_BYTES)

    def __repr__(self) -> str:
        return f"<NcclUniqueId {bytes(self)[:8].hex()}...>"


class Unpickler(pickle.Unpickler):
    """As pickle's, which runs what a message names, but reads vLLM's ids without vLLM."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Find what a message names: ``class_here()`` for vLLM's name, else what pickle finds."""
        if (module_name, global_name) == VLLM_NAME:
            return class_here()
        return super().find_class(module_name, global_name)


def class_here() -> type[ctypes.Structure]:
    """The class of ids that are read in this process.

    vLLM's own class if its wrapper is imported already, because that wrapper takes no other; else
    ``NcclUniqueId``. Nothing is imported.
    """
    module, name = VLLM_NAME
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, ctypes.Structure):
        return found
    return NcclUniqueId


def from_pickled(data: bytes) -> ctypes.Structure:
    """An id of ``class_here()``, of the 128 bytes that a pickle holds.

    Raises:
        ValueError: they are more or fewer.
    """
    _check_size(data)
    return class_here().from_buffer_copy(data)


def pickled_for_vllm(unique_id: ctypes.Structure) -> bytes:
    """The pickle of an id that ``pickle.loads`` of a vLLM rank reads as vLLM's own class.

    Args:
        unique_id: a ``NcclUniqueId``, or vLLM's.

    Raises:
        ValueError: it has another size.
    """
    data = bytes(unique_id)
    _check_size(data)
    # protocol 3: _ctypes._unpickle(ncclUniqueId, ({}, data)), as pickle writes any ctypes structure
    function, name = b"c_ctypes\n_unpickle\n", "c{}\n{}\n".format(*VLLM_NAME).encode()
    state = pickle.EMPTY_DICT + pickle.SHORT_BINBYTES + bytes([len(data)]) + data + pickle.TUPLE2
    return b"\x80\x03" + function + name + state + pickle.TUPLE2 + pickle.REDUCE + pickle.STOP


def _check_size(data: bytes) -> None:
    if len(data) != UNIQUE_ID_BYTES:
        raise ValueError(f"an id of {len(data)} bytes: NCCL's have {UNIQUE_ID_BYTES}")
