"""Latents that are made once: content, interruption at any point, refusals, batches, command line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsediff import autoencoder as first_stage
from sparsediff import cli, datasets
from sparsediff.datasets import ImageBatches, ImageData, ImageDataset, load_images
from sparsediff.latent_build import JOB, JOURNAL, build
from sparsediff.latent_cache import DATA, META, LatentsError, open_latents
from sparsediff.latents import LATENTS


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDIFF_DATA", str(tmp_path_factory.mktemp("cache")))


def small_vq(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = first_stage.vq_f4(widths=(8, 8, 16), blocks=1, codes=16, size=16, groups=8)
    return model.requires_grad_(False).eval()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(13):
        Image.fromarray(rng.integers(0, 256, (18, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def loaded(folder: Path, **options: Any) -> ImageData:
    return load_images("imagefolder", path=folder, size=16, valid_count=3, threads=1, **options)


def made(data: ImageData, out: Path, model: Any = None, **options: Any) -> Path:
    return build(data, small_vq() if model is None else model, out, **{"both_flips": True, "batch_size": 4, **options})


def test_latents_are_those_of_the_images_and_their_mirror_images(images: Path, tmp_path: Path) -> None:
    data, model = loaded(images, flip=0.5), small_vq()
    kept = open_latents(made(data, tmp_path / "latents", model), data=data, autoencoder=model)
    assert (len(kept.train), len(kept.valid)) == (10, 3) and kept.train.shape == (3, 4, 4)
    assert sorted(file.name for file in kept.folder.iterdir()) == [DATA, META]
    for split in ("train", "valid"):
        stored, own = getattr(kept, split), getattr(data, split)
        for i in range(len(own)):
            for flipped in (False, True):
                z = model.quant_conv(model.encoder(own.view(i, flipped)[None]))[0]  # before quantisation, scale 1
                torch.testing.assert_close(stored.view(i, flipped), z, rtol=1e-4, atol=1e-5)
    mirrored = kept.train.view(0, flipped=True)
    assert not torch.allclose(mirrored, kept.train.view(0).flip(2), atol=1e-3)  # why both are stored
    assert kept.train.fingerprint() != kept.valid.fingerprint()
    with pytest.raises(IndexError):
        kept.valid.view(3)


def test_float16_and_one_view(images: Path, tmp_path: Path) -> None:
    data = loaded(images)
    whole = open_latents(made(data, tmp_path / "both"))
    half = open_latents(made(data, tmp_path / "half", both_flips=False, dtype="float16"))
    assert (half.folder / DATA).stat().st_size * 4 == (whole.folder / DATA).stat().st_size
    torch.testing.assert_close(half.train.view(5), whole.train.view(5), rtol=1e-3, atol=1e-3)
    assert half.train.view(5).dtype == torch.float32
    with pytest.raises(LatentsError, match="holds no mirror images"):
        half.train.view(0, flipped=True)
    with pytest.raises(LatentsError, match="holds no mirror images"):
        open_latents(half.folder, flip=0.5)


def test_batches_of_latents_are_those_of_the_images(images: Path, tmp_path: Path) -> None:
    """The same order and the same mirror images, by any number of processes."""
    data = loaded(images, flip=0.5)
    kept = open_latents(made(data, tmp_path / "latents"))
    assert len(pickle.dumps(kept.train)) < 2000 and torch.equal(
        pickle.loads(pickle.dumps(kept.train)).view(1), kept.train.view(1)
    )
    of_images = ImageBatches(data.train, 4, seed=1)
    of_latents, by_workers = (ImageBatches(kept.train, 4, seed=1, workers=n) for n in (0, 1))
    for _ in range(5):
        want, got, same = next(of_images), next(of_latents), next(by_workers)
        assert torch.equal(want.indices, got.indices) and torch.equal(want.flipped, got.flipped)
        assert torch.equal(got.x, same.x) and got.x.shape == (4, 3, 4, 4)
    by_workers.close()
    with pytest.raises(datasets.DataError, match="Resume with the same data"):
        of_latents.load_state_dict(of_images.state_dict())


class Stop(Exception):
    """Ends a run after a block."""


def stop_after(block: int) -> Any:
    def stop(done: int) -> None:
        if done == block:
            raise Stop

    return stop


DAMAGE = ("nothing", "torn journal", "torn block", "lost block", "no journal", "torn job", "foreign line")


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_interrupted_run_continues_to_the_same_bits(images: Path, tmp_path: Path, damage: str) -> None:
    data, model = loaded(images), small_vq()
    straight = made(data, tmp_path / "straight", model)
    out, partial = tmp_path / "latents", tmp_path / ".latents.partial"
    with pytest.raises(Stop):
        made(data, out, model, on_block=stop_after(1))
    with pytest.raises(LatentsError, match=r"is not finished: run `sparsediff latents` again"):
        open_latents(out)
    journal = partial / JOURNAL
    again = 2  # blocks that are left of four
    if damage == "torn journal":
        journal.write_text(journal.read_text()[:-7])
        again = 3
    elif damage == "torn block":
        with open(partial / DATA, "r+b") as stream:
            stream.seek(4 * 2 * 3 * 4 * 4 * 4 + 50)
            stream.write(b"\xff\xff")
        again = 3
    elif damage == "lost block":
        os.truncate(partial / DATA, 100)
        again = 4
    elif damage == "no journal":
        journal.unlink()
        again = 4
    elif damage == "torn job":
        (partial / JOB).write_text('{"form')
        again = 4
    elif damage == "foreign line":
        journal.write_text(journal.read_text() + "7 " + "0" * 64 + "\nwhatever\n")
    done: list[int] = []
    made(data, out, model, on_block=done.append)
    assert done == list(range(4 - again, 4))
    assert (out / DATA).read_bytes() == (straight / DATA).read_bytes()
    assert json.loads((out / META).read_text()) == json.loads((straight / META).read_text())
    assert not partial.exists()


def test_a_killed_run_continues_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    data, model = loaded(images), small_vq()
    model.save_pretrained(tmp_path / "vqvae")
    code = f"""
