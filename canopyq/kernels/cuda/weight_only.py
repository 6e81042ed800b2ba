"""4- and 8-bit integer weights under 16-bit activations on NVIDIA GPUs: four ways to multiply, by number of rows.

Few rows go to ``decode.cu``, more to ``warpgroup.cu`` and many to ``stream_k.cu`` (compute capability 9.0 alone has
their instructions). For very many the arithmetic takes so long that writing the weight out in 16 bits first costs
little: `dequantize` does, and torch multiplies. `selection` knows for which rows of which shape each is the fastest.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import selection
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.fragments import SLAB, STEP, padded
from canopyq.kernels.cuda.launch import multiprocessors, unavailable
from canopyq.kernels.cuda.tiles import SHARED, DecodeTile, StreamKTile, WarpgroupTile, Weight
from canopyq.kernels.cuda.weight_only_launch import describe, run_decode, run_dequantize, run_stream_k, run_warpgroup
from canopyq.kernels.spec import LinearSpec, PackedWeight, RowRanges, up_to
from canopyq.tensor.formats import IntFormat

GROUP_SIZES = (32, 64, 128, 256)
NARROW = (torch.bfloat16, torch.float16)
HOPPER = (9, 0)


# --- what they can run -----------------------------------------------------------------------------------------------


def unsupported(spec: LinearSpec) -> str | None:
    fmt = spec.weights.format
    if reason := unavailable(spec.device):
        return reason
    if not (isinstance(fmt, IntFormat) and fmt.bits in (4, 8)):
        return f"it takes int4 and int8 weights; these are {fmt.name}"
    if spec.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    return unsupported_weight(spec)


def unsupported_weight(spec: LinearSpec) -> str | None:
    """For its scales or its size."""
    granularity = spec.weights.granularity
    if spec.weights.scale_dtype not in NARROW:
        return f"it takes bfloat16 and float16 scales; these are {spec.weights.scale_dtype}"
    if granularity.kind not in ("group", "channel") or granularity.axis != 0:
        return f"it takes a scale per group or output channel; these have one per {granularity}"
    if granularity.kind == "group" and (granularity.group_size not in GROUP_SIZES or spec.k % granularity.group_size):
        return f"it takes groups of 32, 64, 128 or 256 that divide in_features; {granularity} and {spec.k} do not"
    if spec.n * spec.k >= 2**31:
        return f"it takes fewer than 2^31 weights; this layer has {spec.n * spec.k}"
    return None


def unsupported_warpgroup(spec: LinearSpec) -> str | None:
    return unsupported(spec) or no_wgmma(spec)


def no_wgmma(spec: LinearSpec) -> str | None:
    if (have := _capability(spec.device.index)) != HOPPER:
        return f"it uses products that only compute capability 9.0 has; this GPU has {have[0]}.{have[1]}"
    return None


def unsupported_stream_k(spec: LinearSpec) -> str | None:
    if reason := unsupported_warpgroup(spec):
        return reason
    return f"it takes out_features in multiples of 8, not {spec.n}" if spec.n % 8 else None


def decode_rows(spec: LinearSpec) -> RowRanges:
    if _capability(spec.device.index) == HOPPER:
        return _rows_taken(spec, DecodeTile.KERNEL)
    weight = _weight_of(spec)
    return up_to(max((rows for rows in range(1, 17) if _decode_tile(weight, rows, spec.device.index)), default=0))


def warpgroup_rows(spec: LinearSpec) -> RowRanges:
    return _rows_taken(spec, WarpgroupTile.KERNEL)


def stream_k_rows(spec: LinearSpec) -> RowRanges:
    return _rows_taken(spec, StreamKTile.KERNEL)


def _rows_taken(spec: LinearSpec, kernel: str) -> RowRanges:
    return selection.rows_taken(_product(_weight_of(spec), spec.k, 1, spec.device.index), kernel)


def _product(weight: Weight, k: int, rows: int, device: int | None) -> Product:
    sms = multiprocessors(device or 0) if torch.cuda.is_available() else 132
    return Product(weight.recipe, weight.n, k, rows, weight, sms, stored_by_copies=weight.n % 8 == 0)


@cache
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _decode_tile(weight: Weight, rows: int, device: int | None) -> DecodeTile | None:
    if _capability(device) == HOPPER:
        found = selection.choose(_product(weight, weight.steps * STEP, rows, device), DecodeTile.KERNEL)
        return found and found.tile.fitted(weight, rows, SHARED)
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return DecodeTile(-(-rows // 8), 1, 8, 4, 1, 2).fitted(weight, rows, limit)


def _weight_of(spec: LinearSpec) -> Weight:
    group = spec.weights.granularity.group_size or 0
    slabs, steps = padded(spec.n, SLAB) // SLAB, padded(spec.k, STEP) // STEP
    groups = steps * STEP // group if group else 1
    return Weight(spec.n, slabs, steps, groups, spec.weights.format.bits, group, not spec.weights.symmetric)


# --- the operators ---------------------------------------------------------------------------------------------------


def check_weight(codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    for part in (codes, scale) if zero is None else (codes, scale, zero):
        if part.device.type != "cuda" or part.device != codes.device:
            raise CanopyError(f"the weight's tensors must be on one NVIDIA GPU; one is on {part.device}")
        if part.data_ptr() % 16 or not part.is_contiguous():
            raise CanopyError("the weight's tensors must be contiguous and begin at a multiple of 16 bytes; copy them")


def _check_input(x: Tensor, codes: Tensor, n: int) -> Tensor:
    """x as the kernels read it: rows one after the other, whole half steps long, at multiples of 16 bytes."""
    if x.device != codes.device:
        raise CanopyError(f"the input is on {x.device} and the weight on {codes.device}; move one of them")
    if x.dtype not in NARROW:
        raise CanopyError(f"the kernel takes bfloat16 and float16 input, not {x.dtype}; cast it")
    if x.dim() != 2 or padded(x.shape[1], STEP) != codes.shape[1] * STEP:
        raise CanopyError(f"the kernel takes an input (rows, {codes.shape[1] * STEP} at most), got {tuple(x.shape)}")
    if x.shape[0] * max(n, x.shape[1]) >= 2**31:
        raise CanopyError(f"{x.shape[0]} rows make 2^31 elements or more; split the input")
    if x.shape[1] % 64:
        return F.pad(x, (0, -x.shape[1] % 64))
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x.contiguous()


@torch.library.custom_op("canopyq::decode_linear", mutates_args=())
def decode_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int
) -> Tensor:
    """x (M, K) · Wᵀ with ``decode.cu``: (M, n). Raises `CanopyError` for input that the kernel does not take."""
    check_weight(codes, scale, zero)
    x = _check_input(x, codes, n)
    if not len(x):
        return x.new_empty(0, n)
    weight = describe(codes, scale, zero, n, bits, group)
    if (tile := _decode_tile(weight, len(x), x.device.index)) is None:
        raise CanopyError(f"the decode kernel does not take {len(x)} rows of {x.shape[1]}; use fewer")
    return run_decode(x, codes, scale, zero, weight, tile)


@torch.library.custom_op("canopyq::warpgroup_linear", mutates_args=())
def warpgroup_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int
) -> Tensor:
    """x (M, K) · Wᵀ with ``warpgroup.cu``: (M, n). Raises `CanopyError` for input that the kernel does not take."""
    check_weight(codes, scale, zero)
    x = _check_input(x, codes, n)
    if not len(x):
        return x.new_empty(0, n)
    weight = describe(codes, scale, zero, n, bits, group)
    tile = selection.choose(_product(weight, x.shape[1], len(x), x.device.index), WarpgroupTile.KERNEL).tile
    return run_warpgroup(x, codes, scale, zero, weight, tile)


@torch.library.custom_op("canopyq::stream_k_linear", mutates_args=())
def stream_k_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int
) -> Tensor:
    """x (M, K) · Wᵀ with ``stream_k.cu``: (M, n). Raises `CanopyError` for input that the kernel does not take."""
    check_weight(codes, scale, zero)
    x = _check_input(x, codes, n)
    if n % 8:
        raise CanopyError(f"the stream-K kernel takes out_features in multiples of 8, not {n}")
    if not len(x):
        return x.new_empty(0, n)
    weight = describe(codes, scale, zero, n, bits, group)
    tile = selection.choose(_product(weight, x.shape[1], len(x), x.device.index), StreamKTile.KERNEL).tile
    return run_stream_k(x, codes, scale, zero, weight, tile)


@torch.library.custom_op("canopyq::dequantize_fragments", mutates_args=())
def dequantize_fragments(
    codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, k: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """The weight (n, k) in bfloat16, float16 or float32."""
    check_weight(codes, scale, zero)
    weight = describe(codes, scale, zero, n, bits, group)
    return run_dequantize(codes, scale, zero, weight, k, dtype)


@decode_linear.register_fake
@warpgroup_linear.register_fake
@stream_k_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, bits: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@dequantize_fragments.register_fake
def _(
    codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, k: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(n, k, dtype=dtype)


# --- what `dispatch` lists --------------------------------------------------------------------------------------------


def _arguments(packed: PackedWeight, spec: LinearSpec) -> tuple:
    group = spec.weights.granularity.group_size or 0
    parts = packed["weight_fragments"], packed["weight_scale"], packed.get("weight_zero_point")
    return *parts, spec.n, spec.weights.format.bits, group


def decode(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with sums in float32: (M, K) -> (M, N). float32 input goes to `dequantize`."""
    return decode_linear(x, *_arguments(packed, spec)) if x.dtype in NARROW else dequantize(x, packed, spec)


def warpgroup(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with sums in float32: (M, K) -> (M, N). float32 input goes to `dequantize`."""
    return warpgroup_linear(x, *_arguments(packed, spec)) if x.dtype in NARROW else dequantize(x, packed, spec)


def stream_k(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with sums in float32: (M, K) -> (M, N). float32 input goes to `dequantize`."""
    return stream_k_linear(x, *_arguments(packed, spec)) if x.dtype in NARROW else dequantize(x, packed, spec)


def dequantize(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with W dequantized to x's dtype in memory of its own for as long as the call takes: (M, K) -> (M, N)."""
    codes, scale, zero, n, bits, group = _arguments(packed, spec)
    return F.linear(x, dequantize_fragments(codes, scale, zero, n, spec.k, bits, group, x.dtype))
