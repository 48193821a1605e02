"""The build: what the native module is made of, what the distributions contain, what a broken setting says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from sparse_kernels import _native
from sparse_kernels.backends import registry
from sparsediff import doctor

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("avx512", "avx512_bf16", "avx2", "portable")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, **environment)


# ---- the native module -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native():
    return _native.native()


def test_every_instruction_set_runs_and_peak_is_measured(native) -> None:
    before, peaks = native.isa_name(), {}
    try:
        for isa in native.isa_names():
            native.set_isa(isa)
            assert native.isa_name() == isa
            peaks[isa] = native.peak_fma_gflops(0.02, 1)
    finally:
        native.set_isa(before)
    assert min(peaks.values()) > 0.1
    assert native.isa_names()[-1] == "portable"
    assert peaks[native.isa_names()[0]] == max(peaks.values())


def test_instruction_set_can_be_forced_by_the_environment(native) -> None:
    code = "from sparse_kernels._native import native; print(native().isa_name())"
    for isa in native.isa_names():
        assert python(code, SPARSE_KERNELS_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error_with_a_remedy() -> None:
    result = python("from sparse_kernels._native import native; native()", SPARSE_KERNELS_ISA="sse9")
    assert result.returncode != 0
    assert "SPARSE_KERNELS_ISA must be avx512, avx2 or portable" in result.stderr
    with pytest.raises(ValueError, match="sse9"):
        _native.native().set_isa("sse9")


@pytest.mark.parametrize(("seconds", "threads"), [(0.0, 1), (0.1, 0), (float("nan"), 1)])
def test_peak_refuses_nonsense(native, seconds: float, threads: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        native.peak_fma_gflops(seconds, threads)


def test_a_missing_module_names_the_remedy(tmp_path: Path) -> None:
    package = shutil.copytree(
        ROOT / "sparse_kernels", tmp_path / "sparse_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    code = """if True:
        import sys
        # An editable install would find the module that is built in the checkout.
        sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
        from sparse_kernels import _native
        print(_native.why_unavailable())
    """
    missing = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout
    assert "was not built" in missing and "reinstall" in missing
    (package / Path(_native.native().__file__).name).write_bytes(b"not a library")
    broken = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout
    assert "does not load" in broken and "reinstall" in broken


def test_openmp_is_torchs(native) -> None:
    """One OpenMP runtime in the process, or threads would be counted twice."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/maps")
    maps = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps))
    assert len(runtimes) <= 1, runtimes


def test_cuda_status_never_fails_without_a_driver(native) -> None:
    assert isinstance(native.cuda_built(), bool)
    reason = native.cuda_why_unavailable()
    assert (reason is None) == bool(native.cuda_devices())
    assert bool(native.cuda_archs()) == native.cuda_built()
    if not native.cuda_built():
        assert reason == "built without nvcc"


