"""What every sparse layer has in common, and the handles by which training methods reach its weights.

A `SparseLayer` owns one or more sparse weights, each a parameter `values [nnzb, bh, bw]` with its `Topology`. A
`SparseWeight` is a handle on one of them: its name in the model, its values, its topology and its score tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..patterns import Block
from ..topology import Topology
from . import costs

AUTO = "auto"
SPARSE_KERNEL = "sparse kernel"  # what backends.choose says where nothing is wrong
ASKED_FOR = "asked for"
HALVES = (torch.bfloat16, torch.float16)


class SparseLayer(nn.Module):
    """Base of the sparse layers: which backend executes it, its score taps, and a state dict that is checked first.

    Subclasses set `op` and `pattern`, answer `sparse_items()` and `to_dense()`, and assign `self.execution` once their
    parameters exist.
    """

    op: ClassVar[str]
    pattern: Block

    def __init__(self) -> None:
        super().__init__()
        self._requested = AUTO
        self._execution = ""
        self._why = ""
        self._planned: tuple[str, str, torch.dtype, torch.device] | None = None
        self._positions: float | None = None
        self._taps: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_after_load)

    def sparse_items(self) -> Iterator[tuple[str, nn.Parameter, Topology]]:
        """`(key, values, topology)` of every sparse weight of this layer, in a fixed order."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """An ordinary torch.nn module that computes the same function."""
        raise NotImplementedError

    # Execution

    @property
    def execution(self) -> str:
        """Name of the backend that runs this layer.

        Assign a name to choose it, or `"auto"` (the default) for the first sparse backend that serves the layer's
        pattern, dtype (inside `torch.autocast` that of autocast) and device; `"densified"` where none does, or where
        this kind of machine's cost table says that the dense library is faster. `"auto"` chooses again whenever the
        layer moves to another dtype or device. A backend assigned by name stays: where it cannot run, the forward
        raises its reason.

        Raises:
            ValueError: on assignment of an unknown name.
            RuntimeError: on assignment of a backend that cannot run this layer, with its reason.
        """
        return self._execution

    @execution.setter
    def execution(self, name: str) -> None:
        if name != AUTO:
            self.require(name)
        self._requested, self._planned = name, None
        self._resolve()

    @property
    def asked_for(self) -> str | None:
        """The backend that was assigned by name, if one was."""
        return None if self._requested == AUTO else self._requested

    def follow(self, execution: str, reason: str, positions: float | None = None) -> None:
        """Runs as a plan says until the layer moves to another dtype or device; then `"auto"` chooses again.

        Args:
            execution: a backend's name. reason: what `execution_reason` answers; `"sparse kernel"` if empty.
            positions: rows of the product, as far as the plan knows.

        Raises:
            ValueError: for an unknown name. RuntimeError: where that backend cannot run this layer.
        """
        self.execution = execution
        probe = self._probe()
        planned = execution, reason or SPARSE_KERNEL, probe.dtype, probe.device
        self._requested, self._planned, self._positions = AUTO, planned, positions
        self._resolve()

    def expect(self, positions: float) -> None:
        """Lets `"auto"` choose for a product of so many rows; it takes `costs.DEFAULT_POSITIONS` otherwise."""
        self._positions = positions
        self._resolve()

    def require(self, name: str) -> None:
        """Raises where a backend cannot run this layer, be it under autocast, from which fp32 parameters are cast.

        Raises:
            ValueError: for an unknown name. RuntimeError: with the reason.
        """
        probe = self._probe()
        dtypes = [probe.dtype, *(HALVES if probe.dtype == torch.float32 else ())]
        reasons = [backends.why_not(name, self.op, pattern=self.pattern, dtype=d, device=probe.device) for d in dtypes]
        if None not in reasons:
            backends.require(name, self.op, pattern=self.pattern, dtype=probe.dtype, device=probe.device)

    def native(self) -> tuple[str, str, torch.dtype]:
        """The default backend of this layer as `backends.choose` gives it, why, and the dtype that the op computes in:
        inside `torch.autocast` that of autocast, if there is a kernel for it."""
        probe = self._probe()
        dtypes, kind = [probe.dtype], probe.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and probe.dtype != torch.float64:
            dtypes.insert(0, torch.get_autocast_dtype(kind))
        found = [(*backends.choose(self.op, pattern=self.pattern, dtype=d, device=probe.device), d) for d in dtypes]
        return next((one for one in found if one[1] == SPARSE_KERNEL), found[0])

    def work(self) -> costs.Work:
        """What decides this layer's times; inside `torch.autocast` in the dtype that the op then computes in."""
        _, _, dtype = self.native()
        sizes = [(topology.numel, topology.nnz, topology.taps) for _, _, topology in self.sparse_items()]
        dense = self._dense_elements()
        numel, nnz = (dense + sum(size[k] for size in sizes) for k in (0, 1))
        positions = self._positions or costs.DEFAULT_POSITIONS
        threads = torch.get_num_threads()
        return costs.Work(self.op, self.pattern, dtype, numel, sizes[0][2], nnz / numel, positions, threads)

    def _dense_elements(self) -> int:
        """Elements of weights that are dense beside the sparse ones."""
        return 0

    @property
    def execution_reason(self) -> str:
        """Why that backend: `"sparse kernel"` (and what is missing, where nobody measured how fast it is here),
        `"asked for"`, how much faster the dense library is, or what each sparse backend does not serve."""
        return self._why

    def _probe(self) -> Tensor:
        """A tensor that has the layer's dtype and device."""
        return next(values for _, values, _ in self.sparse_items())

    def _resolve(self, loaded: bool = True) -> None:
        """Settles the backend, and gives its index buffers to the topologies where these have their content."""
        probe = self._probe()
        if self._planned is not None and self._planned[2:] != (probe.dtype, probe.device):
            self._planned = None
        if self._planned is not None:
            self._execution, self._why = self._planned[:2]
        elif self._requested == AUTO:
            self._execution, self._why = self._choose(probe)
        else:
            self._execution, self._why = self._requested, ASKED_FOR
            try:
                self.require(self._execution)
            except RuntimeError:
                return  # the op raises the reason; this backend's index buffers have no place here
        if not loaded or probe.is_meta:
            return
        deriver = backends.get(self._execution).deriver(self.op, self.pattern)
        if deriver is not None:
            for _, _, topology in self.sparse_items():
                topology.attach(deriver)

    def _choose(self, probe: Tensor) -> tuple[str, str]:
        name, why, _ = self.native()
        if why != SPARSE_KERNEL:
            return name, why
        work, table = self.work(), costs.cost_table(probe.device)
        times = None if table is None else table.predict(work)
        if table is None or times is None:
            return name, f"{SPARSE_KERNEL}; {costs.why_no_times(work, probe.device)}"
        execution, reason = costs.decide(times, name, f"cost table {table.kind}")
        return execution, reason or SPARSE_KERNEL

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        device, dtype = self._probe().device, self._probe().dtype
        self._taps.clear()
        super()._apply(fn, recurse)
        now = self._probe()
        if (now.device, now.dtype) != (device, dtype):
            self._resolve(loaded=device.type != "meta")
        return self

    def _summary(self) -> str:
        nnz, numel = (sum(n) for n in zip(*[(t.nnz, t.numel) for _, _, t in self.sparse_items()], strict=True))
        return f"{self.pattern}, sparsity={1 - nnz / numel:.4g}, execution={self._execution}"

    # Score taps

    def _tap(self, key: str) -> Tensor | None:
        return self._taps.get(key)

    # State

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A layer loads whole or not at all: with a broken index or values of another count, neither half is copied.
        error_msgs: list[str] = args[-1]
        errors = [*self._why_not_load(state_dict, prefix)]
        if errors:
            error_msgs.extend(errors)
            # What the children will read is replaced by what they hold already.
            for name, own in self.state_dict(prefix=prefix).items():
                if name in state_dict:
                    state_dict[name] = own
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _why_not_load(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, own in self.state_dict(prefix=prefix).items():
            given = state_dict.get(name)
            if isinstance(given, Tensor) and given.shape != own.shape:
                yield (
                    f"{name}: this layer holds {list(own.shape)} and the state dict {list(given.shape)}; "
                    "build the layer with the pattern and sparsity that were saved"
                )
        paths = {id(item): name for name, item in [*self.named_modules(), *self.named_parameters()]}
        for _, values, topology in self.sparse_items():
            path = f"{prefix}{paths[id(topology)]}"
            index = [state_dict.get(f"{path}.{name}") for name in ("crow", "col", "slot")]
            error = topology.why_not_load(*index)
            if error is None and (f"{prefix}{paths[id(values)]}" in state_dict) != (index[0] is not None):
                error = "values and index are loaded together; the state dict has only one of them"
            if error is not None:
                yield f"{path}: {error}"


def _after_load(layer: SparseLayer, _: Any) -> None:
    layer._resolve()  # a state dict may have been assigned, which brings its own dtype and device


@dataclass(frozen=True)
class SparseWeight:
    """A handle on one sparse weight of a model.

    Args:
        name: dotted path of the layer, for a GRU followed by the weight's name: `"layers.0"`, `"gru.weight_hh_l0"`.
        module: the sparse layer. key: `"values"` or the GRU weight's name.
    """

    name: str
    module: SparseLayer
    key: str

    @property
    def values(self) -> nn.Parameter:
        """The active blocks by slot: `[nnzb, bh, bw]`."""
        return self._item()[0]

    @property
    def topology(self) -> Topology:
        """The index set."""
        return self._item()[1]

    def open_tap(self) -> Tensor:
        """Lets the following backwards accumulate growth scores of every block (see `tap_scores`), from zero on.

        Returns:
            The tap: a zero leaf `[row_blocks, col_blocks]` of one element's memory, for hooks on its gradient.
        """
        values, topology = self._item()
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        shape = (topology.row_blocks, topology.col_blocks)
        # Nobody reads a tap's elements, and for unstructured weights there are as many as of the dense weight.
        tap = torch.zeros((), dtype=dtype, device=values.device).expand(shape).requires_grad_()
        self.module._taps[self.key] = tap
        return tap

    def tap_scores(self) -> Tensor | None:
        """Σ over backwards of the squared Frobenius norm of each block of the dense weight gradient.

        Returns:
            `[row_blocks, col_blocks]` fp32, or None before the first backward and where no tap is open.
        """
        tap = self.module._tap(self.key)
        return None if tap is None else tap.grad

    def close_tap(self) -> None:
        """Ends scoring and frees the scores."""
        self.module._taps.pop(self.key, None)

    def _item(self) -> tuple[nn.Parameter, Topology]:
        for key, values, topology in self.module.sparse_items():
            if key == self.key:
                return values, topology
        raise KeyError(f"{type(self.module).__name__} has no sparse weight {self.key!r}.")


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """Handles on every sparse weight of a model, in module order; a layer that is used twice is listed once."""
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, SparseLayer):
            for key, _, _ in module.sparse_items():
                name = path if key == "values" else f"{path}.{key}"
                handles.append(SparseWeight(name.strip(".") or key, module, key))
    return handles
