"""Threads: torch's number, torch's OpenMP runtime, two Python threads at once, thousands of steps in flat memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import SparseConv2d, SparseGRU, SparseLayer, SparseLinear, _native, backends, sparsify
from sparsediff.methods.rigl import RigL

PATTERNS = ["unstructured", "block:16x16"]
KINDS = ["linear", "conv2d", "gru"]


def layer_of(kind: str, pattern: str, seed: int = 0) -> SparseLayer:
    options = {"pattern": pattern, "sparsity": 0.5, "generator": torch.Generator().manual_seed(seed)}
    made: dict[str, type[SparseLayer]] = {"linear": SparseLinear, "conv2d": SparseConv2d, "gru": SparseGRU}
    extra = {"linear": {}, "conv2d": {"kernel_size": 3, "padding": 1}, "gru": {"batch_first": True}}[kind]
    return made[kind](64, 64, **extra, **options)


def input_of(kind: str, seed: int) -> Tensor:
    shape = {"linear": (200, 64), "conv2d": (3, 64, 9, 9), "gru": (20, 7, 64)}[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(layer: SparseLayer, x: Tensor) -> list[Tensor]:
    """Output and every gradient, without touching `.grad`."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def executions(kind: str, pattern: str) -> list[str]:
    layer = layer_of(kind, pattern)
    cpu = torch.device("cpu")
    names = ("cpu", "densified")
    return [
        name
        for name in names
        if backends.why_not(name, layer.op, pattern=layer.pattern, dtype=torch.float32, device=cpu) is None
    ]


CASES = [(kind, pattern, name) for kind in KINDS for pattern in PATTERNS for name in executions(kind, pattern)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "pattern", "execution"), CASES)
def test_two_python_threads_get_the_bits_of_one(kind: str, pattern: str, execution: str, threads: int) -> None:
    """Layers of their own, and one layer that both use, at the same time."""
    torch.set_num_threads(threads)
    layers = [layer_of(kind, pattern, seed) for seed in (0, 1)]
    for layer in layers:
        layer.execution = execution
    jobs = [(layer, input_of(kind, seed)) for seed, layer in enumerate([*layers, layers[0]])] * 4
    expected = [results(*job) for job in jobs]

    def run(job: tuple[SparseLayer, Tensor]) -> list[Tensor]:
        torch.set_num_threads(threads)  # torch's setting is one of the calling thread's
        return results(*job)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, jobs))
    for ours, alone in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kind", "pattern", "execution"), CASES)
def test_a_thread_count_gives_one_result(kind: str, pattern: str, execution: str, threads: int) -> None:
    torch.set_num_threads(threads)
    layer, x = layer_of(kind, pattern), input_of(kind, 3)
    layer.execution = execution
    first = results(layer, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(layer, x), first, strict=True))


PROBE = """
import os, torch, sparse_kernels as sk
from pathlib import Path

def tasks():
    return len(os.listdir("/proc/self/task"))

layers = [sk.SparseLinear(256, 256, pattern=p, sparsity=0.5) for p in ("unstructured", "16x16")]
layers.append(sk.SparseGRU(64, 64, pattern="16x16", sparsity=0.5))
for layer in layers:
    layer.execution = "cpu"

def step():
    for layer in layers:
        y = layer(torch.randn(256, 8, layer.in_features if layer.op == "linear" else 64, requires_grad=True))
        (y[0] if isinstance(y, tuple) else y).sum().backward()

torch.set_num_threads(1)
step()
alone = tasks()
torch.set_num_threads(3)
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1 << 20).exp()
pool = tasks()
step()
maps = Path("/proc/self/maps").read_text().split()
runtimes = {path for path in maps if any(name in path for name in ("libgomp", "libiomp", "libomp"))}
print(len(runtimes), alone, pool, tasks())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))
def test_the_openmp_runtime_is_torchs_and_so_are_its_threads() -> None:
    """One runtime in the process, and no thread of ours beside the pool that torch made."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    out = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    runtimes, alone, pool, after = map(int, out[-4:])
    assert runtimes == 1
    # The autograd engine has one thread of its own, whose OpenMP pool is separate from the main thread's.
    assert after - pool <= 1 + 2, (alone, pool, after)


SHARES = """
import threading, torch, sparse_kernels as sk
from pathlib import Path

def spent():
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}

torch.set_num_threads(2)
for channels, length, kernel in ((256, 2048, 1), (64, 9000, 3)):
    layer = sk.SparseConv1d(channels, channels, kernel, pattern="block:32x32", sparsity=0.75)
    layer.execution = "cpu"
    x = torch.randn(1, channels, length)
    with torch.no_grad():
        layer(x)
        before = spent()
        for _ in range(20):
            layer(x)
        after = spent()
    times = {task: time - before.get(task, 0) for task, time in after.items()}
    own = times.pop(threading.get_native_id())
    print(max(times.values(), default=0) / own)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))
def test_threads_share_an_image_of_one_row() -> None:
    """A conv1d of batch 1 has no rows to divide; waiting threads sleep, so that their time is what they computed."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    out = subprocess.run(
        [sys.executable, "-c", SHARES], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert len(out) == 2 and all(float(share) > 0.2 for share in out), out


class Small(nn.Module):
    """A convolution, a GRU and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.gru(rows)[0])


def resident_mib() -> float:
    """What the process holds of physical memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(steps: int, pattern: str) -> tuple[float, float]:
    """Trains with a regrow every fifth step; resident memory after a quarter of the steps and at the end, in MiB."""
    torch.manual_seed(0)
    model = Small()
    sparsify(model, sparsity=0.7, pattern=pattern, plan="off", generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = RigL(model, optimizer, every=5, drop=0.2, total_steps=steps, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 16, 6, 6)
    early = 0.0
    for step in range(steps):
        method.begin_step()
        model(x).square().mean().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
        if step == steps // 4:
            gc.collect()
            early = resident_mib()
    gc.collect()
    return early, resident_mib()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8"])
@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_steps_grow_no_memory(pattern: str, steps: int) -> None:
    early, late = soak(steps, pattern)
    # Of 2,000 steps, one KiB kept by each would show; what the allocator's arenas breathe is less.
    assert late - early < 1.5, f"{early:.1f} MiB after {steps // 4} steps, {late:.1f} MiB after {steps}"
