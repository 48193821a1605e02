"""What a model costs, counted without running it: parameters, FLOPs, the index of its topology, memory of training.

A FLOP is half a multiply-add. Only products count (convolutions, linear layers, GRU projections); norms, activations
and additions do not. Products of activations with each other (attention) have no weights and stay as they are; the
published figures leave them out, and so do `Account.ratio` and every figure that is not named after them.

    forward   2 · Σ over weights of (rows of its product · its nonzeros)
    sample    denoising steps · forward
    training  steps · (3 f_S, or RigL's (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)), a step counted for one sample (as
              the paper's tables do) or for its whole batch

Sources: Evci et al., "Rigging the Lottery", ICML 2020, appendix on FLOPs; Oliveira, Mocanu, Leiva, "Sparse-to-Sparse
Training of Diffusion Models", TMLR 2025, whose tables count so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import Topology, backends
from sparse_kernels.nn.surgery import TWINS, share_out
from sparse_kernels.nn.survey import survey
from sparse_kernels.patterns import Block, parse_pattern

BYTES = 4  # training keeps fp32


@dataclass(frozen=True)
class WeightCount:
    """One weight.

    Args:
        name: as the plan names it. shape: of the dense weight. pattern: how it is cut, or "dense".
        nonzeros: elements that are present, padding left out. stored: elements kept, padding included.
        positions: rows of its product in a forward of one sample.
        index_bytes: of its topology's own arrays. derived_bytes: of what this machine's CPU kernel derives from them.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    nonzeros: int
    stored: int
    positions: float
    index_bytes: int = 0
    derived_bytes: int = 0

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)

    @property
    def flops(self) -> float:
        """Of a forward of one sample."""
        return 2 * self.positions * self.nonzeros

    @property
    def dense_flops(self) -> float:
        """The same of the dense weight."""
        return 2 * self.positions * self.numel


@dataclass(frozen=True)
class ModelCount:
    """A model beside its dense twin.

    Args:
        weights: convolution, linear and GRU weights, in module order.
        rest: parameters outside them (biases, norms), which stay dense. tensors: parameter tensors in total.
        other_flops: of a forward's products that have none of these weights (attention's).
        inputs: shapes of the one sample that positions and FLOPs stand for.
    """

    weights: tuple[WeightCount, ...]
    rest: int
    tensors: int
    other_flops: float
    inputs: str

    @property
    def parameters(self) -> int:
        """Nonzero weights and everything dense."""
        return self.rest + sum(weight.nonzeros for weight in self.weights)

    @property
    def dense_parameters(self) -> int:
        """Of the dense twin."""
        return self.rest + sum(weight.numel for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is absent."""
        return 1 - sum(weight.nonzeros for weight in self.weights) / sum(weight.numel for weight in self.weights)

    @property
    def flops(self) -> float:
        """f_S: of a forward of one sample, without `other_flops`."""
        return sum(weight.flops for weight in self.weights)

    @property
    def dense_flops(self) -> float:
        """f_D, likewise."""
        return sum(weight.dense_flops for weight in self.weights)

    def memory(self, *, dense: bool = False) -> dict[str, int]:
        """Bytes that training keeps between steps, as `training_bytes` measures them: fp32, AdamW, an EMA.

        The index includes what kernels derive, as if every sparse weight ran by its sparse kernel.
        """
        stored = self.rest + sum(weight.numel if dense else weight.stored for weight in self.weights)
        index = 0 if dense else sum(weight.index_bytes + weight.derived_bytes for weight in self.weights)
        sizes = {"parameters": 1, "gradients": 1, "optimizer": 2, "ema": 1}
        memory = {kind: copies * stored * BYTES for kind, copies in sizes.items()}
        memory["optimizer"] += self.tensors * BYTES  # AdamW's step counts
        return memory | {"index": index}


def count(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float,
    pattern: str | Block = "unstructured",
    allocation: str = "erk",
    exclude: Iterable[Any] = (),
) -> ModelCount:
    """What `sparsify` with these arguments would leave of a dense model, which stays as it is.

    Args:
        model: no content of it is read, so it may lie on the meta device, where nothing is computed either.
        example_inputs: of a forward of one sample, on the model's device.
        sparsity, pattern, allocation, exclude: as for `sparsify`.

    Raises:
        ValueError: as `sparsify` does.
    """
    block = parse_pattern(pattern)
    found = [item for item in survey(model, block, tuple(exclude)) if item.spec is not None]
    with FlopCounterMode(display=False) as counter:  # sees the forward that tells the positions
        kept, positions = share_out(model, found, sparsity, block, allocation, example_inputs)
    weights = []
    for item, blocks in zip(found, kept, strict=True):
        assert item.spec is not None
        whole, numel, rows = item.spec.blocks(block), item.spec.numel, positions[id(item.module)]
        if item.reason is not None or blocks == whole:
            weights.append(WeightCount(item.name, item.shape, "dense", numel, numel, rows))
            continue
        op = next(twin.op for kind, twin in TWINS.items() if isinstance(item.module, kind))
        own, derived = _index_bytes(op, item.spec.out, item.spec.in_, item.spec.taps, block, blocks)
        nonzeros = round(blocks * numel / whole)
        stored = blocks * block.area
        weights.append(WeightCount(item.name, item.shape, str(block), nonzeros, stored, rows, own, derived))
    total = sum(parameter.numel() for parameter in model.parameters())
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    result = ModelCount(
        tuple(weights),
        rest=total - sum(weight.numel for weight in weights),
        tensors=len(list(model.parameters())),
        other_flops=0.0,
        inputs=", ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor)),
    )
    return dataclasses.replace(result, other_flops=counter.get_total_flops() - result.dense_flops)


def _index_bytes(op: str, out: int, in_: int, taps: int, block: Block, blocks: int) -> tuple[int, int]:
    """Bytes of a topology's arrays, and of those that the backend of this machine's CPU derives from them."""
    nowhere = torch.empty(blocks, dtype=torch.long, device="meta")
    topology = Topology(out, in_, block, nowhere, nowhere, taps=taps)
    name, _ = backends.choose(op, pattern=block, dtype=torch.float32, device=torch.device("cpu"))
    deriver = backends.get(name).deriver(op, block)
    derived = {} if deriver is None else deriver.capacity(topology)
    own = sum(buffer.nbytes for buffer in topology.buffers())
    return own, sum(math.prod(shape) * dtype.itemsize for shape, dtype in derived.values())


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module) -> dict[str, int]:
    """Bytes that training keeps between steps, by kind, measured on the tensors themselves; activations and workspaces
    are not among them.

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
