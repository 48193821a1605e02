"""The unmodified CUDA kernels on the CPU, through the real backend, launchers and autograd ops, against dense fp64.

Every thread of the GPU is a fiber (tests/emulation/emulation.h). Covered: every pattern, dtype and architecture's
instructions, strides and edges, both ways of gathering, splits; sanitizers; and that a deleted step turns red.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from emulated_cuda import EmulatedCuda
from test_ops import check_linear, leaf, normal
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import Block, Topology, backends, ops, testing
from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.backends import ConvGeometry
from sparse_kernels.backends._cuda_config import (
    ConvSizes,
    Device,
    ProductConfig,
    SddmmConfig,
    configured,
    product_config,
)
from sparse_kernels.backends._cuda_index import BUFFERS, orientation
from sparse_kernels.backends.cuda import CudaBackend

pytestmark = pytest.mark.skipif(emulated_cuda.CXX is None, reason="needs a C++ compiler")

PATTERNS = [Block(16, 16), Block(32, 32), Block(64, 64), Block(64, 32), Block(32, 64), Block(16, 64)]
# Architecture and dtype: what differs in the instructions.
KINDS = [(800, torch.bfloat16), (800, torch.float16), (750, torch.float16), (700, torch.float16)]

# (geometry, N, in, out, H, W)
CASES = {
    "3x3": (ConvGeometry((3, 3), padding=(1, 1)), 2, 70, 40, 9, 7),
    "small images": (ConvGeometry((3, 3), padding=(1, 1)), 3, 32, 64, 4, 4),
    "stride 2": (ConvGeometry((3, 3), (2, 2), (1, 1)), 1, 24, 40, 9, 8),
    "uneven": (ConvGeometry((3, 2), (1, 3), (2, 0), (2, 1)), 2, 33, 17, 6, 11),
    "1x1": (ConvGeometry((1, 1)), 2, 40, 48, 5, 6),
    "1x1 stride 2": (ConvGeometry((1, 1), (2, 2)), 2, 40, 24, 5, 7),
    "kernel beyond image": (ConvGeometry((5, 7), padding=(3, 4)), 1, 5, 9, 2, 1),
    "one channel": (ConvGeometry((3, 3), padding=(1, 1)), 2, 1, 16, 5, 4),
    "one pixel": (ConvGeometry((3, 3), padding=(1, 1)), 3, 20, 20, 1, 1),
    "conv1d": (ConvGeometry((1, 5), (1, 2), (0, 2), (1, 2)), 2, 24, 16, 1, 37),
    "stride beyond kernel": (ConvGeometry((2, 1), (3, 2)), 1, 17, 8, 8, 5),
    "no images": (ConvGeometry((3, 3), padding=(1, 1)), 0, 16, 16, 4, 4),
    "wide dilation": (ConvGeometry((3, 3), (1, 1), (16, 16), (16, 16)), 1, 32, 32, 18, 19),
}


def attached(backend: EmulatedCuda, topology: Topology, op: str) -> Topology:
    deriver = backend.deriver(op, topology.pattern)
    assert deriver is not None
    topology.attach(deriver)
    return topology


def check_conv(
    backend: EmulatedCuda,
    topology: Topology,
    conv: ConvGeometry,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> None:
    """Forward, every gradient and the scores of `conv2d` within the budget of F.conv2d."""
    dtype, taps = x.dtype, conv.kernel[0] * conv.kernel[1]
    values = testing.random_values(topology)
    dy = normal(x.shape[0], topology.out, *conv.output_size(x.shape[2], x.shape[3]), dtype=dtype, seed=9)
    apply = ACTIVATIONS[activation].forward if activation else lambda y: y
    results = {}
    for kind, precision in (("expected", torch.float64), ("dense", dtype), ("actual", dtype)):
        if kind == "actual":
            leaves = [x.detach().requires_grad_(), leaf(values), None if bias is None else leaf(bias)]
            tap = torch.zeros(topology.row_blocks, topology.col_blocks, requires_grad=True)
            with testing.poisoned_buffers():
                y = ops.conv2d(
                    *leaves[:2], topology, leaves[2], conv=conv, activation=activation, score_tap=tap,
                    backend=backend.name,
                )  # fmt: skip
                y.backward(dy)
            scores = tap.grad
        else:
            leaves = [leaf(t.to(dtype).to(precision)) for t in (x, values)]
            leaves.append(None if bias is None else leaf(bias.to(dtype).to(precision)))
            weight = topology.scatter(leaves[1]).view(topology.out, *conv.kernel, topology.in_).permute(0, 3, 1, 2)
            weight.retain_grad()
            y = apply(F.conv2d(leaves[0], weight, leaves[2], conv.stride, conv.padding, conv.dilation))
            y.backward(dy.to(precision))
            assert weight.grad is not None
            if activation is None:  # the weight's gradient is dense: every block's norm is known
                grad = weight.grad.permute(0, 2, 3, 1).reshape(topology.out, taps * topology.in_)
                scores = topology.weight_index().blocks(grad).square().sum((1, 2))
                scores = scores.view(topology.row_blocks, topology.col_blocks)
            else:
                scores = None
        results[kind] = {"y": y.detach(), "scores": scores}
        results[kind] |= {f"gradient {k}": t.grad for k, t in enumerate(leaves) if t is not None}
    for what, expected in results["expected"].items():
        if expected is not None:
            testing.assert_within_budget(results["actual"][what], expected, results["dense"][what], what)


def image(name: str, dtype: torch.dtype) -> Tensor:
    _, n, in_, _, h, w = CASES[name]
    return normal(n, in_, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def topology_of(backend: EmulatedCuda, name: str, pattern: Block, kind: str = "random") -> Topology:
    conv, _, in_, out, _, _ = CASES[name]
    return attached(backend, testing.TOPOLOGIES[kind](out, in_, pattern, conv.kernel[0] * conv.kernel[1]), "conv")


@pytest.mark.parametrize("arch,dtype", KINDS, ids=str)
@pytest.mark.parametrize("kind", testing.TOPOLOGIES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear(pattern: Block, kind: str, arch: int, dtype: torch.dtype) -> None:
    backend = emulated_cuda.backend(arch)
    for positions, out, in_ in ((37, 96, 64), (1, 70, 33)):
        topology = attached(backend, testing.TOPOLOGIES[kind](out, in_, pattern, 1), "linear")
        values = testing.random_values(topology)
        check_linear(backend.name, topology, normal(positions, in_, dtype=dtype), values, normal(out))


def test_linear_takes_any_input() -> None:
    backend = emulated_cuda.backend()
    topology = attached(backend, testing.TOPOLOGIES["random"](48, 40, Block(16, 16), 1), "linear")
    values, half = testing.random_values(topology), torch.bfloat16
    inputs = {
        "no rows": normal(0, 40, dtype=half),
        "three dimensions": normal(3, 5, 40, dtype=half),
        "row stride": normal(7, 100, dtype=half)[:, :40],
        "aligned row stride": normal(7, 104, dtype=half)[:, 8:48],
        "offset": normal(7, 41, dtype=half)[:, 1:],
        "transposed": normal(40, 7, dtype=half).T,
        "expanded": normal(1, 40, dtype=half).expand(6, 40),
    }
    for x in inputs.values():
        check_linear(backend.name, topology, x, values, None)


def test_biases_and_values_of_any_strides() -> None:
    backend, half = emulated_cuda.backend(), torch.bfloat16
    index = attached(backend, testing.TOPOLOGIES["random"](48, 40, Block(16, 16), 1), "linear").weight_index(
        "cuda-sm_80"
    )
    x, values = normal(7, 40, dtype=half), normal(index.nnzb, 16, 16, dtype=half, seed=2)
    for bias in (normal(48, 2)[:, 1], normal(1).expand(48), normal(49)[1:], normal(48, dtype=half)):
        assert torch.equal(backend.spmm(x, values, index, bias), backend.spmm(x, values, index, bias.float().clone()))
    want, turned = backend.spmm(x, values, index), values.mT.contiguous().mT
    assert torch.equal(backend.spmm(x, turned, index), want)
    dy = normal(1, 1, dtype=half).expand(7, 48)  # what the backward of a sum hands on
    assert torch.equal(backend.sddmm(dy, x, index), backend.sddmm(dy.contiguous(), x, index))
    assert torch.equal(backend.block_scores(dy, x, index), backend.block_scores(dy.contiguous(), x, index))


@pytest.mark.parametrize("positions,channels", [(16384, 1024), (4096, 4096)])
def test_scores_stay_within_their_memory(positions: int, channels: int) -> None:
    """Everything that a call allocates on an H200, its launch left out."""

    class Sizes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if not func.is_view and isinstance(result, Tensor):
                self.total += result.nbytes
            return result

    class Unlaunched(EmulatedCuda):
        def limits(self, device: torch.device) -> Device:
            return Device(132, 227 << 10)

        def library(self) -> SimpleNamespace:
            module = self._module
            return SimpleNamespace(**vars(module) | {"cuda_scores": lambda *arguments: launches.append(arguments) or 0})

    launches: list[tuple[object, ...]] = []
    backend = Unlaunched(emulated_cuda.build())
    topology = attached(backend, testing.TOPOLOGIES["random"](channels, channels, Block(32, 32), 1), "linear")
    index = topology.weight_index(backend.name)
    x = torch.empty(positions, channels, dtype=torch.bfloat16)
    with Sizes() as sizes:
        backend.block_scores(x, x, index)
    assert len(launches) == 1 and 0 < sizes.total <= 16 << 20


@pytest.mark.parametrize("arch,dtype", KINDS[:1] + KINDS[2:], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_conv2d(name: str, pattern: Block, arch: int, dtype: torch.dtype) -> None:
    backend, conv = emulated_cuda.backend(arch), CASES[name][0]
    check_conv(backend, topology_of(backend, name, pattern), conv, image(name, dtype), normal(CASES[name][3]))


@pytest.mark.parametrize("kind", ["one_row", "empty", "full"])
@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_conv2d_of_empty_rows_and_full_topologies(pattern: Block, kind: str) -> None:
    backend = emulated_cuda.backend()
    check_conv(backend, topology_of(backend, "3x3", pattern, kind), CASES["3x3"][0], image("3x3", torch.bfloat16))


# Taps one by one, several warps along the positions, splits, odd rings, tiles over images: what the rules choose only
# for other shapes.
CONFIGURATIONS = {
    "per tap": (ProductConfig(1, 8, 16, 8, 2, 2, 1, 1), SddmmConfig(1, 4, 8, 2, 2, 2, 1)),
    "two warps of positions": (ProductConfig(2, 8, 16, 8, 3, 3), SddmmConfig(2, 4, 4, 8, 1, 3)),
    "splits": (ProductConfig(1, 16, 8, 8, 1, 2, 2), SddmmConfig(1, 16, 8, 1, 2, 3)),
    "splits per tap": (ProductConfig(1, 8, 16, 8, 2, 4, 2, 1), SddmmConfig(1, 2, 8, 3, 1, 5, 1)),
}


@pytest.mark.parametrize("name", ["3x3", "stride 2"])
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_way_to_cut_the_work(configuration: str, pattern: Block, name: str) -> None:
    backend, (product, sddmm) = emulated_cuda.backend(), CONFIGURATIONS[configuration]
    conv, _, _, out, h, w = CASES[name]
    x = normal(2, 70, h, w, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    topology = attached(backend, testing.TOPOLOGIES["random"](out, 70, pattern, 9), "conv")
    with configured(product, sddmm):
        check_conv(backend, topology, conv, x, normal(out))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv2d_with_an_activation(activation: str) -> None:
    backend, dtype = emulated_cuda.backend(), torch.bfloat16
    bias = normal(40, seed=1)
    bias = 20 * bias.sign() if activation == "relu" else bias  # nothing near the kink, which a rounding may cross
    topology, x = topology_of(backend, "3x3", Block(32, 32)), image("3x3", dtype)
    for product in (CONFIGURATIONS["two warps of positions"][0], CONFIGURATIONS["splits"][0]):
        with configured(product):
            check_conv(backend, topology, CASES["3x3"][0], x, bias, activation)


def test_images_of_any_strides() -> None:
    backend, conv = emulated_cuda.backend(), CASES["3x3"][0]
    topology, x = topology_of(backend, "3x3", Block(32, 32)), image("3x3", torch.bfloat16)
    n, c, h, w = x.shape
    results = []
    padded = torch.full((n, h + 1, w + 2, c + 3), float("nan"), dtype=x.dtype)
    padded[:, 1:, 2:, 3:] = x.permute(0, 2, 3, 1)
    for view in (
        x,
        x.contiguous(),
        padded[:, 1:, 2:, 3:].permute(0, 3, 1, 2),
        x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    ):
        view, values = view.detach().requires_grad_(), leaf(testing.random_values(topology))
        y = ops.conv2d(view, values, topology, conv=conv, backend=backend.name)
        y.backward(normal(*y.shape, dtype=y.dtype, seed=9))
        results.append((y.detach(), view.grad, values.grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("taps,in_,out,positions", [(9, 896, 896, 768), (1, 896, 896, 768), (1, 768, 896, 768)])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_layers_fill_an_h200(transposed: bool, taps: int, in_: int, out: int, positions: int) -> None:
    """896 channels at 8x8 and a linear layer, batch 12: two blocks of four warps for nearly every multiprocessor."""
    index = testing.TOPOLOGIES["random"](out, in_, Block(32, 32), taps).weight_index()
    side, kernel = (8, 3 if taps == 9 else 1) if in_ == out else (0, 1)
    image = (12, side, side, side, side) if side else (1, 1, positions, 1, positions)
    conv, sizes = (
        ConvSizes(*image, kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1),
        orientation(index, transposed),
    )
    module = emulated_cuda.backend().library()
    result, source = (in_, out) if transposed else (out, in_)
    native = sizes.side, sizes.rows, sizes.chunks, sizes.chunk, 32, index.nnzb, result, source, 0, 0
    config = product_config(
        conv, sizes, transposed, Device(132, 227 << 10),
        lambda c: module.cuda_product_shared_bytes(native, conv, transposed, c),
    )  # fmt: skip
    blocks = positions // 64 * -(-sizes.rows // config.warps_n) * config.splits
    assert config.m_tiles == config.warps_n == 4 and 200 <= blocks <= 264


def test_results_repeat_bit_for_bit() -> None:
    backend, (product, sddmm) = emulated_cuda.backend(), CONFIGURATIONS["splits"]
    topology, x = topology_of(backend, "3x3", Block(32, 32)), image("3x3", torch.bfloat16)
    runs = []
    with configured(product, sddmm):
        for _ in range(2):
            leaves = [x.detach().requires_grad_(), leaf(testing.random_values(topology))]
            y = ops.conv2d(*leaves, topology, conv=CASES["3x3"][0], backend=backend.name)
            y.backward(normal(*y.shape, dtype=y.dtype, seed=9))
            runs.append((y.detach(), *(t.grad for t in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_in_a_padded_channel_reaches_nothing() -> None:
    """Images whose pixels are wider than their channels, and gradients of padding, which are zero."""
    backend, conv = emulated_cuda.backend(), CASES["3x3"][0]
    topology, x = topology_of(backend, "3x3", Block(32, 32), "full"), image("3x3", torch.bfloat16)
    wide = torch.full((2, 9, 7, 80), float("nan"), dtype=x.dtype)
    wide[..., :70] = x.permute(0, 2, 3, 1)
    dy = normal(2, 40, 9, 7, dtype=x.dtype, seed=3).contiguous(memory_format=torch.channels_last)
    index = topology.weight_index(backend.name)
    want, got = (backend.sddmm(dy, image, index, conv) for image in (x, wide[..., :70].permute(0, 3, 1, 2)))
    assert torch.equal(want, got)
    x[0, 0, 0, 0] = float("inf")
    padding = topology.gather(torch.ones(40, 9 * 70)) == 0
    assert not backend.sddmm(dy, x, index, conv)[padding].any()


def test_a_regrow_rewrites_the_derived_index_in_place() -> None:
    backend = emulated_cuda.backend()
    topology = attached(backend, testing.TOPOLOGIES["random"](96, 128, Block(32, 32), 1), "linear")
    buffers = [getattr(topology, f"{backend.name}_{name}") for name in BUFFERS]
    addresses, before = [b.data_ptr() for b in buffers], [b.clone() for b in buffers]
    free = (~topology.mask()).nonzero()[:2]
    topology.rewrite(torch.tensor([0, 2]), free[:, 0], free[:, 1])
    after = [getattr(topology, f"{backend.name}_{name}") for name in BUFFERS]
    assert [b.data_ptr() for b in after] == addresses
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(f"{backend.name}_" in key for key in topology.state_dict())
    check_linear(backend.name, topology, normal(37, 128, dtype=torch.bfloat16), testing.random_values(topology), None)


def test_what_is_not_served_says_why() -> None:
    cuda, cpu, gpu = backends.get("cuda"), torch.device("cpu"), torch.device("cuda")

    def reason(op: str, pattern: Block, dtype: torch.dtype, device: torch.device) -> str:
        return str(cuda.why_unsupported(op, pattern=pattern, dtype=dtype, device=device))

    assert "not on cpu; move" in reason("linear", Block(32, 32), torch.bfloat16, cpu)
    assert "sides of 16, 32 or 64, not 8x8" in reason("conv", Block(8, 8), torch.bfloat16, gpu)
    assert "not float32; use autocast" in reason("conv", Block(32, 32), torch.float32, gpu)
    assert "no gru" in reason("gru", Block(32, 32), torch.bfloat16, gpu)
    old = emulated_cuda.backend(700).why_unsupported("linear", pattern=Block(32, 32), dtype=torch.bfloat16, device=cpu)
    assert old == "bfloat16 takes a GPU of sm_80 or newer, and this one is sm_70; use float16"


@pytest.mark.parametrize(
    "gpu,dtype,archs,why",
    [
        ((7, 0), torch.float16, [(7, 5), (8, 0), (9, 0)], "SPARSE_KERNELS_ARCHS=70 and a CUDA toolkit 12.x"),
        ((8, 0), torch.bfloat16, [(7, 5), (9, 0)], "built for sm_75, sm_90, and this GPU is sm_80; reinstall with SP"),
        ((8, 0), torch.float16, [(7, 5), (9, 0)], None),
        ((8, 6), torch.bfloat16, [(7, 5), (8, 0), (9, 0)], None),
        ((12, 0), torch.bfloat16, [(7, 5), (8, 0), (9, 0)], None),
    ],
    ids=str,
)
def test_a_gpu_that_the_build_has_no_code_for(
    gpu: tuple[int, int], dtype: torch.dtype, archs: list[tuple[int, int]], why: str | None
) -> None:
    class Built(CudaBackend):
        def capability(self, device: torch.device) -> tuple[int, int]:
            return gpu

        def architectures(self) -> list[tuple[int, int]]:
            return archs

    found = Built().why_unsupported("conv", pattern=Block(32, 32), dtype=dtype, device=torch.device("cuda"))
    assert found is None if why is None else found is not None and why in found


def test_an_index_that_was_not_derived_is_refused() -> None:
    backend, topology = emulated_cuda.backend(), Topology.full(32, 32, Block(32, 32))
    with pytest.raises(RuntimeError, match="needs its derived index; call topology.attach"):
        ops.linear(torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(1, 32, 32), topology, backend=backend.name)


def test_launchers_refuse_what_they_cannot_run() -> None:
    module = emulated_cuda.backend().library()
    index, conv = (32, 2, 1, 64, 32, 0, 64, 64, 0, 0), (1, 4, 4, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1)
    product, strides = (1, 4, 16, 4, 2, 2, 1, 0), (0, 1, 0, 0)
    bad = {
        "side": ((8, *index[1:]), conv, product, strides),
        "sizes": (index, (1, 4, 4, 5, 4, *conv[5:]), product, strides),
        "tile": (index, conv, (1, 4, 15, *product[3:]), strides),
        "threads": (index, conv, (1, 16, 32, 4, 8, 2, 1, 0), strides),
        "splits": (index, conv, (*product[:6], 2, 0), strides),
        "channels": (index, conv, product, (0, 2, 0, 0)),
    }
    for what, (w, shape, config, given) in bad.items():
        assert module.cuda_product(w, shape, False, config, 1, 0, 0, given, 0, 0, 0, 0, strides, 0, 0) == 2, what


# ---- The emulation itself -------------------------------------------------------------------------------------------

# In product.cuh.
WAIT = "                wait_copies_but(a.stages - 1);\n                sync_warp();\n"
SKIP = "                if (shift < 0) continue;\n"
# A step of each kernel, what the kernel becomes without it, and what says so.
BUDGET, TWO_COPIES = "exceeds the budget", "two copies under way to one place"
LOOP = "for (int k = 0; k < N; ++k) {"
MUTATIONS = {
    "a k-step of the product": ("product.cuh", LOOP, LOOP.replace("0", "1"), BUDGET),
    "a k-step of the gradient": ("sddmm.cuh", "(int k = 0; k < positions;", "(int k = 16; k < positions;", BUDGET),
    "the wait for weights": ("product.cuh", f"{WAIT}{SKIP}", f"                sync_warp();\n{SKIP}", BUDGET),
    "the wait for weights passed over": ("product.cuh", f"{WAIT}{SKIP}", f"{SKIP}{WAIT}", TWO_COPIES),
    "the wait for pixels": ("sddmm.cuh", "wait_copies<1>();", "wait_copies<2>();", BUDGET),
    "the barrier of a round": ("sddmm.cuh", "            sync_block();\n        }\n", "        }\n", BUDGET),
}

CHECK = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import pathlib, torch
import emulated_cuda, test_cuda_emulation as tests
from sparse_kernels import Block, backends
backend = emulated_cuda.EmulatedCuda(pathlib.Path({module!r}))
backends.register(backend)
for name in ("3x3", "stride 2"):
    x = tests.image(name, torch.bfloat16)
    tests.check_conv(backend, tests.topology_of(backend, name, Block(32, 32)), tests.CASES[name][0], x)
with tests.configured(tests.ProductConfig(1, 4, 16, 4, 2, 2), tests.SddmmConfig(1, 4, 8, 2, 2)):
    tests.check_conv(backend, tests.topology_of(backend, "3x3", Block(32, 32)), tests.CASES["3x3"][0],
                     tests.image("3x3", torch.bfloat16))
    # Taps that meet nothing in a phase are passed over.
    tests.check_conv(backend, tests.topology_of(backend, "stride 2", Block(32, 32), "full"), tests.CASES["stride 2"][0],
                     tests.image("stride 2", torch.bfloat16))
"""


def run_check(module: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    code = CHECK.format(tests=str(tests), root=str(tests.parent), module=str(module))
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_missing_step_turns_red(what: str, tmp_path: Path) -> None:
    file, old, new, message = MUTATIONS[what]
    for folder in ("csrc", "tests/emulation"):
        shutil.copytree(emulated_cuda.ROOT / folder, tmp_path / folder)
    path = tmp_path / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has changed: name the step anew"
    path.write_text(text.replace(old, new))
    result = run_check(emulated_cuda.build(tmp_path, flags=("-O1",)))
    assert result.returncode != 0 and message in result.stderr, result.stderr


def test_sanitizers_find_nothing() -> None:
    from sanitize import environment

    flags = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    module = emulated_cuda.build(flags=flags)
    result = run_check(module, **environment() | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    assert result.returncode == 0, result.stderr
