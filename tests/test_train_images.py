"""Training of image models: on pixels, on latents, encoding as it goes; to the bit, to samples, to other forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsediff import autoencoder, checkpoint, cli
from sparsediff.build import load_model
from sparsediff.datasets import DataError, load_images
from sparsediff.images import draw_images, load_first_stage, load_items
from sparsediff.latent_build import build
from sparsediff.metrics import read_metrics
from sparsediff.models.unet import SIZES
from sparsediff.presets import PRESETS, TrainConfig
from sparsediff.train import Run, TrainError, start

TINY: dict[str, Any] = {"size": 8, "widths": (32, 64), "blocks": 1, "attention": (False, True)}


@pytest.fixture(autouse=True)
def _tiny_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the presets call small takes seconds a test."""
    monkeypatch.setitem(SIZES, "small", TINY)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 squares of one colour each on white."""
    rng = np.random.default_rng(0)
    images = np.full((20, 32, 32, 3), 255, np.uint8)
    images[:, 8:24, 8:24] = rng.integers(0, 256, (20, 1, 1, 3))
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, images=images)
    return path


def configured(out: Path, data: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": str(data),
        "size": 8,
        "epochs": 3,
        "batch_size": 6,
        "timesteps": 50,
        "every": 3,
        "drop": 0.3,
        "sparsity": 0.5,
        "pattern": "block:8x8",
        "sample_every": 0,
        "sample_count": 4,
        "sample_steps": 3,
        "log_every": 1,
        "save_every": 4,
        "threads": 1,
        **changes,
    }
    return dataclasses.replace(PRESETS["ldm-small"], out=str(out), **settings)


def contents(out: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensors, as bytes by file."""
    found = checkpoint.find(out)
    assert found is not None
    return {name: (found / f"{name}.safetensors").read_bytes() for name in checkpoint.PARTS}


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "dense"}, id="dense"),
        pytest.param({"method": "rigl"}, id="rigl"),
        pytest.param({"method": "magran", "pattern": "unstructured", "flip": 0.5}, id="magran-flipped"),
    ],
)
def test_a_stopped_run_continues_to_the_bit(tmp_path: Path, emoji: Path, settings: dict[str, Any]) -> None:
    assert start(configured(tmp_path / "whole", emoji, **settings)) == 0
    for last in (2, 5, None):  # 3 steps an epoch
        assert start(configured(tmp_path / "parts", emoji, **settings, max_steps=last, resume=True)) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 9


def test_it_learns(tmp_path: Path, emoji: Path) -> None:
    assert start(configured(tmp_path, emoji, method="rigl", epochs=20, lr=2e-3, save_every=1000)) == 0
    found = losses(tmp_path)
    assert np.mean(found[:3]) > 0.9 and np.mean(found[-9:]) < 0.6


def test_a_run_on_other_images_is_not_continued(tmp_path: Path, emoji: Path) -> None:
    start(configured(tmp_path, emoji, max_steps=1))
    with pytest.raises(TrainError, match="was made with other data"):
        start(other(tmp_path))
    with pytest.raises(TrainError, match="flip: saved None, given 0.5"):
        start(configured(tmp_path, emoji, flip=0.5, resume=True))


def other(tmp_path: Path) -> TrainConfig:
    """The run in a folder, with other pictures."""
    path = tmp_path / "other.npz"
    np.savez(path, images=np.zeros((20, 32, 32, 3), np.uint8))
    return configured(tmp_path, path, resume=True)


