"""Models, one file each; `MODELS.get(name)(**settings)` builds one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparsediff.registry import Registry

MODELS: Registry[Callable[..., nn.Module]] = Registry("model", __name__)
