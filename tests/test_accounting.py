"""The books: what is known of the published models, arithmetic by another way, and the tensors of a real run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from tiny_run import configured, drawings
from torch import nn

from sparse_kernels.nn import sparse_weights
from sparsediff import cli
from sparsediff.account import account
from sparsediff.accounting import ModelCount, count, training_bytes
from sparsediff.methods import METHODS
from sparsediff.presets import PRESETS
from sparsediff.train import Run

SPARSITIES = (0.1, 0.25, 0.5, 0.75, 0.9)
UNET_INPUT = ((1, 3, 64, 64), (1,))


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """The paper's U-Net, without content."""
    with torch.device("meta"):
        return UNet2DModel(sample_size=64, in_channels=3, out_channels=3, attention_head_dim=32)


@pytest.fixture(scope="module")
def books(unet: UNet2DModel) -> dict[float, ModelCount]:
    inputs = tuple(torch.zeros(shape, device="meta") for shape in UNET_INPUT)
    return {S: count(unet, inputs, sparsity=S) for S in (0.0, *SPARSITIES)}


def test_the_published_unet(books: dict[float, ModelCount]) -> None:
    dense = books[0.0]
    assert dense.parameters == dense.dense_parameters == 274_056_163
    assert round(dense.flops / 2e9, 3) == 96.018
    assert f"{100 * dense.flops:.2e}" == "1.92e+13"
    # softmax(q·kᵀ)·v: two products of T² · C multiply-adds; 2 + 3 blocks at 32² and 16², 2 + 1 + 3 at 8².
    attention = sum(2 * 2 * (n * n) ** 2 * C * blocks for n, C, blocks in ((32, 448, 5), (16, 672, 5), (8, 896, 6)))
    assert dense.other_flops == attention
    assert 0.050 < attention / (dense.flops + attention) < 0.052


@pytest.mark.parametrize(("sparsity", "bound"), [(0.25, 1.10), (0.5, 1.44), (0.75, 3.1), (0.9, 5.9)])
def test_flops_of_an_erk_unet(books: dict[float, ModelCount], sparsity: float, bound: float) -> None:
    """The speed-up that FLOPs allow, attention included, as it is known of this model."""
    book = books[sparsity]
    ratio = (book.dense_flops + book.other_flops) / (book.flops + book.other_flops)
    assert ratio == pytest.approx(bound, rel=0.02 if sparsity > 0.5 else 0.005)


def test_half_of_the_unet_leaves_81_tensors_dense(books: dict[float, ModelCount]) -> None:
    tensors: dict[str, list[bool]] = {}
    for weight in books[0.5].weights:
        path, _, leaf = weight.name.rpartition(".")
        tensors.setdefault(path if leaf in ("to_q", "to_k", "to_v") else weight.name, []).append(
            weight.pattern == "dense"
        )
    assert len(tensors) == 123 and sum(map(all, tensors.values())) == 81
    assert all(all(full) or not any(full) for full in tensors.values())  # q, k and v are one


