"""Measured times: one layer in all its forms, and what a model's step spends outside its sparse layers.

A layer is timed on random data in the shape and memory format that it meets in the model, forward and backward, the
forms in turn; the medians count. Layers of one kind whose positions share a bucket (the next power of two) are timed
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ..backends.reference import memory_format
from ..topology import Topology
from .costs import Times
from .weights import SparseLayer

ROUNDS = 3
# What is quicker is repeated within a round until it takes so long.
SHORTEST_MS = 5.0


@dataclass(frozen=True)
class Call:
    """How a model calls one layer in a step.

    Args:
        args, kwargs: of its first call, of a sparse layer. positions: rows of the product of that call. uses: all rows
            of the step over those of that call.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positions: float
    uses: float

    @property
    def rows(self) -> float:
        """All rows of the layer's product in a step."""
        return self.positions * self.uses


def observe(
    model: nn.Module, example_inputs: Any, *, training: bool = False, others: Mapping[str, nn.Module] | None = None
) -> dict[str, Call]:
    """Runs the model once and notes how it calls each sparse layer; a layer that it leaves out is missing.

    Args:
        example_inputs, training: as for `calls_of`. others: dense layers by path whose rows are counted too.
    """
    layers = {id(module): path for path, module in (others or {}).items()}
    layers |= {id(module): path for path, module in model.named_modules() if isinstance(module, SparseLayer)}
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    rows: dict[str, list[float]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = layers[id(module)]
        if not isinstance(module, SparseLayer):
            args, kwargs = (), {}
        first.setdefault(path, (tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()}))
        rows.setdefault(path, []).append(positions_of(module, output))

    called = [module for module in model.modules() if id(module) in layers]
    calls_of(model, called, note, example_inputs, training=training)
    return {path: Call(*first[path], rows[path][0], sum(rows[path]) / rows[path][0]) for path in first if rows[path][0]}


def calls_of(
    model: nn.Module,
    modules: Iterable[nn.Module],
    note: Callable[[nn.Module, Any, Any, Any], None],
    example_inputs: Any,
    *,
    training: bool = False,
) -> None:
    """Runs the model once; its modes, its buffers and the random state are put back.

    Args:
        modules: those whose calls are told to `note(module, args, kwargs, output)`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: in the model's present modes, with gradients where they are enabled; by default in eval mode, without.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        with _undisturbed(model), torch.set_grad_enabled(training and torch.is_grad_enabled()):
            if not training:
                model.eval()
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def positions_of(module: nn.Module, output: Any) -> float:
    """Rows of a layer's matrix product, from its output."""
    y = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) else output
    y = y.data if isinstance(y, PackedSequence) else y
    if isinstance(module, nn.GRU) or getattr(module, "op", "") == "gru":
        features = y.shape[-1]
    else:
        features = getattr(module, "out_features", None) or module.out_channels
    return float(y.numel() / int(features))


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """`model(example_inputs)`, spread where they are a dict or a tuple."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def bucket(positions: float) -> int:
    """The next power of two."""
    return 1 << max(0, math.ceil(math.log2(positions)))


def kind_of(layer: SparseLayer, call: Call) -> tuple[Any, ...]:
    """What layers have in common that are timed once."""
    items = [(t.out, t.in_, t.taps, round(t.density, 2)) for _, _, t in layer.sparse_items()]
    x = call.args[0].data if isinstance(call.args[0], PackedSequence) else call.args[0]
    order = tuple(sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d], d)))
    further = [getattr(layer, name, None) for name in ("_geometry", "activation")]
    trained = tuple((name, parameter.requires_grad) for name, parameter in layer.named_parameters())
    given = [*enumerate(call.args[1:]), *sorted(call.kwargs.items())]
    others = tuple((key, type(v), getattr(v, "dtype", None), getattr(v, "requires_grad", None)) for key, v in given)
    same = (layer.op, str(layer.pattern), layer.asked_for, *items, *further, trained, layer.training)
    return (*same, bucket(call.positions), order, x.dtype, x.requires_grad, others)


def layer_times(layer: SparseLayer, call: Call, *, rounds: int = ROUNDS) -> Times:
    """Times of one call, forward and backward, in every form; the sparse one is that of the backend that was asked for
    by name, if any, and missing where no sparse backend serves the layer."""
    probe, (name, _, _) = layer._probe(), layer.native()
    if layer.asked_for not in (None, "densified"):
        name = str(layer.asked_for)
    with _forked(probe.device):
        args, kwargs = tuple(map(_like, call.args)), {key: _like(value) for key, value in call.kwargs.items()}
    twin: Any = layer.to_dense()
    if isinstance(args[0], Tensor) and args[0].dim() == 4 and memory_format(args[0]) == torch.channels_last:
        twin = twin.to(memory_format=torch.channels_last)
    before = layer._requested, layer._planned

    def form(execution: str) -> Callable[[], None]:
        layer.execution = execution  # gives the topologies this backend's index buffers
        step = training_step(layer, layer, args, kwargs)

        def run() -> None:
            layer._execution = execution
            step()

        return run

    try:
        with _forked(probe.device):  # for dropout and the seeds of the backward
            forms = {"dense": dense_step(twin, args, kwargs), "densified": form("densified")}
            if name != "densified":
                forms["sparse"] = form(name)
            ms = timed(forms, probe.device, rounds=rounds)
            return Times(ms["dense"], ms["densified"], ms.get("sparse"))
    finally:
        layer._requested, layer._planned = before
        layer._resolve()


def model_ms(model: nn.Module, example_inputs: Any, *, rounds: int = ROUNDS) -> float:
    """Milliseconds of the model's forward and backward, to the gradients of its parameters, as its layers now run; of
    the forward alone where nothing wants a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        torch.clear_autocast_cache()
        outputs = [y for y in _tensors(call_model(model, example_inputs)) if y.requires_grad]
        if not outputs or not parameters:
            return
        loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with _undisturbed(model):
        return timed({"model": step}, next(model.parameters()).device, rounds=rounds)["model"]


