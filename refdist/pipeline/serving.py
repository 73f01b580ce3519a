"""The settings for serving a model, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """The settings for serving a model.

    Attributes:
        prompt_tokens: tokens in the prompt of a request.
        output_tokens: tokens that a request generates.
        chunk_tokens: tokens of a micro-batch in prefill, from one or more prompts.
        tokens_with_logits: tokens of a prompt for which the head computes logits: 1 to generate,
            all to score a text.
        bytes_per_weight: bytes of a weight in the layers.
        bytes_per_end_weight: the same in embedding and head, which are mostly not quantised.
        bytes_per_kv_element: bytes of an element in the key-value cache.
        block_tokens: tokens of a block of the cache.
        memory_share: share of the device's memory for weights and cache.
        reserved_bytes: bytes of that share for everything else on a device.

    Raises:
        ValueError: a number is not above 0 (``output_tokens`` and ``reserved_bytes`` may be 0), or
            ``memory_share`` is above 1.
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
        """Tokens of a request in the cache, on average over the time that it generates."""
        return self.prompt_tokens + self.output_tokens / 2
