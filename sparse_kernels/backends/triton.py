"""The `triton` backend: linear and convolution of blocks with sides from 16 on NVIDIA GPUs of sm_80 and later.

One family of implicit GEMMs over channels-last activations (`sparse_kernels.triton_kernels`) in bf16, fp16 and fp32
(tf32 where torch's own ops would take it), sums in fp32, bias and activation in the epilogue. Values are cast to the
compute dtype once a call. Which launch is read from a table (`_triton_config`); nothing is tuned at import.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..patterns import Block
from ..row_groups import RowGroupsDeriver
from ..topology import Deriver, WeightIndex
from . import _triton_config, _triton_launch
from .registry import Backend, ConvGeometry, register

SIDES = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)  # compute capability with bf16 and cp.async


class TritonBackend(Backend):
    """Sparse kernels for Ampere, Hopper and later."""

    name = "triton"

    def why_unavailable(self) -> str | None:
        return _why_unavailable()

    def why_unsupported(self, op: str, *, pattern: Block, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda" and not (device.type == "cpu" and _triton_launch.interpreting()):
            return f"it runs on NVIDIA GPUs, not on {device.type}; move the layer and its input with .to('cuda')"
        if op == "gru":
            return "it has no GRU kernels"
        if pattern.bh not in SIDES or pattern.bw not in SIDES:
            sides = ", ".join(map(str, SIDES))
            return f"its blocks have sides of {sides}, which tensor cores multiply whole; not {pattern}"
        if dtype not in DTYPES:
            served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"its kernels are {served}, not {str(dtype).removeprefix('torch.')}"
        return _too_old(device)

    def deriver(self, op: str, pattern: Block) -> Deriver | None:
        if op == "gru":
            return None
        where = "cpu" if _triton_launch.interpreting() else "cuda"
        return RowGroupsDeriver(self.name, where, *_triton_config.group_sizes(op, pattern))

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        index: WeightIndex,
        bias: Tensor | None = None,
        conv: ConvGeometry | None = None,
    ) -> Tensor:
        return _triton_launch.product(x, values.to(x.dtype), index, bias, conv)[0]

    def spmm_t(
        self,
        dy: Tensor,
        values: Tensor,
        index: WeightIndex,
        conv: ConvGeometry | None = None,
        x_like: Tensor | None = None,
    ) -> Tensor:
        return _triton_launch.product(dy, values.to(dy.dtype), index, None, conv, x_like, transposed=True)[0]

    def sddmm(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        return _triton_launch.sddmm(dy, x, index, conv)

    def block_scores(self, dy: Tensor, x: Tensor, index: WeightIndex, conv: ConvGeometry | None = None) -> Tensor:
        return _triton_launch.block_scores(dy, x, index, conv)

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
        values = values.to(x.dtype)
        return _triton_launch.product(x, values, index, bias, conv, activation=activation, keep=keep)


@functools.cache
def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (torch's CUDA builds for Linux bring it)"
    if _triton_launch.interpreting():
        return None
    if torch.version.hip:
        return "it is for NVIDIA GPUs and this torch is built for ROCm; use execution='densified'"
    if not torch.version.cuda:
        return "this torch is a CPU-only build; install a CUDA build of torch, on a machine with an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU with a working driver was found (see nvidia-smi); use execution='cpu'"
    devices = [torch.device("cuda", ordinal) for ordinal in range(torch.cuda.device_count())]
    reasons = [_too_old(device) for device in devices]
    return None if None in reasons else reasons[0]


def _too_old(device: torch.device) -> str | None:
    """Why a GPU is older than the kernels; None where it is not."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= OLDEST:
        return None
    return (
        f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere) and {torch.cuda.get_device_name(device)} has "
        f"{major}.{minor}; use execution='cuda' or 'densified'"
    )


register(TritonBackend())
