"""How a communicator comes to be: its id, its connections, and the first sum of all ranks."""

import ctypes

import torch

from refdist.checks import check_integer
from refdist.deadline import Deadline
from refdist.errors import MessageError
from refdist.group import StatelessProcessGroup
from refdist.nccl.handle import Handle, Launch
from refdist.nccl.library import load
from refdist.objects.unique_id import UNIQUE_ID_BYTES, NcclUniqueId

_MOST = 2**31 - 1  # NCCL counts colors and keys in an int of C


def new_unique_id_bytes() -> bytes:
    """A new id for ``NcclCommunicator.from_unique_id_bytes``: the 128 bytes of ``ncclUniqueId``.

    One process makes it, and each rank of one communicator gets it. A thread in this process serves
    the ranks that come, so the process must live until all have come.

    Raises:
        ImportError: nccl4py is not installed.

    Source: ``ncclGetUniqueId`` of NCCL.
    """
    return bytes(load().get_unique_id())


def share_unique_id(group: StatelessProcessGroup, deadline: Deadline) -> bytes:
    """Rank 0 makes the id and broadcasts it as an object of the group, as vLLM's rank 0 does.

    Raises:
        ValueError: it is no group of refdist.
        MessageTimeoutError: nothing came from rank 0 in time.
        MessageError: something else came.
    """
    if not isinstance(group, StatelessProcessGroup):
        raise ValueError(
            f"group is a {type(group).__name__}; it must be a StatelessProcessGroup of refdist"
        )
    mine = NcclUniqueId.from_bytes(new_unique_id_bytes()) if group.rank == 0 else None
    unique_id = group.broadcast_obj(mine, src=0, timeout=deadline.remaining())
    # vLLM's own class where vLLM is imported, else that of refdist
    is_structure = isinstance(unique_id, ctypes.Structure)
    if not is_structure or ctypes.sizeof(unique_id) != UNIQUE_ID_BYTES:
        raise MessageError(
            f"rank 0 broadcast a {type(unique_id).__name__} and not the id of an NCCL "
            f"communicator; all ranks must create it in the same place among their calls"
        )
    return bytes(unique_id)


def form(
    unique_id_bytes: bytes, rank: int, world_size: int, device: torch.device, deadline: Deadline
) -> Handle:
    """Connect to the other ranks, then sum one float32 up, as each rank of vLLM does.

    Raises:
        CollectiveError: the ranks did not come in time, or NCCL failed.
    """
    core = load()
    comm, config = core.Communicator(), core.NCCLConfig(blocking=False)
    unique_id = core.UniqueId.from_bytes(unique_id_bytes)
    handle = Handle(comm, rank, world_size, device)
    one = torch.zeros(1, device=device)  # before the rest: NCCL needs the context of the device
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        handle.run("create", deadline, lambda: comm.initialize(world_size, rank, unique_id, config))
    warm_up = Launch("warm-up all_reduce", stream)
    handle.run(
        warm_up.operation,
        deadline,
        lambda: comm.allreduce(one, one, core.SUM, stream=stream.cuda_stream),
        [warm_up],
    )
    handle.wait(deadline)
    return handle


def split(handle: Handle, color: int | None, key: int, deadline: Deadline) -> Handle | None:
    """``ncclCommSplit``: the communicator of the ranks that pass the same color.

    Raises:
        ValueError: ``color`` or ``key`` is out of its range.
        CollectiveError: an operation has not ended, or not all ranks have called this.
    """
    if color is not None:
        color = _check_int("color", color, 0)
    key = _check_int("key", key, -_MOST)
    handle.wait(deadline)  # NCCL wants no operation under way
    children = []
    handle.run("split", deadline, lambda: children.append(handle.comm.split(color, key)))
    if color is None:
        return None
    comm = children[0]
    return Handle(comm, comm.rank, comm.nranks, handle.device)


def _check_int(name: str, value: int, least: int) -> int:
    value = check_integer(name, value)
    if not least <= value <= _MOST:
        raise ValueError(f"{name}={value}: must be in {least}..{_MOST}")
    return value
