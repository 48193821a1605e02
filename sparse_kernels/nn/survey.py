"""Which weights of a model can become sparse, and for each that cannot, why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..allocation import WeightShape
from ..patterns import Block
from .conv import why_not_conv
from .measure import calls_of, positions_of
from .weights import SparseLayer

Exclude = str | type[nn.Module] | nn.Module

# What a module of these types computes is known as long as it runs these methods of its base.
_KINDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("forward",),
    nn.Conv1d: ("forward", "_conv_forward"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.GRU: ("forward", "permute_hidden"),
}
_OTHER_KINDS = (
    nn.MultiheadAttention,
    nn.modules.rnn.RNNBase,
    nn.RNNCellBase,
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
)


@dataclass(frozen=True)
class Found:
    """A weight that the survey met.

    Args:
        name: as the plan and `SparseWeight` name it. path: of its module. weight: its key in the module.
        module: the layer that owns it. shape: of the dense weight.
        reason: why it stays dense; None where it can be sparse.
        spec: what the allocation needs, or None for a weight outside the total.
    """

    name: str
    path: str
    weight: str
    module: nn.Module
    shape: tuple[int, ...]
    reason: str | None
    spec: WeightShape | None = None


def survey(model: nn.Module, pattern: Block, exclude: Sequence[Exclude]) -> list[Found]:
    """Every weight of a model that is or might be sparse, in module order; a module that is used twice is met once.

    Raises:
        ValueError: where a name in `exclude` matches nothing, and for a lazy layer that has no sizes yet.
    """
    excluded = _excluded(model, exclude)
    owners = _owners(model)
    inside = {  # their forward reads the weights of these children itself
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.MultiheadAttention, SparseLayer))
        for child in module.modules()
        if child is not module
    }
    found: list[Found] = []
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        kind = next((base for base in _KINDS if isinstance(module, base)), None)
        if isinstance(module, SparseLayer):
            for key, _, topology in module.sparse_items():
                name = path if key == "values" else f"{path}.{key}"
                shape = (topology.out, topology.taps * topology.in_)
                found.append(Found(name.strip(".") or key, path, key, module, shape, "already sparse"))
        elif kind is None:
            found += _other(path, module)
        else:
            if isinstance(module, nn.modules.lazy.LazyModuleMixin):
                raise ValueError(f"sparsify: {path!r} is a lazy layer without its sizes; run one forward first.")
            reason = _why_not_module(module, kind, owners)
            for key, weight in _weights(module):
                name = f"{path}.{key}" if kind is nn.GRU else path
                item = Found(name.strip(".") or key, path, key, module, tuple(weight.shape), None)
                outside = excluded.get((path, key)) or excluded.get((path, ""))
                if outside is None and weight.numel() == 0:
                    outside = "it has no elements"
                if outside is not None:
                    found.append(replace(item, reason=outside))
                    continue
                out, in_, *kernel = weight.shape
                cannot = reason or pattern.why_not(out, in_)
                spec = WeightShape(item.name, out, in_, tuple(kernel), dense=cannot is not None)
                found.append(replace(item, reason=cannot, spec=spec))
    return _grouped(model, found)


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    if isinstance(module, nn.GRU):
        names = [name for name in module._flat_weights_names if name.startswith("weight")]
    else:
        names = ["weight"]
    return [(name, getattr(module, name)) for name in names]


def _other(path: str, module: nn.Module) -> Iterable[Found]:
    """Rows for weights of layer kinds that have no sparse twin: outside the total."""
    if isinstance(module, _OTHER_KINDS):
        for name, weight in module.named_parameters():
            if "weight" in name:
                reason = f"{type(module).__name__} has no sparse twin"
                yield Found(f"{path}.{name}".strip("."), path, name, module, tuple(weight.shape), reason)


def _why_not_module(module: nn.Module, kind: type[nn.Module], owners: dict[int, list[str]]) -> str | None:
    if parametrize.is_parametrized(module) or any(name not in module._parameters for name, _ in _weights(module)):
        return "its weight is parametrized"
    known = [base for base in type(module).__mro__ if issubclass(base, kind)]
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for base in known[:-1]:
        for method in _KINDS[kind]:
            if method in base.__dict__:
                return f"{base.__name__} has its own {method}"
    expected = set(module._flat_weights_names) if isinstance(module, nn.GRU) else {"weight", "bias"}
    extra = [name for name in (*module._parameters, *module._buffers, *module._modules) if name not in expected]
    if extra:
        return f"{type(module).__name__} has further state: {extra[0]}"
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if not parameter.is_floating_point():
            return f"its dtype is {parameter.dtype}"
        if len(owners[id(parameter)]) > 1:
            return f"tied: shared by {' and '.join(owners[id(parameter)])}"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return why_not_conv(module)
    return None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter, by the parameter's identity; a module that is used twice gives one name."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".strip("."))
    return owners


def _excluded(model: nn.Module, exclude: Sequence[Exclude]) -> dict[tuple[str, str], str]:
    """`(path, weight name)` of what is excluded, with the reason; the weight name "" stands for the whole module."""
    excluded: dict[tuple[str, str], str] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    modules = dict(model.named_modules())
    for item in exclude:
        matched = False
        for path, module in modules.items():
            names = paths[id(module)]
            if isinstance(item, str):
                hit = any(fnmatch.fnmatchcase(name, item) for name in names)
                for name in module._parameters:
                    if any(fnmatch.fnmatchcase(f"{owner}.{name}".strip("."), item) for owner in names):
                        excluded[path, name] = f"excluded by {item!r}"
                        matched = True
            elif isinstance(item, type):
                hit = isinstance(module, item)
            else:
                hit = module is item
            if hit:
                matched = True
                why = f"excluded by {item!r}" if isinstance(item, str) else "excluded"
                for below, _ in module.named_modules():
                    excluded[".".join(part for part in (path, below) if part), ""] = why
        if isinstance(item, str) and not matched:
            raise ValueError(
                f"sparsify: exclude names {item!r}, which matches no module or parameter of the model; names are those "
                "of model.named_modules(), and *, ? and [] match as in file names."
            )
    return excluded


def _grouped(model: nn.Module, found: list[Found]) -> list[Found]:
    """Marks to_q, to_k, to_v of one self-attention, which are allocated as one tensor stacked along the outputs.

    Source: the split that diffusers makes of the single qkv weight of the published models.
    """
    siblings: dict[str, dict[str, Found]] = {}
    for item in found:
        parent, _, leaf = item.path.rpartition(".")
        if leaf in ("to_q", "to_k", "to_v") and item.spec is not None and not item.spec.dense:
            siblings.setdefault(parent, {})[leaf] = item
    groups: dict[int, str] = {}
    for parent, three in siblings.items():
        same_input = len({item.shape[1:] for item in three.values()}) == 1
        cross = getattr(model.get_submodule(parent), "is_cross_attention", False)
        if len(three) == 3 and same_input and not cross:
            groups.update({id(item): parent or "qkv" for item in three.values()})
    return [
        replace(item, spec=replace(item.spec, group=groups[id(item)]))
        if id(item) in groups and item.spec is not None
        else item
        for item in found
    ]


def count_positions(model: nn.Module, modules: Iterable[nn.Module], example_inputs: Any) -> dict[int, float]:
    """How many rows each module's matrix product has in one forward of `example_inputs`, by `id(module)`.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs once, in eval
            mode, without gradients; its modes, its buffers and the random state are put back.
    """
    modules = list(modules)
    counts = {id(module): 0.0 for module in modules}

    def note(module: nn.Module, _: Any, __: Any, output: Any) -> None:
        counts[id(module)] += positions_of(module, output)

    calls_of(model, modules, note, example_inputs)
    return counts
