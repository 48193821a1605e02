"""Training methods in a user's loop: schedule, growth, optimizer, EMA, AMP, micro-batches, resume."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sparse_kernels import Block, SparseGRU, SparseLinear, Unstructured, sparse_weights
from sparsediff import methods
from sparsediff.ema import EMA
from sparsediff.methods.dense import Dense
from sparsediff.methods.magran import MagRan
from sparsediff.methods.rigl import RigL
from sparsediff.methods.static import Static

PATTERNS = [pytest.param(Unstructured(), id="unstructured"), pytest.param(Block(4, 4), id="4x4")]
DYNAMIC = [pytest.param(RigL, id="rigl"), pytest.param(MagRan, id="magran")]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A recurrent layer, two linear ones and a dense head."""

    def __init__(self, pattern: Block, sparsity: float = 0.7, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gru = SparseGRU(8, 12, batch_first=True, pattern=pattern, sparsity=sparsity, generator=generator)
        self.one = SparseLinear(12, 30, pattern=pattern, sparsity=sparsity, generator=generator)
        self.two = SparseLinear(30, 18, pattern=pattern, sparsity=sparsity, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(self.gru(x)[0])))))


class Loop:
    """A user's training loop on a fixed regression problem."""

    def __init__(self, model: nn.Module, optimizer: str = "adamw") -> None:
        self.model = model
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())
        self.losses: list[float] = []
        self.reports: list[dict[str, Any] | None] = []

    def batch(self, i: int, size: int = 8) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 5, 8, generator=torch.Generator().manual_seed(i))
        return x, torch.stack([x.cumsum(1).mean(-1), x.square().mean(-1)], -1)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return loss

    def run(self, method: methods.Method, first: int, last: int, after: Callable[[], None] = lambda: None) -> None:
        for i in range(first, last):
            self.optimizer.zero_grad()
            method.begin_step()
            self.losses.append(float(self.backward(*self.batch(i)).detach()))
            self.optimizer.step()
            self.reports.append(method.step())
            after()

    def bits(self) -> list[Tensor]:
        return [*self.model.state_dict().values()]


def masks(model: nn.Module) -> list[Tensor]:
    return [weight.topology.mask() for weight in sparse_weights(model)]


def scalar_state(method: methods.Method) -> dict[str, Any]:
    return {key: value for key, value in method.state_dict().items() if not isinstance(value, Tensor)}


# Registry


def test_registry_builds_each_with_its_own_options() -> None:
    assert {"dense", "magran", "rigl", "static"} <= set(methods.names())
    model = Net(Block(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for name in methods.names():
        method = methods.build(name, model, optimizer, total_steps=100, every=10, drop=0.25, anneal="cosine")
        assert method.sparse == (name != "dense")
        if name in ("rigl", "magran"):
            assert (method.every, method.drop, method.end) == (10, 0.25, 100)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="no method has the option evry"):
        methods.build("rigl", model, optimizer, evry=3)
    with pytest.raises(ValueError, match="Did you mean 'rigl'"):
        methods.build("rgl", model, optimizer)


@pytest.mark.parametrize("method", [Dense, Static])
def test_dense_and_static_change_nothing(method: type[methods.Method]) -> None:
    loop = Loop(Net(Block(4, 4)))
    before = masks(loop.model)
    watcher = method(loop.model, loop.optimizer)
    loop.run(watcher, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(loop.model), strict=True))
    assert loop.reports == [None] * 3
    watcher.load_state_dict(watcher.state_dict())


# Schedule


