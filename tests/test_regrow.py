"""regrow: what is dropped, what is grown, and that everything else stays where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_kernels import Block, Topology, Unstructured
from sparse_kernels.regrow import Candidates, best_positions, inactive_blocks, quota, regrow

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@dataclass
class Weight:
    """A sparse weight without a layer."""

    values: nn.Parameter
    topology: Topology
    name: str = "weight"

    @classmethod
    def random(cls, out: int, in_: int, pattern: Block, nnzb: int, *, taps: int = 1, seed: int = 0) -> Weight:
        generator = torch.Generator().manual_seed(seed)
        topology = Topology.random(out, in_, pattern, nnzb, taps=taps, generator=generator)
        dense = torch.randn(out, taps * in_, generator=generator)
        return cls(nn.Parameter(topology.gather(dense)), topology)

    @property
    def positions(self) -> Tensor:
        rows, cols = self.topology.coords()
        return rows * self.topology.col_blocks + cols

    def padding(self) -> Tensor:
        """Which elements of `values` are padding: bool `[nnzb, bh, bw]`."""
        return self.topology.gather(torch.ones(self.topology.out, self.topology.taps * self.topology.in_)) == 0

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 3, scale: float = 1.0, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            noise = torch.randn(self.values.shape, generator=generator)
            self.values.grad = noise.masked_fill_(self.padding(), 0) * scale
            optimizer.step()


def slot_tensors(weight: Weight, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for key, item in optimizer.state[weight.values].items():
        if isinstance(item, Tensor) and item.dim() == 3:
            yield key, item


SHAPES = [
    pytest.param(24, 40, Unstructured(), 1, id="unstructured"),
    pytest.param(64, 96, Block(16, 16), 1, id="16x16"),
    pytest.param(36, 50, Block(8, 16), 1, id="8x16-edges"),
    pytest.param(20, 18, Block(4, 4), 9, id="4x4-taps-edges"),
    pytest.param(33, 7, Block(16, 1), 1, id="16x1-edges"),
]


def weight_of(out: int, in_: int, pattern: Block, taps: int, density: float = 0.4) -> Weight:
    rows, cols = pattern.grid(out, in_)
    return Weight.random(out, in_, pattern, max(1, round(density * rows * cols * taps)), taps=taps)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Choosing


def test_best_positions_takes_the_lower_of_equals() -> None:
    key = torch.tensor([2.0, 5.0, 2.0, 1.0, 2.0, 5.0])
    assert best_positions(key, 3, largest=True).tolist() == [0, 1, 5]
    assert best_positions(key, 2, largest=False).tolist() == [0, 3]
    assert best_positions(key, 4, largest=False).tolist() == [0, 2, 3, 4]
    assert best_positions(key, 0, largest=True).tolist() == []
    assert best_positions(key, 6, largest=True).tolist() == list(range(6))


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40).flatmap(
        lambda keys: st.tuples(st.just(keys), st.integers(0, len(keys)), st.booleans())
    )
)
@settings(max_examples=200, deadline=None)
def test_best_positions_equals_a_stable_sort(case: tuple[list[int], int, bool]) -> None:
    keys, count, largest = case
    expected = torch.tensor(keys).sort(descending=largest, stable=True).indices[:count].sort().values
    assert torch.equal(best_positions(torch.tensor(keys).float(), count, largest=largest), expected)


@given(
    blocks=st.integers(0, 5000),
    fraction=st.floats(1e-4, 1.0),
    carry=st.floats(0, 0.999),
)
def test_quota_moves_p_n_blocks_over_time(blocks: int, fraction: float, carry: float) -> None:
    moved, start = 0, carry
    for _ in range(20):
        count, carry = quota(blocks, fraction, carry, blocks)
        assert 0 <= carry < 1
        moved += count
    assert abs(moved - 20 * fraction * blocks) <= 1 + 1e-6
    assert abs(moved + carry - start - 20 * fraction * blocks) < 1e-6 * max(1, blocks)


def test_capped_quota_leaves_no_debt() -> None:
    carry = 0.0
    for _ in range(50):
        count, carry = quota(100, 0.505, carry, 3)
        assert count == 3
        assert 0 <= carry < 1


@pytest.mark.parametrize(("out", "in_", "pattern", "taps"), SHAPES)
def test_drops_the_smallest_rms_and_grows_the_best_score(out: int, in_: int, pattern: Block, taps: int) -> None:
    weight = weight_of(out, in_, pattern, taps)
    topology, before = weight.topology, weight.positions
    values, rms = weight.values.detach().clone(), topology.block_rms(weight.values)
    scores = torch.rand(topology.row_blocks, topology.col_blocks, generator=torch.Generator().manual_seed(5))
    count = max(1, topology.nnzb // 4)
    report = regrow(weight, count=count, scores=scores)

    assert report.moved == count
    assert set(report.slots.tolist()) == set(rms.argsort()[:count].tolist())
    absent = scores.flatten().clone()
    absent[before] = -1
    assert set(weight.positions[report.slots].tolist()) == set(absent.argsort(descending=True)[:count].tolist())
    untouched = torch.ones(topology.nnzb, dtype=torch.bool)
    untouched[report.slots] = False
    assert torch.equal(weight.positions[untouched], before[untouched])
    assert torch.equal(weight.values.detach()[untouched], values[untouched])
    assert not weight.values.detach()[report.slots].any()
    assert not weight.values.detach()[weight.padding()].any()
    topology.validate()


def test_rms_counts_real_elements_only() -> None:
    topology = Topology.from_mask(torch.tensor([[True, True, False]]), 4, 10, Block(4, 4))
    dense = torch.ones(4, 10)
    dense[:, :4] = 0.9
    wide = Weight(nn.Parameter(topology.gather(dense)), topology)
    assert regrow(wide, count=1, scores=torch.ones(1, 3)).slots.tolist() == [0]
    # A block of two real columns has the smaller sum of squares, not the smaller RMS.
    topology = Topology.from_mask(torch.tensor([[True, False, True]]), 4, 10, Block(4, 4))
    edge = Weight(nn.Parameter(topology.gather(dense)), topology)
    assert regrow(edge, count=1, scores=torch.ones(1, 3)).slots.tolist() == [0]


def test_the_choice_does_not_depend_on_slots() -> None:
    one = weight_of(36, 50, Block(4, 4), 1)
    order = torch.randperm(one.topology.nnzb, generator=torch.Generator().manual_seed(3))
    rows, cols = one.topology.coords()
    other = Weight(
        nn.Parameter(one.values.detach()[order]), Topology(36, 50, Block(4, 4), rows[order], cols[order], taps=1)
    )
    with torch.no_grad():
        one.values[:], other.values[:] = 1.0, 1.0  # nothing but ties
    scores = torch.ones(one.topology.row_blocks, one.topology.col_blocks)
    for weight in (one, other):
        regrow(weight, count=9, scores=scores)
    assert torch.equal(one.topology.crow, other.topology.crow)
    assert torch.equal(one.topology.col, other.topology.col)


def test_candidates_choose_like_the_whole_scores() -> None:
    scores = torch.rand(9, 13).round(decimals=1)  # with ties
    results = []
    for reduce in (False, True):
        weight = weight_of(36, 50, Block(4, 4), 1)
        given_scores: Tensor | Candidates = scores
        if reduce:
            given_scores = Candidates.best(scores.clone(), weight.topology, 12, overwrite=True)
        regrow(weight, count=10, scores=given_scores)
        results.append(weight.topology.mask())
    assert torch.equal(*results)


def test_random_growth_is_uniform_and_seeded() -> None:
    hits = torch.zeros(16)
    for seed in range(200):
        weight = Weight.random(4, 4, Unstructured(), 4, seed=0)
        regrow(weight, count=2, generator=torch.Generator().manual_seed(seed))
        hits[weight.positions] += 1
    fresh = Weight.random(4, 4, Unstructured(), 4, seed=0)
    absent = torch.ones(16, dtype=torch.bool)
    absent[fresh.positions] = False
    expected = 200 * 2 / 12
    assert hits[absent].sum() == 400
    assert ((hits[absent] - expected).abs() < 5 * expected**0.5).all()
    again = [weight_of(24, 40, Unstructured(), 1) for _ in range(2)]
    for weight in again:
        regrow(weight, count=30, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again[0].topology.col, again[1].topology.col)


@pytest.mark.parametrize("scored", [True, False])
def test_just_dropped_blocks_may_win_their_place_back(scored: bool) -> None:
    weight = weight_of(64, 96, Block(8, 8), 1)
    optimizer = torch.optim.AdamW([weight.values])
    weight.train(optimizer)
    topology, before, values = weight.topology, weight.positions, weight.values.detach().clone()
    moment = optimizer.state[weight.values]["exp_avg"].clone()
    scores = torch.rand(topology.row_blocks, topology.col_blocks) if scored else None
    report = regrow(
        weight, optimizer, count=12, scores=scores, regrow_dropped=True, generator=torch.Generator().manual_seed(2)
    )
    assert report.kept is not None
    kept, lost = report.slots[report.kept], report.slots[~report.kept]
    assert report.moved == lost.numel()
    assert 0 < report.moved < 12, "both cases should occur here"
    assert torch.equal(weight.positions[kept], before[kept])
    assert torch.equal(weight.values.detach()[kept], values[kept])
    assert torch.equal(optimizer.state[weight.values]["exp_avg"][kept], moment[kept])
    assert not weight.values.detach()[lost].any()
    assert not torch.isin(weight.positions[lost], before).any()
    topology.validate()
    if scores is not None:
        pool = scores.flatten().clone()
        survivors = torch.ones(topology.nnzb, dtype=torch.bool)
        survivors[report.slots] = False
        pool[before[survivors]] = -1
        assert set(weight.positions[report.slots].tolist()) == set(pool.argsort(descending=True)[:12].tolist())


def test_a_full_weight_may_only_take_its_own_blocks_back() -> None:
    topology = Topology.full(8, 8, Block(4, 4))
    weight = Weight(nn.Parameter(torch.randn(4, 4, 4)), topology)
    before = weight.values.detach().clone()
    report = regrow(weight, count=2, scores=torch.rand(2, 2), regrow_dropped=True)
    assert report.moved == 0
    assert torch.equal(weight.values.detach(), before)
    assert regrow(weight, count=0).moved == 0
    topology.validate()


# Everything stays in place


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("out", "in_", "pattern", "taps"), SHAPES)
def test_state_follows_in_place(name: str, out: int, in_: int, pattern: Block, taps: int) -> None:
    weight = weight_of(out, in_, pattern, taps)
    topology = weight.topology
    optimizer = OPTIMIZERS[name]([weight.values])
    weight.train(optimizer)
    average = weight.values.detach().clone()
    before = {key: item.clone() for key, item in slot_tensors(weight, optimizer)}
    state = optimizer.state[weight.values]
    scalars = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 0}
    index_and_values = [*topology.index(), weight.values, weight.values.grad, average]
    addresses = [t.data_ptr() for t in [*index_and_values, *(t for _, t in slot_tensors(weight, optimizer))]]
    count = max(1, topology.nnzb // 4)
    report = regrow(weight, optimizer, count=count, generator=torch.Generator().manual_seed(0), follow=[average])

    after = [*index_and_values, *(t for _, t in slot_tensors(weight, optimizer))]
    assert addresses == [t.data_ptr() for t in after]
    assert weight.values.grad is not None
    for tensor in (weight.values, weight.values.grad, average):
        assert not tensor[report.slots].any()
    others = torch.ones(topology.nnzb, dtype=torch.bool)
    others[report.slots] = False
    assert average[others].any()
    for key, item in slot_tensors(weight, optimizer):
        assert torch.equal(item[others], before[key][others])
        grown = item[report.slots]
        if (before[key] < 0).any():
            assert not grown.any(), "state with a direction begins anew"
        else:
            assert torch.equal(grown, grown.flatten()[0].expand_as(grown)), "a scale has one value"
            if before[key].any():
                assert before[key][others].min() <= grown.flatten()[0] <= before[key][others].max()
                assert grown.all()
    for key, value in scalars.items():
        assert torch.equal(state[key], value)
    weight.train(optimizer, 2)
    assert weight.values.isfinite().all()
    assert not weight.values.detach()[weight.padding()].any()


def test_mean_is_over_real_elements() -> None:
    topology = Topology.from_mask(torch.tensor([[True, False, True], [False, False, True]]), 6, 10, Block(4, 4))
    weight = Weight(nn.Parameter(topology.gather(torch.ones(6, 10))), topology)
    optimizer = torch.optim.AdamW([weight.values])
    weight.train(optimizer, 1)
    second = optimizer.state[weight.values]["exp_avg_sq"]
    second.copy_(topology.gather(torch.ones(6, 10)))
    with torch.no_grad():
        weight.values[1] *= 0.5
    report = regrow(weight, optimizer, count=1, scores=torch.tensor([[0.0, 0, 0], [0, 1, 0]]))
    assert report.slots.tolist() == [1]
    assert torch.equal(second[1], torch.ones(4, 4))


def test_lazy_state_and_missing_gradient() -> None:
    weight = weight_of(64, 96, Block(16, 16), 1)
    optimizer = torch.optim.AdamW([weight.values])
    regrow(weight, optimizer, count=3)
    assert weight.values.grad is None
    assert len(optimizer.state) == 0
    weight.train(optimizer)
    weight.topology.validate()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = weight_of(36, 50, Block(8, 16), 1)
    weight.values = nn.Parameter(weight.values.detach().to(dtype))
    optimizer = torch.optim.AdamW([weight.values])
    weight.values.grad = torch.ones_like(weight.values)
    optimizer.step()
    report = regrow(weight, optimizer, count=2, generator=torch.Generator().manual_seed(0))
    assert optimizer.state[weight.values]["exp_avg_sq"].dtype == dtype
    assert optimizer.state[weight.values]["exp_avg_sq"][report.slots].any()


def first_update(policy: Any, ratio: float) -> float:
    """The largest first update of grown weights under Adam, in learning rates, for gradients `ratio` times as large as
    those before."""
    weight = weight_of(64, 96, Block(16, 16), 1)
    lr = 1e-3
    optimizer = torch.optim.Adam([weight.values], lr=lr)
    weight.train(optimizer, 2000, seed=4)
    report = regrow(weight, optimizer, count=4, generator=torch.Generator().manual_seed(0), state_policy=policy)
    weight.train(optimizer, 1, scale=ratio)
    return float(weight.values.detach()[report.slots].abs().max()) / lr


def test_the_first_update_of_grown_weights_is_bounded() -> None:
    # What plain zeroing does, whatever the gradient.
    assert first_update("zero", 1.0) > 2.5
    assert first_update("zero", 1e-3) > 2.5
    assert first_update("mean", 1.0) < 0.5
    assert first_update("mean", 2.0) < 1.0
    assert first_update({"exp_avg_sq": "mean"}, 1.0) < 0.5
    assert first_update({"exp_avg_sq": "zero"}, 1.0) > 2.5


@pytest.mark.parametrize("regrow_dropped", [False, True])
@pytest.mark.parametrize("clip", [1.0, 1e-3])
def test_the_first_update_of_blocks_chosen_for_their_gradient_is_bounded(clip: float, regrow_dropped: bool) -> None:
    def largest_updates(policy: Any) -> tuple[float, float]:
        """The first update and the largest of ten, in learning rates, for gradients 30 times the survivors'."""
        weight = weight_of(60, 90, Block(16, 16), 1)
        topology, values, lr = weight.topology, weight.values, 1e-3
        optimizer = torch.optim.Adam([values], lr=lr)
        weight.train(optimizer, 2000, scale=clip, seed=4)
        # One score has not been clipped, the gradient has.
        heights, widths = topology.weight_index().block_areas()
        scores = 900.0 * heights[:, None] * widths[None, :]
        rows, cols = topology.coords()
        scores[rows, cols] = values.grad.square().sum((1, 2)) / clip**2
        slots = regrow(
            weight, optimizer, count=4, scores=scores, state_policy=policy, regrow_dropped=regrow_dropped
        ).slots
        sizes = []
        for _ in range(10):
            before = values.detach().clone()
            values.grad = torch.full_like(values, clip).masked_fill_(weight.padding(), 0)
            values.grad[slots] *= 30
            optimizer.step()
            sizes.append(float((values.detach() - before)[slots].abs().max()) / lr)
        return sizes[0], max(sizes)

    first, most = largest_updates("score")
    assert 0.09 < first < 0.11
    assert most < 1
    first, most = largest_updates("mean")
    assert first > 2
    assert most > 4
    assert largest_updates({"exp_avg_sq": "mean"})[0] > 2
    assert largest_updates({})[0] < 0.11


