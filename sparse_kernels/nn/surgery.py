"""`sparsify` puts sparse layers into any model, in place; `densify` takes them out again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import allocation as allocations
from ..patterns import Block, Pattern, parse_pattern
from .conv import SparseConv1d, SparseConv2d
from .gru import SparseGRU
from .init import INITS
from .linear import SparseLinear
from .plan import DENSE, Plan, PlanRow
from .planning import check_mode, replan
from .survey import Exclude, Found, count_positions, survey
from .weights import SparseLayer

TWINS: dict[type[nn.Module], Any] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.GRU: SparseGRU,
}

# In eval mode torch's encoder hands the weights of its linear layers to one fused dense kernel. These attributes are
# what it looks at first; with these values it calls the layers instead.
_FUSED = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_FUSED_BEFORE = "_before_sparsify"

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def sparsify(
    model: nn.Module,
    *,
    sparsity: float,
    pattern: Pattern | str,
    allocation: str = "erk",
    exclude: Exclude | Iterable[Exclude] = (),
    init: str = "random",
    generator: torch.Generator | None = None,
    rescale: bool = False,
    plan: str | Plan = "auto",
    example_inputs: Any = None,
) -> Plan:
    """Exchanges the linear, convolution and GRU layers of a model for sparse ones, in place.

    Call it before building optimizers, EMA copies or DDP: the sparse weights are new parameters. Active weights keep
    their values, biases are copied; device, dtype, train/eval mode, `requires_grad` and forward/backward hooks carry
    over; pending gradients do not.

    The sparsity holds for the total of all linear, convolution and GRU weights that are not excluded. Within it, a
    weight stays dense where the pattern or the layer does not allow it (groups, tied or parametrized weights, a
    subclass with its own forward) or the allocation fills it. Layers of other kinds (attention's packed projections,
    LSTM, transposed convolutions, embeddings) are left alone, outside the total. The plan gives every reason.

    Args:
        model: any module that contains such layers. A module that is used in several places becomes one sparse layer
            in all of them.
        sparsity: S in [0, 1), the fraction of absent weights in total. It is met within one block, where a block that
            sticks out of its weight counts as the mean of that weight's blocks.
        pattern: a `Block` or its text, `"block:16x16"` or `"unstructured"`.
        allocation: how S is spread: `"erk"`, `"uniform"` or `"flops"` (see `sparse_kernels.allocation`).
        exclude: what stays as it is, outside the total: names of modules or parameters as in `named_modules()`
            (everything inside them too), globs such as `"decoder.*"`, module types, or modules.
        init: which blocks are kept: `"random"` for fresh models, `"magnitude"` for pretrained ones.
        generator: draws the topologies; torch's global one by default.
        rescale: multiplies the kept weights by `1/√density` of their tensor, which keeps the variance of a fresh
            layer's output. Off by default: an active weight keeps its value.
        plan: which form runs each layer: `"auto"` asks the cost table of this kind of machine, `"measure"` times the
            forms on `example_inputs`, `"off"` runs the sparse kernel wherever there is one, a `Plan` is applied (see
            `replan`, which decides anew, for example after a move to another device).
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, of the size that training will
            have; the model runs on them to count how often each weight is used. `"flops"` and `"measure"` need them;
            with `"auto"` they make the choice and the predicted speedups those of this size.

    Returns:
        The plan; `print(plan)` shows it as a table.

    Raises:
        ValueError: a sparsity that cannot be reached (with the lowest reachable total), an unknown option or excluded
            name, a model that holds nothing to cut, or that is itself one of these layers, or a Plan of another model.
        RuntimeError: a Plan names a backend that cannot run here. Whatever is raised, the model is as it was.
    """
    block = parse_pattern(pattern)
    if allocations.check_sparsity(sparsity, "sparsify") >= 1.0:
        raise ValueError("sparsify: sparsity must be below 1; at 1 no weight is left.")
    if init not in INITS:
        raise ValueError(f"sparsify: init must be one of {', '.join(INITS)}; got {init!r}.")
    if allocation not in allocations.METHODS:
        raise ValueError(f"sparsify: allocation must be one of {', '.join(allocations.METHODS)}; got {allocation!r}.")
    check_mode("sparsify", plan, example_inputs)
    _check_model(model)
    excluded = (exclude,) if isinstance(exclude, (str, type, nn.Module)) else tuple(exclude)
    found = survey(model, block, excluded)
    counted = [item for item in found if item.spec is not None]
    if all(item.reason is not None for item in counted) and sparsity > 0.0:
        raise ValueError(f"sparsify: nothing in this {type(model).__name__} can be sparse. {_reasons(found)}")
    counts, positions = share_out(model, counted, sparsity, block, allocation, example_inputs)
    share = {
        (id(item.module), item.weight): 1.0 - count / item.spec.blocks(block)
        for item, count in zip(counted, counts, strict=True)
        if item.spec is not None and item.reason is None and count < item.spec.blocks(block)
    }
    places = _places(model)
    rows: list[PlanRow] = []
    replaced: dict[int, SparseLayer] = {}
    try:
        for item in found:
            module = item.module
            if id(module) not in replaced and any(owner == id(module) for owner, _ in share):
                layer = _twin(module, block, share, init=init, generator=generator, rescale=rescale)
                _put(layer, module, places[id(module)])
                replaced[id(module)] = layer
            rows.append(_row(item, replaced.get(id(module)), positions.get(id(module))))
        if replaced:
            _unfuse(model)
        fresh = Plan(tuple(rows), str(block), allocation, float(sparsity))
        return replan(model, fresh, plan, example_inputs=example_inputs)
    except BaseException:  # an interrupted measurement too leaves the model as it was
        for item in found:
            if id(item.module) in replaced:
                _put(item.module, replaced[id(item.module)], places[id(item.module)])
        _fuse_again(model)
        raise


def share_out(
    model: nn.Module, counted: Sequence[Found], sparsity: float, pattern: Block, allocation: str, example_inputs: Any
) -> tuple[list[int], dict[int, float]]:
    """How many blocks each weight of a survey keeps, without changing the model; no content of a weight is read.

    Args:
        model: may lie on the meta device. counted: the found weights that have a `spec`.
        sparsity, pattern, allocation, example_inputs: as for `sparsify`.

    Returns:
        Block counts in the order of `counted`, and rows of the product by `id(module)`, where example inputs told.

    Raises:
        ValueError: as `sparsify` does.
    """
    positions: dict[int, float] = {}
    if example_inputs is not None:
        positions = count_positions(model, {id(item.module): item.module for item in counted}.values(), example_inputs)
    specs = [item.spec for item in counted if item.spec]
    if allocation == "flops" and positions:  # without, the allocation names the first weight that lacks them
        rows = [positions[id(item.module)] for item in counted]
        specs = [replace(spec, positions=count) for spec, count in zip(specs, rows, strict=True)]
    return allocations.allocate(specs, sparsity, pattern, allocation), positions


def densify(model: nn.Module) -> nn.Module:
    """Exchanges every sparse layer for an ordinary one that computes the same function, in place: `sparsify` undone.

    Returns:
        The model.

    Raises:
        ValueError: where the model is itself a sparse layer.
    """
    if isinstance(model, SparseLayer):
        raise ValueError(f"densify: the model is itself a {type(model).__name__}; call its to_dense() instead.")
    places = _places(model)
    for module in list(model.modules()):
        if isinstance(module, SparseLayer):
            dense: nn.Module = module.to_dense()
            _put(dense, module, places[id(module)])
    _fuse_again(model)
    return model


def _check_model(model: nn.Module) -> None:
    if isinstance(model, tuple(TWINS)):
        name = type(model).__name__
        raise ValueError(
            f"sparsify: the model is itself a layer ({name}) and cannot be exchanged in place; use "
            f"Sparse{name}.from_dense(layer, ...), or wrap it in nn.Sequential."
        )
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("sparsify: the model is already wrapped in DistributedDataParallel; sparsify it first.")


def _reasons(found: Sequence[Found]) -> str:
    lines = [f"{item.name}: {item.reason}" for item in found if item.reason][:6]
    return "; ".join(lines) or "It has no linear, convolution or GRU layer."


def _twin(module: nn.Module, pattern: Block, share: dict[tuple[int, str], float], **options: Any) -> SparseLayer:
    kind = next(base for base in TWINS if isinstance(module, base))
    sparsity: Any = {weight: value for (owner, weight), value in share.items() if owner == id(module)}
    if kind is not nn.GRU:
        (sparsity,) = sparsity.values()
    twin: SparseLayer = TWINS[kind].from_dense(module, pattern=pattern, sparsity=sparsity, **options)
    return twin


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which a module hangs, by the module's identity."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return places


def _put(new: nn.Module, old: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
    for hooks in _HOOKS:  # the dicts themselves, so that a handle that was given out still removes its hook
        setattr(new, hooks, getattr(old, hooks))
    for parent, name in places:
        parent._modules[name] = new


def _unfuse(model: nn.Module) -> None:
    for module in model.modules():
        for kind, (attribute, value) in _FUSED.items():
            holds_sparse = isinstance(module, kind) and any(
                isinstance(child, SparseLayer) for child in module.modules()
            )
            if holds_sparse and hasattr(module, attribute) and _FUSED_BEFORE not in module.__dict__:
                module.__dict__[_FUSED_BEFORE] = {attribute: getattr(module, attribute)}
                setattr(module, attribute, value)


def _fuse_again(model: nn.Module) -> None:
    """Undoes `_unfuse` where no sparse layer is left."""
    for module in model.modules():
        if _FUSED_BEFORE in module.__dict__ and not any(isinstance(child, SparseLayer) for child in module.modules()):
            for attribute, value in module.__dict__.pop(_FUSED_BEFORE).items():
                setattr(module, attribute, value)


def _row(item: Found, layer: SparseLayer | None, positions: float | None) -> PlanRow:
    counted = item.spec is not None
    if layer is None and isinstance(item.module, SparseLayer):
        layer = item.module
    key = item.weight if isinstance(layer, SparseGRU) else "values"
    topologies = {name: topology for name, _, topology in layer.sparse_items()} if layer is not None else {}
    if layer is not None and key in topologies:
        topology = topologies[key]
        reason = item.reason or ""
        cut, sparsity, nonzeros = str(topology.pattern), topology.sparsity, topology.nnz
    else:
        reason = item.reason or "filled by the allocation"
        cut, sparsity, nonzeros = DENSE, 0.0, math.prod(item.shape)
    execution = DENSE if layer is None else layer.execution
    return PlanRow(item.name, item.shape, cut, sparsity, nonzeros, execution, reason, counted, positions)
