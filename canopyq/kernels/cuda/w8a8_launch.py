"""How the kernels for 8 bits by 8 bits are compiled and launched."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.kernels.cuda import launch, selection, tiles
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.quantize_rows import CODE_CONSTANTS
from canopyq.kernels.cuda.tiles import STEP, CodesTile, WideTile

RECIPES = {"int8": "w8a8", "fp8_e4m3": "fp8"}  # of a format, as the table of tiles calls it
FLOAT_CONSTANTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # what the CUDA sources call a dtype
WARPS, RING_BYTES, SUM_STRIDE = 8, 8 * 12 * 1024, 17  # as in skinny.cu


def skinny_constants(format: str, tiles: int, scale: torch.dtype, output: torch.dtype) -> dict[str, int]:
    """What ``skinny.cu`` is compiled for; ``tiles`` of 8 rows."""
    return {**_constants(format, scale, output), "COLUMN_TILES": tiles}


def wgmma_constants(format: str, scale: torch.dtype, output: torch.dtype, tile: CodesTile) -> dict[str, int]:
    """What ``w8a8_wgmma.cu`` is compiled for."""
    return {
        **_constants(format, scale, output),
        "TOKENS": tile.tokens,
        "M_TILES": tile.m_tiles,
        "WARPGROUPS": tile.warpgroups,
        "STAGES": tile.stages,
        "CLUSTER": tile.cluster,
        "BLOCKS_PER_SM": tile.per_sm,
    }


def wide_constants(scale: torch.dtype, output: torch.dtype, tile: WideTile) -> dict[str, int]:
    """What ``wide_int8.cu`` is compiled for."""
    return {
        **_constants("int8", scale, output),
        "TOKENS": tile.tokens,
        "M_TILES": tile.m_tiles,
        "STAGES": tile.stages,
    }


def _constants(format: str, scale: torch.dtype, output: torch.dtype) -> dict[str, int]:
    return {
        "CODE": CODE_CONSTANTS[format],
        "SCALE": FLOAT_CONSTANTS[scale],
        "OUTPUT": FLOAT_CONSTANTS[output],
        "ELEMENT_BF16": int(output == torch.bfloat16),
    }


@cache
def _skinny(format: str, tiles: int, scale: torch.dtype, output: torch.dtype, device: int) -> launch.Function:
    defined, shared = (
        skinny_constants(format, tiles, scale, output),
        RING_BYTES + 2 * WARPS * tiles * 8 * SUM_STRIDE * 4,
    )
    return launch.Function("skinny.cu", "skinny", defined, "PPPPPiii", device, 32 * WARPS, shared)


@cache
def _scale_sums(scale: torch.dtype, output: torch.dtype, device: int) -> launch.Function:
    return launch.Function("skinny.cu", "scale_sums", skinny_constants("int8", 1, scale, output), "PPPPi", device, 256)


@cache
def _wgmma(format: str, scale: torch.dtype, output: torch.dtype, tile: CodesTile, device: int) -> launch.Function:
    defined, extra = (
        wgmma_constants(format, scale, output, tile),
        tiles.codes_product_source(format == "int8", tile.tokens),
    )
    how = {"cluster": tile.cluster, "extra": extra}
    arguments = "128s128sPPPiii"
    return launch.Function("w8a8_wgmma.cu", "w8a8_wgmma", defined, arguments, device, tile.threads, tile.shared, **how)


@cache
def _wide(scale: torch.dtype, output: torch.dtype, tile: WideTile, device: int) -> launch.Function:
    defined, extra = wide_constants(scale, output, tile), tiles.codes_product_source(True, tile.tokens)
    arguments = "128s128s128sPPiiiii"
    return launch.Function(
        "wide_int8.cu", "wide_int8", defined, arguments, device, tile.threads, tile.shared, extra=extra
    )


def run_wgmma(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, tile: CodesTile
) -> Tensor:
    """The product by ``w8a8_wgmma.cu`` with this tile; operands as `check_operands` gives them."""
    (m, k), n, device = x.shape, weight.shape[0], x.device.index
    format = "int8" if x.dtype == torch.int8 else "fp8_e4m3"
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    function = _wgmma(format, weight_scale.dtype, dtype, tile, device)
    x_map = launch.matrix_map(x.data_ptr(), m, k, 1, tile.tokens, STEP)
    w_map = launch.matrix_map(weight.data_ptr(), n, k, 1, tile.rows, STEP)
    scales = x_scale.data_ptr(), weight_scale.data_ptr()
    function(tile.blocks(m, n), x_map, w_map, *scales, y.data_ptr(), m, n, -(-k // STEP))
    return y


def run_wide(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, tile: WideTile
) -> Tensor:
    """The product by ``wide_int8.cu`` with this tile; operands as `check_operands` gives them, and
    `wide_unsupported_reason` is None."""
    (m, k), n, device = x.shape, weight.shape[0], x.device.index
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    function = _wide(weight_scale.dtype, dtype, tile, device)
    maps = (
        launch.matrix_map(x.data_ptr(), m, k, 1, tile.tokens, STEP),
        launch.matrix_map(weight.data_ptr(), n, k, 1, tile.rows, STEP),
        launch.matrix_map(y.data_ptr(), m, n, 2, tile.BOX_TOKENS, 64),
    )
    token_tiles, row_tiles = -(-m // tile.tokens), -(-n // tile.rows)
    blocks = min(token_tiles * row_tiles, launch.multiprocessors(device))
    sizes = (m, n, -(-k // STEP), token_tiles, token_tiles * row_tiles)
    function((blocks, 1, 1), *maps, x_scale.data_ptr(), weight_scale.data_ptr(), *sizes)
    return y


def wide_unsupported_reason(n: int, dtype: torch.dtype) -> str | None:
    """Why ``wide_int8.cu`` cannot store results (M, n) in ``dtype``, which its copy engine does, or None."""
    if dtype == torch.float32:
        return "it stores 16-bit floats, not torch.float32"
    return f"it takes out_features in multiples of 8, not {n}" if n % 8 else None


def choose(format: str, m: int, n: int, k: int, dtype: torch.dtype, multiprocessors: int = 132) -> CodesTile | WideTile:
    """The fastest tile of the kernels for warpgroups, also where others are faster."""
    stored_by_copies = wide_unsupported_reason(n, dtype) is None
    product = Product(RECIPES[format], n, k, m, None, multiprocessors, stored_by_copies)
    best = selection.choose(product)
    if isinstance(best.tile, CodesTile | WideTile):
        return best.tile
    return selection.choose(product, CodesTile.KERNEL).tile
