"""What of the GPU benchmarks runs without one: operands, checks and counts of each product, and stages as processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
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


def command_lines() -> Iterator[bytes]:
    """Of every process of this machine."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield Path(f"/proc/{name}/cmdline").read_bytes()


def test_stages_fail_hang_or_pass_by_themselves(tmp_path: Path) -> None:
    def stage(name: str, code: str, **more: str) -> gpu.Stage:
        return gpu.Stage(name, [sys.executable, "-c", code], 30, f"{name}.log", **more)  # type: ignore[arg-type]

    assert gpu.perform(stage("a", "print('written')"), tmp_path, 30).startswith("passed in")
    assert "FAILED (exit 3)" in gpu.perform(stage("b", "raise SystemExit(3)"), tmp_path, 30)
    assert "stopped after its 1 s" in gpu.perform(stage("c", "import time; time.sleep(30)"), tmp_path, 1)
    # What a stage started ends with it.
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(29)'])"
    begun = time.monotonic()
    with (tmp_path / "e.log").open("w"):
        assert "stopped" in gpu.perform(stage("e", child), tmp_path, 2)
    while any(b"time.sleep(29)" in line for line in command_lines()):  # it is dead but may still be leaving
        assert time.monotonic() - begun < 20
    assert gpu.perform(stage("d", "", why_not="no nvcc"), tmp_path, 30) == "not run: no nvcc"
    assert "written" in (tmp_path / "a.log").read_text() and not (tmp_path / "d.log").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.NEEDS, "tests", {"pytest": "pytest>=999", "no_such_module": "its-wheel"})
    assert gpu.missing("tests") == "bring the wheels of pytest>=999, its-wheel"
    assert gpu.missing("bench") == "" and gpu.missing("build") == ""


def test_smoke_knows_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_kernels import backends

    products = [one for one in gpu.smoke_products() if one[0].side == 9 and one[0].kernel == 3]
    assert {one[0].stride for one in products} == {1, 2}
    monkeypatch.setattr(gpu, "smoke_products", lambda: iter(products))
    monkeypatch.setattr(gpu, "BACKENDS", ("reference",))
    monkeypatch.setattr(gpu_products.prepare, "__kwdefaults__", {"device": "cpu", "alone": True})
    assert gpu.smoke() == 0
    assert "24 products checked, 0 wrong" in capsys.readouterr().out
    reference = backends.get("reference")
    right = reference.spmm_t
    monkeypatch.setattr(reference, "spmm_t", lambda *given: right(*given) * 1.05)
    assert gpu.smoke() == 1
    assert "24 products checked, 6 wrong" in capsys.readouterr().out


def test_rows_name_the_commit_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rows._commit.cache_clear()
    monkeypatch.setenv("SPARSE_KERNELS_COMMIT", "abc1234")
    assert rows._commit() == "abc1234"
    rows._commit.cache_clear()
    monkeypatch.delenv("SPARSE_KERNELS_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert rows._commit() == "unknown"
    rows._commit.cache_clear()


def test_rows_of_a_gpu_have_a_key_of_their_own() -> None:
    made = {"case": "gpu-conv-cuda", "shape": "s", "pattern": "block:32x32", "sparsity": 0.5, "density": 0.5,
            "threads": 0, "rival": "D1", "ours_ms": 1.0, "rival_ms": 1.0, "speedup": 1.0, "speedup_p20": 1.0,
            "speedup_p80": 1.0, "efficiency": 0.5}  # fmt: skip
    one = rows.Row(**made, machine={"gpu": "NVIDIA H200", "gpus": 1, "capability": "9.0"})
    other = rows.Row(**made, machine={"gpu": "NVIDIA A100", "gpus": 1, "capability": "8.0"})
    assert one.key != other.key and "NVIDIA H200" in one.key


RATE = """
import triton
from triton.backends.compiler import GPUTarget
from bench.tensor_core_rate import K, M, WARPS, multiply
for n in (32, 64, 128):
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "rounds": "i32"}
    sizes = {"M": M, "N": n, "K": K}
    source = triton.compiler.ASTSource(multiply, {**pointers, **{name: "constexpr" for name in sizes}}, sizes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    print(n, made.asm["ptx"].count("wgmma.mma_async"))
"""


def test_the_rate_of_the_tensor_cores_is_that_of_wgmma() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert set(counts) == {"32", "64", "128"} and min(map(int, counts.values())) > 0, done.stdout
