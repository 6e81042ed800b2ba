"""How the kernels for 4- and 8-bit weights under 16-bit inputs are compiled and launched."""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import cache
from itertools import count

import torch
from torch import Tensor

from canopyq.kernels.cuda import tiles
from canopyq.kernels.cuda.fragments import SLAB
from canopyq.kernels.cuda.launch import Function, matrix_map, multiprocessors, tensor_map
from canopyq.kernels.cuda.tiles import DecodeTile, StreamKTile, WarpgroupTile, Weight


def constants(bits: int, group: int, asymmetric: bool, element: torch.dtype, scale: torch.dtype) -> dict[str, int]:
    return {
        "ELEMENT_BF16": int(element == torch.bfloat16),
        "SCALE_BF16": int(scale == torch.bfloat16),
        "BITS": bits,
        "GROUP": group,
        "ASYMMETRIC": int(asymmetric),
    }


def decode_constants(tile: DecodeTile) -> dict[str, int]:
    return {
        "COLUMN_TILES": tile.columns,
        "TILE_BLOCKS": tile.blocks,
        "WARPS": tile.warps,
        "DEPTH": tile.depth,
        "CLUSTER": tile.cluster,
    }


def warpgroup_constants(tile: WarpgroupTile) -> dict[str, int]:
    return {
        "TOKENS": tile.tokens,
        "M_TILES": tile.m_tiles,
        "WARPGROUPS_M": tile.warpgroups_m,
        "WARPGROUPS_K": tile.warpgroups_k,
        "STAGES": tile.stages,
        "BATCH": tile.batch,
        "CLUSTER": tile.cluster,
        "BLOCKS_PER_SM": tile.per_sm,
    }


def stream_k_constants(tile: StreamKTile) -> dict[str, int]:
    return {
        "TOKENS": tile.tokens,
        "M_TILES": tile.m_tiles,
        "WARPGROUPS": tile.warpgroups,
        "STAGES": tile.stages,
        "BATCH": tile.batch,
        "CLUSTER": tile.cluster,
        "BLOCKS_PER_SM": tile.per_sm,
    }


@cache
def _decode(bits: int, group: int, asymmetric: bool, x: torch.dtype, scale: torch.dtype, tile: DecodeTile, device: int):
    every = constants(bits, group, asymmetric, x, scale) | decode_constants(tile)
    return Function("decode.cu", "decode", every, "PPPPPiiiiii", device, tile.warps * 32, cluster=tile.cluster)


@cache
def _warpgroup(
    bits: int, group: int, asymmetric: bool, x: torch.dtype, scale: torch.dtype, tile: WarpgroupTile, device: int
):
    every = constants(bits, group, asymmetric, x, scale) | warpgroup_constants(tile)
    extra = tiles.product_source(tile.tokens, x == torch.bfloat16)
    arguments = "128sPPPPiiiii"
    kind = {"cluster": tile.cluster, "extra": extra}
    return Function("warpgroup.cu", "warpgroup", every, arguments, device, tile.threads, **kind)


@cache
def _stream_k(
    bits: int, group: int, asymmetric: bool, x: torch.dtype, scale: torch.dtype, tile: StreamKTile, device: int
):
    every = constants(bits, group, asymmetric, x, scale) | stream_k_constants(tile)
    extra = tiles.product_source(tile.tokens, x == torch.bfloat16)
    kind = {"cluster": tile.cluster, "extra": extra}
    return Function("stream_k.cu", "stream_k", every, "128s128sPPPPPqiiiiiiii", device, tile.threads, **kind)


@cache
def _dequantize(bits: int, group: int, asymmetric: bool, out: torch.dtype, scale: torch.dtype, device: int):
    # For float32 the codes become float16 first: every code and its difference to the zero point is exact there.
    every = constants(bits, group, asymmetric, out, scale) | {"WIDE": int(out == torch.float32)}
    return Function("dequantize.cu", "dequantize", every, "PPPPiiiii", device, 256)