import os, signal, torch
from pathlib import Path
torch.set_num_threads(1)
from sparsediff.autoencoder import load_autoencoder
from sparsediff.datasets import load_images
from sparsediff.latent_build import build
data = load_images("imagefolder", path={str(images)!r}, size=16, valid_count=3)
build(data, load_autoencoder({str(tmp_path / "vqvae")!r}), Path({str(tmp_path / "latents")!r}), both_flips=True,
      batch_size=4, on_block=lambda block: block == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "latents").exists()
    done: list[int] = []
    made(data, tmp_path / "latents", model, on_block=done.append)
    assert done == [3]
    straight = made(data, tmp_path / "straight", model)
    assert (tmp_path / "latents" / DATA).read_bytes() == (straight / DATA).read_bytes()


def test_a_kill_between_the_last_block_and_the_end(images: Path, tmp_path: Path) -> None:
    data, model = loaded(images), small_vq()
    with pytest.raises(Stop):
        made(data, tmp_path / "latents", model, on_block=stop_after(3))
    done: list[int] = []
    made(data, tmp_path / "latents", model, on_block=done.append)
    assert done == [] and len(open_latents(tmp_path / "latents").train) == 10


def test_latents_of_something_else_are_refused(images: Path, tmp_path: Path) -> None:
    data, model = loaded(images), small_vq()
    out = made(data, tmp_path / "latents", model)
    before = (out / DATA).stat().st_mtime_ns
    assert made(data, out, model, batch_size=3) == out and (out / DATA).stat().st_mtime_ns == before  # nothing to do
    other = small_vq(seed=1)
    fewer = loaded(images, train_count=8)
    larger = load_images("imagefolder", path=images, size=32, valid_count=3)
    for wrong, options in (
        ("autoencoder", {"model": other, "data": data}),
        ("images, size or crop", {"model": model, "data": fewer}),
        ("images, size or crop", {"model": model, "data": larger}),
        ("mirror images", {"model": model, "data": data, "both_flips": False}),
        ("dtype", {"model": model, "data": data, "dtype": "float16"}),
    ):
        with pytest.raises(LatentsError, match=rf"made with other {wrong} \(.*--overwrite"):
            made(out=out, **options)
    with pytest.raises(LatentsError, match="made with other autoencoder"):
        open_latents(out, autoencoder=other)
    with pytest.raises(LatentsError, match="made with other images, size or crop"):
        open_latents(out, data=fewer)
    made(data, out, other, overwrite=True)
    open_latents(out, autoencoder=first_stage.fingerprint(other))
    with pytest.raises(Stop):
        made(data, tmp_path / "unfinished", model, on_block=stop_after(0))
    with pytest.raises(LatentsError, match=r"unfinished latents of another run lie there \(other autoencoder\)"):
        made(data, tmp_path / "unfinished", other)
    with pytest.raises(LatentsError, match=r"other batch_size"):
        made(data, tmp_path / "unfinished", model, batch_size=5)
    made(data, tmp_path / "unfinished", other, overwrite=True)


