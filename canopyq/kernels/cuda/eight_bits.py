"""8 bits by 8 bits on an NVIDIA GPU: codes of the rows of x in one pass, and products of few rows with a weight."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch
from canopyq.tensor.scheme import Scheme

CODES = {"int8": 8, "fp8_e4m3": 0}
DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FP8_FROM = (8, 9)  # compute capability that converts to and from E4M3
MOST_KEPT = 4  # vectors of 8 that a thread of quantize_rows.cu keeps in registers
WARPS, RING_BYTES, SUM_STRIDE = 8, 8 * 12 * 1024, 17  # as in skinny.cu
MOST_ROWS = 16


def constants(format: str, tiles: int, scale: torch.dtype, output: torch.dtype) -> dict[str, int]:
    """What `skinny.cu` is compiled for; ``tiles`` of 8 rows."""
    return {"CODE": CODES[format], "SCALE": KINDS[scale], "OUTPUT": KINDS[output], "COLUMN_TILES": tiles,
            "ELEMENT_BF16": int(output == torch.bfloat16)}  # fmt: skip


def _shared_bytes(tiles: int) -> int:
    return RING_BYTES + 2 * WARPS * tiles * 8 * SUM_STRIDE * 4


@cache
def _skinny(format: str, tiles: int, scale: torch.dtype, output: torch.dtype, device: int) -> launch.Function:
    defined = constants(format, tiles, scale, output)
    return launch.Function("skinny.cu", "skinny", defined, "PPPPPiii", device, 32 * WARPS, _shared_bytes(tiles))


@cache
def _scale(scale: torch.dtype, output: torch.dtype, device: int) -> launch.Function:
    return launch.Function("skinny.cu", "scale_sums", constants("int8", 1, scale, output), "PPPPi", device, 256)


def row_constants(format: str, dtype: torch.dtype, source: int, threads: int, kept: int) -> dict[str, int]:
    """What `quantize_rows.cu` is compiled for; ``kept`` vectors to a thread."""
    return {"CODE": CODES[format], "ELEMENT_BF16": KINDS[dtype], "INPUT": source, "THREADS": threads, "KEPT": kept}


def row_threads(m: int, k: int, source: int, multiprocessors: int) -> tuple[int, int]:
    """Threads to a row (M, K), and how many vectors of 8 each of them keeps."""
    vectors = -(-k // 8)
    threads = next((threads for threads in (256, 512) if vectors <= MOST_KEPT * threads), 1024)
    if source and m <= multiprocessors:  # what comes before takes time, and most of the GPU would be idle
        threads = min(1024, 2 * threads)
    return threads, min(MOST_KEPT, -(-vectors // threads))


@cache
def _quantize(format: str, dtype: torch.dtype, source: int, threads: int, kept: int, device: int) -> launch.Function:
    defined = row_constants(format, dtype, source, threads, kept)
    return launch.Function("quantize_rows.cu", "quantize_rows", defined, "PPPPPiqqf", device, threads)


# ------------------------------------------------------------------------------------------------- rows to codes


def takes(x: Tensor, scheme: Scheme) -> bool:
    """Whether `quantize_rows` gives the codes of ``x`` (M, K) in this scheme."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and scheme.format.name in CODES
        and (scheme.granularity.kind, scheme.observer) == ("token", "minmax")
        and scheme.symmetric
        and not scheme.restricted
        and scheme.scale_dtype in (None, torch.float32)
        and x.shape[1] % 8 == 0
        and _cannot(scheme.format.name, x.device) is None
    )


def _cannot(format: str, device: torch.device) -> str | None:
    if reason := launch.unavailable(device):
        return reason
    have = torch.cuda.get_device_capability(device)
    if format == "fp8_e4m3" and have < FP8_FROM:
        return f"FP8 codes need compute capability 8.9 or newer; this GPU has {have[0]}.{have[1]}"
    return None


