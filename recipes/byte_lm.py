"""A small transformer that predicts the next byte, and its text: the sources of Python's standard library.

It has what makes a bit-exact resume hard: dropout, weights used twice, and (in the training script) clipped gradients
and a learning rate that changes at every step.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["SMALL", "ByteLM", "Corpus", "Size", "Windows"]

_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the model is; the defaults give 10.9 million parameters, 130 MB with Adam's two moments."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    context: int = 64
    """Bytes that it sees at once."""
    dropout: float = 0.1


SMALL = Size(width=64, layers=2, heads=2)
"""For a look, and for tests."""


class Block(nn.Module):
    """Attention and an MLP, each added to what comes in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
            nn.Dropout(size.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, context, width) to the same shape."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """Let every byte look at those before it."""
        batch, context, width = x.shape
        split = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, context, width))


class ByteLM(nn.Module):
    """Bytes in, a score for each possible next byte out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, _BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes (batch, context) to scores (batch, context, 256)."""
        x = self.embedding(text) + self.position(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Corpus:
    """Real text that every machine with Python has."""

    def __init__(self, limit_bytes: int = 4 * 1024 * 1024) -> None:
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= limit_bytes:
                break
        self.text = torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)

    def batch(self, step: int, rank: int, size: Size) -> tuple[Tensor, Tensor]:
        """Return one sample and what follows each of its bytes.

        A pure function of step and rank: then a resumed run sees the data that it would have seen, and there is no
        loader whose position would have to be saved.
        """
        generator = torch.Generator().manual_seed(step * 1_000_003 + rank)
        start = int(torch.randint(len(self.text) - size.context - 1, (1,), generator=generator))
        window = self.text[start : start + size.context + 1].long()
        return window[None, :-1], window[None, 1:]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The corpus, one window after the other."""

    def __init__(self, context: int) -> None:
        self.text, self.context = Corpus().text.long(), context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * self.context : (index + 1) * self.context + 1]
        return window[:-1], window[1:]
