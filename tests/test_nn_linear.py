"""`SparseLinear` against torch.nn.Linear."""

from __future__ import annotations

import pytest
import torch
from layers import FP64_BUDGET, check_same, each_execution, each_pattern, generator
from torch import nn

from sparse_kernels import Block, SparseLinear
from sparse_kernels.activations import ACTIVATIONS


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48), (48,), (0, 48)], ids=str)
@each_execution
@each_pattern
def test_linear_equals_dense(pattern: Block, execution: str, sparsity: float, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(48, 64, dtype=torch.float64)
    layer = SparseLinear.from_dense(dense, pattern=pattern, sparsity=sparsity, generator=generator())
    layer.execution = execution
    twin = layer.to_dense()
    kept = layer.topology.gather(torch.ones_like(dense.weight)).bool()
    torch.testing.assert_close(layer.values[kept], layer.topology.gather(dense.weight)[kept])
    check_same(layer, twin, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(layer.values.grad, layer.topology.gather(twin.weight.grad), **FP64_BUDGET)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **FP64_BUDGET)


def test_linear_without_bias() -> None:
    layer = SparseLinear(32, 16, bias=False, pattern="block:4x4", sparsity=0.5, dtype=torch.float64)
    assert layer.bias is None and "bias" not in layer.state_dict()
    check_same(layer, layer.to_dense(), torch.randn(5, 32, dtype=torch.float64))


def test_linear_padding_stays_zero() -> None:
    layer = SparseLinear(60, 62, pattern="block:16x16", sparsity=0.25, rescale=True)
    ragged = layer.topology.gather(torch.ones(62, 60)) == 0
    assert ragged.any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(8, 60)).square().mean().backward()
        optimizer.step()
    assert not layer.values[ragged].any()


def test_linear_fresh_values_are_those_of_torch() -> None:
    layer = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator())
    same = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator())
    wide = SparseLinear(256, 512, pattern="block:16x16", sparsity=0.75, generator=generator(), rescale=True)
    assert torch.equal(layer.values, same.values) and torch.equal(layer.topology.col, same.topology.col)
    assert layer.values.abs().max() <= 1 / 16 < 1.01 * layer.values.abs().max()
    torch.testing.assert_close(wide.values, 2 * layer.values)
    x = torch.randn(512, 256)
    dense_std = nn.Linear(256, 512, bias=False)(x).std()
    layer.bias, wide.bias = None, None
    torch.testing.assert_close(wide(x).std(), dense_std, rtol=0.05, atol=0.0)
    torch.testing.assert_close(layer(x).std(), dense_std / 2, rtol=0.05, atol=0.0)


def test_linear_keeps_the_largest_blocks() -> None:
    dense = nn.Linear(32, 32)
    with torch.no_grad():
        dense.weight[16:, :16] += 3.0
    layer = SparseLinear.from_dense(dense, pattern="16x16", sparsity=0.75, init="magnitude")
    assert layer.topology.mask().tolist() == [[False, False], [True, False]]
    assert torch.equal(layer.dense_weight()[16:, :16], dense.weight[16:, :16])


def test_linear_flags_survive() -> None:
    dense = nn.Linear(16, 16).eval()
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(dense, pattern="4x4", sparsity=0.5)
    assert not layer.training and not layer.values.requires_grad and layer.bias.requires_grad
    back = layer.to_dense()
    assert type(back) is nn.Linear and not back.training and not back.weight.requires_grad
    assert layer.bias.data_ptr() != dense.bias.data_ptr() != back.bias.data_ptr()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "4x4", "sparsity": 1.5}, r"absent weights, in \[0, 1\]; got 1.5"),
        ({"pattern": "5x5", "sparsity": 0.5}, "sides must be one of"),
        ({"pattern": "64x64", "sparsity": 0.5}, "pads .* smaller block"),
    ],
)
def test_linear_rejects(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(32, 36, **kwargs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_linear_with_its_activation_is_a_linear_and_that_activation(activation: str) -> None:
    layer = SparseLinear(48, 32, pattern="block:16x16", sparsity=0.5, activation=activation)
    dense, x = layer.to_dense(), torch.randn(5, 48)
    assert isinstance(dense, nn.Sequential) and f"activation={activation}" in repr(layer)
    torch.testing.assert_close(layer(x), dense(x))
    again = SparseLinear.from_dense(dense[0], pattern="block:16x16", sparsity=0.0, activation=activation)
    torch.testing.assert_close(again(x), dense(x))
    with pytest.raises(ValueError, match="SparseLinear: activation must be None or one of relu"):
        SparseLinear(48, 32, pattern="block:16x16", sparsity=0.5, activation="swish")
