"""ChiroDiff: a bidirectional GRU that predicts the noise of a drawing, point by point.

    input   [B, T, 13] = position ‖ velocity ‖ time embedding         (5 + 8)
    h       [B, T, 2H] = GRU(13, H, layers, bidirectional)(input)
    eps     [B, T, 3]  = Linear(H + 8 → 3)(Linear(2H → H)(h) ‖ time embedding)

A drawing is `[n, 3]`: two coordinates and the pen bit, which diffuses as a real number. In the *delta* form the
coordinates are steps and the position is their running sum; in the *position* form they are positions and the
velocity is their difference. Either way the other half is recomputed from the noisy drawing at every denoising step.

Layers are plain torch.nn modules; `sparse_kernels.nn.sparsify` exchanges them, and the forward hands lengths to
whichever GRU it finds.

Source: Das et al., "ChiroDiff: Modelling chirographic data with Diffusion Models", ICLR 2023, section 3.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sparsediff.models import MODELS

FEATURES = 3  # x, y, pen
TIME_FEATURES = 8
TIME_SCALE = 4.0

Form = Literal["delta", "position"]
GRUForm = Literal["packed", "padded"]


@MODELS.register("chirodiff")
class ChiroDiff(nn.Module):
    """The noise predictor of ChiroDiff.

    Args:
        hidden: H, units of each direction of each GRU layer.
        layers: number of GRU layers.
        form: what the first two features of a point are, "delta" or "position".
        timesteps: T, the diffusion's number of steps, which the time embedding divides by.
        gru_form: how a dense `nn.GRU` treats lengths: "packed" (PackedSequence) or "padded" (padded sequences, the
            reverse direction flipped within each length). Same function, different speed; a SparseGRU ignores it.
        seed: seed of the initial weights; None takes torch's global generator.
    """

    time_weight: Tensor

    def __init__(
        self,
        hidden: int = 96,
        layers: int = 3,
        *,
        form: Form = "delta",
        timesteps: int = 1000,
        gru_form: GRUForm = "packed",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if form not in ("delta", "position"):
            raise ValueError(f"form must be 'delta' or 'position'; got {form!r}.")
        if gru_form not in ("packed", "padded"):
            raise ValueError(f"gru_form must be 'packed' or 'padded'; got {gru_form!r}.")
        self.form = form
        self.timesteps = timesteps
        self.gru_form = gru_form
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.gru = nn.GRU(5 + TIME_FEATURES, hidden, layers, batch_first=True, bidirectional=True)
            self.hidden = nn.Linear(2 * hidden, hidden)
            self.output = nn.Linear(hidden + TIME_FEATURES, FEATURES)
            self.register_buffer("time_weight", torch.randn(TIME_FEATURES // 2, 1))

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        """Predicts the noise in `x`.

        Args:
            x: noisy drawings `[B, T, 3]`, padded at the end; the padding's content does not matter.
            t: timesteps `[B]`, integers in [0, timesteps).
            lengths: points of each drawing `[B]`, int32 or int64, on x's device.

        Returns:
            eps `[B, T, 3]`; rows past a drawing's length are unspecified.
        """
        if x.dim() != 3 or x.shape[2] != FEATURES:
            raise ValueError(f"ChiroDiff: x must be [B, T, {FEATURES}]; got {list(x.shape)}.")
        time = time_embedding(t, self.time_weight, self.timesteps)[:, None].expand(-1, x.shape[1], -1)  # [B, T, 8]
        h = run_gru(self.gru, torch.cat([*features(x, self.form), time], -1), lengths, self.gru_form)
        return self.output(torch.cat([self.hidden(h), time], -1))

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of a forward of `batch` drawings of 64 points, for whoever has to see one run."""
        device = self.time_weight.device
        lengths = torch.full((batch,), 64, dtype=torch.int32, device=device)
        t = torch.zeros(batch, dtype=torch.long, device=device)
        return torch.zeros(batch, 64, FEATURES, device=device), t, lengths


def features(x: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Position and velocity of noisy drawings `[B, T, 3]`: (2 + 3) features in the delta form, (3 + 2) in the other.

    Source: ChiroDiff, section 3.2.
    """
    if form == "delta":
        return x[..., :2].cumsum(1), x
    return x, torch.diff(x[..., :2], dim=1, prepend=x.new_zeros(x.shape[0], 1, 2))


def time_embedding(t: Tensor, weight: Tensor, timesteps: int) -> Tensor:
    """Random Fourier features `[sin, cos](2π · 4 · W · t/T)`: `[B]` integers and W `[4, 1]` to `[B, 8]`.

    Source: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", NeurIPS 2020, with scale 4.
    """
    angle = t.to(weight.dtype)[:, None] * weight[:, 0] * (2 * math.pi * TIME_SCALE / timesteps)  # [B, 4]
    return torch.cat([angle.sin(), angle.cos()], -1)


def run_gru(gru: nn.Module, x: Tensor, lengths: Tensor, form: GRUForm = "packed") -> Tensor:
    """Output `[B, T, 2H]` of a bidirectional GRU over padded sequences `[B, T, F]`, zero past each length.

    `gru` is an `nn.GRU`, run in the given form, or a layer that takes lengths itself (SparseGRU).
    """
    if not isinstance(gru, nn.GRU):
        return gru(x, lengths=lengths)[0]
    if x.is_meta:  # lengths have no content there: every row counts
        return gru(x)[0]
    # The padded form goes around the module's own forward, where hooks would miss it.
    if form == "packed" or gru._forward_hooks:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=x.shape[1])[0]
    return _padded_gru(gru, x, lengths)


def _padded_gru(gru: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    # Packed sequences run step by step on a shrinking batch, which makes their backward slow on CPUs. Here every
    # layer runs both directions over the whole padding, the reverse one on sequences flipped within their lengths.
    B, T, _ = x.shape
    steps = torch.arange(T, device=x.device)[:, None]  # [T, 1]
    inside = steps < lengths  # [T, B]
    flip = torch.where(inside, lengths - 1 - steps, steps) * B + torch.arange(B, device=x.device)  # row of [T * B]
    flip = flip.flatten()
    y = x.transpose(0, 1)  # time first
    h0 = x.new_zeros(1, B, gru.hidden_size)
    for layer in range(gru.num_layers):
        forward, reverse = (
            [getattr(gru, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            for suffix in ("", "_reverse")
        )
        ahead = torch.gru(y, h0, forward, True, 1, 0.0, gru.training, False, False)[0]
        back = torch.gru(_Permute.apply(y, flip), h0, reverse, True, 1, 0.0, gru.training, False, False)[0]
        y = torch.cat([ahead, _Permute.apply(back, flip)], -1)
    return (y * inside[..., None]).transpose(0, 1)


class _Permute(torch.autograd.Function):
    """Rows of `[T, B, F]` in the order of an involution; its own backward, where index_select's would be a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.flatten(0, 1).index_select(0, order).view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return dy.flatten(0, 1).index_select(0, order).view_as(dy), None
