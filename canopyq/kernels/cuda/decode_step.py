"""The operations of `kernels.decode_step` on NVIDIA GPUs, one kernel each (``cuda/decode_step.cu``)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from canopyq.kernels import decode_step as step
from canopyq.kernels.cuda.launch import Function, unavailable

HEAD_DIMS = (64, 128)
MAX_GROUP = 8  # query heads that one block serves


def unsupported_reason(device: torch.device, dtype: torch.dtype, hidden: int, head_dim: int) -> str | None:
    """Why the kernels do not run the steps of a model, so that PyTorch does; None if they do."""
    if reason := unavailable(device):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they compute in bfloat16 or float16; the model is {str(dtype).removeprefix('torch.')}"
    if hidden % 8 or head_dim not in HEAD_DIMS:
        return f"they need head dimensions of 64 or 128 and a width that 8 divides; these are {head_dim} and {hidden}"
    return None


@step.add_rms_norm.register_kernel("cuda")
def _(residual: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, width = residual.shape
    if unsupported_reason(residual.device, residual.dtype, width, HEAD_DIMS[0]):
        return step.add_rms_norm_reference(residual, change, weight, eps)
    y = torch.empty_like(residual)
    added = 0 if change is None else change.contiguous().data_ptr()
    _norm(residual.dtype, width, residual.device.index)(
        (rows, 1, 1), residual.data_ptr(), added, weight.data_ptr(), y.data_ptr(), eps
    )
    return y


@step.silu_mul.register_kernel("cuda")
def _(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape
    if unsupported_reason(gate_up.device, gate_up.dtype, width // 2, HEAD_DIMS[0]):
        return step.silu_mul_reference(gate_up)
    y = gate_up.new_empty(rows, width // 2)
    chunks = width // 16
    _gate(gate_up.dtype, gate_up.device.index)(
        (-(-rows * chunks // 256), 1, 1), gate_up.contiguous().data_ptr(), y.data_ptr(), chunks, rows * chunks
    )
    return y


@step.rotate_and_append.register_kernel("cuda")
def _(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    batch, kv_heads, length, d = keys.shape
    if unsupported_reason(qkv.device, qkv.dtype, d, d):
        return step.rotate_and_append_reference(qkv, cos, sin, position, keys, values)
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = qkv.new_empty(batch, heads, d)
    pointers = [x.data_ptr() for x in (qkv.contiguous(), cos, sin, position, q, keys, values)]
    grid = (-(-batch * (heads + 2 * kv_heads) // 4), 1, 1)
    _rotate(qkv.dtype, d, qkv.device.index)(grid, *pointers, batch, heads, kv_heads, length)
    return q


@step.attend.register_kernel("cuda")
def _(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    batch, heads, d = q.shape
    kv_heads, length = keys.shape[1:3]
    if unsupported_reason(q.device, q.dtype, d, d):
        return step.attend_reference(q, keys, values, position)
    shared = heads // kv_heads
    group = next(g for g in range(min(shared, MAX_GROUP), 0, -1) if shared % g == 0)
    y = q.new_empty(batch, heads * d)
    pointers = [x.data_ptr() for x in (q, keys, values, position, y)]
    run, cluster = _attend(q.dtype, d, group, q.device.index)
    run((heads // group, batch, cluster), *pointers, heads, kv_heads, length, d**-0.5 * math.log2(math.e))
    return y


def _constants(dtype: torch.dtype, **others: int) -> dict[str, int]:
    return {"ELEMENT_BF16": int(dtype == torch.bfloat16), **others}


@cache
def _norm(dtype: torch.dtype, width: int, device: int) -> Function:
    threads = min(512, -(-width // 8 // 32) * 32) if width >= 256 else 32
    return Function("decode_step.cu", "add_rms_norm", _constants(dtype, WIDTH=width), "PPPPf", device, threads)


@cache
def _gate(dtype: torch.dtype, device: int) -> Function:
    return Function("decode_step.cu", "silu_mul", _constants(dtype), "PPii", device, 256)


@cache
def _rotate(dtype: torch.dtype, d: int, device: int) -> Function:
    return Function("decode_step.cu", "rotate_and_append", _constants(dtype, HEAD_DIM=d), "PPPPPPPiiii", device, 128)


@cache
def _attend(dtype: torch.dtype, d: int, group: int, device: int) -> tuple[Function, int]:
    """The kernel, and into how many parts it splits the context."""
    cluster = 8 if torch.cuda.get_device_capability(device) >= (9, 0) else 1
    constants = _constants(dtype, HEAD_DIM=d, GROUP_HEADS=group, CLUSTER=cluster)
    return Function("decode_step.cu", "attend", constants, "PPPPPiiif", device, 128, cluster=cluster), cluster
