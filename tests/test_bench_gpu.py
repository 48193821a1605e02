"""What of the GPU benchmarks runs without one: operands, checks and counts of each product, and stages as processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not a part of the installed packages

from bench import __main__ as cli  # noqa: E402
from bench import gpu, gpu_products, registry, rows  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
VARIANTS = (registry.Variant("block:32x32", 0.5), registry.Variant("block:64x32", 0.75))


@pytest.mark.parametrize("passes", gpu_products.PASSES)
@pytest.mark.parametrize("kernel,side", [(3, 6), (1, 4), (0, 1)])
def test_every_product_is_checked_against_the_dense_one(kernel: int, side: int, passes: str) -> None:
    product = gpu_products.Product(3, 96, side, kernel, passes)
    prepared = gpu_products.prepare(product, "reference", VARIANTS, device="cpu")
    assert prepared.calls == 2 and prepared.rivals[0].among == tuple(prepared.dense)
    for ours in prepared.ours.values():
        assert isinstance(ours, registry.Ours) and ours.check is not None and ours.run is not None
        ours.check()
        if passes == gpu_products.SCORES:
            assert ours.limit_mib == 16 and ours.density == 1
        elif kernel == 0:
            assert ours.flops == 2 * 3 * 96 * 96 * ours.density
    # On a CPU torch's BSR has none of these products in bf16, and says so.
    assert set(prepared.named) == {f"{gpu_products.TORCH_BSR}, {variant.name}" for variant in VARIANTS}
    for dense in prepared.dense.values():
        assert dense().isfinite().all()


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels import backends

    reference = backends.get("reference")
    right = reference.sddmm
    monkeypatch.setattr(reference, "sddmm", lambda *given: right(*given) * 1.05)
    product = gpu_products.Product(2, 64, 5, 3, gpu_products.WEIGHT)
    for ours in gpu_products.prepare(product, "reference", VARIANTS, device="cpu").ours.values():
        assert isinstance(ours, registry.Ours) and ours.check is not None
        with pytest.raises(registry.Wrong, match="weight gradient is off by"):
            ours.check()


@without_gpu
def test_gpu_cases_are_listed_kept_out_of_cpu_runs_and_say_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "\ngpu-conv-cuda: 3x3 convolutions" in capsys.readouterr().out
    assert not [case for case, _ in registry.select([]) if case.device != "cpu"]
    assert {case.name for case, _ in registry.select([], device="cuda")} == set(gpu.CASES)
    for command in (["run", "--device", "cuda"], ["gpu"]):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert "torch finds" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no GPU"):
        gpu_products.prepare(gpu_products.Product(2, 64, 5, 3, "forward"), "reference", VARIANTS)


def test_goals_are_efficiencies() -> None:
    for case, problem in registry.select([], device="cuda"):
        for variant in problem.variants:
            if variant.pattern == "block:32x32" and problem.passes == "forward" and variant.sparsity == 0.75:
                expected = {"gpu-linear-triton": 1.6, "gpu-linear-cuda": 2.2}.get(case.name, 3.0)
                assert variant.goals == {"D1": pytest.approx(expected)}


def test_stages_fail_hang_or_pass_by_themselves(tmp_path: Path) -> None:
    def stage(name: str, code: str, **more: str) -> gpu.Stage:
        return gpu.Stage(name, [sys.executable, "-c", code], 30, **more)  # type: ignore[arg-type]

    assert gpu.perform(stage("a", "print('written')"), tmp_path, 30).startswith("passed in")
    assert "FAILED (exit 3)" in gpu.perform(stage("b", "raise SystemExit(3)"), tmp_path, 30)
    assert "stopped after its 1 s" in gpu.perform(stage("c", "import time; time.sleep(30)"), tmp_path, 1)
    assert gpu.perform(stage("d", "", why_not="no nvcc"), tmp_path, 30) == "not run: no nvcc"
    assert "written" in (tmp_path / "a.log").read_text() and not (tmp_path / "d.log").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.NEEDS, "tests", {"pytest": "pytest", "no_such_module": "its-wheel"})
    assert gpu.missing("tests") == "bring the wheels of its-wheel"
    assert gpu.missing("bench") == ""


def test_rows_of_a_gpu_have_a_key_of_their_own() -> None:
    made = {"case": "gpu-conv-cuda", "shape": "s", "pattern": "block:32x32", "sparsity": 0.5, "density": 0.5,
            "threads": 0, "rival": "D1", "ours_ms": 1.0, "rival_ms": 1.0, "speedup": 1.0, "speedup_p20": 1.0,
            "speedup_p80": 1.0, "efficiency": 0.5}  # fmt: skip
    one = rows.Row(**made, machine={"gpu": "NVIDIA H200", "gpus": 1, "capability": "9.0"})
    other = rows.Row(**made, machine={"gpu": "NVIDIA A100", "gpus": 1, "capability": "8.0"})
    assert one.key != other.key and "NVIDIA H200" in one.key
