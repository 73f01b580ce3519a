"""A small language model that trains in seconds, for a trainer that hands its weights to engines.

The model predicts the next byte of a text. The text is the source of a module of Python, which is
on every machine.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CONTEXT = 64
"""The bytes that the model sees at once."""

_WIDTH, _HEADS, _LAYERS, _BYTES = 64, 4, 4, 256
_BATCH = 16
_LEARNING_RATE = 3e-3
_HELD_OUT = 64 * (CONTEXT + 1)  # bytes at the end of the text, which training does not see


class Layer(nn.Module):
    """A layer of a transformer, by its matrices: 16 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The features of each place of a batch of texts, shape [batch, length, width]."""
        normed = self.attention_norm(x)
        query, key, value = (
            matrix(normed).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        gone_up: torch.Tensor = self.up(self.mlp_norm(x))
        result: torch.Tensor = x + self.down(F.gelu(gone_up))
        return result


class LanguageModel(nn.Module):
    """A transformer that predicts the next byte. Its 70 weights take 947,720 bytes.

    Attributes:
        steps: a weight of one int64, which no gradient changes: how often it was trained.
    """

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.bytes = nn.Embedding(_BYTES, _WIDTH)
        self.places = nn.Embedding(CONTEXT, _WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _BYTES, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Scores of each next byte, shape [batch, length, 256]; at most ``CONTEXT`` bytes long."""
        x = self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for layer in self.layers:
            x = layer(x)
        scores: torch.Tensor = self.head(self.norm(x))
        return scores


def _text() -> torch.Tensor:
    source = Path(argparse.__file__).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def _loss(model: LanguageModel, pieces: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


class Training:
    """The training of a model by one rank, with an optimizer that goes on from call to call."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._text = _text()[:-_HELD_OUT]
        self._optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
        self._random = torch.Generator().manual_seed(0)

    def run(self, steps: int) -> None:
        """Make so many steps, each on 16 pieces of the text."""
        for _ in range(steps):
            last = len(self._text) - CONTEXT - 1
            starts = torch.randint(last, (_BATCH, 1), generator=self._random)
            pieces = self._text[starts + torch.arange(CONTEXT + 1)]
            self._optimizer.zero_grad()
            _loss(self._model, pieces).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._model.steps += 1


@torch.no_grad()
def held_out_loss(model: LanguageModel) -> float:
    """The mean loss for a byte, of a part of the text that training does not see."""
    return float(_loss(model, _text()[-_HELD_OUT:].reshape(-1, CONTEXT + 1)))


@torch.no_grad()
def continued(model: LanguageModel, begin: str, length: int = 40) -> str:
    """A text and the bytes that the model finds most likely after it, as ASCII."""
    text = list(begin.encode("ascii"))
    for _ in range(length):
        scores = model(torch.tensor([text[-CONTEXT:]]))[0, -1]
        text.append(int(scores.argmax()))
    return bytes(text).decode("ascii", "replace")