def test_score_falls_back_to_the_mean_without_a_gradient_or_scores() -> None:
    def second_moments(policy: str, scored: bool, gradient: float | None) -> Tensor:
        weight = weight_of(36, 50, Block(8, 16), 1)
        optimizer = torch.optim.AdamW([weight.values])
        weight.train(optimizer)
        weight.values.grad = None if gradient is None else torch.full_like(weight.values, gradient)
        scores = torch.full((weight.topology.row_blocks, weight.topology.col_blocks), 1e6) if scored else None
        if scored and gradient == 0:
            rows, cols = weight.topology.coords()
            scores[rows, cols] = 0
        report = regrow(weight, optimizer, count=3, scores=scores, state_policy=policy)
        return optimizer.state[weight.values]["exp_avg_sq"][report.slots]

    for scored, gradient in ((False, 1.0), (True, None)):
        torch.manual_seed(0)
        expected = second_moments("mean", scored, gradient)
        torch.manual_seed(0)
        torch.testing.assert_close(second_moments("score", scored, gradient), expected, rtol=0, atol=0)
    # Where no active block had a gradient there is no scale to learn from, and the score counts as it is.
    assert (second_moments("score", True, 0.0) >= 1e6 / (8 * 16)).all()


def test_policies_keep_and_zero() -> None:
    for policy, check in (("keep", lambda new, old: torch.equal(new, old)), ("zero", lambda new, old: not new.any())):
        weight = weight_of(64, 96, Block(16, 16), 1)
        optimizer = torch.optim.AdamW([weight.values])
        weight.train(optimizer)
        before = {key: item.clone() for key, item in slot_tensors(weight, optimizer)}
        report = regrow(weight, optimizer, count=3, state_policy=policy)
        for key, item in slot_tensors(weight, optimizer):
            assert check(item[report.slots], before[key][report.slots])


