"""Public implementations of the same work, as users would call them.

A peer says why it is not here, and what it does not serve; one that serves a job is built for it and must give the
dense result before it is timed. Those that cannot run on this kind of machine at all are named in `ELSEWHERE`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import check_close
from bench.registry import Wrong
from sparse_kernels.patterns import Block, parse_pattern

PATIENCE = 5.0  # seconds
FORWARD, TRAINING = "forward", "forward + backward"

# What people would also look for, and why it has no row here.
ELSEWHERE = {
    "stk": "CUDA only (Triton kernels for MegaBlocks, fp16), and blocks of 128 only",
    "cuSPARSELt, torch 2:4 semi-structured": "NVIDIA GPUs only, and 2:4 only",
    "torch-blocksparse, triton.ops.blocksparse": "CUDA only, and gone from current Triton",
    "pytorch_block_sparse": "CUDA only (CUTLASS), unmaintained",
    "sputnik": "CUDA only, C++ only",
    "torchao": "its sparsity code was removed; it never trained on CPUs",
    "DeepSparse": "inference of ONNX files only, discontinued",
    "libxsmm": "C only: no Python package with its block-sparse products",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """Work to do: `y = x · Wᵀ`, or a convolution of stride 1 and dilation 1 where `weight` has four dimensions.

    Args:
        weight: `[out, in]` or `[out, in, R, S]`, dense, zero where absent. x, dy: `[P, in]`, `[P, out]`, or
            `[N, C, H, W]`, as the dense rival gets them. passes: "forward" or "forward + backward".
        padding: of a convolution.
    """

    pattern: str
    passes: str
    weight: Tensor
    x: Tensor
    dy: Tensor
    padding: int = 0

    @property
    def op(self) -> str:
        return "linear" if self.weight.dim() == 2 else "conv"

    def dense(self) -> Tensor:
        """y, computed densely."""
        if self.op == "linear":
            return torch.nn.functional.linear(self.x, self.weight)
        return torch.nn.functional.conv2d(self.x, self.weight, padding=self.padding)

    @property
    def block(self) -> Block:
        return parse_pattern(self.pattern)


# What a peer returns: y, and for training dX and dW (dense, or its values in row-major order of the nonzeros).
Results = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A public implementation.

    Args:
        package: must be importable. install: how to get it.
        why_not: why it does not serve a job; None where it does.
        build: makes the callable for a job it serves.
    """

    name: str
    package: str
    install: str
    why_not: Callable[[Job], str | None]
    build: Callable[[Job], Callable[[], Results]]

    def why_absent(self) -> str | None:
        """Why it cannot be used here at all, with the remedy."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: {self.install}"
        return None


def contenders(job: Job) -> tuple[dict[str, Callable[[], Results]], dict[str, str]]:
    """Every peer that serves a job and computes it rightly, and for each other one the reason."""
    functions, reasons = {}, {}
    for peer in PEERS:
        reason = peer.why_absent() or peer.why_not(job)
        if reason is None:
            try:
                run = peer.build(job)
                start = time.perf_counter()
                results = run()
                seconds = time.perf_counter() - start
                _check(job, peer.name, results)
                if seconds > PATIENCE:
                    reason = f"right, but a call takes {seconds:.1f} s: no rounds of it"
            # A peer that breaks is named with what it said; it must not end the measurement of ours.
            except Exception as error:
                reason = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            else:
                if reason is None:
                    functions[peer.name] = run
        if reason is not None:
            reasons[peer.name] = reason
    return functions, reasons


def roll_call() -> dict[str, str | None]:
    """Every peer that is known, and why it is not here; None where it is."""
    return {**{peer.name: peer.why_absent() for peer in PEERS}, **ELSEWHERE}


def _check(job: Job, name: str, results: Results) -> None:
    expected = _expected(job)
    for what, actual, wanted in zip(("y", "dX", "dW"), results, expected, strict=False):
        if actual.shape != wanted.shape:  # values of the nonzeros alone
            wanted = wanted[job.weight != 0]
        check_close(actual.detach(), wanted, f"{name}'s {what}")


def _expected(job: Job) -> Results:
    if job.passes == FORWARD:
        return (job.dense(),)
    x, weight = job.x.detach().requires_grad_(), job.weight.detach().requires_grad_()
    y = dataclasses.replace(job, x=x, weight=weight).dense()
    return (y.detach(), *torch.autograd.grad(y, (x, weight), job.dy))


def _beta(function: Callable[[Job], Any]) -> Callable[[Job], Any]:
    """Without torch's note that its sparse layouts are in beta."""

    @functools.wraps(function)
    def quiet(job: Job) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta", category=UserWarning)
            return function(job)

    return quiet


