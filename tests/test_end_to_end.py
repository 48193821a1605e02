"""A model from a well-kept library, made sparse as it is: diffusers' `UNet2DModel` trains."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from sparse_kernels import SparseLayer, densify, sparsify


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_sparse_unet_trains(pattern: str, memory_format: torch.memory_format) -> None:
    model = unet().to(memory_format=memory_format)
    x, t = torch.randn(4, 3, 16, 16).contiguous(memory_format=memory_format), torch.randint(1000, (4,))
    plan = sparsify(model, sparsity=0.75, pattern=pattern, example_inputs=(x, t))
    assert plan.sparsity == pytest.approx(0.75, abs=1e-3) and plan.flop_bound > 2
    assert {type(m).__name__ for m in model.modules() if isinstance(m, SparseLayer)} >= {"SparseConv2d", "SparseLinear"}
    twin = densify(copy.deepcopy(model))
    target = torch.randn_like(x)
    for one in (model, twin):
        loss = F.mse_loss(one(x, t).sample, target)
        loss.backward()
    both = dict(twin.named_parameters())
    same = [(p, both[name]) for name, p in model.named_parameters() if name in both and both[name].shape == p.shape]
    assert len(same) > 40  # norms, biases, and weights that stay dense
    for ours, dense in same:
        torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-3, atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x, t).sample, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
