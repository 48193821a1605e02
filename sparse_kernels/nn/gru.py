"""`SparseGRU`: torch.nn.GRU with block-sparse weights, lengths on the device and one op a layer.

Gates r, z, n share one tensor, as in torch.nn.GRU: `weight_ih_l{k} [3H, in]`, `weight_hh_l{k} [3H, H]`, and the same
with the suffix `_reverse`. Each is block-sparse, or dense where it has no topology.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import ops
from ..allocation import check_sparsity
from ..patterns import Block, Pattern, parse_pattern
from ..topology import Topology
from .init import check_kind, copy_parameter, cut, draw, fill_uniform, rescaling
from .weights import SparseLayer

Sparsity = float | Mapping[str, float]

_LENGTHS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class SparseGRU(SparseLayer):
    """A multi-layer, optionally bidirectional GRU with sparse weights; calls and results are those of torch.nn.GRU.

    Equivalent to: `layer.to_dense()(x, h0)`; with `lengths`, to packing `x`, running that, and unpacking.

    Inside `torch.autocast` the `cpu` backend computes in fp32, whatever dtype `x` and `h0` have, and returns fp32: its
    kernels are fp32, and a recurrence adds up what rounding loses.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for
            torch.nn.GRU.
        pattern: a `Block` or its text, `"block:16x16"` or `"unstructured"`.
        sparsity: fraction of absent weights in [0, 1] for every weight tensor, or a dict from torch.nn.GRU's weight
            names to fractions. 0.0 keeps every block. A weight that the dict leaves out, or that the pattern cannot
            cut, stays dense: it is in `weights` as an ordinary `[3H, in]` parameter and not in `topologies`.
        generator: draws topologies and values; torch's global one by default.
        rescale: draws sparse weights `1/√density` wider. Off by default, as for SparseLinear.

    Attributes:
        weights: by weight name, parameters `[nnzb, bh, bw]`, or `[3H, in]` where the weight is dense.
        topologies: by weight name, for the sparse ones. biases: by bias name, parameters `[3H]`; empty without bias.
        execution: the backend that runs the layer (see `SparseLayer`).

    Raises:
        ValueError: a sparsity outside [0, 1] or of an unknown weight, or a pattern that cuts none of the weights.
    """

    op = "gru"
    mode = "GRU"
    proj_size = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        pattern: Pattern | str,
        sparsity: Sparsity,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        rescale: bool = False,
    ) -> None:
        with torch.device("meta"):  # checks the arguments as torch does, and names the weights
            twin = nn.GRU(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        block = parse_pattern(pattern)
        wanted = _sparsities(twin, block, sparsity)
        weights: dict[str, nn.Parameter] = {}
        topologies: dict[str, Topology] = {}
        where = torch.device(device) if device is not None else torch.get_default_device()
        for name, (rows, cols) in _shapes(twin).items():
            shape = [rows, cols]
            if name in wanted:
                topologies[name] = draw(rows, cols, block, wanted[name], generator=generator, device=where)
                shape = [topologies[name].nnzb, block.bh, block.bw]
            weights[name] = nn.Parameter(torch.empty(shape, device=where, dtype=dtype))
        size = 3 * hidden_size
        biases = {name: nn.Parameter(torch.empty(size, device=where, dtype=dtype)) for name in _bias_names(twin)}
        self._assemble(twin, block, topologies, weights, biases)
        self.reset_parameters(generator, rescale=rescale)

    def _assemble(
        self,
        twin: nn.GRU,
        pattern: Block,
        topologies: dict[str, Topology],
        weights: dict[str, nn.Parameter],
        biases: dict[str, nn.Parameter],
    ) -> None:
        SparseLayer.__init__(self)
        self.input_size, self.hidden_size, self.num_layers = twin.input_size, twin.hidden_size, twin.num_layers
        self.bias, self.batch_first, self.bidirectional = twin.bias, twin.batch_first, twin.bidirectional
        self.dropout = float(twin.dropout)
        self.pattern = pattern
        # A plain dict would be sorted.
        self.weights = nn.ParameterDict(OrderedDict(weights))
        self.biases = nn.ParameterDict(OrderedDict(biases))
        self.topologies = nn.ModuleDict(topologies)
        self.execution = "auto"

    @classmethod
    def from_dense(
        cls,
        module: nn.GRU,
        *,
        pattern: Pattern | str,
        sparsity: Sparsity,
        generator: torch.Generator | None = None,
        init: str = "random",
        rescale: bool = False,
    ) -> SparseGRU:
        """The sparse layer that keeps a part of a dense one's weights, each with its value; biases are copied.

        Args:
            module: an nn.GRU; it is not changed and shares nothing with the result.
            pattern, sparsity, generator, rescale: as for the class.
            init: which blocks are kept: `"random"`, or `"magnitude"` for those of largest RMS.

        Raises:
            TypeError: `module` is of another kind. ValueError: as for the class, and for an unknown `init`.
        """
        check_kind("SparseGRU.from_dense", module, nn.GRU)
        block = parse_pattern(pattern)
        wanted = _sparsities(module, block, sparsity)
        weights: dict[str, nn.Parameter] = {}
        topologies: dict[str, Topology] = {}
        for name, (_, cols) in _shapes(module).items():
            dense = getattr(module, name)
            if name in wanted:
                topologies[name], weights[name] = cut(
                    dense, cols, block, wanted[name], init=init, generator=generator, rescale=rescale
                )
            else:
                weights[name] = _copied(dense)
        biases = {name: _copied(getattr(module, name)) for name in _bias_names(module)}
        layer = cls.__new__(cls)
        layer._assemble(module, block, topologies, weights, biases)
        return layer.train(module.training)

    def to_dense(self) -> nn.GRU:
        """An ordinary nn.GRU that computes the same function."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of dropout in a single layer; the user has seen it
            dense = nn.GRU(
                self.input_size,
                self.hidden_size,
                self.num_layers,
                self.bias,
                self.batch_first,
                self.dropout,
                self.bidirectional,
            )
        for name, weight in self.weights.items():
            matrix = self.dense_weight(name).detach().clone()
            setattr(dense, name, nn.Parameter(matrix, requires_grad=weight.requires_grad))
        for name, bias in self.biases.items():
            setattr(dense, name, _copied(bias))
        dense.flatten_parameters()
        return dense.train(self.training)

    def dense_weight(self, name: str) -> Tensor:
        """The weight `[3H, in]` of that name, zeros where it is absent; differentiable."""
        topology = self._topology(name)
        return self.weights[name] if topology is None else topology.scatter(self.weights[name])

    def reset_parameters(self, generator: torch.Generator | None = None, *, rescale: bool = False) -> None:
        """Draws weights and biases as torch.nn.GRU does: U(−1/√H, 1/√H)."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, weight in self.weights.items():
            topology = self._topology(name)
            scale = rescaling(topology) if rescale and topology is not None else 1.0
            fill_uniform(weight, bound * scale, topology, generator)
        for bias in self.biases.values():
            fill_uniform(bias, bound, None, generator)

    def sparse_items(self) -> Iterator[tuple[str, nn.Parameter, Topology]]:
        for name in self.topologies:
            yield name, self.weights[name], cast(Topology, self.topologies[name])

    def _dense_elements(self) -> int:
        return sum(weight.numel() for name, weight in self.weights.items() if name not in self.topologies)

    def flatten_parameters(self) -> None:
        """Does nothing; here because code written for torch.nn.GRU calls it."""

    def forward(
        self, x: Tensor | PackedSequence, h0: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Runs all layers.

        Args:
            x: `[B, T, F]` with batch_first, else `[T, B, F]`; unbatched `[T, F]`; or a PackedSequence.
            h0: `[D·layers, B, H]` (`[D·layers, H]` unbatched); zeros by default.
            lengths: integers `[B]` in 0..T: how far each padded sequence goes; T by default. What lies past it is
                never read.

        Returns:
            `y`, shaped as `x` with D·H features, zero past each length (a PackedSequence for one), and
            `h_n`, shaped as `h0`: each sequence's last state.

        Raises:
            ValueError: shapes that do not match, or lengths given with a PackedSequence or unbatched input.
            TypeError: lengths that are not integers.
        """
        if isinstance(x, PackedSequence):
            return self._packed(x, h0, lengths)
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"SparseGRU: x must have 2 or 3 dimensions, the last of {self.input_size} features (input_size); "
                f"got {list(x.shape)}."
            )
        if x.dim() == 2:
            if lengths is not None:
                raise ValueError(
                    "SparseGRU: lengths belong to batched input [B, T, F]; unbatched input has one length."
                )
            if h0 is not None and h0.dim() != 2:
                raise ValueError(
                    f"SparseGRU: unbatched input takes an unbatched h0 [D·layers, H]; got {list(h0.shape)}."
                )
            y, h_n = self._run(x[None], None if h0 is None else h0[:, None], None)
            return y[0], h_n[:, 0]
        if h0 is not None and h0.dim() != 3:
            raise ValueError(f"SparseGRU: batched input takes h0 [D·layers, B, H]; got {list(h0.shape)}.")
        y, h_n = self._run(x if self.batch_first else x.transpose(0, 1), h0, lengths)
        return y if self.batch_first else y.transpose(0, 1), h_n

    def _run(self, x: Tensor, h0: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """All layers on `[B, T, F]`."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        directions, batch = len(suffixes), x.shape[0]
        shape = [directions * self.num_layers, batch, self.hidden_size]
        if h0 is None:
            h0 = x.new_zeros(shape)
        elif list(h0.shape) != shape:
            raise ValueError(f"SparseGRU: h0 must be [D·layers, B, H] = {shape}; got {list(h0.shape)}.")
        if lengths is not None:
            # as_tensor would move a tensor to the default device.
            lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device=x.device)
            if lengths.dtype not in _LENGTHS:
                raise TypeError(f"SparseGRU: lengths must be integers; got {lengths.dtype}; convert with .long().")
            lengths = lengths.to(x.device, torch.int32)
        finals = []
        for layer in range(self.num_layers):
            names = [f"weight_{kind}_l{layer}{suffix}" for suffix in suffixes for kind in ("ih", "hh")]
            x, h_n = ops.gru(
                x,
                h0[layer * directions : (layer + 1) * directions],
                [self.weights[name] for name in names],
                [self._topology(name) for name in names],
                [self.biases[name.replace("weight", "bias")] for name in names] if self.bias else [],
                lengths=lengths,
                score_taps=[self._tap(name) for name in names],
                backend=self._execution,
            )
            finals.append(h_n)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = nn.functional.dropout(x, self.dropout, True)
        return x, torch.cat(finals)

    def _topology(self, name: str) -> Topology | None:
        return cast(Topology, self.topologies[name]) if name in self.topologies else None

    def _packed(self, x: PackedSequence, h0: Tensor | None, lengths: Tensor | None) -> tuple[PackedSequence, Tensor]:
        if lengths is not None:
            raise ValueError("SparseGRU: a PackedSequence brings its own lengths; give lengths with padded input only.")
        # In sorted order throughout, as the packed data is; only the states are permuted.
        data, batch_sizes, order, inverse = x
        padded, sizes = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=True)
        if h0 is not None and order is not None:
            h0 = h0.index_select(1, order)
        y, h_n = self._run(padded, h0, sizes)
        packed = pack_padded_sequence(y, sizes, batch_first=True)
        if inverse is not None:
            h_n = h_n.index_select(1, inverse)
        return PackedSequence(packed.data, batch_sizes, order, inverse), h_n

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, {self._summary()}"


def _shapes(module: nn.GRU) -> dict[str, tuple[int, int]]:
    """Weight names and shapes, in torch.nn.GRU's order."""
    names = (name for name in module._flat_weights_names if name.startswith("weight"))
    return {name: tuple(getattr(module, name).shape) for name in names}


def _bias_names(module: nn.GRU) -> list[str]:
    return [name for name in module._flat_weights_names if name.startswith("bias")]


def _sparsities(module: nn.GRU, pattern: Block, sparsity: Sparsity) -> dict[str, float]:
    """Sparsity of each weight that will be block-sparse."""
    shapes = _shapes(module)
    given: Mapping[str, float] = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(shapes, sparsity)
    unknown = [name for name in given if name not in shapes]
    if unknown:
        raise ValueError(f"SparseGRU: sparsity names {unknown[0]!r}; its weights are {', '.join(shapes)}.")
    reasons = {name: pattern.why_not(*shapes[name]) for name in given}
    cut_names = [name for name, reason in reasons.items() if reason is None]
    if not cut_names:
        reason = next(iter(reasons.values()), "sparsity names no weight")
        raise ValueError(f"SparseGRU: no weight would be sparse: {reason}; choose a smaller block or keep nn.GRU.")
    return {name: check_sparsity(given[name], f"SparseGRU.{name}") for name in shapes if name in cut_names}


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    copy = copy_parameter(parameter)
    assert copy is not None
    return copy
