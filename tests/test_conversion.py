"""Conversion: outputs against an independent forward of CompVis's networks, exact round trips, refused files."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compvis
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline
from tiny_run import drawings
from torch import Tensor, nn

from sparse_kernels.nn import SparseLayer, sparse_weights, sparsify
from sparsediff import checkpoint, cli, conversion
from sparsediff.autoencoder import decode, encode, load_autoencoder
from sparsediff.build import load_model
from sparsediff.conversion import ConversionError, convert
from sparsediff.models.unet import load_unet, unet

WIDTHS, BLOCKS, ATTENTION, HEAD_DIM, SIZE = (32, 64), 1, (False, True), 16, 8
OPTIONS: dict[str, Any] = {"head_dim": HEAD_DIM, "size": SIZE}
X = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
T = torch.tensor([3, 741])
T3 = torch.tensor([3, 741, 999])


def latent_state(seed: int = 0) -> dict[str, Tensor]:
    """A whole latent diffusion model as CompVis saves it."""
    model = compvis.unet_state(WIDTHS, BLOCKS, ATTENTION, seed)
    average = compvis.unet_state(WIDTHS, BLOCKS, ATTENTION, seed + 100)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}
    state |= {"model_ema." + f"diffusion_model.{name}".replace(".", ""): tensor for name, tensor in average.items()}
    state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(77, dtype=torch.int)}
    state |= {f"first_stage_model.{n}": t for n, t in compvis.vq_state((32, 64), 1, 16).items()}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return state | {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save({"state_dict": latent_state(), "global_step": 1234, "epoch": 3}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b).abs().max() <= 1e-6 * b.abs().max())


@torch.no_grad()
def output(model: Any) -> Tensor:
    result: Tensor = model.double().eval()(X.double(), T).sample
    return result


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_ckpt_becomes_a_folder_of_diffusers(ckpt: Path, tmp_path: Path, weights: Any) -> None:
    target = tmp_path / "pipeline"
    text = convert(ckpt, target, to="diffusers", weights=weights, **OPTIONS)
    assert "first stage" in text
    own = compvis.unet_state(WIDTHS, BLOCKS, ATTENTION, 100 if weights == "ema" else 0)
    assert close(output(load_unet(target / "unet")), compvis.unet(own, X, T, HEAD_DIM))
    pipeline = LDMPipeline.from_pretrained(target, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 2 * SIZE, 2 * SIZE, 3) and pipeline.vqvae.config.scaling_factor == 1.0
    schedule = DDIMScheduler.from_pretrained(target / "scheduler")
    schedule.set_timesteps(100)
    assert schedule.timesteps.tolist() == list(range(991, 0, -10)) and not schedule.config.clip_sample
    assert torch.allclose(schedule.betas, latent_state()["betas"])


def test_the_first_stage_keeps_its_function(ckpt: Path, tmp_path: Path) -> None:
    state = compvis.vq_state((32, 64), 1, 16)
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(1)}}, tmp_path / "vq.ckpt")
    assert "loss.logvar" in convert(tmp_path / "vq.ckpt", tmp_path / "vq", to="diffusers", **OPTIONS)
    convert(ckpt, tmp_path / "pipeline", to="diffusers", **OPTIONS)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    for folder in (tmp_path / "vq", tmp_path / "pipeline"):
        model = load_autoencoder(folder).double()
        latents = compvis.vq_encode(state, images, 2, 1)
        assert close(encode(model, images), latents)
        assert close(decode(model, latents), compvis.vq_decode(state, latents, 2, 1))
    convert(tmp_path / "vq", tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_round_trips_are_exact(ckpt: Path, tmp_path: Path) -> None:
    convert(ckpt, tmp_path / "run", to="checkpoint", **OPTIONS)
    convert(tmp_path / "run", tmp_path / "again.ckpt")
    before = torch.load(ckpt, weights_only=True)
    after = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert after["global_step"] == 1234
    assert set(before["state_dict"]) - set(after["state_dict"]) == {"alphas_cumprod"}  # follows from the betas
    for name in before["state_dict"].keys() & after["state_dict"].keys():
        assert torch.equal(before["state_dict"][name], after["state_dict"][name]), name
        assert before["state_dict"][name].dtype == after["state_dict"][name].dtype
    convert(tmp_path / "run", tmp_path / "pipeline", to="diffusers")
    convert(tmp_path / "pipeline", tmp_path / "last.ckpt")
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name in compvis.unet_state(WIDTHS, BLOCKS, ATTENTION):
        key = "model_ema." + f"diffusion_model.{name}".replace(".", "")
        averaged = before["state_dict"][key]
        assert torch.equal(last[key], averaged) and torch.equal(last[f"model.diffusion_model.{name}"], averaged)


def sparse_run(folder: Path, pattern: str) -> nn.Module:
    """A run's folder with a checkpoint of a sparse U-Net, whose average is another."""
    model = unet(SIZE, WIDTHS, blocks=BLOCKS, attention=ATTENTION, head_dim=HEAD_DIM, seed=0)
    generator = torch.Generator().manual_seed(1)
    sparsify(model, sparsity=0.7, pattern=pattern, generator=generator, plan="off")
    average = {name: torch.randn(p.shape, generator=generator) / 8 for name, p in model.named_parameters()}
    for weight in sparse_weights(model):  # what sticks out of a weight is zero
        topology = weight.topology
        name = f"{weight.name}.values"
        average[name] = topology.gather(topology.scatter(average[name]))
    made = {"size": SIZE, "head_dim": HEAD_DIM}
    checkpoint.save(folder / "checkpoints", 9, model=model.state_dict(), ema=average, state={"unet": made})
    return model