# torch.sparse (MKL)


def _csr_serves(job: Job) -> str | None:
    return None if job.op == "linear" else "torch.sparse has no convolution"


@_beta
def _csr(job: Job) -> Callable[[], Results]:
    weight = job.weight.to_sparse_csr()
    turned = job.weight.T.contiguous().to_sparse_csr()
    if job.passes == FORWARD:
        return lambda: ((weight @ job.x.T).T,)

    def train() -> Results:
        y = (weight @ job.x.T).T
        dx = (turned @ job.dy.T).T
        dw = torch.sparse.sampled_addmm(weight, job.dy.T, job.x, beta=0.0)
        return y, dx, dw.values()

    return train


def _bsr_serves(job: Job) -> str | None:
    if job.op != "linear":
        return "torch.sparse has no convolution"
    if job.passes != FORWARD:
        return "torch.sparse BSR has no product at the nonzero blocks alone (sampled_addmm takes CSR only)"
    if job.block.bh != job.block.bw or job.block.area == 1:
        return f"MKL's BSR takes square blocks; this is {job.pattern}"
    return None


@_beta
def _bsr(job: Job) -> Callable[[], Results]:
    weight = job.weight.to_sparse_bsr((job.block.bh, job.block.bw))
    return lambda: ((weight @ job.x.T).T,)


# SciPy: one thread


def _scipy_serves(job: Job) -> str | None:
    if job.op != "linear":
        return "scipy.sparse has no convolution"
    return None if job.passes == FORWARD else "scipy.sparse has no product at the nonzeros alone, which dW needs"


def _scipy(job: Job) -> Callable[[], Results]:
    import scipy.sparse

    dense = job.weight.numpy()
    if job.block.area == 1:
        weight = scipy.sparse.csr_matrix(dense)
    else:
        weight = scipy.sparse.bsr_matrix(dense, blocksize=(job.block.bh, job.block.bw))
    x = job.x.T.contiguous().numpy()  # [in, P], which its loops want
    return lambda: (torch.from_numpy(weight @ x).T,)


# SparseProp (Nikdan et al. 2023)


def _sparseprop_serves(job: Job) -> str | None:
    if job.block.area != 1:
        return "it knows no blocks"
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    private = 4 * int((job.weight != 0).sum())
    if job.op == "conv" and job.passes == TRAINING and stack != resource.RLIM_INFINITY and 2 * private > stack:
        return (
            f"its backward keeps a weight gradient ({private / 2**20:.1f} MiB) on each thread's stack and would crash "
            f"the process (ulimit -s: {stack / 2**20:.0f} MiB)"
        )
    return None


def _sparseprop(job: Job) -> Callable[[], Results]:
    from sparseprop.modules import SparseConv2d, SparseLinear

    # Its OpenMP runtime may be another one than torch's, which would then use every core whatever torch is told.
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(torch.get_num_threads())
    if job.op == "linear":
        return _module(job, SparseLinear(job.weight))
    # Its convolutions take NCHW, in two forms. The default one is silently wrong unless the batch divides by 8.
    over_width = [True] if job.x.shape[0] % 8 else [False, True]
    forms = [
        _module(job, SparseConv2d(job.weight.contiguous(), padding=job.padding, vectorizing_over_on=form))
        for form in over_width
    ]
    return min(forms, key=_seconds) if len(forms) > 1 else forms[0]


def _module(job: Job, layer: torch.nn.Module) -> Callable[[], Results]:
    x = job.x.detach().contiguous().requires_grad_(job.passes == TRAINING)
    dy, weight = job.dy.contiguous(), next(layer.parameters())

    def run() -> Results:
        if job.passes == FORWARD:
            with torch.no_grad():
                return (layer(x),)
        y = layer(x)
        return (y, *torch.autograd.grad(y, (x, weight), dy))

    return run


def _seconds(run: Callable[[], Any]) -> float:
    from bench.harness import interleave

    return min(interleave({"run": run}, seconds=0.0, fewest=2)["run"].values())


PEERS = (
    Peer("torch CSR (MKL)", "torch", "pip install torch", _csr_serves, _csr),
    Peer("torch BSR (MKL)", "torch", "pip install torch", _bsr_serves, _bsr),
    Peer("scipy.sparse, one thread", "scipy", "pip install scipy", _scipy_serves, _scipy),
    Peer(
        "SparseProp",
        "sparseprop",
        "pip install pybind11 && pip install --no-build-isolation sparseprop (it compiles, for this CPU alone)",
        _sparseprop_serves,
        _sparseprop,
    ),
)
