"""`SparseConv1d` and `SparseConv2d`: torch.nn's convolutions with a block-sparse weight.

The weight `[out, in, R, S]` is stored as the matrix `[out, R·S·in]`, tap-major: column `(r·S + s)·in + i` holds the
weight of input channel i at kernel position (r, s). A 1-D convolution is one of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import ACTIVATIONS, check_activation
from ..backends import ConvGeometry
from ..patterns import Pattern, parse_pattern
from ..topology import Topology
from .init import check_cut, check_kind, copy_parameter, cut, draw, fill_uniform, rescaling
from .weights import SparseLayer

Size = int | tuple[int, ...]


class SparseConv(SparseLayer):
    """What the sparse convolutions share; `spatial` is their number of spatial dimensions."""

    op = "conv"
    spatial: ClassVar[int]
    twin: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    values: nn.Parameter
    bias: nn.Parameter | None
    topology: Topology
    groups = 1
    padding_mode = "zeros"
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        pattern: Pattern | str,
        sparsity: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        rescale: bool = False,
        activation: str | None = None,
    ) -> None:
        with torch.device("meta"):  # checks and normalises the arguments as torch does
            twin: Any = self.twin
            dense = twin(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        block = parse_pattern(pattern)
        check_conv(type(self).__name__, dense)
        check_cut(type(self).__name__, out_channels, in_channels, block)
        taps = math.prod(dense.kernel_size)
        topology = draw(out_channels, in_channels, block, sparsity, taps=taps, generator=generator, device=device)
        where = topology.crow.device
        values = nn.Parameter(torch.empty(topology.nnzb, block.bh, block.bw, device=where, dtype=dtype))
        offset = nn.Parameter(torch.empty(out_channels, device=where, dtype=dtype)) if bias else None
        self._assemble(dense, topology, values, offset, activation)
        self.reset_parameters(generator, rescale=rescale)

    def _assemble(
        self,
        dense: nn.Conv1d | nn.Conv2d,
        topology: Topology,
        values: nn.Parameter,
        bias: nn.Parameter | None,
        activation: str | None,
    ) -> None:
        SparseLayer.__init__(self)
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.output_padding = dense.padding, dense.output_padding
        self.pattern = topology.pattern
        self._geometry, self._extra = _geometry(dense)
        self.values = values
        self.register_parameter("bias", bias)
        self.topology = topology
        self.execution = "auto"

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv1d | nn.Conv2d,
        *,
        pattern: Pattern | str,
        sparsity: float,
        generator: torch.Generator | None = None,
        init: str = "random",
        rescale: bool = False,
        activation: str | None = None,
    ) -> SparseConv:
        """The sparse layer that keeps a part of a dense one's weights, each with its value; the bias is copied.

        Args:
            module: the dense twin; it is not changed and shares nothing with the result.
            pattern, sparsity, generator, rescale, activation: as for the class.
            init: which blocks are kept: `"random"`, or `"magnitude"` for those of largest RMS.

        Raises:
            TypeError: `module` is of another kind. ValueError: as for the class, and for an unknown `init`.
        """
        block = parse_pattern(pattern)
        where = f"{cls.__name__}.from_dense"
        check_kind(where, module, cls.twin)
        check_conv(where, module)
        check_cut(where, module.out_channels, module.in_channels, block)
        weight = module.weight
        matrix = weight.detach().flatten(2).transpose(1, 2).flatten(1)  # [out, taps · in]
        topology, values = cut(
            matrix.requires_grad_(weight.requires_grad),
            module.in_channels,
            block,
            sparsity,
            taps=math.prod(module.kernel_size),
            init=init,
            generator=generator,
            rescale=rescale,
        )
        layer = cls.__new__(cls)
        layer._assemble(module, topology, values, copy_parameter(module.bias), activation)
        return layer.train(module.training)

    def to_dense(self) -> nn.Conv1d | nn.Conv2d | nn.Sequential:
        """An ordinary torch.nn convolution that computes the same function; the first of an nn.Sequential before an
        activation."""
        with torch.device("meta"):
            twin: Any = self.twin
            dense: nn.Conv1d | nn.Conv2d = twin(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                bias=self.bias is not None,
            )
        weight = self.dense_weight().detach().contiguous()
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        dense.register_parameter("bias", copy_parameter(self.bias))
        if self.activation is None:
            return dense.train(self.training)
        return nn.Sequential(dense, ACTIVATIONS[self.activation].module()).train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight `[out, in, *kernel_size]` with zeros where it is absent, made anew; differentiable."""
        matrix = self.topology.scatter(self.values)
        return matrix.view(self.out_channels, -1, self.in_channels).transpose(1, 2).unflatten(2, self.kernel_size)

    def reset_parameters(self, generator: torch.Generator | None = None, *, rescale: bool = False) -> None:
        """Draws values and bias as torch.nn does: U(−b, b) with b = 1/√(in_channels · Π kernel_size)."""
        bound = 1.0 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        scale = rescaling(self.topology) if rescale else 1.0
        fill_uniform(self.values, bound * scale, self.topology, generator)
        if self.bias is not None:
            fill_uniform(self.bias, bound, None, generator)

    def sparse_items(self) -> Iterator[tuple[str, nn.Parameter, Topology]]:
        yield "values", self.values, self.topology

    def forward(self, x: Tensor) -> Tensor:
        """`x [N, in_channels, *size]`, or without N, → `[N, out_channels, *size']`, in the memory format of x."""
        if x.dim() not in (self.spatial + 1, self.spatial + 2):
            raise ValueError(
                f"{type(self).__name__}: x must have {self.spatial + 2} dimensions [N, {self.in_channels}, …], or "
                f"{self.spatial + 1} without N; got {list(x.shape)}."
            )
        batched = x if x.dim() == self.spatial + 2 else x[None]
        image = batched if self.spatial == 2 else batched.unsqueeze(2)
        if any(self._extra):
            image = nn.functional.pad(image, self._extra)
        y = ops.conv2d(
            image,
            self.values,
            self.topology,
            self.bias,
            conv=self._geometry,
            activation=self.activation,
            score_tap=self._tap("values"),
            backend=self._execution,
        )
        y = y if self.spatial == 2 else y.squeeze(2)
        return y if batched is x else y[0]

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.spatial:
            text += f", padding={self.padding}"
        if self.dilation != (1,) * self.spatial:
            text += f", dilation={self.dilation}"
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{text}, bias={self.bias is not None}{activation}, {self._summary()}"


