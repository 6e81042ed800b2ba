"""4- and 8-bit integer weights under 16-bit activations on NVIDIA GPUs: three ways to multiply, by number of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.formats import IntFormat
from canopyq.ops.cuda import tiles
from canopyq.ops.cuda.fragments import FRAGMENTS
from canopyq.ops.cuda.launch import Function, multiprocessors, unavailable
from canopyq.ops.cuda.tiles import DecodeTile, WarpgroupTile, Weight
from canopyq.ops.kernel import Held, Kernel, Problem

GROUPS = (32, 64, 128, 256)
SCALES = (torch.bfloat16, torch.float16)


def refuse(problem: Problem) -> str | None:
    fmt, granularity = problem.weights.format, problem.weights.granularity
    if reason := unavailable(problem.device):
        return reason
    if not (isinstance(fmt, IntFormat) and fmt.bits in (4, 8)):
        return f"it takes int4 and int8 weights; these are {fmt.name}"
    if problem.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    if problem.weights.scale_dtype not in SCALES:
        return f"it takes bfloat16 and float16 scales; these are {problem.weights.scale_dtype}"
    if granularity.kind not in ("group", "channel") or granularity.axis != 0:
        return f"it takes a scale per group or output channel; these have one per {granularity}"
    if granularity.kind == "group" and (granularity.group_size not in GROUPS or problem.k % granularity.group_size):
        return f"it takes groups of 32, 64, 128 or 256 that divide in_features; {granularity} and {problem.k} do not"
    if problem.n * problem.k >= 2**31:
        return f"it takes fewer than 2^31 weights; this layer has {problem.n * problem.k}"
    return None


def refuse_warpgroup(problem: Problem) -> str | None:
    if reason := refuse(problem):
        return reason
    capability = torch.cuda.get_device_capability(problem.device)
    if capability != (9, 0):
        return f"it uses products that only compute capability 9.0 has; this GPU has {capability[0]}.{capability[1]}"
    return None


# --- what the kernels are told ---------------------------------------------------------------------------------------


def describe(codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int) -> Weight:
    return Weight(n, codes.shape[0], codes.shape[1], scale.shape[1], bits, group, zero is not None)


def _constants(weight: Weight, x: torch.dtype, scale: torch.dtype) -> dict[str, int]:
    return {
        "ELEMENT_BF16": int(x == torch.bfloat16),
        "SCALE_BF16": int(scale == torch.bfloat16),
        "BITS": weight.bits,
        "GROUP": weight.group,
        "ASYMMETRIC": int(weight.asymmetric),
    }


def _pointers(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[int, int, int]:
    return codes.data_ptr(), scale.data_ptr(), codes.data_ptr() if zero is None else zero.data_ptr()


@cache
def _decode(bits: int, group: int, asymmetric: bool, x: torch.dtype, scale: torch.dtype, tile: DecodeTile, device: int):
    constants = _constants(Weight(0, 0, 0, 0, bits, group, asymmetric), x, scale)
    constants |= {"COLUMN_TILES": tile.columns, "TILE_BLOCKS": tile.blocks, "WARPS": tile.warps}
    constants |= {"DEPTH": tile.depth, "CLUSTER": tile.cluster}
    return Function("decode.cu", "decode", constants, "PPPPPiiiiii", device, tile.warps * 32, cluster=tile.cluster)


@cache
def _warpgroup(
    bits: int, group: int, asymmetric: bool, x: torch.dtype, scale: torch.dtype, tile: WarpgroupTile, device: int
):
    constants = _constants(Weight(0, 0, 0, 0, bits, group, asymmetric), x, scale)
    constants |= {"TOKENS": tile.tokens, "TALL": tile.tall, "STAGES": tile.stages, "BATCH": tile.batch}
    constants |= {"CLUSTER": tile.cluster, "BLOCKS_PER_SM": tile.per_sm}
    extra = tiles.product_source(tile.tokens, x == torch.bfloat16)
    return Function(
        "warpgroup.cu", "warpgroup", constants, "128sPPPPiiiii", device, tile.threads, cluster=tile.cluster, extra=extra
    )


@cache
def _dequantize(bits: int, group: int, asymmetric: bool, out: torch.dtype, scale: torch.dtype, device: int):
    constants = _constants(Weight(0, 0, 0, 0, bits, group, asymmetric), out, scale) | {
        "WIDE": int(out == torch.float32)
    }
    if out == torch.float32:  # every code is exact in float16, and so is its difference to the zero point
        constants["ELEMENT_BF16"] = 0
    return Function("dequantize.cu", "dequantize", constants, "PPPPiiiii", device, 256)


@lru_cache(maxsize=4096)
def _tensor_map(pointer: int, rows: int, k: int, dtype: torch.dtype, tokens: int) -> bytes:
    """Tells the copy engine where x (rows, k) lies, and that it comes in boxes of ``tokens`` rows by two times 64 columns."""
    from cuda.bindings import driver as d

    kind = d.CUtensorMapDataType
    result, made = d.cuTensorMapEncodeTiled(
        kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        3,
        pointer,
        [d.cuuint64_t(64), d.cuuint64_t(rows), d.cuuint64_t(k // 64)],
        [d.cuuint64_t(2 * k), d.cuuint64_t(128)],
        [d.cuuint32_t(64), d.cuuint32_t(tokens), d.cuuint32_t(2)],
        [d.cuuint32_t(1)] * 3,
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if result != 0:
        raise CanopyError(f"the driver does not describe an input of shape ({rows}, {k}): {result.name}")
    return ctypes.string_at(made.getPtr(), 128)


def _check(x: Tensor, codes: Tensor, n: int) -> Tensor:
    """x as the kernels read it: rows one after the other, each beginning at a multiple of 16 bytes."""
    if x.device != codes.device:
        raise CanopyError(f"the input is on {x.device} and the weight on {codes.device}; move one of them")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise CanopyError(f"the kernel takes bfloat16 and float16 input, not {x.dtype}")
    if x.dim() != 2:
        raise CanopyError(f"the kernel takes an input (rows, in_features), got {tuple(x.shape)}")
    if max(x.shape[0] * max(n, x.shape[1]), codes.numel()) >= 2**31:
        raise CanopyError(f"{x.shape[0]} rows make more than 2^31 elements; split the input")
    if x.shape[1] % 64:
        return F.pad(x, (0, -x.shape[1] % 64))
    if not x.is_contiguous():
        return x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def run_decode(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, tile: DecodeTile
) -> Tensor:
    device, rows = x.device.index, x.shape[0]
    function = _decode(weight.bits, weight.group, weight.asymmetric, x.dtype, scale.dtype, tile, device)
    y = x.new_empty(rows, weight.n)
    most = max(1, multiprocessors(device) * tile.per_sm // tile.cluster)
    grid = (min(-(-weight.blocks // tile.blocks), most), 1, tile.cluster)
    sizes = (rows, weight.n, x.shape[1], weight.blocks, weight.steps, weight.groups)
    function(grid, tile.shared(weight, rows), *_pointers(codes, scale, zero), x.data_ptr(), y.data_ptr(), *sizes)
    return y


def run_warpgroup(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, tile: WarpgroupTile
) -> Tensor:
    device, (rows, k) = x.device.index, x.shape
    function = _warpgroup(weight.bits, weight.group, weight.asymmetric, x.dtype, scale.dtype, tile, device)
    y = x.new_empty(rows, weight.n)
    grid = (-(-rows // tile.tokens), -(-weight.slabs // (2 * tile.tall)), tile.cluster)
    x_map = _tensor_map(x.data_ptr(), rows, k, x.dtype, tile.tokens)
    sizes = (rows, weight.n, weight.slabs, weight.steps, weight.groups)
    function(grid, tile.shared(weight), x_map, *_pointers(codes, scale, zero), y.data_ptr(), *sizes)
    return y
