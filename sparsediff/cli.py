"""The command line: `sparsediff train | sample | latents | account | convert | demo | doctor`.

Exit codes: 0 done; 1 failed, with a message on stderr; 2 wrong usage; 130 and 143 stopped by Ctrl-C and SIGTERM, after
saving.

Nothing here imports torch before a command runs, so that help is quick.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from sparsediff import __version__
from sparsediff.allocator import keep_freed_memory
from sparsediff.presets import PRESETS, MethodName, TrainConfig
from sparsediff.registry import entry_names

if TYPE_CHECKING:
    PresetName: TypeAlias = str
    ChiroDiffPresetName: TypeAlias = str
else:
    PresetName = Literal[tuple(PRESETS)]
    ChiroDiffPresetName = Literal[tuple(name for name, preset in PRESETS.items() if preset.model == "chirodiff")]

Command = Callable[[Sequence[str]], int]
FLAGS = (tyro.conf.FlagCreatePairsOff,)  # --resume, without a --no-resume


@dataclass(frozen=True)
class SampleConfig:
    """Draws samples from a checkpoint and saves their picture."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, or a run's folder, whose newest one is taken."""
    n: int = 64
    """Number of drawings or images."""
    steps: int = 50
    """DDIM steps."""
    out: Path = Path("samples.png")
    """The picture (.png); a file that ends in .npz gets the drawings themselves (points [N, 3], offsets [n + 1]), or
    the images ([n, H, W, 3]); a name without a suffix is a folder that gets a PNG for every sample."""
    autoencoder: Path | None = None
    """Folder of the autoencoder that decodes latents; that of the run if not given."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddpm visits every timestep of the diffusion."""
    eta: float = 0.0
    """DDIM's eta: 0 is deterministic, 1 has DDPM's variance."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged parameters, or those of the last step."""
    seed: int = 0
    """Drawing i has the seed seed + i, whatever n is."""
    batch_size: int = 128
    """Drawings a forward."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


@dataclass(frozen=True)
class AccountConfig:
    """Counts parameters, FLOPs and memory of a preset beside its dense twin; what is not given is the preset's."""

    preset: Annotated[PresetName, tyro.conf.Positional]
    """The preset."""
    method: MethodName | None = None
    """Training method."""
    sparsity: float | None = None
    """S: the fraction of the network's weights that is absent."""
    allocation: Literal["erk", "uniform", "flops"] | None = None
    """How S is spread over the layers."""
    pattern: str | None = None
    """unstructured, or block:HxW."""
    every: int | None = None
    """Delta T: steps between regrows, for rigl's training FLOPs."""
    sample_steps: int | None = None
    """Denoising steps of one sample."""
    epochs: int | None = None
    """Passes over the training split."""
    batch_size: int | None = None
    """Samples a step."""
    samples: int | None = None
    """Samples of the training split; the published run's where there is one."""
    json: bool = False
    """Print JSON instead of the table."""


@dataclass(frozen=True)
class ConvertConfig:
    """Converts models: CompVis's .ckpt, folders of diffusers, checkpoints of ours; ChiroDiff's into ours."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .ckpt file, a folder of diffusers, a checkpoint, or a run's folder, whose newest one is taken."""
    target: Annotated[Path, tyro.conf.Positional]
    """What is made; it must not exist."""
    to: Literal["ckpt", "diffusers", "checkpoint"] | None = None
    """What the target becomes; one that ends in .ckpt says so itself."""
    weights: Literal["ema", "model"] = "ema"
    """What a folder of diffusers gets: averaged parameters, or those of the last step."""
    head_dim: int = 32
    """Channels of an attention head, which a .ckpt does not tell."""
    size: int = 64
    """Height and width of the U-Net's input, which a .ckpt does not tell."""
    dense: bool = False
    """Write absent weights as zeros, without masks."""
    zeros: str | None = None
    """Take blocks of zeros for absent: unstructured, or block:HxW; for sources without masks."""
    preset: ChiroDiffPresetName = "chirodiff-kanjivg"
    """For ChiroDiff's checkpoints: settings that they do not hold."""
    data: str | None = None
    """For ChiroDiff's checkpoints: file or folder of the data, whose lengths sampling draws from."""


