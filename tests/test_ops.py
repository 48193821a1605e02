"""Every op on every registered backend, pattern and dtype against dense torch in fp64; autograd, fakes, compile.

`SPARSE_KERNELS_TEST_DEVICE=cuda` runs them on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import Block, Topology, Unstructured, backends, ops, testing
from sparse_kernels.activations import ACTIVATIONS

BACKENDS = backends.names()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DEVICE = torch.device(os.environ.get("SPARSE_KERNELS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """Tensors that name no device are made on the one under test. A default device is a mode, which no op passes by:
    plain CPU tests have none."""
    torch.set_default_device(None if DEVICE.type == "cpu" else DEVICE)
    yield
    torch.set_default_device(None)


def require(backend: str, op: str, pattern: Block, dtype: torch.dtype) -> None:
    reason = backends.why_not(backend, op, pattern=pattern, dtype=dtype, device=DEVICE)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return made.to(DEVICE, dtype)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def topology_for(op: str, backend: str, topology: Topology) -> Topology:
    deriver = backends.get(backend).deriver(op, topology.pattern)
    if deriver is not None:
        topology.attach(deriver)
    return topology


def check_linear(backend: str, topology: Topology, x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """Forward and every gradient of `linear` within the budget of F.linear."""
    dtype = x.dtype
    results = {}
    dy = normal(*x.shape[:-1], topology.out, dtype=dtype, seed=9)
    for kind, precision in (("expected", torch.float64), ("dense", dtype), ("actual", dtype)):
        # `x` keeps its strides in the run under test.
        x_leaf = x.detach().requires_grad_() if kind == "actual" else leaf(x.to(precision))
        # Values are fp32 masters; what enters the product is their rounding to the compute dtype, on every side.
        v_leaf = leaf(values if kind == "actual" else values.to(dtype).to(precision))
        b_leaf = None if bias is None else leaf(bias if kind == "actual" else bias.to(dtype).to(precision))
        tap = torch.zeros(topology.row_blocks, topology.col_blocks, dtype=values.dtype, requires_grad=True)
        if kind == "actual":
            with testing.poisoned_buffers():
                y = ops.linear(x_leaf, v_leaf, topology, b_leaf, score_tap=tap, backend=backend)
                y.backward(dy)
            scores = tap.grad
        else:
            y = F.linear(x_leaf, topology.scatter(v_leaf), b_leaf)
            y.backward(dy.to(precision))
            grad = dy.reshape(-1, topology.out).to(precision).T @ x.detach().reshape(-1, topology.in_).to(precision)
            blocks = topology.weight_index().blocks(grad)
            scores = blocks.square().sum((1, 2)).view(topology.row_blocks, topology.col_blocks)
        results[kind] = {"y": y.detach(), "dx": x_leaf.grad, "dvalues": v_leaf.grad, "scores": scores}
        if b_leaf is not None:
            results[kind]["dbias"] = b_leaf.grad
    for what, expected in results["expected"].items():
        actual, dense = results["actual"][what], results["dense"][what]
        testing.assert_within_budget(actual, expected, dense, what)
    assert results["actual"]["y"].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", testing.TOPOLOGIES)
@pytest.mark.parametrize("pattern", testing.PATTERNS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend: str, pattern: Block, kind: str, dtype: torch.dtype) -> None:
    require(backend, "linear", pattern, dtype)
    for positions, out, in_ in ((37, 96, 64), (1, 70, 33)):
        topology = topology_for("linear", backend, testing.TOPOLOGIES[kind](out, in_, pattern, 1))
        master = torch.float64 if dtype == torch.float64 else torch.float32
        values = testing.random_values(topology, dtype=master)
        check_linear(backend, topology, normal(positions, in_, dtype=dtype), values, normal(out, dtype=master))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(16, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_takes_any_input(backend: str, pattern: Block) -> None:
    require(backend, "linear", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](48, 40, pattern, 1))
    values = testing.random_values(topology)
    inputs = {
        "no rows": normal(0, 40),
        "three dimensions": normal(3, 5, 40),
        "one vector": normal(40),
        "row stride": normal(7, 100)[:, :40],
        "offset": normal(7, 41)[:, 1:],
        "transposed": normal(40, 7).T,
        "expanded": normal(1, 40).expand(6, 40),
    }
    for x in inputs.values():
        check_linear(backend, topology, x, values, None)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(16, 16), Block(8, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_repeats_bit_for_bit(backend: str, pattern: Block) -> None:
    require(backend, "linear", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](96, 128, pattern, 1))
    runs = []
    for _ in range(3):
        x, values = leaf(normal(301, 128)), leaf(testing.random_values(topology))
        y = ops.linear(x, values, topology, backend=backend)
        y.square().sum().backward()
        runs.append((y.detach(), x.grad, values.grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(16, 32), Block(8, 4), Block(1, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_with_an_activation(backend: str, pattern: Block, activation: str, dtype: torch.dtype) -> None:
    require(backend, "linear", pattern, dtype)
    torch_forward = ACTIVATIONS[activation].forward
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](70, 45, pattern, 1))
    values, bias, dy = testing.random_values(topology), normal(70, seed=1), normal(37, 70, dtype=dtype, seed=9)
    x = 3 * normal(37, 45, dtype=dtype)
    if activation == "relu":
        bias = 20 * bias.sign()  # nothing near the kink, which a rounding may cross
    results = {}
    for kind, precision in (("expected", torch.float64), ("dense", dtype), ("actual", dtype)):
        leaves = [leaf(t) for t in ((x, values, bias) if kind == "actual" else (x, values.to(dtype), bias.to(dtype)))]
        leaves = leaves if kind == "actual" else [leaf(t.to(precision)) for t in leaves]
        with testing.poisoned_buffers():
            if kind == "actual":
                y = ops.linear(*leaves[:2], topology, leaves[2], activation=activation, backend=backend)
            else:
                y = torch_forward(F.linear(leaves[0], topology.scatter(leaves[1]), leaves[2]))
            y.backward(dy.to(y.dtype))
        results[kind] = {"y": y.detach()} | {f"gradient {k}": t.grad for k, t in enumerate(leaves)}
    for what, expected in results["expected"].items():
        testing.assert_within_budget(results["actual"][what], expected, results["dense"][what], what)
    if dtype == torch.float32:
        with torch.no_grad():
            again = ops.linear(x, values, topology, bias, activation=activation, backend=backend)
        testing.assert_within_budget(again, results["expected"]["y"], results["dense"]["y"], "without a gradient")


CONVOLUTIONS = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "strided": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": ((3, 2), (1, 2), (2, 1), (2, 1)),
    "conv1d": ((1, 5), (1, 1), (0, 2), (1, 1)),
}


@pytest.mark.parametrize("size", [(2, 20, 7, 6), (1, 1, 5, 5), (3, 16, 3, 5)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Block(16, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d(
    backend: str, pattern: Block, shape: str, memory_format: torch.memory_format, size: tuple[int, int, int, int]
) -> None:
    require(backend, "conv", pattern, torch.float32)
    conv = backends.ConvGeometry(*CONVOLUTIONS[shape])
    n, c, h, w = size
    taps = conv.kernel[0] * conv.kernel[1]
    topology = topology_for("conv", backend, testing.TOPOLOGIES["random"](24, c, pattern, taps))
    values, bias = testing.random_values(topology), normal(24)
    x = normal(n, c, h, w).to(memory_format=memory_format)
    results = {}
    for kind, precision in (("expected", torch.float64), ("dense", torch.float32), ("actual", torch.float32)):
        x_leaf, v_leaf, b_leaf = (leaf(t.to(precision)) for t in (x, values, bias))
        if kind == "actual":
            x_leaf = x.detach().requires_grad_()
            y = ops.conv2d(x_leaf, v_leaf, topology, b_leaf, conv=conv, backend=backend)
            dense_y = results["dense"]["y"]
            if c > 1:
                assert y.is_contiguous(memory_format=memory_format) and y.shape == dense_y.shape
        else:
            weight = topology.scatter(v_leaf).view(24, *conv.kernel, c).permute(0, 3, 1, 2)
            y = F.conv2d(x_leaf, weight, b_leaf, conv.stride, conv.padding, conv.dilation)
        y.backward(normal(*y.shape, dtype=precision, seed=9))
        results[kind] = {"y": y.detach(), "dx": x_leaf.grad, "dvalues": v_leaf.grad, "dbias": b_leaf.grad}
    for what, expected in results["expected"].items():
        testing.assert_within_budget(results["actual"][what], expected, results["dense"][what], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape,memory_format",
    [("1x1", torch.channels_last), ("strided", torch.channels_last), ("strided", torch.contiguous_format)],
    ids=str,
)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(16, 32), Block(8, 4), Block(1, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d_with_an_activation(
    backend: str,
    pattern: Block,
    shape: str,
    memory_format: torch.memory_format,
    activation: str,
    dtype: torch.dtype,
) -> None:
    require(backend, "conv", pattern, dtype)
    conv, torch_forward = backends.ConvGeometry(*CONVOLUTIONS[shape]), ACTIVATIONS[activation].forward
    topology = topology_for("conv", backend, testing.TOPOLOGIES["random"](35, 20, pattern, conv.kernel[0] ** 2))
    values, bias = testing.random_values(topology), normal(35, seed=1)
    x = 3 * normal(2, 20, 7, 6, dtype=dtype).to(memory_format=memory_format)
    if activation == "relu":
        bias = 12 * bias.sign()  # nothing near the kink, which a rounding may cross
    results = {}
    for kind, precision in (("expected", torch.float64), ("dense", dtype), ("actual", dtype)):
        leaves = [leaf(t) for t in ((x, values, bias) if kind == "actual" else (x, values.to(dtype), bias.to(dtype)))]
        leaves = leaves if kind == "actual" else [leaf(t.to(precision)) for t in leaves]
        with testing.poisoned_buffers():
            if kind == "actual":
                y = ops.conv2d(*leaves[:2], topology, leaves[2], conv=conv, activation=activation, backend=backend)
                assert y.is_contiguous(memory_format=memory_format)
            else:
                weight = topology.scatter(leaves[1]).view(35, *conv.kernel, 20).permute(0, 3, 1, 2)
                y = torch_forward(F.conv2d(leaves[0], weight, leaves[2], conv.stride, conv.padding))
            y.backward(normal(*y.shape, dtype=dtype, seed=9).to(y.dtype))
        results[kind] = {"y": y.detach()} | {f"gradient {k}": t.grad for k, t in enumerate(leaves)}
    for what, expected in results["expected"].items():
        testing.assert_within_budget(results["actual"][what], expected, results["dense"][what], what, roundings=2)
    if dtype == torch.float32:
        with torch.no_grad():
            again = ops.conv2d(x, values, topology, bias, conv=conv, activation=activation, backend=backend)
        expected, dense = results["expected"]["y"], results["dense"]["y"]
        testing.assert_within_budget(again, expected, dense, "without a gradient", roundings=2)


def gru_case(
    backend: str, patterns: list[Block | None], hidden: int, features: int, directions: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Topology | None], list[Tensor]]:
    weights: list[Tensor] = []
    topologies: list[Topology | None] = []
    for k in range(2 * directions):
        pattern, in_ = patterns[k % len(patterns)], hidden if k % 2 else features
        if pattern is None:
            weights.append(normal(3 * hidden, in_, dtype=dtype, seed=k) / in_**0.5)
            topologies.append(None)
        else:
            topology = topology_for("gru", backend, testing.TOPOLOGIES["random"](3 * hidden, in_, pattern, 1))
            weights.append(testing.random_values(topology, dtype=dtype, seed=k))
            topologies.append(topology)
    biases = [normal(3 * hidden, dtype=dtype, seed=50 + k) for k in range(2 * directions)]
    return weights, topologies, biases


@pytest.mark.parametrize("lengths", [None, [9, 0, 4, 1, 9], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("hidden,features,directions", [(16, 13, 2), (33, 5, 1), (48, 1, 2)])
@pytest.mark.parametrize(
    "patterns",
    [[Block(16, 16)], [Unstructured()], [None, Block(8, 8)], [Block(4, 1), None], [Block(16, 1)], [Block(32, 32)]],
    ids=lambda ps: "-".join(str(p) for p in ps),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gru(
    backend: str,
    patterns: list[Block | None],
    hidden: int,
    features: int,
    directions: int,
    lengths: list[int] | None,
) -> None:
    for pattern in patterns:
        require(backend, "gru", pattern or Unstructured(), torch.float32)
    weights, topologies, biases = gru_case(backend, patterns, hidden, features, directions, torch.float32)
    batch, steps = 5, 9
    x, h0 = normal(batch, steps, features), normal(directions, batch, hidden, seed=3)
    device_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    if device_lengths is not None:
        # What lies past a length must not be read: NaN there would spread.
        x = x.masked_fill(torch.arange(steps)[None, :, None] >= device_lengths[:, None, None], float("nan"))
    results = {}
    for kind in ("expected", "dense", "actual"):
        precision = torch.float64 if kind == "expected" else torch.float32
        x_leaf, h_leaf = leaf(x.to(precision)), leaf(h0.to(precision))
        w_leaves = [leaf(w.to(precision)) for w in weights]
        b_leaves = [leaf(b.to(precision)) for b in biases]
        taps = [
            None if t is None else torch.zeros(t.row_blocks, t.col_blocks, dtype=precision, requires_grad=True)
            for t in topologies
        ]
        with testing.poisoned_buffers():
            y, h_n = ops.gru(
                x_leaf,
                h_leaf,
                w_leaves,
                topologies,
                b_leaves,
                lengths=device_lengths,
                score_taps=taps,
                backend=backend if kind == "actual" else "reference",
            )
            dy, dh = normal(*y.shape, dtype=precision, seed=8), normal(*h_n.shape, dtype=precision, seed=7)
            torch.autograd.backward([y, h_n], [dy, dh])
        results[kind] = {"y": y.detach(), "h_n": h_n.detach(), "dx": x_leaf.grad, "dh0": h_leaf.grad}
        results[kind] |= {f"dw{k}": w.grad for k, w in enumerate(w_leaves)}
        results[kind] |= {f"db{k}": b.grad for k, b in enumerate(b_leaves)}
        results[kind] |= {f"scores{k}": t.grad for k, t in enumerate(taps) if t is not None}
    for what, expected in results["expected"].items():
        testing.assert_within_budget(results["actual"][what], expected, results["dense"][what], what, roundings=steps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_reference_gru_is_torch_gru(bidirectional: bool, bias: bool) -> None:
    module = torch.nn.GRU(5, 6, batch_first=True, bidirectional=bidirectional, bias=bias, dtype=torch.float64)
    suffixes = ["", "_reverse"] if bidirectional else [""]
    weights = [getattr(module, f"weight_{kind}_l0{s}") for s in suffixes for kind in ("ih", "hh")]
    biases = [getattr(module, f"bias_{kind}_l0{s}") for s in suffixes for kind in ("ih", "hh")] if bias else []
    x, h0 = normal(3, 4, 5, dtype=torch.float64), normal(len(suffixes), 3, 6, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2], dtype=torch.int32)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed_y, h_n = module(packed, h0)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_y, batch_first=True)
    topologies = [None] * len(weights)
    ours, ours_h = ops.gru(x, h0, weights, topologies, biases, lengths=lengths, backend="reference")
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(ours_h, h_n)


@pytest.mark.parametrize("backend", ["reference", "densified"])
def test_gradcheck(backend: str) -> None:
    def mask(topology: Topology) -> Tensor:
        return topology.gather(torch.ones(topology.out, topology.taps * topology.in_, dtype=torch.float64))

    topology = testing.TOPOLOGIES["random"](10, 13, Block(4, 4), 1)
    values = testing.random_values(topology, dtype=torch.float64)
    inputs = [leaf(t) for t in (normal(2, 3, 13, dtype=torch.float64), values, normal(10, dtype=torch.float64))]
    real = mask(topology)
    assert torch.autograd.gradcheck(lambda x, v, b: ops.linear(x, v * real, topology, b, backend=backend), inputs)

    conv = backends.ConvGeometry((3, 3), (2, 1), (1, 1), (1, 2))
    topology = testing.TOPOLOGIES["random"](6, 5, Block(4, 4), 9)
    values = testing.random_values(topology, dtype=torch.float64)
    inputs = [leaf(t) for t in (normal(2, 5, 4, 6, dtype=torch.float64), values, normal(6, dtype=torch.float64))]
    real = mask(topology)
    assert torch.autograd.gradcheck(
        lambda x, v, b: ops.conv2d(x, v * real, topology, b, conv=conv, backend=backend), inputs
    )
    assert torch.autograd.gradcheck(
        lambda x, v, b: ops.conv2d(x, v * real, topology, b, conv=conv, activation="silu", backend=backend), inputs
    )

    weights, topologies, biases = gru_case(backend, [Unstructured(), None], 4, 3, 2, torch.float64)
    tensors = [normal(3, 4, 3, dtype=torch.float64), normal(2, 3, 4, dtype=torch.float64), *weights, *biases]
    lengths = torch.tensor([4, 0, 2], dtype=torch.int32)

    def run(x: Tensor, h0: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gru(x, h0, rest[:4], topologies, rest[4:], lengths=lengths, backend=backend)

    assert torch.autograd.gradcheck(run, [leaf(t) for t in tensors])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    pattern = Block(4, 4)
    require(backend, "linear", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](10, 13, pattern, 1))
    values, tap = leaf(testing.random_values(topology)), torch.zeros(3, 4, requires_grad=True)
    arguments = (
        leaf(normal(2, 3, 13)),
        values,
        leaf(normal(10)),
        tap,
        topology.index(backend),
        topology.shape,
        backend,
    )
    torch.library.opcheck(torch.ops.sparse_kernels.linear.default, arguments)
    torch.library.opcheck(torch.ops.sparse_kernels.linear_activated.default, (*arguments[:-1], "silu", False, backend))

    if backends.why_not(backend, "conv", pattern=pattern, dtype=torch.float32, device=DEVICE) is None:
        topology = topology_for("conv", backend, testing.TOPOLOGIES["random"](6, 5, pattern, 9))
        values = leaf(testing.random_values(topology))
        for x in (normal(2, 5, 4, 6), normal(2, 5, 4, 6).to(memory_format=torch.channels_last), normal(2, 5, 1, 1)):
            index, geometry = topology.index(backend), [3, 3, 1, 1, 1, 1, 1, 1]
            arguments = (leaf(x), values, leaf(normal(6)), None, index, topology.shape, geometry, backend)
            torch.library.opcheck(torch.ops.sparse_kernels.conv2d.default, arguments)
            more = (*arguments[:-1], "gelu", False, backend)
            torch.library.opcheck(torch.ops.sparse_kernels.conv2d_activated.default, more)

    if backends.why_not(backend, "gru", pattern=pattern, dtype=torch.float32, device=DEVICE) is None:
        weights, topologies, biases = gru_case(backend, [pattern, None], 8, 5, 1, torch.float32)
        sparse = topologies[0]
        assert sparse is not None
        index = sparse.index(backend)
        meta = [len(index), *sparse.shape, *[0] * 6]
        lengths = torch.tensor([3, 0], dtype=torch.int32)
        tap = torch.zeros(sparse.row_blocks, sparse.col_blocks, requires_grad=True)
        x, h0 = leaf(normal(2, 3, 5)), leaf(normal(1, 2, 8))
        leaves = [leaf(w) for w in weights], [leaf(b) for b in biases]
        arguments = (x, h0, lengths, *leaves, [tap], [True, False], index, meta, True, backend)
        # Under AOT dispatch opcheck compares every output, and the reserve has elements that nobody writes or reads;
        # test_compile_fullgraph covers that path.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.sparse_kernels.gru.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend: str) -> None:
    pattern = Block(8, 8)
    require(backend, "linear", pattern, torch.float32)
    require(backend, "conv", pattern, torch.float32)
    require(backend, "gru", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](24, 32, pattern, 1))
    filters = topology_for("conv", backend, testing.TOPOLOGIES["random"](24, 24, pattern, 3))
    weights, topologies, biases = gru_case(backend, [pattern], 16, 24, 2, torch.float32)
    values, kernels = testing.random_values(topology), testing.random_values(filters)
    conv = backends.ConvGeometry((1, 3), padding=(0, 1))

    def function(x: Tensor, values: Tensor, kernels: Tensor, h0: Tensor) -> Tensor:
        hidden = ops.linear(x.relu(), values, topology, activation="gelu", backend=backend)
        images = hidden.transpose(1, 2).unsqueeze(2)  # [B, features, 1, T]
        hidden = ops.conv2d(images, kernels, filters, conv=conv, activation="silu", backend=backend)
        hidden = hidden.squeeze(2).transpose(1, 2)
        y, h_n = ops.gru(hidden, h0, weights, topologies, biases, backend=backend)
        return y.sum() + h_n.square().sum()

    grads = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaves = [leaf(t) for t in (normal(2, 5, 32), values, kernels, normal(2, 2, 16))]
        run(*leaves).backward()
        grads.append([t.grad for t in leaves])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    pattern = Block(8, 8)
    require(backend, "linear", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](24, 32, pattern, 1))
    values, x = leaf(testing.random_values(topology)), leaf(normal(6, 32))
    serves = backends.why_not(backend, "linear", pattern=pattern, dtype=torch.bfloat16, device=DEVICE) is None
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, values, topology, backend=backend)
    assert y.dtype == (torch.bfloat16 if serves else torch.float32)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert values.grad is not None and values.grad.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_another_dtype_are_cast(backend: str, pattern: Block, stored: torch.dtype) -> None:
    require(backend, "linear", pattern, torch.float32)
    topology = topology_for("linear", backend, testing.TOPOLOGIES["random"](24, 32, pattern, 1))
    values, bias = leaf(testing.random_values(topology).to(stored)), leaf(normal(24).to(stored))
    x = normal(6, 32)
    y = ops.linear(x, values, topology, bias, backend=backend)
    torch.testing.assert_close(y, x @ topology.scatter(values.float()).T + bias.float())
    y.sum().backward()
    assert values.grad is not None and values.grad.dtype == stored
    assert bias.grad is not None and bias.grad.dtype == stored

    require(backend, "gru", pattern, torch.float32)
    weights, topologies, biases = gru_case(backend, [pattern, None], 8, 8, 1, torch.float32)
    h0, x = normal(1, 2, 8), normal(2, 5, 8)
    other = [leaf(t.detach().to(stored)) for t in (*weights, *biases)]
    same = [t.detach().float() for t in other]
    y, _ = ops.gru(x, h0, other[:2], topologies, other[2:], backend=backend)
    torch.testing.assert_close(y, ops.gru(x, h0, same[:2], topologies, same[2:], backend=backend)[0])
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == stored for t in other)


def test_errors_name_the_remedy() -> None:
    topology = testing.TOPOLOGIES["random"](10, 13, Block(4, 4), 1)
    values = testing.random_values(topology)
    with pytest.raises(ValueError, match=r"13 features .* \[10, 13\]; got shape \[2, 12\]"):
        ops.linear(normal(2, 12), values, topology, backend="reference")
    with pytest.raises(ValueError, match=r"values must be \[nnzb, bh, bw\]"):
        ops.linear(normal(2, 13), values[1:], topology, backend="reference")
    with pytest.raises(TypeError, match="floating-point"):
        ops.linear(torch.ones(2, 13, dtype=torch.int64), values, topology, backend="reference")
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.linear(normal(2, 13), values, topology, backend="nothing")
    with pytest.raises(ValueError, match="activation must be None or one of relu, silu"):
        ops.linear(normal(2, 13), values, topology, activation="swish", backend="reference")
    with pytest.raises(ValueError, match=r"bias must be \[10\]"):
        ops.linear(normal(2, 13), values, topology, normal(9), backend="reference")
    weights, topologies, biases = gru_case("reference", [None], 4, 3, 1, torch.float32)
    x, h0 = normal(2, 5, 3), normal(1, 2, 4)
    for wrong in (torch.tensor([6, 1], dtype=torch.int32), torch.tensor([-1, 1], dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"lengths must lie in 0..5"):
            ops.gru(x, h0, weights, topologies, biases, lengths=wrong, backend="reference")
    with pytest.raises(ValueError, match="lengths must be int32"):
        ops.gru(x, h0, weights, topologies, biases, lengths=torch.tensor([1, 1]), backend="reference")
