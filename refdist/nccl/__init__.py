"""NCCL between processes that share a group of refdist, or nothing but 128 bytes.

``NcclCommunicator`` has names and signatures of vLLM's ``PyNcclCommunicator``, and forms one
communicator with its ranks. Unlike it, every call here ends by a deadline. It needs CUDA GPUs and
nccl4py (``pip install nccl4py cuda-bindings``), imported when the first communicator is made.
Importing this package needs neither.

Read ``handle`` first: how a call to NCCL gets a deadline. Then ``forming``: how a communicator
comes to be. ``communicator`` has the public class, ``arguments`` its checks; ``library`` knows
nccl4py.
"""

from refdist.nccl.communicator import NcclCommunicator
from refdist.nccl.forming import new_unique_id_bytes

__all__ = ["NcclCommunicator", "new_unique_id_bytes"]


def __dir__() -> list[str]:
    return __all__
