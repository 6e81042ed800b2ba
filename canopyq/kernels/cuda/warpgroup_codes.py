"""8 bits by 8 bits on warpgroups (compute capability 9.0): products of any number of rows, scaled on the way out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch, tiles, wide_int8
from canopyq.kernels.cuda.eight_bits import CODES, KINDS, check_operands
from canopyq.kernels.cuda.tiles import RESERVED, SHARED
from canopyq.kernels.cuda.wide_int8 import WideTile

STEP = 128  # columns that are copied at a time
HOPPER = (9, 0)
KERNEL = "warpgroup_codes"  # as the table of tiles calls it
RECIPES = {"int8": "w8a8", "fp8_e4m3": "fp8"}  # likewise


@dataclass(frozen=True)
class CodesTile:
    """Constants of ``warpgroup_codes.cu``, named as there."""

    tokens: int
    tall: int
    warpgroups: int
    stages: int
    cluster: int
    per_sm: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.tall * self.warpgroups

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, whose memory the sums take over, and what aligning it may cost."""
        return max(self.stages * (self.tokens + self.rows) * STEP, self.tokens * (self.rows + 4) * 4) + 1024

    def fitted(self, k: int) -> CodesTile:
        """This tile with as many stages as fit, and no more blocks that split the columns than there are steps."""
        most = (SHARED // self.per_sm - RESERVED - 1024 - 512) // ((self.tokens + self.rows) * STEP)
        return replace(self, stages=min(self.stages, most), cluster=min(self.cluster, -(-k // STEP)))

    def blocks(self, m: int, n: int) -> tuple[int, int, int]:
        """The grid: tiles of tokens, tiles of W, blocks of a cluster."""
        return -(-m // self.tokens), -(-n // self.rows), self.cluster


def constants(format: str, scale: torch.dtype, output: torch.dtype, tile: CodesTile) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "CODE": CODES[format],
        "SCALE": KINDS[scale],
        "OUTPUT": KINDS[output],
        "ELEMENT_BF16": int(output == torch.bfloat16),
        "TOKENS": tile.tokens,
        "TALL": tile.tall,
        "WARPGROUPS": tile.warpgroups,
        "STAGES": tile.stages,
        "CLUSTER": tile.cluster,
        "BLOCKS_PER_SM": tile.per_sm,
    }


@cache
def _function(format: str, scale: torch.dtype, output: torch.dtype, tile: CodesTile, device: int) -> launch.Function:
    defined = constants(format, scale, output, tile)
    extra = tiles.codes_product_source(format == "int8", tile.tokens)
    arguments = "128s128sPPPiii"
    kind = {"cluster": tile.cluster, "extra": extra}
    return launch.Function(
        "warpgroup_codes.cu", "warpgroup_codes", defined, arguments, device, tile.threads, tile.shared, **kind
    )


def run(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, tile: CodesTile
) -> Tensor:
    """The product with this tile; operands as `check_operands` gives them."""
    (m, k), n, device = x.shape, weight.shape[0], x.device.index
    format = "int8" if x.dtype == torch.int8 else "fp8_e4m3"
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    function = _function(format, weight_scale.dtype, dtype, tile, device)
    x_map = launch.matrix_map(x.data_ptr(), m, k, 1, tile.tokens, STEP)
    w_map = launch.matrix_map(weight.data_ptr(), n, k, 1, tile.rows, STEP)
    scales = x_scale.data_ptr(), weight_scale.data_ptr()
    function(tile.blocks(m, n), x_map, w_map, *scales, y.data_ptr(), m, n, -(-k // STEP))
    return y


@cache
def choose(format: str, m: int, n: int, k: int, dtype: torch.dtype) -> CodesTile | WideTile:
    """The tile measured for the nearest shape and the next larger number of rows, or for the most rows there are."""
    found = tiles.nearest(RECIPES[format], n, k)
    usable = [KERNEL] if wide_int8.refuse(n, dtype) else [KERNEL, wide_int8.KERNEL]
    found = {count: (name, tile) for count, (name, tile) in found.items() if name in usable}
    kernel, constants = found[min((count for count in found if count >= m), default=max(found))]
    return WideTile(*constants) if kernel == wide_int8.KERNEL else CodesTile(*constants).fitted(k)


@torch.library.custom_op("canopyq::multiply_many_codes", mutates_args=())
def multiply_many_codes(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `eight_bits.multiply_codes`, for any number of rows. FP8 sums keep some 14 bits within 128 columns.

    Raises:
        CanopyError: for shapes, dtypes and devices that do not fit together, and on another GPU than a Hopper.
    """
    format, operands = check_operands(x, x_scale, weight, weight_scale, dtype)
    if (have := torch.cuda.get_device_capability(x.device)) != HOPPER:
        raise CanopyError(f"the kernel needs compute capability 9.0; this GPU has {have[0]}.{have[1]}")
    (m, k), n = x.shape, len(weight)
    if not m * n:
        return x.new_empty(m, n, dtype=dtype)
    tile = choose(format, m, n, k, dtype)
    return (wide_int8.run if isinstance(tile, WideTile) else run)(*operands, dtype, tile)


@multiply_many_codes.register_fake
def _(x, x_scale, weight, weight_scale, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
