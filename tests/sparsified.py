"""What the tests of `sparsify` share: small models of every kind, and what a plan must add up to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from sparse_kernels import (
    Plan,
    sparse_weights,
)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Residual(32), nn.Conv2d(32, 64, 1, stride=2), Residual(64))
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.blocks(self.stem(x))).mean((2, 3)))


class SmallTransformer(nn.Module):
    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding))


class Sketcher(nn.Module):
    """Calls its GRU in the ways that code written for torch.nn.GRU does."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 32, 2, batch_first=True, bidirectional=True, **kwargs)
        self.out = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.gru.flatten_parameters()
        y, h = self.gru(x)
        again, _ = self.gru(x, h)
        packed, _ = self.gru(pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True))
        return self.out(y + again) + packed.data.mean()


def row(plan: Plan, layer: str) -> object:
    return next(row for row in plan.rows if row.layer == layer)


def check_totals(model: nn.Module, plan: Plan, sparsity: float, block: int) -> None:
    """The plan tells the truth about the model, and meets the sparsity within one block."""
    assert abs(plan.nonzeros - (1 - sparsity) * plan.numel) <= block
    sparse = {weight.name: weight.topology for weight in sparse_weights(model)}
    assert {row.layer for row in plan.rows if row.pattern != "dense"} == set(sparse)
    for name, topology in sparse.items():
        assert row(plan, name).nonzeros == topology.nnz
        assert 0 < topology.nnzb < topology.row_blocks * topology.col_blocks
