"""The native GRU kernels against a GRU in fp64: outputs, every gradient, scores, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparse_kernels import _native, backends, reference
from sparse_kernels.backends.registry import GruGrads, GruWeight
from sparse_kernels.patterns import Block
from sparse_kernels.topology import Topology

if _native.why_unavailable() is not None:
    pytest.skip(f"native kernels: {_native.why_unavailable()}", allow_module_level=True)


PATTERNS = [(16, 16), (8, 8), (16, 1), (32, 32), (1, 1), (1, 16), (64, 4), (4, 64), (4, 4), (8, 1), (1, 4), (64, 64)]


@pytest.fixture(autouse=True)
def set_threads() -> Iterator[Callable[[int], None]]:
    """One thread unless a test asks for more; torch's own number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every torch.empty (outputs, reserve, workspace) comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """One layer: fp32 inputs of the native kernels and what the reference needs."""

    x: Tensor
    h0: Tensor
    lengths: Tensor | None
    weights: list[GruWeight]
    biases: list[Tensor]
    dy: Tensor
    dh_n: Tensor

    def native(self, want_scores: bool = True, need_dx: bool = True) -> tuple[Tensor, Tensor, GruGrads]:
        y, h_n, reserve = backends.get("cpu").gru_forward(
            self.x, self.h0, self.lengths, self.weights, self.biases, True
        )
        wanted = [want_scores] * len(self.weights)
        grads = backends.get("cpu").gru_backward(
            self.dy, self.dh_n, self.x, self.h0, self.lengths, self.weights, self.biases, y, reserve, wanted, need_dx
        )
        return y, h_n, grads

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every output and gradient by name, from dense torch in `dtype`."""
        dense = [w.tensor if w.index is None else w.index.scatter(w.tensor) for w in self.weights]
        x, h0, *rest = [t.detach().to(dtype).requires_grad_() for t in (self.x, self.h0, *dense, *self.biases)]
        y, h_n = reference.gru(x, h0, self.lengths, rest[: len(dense)], rest[len(dense) :])
        keep = inside(self.x, self.lengths)
        dy = torch.where(keep, self.dy, 0.0).to(dtype)
        # Without steps y depends on nothing and autograd refuses it.
        outputs = [(o, d) for o, d in ((y, dy), (h_n, self.dh_n.to(dtype))) if o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in outputs], (x, h0, *rest), [d for _, d in outputs], materialize_grads=True
        )
        named = {"y": y.detach(), "h_n": h_n.detach(), "dx": grads[0], "dh0": grads[1]}
        for k, weight in enumerate(self.weights):
            grad = grads[2 + k]
            named[f"dw{k}"] = grad if weight.index is None else weight.index.gather(grad)
            if weight.index is not None:
                norms = reference.block_scores(weight.index.blocks(grad))
                named[f"score{k}"] = norms.view(weight.index.row_blocks, weight.index.col_blocks)
        return named | {f"db{k}": grad for k, grad in enumerate(grads[2 + len(dense) :])}


def inside(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return torch.ones(x.shape[0], x.shape[1], 1, dtype=torch.bool)
    return (torch.arange(x.shape[1])[None] < lengths[:, None])[..., None]


def make(
    patterns: list[tuple[int, int] | None] | tuple[int, int],
    *,
    batch: int = 19,
    steps: int = 9,
    features: int = 20,
    hidden: int = 24,
    directions: int = 2,
    density: float = 0.4,
    lengths: str | None = "vary",
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """A random layer; NaN in x and dy past each length; patterns of all weights, or one a weight (None: dense)."""
    gen = torch.Generator().manual_seed(seed)
    each = [patterns] * (2 * directions) if isinstance(patterns, tuple) else patterns
    scale = hidden**-0.5
    weights = []
    for k, sides in enumerate(each):
        in_ = hidden if k % 2 else features
        dense = (torch.rand(3 * hidden, in_, generator=gen) * 2 - 1) * scale
        if sides is None:
            weights.append(GruWeight(dense, None))
            continue
        pattern = Block(*sides)
        grid = pattern.grid(3 * hidden, in_)
        mask = torch.rand(grid, generator=gen) < density
        topology = Topology.from_mask(mask, 3 * hidden, in_, pattern)
        # Slots in an order of their own, as after a regrow.
        rows, cols = topology.coords()
        shuffle = torch.randperm(topology.nnzb, generator=gen)
        topology = Topology(3 * hidden, in_, pattern, rows[shuffle], cols[shuffle])
        weights.append(GruWeight(topology.gather(dense), topology.weight_index()))
    sizes = {
        None: None,
        "vary": torch.randint(1, steps + 1, (batch,), generator=gen, dtype=torch.int32) if steps else None,
        "with zeros": torch.randint(0, steps + 1, (batch,), generator=gen, dtype=torch.int32) % max(steps, 1),
        "all zero": torch.zeros(batch, dtype=torch.int32),
    }[lengths]
    x = torch.randn(batch, steps, features, generator=gen)
    dy = torch.randn(batch, steps, directions * hidden, generator=gen)
    keep = inside(x, sizes)
    return Case(
        x=torch.where(keep, x, torch.nan),
        h0=torch.randn(directions, batch, hidden, generator=gen),
        lengths=sizes,
        weights=weights,
        biases=[torch.randn(3 * hidden, generator=gen) * scale for _ in each] if bias else [],
        dy=torch.where(keep, dy, torch.nan),
        dh_n=torch.randn(directions, batch, hidden, generator=gen),
    )


def check(case: Case) -> None:
    """Every output within twice torch's own fp32 error plus rounding."""
    y, h_n, grads = case.native()
    got = {"y": y, "h_n": h_n, "dx": grads.x, "dh0": grads.h0}
    for k, grad in enumerate(grads.weights):
        got[f"dw{k}"] = grad
        if grads.scores[k] is not None:
            got[f"score{k}"] = grads.scores[k]
    got |= {f"db{k}": grad for k, grad in enumerate(grads.biases)}
    exact, single = case.expected(torch.float64), case.expected(torch.float32)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].shape == value.shape, name
        if not value.numel():
            continue
        own = (single[name].double() - value).abs().max()
        budget = 2 * own + 4 * torch.finfo(torch.float32).eps * value.abs().max()
        error = (got[name].double() - value).abs().max()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("sides", PATTERNS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_patterns(isa: str, sides: tuple[int, int]) -> None:
    check(make(sides))


@pytest.mark.parametrize("sides", [(16, 16), (8, 8), (1, 1), (16, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"density": 1.0},
        {"batch": 1},
        {"batch": 70, "hidden": 32, "features": 48},
        {"directions": 1, "bias": False},
        {"features": 1, "hidden": 5},
        {"lengths": None, "hidden": 100, "features": 13, "steps": 4},
        {"lengths": "with zeros", "hidden": 48, "steps": 20},
        {"lengths": "all zero"},
        {"steps": 0, "lengths": None},
        {"steps": 1, "batch": 3},
        {"batch": 0},
    ],
    ids=str,
)
def test_shapes(isa: str, sides: tuple[int, int], options: dict) -> None:
    check(make(sides, **options))


def test_mixed_dense_and_sparse(isa: str) -> None:
    check(make([None, (16, 16), (1, 1), None], features=13, hidden=48))
    check(make([None] * 4, features=13, hidden=40))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(set_threads: Callable[[int], None], threads: int) -> None:
    set_threads(threads)
    for sides in [(16, 16), (1, 1)]:
        case = make(sides, batch=40)
        check(case)
        first, second = case.native(), case.native()
        for a, b in zip(flat(first), flat(second), strict=True):
            assert torch.equal(a, b)


def flat(result: tuple[Tensor, Tensor, GruGrads]) -> list[Tensor]:
    y, h_n, g = result
    return [y, h_n, g.x, g.h0, *g.weights, *g.biases, *[s for s in g.scores if s is not None]]


def test_strided_inputs(isa: str) -> None:
    case = make((16, 16))
    want = flat(case.native())
    case.x = torch.stack([case.x.transpose(0, 1)] * 2).transpose(1, 2)[1]
    case.dy = torch.cat([case.dy, case.dy], dim=2)[..., case.dy.shape[2] :]
    case.h0 = case.h0.transpose(1, 2).contiguous().transpose(1, 2)
    assert not case.x.is_contiguous() and not case.dy.is_contiguous()
    for a, b in zip(flat(case.native()), want, strict=True):
        assert torch.equal(a, b)


def test_without_dx_and_without_saving() -> None:
    case = make((8, 8))
    y, h_n, grads = case.native(want_scores=False)
    y2, h_n2, reserve = backends.get("cpu").gru_forward(case.x, case.h0, case.lengths, case.weights, case.biases, False)
    assert reserve.numel() == 0 and torch.equal(y, y2) and torch.equal(h_n, h_n2)
    less = case.native(want_scores=False, need_dx=False)[2]
    assert less.x.numel() == 0
    for a, b in zip([less.h0, *less.weights, *less.biases], [grads.h0, *grads.weights, *grads.biases], strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_only_its_own_sequence(isa: str) -> None:
    case = make((16, 16), lengths=None, bias=False)
    y, h_n, _ = case.native()
    case.x[3, 2, 5] = torch.nan
    y2, h_n2, grads = case.native()
    others = torch.arange(case.x.shape[0]) != 3
    assert torch.equal(y[others], y2[others]) and torch.equal(h_n[:, others], h_n2[:, others])
    assert y2[3].isnan().any() and grads.weights[0].isnan().any()


def test_order_of_the_batch_does_not_matter(isa: str) -> None:
    case = make((16, 16), batch=33, steps=12, lengths="with zeros")
    y, h_n, _ = case.native()
    turn = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    assert case.lengths is not None
    y2, h_n2, _ = backends.get("cpu").gru_forward(
        case.x[turn], case.h0[:, turn], case.lengths[turn], case.weights, case.biases, False
    )
    assert torch.equal(y[turn], y2) and torch.equal(h_n[:, turn], h_n2)


def test_saturated_gates(isa: str) -> None:
    case = make((16, 16), bias=False)
    case.x = case.x * 1e4
    y = case.native()[0]
    exact = case.expected(torch.float64)["y"]
    assert torch.isfinite(y).all() and (y.double() - exact).abs().max() < 1e-3


def test_the_kernel_refuses_lengths_out_of_range() -> None:
    case = make((16, 16))
    case.lengths = torch.full((19,), 10, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gru_forward: .* status 2"):
        case.native()
