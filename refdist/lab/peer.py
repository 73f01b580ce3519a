"""vLLM's own class of a group, where this machine has it."""

import importlib
import os
import sys
from typing import Any

FOLDER = "REFDIST_VLLM"


def vllm_class() -> Any:
    """``vllm.distributed.utils.StatelessProcessGroup``, or None where it cannot be imported.

    The environment variable ``REFDIST_VLLM`` may name a folder that has the package ``vllm``, such
    as one of those that ``make peers`` writes. Without it, an installed vLLM is taken.
    """
    folder = os.environ.get(FOLDER)
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module("vllm.distributed.utils")
    except ImportError:
        return None
    return module.StatelessProcessGroup
