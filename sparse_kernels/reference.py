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
    return columns.view(n, c, taps, columns.shape[2]).permute(0, 3, 2, 1).flatten(0, 1).flatten(1)


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
    if n == 0:
        return rows.new_zeros(list(x_shape))
    taps = kernel[0] * kernel[1]
    columns = rows.view(n, -1, taps, c).permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(columns, (h, w), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`y [P, out] = x [P, in] · weightᵀ + bias`."""
    y = x @ weight.T
    return y if bias is None else y + bias


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """`dW [out, in] = dyᵀ [out, P] · x [P, in]`."""
    return dy.T @ x


def gru_step(
    gates_x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a GRU with gates (r, z, n), as `torch.nn.GRU` defines them.

    Source: torch.nn.GRU; Cho et al. 2014, in cuDNN's form (the reset gate multiplies after the product).

    Args:
        gates_x: input projection with its bias, `[B, 3H]`. h: previous state `[B, H]`. weight_hh: `[3H, H]`.

    Returns:
        The new state, then r, z, n and the recurrent part `q` of n before r multiplies it: all `[B, H]`.
    """
    xr, xz, xn = gates_x.chunk(3, dim=1)
    hr, hz, q = linear(h, weight_hh, bias_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * q)
    return (1 - z) * n + z * h, r, z, n, q


def gru_step_grad(dh: Tensor, h: Tensor, r: Tensor, z: Tensor, n: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `gru_step` in its pre-activations.

    Args:
        dh: gradient of the new state `[B, H]`. h: the previous state. r, z, n, q: as `gru_step` returned them.

    Returns:
        Gradients of `gates_x [B, 3H]`, of the recurrent product `[B, 3H]`, and the direct path to `h [B, H]`.
    """
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * q * r * (1 - r)
    return torch.cat([dr, dz, dn], dim=1), torch.cat([dr, dz, dn * r], dim=1), dh * z


def _live(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which steps of `x [B, T, F]` lie inside their sequence: bool `[B, T]`."""
    batch, steps, _ = x.shape
    if lengths is None:
        return x.new_ones(batch, steps, dtype=torch.bool)
    return torch.arange(steps, device=x.device)[None, :] < lengths[:, None]


def _direction(
    x: Tensor, h0: Tensor, live: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], direction: int
) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor]:
    """One direction of `gru`: states `[B, T, H]`, per step what its gradient needs (h, r, z, n, q), final `[B, H]`."""
    batch, steps, _ = x.shape
    weight_ih, weight_hh = weights[2 * direction : 2 * direction + 2]
    bias_ih, bias_hh = biases[2 * direction : 2 * direction + 2] if biases else (None, None)
    gates_x = linear(x.flatten(0, 1), weight_ih, bias_ih).unflatten(0, (batch, steps))
    h = h0[direction]
    states = x.new_zeros(batch, steps, h.shape[1])
    saved: list[tuple[Tensor, ...]] = [()] * steps
    for t in reversed(range(steps)) if direction else range(steps):
        here = live[:, t, None]
        new, *gates = gru_step(gates_x[:, t], h, weight_hh, bias_hh)
        saved[t] = (h, *gates)
        h = torch.where(here, new, h)
        states[:, t] = torch.where(here, h, 0.0)
    return states, saved, h


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
    live = _live(x, lengths)
    x = torch.where(live[..., None], x, 0.0)
    runs = [_direction(x, h0, live, weights, biases, direction) for direction in range(h0.shape[0])]
    return torch.cat([states for states, _, _ in runs], dim=2), torch.stack([final for _, _, final in runs])


def gru_grad(
    dy: Tensor,
    dh_n: Tensor,
    x: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Backpropagation through time of `gru`; nothing is saved, the forward runs again.

    Returns:
        Gradients of x, h0, each weight and each bias, in the shapes of `gru`'s arguments; zero past each length.
    """
    steps = x.shape[1]
    live = _live(x, lengths)
    x = torch.where(live[..., None], x, 0.0)
    dx, dh0 = torch.zeros_like(x), torch.zeros_like(h0)
    weight_grads = [torch.zeros_like(w) for w in weights]
    bias_grads = [torch.zeros_like(b) for b in biases]
    for direction in range(h0.shape[0]):
        _, saved, _ = _direction(x, h0, live, weights, biases, direction)
        ih, hh = 2 * direction, 2 * direction + 1
        dy_here = dy.chunk(h0.shape[0], dim=2)[direction]
        dh = dh_n[direction]
        for t in range(steps) if direction else reversed(range(steps)):
            here = live[:, t, None]
            through = torch.where(here, dh + dy_here[:, t], 0.0)
            d_input, d_recurrent, direct = gru_step_grad(through, *saved[t])
            weight_grads[ih] += weight_grad(d_input, x[:, t])
            weight_grads[hh] += weight_grad(d_recurrent, saved[t][0])
            if biases:
                bias_grads[ih] += d_input.sum(0)
                bias_grads[hh] += d_recurrent.sum(0)
            dx[:, t] += d_input @ weights[ih]
            dh = torch.where(here, direct + d_recurrent @ weights[hh], dh)
        dh0[direction] = dh
    return dx, dh0, weight_grads, bias_grads


def block_scores(blocks: Tensor) -> Tensor:
    """Squared Frobenius norm of each block of a dense gradient cut into `blocks [n, bh, bw]`: `[n]`."""
    return blocks.square().sum(dim=(1, 2))
