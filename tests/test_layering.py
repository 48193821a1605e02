"""The direction of the architecture, read from the imports; and what `import sparse_kernels` may not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent

# Lower layers may not import higher ones. A module belongs to the longest prefix that it starts with.
LAYERS = {
    "sparse_kernels._C": 0,
    "sparse_kernels._native": 0,
    "sparse_kernels.triton_kernels": 0,
    "sparse_kernels.activations": 0,
    "sparse_kernels.patterns": 0,
    "sparse_kernels.index": 1,
    "sparse_kernels.topology": 1,
    "sparse_kernels.row_groups": 1,
    "sparse_kernels.reference": 1,
    "sparse_kernels.allocation": 1,
    "sparse_kernels.backends": 2,
    "sparse_kernels.ops": 3,
    "sparse_kernels.nn": 4,
    "sparse_kernels.regrow": 4,
    "sparse_kernels.testing": 4,
    "sparse_kernels": 5,
    "sparsediff": 6,
}


def layer(module: str) -> int | None:
    """The layer of a module of ours; None for anybody else's."""
    matches = [prefix for prefix in LAYERS if module == prefix or module.startswith(f"{prefix}.")]
    return LAYERS[max(matches, key=len)] if matches else None


def modules() -> dict[str, Path]:
    """Every module of both packages by dotted name."""
    found = {}
    for package in ("sparse_kernels", "sparsediff"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """The dotted names that a module imports anywhere in it, relative imports resolved."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name` imports a submodule where there is one of that name.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    wrong = []
    for imported in imports(name, MODULES[name]):
        above = layer(imported)
        if above is not None and above > layer(name):
            wrong.append(imported)
    assert not wrong, f"{name} imports from above its layer: {wrong}"


def test_regrow_stays_beside_the_layers() -> None:
    """regrow works on handles: it knows topologies and patterns, no layer, no op."""
    if "sparse_kernels.regrow" in MODULES:
        ours = {i for i in imports("sparse_kernels.regrow", MODULES["sparse_kernels.regrow"]) if layer(i) is not None}
        assert all(layer(i) <= 1 for i in ours), ours


def test_import_of_sparse_kernels_is_light() -> None:
    code = "import sys, sparse_kernels; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    plain = "import sys, torch; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded, torch_loads = (
        set(subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.split())
        for c in (code, plain)
    )
    heavy = {"triton", "diffusers", "sparsediff", "datasets", "matplotlib", "scipy", "tyro", "pooch"}
    assert not heavy & (loaded - torch_loads)


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_every_import_is_declared() -> None:
    """What the packages import is the standard library, ours, or a declared dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    declared = {{"pillow": "PIL"}.get(name, name) for name in distributions}
    # Imported on first use and reported where missing: torch's CUDA builds bring Triton, the extra ldm brings its own.
    optional = {"triton"} | {re.match(r"[\w-]+", text)[0] for text in project["optional-dependencies"]["ldm"]}
    allowed = declared | optional | set(sys.stdlib_module_names) | {"sparse_kernels", "sparsediff"}
    used = {i.split(".")[0] for name, path in MODULES.items() for i in imports(name, path)}
    assert used <= allowed, f"not declared in pyproject.toml: {sorted(used - allowed)}"