def _rows(
    x: Tensor, format: str, source: int, other: Tensor | None, epsilon: float, change: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16) or x.shape[1] % 8:
        raise CanopyError(
            f"rows to quantize are 16-bit floats (M, K) with K a multiple of 8, got {x.dtype} {tuple(x.shape)}"
        )
    if format not in CODES:
        raise CanopyError(f"rows are quantized to {' or '.join(CODES)}, not {format}")
    if reason := _cannot(format, x.device):
        raise CanopyError(f"rows cannot be quantized by the CUDA kernel: {reason}")
    shape = {0: None, 1: x.shape[1:], 2: x.shape}[source]
    if other is not None and (other.shape != shape or other.dtype != x.dtype or other.device != x.device):
        raise CanopyError(
            f"beside rows {x.dtype} {tuple(x.shape)} on {x.device} belongs {tuple(shape)} of the same dtype, there, "
            f"got {other.dtype} {tuple(other.shape)} on {other.device}"
        )
    if change is not None and (change.shape != x.shape or change.dtype != x.dtype or change.device != x.device):
        raise CanopyError(
            f"to rows {x.dtype} {tuple(x.shape)} on {x.device} the same is added, got {change.dtype} "
            f"{tuple(change.shape)} on {change.device}"
        )
    m, k = x.shape
    codes = torch.empty(m, k, dtype=DTYPES[format], device=x.device)
    scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if not x.numel():
        return codes, scales
    if change is not None and _aligned(x) is not x:
        raise CanopyError("rows that are added to lie together, from a multiple of 16 bytes on; use .contiguous()")
    x, other = _aligned(x), None if other is None else _aligned(other)
    added = None if change is None else _aligned(change.contiguous())
    threads, kept = row_threads(m, k, source, launch.multiprocessors(x.device.index))
    run = _quantize(format, x.dtype, source, threads, kept, x.device.index)
    beside = 0 if other is None else other.data_ptr()
    stride = 0 if other is None else other.stride(0)
    more = 0 if added is None else added.data_ptr()
    places = (x.data_ptr(), beside, more, codes.data_ptr(), scales.data_ptr())
    run((m, 1, 1), *places, k, x.stride(0), stride, epsilon)
    return codes, scales


def _aligned(x: Tensor) -> Tensor:
    """``x`` or a copy, so that every eight neighbours lie together from a multiple of 16 bytes on."""
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and (x.dim() == 1 or x.stride(0) % 8 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("canopyq::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and float32 scales (M, 1) of the rows of ``x`` (M, K), symmetric; those of `tensor.quantize`.

    A row that holds NaN or infinity gets the scale NaN.

    Raises:
        CanopyError: for an x that is no matrix of 16-bit floats on a GPU, or has a K that is no multiple of 8.
    """
    return _rows(x, format, 0, None, 0.0)


@torch.library.custom_op("canopyq::quantize_normed", mutates_args=("x",))
def quantize_normed(
    x: Tensor, change: Tensor | None, weight: Tensor, epsilon: float, format: str
) -> tuple[Tensor, Tensor]:
    """Add ``change`` to ``x`` (M, K) in place, then `quantize_rows` of RMSNorm(x) · weight, with the roundings of
    transformers' Llama."""
    return _rows(x, format, 1, weight, epsilon, change)


@torch.library.custom_op("canopyq::quantize_gated", mutates_args=())
def quantize_gated(gate: Tensor, up: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of SiLU(gate) · up."""
    return _rows(gate, format, 2, up, 0.0)


def _fake_rows(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=DTYPES[format]), x.new_empty(len(x), 1, dtype=torch.float32)


quantize_rows.register_fake(_fake_rows)
quantize_normed.register_fake(lambda x, change, weight, epsilon, format: _fake_rows(x, format))
quantize_gated.register_fake(lambda gate, up, format: _fake_rows(gate, format))


# ----------------------------------------------------------------------------------------------------- products


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
    if weight_scale.dtype not in KINDS or dtype not in KINDS:
        raise CanopyError(f"scales and results are 16- or 32-bit floats, not {weight_scale.dtype} and {dtype}")
    tensors = (x, x_scale, weight, weight_scale)
    if any(t.device != x.device for t in tensors):
        raise CanopyError(f"codes and scales lie on {', '.join(str(t.device) for t in tensors)}; move them together")
    if reason := _cannot(format, x.device):
        raise CanopyError(f"codes cannot be multiplied by the CUDA kernel: {reason}")
    return format, tuple(
        t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    )


@torch.library.custom_op("canopyq::multiply_codes", mutates_args=())
def multiply_codes(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
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
    if m > MOST_ROWS:
        raise CanopyError(f"the kernel takes up to {MOST_ROWS} rows; these are {m}")
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    tiles = 1 if m <= 8 else 2
    run = _skinny(format, tiles, weight_scale.dtype, dtype, x.device.index)
    blocks = min(-(-n // 16), 2 * launch.multiprocessors(x.device.index))
    run((blocks, 1, 1), *(t.data_ptr() for t in (*operands, y)), m, n, k)
    return y


@multiply_codes.register_fake
def _(x, x_scale, weight, weight_scale, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("canopyq::scale_sums", mutates_args=())
def scale_sums(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """sums · x_scale · weight_scaleᵀ in one pass: int32 (M, N), N a multiple of 4, on a GPU -> (M, N) in ``dtype``."""
    m, n = sums.shape
    y = torch.empty(m, n, dtype=dtype, device=sums.device)
    run, step = _scale(weight_scale.dtype, dtype, sums.device.index), 65535  # the most blocks along y
    for start in range(0, m, step):
        rows = min(step, m - start)
        places = sums[start:].data_ptr(), x_scale[start:].data_ptr(), weight_scale.data_ptr(), y[start:].data_ptr()
        run((-(-n // 1024), rows, 1), *places, n)
    return y


@scale_sums.register_fake
def _(sums, x_scale, weight_scale, dtype):
    return sums.new_empty(sums.shape, dtype=dtype)