# Refusals


class Preconditioned(torch.optim.SGD):
    """An optimizer whose state has no slot dimension."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["preconditioner"] = torch.eye(p.numel())
        return super().step(closure)


def test_refusals_change_nothing() -> None:
    weight = weight_of(16, 24, Block(4, 4), 1)
    optimizer = Preconditioned([weight.values], lr=0.1)
    weight.train(optimizer)
    state = [t.clone() for t in (*weight.topology.index(), weight.values.detach())]
    grid = weight.topology.row_blocks, weight.topology.col_blocks
    bad = torch.ones(grid)
    bad[0, 0] = torch.inf
    with pytest.raises(TypeError, match="'preconditioner' of Preconditioned for weight has no slot dimension"):
        regrow(weight, optimizer, count=2)
    with pytest.raises(ValueError, match="must be finite"):
        regrow(weight, count=2, scores=bad)
    with pytest.raises(ValueError, match=r"scores must be \[row_blocks, col_blocks\]"):
        regrow(weight, count=2, scores=torch.ones(3))
    with pytest.raises(ValueError, match="count must lie in"):
        regrow(weight, count=inactive_blocks(weight.topology) + 1)
    with pytest.raises(ValueError, match="state policy is one of"):
        regrow(weight, optimizer, count=2, state_policy="reset")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="what follows weight"):
        regrow(weight, count=2, follow=[torch.zeros(3)])
    with pytest.raises(ValueError, match="needs 2 candidates"):
        regrow(weight, count=2, scores=Candidates.best(torch.ones(grid), weight.topology, 1))
    for a, b in zip(state, (*weight.topology.index(), weight.values.detach()), strict=True):
        assert torch.equal(a, b)
    assert regrow(weight, optimizer, count=2, state_policy={"preconditioner": "keep"}).moved == 2


def test_a_diverged_weight_keeps_a_valid_topology() -> None:
    weight = weight_of(24, 40, Unstructured(), 1)
    with torch.no_grad():
        weight.values[::2] = torch.nan
    for _ in range(5):
        regrow(weight, count=100)
    weight.topology.validate()


# Properties: 50 examples of 200 regrows are the 10,000


SIDES = st.sampled_from([1, 4, 8, 16])


@st.composite
def weights(draw: Any) -> Weight:
    pattern = Block(draw(SIDES), draw(SIDES))
    taps = draw(st.sampled_from([1, 1, 3]))
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    out, in_ = rows * pattern.bh - draw(st.integers(0, pattern.bh - 1)), cols * pattern.bw
    in_ -= draw(st.integers(0, pattern.bw - 1))
    nnzb = draw(st.integers(0, rows * cols * taps))
    return Weight.random(out, in_, pattern, nnzb, taps=taps, seed=draw(st.integers(0, 99)))


@given(
    weight=weights(),
    p=st.floats(0.001, 1.0),
    name=st.sampled_from(["adamw", "adam", "amsgrad", "sgd-momentum", "rmsprop", "adafactor"]),
    scored=st.booleans(),
    regrow_dropped=st.booleans(),
    policy=st.sampled_from(["score", "mean", "zero", "keep"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_regrows_keep_every_invariant(
    weight: Weight, p: float, name: str, scored: bool, regrow_dropped: bool, policy: Any, seed: int
) -> None:
    topology, optimizer = weight.topology, OPTIMIZERS[name]([weight.values])
    generator = torch.Generator().manual_seed(seed)
    average = weight.values.detach().clone()
    if topology.nnzb:
        weight.train(optimizer, 1)
    everything = [*topology.index(), weight.values, average, *(t for _, t in slot_tensors(weight, optimizer))]
    addresses = [t.data_ptr() for t in everything]
    grid = topology.row_blocks, topology.col_blocks
    limit = topology.nnzb if regrow_dropped else min(topology.nnzb, inactive_blocks(topology))
    carry, moved, capped = 0.0, 0, False
    for i in range(200):
        before = weight.positions
        count, carry = quota(topology.nnzb, p, carry, limit)
        capped = capped or count == limit
        report = regrow(
            weight,
            optimizer,
            count=count,
            scores=torch.rand(grid, generator=generator) if scored else None,
            generator=generator,
            state_policy=policy,
            follow=[average],
            regrow_dropped=regrow_dropped,
        )
        changed = int((weight.positions != before).sum())
        assert changed == report.moved
        assert changed == count or regrow_dropped
        moved += count
        if i == 19 and not capped:
            assert abs(moved - 20 * p * topology.nnzb) <= 1 + 1e-6
        topology.validate()
        assert int(topology.mask().sum()) == topology.nnzb
        if i % 20 == 0 and topology.nnzb:
            weight.train(optimizer, 1)
    assert addresses == [t.data_ptr() for t in everything]
    padding = weight.padding()
    assert not weight.values.detach()[padding].any()
    assert not average[padding].any()
    assert weight.values.isfinite().all()
