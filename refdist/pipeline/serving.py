"""How a model is served, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        prompt_tokens: of a request.
        output_tokens: that it generates.
        chunk_tokens: of a micro-batch in prefill, from one or more prompts.
        tokens_with_logits: of a prompt, for which the head computes logits: 1 to generate, all to
            score a text.
        bytes_per_weight: in the layers.
        bytes_per_end_weight: in the embedding and the head, which are mostly left unquantised.
        bytes_per_kv_element: in the key-value cache.
        block_tokens: of a block of the cache.
        memory_share: of the device's memory, which weights and cache may take.
        reserved_bytes: of that, for everything else on a device.
    """

    prompt_tokens: int = 1024
    output_tokens: int = 256
    chunk_tokens: int = 2048
    tokens_with_logits: int = 1
    bytes_per_weight: float = 2
    bytes_per_end_weight: float = 2
    bytes_per_kv_element: float = 2
    block_tokens: int = 16
    memory_share: float = 0.9
    reserved_bytes: float = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in ("output_tokens", "reserved_bytes")):
                raise ValueError(f"{name}={value}: must be above 0")
        if self.memory_share > 1:
            raise ValueError(f"memory_share={self.memory_share}: must be at most 1")

    @property
    def mean_context_tokens(self) -> float:
        """Tokens of a request in the cache, on average over the time that it is generated."""
        return self.prompt_tokens + self.output_tokens / 2
