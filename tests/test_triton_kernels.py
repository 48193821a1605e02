"""The Triton kernels against dense fp64, primitive by primitive; `test_triton.py` has Triton's interpreter run this."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_kernels import Block, SparseConv2d, SparseLinear, Topology, backends, ops, row_groups, testing
from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.backends import ConvGeometry, _triton_config, _triton_launch

pytestmark = pytest.mark.skipif(not _triton_launch.interpreting(), reason="test_triton.py runs it in the interpreter")

BLOCKS = [Block(16, 16), Block(32, 32), Block(64, 64), Block(64, 32), Block(16, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST, FIRST = torch.channels_last, torch.contiguous_format

# (geometry, N, in, out, H, W): what breaks peers, the edges of tiles, and every kind of gather.
CASES = {
    "3x3": (ConvGeometry((3, 3), padding=(1, 1)), 2, 70, 40, 9, 7),
    "8x8 image": (ConvGeometry((3, 3), padding=(1, 1)), 2, 32, 64, 8, 8),
    "16-wide image": (ConvGeometry((3, 3), padding=(1, 1)), 1, 32, 96, 8, 16),
    "stride 2": (ConvGeometry((3, 3), (2, 2), (1, 1)), 1, 20, 36, 9, 8),
    "uneven": (ConvGeometry((3, 2), (1, 3), (2, 0), (2, 1)), 2, 33, 17, 6, 11),
    "1x1": (ConvGeometry((1, 1)), 2, 40, 48, 5, 6),
    "1x1 stride 2": (ConvGeometry((1, 1), (2, 2)), 2, 40, 24, 5, 7),
    "more taps than bits": (ConvGeometry((5, 7), padding=(3, 4)), 1, 16, 9, 2, 1),
    "padding beyond kernel": (ConvGeometry((1, 2), (1, 2), (2, 3)), 1, 3, 12, 3, 4),
    "one channel": (ConvGeometry((3, 3), padding=(1, 1)), 5, 1, 16, 5, 4),
    "one pixel": (ConvGeometry((3, 3), padding=(1, 1)), 3, 20, 20, 1, 1),
    "conv1d": (ConvGeometry((1, 5), (1, 2), (0, 2), (1, 2)), 2, 24, 16, 1, 37),
    "no images": (ConvGeometry((3, 3), padding=(1, 1)), 0, 16, 16, 4, 4),
    "linear": (None, 37, 70, 96, 1, 1),
    "one row": (None, 1, 64, 64, 1, 1),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Problem:
    """Operands of one case, and each product in fp64 and densely at their own dtype."""

    def __init__(self, name: str, pattern: Block, dtype: torch.dtype, kind: str = "random", form=LAST) -> None:
        self.conv, n, in_, out, h, w = CASES[name]
        taps = 1 if self.conv is None else self.conv.kernel[0] * self.conv.kernel[1]
        topology = testing.TOPOLOGIES[kind](out, in_, pattern, taps)
        self.index = topology.weight_index()
        self.values = testing.random_values(topology).to(dtype)
        self.bias = normal(out, seed=4)
        if self.conv is None:
            self.x, self.dy = normal(n, in_, dtype=dtype, seed=1), normal(n, out, dtype=dtype, seed=2)
        else:
            self.x = normal(n, in_, h, w, dtype=dtype, seed=1).contiguous(memory_format=form)
            self.dy = normal(n, out, *self.conv.output_size(h, w), dtype=dtype, seed=2).contiguous(memory_format=form)

    def check(self, what: str, actual: Tensor) -> None:
        """Raises AssertionError where a product strays from the reference by more than the budget."""
        found = []
        for precision in (torch.float64, self.x.dtype):
            x, dy, values = (t.to(precision) for t in (self.x, self.dy, self.values))
            like = None if self.conv is None else x
            reference = backends.get("reference")
            found.append(
                {
                    "y": lambda: reference.spmm(x, values, self.index, self.bias.to(precision), self.conv),  # noqa: B023
                    "dx": lambda: reference.spmm_t(dy, values, self.index, self.conv, like),  # noqa: B023
                    "dw": lambda: reference.sddmm(dy, x, self.index, self.conv),  # noqa: B023
                    "scores": lambda: reference.block_scores(dy, x, self.index, self.conv),  # noqa: B023
                }[what]()
            )
        testing.assert_within_budget(actual, *found, what)


def products(p: Problem) -> dict[str, Tensor]:
    """The four primitives of the backend, outputs and workspaces poisoned."""
    triton = backends.get("triton")
    like = None if p.conv is None else p.x
    with testing.poisoned_buffers():
        return {
            "y": triton.spmm(p.x, p.values, p.index, p.bias, p.conv),
            "dx": triton.spmm_t(p.dy, p.values, p.index, p.conv, like),
            "dw": triton.sddmm(p.dy, p.x, p.index, p.conv),
            "scores": triton.block_scores(p.dy, p.x, p.index, p.conv),
        }


def check_all(p: Problem) -> None:
    for what, actual in products(p).items():
        p.check(what, actual)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pattern", BLOCKS[:2], ids=str)
def test_every_geometry(pattern: Block, name: str) -> None:
    check_all(Problem(name, pattern, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3", "linear"])
@pytest.mark.parametrize("pattern", BLOCKS, ids=str)
def test_every_block_and_dtype(pattern: Block, name: str, dtype: torch.dtype) -> None:
    check_all(Problem(name, pattern, dtype))


@pytest.mark.parametrize("kind", testing.TOPOLOGIES)
@pytest.mark.parametrize("name", ["stride 2", "8x8 image", "linear"])
def test_every_topology(name: str, kind: str) -> None:
    check_all(Problem(name, Block(16, 16), torch.float32, kind))


@pytest.mark.parametrize("name", ["3x3", "1x1", "stride 2"])
def test_contiguous_images_stay_contiguous(name: str) -> None:
    p = Problem(name, Block(16, 16), torch.float32, form=FIRST)
    for what, actual in products(p).items():
        p.check(what, actual)
        assert actual.is_contiguous()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "every second image": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "some channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, : x.shape[1]],
    "offset by one": lambda x: torch.cat([x[:, :1], x], 1).contiguous(memory_format=LAST)[:, 1:],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1)).contiguous(memory_format=LAST)[:, :, 3:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous(memory_format=LAST).transpose(2, 3),
}


@pytest.mark.parametrize("name", ["3x3", "1x1"])
@pytest.mark.parametrize("strides", STRIDED)
def test_takes_any_strides(strides: str, name: str) -> None:
    p = Problem(name, Block(16, 16), torch.float32)
    p.x, p.dy = STRIDED[strides](p.x), STRIDED[strides](p.dy)
    check_all(p)


def test_takes_biases_and_values_of_any_strides() -> None:
    problem = Problem("one row", Block(32, 32), torch.float32)
    want = _triton_launch.product(problem.x, problem.values, problem.index, problem.bias, None)[0]
    bias, values = torch.stack([problem.bias, problem.bias + 1], 1)[:, 0], problem.values.mT.contiguous().mT
    assert not bias.is_contiguous() and not values.is_contiguous()
    assert torch.equal(_triton_launch.product(problem.x, values, problem.index, bias, None)[0], want)


def test_takes_expanded_images() -> None:
    p = Problem("3x3", Block(16, 16), torch.float32)
    p.x = p.x[:1].expand_as(p.x)
    p.dy = p.dy[:, :1].expand_as(p.dy)
    check_all(p)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("name", ["3x3", "stride 2", "linear"])
def test_every_launch_of_a_product(name: str, entries: int, size: int) -> None:
    p = Problem(name, Block(16, 32), torch.float32)
    config = _triton_config.ProductConfig(16, 1, 1, band=2, entries=entries)
    groups = [row_groups.build(p.index, size, transposed) for transposed in (False, True)]
    y, _ = _triton_launch.product(p.x, p.values, p.index, p.bias, p.conv, config=config, groups=groups[0])
    p.check("y", y)
    like = None if p.conv is None else p.x
    more = {"transposed": True, "config": config, "groups": groups[1]}
    p.check("dx", _triton_launch.product(p.dy, p.values, p.index, None, p.conv, like, **more)[0])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("block_p", [16, 32])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["3x3", "8x8 image", "16-wide image", "linear"])
def test_every_launch_of_a_gradient(name: str, size: int, block_p: int, splits: int) -> None:
    p = Problem(name, Block(16, 16), torch.float32)
    config = _triton_config.GradientConfig(block_p, 48 if size == 1 else 64, 1, 1, height=32, splits=splits)
    config = dataclasses.replace(config, width=64)
    groups = row_groups.build(p.index, size)
    runs = [_triton_launch.sddmm(p.dy, p.x, p.index, p.conv, config=config, groups=groups) for _ in range(2)]
    p.check("dw", runs[0])
    assert torch.equal(*runs)
    runs = [_triton_launch.block_scores(p.dy, p.x, p.index, p.conv, config=config) for _ in range(2)]
    p.check("scores", runs[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_an_activation_in_the_epilogue(name: str, activation: str) -> None:
    p = Problem(name, Block(32, 16), torch.float32)
    triton = backends.get("triton")
    y, pre = triton.product_forward(p.x, p.values, p.index, p.bias, activation, True, p.conv)
    p.check("y", pre)
    torch.testing.assert_close(y, ACTIVATIONS[activation].forward(pre), atol=1e-6, rtol=1e-5)
    again, none = triton.product_forward(p.x, p.values, p.index, p.bias, activation, False, p.conv)
    assert torch.equal(again, y) and none.numel() == 0


def test_a_lost_entry_is_noticed() -> None:
    p = Problem("3x3", Block(16, 16), torch.float32)
    groups = row_groups.build(p.index, 2)
    groups.slot[int(groups.start[1]) - 1].fill_(-1)
    for what, actual in {
        "y": _triton_launch.product(p.x, p.values, p.index, p.bias, p.conv, groups=groups)[0],
        "dw": _triton_launch.sddmm(p.dy, p.x, p.index, p.conv, groups=groups),
    }.items():
        with pytest.raises(AssertionError, match="exceeds the budget"):
            p.check(what, torch.nan_to_num(actual))


def layer(kind: str) -> tuple[torch.nn.Module, Tensor]:
    options = {"pattern": Block(16, 16), "sparsity": 0.5, "generator": torch.Generator().manual_seed(0)}
    if kind == "linear":
        module, x = SparseLinear(32, 48, **options), normal(5, 32, seed=1)
    else:
        module, x = SparseConv2d(32, 48, 3, padding=1, **options), normal(2, 32, 5, 4, seed=1).to(memory_format=LAST)
    module.execution = "triton"
    return module, x


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compile_fullgraph(kind: str) -> None:
    module, x = layer(kind)
    grads = []
    for run in (module, torch.compile(module, fullgraph=True)):
        x_leaf = x.clone().requires_grad_()
        run(x_leaf).square().sum().backward()
        grads.append([x_leaf.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_checkpointing_gives_the_same_bits(kind: str) -> None:
    module, x = layer(kind)
    grads = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        x_leaf = x.clone().requires_grad_()
        run(x_leaf).square().sum().backward()
        grads.append([x_leaf.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast_and_a_regrow(kind: str) -> None:
    module, x = layer(kind)
    topology: Topology = module.topology
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), atol=0.05, rtol=0.05)
    free = (~topology.mask()).nonzero()[:3]
    topology.rewrite(torch.arange(3), free[:, 0], free[:, 1])
    ours, reference = module(x), backends.get("reference")
    index = topology.weight_index()
    conv = None if kind == "linear" else ConvGeometry((3, 3), padding=(1, 1))
    torch.testing.assert_close(ours, reference.spmm(x, module.values, index, module.bias, conv))


def test_opcheck() -> None:
    topology = testing.TOPOLOGIES["random"](24, 32, Block(16, 16), 9)
    deriver = backends.get("triton").deriver("conv", topology.pattern)
    assert deriver is not None
    topology.attach(deriver)
    values = testing.random_values(topology).requires_grad_()
    for x in (normal(2, 32, 4, 6), normal(2, 32, 1, 1).to(memory_format=LAST)):
        geometry = [3, 3, 1, 1, 1, 1, 1, 1]
        arguments = x.requires_grad_(), values, normal(24), None, topology.index("triton"), topology.shape, geometry
        torch.library.opcheck(torch.ops.sparse_kernels.conv2d.default, (*arguments, "triton"))


def test_ops_say_what_is_not_served() -> None:
    topology = testing.TOPOLOGIES["random"](24, 32, Block(8, 8), 1)
    with pytest.raises(RuntimeError, match=r"blocks have sides of 16, 32, 64.*execution='reference'"):
        ops.linear(normal(2, 32), testing.random_values(topology), topology, backend="triton")
