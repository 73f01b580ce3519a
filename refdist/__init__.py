"""refdist: process groups without global state, over a torch store.

An educational reference implementation of ``vllm.distributed.utils``. Import it in place of that
module; read it to learn how processes that share nothing but a key-value store agree, wait, fail
and exchange objects.

Words, each with one meaning throughout the package:

rank
    The number of a process in a group, 0 to ``world_size - 1``.
world size
    How many ranks a group has.
store
    The key-value store that the ranks share. Rank 0 hosts it.
phase
    One part of a barrier: arrival, confirmation or departure. Each has its own timeout.
generation
    The number of a barrier in its group, counted from 0 by every rank for itself.
outcome
    How a barrier ended, the same for all ranks: complete or broken. Its state decides.
state
    The key of a barrier that every rank changes when it confirms, or when it breaks the barrier.
slot
    The keys of one barrier, which a later barrier uses again.
epoch
    The barriers from one that broke to the next that does.
gate
    A key at which ranks wait until another rank opens it.
box
    A key that holds one message for one reader.
seal
    A tag on a value, which only who knows the group's secret can make.
engine
    A process of ipyparallel that runs a notebook's cells. Its id is its rank.
stage
    One part of a model that is split into a pipeline of layers.

Importing refdist imports torch and the standard library. ``refdist.lab`` (engines and figures for
notebooks), ``refdist.exploration`` and ``refdist.benchmarks`` are for those who need them.
"""

from importlib.metadata import PackageNotFoundError, version

from refdist.barrier.phases import PhaseEvent
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
from refdist.pipeline import get_pp_indices
from refdist.polling import USE_SCHED_YIELD, sched_yield
from refdist.store.listening import create_tcp_store
from refdist.tensor_parallel import (
    divide,
    ensure_divisibility,
    is_weak_contiguous,
    split_tensor_along_last_dim,
)
from refdist.torch_groups.process_groups import (
    init_gloo_process_group,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from refdist.torch_groups.small_sums import cpu_all_reduce_

try:
    __version__ = version("refdist")
except PackageNotFoundError:  # imported from a source tree that was never installed
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
    "get_pp_indices",
    "init_gloo_process_group",
    "is_weak_contiguous",
    "sched_yield",
    "split_tensor_along_last_dim",
    "stateless_destroy_torch_distributed_process_group",
    "stateless_init_torch_distributed_process_group",
]
