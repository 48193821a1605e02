"""`SparseLinear`: torch.nn.Linear with a block-sparse weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import ACTIVATIONS, check_activation
from ..patterns import Pattern, parse_pattern
from ..topology import Topology
from .init import check_cut, check_kind, copy_parameter, cut, draw, fill_uniform, rescaling
from .weights import SparseLayer


class SparseLinear(SparseLayer):
    """`y = x · Wᵀ + b` with a weight `[out_features, in_features]` of which a fraction `sparsity` is absent.

    Equivalent to: `F.linear(x, layer.dense_weight(), layer.bias)`, with the activation, if any, on top.

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear.
        pattern: a `Block` or its text, `"block:16x16"` or `"unstructured"`.
        sparsity: fraction of absent weights in [0, 1]; 0.0 keeps every block.
        generator: draws the topology and the values; torch's global one by default.
        activation: None, `"relu"`, `"silu"`, `"gelu"` or `"gelu_tanh"`, applied to the result while it is close.
        rescale: draws the values `1/√density` wider, which keeps the output's variance at initialisation. Off by
            default: an active weight then starts as it would in the dense layer.

    Attributes:
        values: parameter `[nnzb, bh, bw]`, the active blocks by slot. topology: their index set.
        bias: parameter `[out_features]` or None. execution: the backend that runs the layer (see `SparseLayer`).

    Raises:
        ValueError: where the pattern cannot cut the weight, the sparsity is not in [0, 1], the activation is unknown.
    """

    op = "linear"
    values: nn.Parameter
    bias: nn.Parameter | None
    topology: Topology

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Pattern | str,
        sparsity: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        rescale: bool = False,
        activation: str | None = None,
    ) -> None:
        block = parse_pattern(pattern)
        check_cut("SparseLinear", out_features, in_features, block)
        topology = draw(out_features, in_features, block, sparsity, generator=generator, device=device)
        where = topology.crow.device
        values = nn.Parameter(torch.empty(topology.nnzb, block.bh, block.bw, device=where, dtype=dtype))
        offset = nn.Parameter(torch.empty(out_features, device=where, dtype=dtype)) if bias else None
        self._assemble(topology, values, offset, activation)
        self.reset_parameters(generator, rescale=rescale)

    def _assemble(
        self, topology: Topology, values: nn.Parameter, bias: nn.Parameter | None, activation: str | None
    ) -> None:
        SparseLayer.__init__(self)
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self.in_features, self.out_features, self.pattern = topology.in_, topology.out, topology.pattern
        self.values = values
        self.register_parameter("bias", bias)
        self.topology = topology
        self.execution = "auto"

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        pattern: Pattern | str,
        sparsity: float,
        generator: torch.Generator | None = None,
        init: str = "random",
        rescale: bool = False,
        activation: str | None = None,
    ) -> SparseLinear:
        """The sparse layer that keeps a part of a dense one's weights, each with its value; the bias is copied.

        Args:
            module: an nn.Linear; it is not changed and shares nothing with the result.
            pattern, sparsity, generator, rescale, activation: as for the class.
            init: which blocks are kept: `"random"`, or `"magnitude"` for those of largest RMS.

        Raises:
            TypeError: `module` is of another kind. ValueError: as for the class, and for an unknown `init`.
        """
        check_kind(f"{cls.__name__}.from_dense", module, nn.Linear)
        block = parse_pattern(pattern)
        check_cut(f"{cls.__name__}.from_dense", module.out_features, module.in_features, block)
        topology, values = cut(
            module.weight, module.in_features, block, sparsity, init=init, generator=generator, rescale=rescale
        )
        layer = cls.__new__(cls)
        layer._assemble(topology, values, copy_parameter(module.bias), activation)
        return layer.train(module.training)

    def to_dense(self) -> nn.Linear | nn.Sequential:
        """An ordinary nn.Linear that computes the same function; the first of an nn.Sequential before an activation."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense.weight = nn.Parameter(self.dense_weight().detach(), requires_grad=self.values.requires_grad)
        dense.register_parameter("bias", copy_parameter(self.bias))
        if self.activation is None:
            return dense.train(self.training)
        return nn.Sequential(dense, ACTIVATIONS[self.activation].module()).train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight `[out_features, in_features]` with zeros where it is absent, made anew; differentiable."""
        return self.topology.scatter(self.values)

    def reset_parameters(self, generator: torch.Generator | None = None, *, rescale: bool = False) -> None:
        """Draws values and bias as torch.nn.Linear does: U(−1/√in_features, 1/√in_features)."""
        bound = 1.0 / math.sqrt(self.in_features)
        scale = rescaling(self.topology) if rescale else 1.0
        fill_uniform(self.values, bound * scale, self.topology, generator)
        if self.bias is not None:
            fill_uniform(self.bias, bound, None, generator)

    def sparse_items(self) -> Iterator[tuple[str, nn.Parameter, Topology]]:
        yield "values", self.values, self.topology

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` → `[..., out_features]`."""
        return ops.linear(
            x,
            self.values,
            self.topology,
            self.bias,
            activation=self.activation,
            score_tap=self._tap("values"),
            backend=self._execution,
        )

    def extra_repr(self) -> str:
        bias = f"bias={self.bias is not None}" + (f", activation={self.activation}" if self.activation else "")
        return f"in_features={self.in_features}, out_features={self.out_features}, {bias}, {self._summary()}"
