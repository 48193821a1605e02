"""What the ops share: input checks, autocast, the score tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.reference import score_dtype
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
    """Raises where a score tap is not `[row_blocks, col_blocks]`."""
    expected = [topology.row_blocks, topology.col_blocks]
    if tap is not None and list(tap.shape) != expected:
        raise ValueError(f"{op}: score_tap must be [row_blocks, col_blocks] = {expected}; got {list(tap.shape)}.")


def register_autocast(op: Callable[..., Any], dispatcher_name: str, kind: str, shape_of: Callable[..., Block]) -> None:
    """Casts the activations of an op to the autocast dtype where its backend serves that dtype; elsewhere the op
    computes in fp32, as torch's own ops without a half-precision kernel do.

    Args:
        op: the op to call with the key excluded; its first argument is `x` and its last the backend's name.
        kind: the op's name in the registry. shape_of: from the op's arguments to the pattern that it runs.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for device_type, key in _AUTOCAST.items():

        def kernel(*args: Any, device_type: str = device_type, key: str = key) -> Any:
            x, *rest = args
            dtype = torch.get_autocast_dtype(device_type)
            if registry.why_not(args[-1], kind, pattern=shape_of(*args), dtype=dtype, device=x.device) is not None:
                dtype = torch.float32
            if x.dtype != torch.float64:
                x = x.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(x, *rest)

        library.impl(dispatcher_name, kernel, key)
    _LIBRARIES.append(library)


# Registrations last as long as their Library object.
_LIBRARIES: list[torch.library.Library] = []


def empty(x: Tensor, wanted: bool, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous uninitialised tensor like `x`, of no elements where it is not wanted."""
    return x.new_empty(shape if wanted else [0], dtype=dtype or x.dtype)


def optional(tensor: Tensor, wanted: bool) -> Tensor | None:
    """The tensor, or None where it was not wanted: what autograd expects."""
    return tensor if wanted else None


__all__ = [
    "NAMESPACE",
    "check_bias",
    "check_floating",
    "check_tap",
    "check_values",
    "empty",
    "optional",
    "register_autocast",
    "score_dtype",
]
