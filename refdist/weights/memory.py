"""Each transfer over a communicator leaves something to the next: memory, or that it broke off."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch


class Memory:
    """Memory for chunks. At most two stay, which the transfers over one communicator use again.

    On a CPU, the first use of fresh memory takes several times as long as a copy, because the
    system clears page after page. Memory that a tensor still looks at is not used again, so
    received tensors never change: ``torch.frombuffer`` keeps the object alive from which it made a
    tensor, as long as a view of the tensor lives. So a weak reference to that object tells.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[bytearray, weakref.ref[memoryview]]] = []
        self._largest = 0

    def take(self, num_bytes: int, device: torch.device, again: bool) -> torch.Tensor:
        """A uint8 tensor that nobody else looks at. It is fresh unless ``again``.

        On a GPU, torch keeps memory by itself. Chunks differ a little in size; rounded up, the
        memory of one fits the next, and torch need not ask CUDA for more.
        """
        if num_bytes == 0 or not again:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if device.type != "cpu":
            step = 2 ** max(num_bytes.bit_length() - 4, 0)
            rounded = -(-num_bytes // step) * step
            return torch.empty(rounded, dtype=torch.uint8, device=device)[:num_bytes]
        self._largest = max(self._largest, num_bytes)
        free = [memory for memory, user in self._kept if user() is None]
        large = [memory for memory in free if len(memory) >= num_bytes]
        memory = min(large, key=len) if large else bytearray(num_bytes)
        # if all are too small, they would only take room beside the new one
        gone = [memory] if large else free
        stay = [kept for kept in self._kept if not any(kept[0] is one for one in gone)]
        view = memoryview(memory)
        self._kept = [*stay, (memory, weakref.ref(view))][-2:]
        return torch.frombuffer(view, dtype=torch.uint8)[:num_bytes]

    def trim(self) -> None:
        """At the end of a transfer, let go what is much larger than it needed."""
        if self._largest:
            self._kept = [kept for kept in self._kept if len(kept[0]) <= 4 * self._largest]
        self._largest = 0


@dataclass
class Past:
    """A record of what a communicator's transfers have left.

    Attributes:
        memory: for chunks.
        unfinished: stands for the transfer that has begun a broadcast and has not ended.
    """

    memory: Memory = field(default_factory=Memory)
    unfinished: object | None = None


_pasts: dict[int, Past] = {}
"""By the ``id`` of the communicator, as long as it lives: vLLM's groups cannot be hashed."""


def past_of(communicator: Any) -> Past:
    """The past of a communicator."""
    key = id(communicator)
    if key not in _pasts:
        weakref.finalize(communicator, _pasts.pop, key).atexit = False
        _pasts[key] = Past()
    return _pasts[key]