# ---- symbols ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of object files of a build of this tree, warnings as errors."""
    pytest.importorskip("pybind11", reason="building needs the `test` extra")
    folder = tmp_path_factory.mktemp("build")
    result = run(
        *(sys.executable, "setup.py", "build_ext", "--build-temp", folder, "--build-lib", folder / "lib"),
        SPARSE_KERNELS_FLAGS="-Werror -O1",
        SPARSE_KERNELS_CUDA="off",
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder


def test_compiles_without_warnings(objects: Path) -> None:
    assert list(objects.glob("lib/sparse_kernels/_C*"))


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_no_shared_inline_code_is_compiled_for_an_instruction_set(objects: Path) -> None:
    """The linker keeps one copy of an inline function: it must not be the one that only some CPUs run."""
    kernels = [path for isa in ISAS for path in (objects / isa).glob("*.o")]
    assert kernels
    for path in kernels:
        symbols = run("nm", "-C", "--defined-only", path).stdout
        weak = re.findall(r"^[0-9a-f]+ ([VWuvwi]) (.*)$", symbols, re.MULTILINE)
        shared = [name for _, name in weak if f"sk::{path.parent.name}::" not in name]
        assert not shared, f"{path}: {shared}"
        constructors = re.findall(r"_GLOBAL__sub_I\w*", symbols)
        assert not constructors, f"{path} runs code when the module is loaded: {constructors}"


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_module_exports_its_entry_alone(objects: Path) -> None:
    (module,) = objects.glob("lib/sparse_kernels/_C*")
    exported = run("nm", "-DC", "--defined-only", module).stdout.splitlines()
    ours = [line.split(" ", 2)[2] for line in exported if " T " in line]
    assert ours == ["PyInit__C"]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SPARSE_KERNELS_CUDA", "maybe", "must be auto, on or off"),
        ("SPARSE_KERNELS_CUDA", "on", "there is no nvcc"),
        ("CXX", "no-such-compiler", "no C++ compiler"),
    ],
)
def test_a_wrong_setting_is_named(variable: str, value: str, message: str, tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path)
    # A toolkit folder without a toolkit: no nvcc on any machine.
    result = run(*command, **({"CUDA_HOME": str(tmp_path)} | {variable: value}))
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_wrong_architectures_are_named(tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path)
    result = run(*command, SPARSE_KERNELS_ARCHS="hopper", SPARSE_KERNELS_CUDA="on")
    assert result.returncode != 0
    assert "SPARSE_KERNELS_ARCHS must look like" in result.stdout + result.stderr


def test_setup_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120


# ---- distributions ---------------------------------------------------------------------------------------------------


def package_files() -> set[str]:
    tree = [path for package in ("sparse_kernels", "sparsediff") for path in (ROOT / package).rglob("*.py")]
    return {str(path.relative_to(ROOT)) for path in tree}


def test_every_module_is_packaged(tmp_path: Path) -> None:
    result = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")} == package_files()


def test_the_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    result = run(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")}
    assert package_files() | native | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["off", "auto"])
def test_isolated_install(tmp_path: Path, cuda: str) -> None:
    """`pip install` of the source distribution into a fresh environment, build isolation on, and what it then runs.

    The dependencies come from this environment through a .pth file, since downloading torch is not what is tested.
    """
    sdist = run(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    assert sdist.returncode == 0, sdist.stderr
    venv.create(tmp_path / "venv", with_pip=True)
    fresh = tmp_path / "venv" / "bin" / "python"
    (archive,) = tmp_path.glob("*.tar.gz")
    pip = run(fresh, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, archive, SPARSE_KERNELS_CUDA=cuda, cwd=tmp_path)
    assert pip.returncode == 0, pip.stdout[-4000:] + pip.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() <= names
    assert len([name for name in names if re.fullmatch(r"sparse_kernels/_C\..*(so|pyd)", name)]) == 1
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sparse_kernels", "sparsediff"}
    assert run(fresh, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path).returncode == 0

    site = run(fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site, "dependencies.pth").write_text(str(Path(pytest.__file__).resolve().parents[1]))
    code = "import torch, sparse_kernels._native as n; m = n.native(); print(n.__file__, m.isa_name(), m.cuda_built())"
    result = run(fresh, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    path, isa, built = result.stdout.split()
    assert path.startswith(site) and isa in ("avx512", "avx2", "portable")
    assert built == str(cuda == "auto" and shutil.which("nvcc") is not None)


@pytest.mark.slow
def test_kernels_under_sanitizers() -> None:
    result = run(sys.executable, ROOT / "tests" / "sanitize.py")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_reports_every_backend_and_the_kernels(native) -> None:
    text = doctor.report()
    assert torch.__version__ in text
    assert native.isa_name() in text
    for name in registry.names():
        reason = registry.get(name).why_unavailable()
        assert f"{name:<12} " + (f"unavailable: {reason}" if reason else "available") in text


def test_doctor_works_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_load", lambda: (None, "the native module was not built; reinstall"))
    assert "none: the native module was not built; reinstall" in doctor.report()
