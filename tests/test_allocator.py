"""Freed memory is kept by the process, unless the user has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from sparsediff.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def touch():
    for _ in range(10):
        torch.ones(10 << 20)  # 40 MiB, freed at once
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of ten allocations of memory that was just freed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept_where_the_user_has_not_tuned_it() -> None:
    default, kept = page_faults("leave"), page_faults("keep")
    assert kept[0]
    assert kept[1] < default[1] / 10
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
