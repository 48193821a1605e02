"""Shared by all tests: bitwise repeatability needs a fixed thread count, and a test that changes it must not leak."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# Inductor's cache on disk knows an op by its name, not by its code: what another version of the kernels left there
# would be taken for this one's. So each run has a cache of its own, which its workers inherit.
if "SPARSEDIFF_TEST_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="inductor-")
    os.environ["SPARSEDIFF_TEST_CACHE"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

import torch

from sparse_kernels import _native, testing

# Machines that run tests are shared, so a slow example is no failure; and a red test must be red again tomorrow.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _keep_threads_and_seed() -> Iterator[None]:
    """Every test starts from one seed and gives back the thread count that it found."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=_native.native().isa_names() if _native.why_unavailable() is None else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn, with outputs and workspaces poisoned with NaN."""
    native = _native.native()
    before = native.isa_name()
    native.set_isa(request.param)
    with testing.poisoned_buffers():
        yield request.param
    native.set_isa(before)
