"""Memory for chunks, which is used again when nobody looks at it any more."""

import weakref

import torch


class Block:
    """Memory of one chunk. ``lend`` gives tensors of it to the user, and ``lent`` tells of them.

    ``torch.frombuffer`` keeps the object alive from which it made a tensor, for as long as the
    tensor or a view of it lives. So a memoryview that is made for each loan lives exactly as long
    as the loan, and a weak reference to it tells when that has ended.

    Attributes:
        tensor: all of it, uint8. The communicator reads and writes it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._loan: weakref.ref[memoryview] | None = None
        self._memory = bytearray(num_bytes) if device.type == "cpu" and num_bytes else None
        if self._memory is None:
            self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        else:
            self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)

    @property
    def can_be_used_again(self) -> bool:
        """Whether this is memory of the CPU. Torch does the same for CUDA's memory by itself."""
        return self._memory is not None

    @property
    def lent(self) -> bool:
        """Whether a tensor of a loan still lives."""
        return self._loan is not None and self._loan() is not None

    def lend(self, num_bytes: int) -> torch.Tensor:
        """The first bytes, as a tensor for the user; until it and its views end, it is ``lent``."""
        if self._memory is None:
            return self.tensor[:num_bytes]
        view = memoryview(self._memory)
        self._loan = weakref.ref(view)
        return torch.frombuffer(view, dtype=torch.uint8)[:num_bytes]


class Buffers:
    """Memory that transfers use again, one after the other. Keep one beside a communicator.

    Without it, each transfer allocates its two buffers anew. On a CPU, the first use of fresh
    memory takes several times as long as a copy, because the system clears page after page.

    Memory whose tensors the user still holds is not used again, so received tensors never change.
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def take(self, num_bytes: int, device: torch.device) -> Block:
        """A block of at least ``num_bytes`` that nobody else has. It is the caller's."""
        # a block that is large enough and not lent, the smallest first
        large = (b for b in self._blocks if b.tensor.numel() >= num_bytes and not b.lent)
        block = min(large, key=lambda b: b.tensor.numel(), default=None)
        if block is not None and device.type == "cpu":
            self._blocks.remove(block)
            return block
        # those that are too small would only pile up
        self._blocks = [b for b in self._blocks if b.lent]
        return Block(num_bytes, device)

    def give_back(self, block: Block) -> None:
        """Return a block, when the communicator is done with it. It may still be lent."""
        if block.can_be_used_again:
            self._blocks.append(block)
