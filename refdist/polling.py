"""Giving the processor away while polling."""

import os
import time
from sys import version_info

USE_SCHED_YIELD: bool = version_info[:3] >= (3, 11, 1) or (
    version_info[:2] == (3, 10) and version_info[2] >= 8
)
"""Whether ``os.sched_yield`` releases the interpreter lock, as it does since 3.11.1 and 3.10.8.

From the specification of ``vllm.distributed.utils``.
"""


def sched_yield() -> None:
    """Let another thread or process run, and return at once if none wants to.

    Uses ``os.sched_yield`` where that is safe (``USE_SCHED_YIELD``) and exists, else
    ``time.sleep(0)``.

    Source: the specification of ``vllm.distributed.utils``.
    """
    if USE_SCHED_YIELD and hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
