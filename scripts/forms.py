"""Networks of other forms: a transformer, recurrent networks, and a convolutional one to be stored in few bits."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class Attention(nn.Module):
    """Self-attention of several heads, written out as products."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mixed = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what every token gathers, [samples, tokens, width] -> the same."""
        samples, tokens, width = x.shape
        size = width // self.heads
        query, key, value = self.mixed(x).reshape(samples, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) * size**-0.5, dim=-1)
        gathered = (weights @ value).transpose(1, 2).reshape(samples, tokens, width)
        projected: torch.Tensor = self.project(gathered)
        return projected


class Block(nn.Module):
    """Attention and two dense layers, each behind a LayerNormalization and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, [samples, tokens, width] -> the same."""
        x = x + self.attention(self.norm1(x))
        summed: torch.Tensor = x + self.dense(self.norm2(x))
        return summed


class Transformer(nn.Module):
    """A vision transformer: 7 x 7 patches and a class token, which the answer is read from."""

    def __init__(self, width: int = 48, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.positions
        logits: torch.Tensor = self.dense(self.norm(self.blocks(tokens))[:, 0])
        return logits


class Recurrent(nn.Module):
    """A recurrent layer that reads an image row by row; the answer is read from its last state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], width: int = 64) -> None:
        super().__init__()
        self.recurrent = kind(28, width, batch_first=True)
        self.dense = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        states, _ = self.recurrent(x.squeeze(1))
        logits: torch.Tensor = self.dense(states[:, -1])
        return logits


def transformer() -> nn.Module:
    """Return an untrained transformer."""
    return Transformer()


def lstm() -> nn.Module:
    """Return an untrained network around an LSTM."""
    return Recurrent(nn.LSTM)


def gru() -> nn.Module:
    """Return an untrained network around a GRU."""
    return Recurrent(nn.GRU)


def convolutional() -> nn.Module:
    """Return an untrained network of two convolutions with normalisation and two dense layers."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            norm2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(32 * 7 * 7, 64),
            relu3=nn.ReLU(),
            dense2=nn.Linear(64, 10),
        )
    )