_ARGS = """
    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype: as for {twin};
            padding may be `"same"` or `"valid"`. groups and padding_mode: 1 and `"zeros"` only.
        pattern: a `Block` or its text, `"block:16x16"` or `"unstructured"`; its blocks lie within one kernel position.
        sparsity: fraction of absent weights in [0, 1]; 0.0 keeps every block.
        generator: draws the topology and the values; torch's global one by default.
        rescale: draws the values `1/√density` wider. Off by default, as for SparseLinear.
        activation: None, `"relu"`, `"silu"`, `"gelu"` or `"gelu_tanh"`, applied to the result while it is close.

    The result has the memory format of the input: channels_last for channels_last, contiguous for contiguous. Both are
    computed as they are; blocks are quickest in channels_last, unstructured weights in contiguous images.

    Attributes:
        values: parameter `[nnzb, bh, bw]`, the active blocks by slot. topology: their index set, with its taps.
        bias: parameter `[out_channels]` or None. execution: the backend that runs the layer (see `SparseLayer`).

    Raises:
        ValueError: groups or a padding mode that is not served, a pattern that cannot cut the weight, a sparsity
            outside [0, 1], or an unknown activation.
"""


class SparseConv1d(SparseConv):
    __doc__ = f"""A 1-D convolution with a weight `[out, in, K]` of which a fraction `sparsity` is absent.

    Equivalent to: `F.conv1d(x, layer.dense_weight(), layer.bias, layer.stride, layer.padding, layer.dilation)`,
    with the activation, if any, on top.
    {_ARGS.format(twin="torch.nn.Conv1d")}"""

    spatial = 1
    twin = nn.Conv1d


class SparseConv2d(SparseConv):
    __doc__ = f"""A 2-D convolution with a weight `[out, in, R, S]` of which a fraction `sparsity` is absent.

    Equivalent to: `F.conv2d(x, layer.dense_weight(), layer.bias, layer.stride, layer.padding, layer.dilation)`,
    with the activation, if any, on top.
    {_ARGS.format(twin="torch.nn.Conv2d")}"""

    spatial = 2
    twin = nn.Conv2d


def why_not_conv(module: nn.Conv1d | nn.Conv2d) -> str | None:
    """Why a dense convolution has no sparse twin, or None where it has one."""
    if module.groups != 1:
        return f"groups={module.groups} is not served"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r} is not served"
    return None


def check_conv(where: str, module: nn.Conv1d | nn.Conv2d) -> None:
    """Raises ValueError where `why_not_conv` has a reason."""
    reason = why_not_conv(module)
    if reason is not None:
        raise ValueError(f"{where}: {reason} (only groups=1 and padding_mode='zeros' are); keep the dense layer.")


def _geometry(module: nn.Conv1d | nn.Conv2d) -> tuple[ConvGeometry, list[int]]:
    """Geometry of the 2-D op, and what must be padded beforehand, in the order of `F.pad`.

    `"same"` with an even kernel needs one more row or column at the end than at the beginning.
    """

    def two(sizes: tuple[int, ...], fill: int) -> tuple[int, int]:
        return (fill, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])

    kernel, dilation = two(module.kernel_size, 1), two(module.dilation, 1)
    extra = [0, 0, 0, 0]
    if module.padding == "valid":
        padding = (0, 0)
    elif module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        extra = [0, total[1] % 2, 0, total[0] % 2]
    else:
        assert not isinstance(module.padding, str)
        padding = two(module.padding, 0)
    return ConvGeometry(kernel, two(module.stride, 1), padding, dilation), extra
