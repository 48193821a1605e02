"""The index set of one block-sparse weight, in both orientations, rewritten in place at each regrow.

A weight `[out, taps * in]` (tap-major; `taps` is 1 for linear and GRU weights, `R * S` for convolutions) is cut into
`row_blocks x col_blocks` blocks, of which `nnzb` are active. A block keeps its *slot* in `values [nnzb, bh, bw]` for
its whole life; the sorted index arrays carry slot ids:

    crow [row_blocks + 1]   col   [nnzb]   slot   [nnzb]    by row:    block k of row r is (r, col[k]), in slot[k]
    ccol [col_blocks + 1]   row_t [nnzb]   slot_t [nnzb]    by column: block k of column c is (row_t[k], c)

all int32, on the weight's device. For 1x1 blocks `slot_t` is empty: a quarter of their index, and it follows from the
rest (`WeightIndex.slots_by_column`). Edge blocks are padded; the padding is zero and does not count as parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .index import WeightIndex
from .patterns import Block, Unstructured

__all__ = ["Deriver", "Topology", "WeightIndex"]


class Deriver(Protocol):
    """Fills a backend's own index buffers from a topology on a device of its type; their capacity depends on shapes
    and nnzb alone."""

    @property
    def name(self) -> str: ...
    @property
    def device_type(self) -> str: ...
    def capacity(self, topology: Topology) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]: ...
    def fill(self, topology: Topology, buffers: Mapping[str, Tensor]) -> None: ...


class Topology(nn.Module):
    """Index set of one weight `[out, taps * in]` with a fixed number of active blocks.

    Every change happens in place: no buffer changes its shape or address, so compiled code and captured graphs stay
    valid. `crow`, `col` and `slot` are saved in a state dict; the transposed view and the derived buffers are rebuilt.

    Args:
        out: output features. in_: input features (of one tap).
        pattern: how the weight is cut.
        rows: block rows of the active blocks, int64 `[nnzb]`, in slot order.
        cols: block columns likewise, in `[0, taps * ceil(in / bw))`.
        taps: kernel positions of a convolution; 1 otherwise.

    Raises:
        ValueError: where the coordinates are out of range or name a block twice.
    """

    crow: Tensor
    col: Tensor
    slot: Tensor
    ccol: Tensor
    row_t: Tensor
    slot_t: Tensor

    def __init__(self, out: int, in_: int, pattern: Block, rows: Tensor, cols: Tensor, *, taps: int = 1) -> None:
        super().__init__()
        if min(out, in_, taps) < 1:
            raise ValueError(f"Topology: out, in and taps must be positive; got out={out}, in={in_}, taps={taps}.")
        if rows.shape != cols.shape or rows.dim() != 1:
            raise ValueError(
                f"Topology: rows and cols must both be [nnzb]; got {list(rows.shape)} and {list(cols.shape)}."
            )
        self.out, self.in_, self.taps, self.pattern = out, in_, taps, pattern
        self.bh, self.bw = pattern.bh, pattern.bw
        self.row_blocks, self.cols_per_tap = pattern.grid(out, in_)
        self.col_blocks = taps * self.cols_per_tap
        self.nnzb = rows.numel()
        for name, ids, count in (("rows", rows, self.row_blocks), ("cols", cols, self.col_blocks)):
            if ids.numel() and not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < count:
                raise ValueError(
                    f"Topology: {name} must lie in 0..{count - 1} for {pattern} on [{out}, {taps}x{in_}]; "
                    f"got {int(ids.min())}..{int(ids.max())}."
                )
        self._derivers: dict[str, Deriver] = {}
        self._derived: dict[str, list[str]] = {}

        def buffer(name: str, size: int, persistent: bool) -> None:
            tensor = torch.empty(size, dtype=torch.int32, device=rows.device)
            self.register_buffer(name, tensor, persistent=persistent)

        buffer("crow", self.row_blocks + 1, True)
        buffer("col", self.nnzb, True)
        buffer("slot", self.nnzb, True)
        buffer("ccol", self.col_blocks + 1, False)
        buffer("row_t", self.nnzb, False)
        buffer("slot_t", 0 if pattern == Unstructured() else self.nnzb, False)
        self._write(rows.long(), cols.long())
        if not self.crow.is_meta:
            self.validate()

    # Constructors

    @classmethod
    def from_mask(cls, mask: Tensor, out: int, in_: int, pattern: Block, *, taps: int = 1) -> Topology:
        """From a bool `mask [row_blocks, col_blocks]` of the active blocks."""
        rows, cols = mask.nonzero(as_tuple=True)
        return cls(out, in_, pattern, rows, cols, taps=taps)

    @classmethod
    def full(cls, out: int, in_: int, pattern: Block, *, taps: int = 1, device: torch.device | None = None) -> Topology:
        """Every block active."""
        row_blocks, cols_per_tap = pattern.grid(out, in_)
        mask = torch.ones(row_blocks, taps * cols_per_tap, dtype=torch.bool, device=device)
        return cls.from_mask(mask, out, in_, pattern, taps=taps)

    @classmethod
    def random(
        cls,
        out: int,
        in_: int,
        pattern: Block,
        nnzb: int,
        *,
        taps: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Topology:
        """`nnzb` blocks drawn uniformly without replacement.

        The draw happens on the generator's device (the CPU by default), so that a seed gives one topology everywhere.
        """
        row_blocks, cols_per_tap = pattern.grid(out, in_)
        total = row_blocks * taps * cols_per_tap
        _check_count(nnzb, total)
        where = generator.device if generator is not None else torch.device("cpu")
        flat = torch.randperm(total, generator=generator, device=where)[:nnzb].sort().values.to(device or "cpu")
        col_blocks = taps * cols_per_tap
        return cls(out, in_, pattern, flat // col_blocks, flat % col_blocks, taps=taps)

    @classmethod
    def by_magnitude(cls, dense: Tensor, in_: int, pattern: Block, nnzb: int, *, taps: int = 1) -> Topology:
        """The `nnzb` blocks of `dense [out, taps * in]` with the largest norm (RMS over real elements); ties go to
        the lower index."""
        out = dense.shape[0]
        whole = cls.full(out, in_, pattern, taps=taps, device=dense.device)
        _check_count(nnzb, whole.nnzb)
        rms = whole.block_rms(whole.gather(dense.detach().float()))
        flat = rms.sort(descending=True, stable=True).indices[:nnzb].sort().values
        return cls(out, in_, pattern, flat // whole.col_blocks, flat % whole.col_blocks, taps=taps)

    # Sizes

    @property
    def shape(self) -> list[int]:
        """`[out, in, taps, bh, bw]`: the scalars that cross the dispatcher beside `index()`."""
        return [self.out, self.in_, self.taps, self.bh, self.bw]

    @property
    def numel(self) -> int:
        """Real elements of the dense weight."""
        return self.out * self.taps * self.in_

    @property
    def nnz(self) -> int:
        """Real elements of the active blocks, padding left out.

        On the meta device no block has a place yet; each counts as the mean of all places.
        """
        if self.out % self.bh == 0 and self.in_ % self.bw == 0:
            return self.nnzb * self.bh * self.bw
        if self.crow.is_meta:
            return round(self.nnzb * self.numel / (self.row_blocks * self.col_blocks))
        heights, widths = self.weight_index().block_areas()
        rows, cols = self.coords()
        return int((heights[rows] * widths[cols]).sum())

    @property
    def density(self) -> float:
        """Fraction of the weight's real elements that is present."""
        return self.nnz / self.numel

    @property
    def sparsity(self) -> float:
        """Fraction of the weight's real elements that is absent."""
        return 1.0 - self.density

    # Views

    def weight_index(self, backend: str | None = None) -> WeightIndex:
        """The index as the object that backends take."""
        return WeightIndex.unpack(self.index(backend), self.shape)

    def index(self, backend: str | None = None) -> list[Tensor]:
        """`[crow, col, slot, ccol, row_t, slot_t]` and then the buffers derived for `backend`, if it has any here."""
        derived = [getattr(self, name) for name in self._derived.get(backend, ())] if backend is not None else []
        return [self.crow, self.col, self.slot, self.ccol, self.row_t, self.slot_t, *derived]

    def coords(self) -> tuple[Tensor, Tensor]:
        """Block row and block column of every slot: two int64 tensors `[nnzb]`."""
        return self.weight_index().coords()

    def mask(self) -> Tensor:
        """Which blocks are active: bool `[row_blocks, col_blocks]`."""
        rows, cols = self.coords()
        mask = torch.zeros(self.row_blocks, self.col_blocks, dtype=torch.bool, device=rows.device)
        mask[rows, cols] = True
        return mask

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight `[out, taps * in]` of `values [nnzb, bh, bw]`; differentiable."""
        return self.weight_index().scatter(values)

    def gather(self, dense: Tensor) -> Tensor:
        """The active blocks `[nnzb, bh, bw]` of a dense `[out, taps * in]`, padding zero; differentiable."""
        return self.weight_index().gather(dense)

    def block_rms(self, values: Tensor) -> Tensor:
        """Root mean square over the real elements of each active block: `[nnzb]`, by slot."""
        heights, widths = self.weight_index().block_areas()
        rows, cols = self.coords()
        return (values.detach().square().sum(dim=(1, 2)) / (heights[rows] * widths[cols])).sqrt()

    # Changes, in place

    def rewrite(self, slots: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Moves the blocks in `slots` to new coordinates; every other block keeps its slot and place.

        Args:
            slots: distinct slot ids, int64 `[k]`. rows: their new block rows, int64 `[k]`. cols: block columns `[k]`.
        """
        old_rows, old_cols = self.coords()
        self._write(old_rows.index_copy(0, slots, rows), old_cols.index_copy(0, slots, cols))

    def attach(self, deriver: Deriver) -> None:
        """Registers a backend's derived buffers (non-persistent, fixed capacity) and fills them; idempotent.

        A later move to a device of another type than the deriver's forgets them.

        Raises:
            ValueError: where the topology lies on a device of another type.
        """
        if deriver.name in self._derivers:
            return
        if self.crow.device.type != deriver.device_type:
            raise ValueError(
                f"Topology.attach: deriver {deriver.name!r} serves {deriver.device_type}, and this topology is on "
                f"{self.crow.device}; move it first."
            )
        names = []
        for buffer, (shape, dtype) in deriver.capacity(self).items():
            name = f"{deriver.name}_{buffer}"
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self.crow.device), persistent=False)
            names.append(name)
        self._derivers[deriver.name] = deriver
        self._derived[deriver.name] = names
        self._fill(deriver)

    def release(self, device_type: str | None = None) -> None:
        """Forgets every derived buffer, or those that a move to a device of `device_type` makes meaningless."""
        for name, deriver in list(self._derivers.items()):
            if deriver.device_type == device_type:
                continue
            for buffer in self._derived.pop(name):
                delattr(self, buffer)
            del self._derivers[name]

    def refresh(self) -> None:
        """Rebuilds the transposed view and every derived buffer from `crow`, `col`, `slot` (regrow, load, move)."""
        if self.crow.is_meta:
            return
        rows, cols = self.coords()
        keys, order = (cols * self.row_blocks + rows).sort()
        self.ccol.copy_(_pointers(keys, self.col_blocks, self.row_blocks))
        self.row_t.copy_(rows[order])
        if self.slot_t.shape == order.shape:
            self.slot_t.copy_(order)
        for deriver in self._derivers.values():
            self._fill(deriver)

    def _write(self, rows: Tensor, cols: Tensor) -> None:
        """Writes both views for the coordinates `rows`, `cols` given in slot order."""
        if self.crow.is_meta:
            return
        keys, order = (rows * self.col_blocks + cols).sort()
        self.crow.copy_(_pointers(keys, self.row_blocks, self.col_blocks))
        self.col.copy_(cols[order])
        self.slot.copy_(order)
        self.refresh()

    def _fill(self, deriver: Deriver) -> None:
        prefix = len(deriver.name) + 1
        deriver.fill(self, {name[prefix:]: getattr(self, name) for name in self._derived[deriver.name]})

    # Validation, loading, moving

    def validate(self) -> None:
        """Checks every invariant of the index set.

        Raises:
            ValueError: naming the array and what is wrong with it.
        """
        error = _why_invalid(self.crow, self.col, self.slot, self.row_blocks, self.col_blocks)
        if error is None:
            rows, cols = self.coords()
            keys, order = (cols * self.row_blocks + rows).sort()
            same = (
                torch.equal(self.ccol.long(), _pointers(keys, self.col_blocks, self.row_blocks))
                and torch.equal(self.row_t.long(), rows[order])
                and torch.equal(self.weight_index().slots_by_column().long(), order)
            )
            error = None if same else "the transposed view (ccol, row_t, slot_t) is not the same set of blocks"
        if error is not None:
            raise ValueError(f"Topology [{self.out}, {self.taps}x{self.in_}] {self.pattern}: {error}.")

    def why_not_load(self, crow: Tensor | None, col: Tensor | None, slot: Tensor | None) -> str | None:
        """Why saved index arrays cannot replace this topology's; None where they can, or where none is given."""
        given = {"crow": crow, "col": col, "slot": slot}
        absent = [name for name, tensor in given.items() if tensor is None]
        if absent:
            return None if len(absent) == len(given) else f"an index is loaded whole; {', '.join(absent)} is missing"
        for name, tensor in given.items():
            own = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                return f"{name} must be an int32 tensor; got {got}"
            if tensor.shape != own.shape:
                return f"{name} must be {list(own.shape)} (nnzb={self.nnzb}); got {list(tensor.shape)}"
        assert crow is not None and col is not None and slot is not None
        if crow.is_meta:
            return None
        return _why_invalid(crow, col, slot, self.row_blocks, self.col_blocks)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A broken index must not reach a kernel: it is refused before anything is copied.
        error_msgs: list[str] = args[-1]
        given = [state_dict.get(prefix + name) for name in ("crow", "col", "slot")]
        error = self.why_not_load(*given)
        if error is not None:
            error_msgs.append(f"{prefix[:-1]}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if given[0] is not None:
            self._settle()
            self.refresh()

    def _settle(self) -> None:
        # load_state_dict(assign=True) exchanges the saved arrays for others, of another dtype or device perhaps.
        for name in ("crow", "col", "slot"):
            setattr(self, name, getattr(self, name).to(torch.int32))
        for name in ("ccol", "row_t", "slot_t"):
            if getattr(self, name).device != self.crow.device:
                setattr(self, name, torch.empty_like(getattr(self, name), device=self.crow.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Topology:
        before = self.crow
        # Kernels of the old device must not be handed addresses of the new one.
        self.release(fn(before[:0]).device.type)
        # Module.type() casts every buffer; an index stays what kernels read.
        super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)
        if before.is_meta and not self.crow.is_meta:
            # There is no content before a state dict is loaded; until then every row is empty, not arbitrary.
            for tensor in self.index():
                tensor.zero_()
        elif not self.crow.is_meta and self.crow.data_ptr() != before.data_ptr():
            self.refresh()
        return self

    def extra_repr(self) -> str:
        taps = f"{self.taps} taps, " if self.taps > 1 else ""
        return f"{self.out}x{self.in_}, {taps}{self.pattern}, nnzb={self.nnzb} of {self.row_blocks * self.col_blocks}"


def _check_count(nnzb: int, total: int) -> None:
    if not 0 <= nnzb <= total:
        raise ValueError(f"Topology: nnzb must lie in 0..{total} (the number of blocks); got {nnzb}.")


def _pointers(keys: Tensor, count: int, width: int) -> Tensor:
    """Where each of `count` runs of `width` consecutive key values starts in the sorted `keys`: `[count + 1]`."""
    return torch.searchsorted(keys, torch.arange(count + 1, device=keys.device) * width)


def _why_invalid(crow: Tensor, col: Tensor, slot: Tensor, row_blocks: int, col_blocks: int) -> str | None:
    nnzb = col.numel()
    crow, col, slot = crow.long(), col.long(), slot.long()
    counts = crow[1:] - crow[:-1]
    if int(crow[0]) != 0 or int(crow[-1]) != nnzb or bool((counts < 0).any()):
        got = f"{int(crow[0])} … {int(crow[-1])}, lowest step {int(counts.min())}"
        return f"crow must rise from 0 to nnzb={nnzb}; got {got}"
    if nnzb == 0:
        return None
    if int(col.min()) < 0 or int(col.max()) >= col_blocks:
        return f"col must lie in 0..{col_blocks - 1}; got {int(col.min())}..{int(col.max())}"
    rows = torch.repeat_interleave(torch.arange(row_blocks, device=col.device), counts)
    keys = rows * col_blocks + col
    if bool((keys[1:] <= keys[:-1]).any()):
        return "col must be sorted and unique within each row"
    if not torch.equal(slot.sort().values, torch.arange(nnzb, device=slot.device)):
        return f"slot must be a permutation of 0..{nnzb - 1}"
    return None
