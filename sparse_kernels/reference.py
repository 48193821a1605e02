"""What every op means, in dense torch, on any device and in any dtype (fp64 for the tests).

Weights are dense matrices `[out, taps * in]`, tap-major: column `tap * in + i` multiplies input feature `i` at kernel
position `tap`. A sparse op is its dense line with an absent block read as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def gather(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """`x [N, C, H, W]` → the rows that a convolution multiplies: `[N·H'·W', R·S·C]`, tap-major."""
    n, c = x.shape[:2]
    taps = kernel[0] * kernel[1]
    columns = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))  # [N, C·taps, H'·W']
    return columns.view(n, c, taps, -1).permute(0, 3, 2, 1).reshape(-1, taps * c)


def scatter(
    rows: Tensor,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The adjoint of `gather`: `[N·H'·W', R·S·C]` is summed back into `[N, C, H, W]`."""
    n, c, h, w = x_shape
    taps = kernel[0] * kernel[1]
    columns = rows.view(n, -1, taps, c).permute(0, 3, 2, 1).reshape(n, c * taps, -1)
    return F.fold(columns, (h, w), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`y [P, out] = x [P, in] · weightᵀ + bias`."""
    y = x @ weight.T
    return y if bias is None else y + bias


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """`dW [out, in] = dyᵀ [out, P] · x [P, in]`."""
    return dy.T @ x


def gru_step(gates_x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
    """One step of a GRU with gates (r, z, n), as `torch.nn.GRU` defines them.

    Source: torch.nn.GRU; Cho et al. 2014, in cuDNN's form (the reset gate multiplies after the product).

    Args:
        gates_x: input projection with its bias, `[B, 3H]`. h: previous state `[B, H]`. weight_hh: `[3H, H]`.
    """
    xr, xz, xn = gates_x.chunk(3, dim=1)
    hr, hz, hn = linear(h, weight_hh, bias_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (1 - z) * n + z * h


def gru(
    x: Tensor, h0: Tensor, lengths: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One GRU layer over padded sequences; what lies past a sequence's length is neither read nor used.

    Args:
        x: `[B, T, F]`. h0: `[D, B, H]`. lengths: int `[B]` or None for T everywhere.
        weights: dense `[ih, hh]` of each direction, flattened; the second direction starts at each sequence's end.
        biases: likewise, or empty.

    Returns:
        `y [B, T, D·H]`, zero past each length, and `h_n [D, B, H]`.
    """
    batch, steps, _ = x.shape
    if lengths is None:
        lengths = torch.full((batch,), steps, device=x.device)
    inside = torch.arange(steps, device=x.device)[None, :] < lengths[:, None]  # [B, T]
    x = torch.where(inside[..., None], x, x.new_zeros(()))
    outputs, finals = [], []
    for direction in range(h0.shape[0]):
        weight_ih, weight_hh = weights[2 * direction : 2 * direction + 2]
        bias_ih, bias_hh = biases[2 * direction : 2 * direction + 2] if biases else (None, None)
        gates_x = linear(x.reshape(batch * steps, -1), weight_ih, bias_ih).view(batch, steps, -1)
        h = h0[direction]
        states: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if direction else range(steps):
            live = inside[:, t, None]
            h = torch.where(live, gru_step(gates_x[:, t], h, weight_hh, bias_hh), h)
            states[t] = torch.where(live, h, torch.zeros_like(h))
        outputs.append(torch.stack(states, dim=1) if steps else x.new_zeros(batch, 0, h.shape[1]))
        finals.append(h)
    return torch.cat(outputs, dim=2), torch.stack(finals)


def block_scores(blocks: Tensor) -> Tensor:
    """Squared Frobenius norm of each block of a dense gradient cut into `blocks [n, bh, bw]`: `[n]`."""
    return blocks.square().sum(dim=(1, 2))