@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8", "block:16x1"])
def test_masks_go_with_their_weights(pattern: str, tmp_path: Path) -> None:
    model = sparse_run(tmp_path / "run", pattern)
    convert(tmp_path / "run", tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    state, masks = content["state_dict"], content["masks"]
    prefix = "model.diffusion_model."
    for name, mask in masks.items():
        average = state["model_ema." + name.removeprefix("model.").replace(".", "")]
        assert mask.dtype == torch.bool and mask.shape == state[name].shape == average.shape
        assert not state[name][~mask].any() and not average[~mask].any()
        assert state[name][mask].count_nonzero() == mask.sum()
    present = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    theirs = {name.removeprefix(prefix): tensor for name, tensor in present.items()}
    with torch.no_grad():
        expected = compvis.unet(theirs, X, T, HEAD_DIM)
    assert close(output(model), expected)
    # Back, by both ways: the same blocks with the same values.
    convert(tmp_path / "model.ckpt", tmp_path / "back", to="checkpoint", **OPTIONS)
    convert(tmp_path / "back", tmp_path / "pipeline", to="diffusers", weights="model")
    convert(tmp_path / "pipeline", tmp_path / "back2", to="checkpoint")
    for folder in (tmp_path / "pipeline" / "unet", tmp_path / "back", tmp_path / "back2"):
        other = load_unet(folder) if folder.name == "unet" else rebuilt(folder)
        assert_same_blocks(model, other)
    saved, again = checkpoint.load(tmp_path / "run"), checkpoint.load(tmp_path / "back")
    assert saved.ema.keys() == again.ema.keys() and again.step == 9
    assert sum(t.double().sum() for t in saved.ema.values()) == pytest.approx(
        float(sum(t.double().sum() for t in again.ema.values())), abs=1e-9
    )
    convert(tmp_path / "back", tmp_path / "again.ckpt")
    second = torch.load(tmp_path / "again.ckpt", weights_only=True)
    for part in ("state_dict", "masks"):
        assert all(torch.equal(content[part][name], second[part][name]) for name in content[part])


def rebuilt(folder: Path) -> nn.Module:
    from sparsediff.rebuild import load_sparse

    model = unet(SIZE, WIDTHS, blocks=BLOCKS, attention=ATTENTION, head_dim=HEAD_DIM)
    return load_sparse(model, checkpoint.load(folder).model)


def assert_same_blocks(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    sparse = [path for path, module in ours.items() if isinstance(module, SparseLayer)]
    assert sparse == [path for path, module in theirs.items() if isinstance(module, SparseLayer)]
    for path in sparse:
        a, b = ours[path], theirs[path]
        assert torch.equal(a.topology.mask(), b.topology.mask())
        assert torch.equal(a.dense_weight().float(), b.dense_weight().float())
        assert str(a.pattern) == str(b.pattern)


def test_zeros_can_be_taken_for_absent(tmp_path: Path) -> None:
    model = sparse_run(tmp_path / "run", "block:8x8")
    convert(tmp_path / "run", tmp_path / "dense.ckpt", dense=True)
    assert "masks" not in torch.load(tmp_path / "dense.ckpt", weights_only=True)
    convert(tmp_path / "dense.ckpt", tmp_path / "back", to="checkpoint", zeros="block:8x8", **OPTIONS)
    assert_same_blocks(model, rebuilt(tmp_path / "back"))
    text = convert(tmp_path / "dense.ckpt", tmp_path / "plain", to="checkpoint", **OPTIONS)
    assert "sparse" not in text and not sparse_weights(rebuilt(tmp_path / "plain"))


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.diffusion_model.middle_block.1.qkv.weight"), "missing: .*attentions.0.to_k.weight"),
        (drop("model_ema.diffusion_modelout2bias"), "averaged: missing: diffusion_modelout2bias"),
        (drop("first_stage_model.encoder.conv_out.bias"), "first stage.*missing: encoder.conv_out.bias"),
        (lambda s: s.update({"model.diffusion_model.label_emb.weight": X}), "no place .*label_emb.weight"),
        (lambda s: s.update({"cond_stage_model.weight": X}), "cond_stage_model.weight"),
        (lambda s: s.update({"model.diffusion_model.out.2.weight": X}), r"conv_out.weight is \[2, 3, 8, 8\], expected"),
        (lambda s: s.update({"betas": torch.linspace(1e-4, 2e-2, 1000)}), "betas are not linear in their square root"),
    ],
    ids=["missing", "average", "first-stage", "unknown", "condition", "shape", "betas"],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = latent_state()
    change(state)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    for name, options in (("a", {"to": "diffusers"}), ("b", {"to": "checkpoint"}), ("c.ckpt", {})):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "model.ckpt", tmp_path / name, **OPTIONS, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_head_dim_that_does_not_fit(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="head_dim|--head-dim"):
        convert(ckpt, tmp_path / "x", to="checkpoint", head_dim=48, size=SIZE)


@pytest.mark.parametrize("part", ["to_folder", "to_checkpoint", "write_ckpt"])
def test_a_failed_write_leaves_nothing(part: str, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    if part == "write_ckpt":
        monkeypatch.setattr(os, "fsync", full)
        target, options = tmp_path / "again.ckpt", {}
    else:
        monkeypatch.setattr(conversion, "flush", full)
        target, options = tmp_path / "x", {"to": "diffusers" if part == "to_folder" else "checkpoint"}
    with pytest.raises(OSError, match="No space left"):
        convert(ckpt, target, **OPTIONS, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


class Program:
    """Pickles as ChiroDiff's program would: by the names of classes inside it, and calls of them."""

    class Choice:
        def __init__(self, value: str) -> None:
            self.value = value

        def __reduce__(self) -> Any:
            return Program.Choice, (self.value,)


def chirodiff_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, hidden: int, layers: int) -> Tensor:
    """ChiroDiff's published noise predictor, in its form on positions, from its own state dict."""
    angle = 2 * torch.pi * (state["pe_proj_W"] * 4.0) @ (t / 1000)[None]
    time = torch.cat([angle.sin(), angle.cos()]).T[:, None].expand(-1, x.shape[1], -1)
    velocity = torch.cat([x[:, :1, :2], x[:, 1:, :2] - x[:, :-1, :2]], 1)
    gru = nn.GRU(13, hidden, layers, batch_first=True, bidirectional=True)
    gru.load_state_dict({n.removeprefix("scorefn.model.rnn."): v for n, v in state.items() if ".rnn." in n})
    h = gru(torch.cat([x, velocity, time], -1))[0]
    h = nn.functional.linear(h, state["scorefn.model.out_proj.weight"], state["scorefn.model.out_proj.bias"])
    last = "scorefn.final_proj.0"
    return nn.functional.linear(torch.cat([h, time], -1), state[f"{last}.weight"], state[f"{last}.bias"])


def test_chirodiffs_checkpoint_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, layers = 16, 2
    shapes = nn.GRU(13, hidden, layers, bidirectional=True).state_dict()
    theirs = {f"scorefn.model.rnn.{name}": torch.randn_like(tensor) / 4 for name, tensor in shapes.items()}
    theirs |= {"scorefn.model.out_proj.weight": torch.randn(hidden, 2 * hidden)}
    theirs |= {"scorefn.model.out_proj.bias": torch.randn(hidden)}
    theirs |= {"scorefn.final_proj.0.weight": torch.randn(3, hidden + 8), "scorefn.final_proj.0.bias": torch.randn(3)}
    averaged = {name: torch.randn_like(tensor) / 4 for name, tensor in theirs.items()}
    content = {
        "state_dict": theirs | {"pe_proj_W": torch.randn(4, 1)},
        "ema": {"decay": 0.9999, "num_updates": 55, "shadow_params": list(averaged.values()), "collected_params": []},
        "hyper_parameters": {
            "repr": Program.Choice("threeseqabs"),
            "noise_T": 1000,
            "noise_low_noise": 1e-4,
            "noise_high_noise": 2e-2,
        },
        "global_step": 77,
    }
    torch.save(content, tmp_path / "chirodiff.ckpt")
    monkeypatch.setattr("sparsediff.train.load_data", lambda config: drawings())
    assert cli.main(["convert", str(tmp_path / "chirodiff.ckpt"), str(tmp_path / "run"), "--to", "checkpoint"]) == 0
    x = torch.randn(3, 7, 3)
    lengths = torch.full((3,), 7)
    for weights, state in (("model", theirs), ("ema", averaged)):
        run = load_model(tmp_path / "run", weights=weights)
        assert (run.config.form, run.config.hidden, run.config.layers, run.step) == ("position", hidden, layers, 77)
        expected = chirodiff_forward(state | {"pe_proj_W": content["state_dict"]["pe_proj_W"]}, x, T3, hidden, layers)
        with torch.no_grad():
            torch.testing.assert_close(run.model(x, T3, lengths), expected)
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "2", "--out", str(picture)]) == 0
    content["hyper_parameters"]["noise_schedule"] = Program.Choice("cosine")
    torch.save(content, tmp_path / "cosine.ckpt")
    with pytest.raises(ConversionError, match="noise_schedule is 'cosine'; only 'linear' is served"):
        convert(tmp_path / "cosine.ckpt", tmp_path / "no", to="checkpoint")
    del content["hyper_parameters"]["noise_schedule"]
    del content["state_dict"]["scorefn.model.out_proj.bias"]
    torch.save(content, tmp_path / "broken.ckpt")
    with pytest.raises(ConversionError, match="missing: hidden.bias"):
        convert(tmp_path / "broken.ckpt", tmp_path / "no", to="checkpoint")
    assert not (tmp_path / "no").exists()


