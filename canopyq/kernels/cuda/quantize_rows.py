"""Rows of 16-bit floats to 8-bit codes in one pass on an NVIDIA GPU, with what comes before them in a model."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch
from canopyq.tensor.scheme import Scheme

CODE_CONSTANTS = {"int8": 8, "fp8_e4m3": 0}  # what the CUDA sources call a format
DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
FP8_FROM = (8, 9)  # compute capability: Ada and Hopper convert to and from E4M3, and multiply it
MAX_KEPT = 4  # vectors of 8 that a thread of quantize_rows.cu keeps in registers


def constants(format: str, dtype: torch.dtype, source: int, threads: int, kept: int) -> dict[str, int]:
    """What `quantize_rows.cu` is compiled for; ``kept`` vectors to a thread."""
    is_bf16 = int(dtype == torch.bfloat16)
    return {"CODE": CODE_CONSTANTS[format], "ELEMENT_BF16": is_bf16, "INPUT": source, "THREADS": threads, "KEPT": kept}


def row_threads(m: int, k: int, source: int, multiprocessors: int) -> tuple[int, int]:
    """Threads to a row (M, K), and how many vectors of 8 each of them keeps."""
    vectors = -(-k // 8)
    threads = next((threads for threads in (256, 512) if vectors <= MAX_KEPT * threads), 1024)
    if source and m <= multiprocessors:  # what comes before takes time, and most of the GPU would be idle
        threads = min(1024, 2 * threads)
    return threads, min(MAX_KEPT, -(-vectors // threads))


@cache
def _quantize(format: str, dtype: torch.dtype, source: int, threads: int, kept: int, device: int) -> launch.Function:
    defined = constants(format, dtype, source, threads, kept)
    return launch.Function("quantize_rows.cu", "quantize_rows", defined, "PPPPPiqqf", device, threads)


def takes(x: Tensor, scheme: Scheme) -> bool:
    """Whether `quantize_rows` gives the codes of ``x`` (M, K) in this scheme."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and scheme.format.name in CODE_CONSTANTS
        and (scheme.granularity.kind, scheme.observer) == ("token", "minmax")
        and scheme.symmetric
        and not scheme.restricted
        and scheme.scale_dtype in (None, torch.float32)
        and x.shape[1] % 8 == 0
        and unsupported_reason(scheme.format.name, x.device) is None
    )


def unsupported_reason(format: str, device: torch.device) -> str | None:
    """Why there are no codes of this format on a device, or None."""
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
    if format not in CODE_CONSTANTS:
        raise CanopyError(f"rows are quantized to {' or '.join(CODE_CONSTANTS)}, not {format}")
    if reason := unsupported_reason(format, x.device):
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