def test_schedule() -> None:
    loop = Loop(Net(Block(4, 4)))
    loop.run(RigL(loop.model, loop.optimizer, every=3, drop=0.2, t_end=10), 0, 14)
    assert [i + 1 for i, report in enumerate(loop.reports) if report] == [3, 6, 9]
    method = MagRan(loop.model, loop.optimizer, every=10, drop=0.4, anneal="cosine", t_end=0.5, total_steps=200)
    assert method.end == 100
    assert [round(method.fraction(step), 6) for step in (0, 50, 100, 150)] == [0.4, 0.2, 0.0, 0.0]
    assert MagRan(loop.model, loop.optimizer).end == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"drop": 0.0}, r"drop must lie in \(0, 1\]"),
        ({"anneal": "linear"}, "anneal must be"),
        ({"anneal": "cosine"}, "needs an end"),
        ({"t_end": 1.5}, "fraction must lie in"),
        ({"t_end": 0}, "at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    model = Net(Block(4, 4))
    with pytest.raises(ValueError, match=message):
        RigL(model, torch.optim.AdamW(model.parameters()), **options)


def test_models_that_cannot_be_regrown_are_refused() -> None:
    model = Net(Block(4, 4))
    with pytest.raises(ValueError, match="does not hold the values of gru.weight_ih_l0, gru.weight_hh_l0, two"):
        RigL(model, torch.optim.AdamW([*model.one.parameters(), *model.head.parameters()]))
    dense = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no trainable sparse weight; call"):
        RigL(dense, torch.optim.AdamW(dense.parameters()))


def test_frozen_weights_keep_their_topology() -> None:
    loop = Loop(Net(Block(4, 4)))
    loop.model.one.requires_grad_(False)
    before = masks(loop.model)
    loop.run(RigL(loop.model, loop.optimizer, every=1, drop=0.5), 0, 3)
    same = [torch.equal(a, b) for a, b in zip(before, masks(loop.model), strict=True)]
    assert same == [False, False, True, False]


# Growth


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rigl_grows_where_the_dense_gradient_is_largest(pattern: Block) -> None:
    loop = Loop(Net(pattern))
    method = RigL(loop.model, loop.optimizer, every=1, drop=0.25)
    x, y = loop.batch(0)
    twin = copy.deepcopy(loop.model)
    dense = {}
    for name in ("one", "two"):
        layer = getattr(twin, name)
        linear = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            linear.weight.copy_(layer.topology.scatter(layer.values))
            linear.bias.copy_(layer.bias)
        setattr(twin, name, linear)
        dense[name] = linear
    (twin(x) - y).square().mean().backward()
    before = {w.name: w.topology.mask() for w in sparse_weights(loop.model)}
    loop.run(method, 0, 1)
    for weight in sparse_weights(loop.model):
        if weight.name not in dense:
            continue
        topology, was = weight.topology, before[weight.name]
        grad = dense[weight.name].weight.grad
        assert grad is not None
        scores = topology.weight_index().blocks(grad).square().sum((1, 2)).view_as(was).masked_fill(was, -1)
        grown = topology.mask() & ~was
        count = int(0.25 * topology.nnzb)
        assert int(grown.sum()) == count
        assert set(scores[grown].tolist()) == set(scores.flatten().topk(count).values.tolist())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", DYNAMIC)
def test_twenty_growth_steps_move_twenty_p_n_blocks(method: type[methods.Method], pattern: Block) -> None:
    loop = Loop(Net(pattern))
    weights = sparse_weights(loop.model)
    counts = [weight.topology.nnzb for weight in weights]
    addresses = [t.data_ptr() for w in weights for t in (w.values, *w.topology.index())]
    moved = [0] * len(weights)
    last = [masks(loop.model)]

    def count_moves() -> None:
        new = masks(loop.model)
        for i, (a, b) in enumerate(zip(last[0], new, strict=True)):
            moved[i] += int((b & ~a).sum())
            assert int(b.sum()) == counts[i]
        last[0] = new
        for weight in weights:
            weight.topology.validate()

    loop.run(method(loop.model, loop.optimizer, every=1, drop=0.07), 0, 20, count_moves)  # type: ignore[call-arg]
    for n, blocks in zip(counts, moved, strict=True):
        assert abs(blocks - 20 * 0.07 * n) <= 1
    assert sum(report["moved"] for report in loop.reports if report) == sum(moved)
    assert addresses == [t.data_ptr() for w in weights for t in (w.values, *w.topology.index())]


@pytest.mark.parametrize("method", DYNAMIC)
def test_dropped_blocks_may_return(method: Any) -> None:
    loop = Loop(Net(Block(4, 4), sparsity=0.2))
    loop.run(method(loop.model, loop.optimizer, every=1, drop=0.9, regrow_dropped=True), 0, 3)
    blocks = sum(weight.topology.nnzb for weight in sparse_weights(loop.model))
    assert all(report is not None and 0 < report["moved"] < 0.5 * blocks for report in loop.reports)


# Determinism and resume


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", DYNAMIC)
def test_resumed_equals_uninterrupted_to_the_bit(method: Any, optimizer: str, pattern: Block) -> None:
    def options() -> dict[str, Any]:
        return {"every": 4, "drop": 0.13, "generator": torch.Generator().manual_seed(3)}

    whole = Loop(Net(pattern), optimizer)
    watcher = method(whole.model, whole.optimizer, **options())
    whole.run(watcher, 0, 24)

    half = Loop(Net(pattern), optimizer)
    first = method(half.model, half.optimizer, **options())
    half.run(first, 0, 11)
    rest = Loop(Net(pattern, seed=9), optimizer)
    rest.model.load_state_dict(half.model.state_dict())
    rest.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    second = method(rest.model, rest.optimizer, every=4, drop=0.13)
    state = json.loads(json.dumps(scalar_state(first)))
    second.load_state_dict({**state, "generator": first.state_dict()["generator"]})
    rest.run(second, 11, 24)

    assert half.losses + rest.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.bits(), rest.bits(), strict=True))
    assert scalar_state(second) == scalar_state(watcher)
    assert whole.reports[3] is not None