class Hostile:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol-4"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "open", "hub", "getattr"])
def test_a_hostile_pickle_runs_nothing(kind: str, form: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    attack = {
        "system": Hostile(os.system, f"touch {marker}"),
        "eval": Hostile(builtins.eval, code),
        "exec": Hostile(builtins.exec, code),
        "open": Hostile(open, str(marker), "w"),
        "hub": Hostile(torch.hub.load, str(tmp_path), "x"),
        "getattr": Hostile(getattr, Hostile(__import__, "pathlib"), "Path"),
    }[kind]
    content = {"state_dict": {"x": X}, "callbacks": attack}
    protocol = 4 if form == "protocol-4" else 2
    torch.save(
        content, tmp_path / "model.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=form != "legacy"
    )
    with pytest.raises(ConversionError, match=r"refused|cannot be read"):
        convert(tmp_path / "model.ckpt", tmp_path / "x", to="diffusers", **OPTIONS)
    assert not marker.exists() and not (tmp_path / "x").exists()


def test_objects_of_other_programs_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's checkpoints name its own classes; they need not be installed, and are not made where they are."""
    made = []

    class Callback:
        def __init__(self) -> None:
            self.best = 0.5

        def __setstate__(self, state: Any) -> None:
            made.append(state)

    Callback.__module__, Callback.__qualname__ = "lightning_like.callbacks", "Callback"
    module = type(os)("lightning_like.callbacks")
    module.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "lightning_like", type(os)("lightning_like"))
    monkeypatch.setitem(__import__("sys").modules, "lightning_like.callbacks", module)
    content = {"state_dict": latent_state(), "callbacks": {Callback: {"x": 1}}, "hyper_parameters": {"c": Callback()}}
    torch.save(content, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "run", to="checkpoint", **OPTIONS)
    assert not made and checkpoint.load(tmp_path / "run").step == 0


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nowhere", "x.ckpt", "expected a .ckpt file, a folder of diffusers"),
        ("text.ckpt", "x.ckpt", "checkpoint"),
        ("text.ckpt", "x", "say what it is to be: --to"),
        ("text.ckpt", "text.ckpt", "exists already"),
    ],
    ids=["nothing", "text", "form", "exists"],
)
def test_messages(source: str, target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("no pickle")
    assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 1
    assert message in capsys.readouterr().err


def test_the_command(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--to", "diffusers", "--head-dim", str(HEAD_DIM), "--size", str(SIZE)]
    assert cli.main(["convert", str(ckpt), str(tmp_path / "out"), *options]) == 0
    assert "first stage" in capsys.readouterr().out and (tmp_path / "out" / "model_index.json").is_file()