def test_damaged_latents_are_refused(images: Path, tmp_path: Path) -> None:
    out = made(loaded(images), tmp_path / "latents")
    whole = (out / DATA).read_bytes()
    (out / DATA).write_bytes(whole[:-1])
    with pytest.raises(LatentsError, match=r"expected 4,992 bytes; got 4,991"):
        open_latents(out)
    flipped = bytearray(whole)
    flipped[2000] ^= 1
    (out / DATA).write_bytes(flipped)
    with pytest.raises(LatentsError, match="block 1 is damaged"):
        open_latents(out)
    assert len(open_latents(out, verify=False).train) == 10
    (out / DATA).unlink()
    with pytest.raises(LatentsError, match="got 0"):
        open_latents(out)
    (out / META).write_text("{")
    with pytest.raises(LatentsError, match="cannot be read"):
        open_latents(out)
    shutil.rmtree(out)
    with pytest.raises(LatentsError, match="holds none: run `sparsediff latents`"):
        open_latents(out)


def test_one_process_at_a_time(images: Path, tmp_path: Path) -> None:
    import fcntl

    data, out = loaded(images), tmp_path / "latents"
    (tmp_path / ".latents.partial").mkdir()
    with open(tmp_path / ".latents.partial" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(LatentsError, match="another process is making these latents"):
            made(data, out)
    made(data, out)


def test_values_and_sizes_that_cannot_be(images: Path, tmp_path: Path) -> None:
    model = small_vq()
    model.quant_conv.bias[1] = 1e5  # beyond float16
    with pytest.raises(LatentsError, match=r"that of \d\d\.png is not finite as float16; use --dtype float32"):
        made(loaded(images), tmp_path / "latents", model, dtype="float16")
    odd = load_images("imagefolder", path=images, size=18)
    with pytest.raises(LatentsError, match="size must be a multiple of 4"):
        made(odd, tmp_path / "odd")


def test_every_set_of_images_has_a_subcommand() -> None:
    sets = {name for name in datasets.names() if issubclass(datasets.get(name), ImageDataset)}
    assert {config.dataset for config in LATENTS.values()} == sets and sets < set(LATENTS)


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_vq().save_pretrained(tmp_path / "vqvae")
    out = str(tmp_path / "latents")
    args = ["latents", "imagefolder", "--data", str(images), "--size", "16", "--valid-count", "3", "--out", out]
    assert cli.main(args) == 1
    assert "give the autoencoder's folder with --autoencoder. VQ-f4 is the folder" in capsys.readouterr().err
    args += ["--autoencoder", str(tmp_path / "vqvae"), "--flips", "both", "--threads", "1"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "10 train / 3 valid latents 3x4x4 float32 of images and mirror images, 0.0 MB; imagefolder, images" in text
    (images / "00.png").write_bytes(b"")
    assert cli.main(args) == 1
    assert "00.png: not an image" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="1 of 13"):
        assert cli.main([*args, "--check"]) == 1
    assert "\n00.png: not an image of a known format (empty file)" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="1 of 13"):
        assert cli.main([*args, "--on-bad-image", "skip"]) == 1
    assert "made with other images" in capsys.readouterr().err