def test_the_command_trains_on_a_folder_and_samples(
    tmp_path: Path, emoji: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for i, picture in enumerate(np.load(emoji)["images"]):
        Image.fromarray(picture).save(folder / f"{i}.png")
    options = "--method rigl --sparsity 0.5 --pattern block:8x8 --size 8 --batch-size 4 --threads 1 --sample-every 2"
    options += " --sample-steps 3 --sample-count 5 --max-steps 2"
    args = ["train", "ldm-small", *options.split(), "--data", str(folder), "--out", str(out)]
    assert cli.main(args) == 0
    with Image.open(out / "samples" / "step-00000002.png") as grid:
        assert grid.size == (3 * 66 + 2, 2 * 66 + 2) and grid.mode == "RGB"  # 8x8, enlarged eightfold
    for n in (2, 3):
        target = str(tmp_path / f"{n}.npz")
        assert cli.main(["sample", str(out), "--n", str(n), "--steps", "3", "--out", target]) == 0
    two, three = (np.load(tmp_path / f"{n}.npz")["images"] for n in (2, 3))
    assert two.shape == (2, 8, 8, 3) and two.dtype == np.uint8
    assert np.abs(two.astype(int) - three[:2]).max() <= 1
    assert cli.main(["sample", str(out), "--n", "2", "--steps", "3", "--out", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").stat().st_size > 0
    capsys.readouterr()


def test_samples_as_a_folder(tmp_path: Path, emoji: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(configured(tmp_path / "run", emoji, max_steps=1))
    out = tmp_path / "samples"
    args = ["sample", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2", "--out", str(out), "--n"]
    assert cli.main([*args, "3"]) == 0
    names = [f"{seed:08d}.png" for seed in range(5)]
    assert sorted(p.name for p in out.glob("*.png")) == names[:3]
    drawn = (out / names[2]).stat().st_mtime_ns
    (out / names[1]).unlink()  # as if it had been killed before
    assert cli.main([*args, "5"]) == 0
    assert sorted(p.name for p in out.glob("*.png")) == names
    with Image.open(out / names[1]) as again:
        assert again.size == (8, 8)
    assert (out / names[2]).stat().st_mtime_ns == drawn
    assert cli.main([*args, "5", "--weights", "model"]) == 1
    assert "holds other files than samples of" in capsys.readouterr().err
    assert cli.main([*args[:-2], str(emoji.parent), "--n", "1"]) == 1  # somebody else's folder
    assert sorted(p.name for p in emoji.parent.iterdir()) == [emoji.name]


def test_images_of_another_size_are_refused(tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(DataError, match=r"takes 3x8x8; the images are 3x16x16: choose another --size"):
        start(configured(tmp_path, emoji, size=16))
    with pytest.raises(DataError, match=r"give its place with path= \(--data\)"):
        load_items(PRESETS["ldm-celebahq"])


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small autoencoder that halves twice."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vqvae")
    autoencoder.vq_f4(widths=(8, 8, 8), blocks=1, codes=16, size=32, groups=4).save_pretrained(folder)
    return folder


def test_latents_and_images_encoded_in_every_step_train_alike(tmp_path: Path, emoji: Path, vqvae: Path) -> None:
    model = autoencoder.load_autoencoder(vqvae)
    build(load_images("emoji", path=emoji, size=32), model, tmp_path / "latents", both_flips=False)
    shared = {"method": "rigl", "size": 32, "autoencoder": str(vqvae), "max_steps": 4}
    assert start(configured(tmp_path / "cached", emoji, latents=str(tmp_path / "latents"), **shared)) == 0
    assert start(configured(tmp_path / "encoded", emoji, **shared)) == 0
    np.testing.assert_allclose(losses(tmp_path / "encoded"), losses(tmp_path / "cached"), rtol=1e-3)
    for run in ("cached", "encoded"):
        whole = configured(tmp_path / run, emoji, **shared)
        if run == "cached":
            whole = dataclasses.replace(whole, latents=str(tmp_path / "latents"))
        assert start(dataclasses.replace(whole, resume=True, max_steps=5)) == 0
        target = tmp_path / f"{run}.npz"
        assert cli.main(["sample", str(tmp_path / run), "--n", "2", "--steps", "2", "--out", str(target)]) == 0
        assert np.load(target)["images"].shape == (2, 32, 32, 3)  # decoded
    with pytest.raises(TrainError, match="was made with other data"):
        start(configured(tmp_path / "encoded", emoji, latents=str(tmp_path / "latents"), resume=True, **shared))


def test_latents_without_their_autoencoder_are_kept_as_they_are(
    tmp_path: Path, emoji: Path, vqvae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_first_stage(configured(tmp_path, emoji, autoencoder=str(vqvae)))
    build(load_images("emoji", path=emoji, size=32), model, tmp_path / "latents", both_flips=False)
    run = str(tmp_path / "run")
    assert start(configured(Path(run), emoji, size=None, latents=str(tmp_path / "latents"), max_steps=1)) == 0
    assert cli.main(["sample", run, "--n", "2", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 1
    assert "blocks" not in checkpoint.load(Path(run)).state["provenance"]
    assert "draws latents: give the folder of their autoencoder (--autoencoder)" in capsys.readouterr().err
    sample = ["sample", run, "--n", "2", "--steps", "2", "--out", str(tmp_path / "a.npz")]
    assert cli.main(sample) == 0
    assert np.load(tmp_path / "a.npz")["latents"].shape == (2, 3, 8, 8)
    assert cli.main([*sample, "--autoencoder", str(vqvae)]) == 0
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 32, 32, 3)


@pytest.mark.parametrize("method", ["dense", "rigl"])
def test_a_trained_model_converts_and_samples_the_same(tmp_path: Path, emoji: Path, method: str) -> None:
    start(configured(tmp_path / "run", emoji, method=method, timesteps=1000, max_steps=4))
    for source, target, form in (
        ("run", "pipeline", "diffusers"),
        ("run", "model.ckpt", "ckpt"),
        ("model.ckpt", "back", "checkpoint"),
    ):
        args = ["convert", str(tmp_path / source), str(tmp_path / target), "--to", form, "--size", "8"]
        assert cli.main(args) == 0
    ours, back = load_model(tmp_path / "run"), load_model(tmp_path / "back")
    assert (back.step, back.config.timesteps, back.config.schedule) == (4, 1000, "scaled_linear")
    images = [draw_images(one.model, one.diffusion, (1, 2), steps=2) for one in (ours, back)]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "pipeline" / "unet" / "config.json").is_file()


def test_states_of_the_optimizer_come_back_as_their_parameters_lie(tmp_path: Path, emoji: Path) -> None:
    start(configured(tmp_path, emoji, method="dense", max_steps=2))
    config = configured(tmp_path, emoji, method="dense", resume=True)
    run = Run(config, load_items(config), checkpoint.load(tmp_path))
    last = [p for p in run.parameters if p.dim() == 4 and not p.is_contiguous()]
    assert len(last) > 10  # channels last
    for parameter in run.parameters:
        assert run.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_parts_of_a_batch_add_up_to_its_step(tmp_path: Path, emoji: Path) -> None:
    runs = []
    for parts in (1, 2, 4):
        config = configured(tmp_path, emoji, method="static", micro_batches=parts)
        runs.append(Run(config, load_items(config)))
        runs[-1].training_step()
    # Biases before a group norm have gradients of rounding alone, so the largest of all sets the scale.
    scale = max(float(p.grad.abs().max()) for p in runs[0].parameters if p.grad is not None)
    for other in runs[1:]:
        assert other.mean_loss() == pytest.approx(float(runs[0].loss_sum), rel=1e-5)
        for mine, theirs in zip(runs[0].parameters, other.parameters, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"micro_batches": 2}, id="parts"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"precision": "bf16", "micro_batches": 4, "recompute": True, "grad_clip": 0.5}, id="all"),
    ],
)
def test_growing_with_parts_and_bf16_continues_to_the_bit(
    tmp_path: Path, emoji: Path, settings: dict[str, Any]
) -> None:
    assert start(configured(tmp_path / "whole", emoji, method="rigl", max_steps=7, **settings)) == 0
    for last in (4, 7):
        assert start(configured(tmp_path / "parts", emoji, method="rigl", max_steps=last, resume=True, **settings)) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    moved = [r["method"]["moved"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "method" in r]
    assert len(moved) == 2 and min(moved) > 0
    plain = configured(tmp_path / "plain", emoji, method="rigl", max_steps=7)
    assert start(plain) == 0
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(tmp_path / "plain"), rtol=0.02)


def test_parameters_stay_fp32_under_autocast(tmp_path: Path, emoji: Path) -> None:
    config = configured(tmp_path, emoji, method="rigl", precision="bf16")
    run = Run(config, load_items(config))
    seen = []
    run.model.get_submodule("conv_out").register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    run.training_step()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in [*run.parameters, *run.ema.model.parameters()]} == {torch.float32}
    assert {p.grad.dtype for p in run.parameters if p.grad is not None} == {torch.float32}


def test_recomputing_changes_no_bit(tmp_path: Path, emoji: Path) -> None:
    for name, recompute in (("kept", False), ("again", True)):
        assert start(configured(tmp_path / name, emoji, method="rigl", max_steps=4, recompute=recompute)) == 0
    assert contents(tmp_path / "kept") == contents(tmp_path / "again")


def test_a_step_that_overflows_is_skipped_and_its_regrow_postponed(tmp_path: Path, emoji: Path) -> None:
    config = configured(tmp_path, emoji, method="rigl")
    run = Run(config, load_items(config))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(2):
        run.training_step()
    run.scaler.update(new_scale=float(torch.finfo(torch.float32).max))
    before = [p.detach().clone() for p in run.parameters]
    assert run.training_step() == {"postponed": 1}
    assert all(map(torch.equal, before, run.parameters))
    run.scaler.update(new_scale=2.0)
    done = run.training_step()
    assert done is not None and done["moved"] > 0
    assert not all(map(torch.equal, before, run.parameters))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs CUDA")
def test_fp16_continues_to_the_same_losses(tmp_path: Path, emoji: Path) -> None:
    settings: dict[str, Any] = {"method": "rigl", "precision": "fp16", "device": "cuda"}
    assert start(configured(tmp_path / "whole", emoji, **settings, max_steps=7)) == 0
    for last in (4, 7):
        assert start(configured(tmp_path / "parts", emoji, **settings, max_steps=last, resume=True)) == 0
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "precision must be fp32 or bf16 but on CUDA; got 'fp16'"),
        ({"micro_batches": 7}, "micro_batches must be at most batch_size, 6; got 7"),
        ({"model": "chirodiff", "recompute": True}, "recompute must be off but for a U-Net; got True"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, emoji: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, emoji, **changes)