def test_state_of_another_model_is_refused() -> None:
    model = Net(Block(4, 4))
    method = MagRan(model, torch.optim.AdamW(model.parameters()))
    state = {**method.state_dict(), "carries": {"elsewhere": 0.5}}
    with pytest.raises(ValueError, match="with the sparse weights elsewhere; expected gru"):
        method.load_state_dict(state)


# Micro-batches and memory


@pytest.mark.parametrize("pattern", PATTERNS)
def test_micro_batches_add_up(pattern: Block) -> None:
    """The regrow that two micro-batches lead to is the one of the sum of both backwards' scores."""
    loop = Loop(Net(pattern))
    weights = sparse_weights(loop.model)
    (xa, ya), (xb, yb) = loop.batch(0), loop.batch(1)
    expected = []
    for x, y in ((xa, ya), (xb, yb)):
        for weight in weights:
            weight.open_tap()
        loop.backward(x, y)
        expected.append([weight.tap_scores() for weight in weights])
        for weight in weights:
            weight.close_tap()
    loop.optimizer.zero_grad()
    before = masks(loop.model)
    method = RigL(loop.model, loop.optimizer, every=1, drop=0.25)
    method.begin_step(micro_batches=2)
    loop.backward(xa, ya)
    loop.backward(xb, yb)
    loop.optimizer.step()
    assert method.step() is not None
    for weight, was, one, two in zip(weights, before, *expected, strict=True):
        assert one is not None
        assert two is not None
        scores = (one + two).masked_fill(was, -1)
        grown = weight.topology.mask() & ~was
        assert set(scores[grown].tolist()) == set(scores.flatten().topk(int(grown.sum())).values.tolist())
        assert grown.any()


def test_micro_batches_may_be_fewer_but_not_more_than_announced() -> None:
    loop = Loop(Net(Unstructured()))
    method = RigL(loop.model, loop.optimizer, every=1, drop=0.2)
    method.begin_step(micro_batches=3)
    loop.backward(*loop.batch(0))
    assert method.step() is not None
    method.begin_step()
    loop.backward(*loop.batch(0))
    with pytest.raises(RuntimeError, match="a backward more than the 1 announced"):
        loop.backward(*loop.batch(1))


def test_unstructured_scores_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Net(Unstructured(), sparsity=0.9))
    weights = sparse_weights(loop.model)
    alive: list[set[int]] = []
    reduce = RigL._reduce

    def watched(self: RigL, weight: Any, count: int, micro_batches: int, tap: Tensor) -> None:
        alive.append({id(w.module) for w in weights if w.tap_scores() is not None})
        reduce(self, weight, count, micro_batches, tap)

    monkeypatch.setattr(RigL, "_reduce", watched)
    method = RigL(loop.model, loop.optimizer, every=1, drop=0.2)
    method.begin_step()
    loop.backward(*loop.batch(0))
    assert len(alive) == len(weights)
    assert max(len(modules) for modules in alive) == 1
    assert all(weight.tap_scores() is None for weight in weights)
    assert all(method._reduced[w.name].positions.numel() <= 0.2 * w.values.numel() for w in weights)
    assert method.step() is not None


def test_a_layer_without_gradient_stays() -> None:
    loop = Loop(Net(Block(4, 4)))
    loop.model.extra = SparseLinear(16, 16, pattern=Block(4, 4), sparsity=0.5)
    loop.optimizer = torch.optim.AdamW(loop.model.parameters())
    before = loop.model.extra.topology.mask()
    method = RigL(loop.model, loop.optimizer, every=1, drop=0.3)
    loop.run(method, 0, 2)
    assert torch.equal(before, loop.model.extra.topology.mask())
    assert method.carries["extra"] == 0.0


# What may go wrong in a loop


def test_forgotten_calls_are_named() -> None:
    loop = Loop(Net(Block(4, 4)))
    method = RigL(loop.model, loop.optimizer, every=2)
    loop.backward(*loop.batch(0))
    assert method.step() is None
    with pytest.raises(RuntimeError, match=r"no scores were taken; call begin_step\(\)"):
        method.step()
    method = RigL(loop.model, loop.optimizer, every=1)
    method.begin_step()
    method.begin_step()
    with pytest.raises(RuntimeError, match="no backward reached any sparse weight"):
        method.step()
    assert all(weight.module._tap(weight.key) is None for weight in sparse_weights(loop.model))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", DYNAMIC)
