"""The paper's runs as a table; every entry of it is an option of the command line.

Nothing here imports torch, so that `--help` is quick.

Source: Oliveira, Mocanu, Leiva, "Sparse-to-Sparse Training of Diffusion Models", TMLR 2025, section 4 and appendix;
the ChiroDiff code for what the paper leaves open (clipping, EMA, split, data preparation).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sparsediff.registry import entry_names

if TYPE_CHECKING:
    MethodName: TypeAlias = str
    DatasetName: TypeAlias = str
    ModelName: TypeAlias = str
else:  # the choices of the command line are the files of these packages
    MethodName = Literal[tuple(entry_names("sparsediff.methods"))]
    DatasetName = Literal[tuple(entry_names("sparsediff.datasets"))]
    ModelName = Literal[tuple(entry_names("sparsediff.models"))]


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run."""

    # What is trained on what
    dataset: DatasetName = "kanjivg"
    """Data set, by its registered name."""
    data: str | None = None
    """File or folder of the data; the data set's own source if not given."""
    category: str | None = None
    """Category of a data set that has several (QuickDraw trains one model for each)."""
    limit: int | None = None
    """At most this many drawings."""
    resample: float | None = 0.05
    """Spacing of the points along a stroke, in radii of the drawing; None keeps the source's points."""
    rdp: float | None = None
    """Tolerance of the simplification after resampling, in radii of the drawing; None: off."""
    max_points: int = 300
    """Drawings of this many points or more are dropped."""
    scale: float | None = 10.0
    """Radius of a prepared drawing."""
    split: tuple[float, float, float] = (0.85, 0.075, 0.075)
    """Fractions of train, valid and test, where the source has no splits of its own."""
    on_bad: Literal["error", "skip"] = "error"
    """What happens to a drawing that cannot be used."""
    data_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """The data set's own options as KEY VALUE pairs, for example: variants base (kanjivg)."""

    # Images
    size: int | None = None
    """Height and width of the images after crop and resize; the data set's own if not given."""
    flip: float | None = None
    """Chance that an image is mirrored, afresh in every epoch; the data set's own if not given."""
    train_count: int | None = None
    """Images for training; 0: all that validation leaves. The data set's own number if not given."""
    valid_count: int | None = None
    """Images for validation; 0: none. The data set's own number if not given."""
    train_list: str | None = None
    """Text file that names the images for training, one a line."""
    valid_list: str | None = None
    """Text file that names the images for validation, one a line."""
    convert: bool = False
    """Use images with a palette, transparency, CMYK, 16 bits, several frames or an EXIF orientation, converted."""
    max_pixels: int = 64_000_000
    """Images of more pixels cannot be used."""
    latents: str | None = None
    """Folder that `sparsediff latents` made: train on these latents instead of images."""
    autoencoder: str | None = None
    """Folder of the autoencoder (VQ-f4). With it images are encoded in every step where no latents are given, and
    sample grids are decoded."""
    workers: int = 0
    """Processes that read images ahead; 0: none. They change no bit."""

    # Model
    model: ModelName = "chirodiff"
    """Model, by its registered name."""
    hidden: int = 96
    """Units of each direction of each GRU layer."""
    layers: int = 3
    """GRU layers."""
    form: Literal["delta", "position"] = "delta"
    """Whether steps or positions of the pen are diffused."""
    gru_form: Literal["packed", "padded"] = "padded"
    """How a dense GRU treats lengths; the same function at different speed."""
    unet: Literal["paper", "small"] = "paper"
    """Size of the U-Net: the paper's for 64x64 latents, or a small one for 32x32 pixels or latents."""

    # Diffusion
    timesteps: int = 1000
    """T."""
    schedule: Literal["linear", "scaled_linear"] = "linear"
    """Noise schedule."""
    beta_start: float = 1e-4
    """First beta."""
    beta_end: float = 2e-2
    """Last beta."""

    # Optimization
    epochs: int = 600
    """Passes over the training split."""
    batch_size: int = 128
    """Drawings a step; the rest of an epoch that fills no batch is dropped."""
    lr: float = 1e-3
    """AdamW's learning rate, constant."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    grad_clip: float = 0.1
    """Largest norm of the gradient; 0: no clipping."""
    ema_decay: float = 0.9999
    """Limit of the average's decay, which warms up as (1 + n) / (10 + n)."""
    micro_batches: int = 1
    """Parts that a batch is computed in, one after the other, their gradients accumulated: less memory, the same step
    but for rounding; growth scores (rigl) add up by part."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What products are computed in (autocast); parameters, their states and the average stay fp32. fp16 scales the
    loss and needs CUDA."""
    recompute: bool = False
    """Gradient checkpointing: the U-Net's blocks are computed again in the backward instead of kept. Less memory, a
    third more time."""

    # Sparsity
    method: MethodName = "dense"
    """Training method."""
    sparsity: float = 0.75
    """S: the fraction of the network's weights that is absent."""
    pattern: str = "block:16x16"
    """unstructured, or block:HxW with sides of 1, 4, 8, 16, 32, 64."""
    allocation: Literal["erk", "uniform", "flops"] = "erk"
    """How S is spread over the layers."""
    plan: str | None = None
    """Which layers run the sparse kernel and which the dense library: auto (the cost table of this kind of machine),
    measure (times both on the first batch), off (every sparse kernel there is), or the path of a run's plan.json.
    None is auto for a new run, and for a resumed one the plan that it was saved with; another choice than the saved
    one plans a resumed run anew."""
    rescale: bool = False
    """Widen the initial weights by 1/sqrt(density), for the fan-in that is lost."""
    every: int = 800
    """Delta T: steps between regrows (rigl, magran)."""
    drop: float = 0.05
    """p: the fraction of a layer's blocks that a regrow moves; the paper's main runs have 0.5, its best 0.05."""
    anneal: Literal["constant", "cosine"] = "constant"
    """How p develops until t_end."""
    t_end: float = 1.0
    """The fraction of the run after which the topology stays as it is."""
    state_policy: Literal["score", "mean", "zero", "keep"] = "score"
    """What the optimizer state of a grown weight begins with."""
    regrow_dropped: bool = False
    """Whether just dropped blocks may win their place back at once."""

    # Sampling while it trains
    sample_every: int = 1000
    """Steps between sample grids; 0: none."""
    sample_count: int = 36
    """Drawings of a grid."""
    sample_steps: int = 50
    """DDIM steps."""

    # The run
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0: torch's choice. The same number gives the same bits."""
    seed: int = 0
    """Seed of everything random."""
    out: str = "runs/train"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; begin it where there is none."""
    max_steps: int | None = None
    """Stop (with a checkpoint) after this many steps of the run."""
    max_seconds: float | None = None
    """Stop (with a checkpoint) after this many seconds of training."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    dry_run: bool = False
    """Show the settings, the model and the plan, and stop."""

    def __post_init__(self) -> None:
        """Raises ValueError, naming every setting that is out of range."""
        at_least_1 = """hidden layers timesteps epochs batch_size micro_batches every sample_count sample_steps
            max_steps log_every save_every keep""".split()  # noqa: SIM905
        positive = ["lr", "max_seconds"]
        not_negative = ["weight_decay", "grad_clip", "sample_every", "threads", "workers"]
        rules: list[tuple[str, bool, str]] = [
            *((name, _holds(getattr(self, name), lambda v: v >= 1), "at least 1") for name in at_least_1),
            *((name, _holds(getattr(self, name), lambda v: 0 < v < math.inf), "positive") for name in positive),
            *((name, getattr(self, name) >= 0, "at least 0") for name in not_negative),
            ("micro_batches", self.micro_batches <= self.batch_size, f"at most batch_size, {self.batch_size}"),
            ("precision", self.precision != "fp16" or self.device.startswith("cuda"), "fp32 or bf16 but on CUDA"),
            ("recompute", not self.recompute or self.model == "unet", "off but for a U-Net"),
            ("size", _holds(self.size, lambda v: v >= 1), "at least 1"),
            ("beta_start", 0 < self.beta_start < 1, "in (0, 1)"),
            ("beta_end", 0 < self.beta_end < 1, "in (0, 1)"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("sparsity", 0 <= self.sparsity < 1, "in [0, 1)"),
            ("drop", 0 < self.drop <= 1, "in (0, 1]"),
            ("t_end", 0 < self.t_end <= 1, "in (0, 1]"),
            (
                "sample_steps",
                not self.sample_every or self.sample_steps <= self.timesteps,
                f"at most timesteps, {self.timesteps}, or sample_every 0",
            ),
        ]
        wrong = [f"{name} must be {rule}; got {getattr(self, name)!r}" for name, holds, rule in rules if not holds]
        if wrong:
            raise ValueError(f"settings: {'. '.join(wrong)}.")

    def summary(self) -> str:
        """One line for help."""
        data = self.dataset + (f" ({self.category})" if self.category else "")
        size = f" {self.hidden}x{self.layers}" if self.model == "chirodiff" else f" ({self.unet})"
        return f"{self.model}{size} on {data}, {self.epochs} epochs"


def _holds(value: float | None, rule: Callable[[float], bool]) -> bool:
    return value is None or rule(value)


# Settings that do not change what is computed, or may: a resumed run need not repeat them.
# Data are told apart by their content.
RUN_SETTINGS = frozenset(
    """data latents autoencoder workers recompute device threads plan out resume dry_run epochs max_steps max_seconds
    log_every save_every keep sample_every sample_count sample_steps""".split()  # noqa: SIM905
)

# Settings that checkpoints of the first versions lack: their runs had the defaults.
LATER_SETTINGS = frozenset(
    """size flip train_count valid_count train_list valid_list convert max_pixels unet
    micro_batches precision""".split()  # noqa: SIM905
)

_LATENT = TrainConfig(
    model="unet",
    schedule="scaled_linear",
    beta_start=0.0015,
    beta_end=0.0195,
    epochs=150,
    batch_size=12,
    grad_clip=0.0,
    pattern="block:32x32",
    every=1100,
    sample_steps=100,
    sample_count=16,
)

PRESETS: dict[str, TrainConfig] = {
    "chirodiff-kanjivg": TrainConfig(dataset="kanjivg", hidden=96, layers=3, out="runs/kanjivg"),
    "chirodiff-quickdraw": TrainConfig(dataset="quickdraw", category="cat", hidden=128, layers=3, out="runs/quickdraw"),
    "chirodiff-vmnist": TrainConfig(dataset="vmnist", hidden=48, layers=2, out="runs/vmnist"),
    "ldm-celebahq": dataclasses.replace(_LATENT, dataset="celebahq", lr=2.0e-6, out="runs/celebahq"),
    "ldm-bedrooms": dataclasses.replace(_LATENT, dataset="lsun", lr=2.4e-5, out="runs/bedrooms"),
    "ldm-imagenette": dataclasses.replace(_LATENT, dataset="imagenette", lr=2.4e-5, out="runs/imagenette"),
    # Not the paper's: a small U-Net on pixels, or on latents of images of 128x128, for a laptop.
    "ldm-small": dataclasses.replace(
        _LATENT,
        dataset="emoji",
        size=32,
        unet="small",
        lr=1e-4,
        batch_size=32,
        ema_decay=0.999,
        pattern="block:16x16",
        every=100,
        sample_count=36,
        out="runs/small",
    ),
}


def differences(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of a saved run that `config` contradicts: name → (saved, given); run settings do not count."""
    given = dataclasses.asdict(config)
    names = [name for name in given if name not in RUN_SETTINGS]
    defaults = dataclasses.asdict(TrainConfig())
    saved = {**{name: defaults[name] for name in LATER_SETTINGS}, **saved}
    return {name: (saved.get(name), given[name]) for name in names if saved.get(name) != given[name]}
