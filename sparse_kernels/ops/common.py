"""What the ops share: input checks, autocast, when an activation is fused, the score tap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..activations import ACTIVATIONS
from ..backends import registry
from ..backends.registry import ProductGrads, score_dtype
from ..patterns import Block
from ..topology import Topology

NAMESPACE = "sparse_kernels"

# Autocast keys by the device they serve.
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for anything that is not a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor; got {got}.")


def check_values(op: str, x: Tensor, values: Tensor, topology: Topology) -> None:
    """Raises where `values` do not belong to `topology` or lie on another device than `x`."""
    check_floating(op, "x", x)
    check_floating(op, "values", values)
    expected = [topology.nnzb, topology.bh, topology.bw]
    if list(values.shape) != expected:
        raise ValueError(
            f"{op}: values must be [nnzb, bh, bw] = {expected} for its topology; got {list(values.shape)}."
        )
    if not values.is_contiguous():
        raise ValueError(f"{op}: values must be contiguous; got strides {values.stride()}; call .contiguous().")
    if values.device != x.device or topology.crow.device != x.device:
        raise ValueError(
            f"{op}: x, values and topology must share a device; got {x.device}, {values.device} and "
            f"{topology.crow.device}; move the layer with .to({str(x.device)!r})."
        )


def check_bias(op: str, x: Tensor, bias: Tensor | None, out: int) -> None:
    """Raises where a bias is not `[out]` on the device of `x`."""
    if bias is None:
        return
    check_floating(op, "bias", bias)
    if list(bias.shape) != [out] or bias.device != x.device:
        raise ValueError(f"{op}: bias must be [{out}] on {x.device}; got {list(bias.shape)} on {bias.device}.")


def check_tap(op: str, tap: Tensor | None, topology: Topology) -> None:
    """Raises where a score tap is not `[row_blocks, col_blocks]` on the topology's device."""
    expected, device = [topology.row_blocks, topology.col_blocks], topology.crow.device
    if tap is not None and (list(tap.shape) != expected or tap.device != device):
        raise ValueError(
            f"{op}: score_tap must be [row_blocks, col_blocks] = {expected} on {device}; got {list(tap.shape)} on "
            f"{tap.device}."
        )


