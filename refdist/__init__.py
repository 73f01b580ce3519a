"""refdist: process groups without global state, over a torch store.

An educational reference implementation of ``vllm.distributed.utils``. Import it in place of that
module; read it to learn how processes that share nothing but a key-value store agree, wait, fail
and exchange objects. Read it in this order:

barrier
    ``plain`` first: how ranks agree. Then ``quick``, the same in fewer requests.
store, deadline
    A client of the store, why its requests end in time, its keys, and the tags on its values.
calls
    How a call stays whole, although it may be interrupted.
objects
    How an object is encoded, sent, received, gathered.
joining
    How ranks find each other, come together again, and leave; how a group splits, shrinks, grows.
group, errors, phases
    ``StatelessProcessGroup``, which hands on to all of these; what it raises, and records.
vllm_wire
    vLLM's own protocol, for groups with its ranks: messages, gather and barrier in 350 lines.
torch_groups, nccl, weights, pipeline
    Groups of gloo and NCCL; NCCL itself; how a model's weights travel; how layers fall on stages.
exploration, benchmarks, lab
    Every schedule of a protocol; what it costs; engines and figures for notebooks.

Words of its own, each with one meaning in code, notebooks and README:

phase
    One part of a barrier: arrival, confirmation or departure.
generation
    The number of a barrier or gather in its group, counted from 0 by every rank for itself.
roll
    The key of a barrier to which each rank appends an entry when it arrives, and when it leaves.
outcome
    How a barrier ended, the same for all ranks: complete, or broken and why. A barrier that broke
    because a rank was interrupted is tried "again".
state
    In ``quick``, one number that holds the outcome, and how many ranks have confirmed it.
slot
    In ``quick``, the keys of one barrier, which a later one uses again.
epoch
    In ``quick``, the barriers from one that broke to the next that does.
seal
    To put a tag on a value, which takes the group's secret.

The others are those of the field: rank, world size, store, key, message, chunk, engine (a process
of ipyparallel, whose id is its rank), stage (one part of a model that is split into a pipeline).

Importing refdist imports torch and the standard library, and none of ``nccl``, ``weights``,
``exploration``, ``benchmarks`` and ``lab``: import these by name. ``python -m refdist`` says what
this machine can do, and where to begin.
"""

from importlib import metadata as _metadata

from refdist.errors import (
    AuthenticationError,
    BarrierError,
    CollectiveError,
    ConcurrentCallError,
    GroupCreationError,
    InsecureGroupWarning,
    MessageError,
    MessageExpiredError,
    MessageTimeoutError,
    StoreConnectionError,
)
from refdist.group import StatelessProcessGroup
from refdist.phases import PhaseEvent
from refdist.pipeline import get_pp_indices
from refdist.polling import USE_SCHED_YIELD, sched_yield
from refdist.store.cached import get_cached_tcp_store_client
from refdist.store.listening import create_tcp_store
from refdist.tensor_parallel import (
    divide,
    ensure_divisibility,
    is_weak_contiguous,
    split_tensor_along_last_dim,
    verify_group_size_divides_partition,
)
from refdist.torch_groups.process_groups import (
    init_gloo_process_group,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.torch_groups.small_sums import cpu_all_reduce_

try:
    __version__ = _metadata.version("refdist")
except _metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "USE_SCHED_YIELD",
    "AuthenticationError",
    "BarrierError",
    "CollectiveError",
    "ConcurrentCallError",
    "GroupCreationError",
    "InsecureGroupWarning",
    "MessageError",
    "MessageExpiredError",
    "MessageTimeoutError",
    "PhaseEvent",
    "StatelessProcessGroup",
    "StoreConnectionError",
    "cpu_all_reduce_",
    "create_tcp_store",
    "divide",
    "ensure_divisibility",
    "get_cached_tcp_store_client",
    "get_pp_indices",
    "init_gloo_process_group",
    "is_weak_contiguous",
    "sched_yield",
    "split_tensor_along_last_dim",
    "stateless_destroy_torch_distributed_process_group",
    "stateless_init_torch_distributed_process_group",
    "verify_group_size_divides_partition",
]

_PACKAGES = {
    "barrier", "benchmarks", "exploration", "lab", "nccl", "pipeline", "torch_groups", "weights",
}  # fmt: skip


def __dir__() -> list[str]:
    """The names that tab completion shows: no module of the implementation, though it is here."""
    return [*__all__, "__version__", *(_PACKAGES & globals().keys())]