def test_growth_waits_for_finite_gradients(method: Any, pattern: Block) -> None:
    loop = Loop(Net(pattern))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    watcher = method(loop.model, loop.optimizer, every=2, drop=0.2)
    before = masks(loop.model)
    reports = []
    for i in range(4):
        loop.optimizer.zero_grad()
        watcher.begin_step()
        if i == 1:
            scaler.update(2.0**126)
        x, y = loop.batch(i)
        # This loss overflows fp32 at the scale of the first two steps and is harmless at 2^16.
        scaler.scale(1e4 * (loop.model(x) - y).square().mean()).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        reports.append(watcher.step())
        if i == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, masks(loop.model), strict=True))
            assert watcher.state_dict()["pending"]
    assert reports[:2] == [None, {"postponed": 1}]
    assert reports[2] is not None
    assert reports[2]["moved"] > 0
    assert reports[3] is not None
    assert not watcher.state_dict()["pending"]


# The average


def shadows(kind: str, model: nn.Module) -> tuple[Any, Callable[[], list[Tensor]], Callable[[], None]]:
    values = {id(w.values) for w in sparse_weights(model)}
    names = [name for name, p in model.named_parameters() if id(p) in values]
    if kind == "sparsediff":
        ema = EMA(model, 0.9)
        return ema, lambda: [ema.shadow_of(w.values) for w in sparse_weights(model)], ema.update
    if kind == "torch":
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        return average, lambda: [w.values for w in sparse_weights(average)], lambda: average.update_parameters(model)
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update() -> None:
        for name, p in model.named_parameters():
            shadow[name] = torch.lerp(shadow[name], p.detach(), 0.1)

    return shadow, lambda: [shadow[name] for name in names], update


@pytest.mark.parametrize("kind", ["sparsediff", "torch", "dict"])
@pytest.mark.parametrize("method", DYNAMIC)
def test_the_average_follows_the_topology(method: Any, kind: str) -> None:
    loop = Loop(Net(Block(4, 4)))
    ema, averages, update = shadows(kind, loop.model)
    loop.run(method(loop.model, loop.optimizer, every=4, drop=0.3, ema=ema), 0, 4, update)
    # The dense average of the values, by hand: what was dropped is gone, what has grown began at zero.
    watcher = method(loop.model, loop.optimizer, every=1, drop=0.3, ema=ema)
    weights = sparse_weights(loop.model)
    before = [(w.topology.mask(), w.topology.scatter(a)) for w, a in zip(weights, averages(), strict=True)]
    loop.run(watcher, 4, 5)
    for weight, average, (was, dense) in zip(weights, averages(), before, strict=True):
        stays = (weight.topology.mask() & was).flatten()[:, None, None]
        index = weight.topology.weight_index()
        now = index.blocks(weight.topology.scatter(average))
        assert torch.equal(now, index.blocks(dense) * stays)
        assert not stays.all()
    if kind == "torch":
        for mine, theirs in zip(weights, sparse_weights(ema), strict=True):
            assert theirs.topology is not mine.topology
            assert all(torch.equal(a, b) for a, b in zip(mine.topology.index(), theirs.topology.index(), strict=True))


def test_an_average_of_another_model_is_refused() -> None:
    loop = Loop(Net(Block(4, 4)))
    with pytest.raises(ValueError, match="must be a copy of the model"):
        loop.run(MagRan(loop.model, loop.optimizer, every=1, ema=Net(Unstructured())), 0, 1)


# Training goes on


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", DYNAMIC)
def test_no_loss_spike_after_a_regrow(method: Any, pattern: Block) -> None:
    loop = Loop(Net(pattern, sparsity=0.5))
    batch = loop.batch(0, 64)
    loop.batch = lambda i, size=8: batch  # type: ignore[method-assign]
    loop.run(Static(loop.model, loop.optimizer), 0, 250)
    loop.run(method(loop.model, loop.optimizer, every=50, drop=0.05), 250, 341)
    assert loop.reports[299] is not None
    before, after = loop.losses[299], loop.losses[300:]
    assert max(after) < 1.1 * before
    assert after[-1] < 0.9 * before


def test_compiled_training_does_not_recompile_over_regrows() -> None:
    torch._dynamo.reset()
    loop = Loop(Net(Block(4, 4)))
    inner, compiled = loop.model, torch.compile(loop.model, backend="aot_eager", fullgraph=True)
    loop.model = compiled
    loop.run(RigL(inner, loop.optimizer, every=2, drop=0.2), 0, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        loop.run(RigL(inner, loop.optimizer, every=2, drop=0.2), 4, 44)
    assert sum(report is not None for report in loop.reports) == 22
