"""How ops reach their kernels: past the dispatcher in plain training, through it wherever something waits there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from layers import example, first, make
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import Block, Unstructured, backends, ops, sparsify, testing
from sparse_kernels.ops import common

BACKENDS = [name for name in backends.names() if name in ("reference", "densified", "cpu")]
CPU = torch.device("cpu")


class Case(NamedTuple):
    """An op on a random weight: what it is given, how it is run, and how torch runs the dense equivalent."""

    inputs: tuple[Tensor, Tensor, Tensor]
    run: Callable[..., Tensor]
    dense: Callable[..., Tensor]


def case(kind: str, backend: str, pattern: Block, activation: str | None = None) -> Case:
    """`linear` on three dimensions, or `conv2d` (`conv1x1` on channels_last, with pixels enough to run as `linear`)."""
    op, kernel = ("linear", 1) if kind == "linear" else ("conv", 1 if kind == "conv1x1" else 3)
    reason = backends.why_not(backend, op, pattern=pattern, dtype=torch.float32, device=CPU)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    topology = testing.TOPOLOGIES["random"](24, 16, pattern, kernel * kernel)
    deriver = backends.get(backend).deriver(op, pattern)
    if deriver is not None:
        topology.attach(deriver)
    values, bias, act = testing.random_values(topology), torch.randn(24), getattr(F, activation or "dropout")
    finish = (lambda y: y) if activation is None else act
    if kind == "linear":
        return Case(
            (torch.randn(2, 5, 16), values, bias),
            lambda x, v, b: ops.linear(x, v, topology, b, activation=activation, backend=backend),
            lambda x, v, b: finish(F.linear(x, topology.scatter(v), b)),
        )
    conv = backends.ConvGeometry((kernel, kernel), padding=(kernel // 2, kernel // 2))
    x = torch.randn(2, 16, 32, 32).to(memory_format=torch.channels_last) if kernel == 1 else torch.randn(2, 16, 6, 5)

    def dense(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
        weight = topology.scatter(v).view(24, kernel, kernel, 16).permute(0, 3, 1, 2)
        return finish(F.conv2d(x, weight, b, padding=kernel // 2))

    return Case(
        (x, values, bias),
        lambda x, v, b: ops.conv2d(x, v, topology, b, conv=conv, activation=activation, backend=backend),
        dense,
    )


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What `function` returns, and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    grads = [x.grad for x in leaves]
    return [y.detach(), *[grad for grad in grads if grad is not None]]


def op_names(kind: str, activation: str | None) -> list[str]:
    name = "linear" if kind == "linear" else "conv2d"
    return [f"{name}_activated" if activation else name, f"{name}_backward"]


class Seen(TorchDispatchMode):
    """The names of the ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(BaseTorchFunctionMode):
    """The names of the functions that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass that changes nothing."""


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops whose kernels are called past the dispatcher."""
    names: list[str] = []
    for op, kernel in list(common._KERNELS.items()):

        def called(*arguments: Any, name: str = common._name(op), kernel: Callable[..., Any] = kernel) -> Any:
            names.append(name)
            return kernel(*arguments)

        monkeypatch.setitem(common._KERNELS, op, called)
    return names


each_activation = pytest.mark.parametrize("activation", [None, "gelu"])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pattern = pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 8), Block(16, 16)], ids=str)


@each_activation
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@each_backend
def test_shortcut_past_the_dispatcher_changes_nothing(
    backend: str, kind: str, activation: str | None, direct: list[str]
) -> None:
    inputs, run, _ = case(kind, backend, Block(8, 8), activation)
    names = op_names(kind, activation)
    plain = step(run, inputs)
    assert direct == names
    direct.clear()

    def same(run: Callable[..., Tensor]) -> None:
        for ours, theirs in zip(step(run, inputs), plain, strict=True):
            assert torch.equal(ours, theirs)

    with Seen() as seen:
        same(run)
    assert not direct and all(seen.names.count(f"sparse_kernels.{name}.default") == 1 for name in names)
    with SeenFunctions() as functions:
        same(run)
    assert f"sparse_kernels.{names[0]}.default" in functions.names
    assert direct == names[1:]  # the mode is off inside the function `Tensor.backward`
    direct.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        same(run)
    events = {event.key: event.count for event in profiler.key_averages()}
    assert not direct and all(events[f"sparse_kernels::{name}"] == 1 for name in names)
    for place in range(3):
        same(lambda *given, k=place: run(*given[:k], given[k].as_subclass(Marked), *given[k + 1 :]).as_subclass(Tensor))
        assert names[0] not in direct
        direct.clear()
    same(run)
    assert direct == names


def test_a_subclass_as_a_score_tap_goes_through_the_dispatcher(direct: list[str]) -> None:
    topology = testing.TOPOLOGIES["random"](16, 16, Block(8, 8), 1)
    values, tap = testing.random_values(topology), torch.zeros(2, 2, requires_grad=True)
    for score_tap, calls in ((tap, ["linear"]), (tap.as_subclass(Marked), [])):
        direct.clear()
        ops.linear(torch.randn(3, 16), values, topology, score_tap=score_tap, backend="reference")
        assert direct == calls


@pytest.mark.parametrize("around", [nullcontext, Seen], ids=["direct", "dispatcher"])
@each_activation
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1x1"])
@each_pattern
@each_backend
def test_results_may_be_modified_in_place(
    backend: str,
    pattern: Block,
    kind: str,
    activation: str | None,
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    torch.set_num_threads(1)
    inputs, run, dense = case(kind, backend, pattern, activation)
    expected = step(lambda *given: dense(*given).relu_(), inputs)
    with around():
        actual = step(lambda *given: run(*given).relu_(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_last_state_of_a_gru_may_be_modified_in_place() -> None:
    layer, x = make("gru"), example("gru")
    weights, expected = list(layer.parameters()), layer(x)[1].relu()
    grads = torch.autograd.grad(expected.sum(), weights)
    actual = layer(x)[1].relu_()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), weights), grads)


def test_inplace_activations_work_after_sparsify() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))
    x = torch.randn(2, 8, 64)
    model(x).sum().backward()
    sparsify(model, sparsity=0.5, pattern="block:8x8")
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@each_backend
def test_jit_trace(backend: str, kind: str) -> None:
    inputs, run, _ = case(kind, backend, Block(8, 8))
    traced = torch.jit.trace(run, inputs, check_trace=False)
    assert f"sparse_kernels::{op_names(kind, None)[0]}" in str(traced.graph)
    for ours, theirs in zip(step(traced, inputs), step(run, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_activation
@pytest.mark.parametrize("kind", ["linear", "conv2d", "gru"])
def test_compiled_autograd(kind: str, activation: str | None) -> None:
    if activation and kind == "gru":
        pytest.skip("a GRU has no activation")
    layer = make(kind)
    if activation:
        layer.activation = activation
    twin, x = copy.deepcopy(layer), example(kind)
    first(twin(x)).sum().backward()
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        first(layer(x)).sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("around", [nullcontext, Seen], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "gru"])
def test_forward_mode_is_refused(kind: str, around: Callable[[], AbstractContextManager[Any]], frozen: bool) -> None:
    layer, x = make(kind).requires_grad_(not frozen), example(kind)
    with around(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
    with around(), forward_ad.dual_level():
        plain = first(layer(x))  # without a tangent it is no business of forward mode
        assert plain.requires_grad is not frozen
    assert torch.equal(plain, first(layer(x)))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "gru"])
def test_jvp_of_a_frozen_layer_is_refused(kind: str) -> None:
    layer, x = make(kind).requires_grad_(False), example(kind)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        torch.func.jvp(lambda x: first(layer(x)), (x,), (torch.ones_like(x),))