def erk_flops_by_bisection(unet: nn.Module, sparsity: float) -> tuple[float, float]:
    """Parameter and FLOPs ratio of the same model by other means: shapes by hand, ε by bisection."""
    stride = {"down_blocks.0": 1, "down_blocks.1": 2, "down_blocks.2": 4, "down_blocks.3": 8, "mid_block": 8}
    stride |= {"up_blocks.0": 8, "up_blocks.1": 4, "up_blocks.2": 2, "up_blocks.3": 1, "conv_in": 1, "conv_out": 1}
    tensors: list[tuple[float, float, float]] = []  # score, elements, positions
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or name.endswith(("to_k", "to_v")):
            continue
        out, in_, *kernel = module.weight.shape
        out *= 3 if name.endswith("to_q") else 1
        if "time_emb" in name:
            positions = 1.0
        else:
            scale = stride[".".join(name.split(".")[: 2 if "_blocks" in name else 1])]
            scale *= 2 if "downsamplers" in name else 1
            side = 64 // scale * (2 if "upsamplers" in name else 1)
            positions = side * side
        elements = out * in_ * math.prod(kernel)
        tensors.append(((out + in_ + sum(kernel)) / elements, elements, positions))
    total = sum(elements for _, elements, _ in tensors)
    low, high = 0.0, 1e9
    for _ in range(200):
        epsilon = (low + high) / 2
        kept = sum(min(1.0, epsilon * score) * elements for score, elements, _ in tensors)
        low, high = (low, epsilon) if kept > (1 - sparsity) * total else (epsilon, high)
    flops = sum(min(1.0, low * score) * elements * positions for score, elements, positions in tensors)
    rest = sum(p.numel() for p in unet.parameters()) - total
    return ((1 - sparsity) * total + rest) / (total + rest), flops / sum(e * p for _, e, p in tensors)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_ratios_by_other_means(unet: UNet2DModel, books: dict[float, ModelCount], sparsity: float) -> None:
    book = books[sparsity]
    params, flops = erk_flops_by_bisection(unet, sparsity)
    assert book.parameters / book.dense_parameters == pytest.approx(params, abs=1e-7)
    assert book.flops / book.dense_flops == pytest.approx(flops, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "hidden", "layers"),
    [
        ("chirodiff-quickdraw", 736_027, 128, 3),
        ("chirodiff-kanjivg", 416_859, 96, 3),
        ("chirodiff-vmnist", 65_019, 48, 2),
    ],
)
@pytest.mark.parametrize("sparsity", (0.25, 0.9))
def test_the_published_chirodiffs(name: str, parameters: int, hidden: int, layers: int, sparsity: float) -> None:
    config = dataclasses.replace(PRESETS[name], method="static", sparsity=sparsity, pattern="unstructured")
    one = account(name, config)
    books = {
        method: dataclasses.replace(one, config=dataclasses.replace(config, method=method)).to_json()
        for method in ("static", "rigl", "magran")
    }
    biases = 2 * layers * 2 * 3 * hidden + hidden + 3
    weights = parameters - biases
    for book in books.values():
        assert book["params"]["dense"] == parameters
        # A conserved count: no method has more weights than another.
        assert book["ratio"]["params"] == pytest.approx(((1 - sparsity) * weights + biases) / parameters, abs=1e-5)
        # Every weight is used once a point, so FLOPs go as weights do.
        assert book["ratio"]["sample_flops"] == pytest.approx(1 - sparsity, abs=1e-4)
        assert book["flops"]["forward"]["dense"] == 2 * 64 * weights
        assert book["flops"]["forward_with_attention"] == book["flops"]["forward"]
    assert books["static"]["ratio"]["train_flops"] == books["magran"]["ratio"]["train_flops"]
    assert books["static"]["ratio"]["train_flops"] == pytest.approx(1 - sparsity, abs=1e-4)
    rigl = (3 * (1 - sparsity) * 800 + 2 * (1 - sparsity) + 1) / 801 / 3
    assert books["rigl"]["ratio"]["train_flops"] == pytest.approx(rigl, abs=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8", "block:4x1"])
@pytest.mark.parametrize("allocation", ["erk", "uniform", "flops"])
def test_counts_are_those_of_a_run(pattern: str, allocation: str, tmp_path: Path) -> None:
    config = configured(tmp_path, method="static", pattern=pattern, allocation=allocation, plan="off")
    run = Run(config, drawings())
    run.training_step()
    book = account("tiny", config).model
    assert run.plan is not None
    rows = {row["layer"]: row["nonzeros"] for row in run.plan["rows"]}
    for weight in book.weights:
        # A block that sticks out counts as the mean of the weight's blocks.
        edge = 0 if weight.shape[0] % 8 == weight.shape[1] % 8 == 0 else 64
        assert abs(rows[weight.name] - weight.nonzeros) <= edge
    assert training_bytes(run.model, run.optimizer, run.ema.model) == book.memory()
    stored = sum(weight.values.numel() for weight in sparse_weights(run.model))
    assert stored == sum(weight.stored for weight in book.weights if weight.pattern != "dense")


def test_dense_memory_is_that_of_a_run(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = Run(config, drawings())
    run.training_step()
    book = account("tiny", config)
    assert training_bytes(run.model, run.optimizer, run.ema.model) == book.model.memory(dense=True)
    assert book.to_json()["ratio"] == {"params": 1.0, "train_flops": 1.0, "sample_flops": 1.0, "memory": 1.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "rigl", "--sparsity", "0.75", "--allocation", "uniform", "--pattern", "block:16x16"]
    assert cli.main(["account", preset, *options, "--json", "--samples", "1000", "--every", "1"]) == 0
    book: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert book["sparsity"] == 0.75 and abs(book["achieved_sparsity"] - 0.75) < 0.01
    forward, train = book["flops"]["forward"], book["flops"]["train"]
    assert forward["sparse"] == pytest.approx(sum(layer["flops"] for layer in book["layers"]))
    assert book["flops"]["sample"]["sparse"] == book["sample_steps"] * forward["sparse"]
    step = (5 * forward["sparse"] + forward["dense"]) / 2
    assert book["flops"]["train_step"] == {"sparse": step, "dense": 3 * forward["dense"]}
    steps, batch = book["training"]["steps"], book["training"]["batch_size"]
    assert steps == PRESETS[preset].epochs * (1000 // batch)
    assert train["one_sample_a_step"]["sparse"] == steps * step
    assert train["whole_batch"]["dense"] == pytest.approx(3 * steps * batch * forward["dense"])
    assert book["ratio"]["train_flops"] == pytest.approx(step / 3 / forward["dense"])
    assert cli.main(["account", preset, *options]) == 0
    table = capsys.readouterr().out
    assert all(layer["layer"] in table for layer in book["layers"]) and "FLOPs of a forward" in table


def test_the_published_latent_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "static", "--sparsity", "0.5", "--pattern", "unstructured", "--json"]
    assert cli.main(["account", "ldm-celebahq", *options]) == 0
    book = json.loads(capsys.readouterr().out)
    assert book["params"]["dense"] == 274_056_163 and f"{book['flops']['sample']['dense']:.2e}" == "1.92e+13"
    assert book["training"]["steps"] == 150 * (12_500 // 12) and book["training"]["every"] == 1100
    train = book["flops"]["train"]["one_sample_a_step"]["dense"]
    assert train == pytest.approx(3 * 156_150 * 2 * 96.018e9, rel=1e-5)
    assert book["ratio"]["params"] == pytest.approx(0.5003, abs=1e-4)
    assert book["ratio"]["sample_flops"] == book["ratio"]["train_flops"] == pytest.approx(0.675, abs=1e-3)
    assert cli.main(["account", "ldm-small", "--method", "rigl"]) == 0
    assert "block:16x16" in capsys.readouterr().out


def test_unknown_sizes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["account", "chirodiff-vmnist"]) == 0
    assert "--samples N" in capsys.readouterr().out
    assert cli.main(["account", "chirodiff-vmnist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flops"]["train"] is None
    assert cli.main(["account", "chirodiff-vmnist", "--method", "static", "--pattern", "17x4"]) == 1
    assert "sides must be one of" in capsys.readouterr().err


def test_every_method_says_what_a_step_costs() -> None:
    for name in METHODS.names():
        flops = METHODS.get(name).training_flops(1.0, 4.0, every=9)
        assert flops == ((27 + 2 + 4) / 10 if name == "rigl" else 3.0)
