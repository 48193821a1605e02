"""What training a model keeps in memory, by kind, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_kernels import Topology


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module) -> dict[str, int]:
    """Bytes that training keeps between steps, by kind; activations and workspaces are not among them.

    Args:
        model: with its gradients. optimizer: with its state, so after a step. average: the model's EMA.

    Returns:
        Bytes of `parameters`, `gradients`, `optimizer`, `ema` and `index` (every buffer of every Topology, a kernel's
        derived ones included).
    """
    topologies = [module for module in model.modules() if isinstance(module, Topology)]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "parameters": distinct_bytes(model.parameters()),
        "gradients": distinct_bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": distinct_bytes(states),
        "ema": distinct_bytes(average.parameters()),
        "index": distinct_bytes(buffer for topology in topologies for buffer in topology.buffers()),
    }
