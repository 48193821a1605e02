"""A pytest plugin: Triton interprets its kernels, so that the `triton` backend takes CPU tensors.

`TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p triton_interpreter tests/test_ops.py -k triton`
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_dot = interpreter.InterpreterBuilder.create_dot


def _widened(operand: Any) -> Any:
    """A bf16 operand in fp32: numpy knows no bf16, and the interpreter would multiply the bits as integers."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


interpreter.InterpreterBuilder.create_dot = _create_dot