def timed(forms: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, which run in turn, in rotating order, after a warm-up."""
    repeats = {}
    for name, function in forms.items():
        call_ms(function, 1, device)
        repeats[name] = max(1, int(SHORTEST_MS / max(call_ms(function, 1, device), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(call_ms(forms[name], repeats[name], device))
    return {name: statistics.median(values) for name, values in samples.items()}


def call_ms(function: Callable[[], object], count: int, device: torch.device) -> float:
    """Milliseconds of one of `count` calls; on a GPU by the events of its current stream, so that a launch which
    outlasts its kernel counts and the queue's latency does not."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            for _ in range(count):
                function()
            ended.record()
            ended.synchronize()
            return float(begun.elapsed_time(ended)) / count
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) * 1e3 / count


def training_step(
    module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[], None]:
    """Forward and backward of `function` to the parameters of `module` and the inputs that want a gradient.

    Every call is a step of its own: what autocast keeps of the weights it has cast does not outlast it.
    """
    leaves = [leaf for leaf in _tensors([*args, *kwargs.values()]) if leaf.requires_grad]
    leaves += [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs = [y for y in _tensors(function(*args, **kwargs)) if y.requires_grad][:1]
    seeds = [torch.randn_like(y) for y in outputs]

    def run() -> None:
        torch.clear_autocast_cache()
        found = [y for y in _tensors(function(*args, **kwargs)) if y.requires_grad][:1]
        if found and leaves:
            torch.autograd.grad(found, leaves, seeds, allow_unused=True)

    return run


def dense_step(twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    """`training_step` of a torch.nn layer on the arguments of its sparse twin; lengths by packing."""
    if not isinstance(twin, nn.GRU):
        return training_step(twin, twin, args, kwargs)
    lengths = kwargs.get("lengths")
    if lengths is not None:
        lengths = torch.as_tensor(lengths).cpu().clamp(min=1)  # packing knows no empty sequence

    def gru(x: Any, h0: Tensor | None = None, **_: Any) -> Any:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=twin.batch_first, enforce_sorted=False)
        return twin(x, h0)

    return training_step(twin, gru, args, kwargs)


def _detached(value: Any) -> Any:
    """A tensor without the graph that made it, which keeps whether it wants a gradient; anything else as it is."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_detached(value.data))
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _like(value: Any) -> Any:
    """Random numbers in the place of a floating-point tensor, with its strides; anything else as it is."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_like(value.data))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.randn_like(value.detach()).requires_grad_(value.requires_grad)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output of any kind."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, PackedSequence):
        yield tree.data
    elif isinstance(tree, Mapping):
        yield from _tensors(tree.values())
    elif dataclasses.is_dataclass(tree):
        yield from _tensors(vars(tree))
    elif isinstance(tree, Iterable) and not isinstance(tree, str):
        for item in tree:
            yield from _tensors(item)


def _forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Puts the random state of the CPU and of this device back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the statistics that a model's forward keeps, and the random state, back to what they were."""
    indices = {id(buffer) for module in model.modules() if isinstance(module, Topology) for buffer in module.buffers()}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in indices]
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    try:
        with _forked(torch.device("cpu") if tensor is None else tensor.device):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
