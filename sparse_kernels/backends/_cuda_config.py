"""How the CUDA kernels cut their work: configurations by shape, and explicit ones for sweeps.

`product_config` and `sddmm_config` are the rules; `with configured(product=…, sddmm=…)` replaces them, which is how a
benchmark sweeps and how tests reach every path.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..index import WeightIndex
from ._cuda_index import Orientation


class ConvSizes(NamedTuple):
    """`ConvShape` of csrc/api.h."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


class ProductConfig(NamedTuple):
    """`CudaProductConfig` of csrc/api.h."""

    tile_n: int
    tile_h: int
    tile_w: int
    m_tiles: int
    warps_n: int
    stages: int = 4
    splits: int = 1
    per_tap: int = 0


class SddmmConfig(NamedTuple):
    """`CudaSddmmConfig` of csrc/api.h."""

    tile_n: int
    tile_h: int
    tile_w: int
    warps: int
    rows: int
    splits: int = 1
    per_tap: int = 0


class Device(NamedTuple):
    """What the rules ask of a GPU."""

    multiprocessors: int
    shared_bytes: int  # of one block of threads, at most


# A configuration whose shared memory a launcher can tell.
SharedBytes = Callable[[ProductConfig], int]
SddmmSharedBytes = Callable[[SddmmConfig], int]

_product: ProductConfig | None = None
_sddmm: SddmmConfig | None = None


@contextlib.contextmanager
def configured(product: ProductConfig | None = None, sddmm: SddmmConfig | None = None) -> Iterator[None]:
    """Runs every kernel inside with these configurations, whatever the shape; None leaves the rule in place."""
    global _product, _sddmm
    before, (_product, _sddmm) = (_product, _sddmm), (product, sddmm)
    try:
        yield
    finally:
        _product, _sddmm = before


@functools.lru_cache(maxsize=4096)
def tile(positions: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """The tile (images, rows, columns) of a power of two of positions that wastes least of a result `height x width`
    and, of those, has the shortest border."""
    best: tuple[int, int, tuple[int, int, int]] | None = None
    columns = 1
    while columns <= positions:
        rows = 1
        while rows * columns <= positions:
            images = positions // (rows * columns)
            tiles = -(-batch // images) * -(-height // rows) * -(-width // columns)
            found = (tiles, images * (rows + 2) * (columns + 2), (images, rows, columns))
            best = found if best is None or found < best else best
            rows *= 2
        columns *= 2
    assert best is not None
    return best[2]


def _result(conv: ConvSizes, transposed: bool) -> tuple[int, int]:
    """Rows and columns of the largest phase of a product's result."""
    if not transposed:
        return conv.out_height, conv.out_width
    return -(-conv.height // conv.stride_h), -(-conv.width // conv.stride_w)


def product_config(
    conv: ConvSizes, sizes: Orientation, transposed: bool, device: Device, shared_bytes: SharedBytes
) -> ProductConfig:
    """128 positions a warp and up to 8 rows a block of threads; half of either, then splits of the channels, where that
    would leave multiprocessors idle; less in flight, then taps one by one, where shared memory is short.

    Raises:
        RuntimeError: where not even the smallest configuration fits.
    """
    if _product is not None:
        return _product
    height, width = _result(conv, transposed)
    groups = -(-sizes.rows // 8)
    warps_n = -(-sizes.rows // groups)
    phases = conv.stride_h * conv.stride_w if transposed else 1

    def blocks(config: ProductConfig) -> int:
        tiles = -(-conv.batch // config.tile_n) * -(-height // config.tile_h) * -(-width // config.tile_w)
        return tiles * phases * -(-sizes.rows // config.warps_n)

    config = ProductConfig(*tile(128, max(1, conv.batch), height, width), 8, warps_n)
    if sizes.side == 32 and blocks(config) < device.multiprocessors:
        config = ProductConfig(*tile(64, max(1, conv.batch), height, width), 4, warps_n)
    while blocks(config) < device.multiprocessors and config.warps_n > 4:
        config = config._replace(warps_n=-(-config.warps_n // 2))
    # A multiprocessor wants eight warps: of small blocks two or more. Each split must be worth its sums, which pass
    # through L2 twice: eight sub-blocks of a row at least.
    wanted = device.multiprocessors * max(1, 8 // config.warps_n)
    in_row = conv.kernel_h * conv.kernel_w * sizes.columns
    config = config._replace(splits=max(1, min(wanted // max(1, blocks(config)), in_row // 8, sizes.chunks, 8)))
    smaller = ProductConfig(*tile(64, max(1, conv.batch), height, width), 4, config.warps_n, splits=config.splits)
    for per_tap in (0, 1):
        for base in (config, smaller) if sizes.side == 32 else (config,):
            for stages in (4, 3, 2):
                found = base._replace(stages=stages, per_tap=per_tap)
                if shared_bytes(found) <= device.shared_bytes:
                    return found
    raise RuntimeError(
        f"cuda: no configuration for {conv} fits {device.shared_bytes} bytes of shared memory; use another backend."
    )


def sddmm_config(
    conv: ConvSizes, sizes: Orientation, index: WeightIndex, every: bool, device: Device, shared_bytes: SddmmSharedBytes
) -> SddmmConfig:
    """Tiles of 64 or 128 positions; as many rows as the warps can hold active blocks of; splits that fill the GPU once.

    Args:
        every: whether every block counts, as in scores.

    Raises:
        RuntimeError: where not even the smallest configuration fits.
    """
    if _sddmm is not None:
        return _sddmm
    held = 8 * (5 if sizes.side == 32 else 16)
    density = 1.0 if every else index.nnzb / (index.row_blocks * index.col_blocks)
    in_row = max(1.0, density * index.taps * (sizes.chunk // sizes.side))  # sub-blocks of a row and a chunk, expected
    rows = max(1, min(sizes.rows, 512 // sizes.side, int(held / in_row)))
    groups = -(-sizes.rows // rows)
    rows = -(-sizes.rows // groups)
    for per_tap in (0, 1):
        while True:
            for positions in (128, 64, 32, 16):
                found = SddmmConfig(*tile(positions, max(1, conv.batch), conv.out_height, conv.out_width), 8, rows)
                found = found._replace(per_tap=per_tap)
                if shared_bytes(found) <= device.shared_bytes:
                    return _split(found, conv, sizes, device)
            if rows == 1:
                break
            rows = -(-rows // 2)
        rows = max(1, min(sizes.rows, 4))
    raise RuntimeError(
        f"cuda: no configuration for {conv} fits {device.shared_bytes} bytes of shared memory; use another backend."
    )


def _split(config: SddmmConfig, conv: ConvSizes, sizes: Orientation, device: Device) -> SddmmConfig:
    """`config` with as many splits of the positions as fill the GPU once, each of two tiles or more."""
    tiles = -(-conv.batch // config.tile_n) * -(-conv.out_height // config.tile_h) * -(-conv.out_width // config.tile_w)
    blocks = -(-sizes.rows // config.rows) * sizes.chunks
    return config._replace(splits=max(1, min(device.multiprocessors // blocks, tiles // 2, 64)))
