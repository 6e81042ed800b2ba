"""8 bits by 8 bits on warpgroups (compute capability 9.0): products of any number of rows, scaled on the way out."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch, selection, tiles, wide_int8
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.eight_bits import CODES, KINDS, check_operands
from canopyq.kernels.cuda.tiles import STEP, CodesTile, WideTile

HOPPER = (9, 0)
RECIPES = {"int8": "w8a8", "fp8_e4m3": "fp8"}  # likewise


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


def choose(format: str, m: int, n: int, k: int, dtype: torch.dtype, multiprocessors: int = 132) -> CodesTile | WideTile:
    """The fastest tile of the kernels here, also where others are faster."""
    plain = wide_int8.refuse(n, dtype) is None
    product = Product(RECIPES[format], n, k, m, None, multiprocessors, stored_by_copies=plain)
    best = selection.choose(product)
    if isinstance(best.tile, CodesTile | WideTile):
        return best.tile
    return selection.choose(product, CodesTile.KERNEL).tile


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
    tile = choose(format, m, n, k, dtype, launch.multiprocessors(x.device.index))
    return (wide_int8.run if isinstance(tile, WideTile) else run)(*operands, dtype, tile)


@multiply_many_codes.register_fake
def _(x, x_scale, weight, weight_scale, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
