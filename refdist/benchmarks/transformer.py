"""A small transformer that can be cut into stages.

The layers are torch's, shaped like Llama's: RMS norms, grouped-query attention with rotary
positions, a gated feed-forward part. The rank that runs a stage builds it, with its own layers
only. The parameters of a layer are drawn from its number, so the model is the same for every cut.
"""

import torch
from torch import nn
from torch.nn import functional

from refdist.pipeline import GroupedQueryAttention, Model


class Layer(nn.Module):
    """One layer. Maps ``[sequences, tokens, hidden_size]`` to the same shape."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert isinstance(model.attention, GroupedQueryAttention)
        hidden, inside, self.attention = model.hidden_size, model.intermediate_size, model.attention
        queries, keys = (
            heads * model.attention.head_size
            for heads in (model.attention.num_heads, model.attention.num_kv_heads)
        )
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.query = nn.Linear(hidden, queries, bias=False)
        self.key = nn.Linear(hidden, keys, bias=False)
        self.value = nn.Linear(hidden, keys, bias=False)
        self.output = nn.Linear(queries, hidden, bias=False)
        self.gate = nn.Linear(hidden, inside, bias=False)
        self.up = nn.Linear(hidden, inside, bias=False)
        self.down = nn.Linear(inside, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and feed-forward part, each added to its input."""
        x = x + self.output(self._attend(self.attention_norm(x)))
        y = self.feed_forward_norm(x)
        added: torch.Tensor = self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + added

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        sequences, tokens, _ = x.shape
        head_size = self.attention.head_size

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(sequences, tokens, -1, head_size).transpose(1, 2)

        shared_by = self.attention.num_heads // self.attention.num_kv_heads
        query, key = _rotate(heads(self.query(x))), _rotate(heads(self.key(x)))
        attended = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(shared_by, dim=1),
            heads(self.value(x)).repeat_interleave(shared_by, dim=1),
            is_causal=True,
        )
        return attended.transpose(1, 2).reshape(sequences, tokens, -1)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of elements of a head by an angle that grows with its token's position."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(tokens)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Stage(nn.Module):
    """Consecutive layers of a model; the first stage also has the embedding, the last the head.

    Maps token ids ``[sequences, tokens]`` or activations ``[sequences, tokens, hidden_size]`` to
    activations or, with the head, to logits ``[sequences, tokens, vocab_size]``.

    Args:
        model: sizes of the model, which has grouped-query attention and no experts.
        layers: layers of this stage.
        first: whether it holds the embedding.
        last: whether it holds the final norm and the head.
    """

    def __init__(self, model: Model, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size) if first else None
        self.layers = nn.ModuleList(Layer(model) for _ in layers)
        self.norm = nn.RMSNorm(model.hidden_size) if last else None
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False) if last else None
        for number, layer in zip(layers, self.layers, strict=True):
            _draw(layer, seed=1 + number)
        for part, seed in ((self.embedding, 0), (self.head, 1 + model.num_hidden_layers)):
            if part is not None:
                _draw(part, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass a micro-batch through the stage."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x


def _draw(part: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        if parameter.dim() > 1:  # the norms start at one
            nn.init.normal_(parameter, std=0.02, generator=generator)
