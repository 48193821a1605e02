"""`SparseConv1d` and `SparseConv2d` against their torch.nn twins."""

from __future__ import annotations

import pytest
import torch
from layers import FP64_BUDGET, check_same, each_execution, each_pattern, generator
from torch import nn

from sparse_kernels import Block, SparseConv1d, SparseConv2d
from sparse_kernels.activations import ACTIVATIONS

CONV2D_CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 3, "padding": "valid"},
]
CONV1D_CASES = [{"kernel_size": 3, "stride": 2, "padding": 2}, {"kernel_size": 4, "padding": "same"}]


def check_conv(layer: SparseConv1d | SparseConv2d, execution: str, *x_shape: int) -> None:
    layer.execution = execution
    twin = layer.to_dense()
    check_same(layer, twin, torch.randn(*x_shape, dtype=torch.float64))
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **FP64_BUDGET)
    grad = twin.weight.grad.flatten(2).transpose(1, 2).flatten(1)  # tap-major
    torch.testing.assert_close(layer.values.grad, layer.topology.gather(grad), **FP64_BUDGET)
    torch.testing.assert_close(layer(torch.ones(x_shape[1:]).double()), twin(torch.ones(x_shape[1:]).double()))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("kwargs", CONV2D_CASES, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
@each_execution
@each_pattern
def test_conv2d_equals_dense(pattern: Block, execution: str, kwargs: dict) -> None:
    dense = nn.Conv2d(16, 32, dtype=torch.float64, **kwargs)
    layer = SparseConv2d.from_dense(dense, pattern=pattern, sparsity=0.5, generator=generator())
    kept = layer.dense_weight() != 0
    assert torch.equal(layer.dense_weight()[kept], dense.weight[kept])
    assert abs(kept.double().mean() - 0.5) < 0.1
    check_conv(layer, execution, 2, 16, 7, 9)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("kwargs", CONV1D_CASES, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
@each_execution
@each_pattern
def test_conv1d_equals_dense(pattern: Block, execution: str, kwargs: dict) -> None:
    check_conv(SparseConv1d(16, 32, dtype=torch.float64, pattern=pattern, sparsity=0.5, **kwargs), execution, 2, 16, 9)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_conv2d_full_and_empty(sparsity: float) -> None:
    layer = SparseConv2d(16, 32, 3, pattern="16x16", sparsity=sparsity, dtype=torch.float64)
    assert layer.topology.nnzb == (18 if sparsity == 0.0 else 0)
    check_conv(layer, "densified", 1, 16, 4, 4)


@pytest.mark.parametrize("name", ["reference", "densified"])
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_conv2d_of_an_empty_batch(name: str, sparsity: float) -> None:
    layer = SparseConv2d(8, 16, 3, padding=1, pattern="block:8x8", sparsity=sparsity)
    layer.execution = name
    x = torch.randn(0, 8, 5, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 16, 5, 6) and x.grad is not None and x.grad.shape == x.shape
    assert layer.values.grad is not None and not layer.values.grad.any()


def test_conv2d_keeps_the_memory_format() -> None:
    layer = SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5)
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [SparseConv1d, SparseConv2d])
def test_a_convolution_with_its_activation_is_a_convolution_and_that_activation(
    kind: type[SparseConv1d | SparseConv2d], activation: str
) -> None:
    layer = kind(16, 32, 3, padding=1, pattern="block:16x16", sparsity=0.5, activation=activation)
    dense, x = layer.to_dense(), torch.randn(2, 16, *[5] * layer.spatial)
    assert isinstance(dense, nn.Sequential) and f"activation={activation}" in repr(layer)
    torch.testing.assert_close(layer(x), dense(x))
    again = kind.from_dense(dense[0], pattern="block:16x16", sparsity=0.0, activation=activation)
    torch.testing.assert_close(again(x), dense(x))
    with pytest.raises(ValueError, match=f"{kind.__name__}: activation must be None or one of relu"):
        kind(16, 32, 3, pattern="block:16x16", sparsity=0.5, activation="swish")


def test_conv_fresh_values_are_those_of_torch() -> None:
    torch.manual_seed(0)
    layer = SparseConv2d(64, 64, 3, pattern="16x16", sparsity=0.5)
    bound = nn.Conv2d(64, 64, 3).weight.abs().max()
    torch.testing.assert_close(layer.values.abs().max(), bound, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"groups": 2}, "groups=2 is not served"), ({"padding_mode": "reflect"}, "padding_mode='reflect' is not served")],
)
def test_conv_rejects(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5, **kwargs)
    with pytest.raises(ValueError, match=message):
        SparseConv2d.from_dense(nn.Conv2d(16, 32, 3, **kwargs), pattern="4x4", sparsity=0.5)


def test_conv_takes_images_of_its_own_rank() -> None:
    with pytest.raises(ValueError, match=r"4 dimensions \[N, 16, …\], or 3 without N; got \[16, 5\]"):
        SparseConv2d(16, 32, 3, pattern="4x4", sparsity=0.5)(torch.zeros(16, 5))