def _input_map(x: Tensor, tokens: int, halves: int = 2) -> bytes:
    """Tells the copy engine where x (rows, k) lies and that it comes in boxes, ``tokens`` rows by ``halves`` · 64."""
    rows, k = x.shape
    element = "BFLOAT16" if x.dtype == torch.bfloat16 else "FLOAT16"
    return tensor_map(x.data_ptr(), element, (64, rows, k // 64), (2 * k, 128), (64, tokens, halves))


def describe(codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int) -> Weight:
    return Weight(n, codes.shape[0], codes.shape[1], scale.shape[1], bits, group, zero is not None)


def _pointers(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[int, int, int]:
    """Of the weight's tensors; a zero point that does not exist is never read."""
    return codes.data_ptr(), scale.data_ptr(), codes.data_ptr() if zero is None else zero.data_ptr()


def run_decode(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, tile: DecodeTile
) -> Tensor:
    device, rows = x.device.index, x.shape[0]
    function = _decode(weight.bits, weight.group, weight.asymmetric, x.dtype, scale.dtype, tile, device)
    y = x.new_empty(rows, weight.n)
    most = max(1, multiprocessors(device) * tile.per_sm // tile.cluster)
    grid = (min(-(-weight.blocks // tile.blocks), most), 1, tile.cluster)
    values = (*_pointers(codes, scale, zero), x.data_ptr(), y.data_ptr(), rows, weight.n, x.shape[1])
    function(grid, *values, weight.blocks, weight.steps, weight.groups, shared=tile.shared(weight, rows))
    return y


def run_warpgroup(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, tile: WarpgroupTile
) -> Tensor:
    device, rows = x.device.index, len(x)
    function = _warpgroup(weight.bits, weight.group, weight.asymmetric, x.dtype, scale.dtype, tile, device)
    y = x.new_empty(rows, weight.n)
    grid = (-(-rows // tile.tokens), -(-weight.slabs // (tile.rows // SLAB)), tile.cluster)
    sizes = (rows, weight.n, weight.slabs, weight.steps, weight.groups)
    x_map = _input_map(x, tile.tokens)
    function(grid, x_map, *_pointers(codes, scale, zero), y.data_ptr(), *sizes, shared=tile.shared(weight))
    return y


_marks = count(secrets.randbits(62))  # a number for each launch that no memory holds by chance


def run_stream_k(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, tile: StreamKTile
) -> Tensor:
    """Takes an n that is a multiple of 8."""
    device, rows = x.device.index, len(x)
    function = _stream_k(
        weight.bits, weight.group, weight.asymmetric, x.dtype, scale.dtype, replace(tile, parts=1), device
    )
    y = x.new_empty(rows, weight.n)
    grid = tile.grid(rows, weight, multiprocessors(device))
    blocks = grid.clusters * tile.cluster
    sums = blocks * tile.rows * tile.tokens * 4 if grid.parts > 1 and grid.shared else 0
    space = torch.empty(sums + 8 * blocks * tile.warpgroups, dtype=torch.uint8, device=x.device)
    x_map = _input_map(x, tile.tokens // tile.cluster, 1)
    y_map = matrix_map(y.data_ptr(), rows, weight.n, 2, tile.BOX_TOKENS, 64)
    places = (*_pointers(codes, scale, zero), space.data_ptr(), space.data_ptr() + sums)
    sizes = (rows, weight.slabs, weight.steps, weight.groups, grid.across, grid.whole, grid.shared, grid.parts)
    function((grid.clusters, 1, tile.cluster), x_map, y_map, *places, next(_marks), *sizes, shared=tile.shared(weight))
    return y


def run_dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, k: int, dtype: torch.dtype
) -> Tensor:
    """The weight (n, k) in bfloat16, float16 or float32."""
    out = torch.empty(weight.n, k, dtype=dtype, device=codes.device)
    function = _dequantize(weight.bits, weight.group, weight.asymmetric, dtype, scale.dtype, codes.device.index)
    grid = (-(-weight.blocks * weight.steps // 8), 1, 1)
    sizes = (weight.n, k, weight.blocks, weight.steps, weight.groups)
    function(grid, *_pointers(codes, scale, zero), out.data_ptr(), *sizes)
    return out