def follows(activation: str, topology: Topology, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether an activation is better torch's own, after the plain product, than the product's epilogue.

    The SiLU of an fp32 training step with blocks on a CPU is: its backward wants what it was given, which the epilogue
    writes beside the result. Forward and backward of 4 x 224 x 32², S = 0.9, blocks of 32 (Zen 5, two threads): 0.96
    of the epilogue's time for 1x1, 0.94 for 3x3, but 1.09 for 1x1 in bf16, and as long for GELU and unstructured
    weights.
    """
    if activation != "silu" or x.dtype != torch.float32 or x.device.type != "cpu" or topology.bh * topology.bw == 1:
        return False
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an op and registers its kernel for every device, and its fake.

    This is what `torch.library.custom_op` does, less the tree flattening of arguments and the dynamo guard of each
    call, which cost as much as a small layer's whole product (0.3 ms against 0.05 ms for forward and backward).

    Args:
        schema: `"name(Tensor x, …) -> Tensor"`.

    Returns:
        The op's overload, to be called.
    """
    name = schema.partition("(")[0]

    @functools.wraps(kernel)
    def below(*arguments: Any) -> Any:
        # Views that a kernel returns are of buffers that nobody else has: marked as views, they could not be modified
        # in place after a `torch.autograd.Function`.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return kernel(*arguments)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, below, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.sparse_kernels, name).default
    _KERNELS[op] = below
    return op


def register_autograd(op: Any, apply: Callable[..., Any]) -> None:
    """Registers the autograd kernel of an op.

    Args:
        apply: called as `apply(forward, *arguments)` where a gradient may be wanted; `forward(*arguments)` runs the op
            below autograd. It goes through a `torch.autograd.Function`, which refuses forward-mode AD.
    """

    def kernel(keys: Any, *arguments: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset

        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(below, *arguments)

        return autograd(forward, *arguments)

    def autograd(forward: Callable[..., Any], *arguments: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if wanted or forward_ad._current_level >= 0:  # inside a dual level any argument may have a tangent
            return apply(forward, *arguments)
        return forward(*arguments)

    _AUTOGRAD[op] = autograd
    _LIBRARY.impl(_name(op), kernel, "Autograd", with_keyset=True)


def call(op: Any, x: Tensor, values: Tensor, *arguments: Any) -> Any:
    """`op(x, values, *arguments)`, without crossing the dispatcher where nothing waits there but the op's own kernels.

    A product leaves the caches to its operands, and what the interpreter and the dispatcher touch comes from memory
    again: two crossings a step were 5 % of it at 1024 x 1024, S = 0.9 (one thread of a Zen 5).
    """
    if not _ordinary(x, values, *arguments) or torch.is_autocast_enabled(x.device.type):
        return op(x, values, *arguments)
    return _AUTOGRAD[op](_KERNELS[op], x, values, *arguments)


def call_backward(op: Any, *arguments: Any) -> Any:
    """`op(*arguments)` for the op of a backward, as `call`."""
    return _KERNELS[op](*arguments) if _ordinary(*arguments) else op(*arguments)


def _ordinary(*arguments: Any) -> bool:
    """Whether the dispatcher has only autograd and the kernel for an op on these: no compiler or tracer that records
    it, no mode, no transform, no profiler that waits for it, no subclass among the tensors (those in lists, which are a
    topology's index, are not looked at)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for tensor in arguments:
        if isinstance(tensor, Tensor) and not (
            type(tensor) in _TYPES and (torch._C._dispatch_keys(tensor) & _BELOW).raw_repr() in _PLAIN
        ):
            return False
    return True


def register_autocast(op: Any, kind: str, pattern_of: Callable[..., Block]) -> None:
    """Casts the activations of an op to the autocast dtype where its backend serves that dtype; elsewhere the op
    computes in fp32, as torch's own ops without a half-precision kernel do.

    Args:
        op: its first argument is `x`, its last the backend's name.
        kind: the op's name in the registry of backends.
        pattern_of: from the op's arguments to the pattern that it runs.
    """
    for device_type, key in _AUTOCAST.items():

        def kernel(*arguments: Any, device_type: str = device_type, key: str = key) -> Any:
            x, *rest = arguments
            dtype = torch.get_autocast_dtype(device_type)
            pattern, backend = pattern_of(*arguments), arguments[-1]
            if registry.why_not(backend, kind, pattern=pattern, dtype=dtype, device=x.device) is not None:
                dtype = torch.float32
            if x.dtype != torch.float64:
                x = x.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(x, *rest)

        _LIBRARY.impl(_name(op), kernel, key)


def _name(op: Any) -> str:
    return str(op._schema.name).partition("::")[2]


# Registrations last as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# The kernel of each op, and what its autograd kernel does with that.
_KERNELS: dict[Any, Callable[..., Any]] = {}
_AUTOGRAD: dict[Any, Callable[..., Any]] = {}
_TYPES = (Tensor, torch.nn.Parameter)
# What is left of a tensor's dispatch keys below autograd, and what that is of an ordinary tensor.
_BELOW = torch._C._after_autograd_keyset.remove(torch._C.DispatchKey.ADInplaceOrView)
_PLAIN = frozenset(
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)


def empty(x: Tensor, wanted: bool, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous uninitialised tensor like `x`, of no elements where it is not wanted."""
    return x.new_empty(shape if wanted else [0], dtype=dtype or x.dtype)


def returned(grads: ProductGrads, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients as a backward op returns them: an empty tensor for each that was not wanted."""
    dtype = score_dtype(x)
    dx, dvalues, dbias, scores = grads
    return (
        empty(x, False, []) if dx is None else dx,
        empty(x, False, [], dtype) if dvalues is None else dvalues,
        empty(x, False, [], dtype) if dbias is None else dbias,
        empty(x, False, [], dtype) if scores is None else scores,
    )


def dtype_of(tensor: Tensor | None) -> torch.dtype:
    """The dtype that a gradient of `tensor` must have; any where there is no tensor."""
    return torch.float32 if tensor is None else tensor.dtype


class ProductAutograd(torch.autograd.Function):
    """Autograd of an op `(x, values, bias, score_tap, *rest)` whose backward op takes `(dy, x, values, *rest)`, with
    the list of wanted gradients before the backend's name, which comes last in `rest`."""

    @staticmethod
    def forward(
        ctx: Any, forward: Any, backward_op: Any, x: Tensor, values: Tensor, bias: Any, tap: Any, *rest: Any
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.backward_op, ctx.rest = backward_op, rest
        ctx.dtypes = values.dtype, dtype_of(bias), dtype_of(tap)
        return forward(x, values, bias, tap, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        *where, backend = ctx.rest
        return _gradients(ctx, dy, x, values, where, backend)


class ActivatedProductAutograd(torch.autograd.Function):
    """As ProductAutograd for an op whose `rest` ends in `(activation, keep, backend)` and which returns its result and
    what the activation was given."""

    @staticmethod
    def forward(
        ctx: Any, forward: Any, backward_op: Any, x: Tensor, values: Tensor, bias: Any, tap: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *where, activation, _, backend = rest
        of_output = ACTIVATIONS[activation].from_output
        y, pre = forward(x, values, bias, tap, *where, activation, not of_output, backend)
        ctx.save_for_backward(x, values, y if of_output else pre)
        ctx.backward_op, ctx.rest = backward_op, rest
        ctx.dtypes = values.dtype, dtype_of(bias), dtype_of(tap)
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)  # or every backward would be given zeros for `pre`, as many as y has elements
        return y, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * (6 + len(ctx.rest))
        x, values, saved = ctx.saved_tensors
        *where, activation, _, backend = ctx.rest
        dy = ACTIVATIONS[activation].backward(dy.to(saved.dtype), saved)
        return _gradients(ctx, dy, x, values, where, backend)


def _gradients(ctx: Any, dy: Tensor, x: Tensor, values: Tensor, where: list[Any], backend: str) -> tuple[Any, ...]:
    """What a product's Function returns for `(forward, backward_op, x, values, bias, tap, *rest)`."""
    needs = list(ctx.needs_input_grad[2:6])
    dx, *others = call_backward(ctx.backward_op, dy, x, values, *where, needs, backend)
    grads = [grad.to(dtype) for grad, dtype in zip(others, ctx.dtypes, strict=True)]
    wanted = [grad if need else None for grad, need in zip([dx, *grads], needs, strict=True)]
    return None, None, *wanted, *[None] * len(ctx.rest)


__all__ = [
    "ActivatedProductAutograd",
    "ProductAutograd",
    "call",
    "check_bias",
    "check_floating",
    "check_tap",
    "check_values",
    "define",
    "dtype_of",
    "empty",
    "follows",
    "register_autocast",
    "register_autograd",
    "returned",
    "score_dtype",
]
