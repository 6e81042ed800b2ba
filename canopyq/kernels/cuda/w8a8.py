"""8 bits by 8 bits on NVIDIA GPUs: INT8 by INT8 with int32 sums, FP8 by FP8 with float32 sums; by number of rows.

Few rows go to ``skinny.cu``, more to ``w8a8_wgmma.cu`` and many of INT8 to ``wide_int8.cu``, which write scaled results
(compute capability 9.0 alone has the instructions of the last two). cuBLAS takes what is left, and FP8 where it is the
faster; for INT8 it writes int32 sums that have to be read again. All read one layout; `selection` chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels import cpu_int8, reference
from canopyq.kernels.cuda import launch, quantize_rows, selection
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.quantize_rows import DTYPES, FP8_FROM
from canopyq.kernels.cuda.tiles import CodesTile, SkinnyTile, WideTile
from canopyq.kernels.cuda.w8a8_launch import FLOAT_CONSTANTS, _scale_sums, _skinny, choose, run_wgmma, run_wide
from canopyq.kernels.spec import LinearSpec, PackedWeight, RowRanges, WeightLayout, up_to
from canopyq.tensor.quantized_tensor import QuantizedTensor

HOPPER = (9, 0)
ROWWISE_FROM = (9, 0)  # compute capability from which on cuBLAS applies a scale per row and column itself
INT_MM_MIN_ROWS = 17  # torch._int_mm refuses fewer


# --- the layout ------------------------------------------------------------------------------------------------------


def prepack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """As in the checkpoint, but scales as products need them: to convert them takes as long as a small product."""
    packed = reference.prepack(weight)
    if weight.scheme.scale_dtype is not None:
        packed["weight_scale"] = packed["weight_scale"].to(torch.float32)
    return packed


def unpack(packed: PackedWeight, spec: LinearSpec) -> QuantizedTensor:
    """The inverse of `prepack`, bit for bit: float32 holds every narrower scale."""
    scale = packed["weight_scale"].to(spec.weights.scale_dtype or packed["weight_scale"].dtype)
    return reference.unpack({**packed, "weight_scale": scale}, spec)


FLOAT32_SCALES = WeightLayout("as in the checkpoint, scales in float32", prepack, unpack, reference.slice_rows)


# --- what they can run -----------------------------------------------------------------------------------------------


def unsupported_cublas_int8(spec: LinearSpec) -> str | None:
    return _no_gpu() or cpu_int8.not_codes(spec) or cpu_int8.sums_overflow(spec) or _odd_shape(spec, 8)


def unsupported_cublas_fp8(spec: LinearSpec) -> str | None:
    if reason := _no_gpu():
        return reason
    weights, inputs = spec.weights, spec.activations
    if weights.format.name != "fp8_e4m3" or inputs is None or inputs.format.name != "fp8_e4m3":
        return f"it takes FP8 weights and FP8 activations; these are {weights.format.name} and " + (
            "not quantized" if inputs is None else inputs.format.name
        )
    if weights.granularity.kind not in ("channel", "tensor") or weights.granularity.axis != 0:
        return f"it takes one scale for each output channel; these weights have one per {weights.granularity}"
    if inputs.granularity.kind not in ("token", "tensor"):
        return f"it takes one input scale for each token or one in all; these have one per {inputs.granularity}"
    if (have := torch.cuda.get_device_capability(spec.device)) < FP8_FROM:
        return f"FP8 products need compute capability 8.9 or newer; this GPU has {have[0]}.{have[1]}"
    return _odd_shape(spec, 16)


def unsupported_skinny_int8(spec: LinearSpec) -> str | None:
    return launch.unavailable(spec.device) or cpu_int8.not_codes(spec) or _odd_operands(spec)


def unsupported_skinny_fp8(spec: LinearSpec) -> str | None:
    return launch.unavailable(spec.device) or unsupported_cublas_fp8(spec) or _odd_operands(spec)


def unsupported_wgmma_int8(spec: LinearSpec) -> str | None:
    return unsupported_skinny_int8(spec) or _no_wgmma(spec)


def unsupported_wgmma_fp8(spec: LinearSpec) -> str | None:
    return unsupported_skinny_fp8(spec) or _no_wgmma(spec)


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no GPU or no driver"


def _odd_shape(spec: LinearSpec, multiple: int) -> str | None:
    if spec.n % multiple or spec.k % multiple:
        return f"it takes features in multiples of {multiple}; this layer has {spec.k} in and {spec.n} out"
    return None


def _odd_operands(spec: LinearSpec) -> str | None:
    if not spec.activations.symmetric:
        return "it takes symmetric activations; these have a zero point"
    if spec.weights.granularity.kind != "channel":
        return f"it takes one scale for each output channel; these weights have one per {spec.weights.granularity}"
    if spec.weights.scale_dtype not in FLOAT_CONSTANTS:
        return f"it takes 16- or 32-bit scales; these are {spec.weights.scale_dtype}"
    if spec.k % 16:
        return f"it takes in_features in multiples of 16; this layer has {spec.k}"
    return cpu_int8.sums_overflow(spec)


def _no_wgmma(spec: LinearSpec) -> str | None:
    if (have := torch.cuda.get_device_capability(spec.device)) != HOPPER:
        return f"it uses products that only compute capability 9.0 has; this GPU has {have[0]}.{have[1]}"
    return None


def skinny_int8_rows(spec: LinearSpec) -> RowRanges:
    return _skinny_rows(spec, "w8a8")


def skinny_fp8_rows(spec: LinearSpec) -> RowRanges:
    return _skinny_rows(spec, "fp8")


def _skinny_rows(spec: LinearSpec, recipe: str) -> RowRanges:
    """Where it is faster than the kernel for warpgroups, if there is one."""
    if torch.cuda.get_device_capability(spec.device) != HOPPER:
        return up_to(SkinnyTile.MAX_ROWS)
    return selection.rows_taken(_product_of(spec, recipe), SkinnyTile.KERNEL)


def wgmma_fp8_rows(spec: LinearSpec) -> RowRanges:
    return selection.rows_taken(_product_of(spec, "fp8"), CodesTile.KERNEL)


def _product_of(spec: LinearSpec, recipe: str) -> Product:
    """Of one row, as `selection` takes it."""
    return Product(recipe, spec.n, spec.k, 1, stored_by_copies=spec.n % 8 == 0)


# --- the operators ---------------------------------------------------------------------------------------------------


def check_operands(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> tuple[str, tuple[Tensor, ...]]:
    """The format of codes (M, K) and (N, K), and the four tensors as kernels read them: contiguous and aligned."""
    format = next((name for name, kind in DTYPES.items() if x.dtype == kind), None)
    if format is None or x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or weight.dtype != x.dtype:
        raise CanopyError(
            f"products are of int8 or float8_e4m3fn codes (M, K) and (N, K), got {x.dtype} {tuple(x.shape)} and "
            f"{weight.dtype} {tuple(weight.shape)}"
        )
    (m, k), n = x.shape, weight.shape[0]
    if k % 16 or k > 2**31 // 2**15:
        raise CanopyError(f"the kernel takes columns in multiples of 16, {2**16} at most; these are {k}")
    if x_scale.numel() != m or x_scale.dtype != torch.float32 or weight_scale.numel() != n:
        raise CanopyError(
            f"{m} rows and {n} features need as many scales, got {x_scale.numel()} {weight_scale.numel()}"
        )
    if weight_scale.dtype not in FLOAT_CONSTANTS or dtype not in FLOAT_CONSTANTS:
        raise CanopyError(f"scales and results are 16- or 32-bit floats, not {weight_scale.dtype} and {dtype}")
    tensors = (x, x_scale, weight, weight_scale)
    if any(t.device != x.device for t in tensors):
        raise CanopyError(f"codes and scales lie on {', '.join(str(t.device) for t in tensors)}; move them together")
    if reason := quantize_rows.unsupported_reason(format, x.device):
        raise CanopyError(f"codes cannot be multiplied by the CUDA kernel: {reason}")
    return format, tuple(
        t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    )


@torch.library.custom_op("canopyq::skinny_linear", mutates_args=())
def skinny_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x · x_scale) · (weight · weight_scale)ᵀ for at most 16 rows: (M, K), (N, K) -> (M, N).

    Args:
        x: int8 or float8_e4m3fn (M, K), K a multiple of 16.
        x_scale: float32, M of them.
        weight: (N, K) in the dtype of x.
        weight_scale: N of them in float16, bfloat16 or float32.
        dtype: of the result, likewise.

    Raises:
        CanopyError: for shapes, dtypes and devices that do not fit together.
    """
    format, operands = check_operands(x, x_scale, weight, weight_scale, dtype)
    (m, k), n = x.shape, len(weight)
    if m > SkinnyTile.MAX_ROWS:
        raise CanopyError(f"the kernel takes up to {SkinnyTile.MAX_ROWS} rows; these are {m}")
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    tiles = 1 if m <= 8 else 2
    run = _skinny(format, tiles, weight_scale.dtype, dtype, x.device.index)
    blocks = min(-(-n // 16), 2 * launch.multiprocessors(x.device.index))
    run((blocks, 1, 1), *(t.data_ptr() for t in (*operands, y)), m, n, k)
    return y


@skinny_linear.register_fake
def _(x, x_scale, weight, weight_scale, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("canopyq::scale_sums", mutates_args=())
def scale_sums(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """sums · x_scale · weight_scaleᵀ in one pass: int32 (M, N), N a multiple of 4, on a GPU -> (M, N) in ``dtype``."""
    m, n = sums.shape
    y = torch.empty(m, n, dtype=dtype, device=sums.device)
    run, step = _scale_sums(weight_scale.dtype, dtype, sums.device.index), 65535  # the most blocks along y
    for start in range(0, m, step):
        rows = min(step, m - start)
        places = sums[start:].data_ptr(), x_scale[start:].data_ptr(), weight_scale.data_ptr(), y[start:].data_ptr()
        run((-(-n // 1024), rows, 1), *places, n)
    return y


@scale_sums.register_fake
def _(sums, x_scale, weight_scale, dtype):
    return sums.new_empty(sums.shape, dtype=dtype)


@torch.library.custom_op("canopyq::wgmma_linear", mutates_args=())
def wgmma_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x · x_scale) · (weight · weight_scale)ᵀ for any number of rows: (M, K), (N, K) -> (M, N). FP8 sums keep some 14
    bits within 128 columns. The arguments are those of `skinny_linear`.

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
    return (run_wide if isinstance(tile, WideTile) else run_wgmma)(*operands, dtype, tile)


@wgmma_linear.register_fake
def _(x, x_scale, weight, weight_scale, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


# --- what `dispatch` lists -------------------------------------------------------------------------------------------


def skinny(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """Up to 16 rows: (M, K) -> (M, N) in x's dtype."""
    scale = x.scale.to(torch.float32).expand(len(x.data), 1)
    return skinny_linear(x.data, scale, packed["weight"], packed["weight_scale"], x.dtype)


def wgmma(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """Any number of rows: (M, K) -> (M, N) in x's dtype."""
    scale = x.scale.to(torch.float32).expand(len(x.data), 1)
    return wgmma_linear(x.data, scale, packed["weight"], packed["weight_scale"], x.dtype)


def cublas_int8(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """As `cpu_int8.int8_by_int8`, exact in int32, with rows of zeros up to the fewest that torch takes."""
    rows, codes = len(x.data), packed["weight"]
    data = F.pad(x.data, (0, 0, 0, INT_MM_MIN_ROWS - rows)) if rows < INT_MM_MIN_ROWS else x.data
    sums = torch._int_mm(data, codes.t())[:rows]
    if x.zero_point is None and launch.unavailable(sums.device) is None:  # in one pass
        token = x.scale.to(torch.float32).expand(rows, 1).contiguous()
        return scale_sums(sums, token, packed["weight_scale"], x.dtype)
    return cpu_int8.epilogue(sums, x, codes, packed["weight_scale"])


def cublas_fp8(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """E4M3 by E4M3 with float32 sums: (M, K) -> (M, N) in x's dtype."""
    rows, weight = len(x.data), packed["weight"].t()
    token = x.scale.to(torch.float32).reshape(-1, 1).expand(rows, 1).contiguous()
    channel = packed["weight_scale"].to(torch.float32).reshape(1, -1).expand(1, spec.n).contiguous()
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(spec.device) >= ROWWISE_FROM:
        scales = {"scale_a": token, "scale_b": channel}
        return torch._scaled_mm(x.data, weight, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    one = torch.ones((), device=x.data.device)
    sums = torch._scaled_mm(x.data, weight, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return sums.mul_(token).mul_(channel).to(x.dtype)
