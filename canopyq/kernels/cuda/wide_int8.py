"""INT8 by INT8 for many rows (compute capability 9.0): the products of `wide_int8.cu`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.kernels.cuda import launch, tiles
from canopyq.kernels.cuda.eight_bits import KINDS
from canopyq.kernels.cuda.tiles import STEP, WideTile


def refuse(n: int, dtype: torch.dtype) -> str | None:
    """Why results (M, n) in ``dtype`` cannot be stored by the copy engine, or None."""
    if dtype == torch.float32:
        return "it stores 16-bit floats, not torch.float32"
    return f"it takes out_features in multiples of 8, not {n}" if n % 8 else None


def constants(scale: torch.dtype, output: torch.dtype, tile: WideTile) -> dict[str, int]:
    """What the kernel is compiled for."""
    kinds = {"CODE": 8, "SCALE": KINDS[scale], "OUTPUT": KINDS[output], "ELEMENT_BF16": int(output == torch.bfloat16)}
    return kinds | {"TOKENS": tile.tokens, "TALL": tile.tall, "STAGES": tile.stages}


@cache
def _function(scale: torch.dtype, output: torch.dtype, tile: WideTile, device: int) -> launch.Function:
    defined, extra = constants(scale, output, tile), tiles.codes_product_source(True, tile.tokens)
    arguments = "128s128s128sPPiiiii"
    kind = {"overlap": True, "extra": extra}
    return launch.Function("wide_int8.cu", "wide_int8", defined, arguments, device, tile.threads, tile.shared, **kind)


def run(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, tile: WideTile) -> Tensor:
    """The product with this tile; operands as `eight_bits.check_operands` gives them, for which `refuse` is None."""
    (m, k), n, device = x.shape, weight.shape[0], x.device.index
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    function = _function(weight_scale.dtype, dtype, tile, device)
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
