"""The U-Net and the autoencoder of Latent Diffusion: sizes, what sparsify takes, pipelines, folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_kernels import Block, densify, sparsify
from sparse_kernels.nn import Plan
from sparse_kernels.nn.survey import survey
from sparsediff import autoencoder, cli
from sparsediff.models import MODELS
from sparsediff.models._folders import DENSE_FILE, WeightsError
from sparsediff.models.unet import SIZES, SPARSE_FILE, example_inputs, load_unet, save_unet, unet

TINY: dict[str, Any] = {"size": 8, "widths": (16, 32), "blocks": 1, "attention": (False, True), "head_dim": 16}


def tiny(seed: int = 0) -> Any:
    return unet(**TINY, groups=8, seed=seed)


def sparse(pattern: str = "unstructured") -> Any:
    return planned(pattern)[0]


def planned(pattern: str) -> tuple[Any, Plan]:
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    return model.eval(), sparsify(model, sparsity=0.75, pattern=pattern, generator=generator, plan="off")


def test_the_papers_configuration() -> None:
    with torch.device("meta"):
        model = MODELS.get("unet")()
    assert sum(p.numel() for p in model.parameters()) == 274_056_163
    assert dict(model.config) == dict(unet_of_the_paper().config)
    taken = [item for item in survey(model, Block(1, 1), ()) if item.reason is None]
    assert len(taken) == 155  # diffusers' tensors
    assert len({item.spec.group or item.name for item in taken if item.spec}) == 123  # q, k, v as one: the paper's
    assert {type(item.module).__name__ for item in taken} == {"Conv2d", "Linear"}
    # Every weight of a matrix product is among them: what is left are biases and norms.
    assert {id(p) for p in model.parameters() if p.dim() > 1} == {id(item.module.weight) for item in taken}
    # Blocks: but for the convolutions from and to three channels.
    refused = [item.name for item in survey(model, Block(32, 32), ()) if item.reason is not None]
    assert refused == ["conv_in", "conv_out"]


def unet_of_the_paper() -> Any:
    from diffusers import UNet2DModel

    with torch.device("meta"):
        return UNet2DModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            attention_head_dim=32,
            block_out_channels=(224, 448, 672, 896),
            layers_per_block=2,
            down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
            up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
            norm_num_groups=32,
        )


def test_sizes_and_seeds() -> None:
    for size in SIZES.values():
        with torch.device("meta"):
            model = unet(**size)
            assert model(*example_inputs(model, 2)).sample.shape == (2, 3, size["size"], size["size"])
    before = torch.random.get_rng_state()
    one, same, other = (torch.cat([p.flatten() for p in tiny(s).parameters()]) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "size must be a multiple of 2"),
        ({"widths": (16, 30)}, "widths must be multiples of groups, 8"),
        ({"attention": (True,)}, "for each of the 2 levels"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet(**{**TINY, **change}, groups=8)


@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8"])
def test_a_sparse_unet_runs_in_a_pipeline_and_comes_back_from_its_folder(tmp_path: Path, pattern: str) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    def images(model: Any) -> torch.Tensor:
        pipeline = DDIMPipeline(unet=model, scheduler=DDIMScheduler(clip_sample=False))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipeline(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
        )

    model, plan = planned(pattern)
    drawn = images(model)
    save_unet(model, tmp_path / "unet", plan)
    loaded = load_unet(tmp_path / "unet")
    assert same(loaded, model) and any(key.endswith("topology.col") for key in loaded.state_dict())
    assert torch.equal(images(loaded), drawn)
    save_unet(model, tmp_path / "unet")  # without its plan: layers may run in another form, which rounds otherwise
    torch.testing.assert_close(images(load_unet(tmp_path / "unet")), drawn, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(images(densify(loaded)), drawn, rtol=1e-3, atol=1e-4)


def test_a_pipelines_folder_takes_a_sparse_unet(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    model = sparse()
    DDIMPipeline(unet=tiny(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    save_unet(model, tmp_path / "unet")
    assert not (tmp_path / "unet" / DENSE_FILE).exists()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model"):  # rather than dense weights at random
        DDIMPipeline.from_pretrained(tmp_path)
    pipeline = DDIMPipeline.from_pretrained(tmp_path, unet=load_unet(tmp_path / "unet"))
    assert same(pipeline.unet, model)


def test_what_diffusers_saved_of_a_sparse_unet_is_read(tmp_path: Path) -> None:
    model = sparse()
    model.save_pretrained(tmp_path)  # the weights lie where those of a dense model do
    assert same(load_unet(tmp_path), model)


def test_a_sparse_unet_runs_in_the_latent_pipeline() -> None:
    from diffusers import DDIMScheduler, LDMPipeline

    pipeline = LDMPipeline(vqvae=small_vq(), unet=sparse(), scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_a_dense_folder_is_diffusers_own(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    model = tiny().eval()
    save_unet(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same(UNet2DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False), model)
    assert same(load_unet(tmp_path / "ours"), model)
    assert same(load_unet(tmp_path / "theirs"), model)
    save_unet(sparse(), tmp_path / "ours")
    save_unet(model, tmp_path / "ours")  # the sparse weights are gone, and not read instead
    assert same(load_unet(tmp_path / "ours"), model)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same parameters and buffers, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected config\.json of a UNet2DModel; there is none"):
        load_unet(tmp_path)
    save_unet(sparse(), tmp_path)
    whole = (tmp_path / SPARSE_FILE).read_bytes()
    (tmp_path / SPARSE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"sparse_model\.safetensors: cannot be loaded"):
        load_unet(tmp_path)
    (tmp_path / SPARSE_FILE).write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 16]}))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(WeightsError, match="expected the settings of a UNet2DModel; got those of VQModel"):
        load_unet(tmp_path)


def small_vq() -> Any:
    torch.manual_seed(0)
    return autoencoder.vq_f4(widths=(8, 8, 16), blocks=1, codes=16, size=16, groups=8)


def test_vq_f4_is_the_published_one() -> None:
    with torch.device("meta"):
        model = autoencoder.vq_f4()
        assert sum(p.numel() for p in model.parameters()) == 55_322_782
        assert model.encode(torch.zeros(1, 3, 256, 256)).latents.shape == (1, 3, 64, 64)
    assert model.quantize.embedding.weight.shape == (8192, 3) and autoencoder.factor(model) == 4
    attention = {name.rpartition(".attentions")[0] for name, _ in model.named_modules() if ".attentions." in name}
    assert attention == {"encoder.mid_block", "decoder.mid_block"}


def test_an_autoencoder_from_its_folder(tmp_path: Path) -> None:
    model = small_vq()
    model.register_to_config(scaling_factor=0.18215)
    model.save_pretrained(tmp_path / "vqvae")
    loaded = autoencoder.load_autoencoder(tmp_path)  # a pipeline's folder
    assert loaded.config.scaling_factor == 1.0 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert autoencoder.fingerprint(loaded) == autoencoder.fingerprint(model)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = autoencoder.encode(loaded, x)
    with torch.no_grad():
        assert torch.equal(z, model.eval().quant_conv(model.encoder(x)))  # before quantisation
        codes = model.quantize(z)[0]
        assert not torch.allclose(codes, z)
        torch.testing.assert_close(autoencoder.decode(loaded, z), model.decoder(model.post_quant_conv(codes)))
        model.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert autoencoder.fingerprint(loaded) != autoencoder.fingerprint(model)


def test_an_autoencoder_that_is_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is none\. VQ-f4 is the folder `vqvae` of https://"):
        autoencoder.load_autoencoder(tmp_path)
    model = small_vq()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / DENSE_FILE)
    weights.pop("quant_conv.weight")
    save_file(weights, tmp_path / DENSE_FILE, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing_keys: quant_conv\.weight"):
        autoencoder.load_autoencoder(tmp_path)


def test_models_without_diffusers_say_what_to_install() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from sparsediff.models.unet import unet\n"
        "try: unet()\n"
        "except RuntimeError as error: assert \"pip install 'sparsediff[ldm]'\" in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_preset_of_drawings_refuses_the_unet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "chirodiff-kanjivg", "--dry-run", "--model", "unet"]) == 1
    assert "model 'unet' diffuses images" in capsys.readouterr().err
