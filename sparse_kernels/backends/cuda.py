"""The `cuda` backend: block-CSR products on the tensor cores of Volta to Hopper, csrc/cuda.

Linear, conv1d and conv2d are one family of kernels (implicit products over channels-last images); blocks of 16, 32 and
64, fp16 from sm_70 and bf16 from sm_80, sums in fp32. Values are rounded to the compute dtype once a call. Images that
are not channels-last are copied to that format and back.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from .. import _native
from ..activations import ACTIVATIONS
from ..patterns import Block
from ..topology import Deriver, WeightIndex
from ._cuda_config import ConvSizes, Device, product_config, sddmm_config
from ._cuda_index import ChunksDeriver, Orientation, orientation
from .registry import Backend, ConvGeometry, register

SIDES = (16, 32, 64)
# Numbers of CudaDtype in csrc/api.h, and the compute capability that each takes.
DTYPES = {torch.float16: (0, (7, 0)), torch.bfloat16: (1, (8, 0))}
# Of all that block_scores allocates, at most: panels of gradients and the scores.
SCORE_BYTES = 16 << 20


class CudaBackend(Backend):
    """CUDA C++ kernels with rows of blocks that share their pixels on chip."""

    name = "cuda"
    device_type = "cuda"

    def why_unavailable(self) -> str | None:
        reason = _native.why_unavailable()
        if reason is not None:
            return reason
        if not _native.native().cuda_built():
            return "built without nvcc; reinstall with SPARSE_KERNELS_CUDA=on and a CUDA toolkit"
        if not torch.version.cuda:
            return "torch is a CPU-only build; install a CUDA build of torch"
        reason = _native.native().cuda_why_unavailable()
        return None if reason is None else f"{reason}; needs an NVIDIA GPU and its driver"

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        if op == "gru":
            return "it has no gru kernel"
        if device.type != self.device_type:
            return f"it runs on {self.device_type}, not on {device.type}; move the layer and its input there"
        if pattern.bh not in SIDES or pattern.bw not in SIDES:
            return f"its blocks have sides of 16, 32 or 64, not {pattern.bh}x{pattern.bw}"
        if dtype not in DTYPES:
            return f"its kernels are float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; use autocast"
        least, found = DTYPES[dtype][1], self.capability(device)
        if found < least:
            name = str(dtype).removeprefix("torch.")
            remedy = "; use float16" if (7, 0) <= found else ""
            newer, this = (f"sm_{major}{minor}" for major, minor in (least, found))
            return f"{name} takes a GPU of {newer} or newer, and this one is {this}{remedy}"
        archs = self.architectures()
        # A GPU runs the newest code that is no newer than itself.
        if archs and max((arch for arch in archs if arch <= found), default=(0, 0)) < least:
            built = ", ".join(f"sm_{major}{minor}" for major, minor in archs)
            toolkit = " and a CUDA toolkit 12.x, the last that knows it" if found < (7, 5) else ""
            return (
                f"it was built for {built}, and this GPU is sm_{found[0]}{found[1]}; reinstall with "
                f"SPARSE_KERNELS_ARCHS={found[0]}{found[1]}{toolkit}"
            )
        return None

    def deriver(self, op: str, pattern: Block) -> Deriver | None:
        if op == "gru" or pattern.bh not in SIDES or pattern.bw not in SIDES:
            return None
        return ChunksDeriver(self.name, self.device_type)

    # What the emulation of the tests replaces.

    def library(self) -> ModuleType:
        """Where the launchers are."""
        return _native.native()

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of a GPU; (9, 9) where there is none to ask."""
        return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 9)

    def architectures(self) -> list[tuple[int, int]]:
        """The compute capabilities that the build has code for; none where it has no kernels at all."""
        return [] if _native.why_unavailable() is not None else _native.native().cuda_archs()

    def limits(self, device: torch.device) -> Device:
        """Its multiprocessors and shared memory."""
        return _limits(device.index if device.index is not None else torch.cuda.current_device())

    def stream(self, device: torch.device) -> int:
        """The stream that torch enqueues on."""
        return torch.cuda.current_stream(device).cuda_stream

    def current(self, device: torch.device) -> AbstractContextManager[object]:
        """Makes a GPU the one that launches go to: with several, torch's current one may be another."""
        return torch.cuda.device(device)

    # Primitives

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None = None,
        conv: ConvGeometry | None = None,
    ) -> Tensor:
        return self._product(x, values, index, conv, None, bias)[0]

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        like = dy.new_empty(dy.shape[0], 0) if x_like is None else x_like
        return self._product(dy, values, index, conv, like)[0]

    def product_forward(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None,
        activation: str,
        keep: bool,
        conv: ConvGeometry | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._product(x, values, index, conv, None, bias, ACTIVATIONS[activation].code, keep)

    def sddmm(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        dvalues = torch.empty(index.nnzb, index.bh, index.bw, dtype=torch.float32, device=x.device)
        if x.numel() == 0 or dy.numel() == 0:
            return dvalues.zero_()
        source, result, sizes = _image(x), _image(dy), _sizes(x, index, conv)
        where, native = self._index(index, False), self.library()
        config = sddmm_config(
            sizes, orientation(index, False), index, False, self.limits(x.device),
            lambda c: native.cuda_sddmm_shared_bytes(where, sizes, c),
        )  # fmt: skip
        space = _workspace(x, native.cuda_sddmm_workspace_bytes(where, sizes, config))
        with self.current(x.device):
            status = native.cuda_sddmm(
                where, sizes, config, DTYPES[x.dtype][0], result.data_ptr(), _strides(result), source.data_ptr(),
                _strides(source), dvalues.data_ptr(), space.data_ptr(), self.stream(x.device),
            )  # fmt: skip
        self._check(status, "cuda_sddmm")
        return dvalues

    def block_scores(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        forward = orientation(index, False)
        shape = (forward.rows, index.taps, forward.columns)
        if x.numel() == 0 or dy.numel() == 0:
            return torch.zeros(index.row_blocks, index.col_blocks, device=x.device)
        scores = torch.empty(shape, dtype=torch.float32, device=x.device)
        source, result, sizes = _image(x), _image(dy), _sizes(x, index, conv)
        where, native = self._index(index, False), self.library()
        config = sddmm_config(
            sizes, forward, index, True, self.limits(x.device),
            lambda c: native.cuda_sddmm_shared_bytes(where, sizes, c),
        )  # fmt: skip
        least = functools.partial(native.cuda_scores_workspace_bytes, where, sizes)
        room = max(0, SCORE_BYTES - _results_bytes(index, forward))
        while config.splits > 1 and least(config, forward.columns) > room:
            config = config._replace(splits=config.splits // 2)
        group = least(config, forward.columns)
        groups = -(-forward.rows // config.rows)
        space = _workspace(x, group * min(groups, room // group) if group else 0)
        with self.current(x.device):
            status = native.cuda_scores(
                where, sizes, config, forward.columns, DTYPES[x.dtype][0], result.data_ptr(), _strides(result),
                source.data_ptr(), _strides(source), scores.data_ptr(), space.data_ptr(), space.numel(),
                self.stream(x.device),
            )  # fmt: skip
        self._check(status, "cuda_scores")
        high, wide = index.bh // forward.side, index.bw // forward.side
        parts = scores.view(index.row_blocks, high, index.taps, index.cols_per_tap, wide)
        return parts.sum((1, 4)).view(index.row_blocks, index.col_blocks)

    def _product(
        self,
        source: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None,
        x_like: Tensor | None,
        bias: Tensor | None = None,
        activation: int = 0,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The forward product of `source`, or, with `x_like`, the input gradient; and what the activation was given."""
        transposed = x_like is not None
        channels = index.in_ if transposed else index.out
        given = x_like if x_like is not None else source
        if conv is None:
            shape = [source.shape[0], channels]
        elif transposed:
            shape = list(given.shape)
        else:
            shape = [source.shape[0], channels, *conv.output_size(source.shape[2], source.shape[3])]
        y = _like(source, shape)
        pre = _like(source, shape) if keep else y.new_empty(0)
        if y.numel() == 0:
            return y, pre
        sizes, image, result = _sizes(given, index, conv), _image(source), _image(y)
        forward, where, native = orientation(index, transposed), self._index(index, transposed), self.library()
        config = product_config(
            sizes, forward, transposed, self.limits(source.device),
            lambda c: native.cuda_product_shared_bytes(where, sizes, transposed, c),
        )  # fmt: skip
        space = _workspace(source, native.cuda_product_workspace_bytes(where, sizes, transposed, config))
        weights = _aligned(values.to(source.dtype))
        offset = None if bias is None else bias.float().contiguous()
        with self.current(source.device):
            status = native.cuda_product(
                where, sizes, transposed, config, DTYPES[source.dtype][0], weights.data_ptr(), image.data_ptr(),
                _strides(image), 0 if offset is None else offset.data_ptr(), activation, pre.data_ptr() if keep else 0,
                y.data_ptr(), _strides(result), space.data_ptr(), self.stream(source.device),
            )  # fmt: skip
        self._check(status, "cuda_product")
        return y, pre

    def _index(self, index: WeightIndex, transposed: bool) -> tuple[int, ...]:
        """`CudaIndex` of csrc/api.h: sizes and addresses, valid while `index` lives."""
        if len(index.derived) != 4:
            raise RuntimeError(
                f"backend {self.name!r} needs its derived index; call "
                f"topology.attach(backends.get({self.name!r}).deriver(op, pattern)) first."
            )
        start, entry = index.derived[2:] if transposed else index.derived[:2]
        sizes = orientation(index, transposed)
        result, source = (index.in_, index.out) if transposed else (index.out, index.in_)
        return (
            sizes.side, sizes.rows, sizes.chunks, sizes.chunk, index.bw, entry.shape[0], result, source,
            start.data_ptr(), entry.data_ptr(),
        )  # fmt: skip

    def _check(self, status: int, launcher: str) -> None:
        if status >= 1000:
            raise RuntimeError(f"{launcher}: {self.library().cuda_error_string(status)} (CUDA error {status - 1000}).")
        if status != 0:
            raise RuntimeError(f"{launcher}: the launcher returned status {status} (see Status in csrc/api.h).")


@functools.cache
def _limits(device: int) -> Device:
    found = _native.native().cuda_devices()[device]
    return Device(found["multiprocessors"], found["shared_bytes_per_block"])


def _like(x: Tensor, shape: list[int]) -> Tensor:
    """A result of `shape` on the device of `x`, channels-last where it is an image."""
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _image(x: Tensor) -> Tensor:
    """Rows `[P, C]` or images `[N, C, H, W]` whose channels lie side by side; a copy where they do not."""
    if x.dim() == 2:
        return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """`ImageStrides` of csrc/api.h; rows are one image of one row of pixels."""
    if x.dim() == 2:
        return 0, 1, 0, x.stride(0)
    return x.stride(0), 1, x.stride(2), x.stride(3)


def _sizes(x: Tensor, index: WeightIndex, conv: ConvGeometry | None) -> ConvSizes:
    """Sizes of the convolution of an image like `x`; rows are one image of height 1."""
    if conv is None:
        return ConvSizes(1, 1, x.shape[0], 1, x.shape[0], 1, 1, 1, 1, 0, 0, 1, 1)
    n, _, h, w = x.shape
    return ConvSizes(n, h, w, *conv.output_size(h, w), *conv.kernel, *conv.stride, *conv.padding, *conv.dilation)


def _workspace(x: Tensor, size_bytes: int) -> Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, device=x.device)


def _results_bytes(index: WeightIndex, forward: Orientation) -> int:
    """What `block_scores` allocates for results: the scores of sub-blocks and, summed from them, of blocks."""
    return 4 * (forward.rows * index.taps * forward.columns + index.row_blocks * index.col_blocks)


def _aligned(values: Tensor) -> Tensor:
    """Values side by side: kernels copy them 16 bytes at a time."""
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


register(CudaBackend())