def train(args: Sequence[str]) -> int:
    """Trains a preset; every value of it is an option."""
    presets = tyro.extras.subcommand_type_from_defaults(
        dict(PRESETS), {name: preset.summary() for name, preset in PRESETS.items()}
    )
    config: TrainConfig = tyro.cli(presets, args=args, prog="sparsediff train", config=FLAGS)
    from sparsediff.train import describe, start

    if config.dry_run:
        print(describe(config))
        return 0
    keep_freed_memory()
    return start(config)


def sample(args: Sequence[str]) -> int:
    """Draws samples from a checkpoint."""
    config = tyro.cli(SampleConfig, args=args, prog="sparsediff sample")
    from sparsediff.sampling import sample_checkpoint

    print(sample_checkpoint(**dataclasses.asdict(config)))
    return 0


def latents(args: Sequence[str]) -> int:
    """Encodes a data set of images once."""
    from sparsediff.latents import LATENTS, LatentsConfig, run

    sources = tyro.extras.subcommand_type_from_defaults(
        dict(LATENTS), {name: source.summary() for name, source in LATENTS.items()}
    )
    config: LatentsConfig = tyro.cli(sources, args=args, prog="sparsediff latents", config=FLAGS)
    return run(config)


def account(args: Sequence[str]) -> int:
    """Counts what a preset costs."""
    options = vars(tyro.cli(AccountConfig, args=args, prog="sparsediff account", config=FLAGS)).copy()
    from sparsediff.account import run

    print(run(options.pop("preset"), as_json=options.pop("json"), **options))
    return 0


def convert(args: Sequence[str]) -> int:
    """Converts a model from one form to another."""
    options = tyro.cli(ConvertConfig, args=args, prog="sparsediff convert", config=FLAGS)
    from sparsediff.conversion import convert as run

    print(run(**vars(options)))
    return 0


def demo(args: Sequence[str]) -> int:
    """Runs the demo, which has options of its own."""
    keep_freed_memory()
    return int(importlib.import_module("sparsediff.demo").main(list(args)) or 0)


def doctor(args: Sequence[str]) -> int:
    """Says what this machine has."""
    tyro.cli(doctor_options, args=args, prog="sparsediff doctor")
    return int(importlib.import_module("sparsediff.doctor").main() or 0)


def doctor_options() -> None:
    """Shows versions, hardware, the backends, and what is missing with its remedy."""


COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train, "train a preset: sparsediff train PRESET --method rigl --sparsity 0.75 ..."),
    "sample": (sample, "draw samples: sparsediff sample CHECKPOINT --n 64 --steps 50 --out samples.png"),
    "latents": (
        latents,
        "encode images once: sparsediff latents ldm-celebahq --data FOLDER --autoencoder FOLDER --out FOLDER",
    ),
    "account": (
        account,
        "count parameters, FLOPs, memory: sparsediff account PRESET --method rigl --sparsity 0.75 --json",
    ),
    "convert": (convert, "convert models: sparsediff convert model.ckpt FOLDER --to diffusers"),
    "demo": (demo, "train dense beside sparse for a few minutes and write a report"),
    "doctor": (doctor, "show versions, hardware, backends, and what is missing"),
}


def help_text() -> str:
    """What `sparsediff --help` prints."""
    lines = ["usage: sparsediff COMMAND ...    (sparsediff COMMAND --help shows its options)", "", "commands:"]
    lines += [f"  {name:<8} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "presets:", *(f"  {name:<20} {preset.summary()}" for name, preset in PRESETS.items())]
    for kind in ("methods", "datasets", "models"):
        lines += ["", f"{kind}: {', '.join(entry_names(f'sparsediff.{kind}'))}"]
    lines += ["", "exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM after saving"]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"sparsediff {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"sparsediff: unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args[0]][0](args[1:])
    except (ValueError, RuntimeError, OSError) as error:
        # What these say is meant for the user; a traceback would bury it. Anything else is a bug and shows one.
        print(f"sparsediff {args[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after training, which saves and returns 130 itself
        print(f"sparsediff {args[0]}: interrupted.", file=sys.stderr)
        return 130
