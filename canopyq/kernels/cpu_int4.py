"""4-bit weights on the processor: torch's packed kernel for few rows, slice by slice from its layout for many.

torch packs blocks of 64 rows (32 without AVX-512): for each input feature a block's bytes follow one another, and
byte j holds row j in its low half and row j + block/2 in its high half. Each group has a bfloat16 scale s and offset z,
and a code u in 0…15 stands for (u − 8)·s + z.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from canopyq.kernels.cpu_tiled import TILE
from canopyq.kernels.spec import LinearSpec, PackedWeight, WeightLayout
from canopyq.tensor import packing
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.quantized_tensor import QuantizedTensor

GROUPS = (256, 128, 64, 32)  # what torch's kernel takes
COLUMNS = 512  # bytes of a row that are laid out at a time


@cache
def block_rows() -> int | None:
    """Rows to a block of torch's layout on this processor, found by packing rows that hold their own number; None if
    the layout is another one."""
    rows = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 2).contiguous()
    tens, ones = (torch._convert_weight_to_int4pack_for_cpu(part, 1).flatten() for part in (rows // 16, rows % 16))
    low, high = (ones & 15) + (tens & 15) * 16, (ones >> 4) + (tens >> 4) * 16
    for block in (64, 32):
        shape = (64 // block, 2, block // 2)
        found = torch.cat([low.view(shape), high.view(shape)], dim=-1)
        if torch.equal(found, torch.arange(64, dtype=found.dtype).view(-1, 1, block).expand_as(found)):
            return block
    return None


def group_size(spec: LinearSpec) -> int | None:
    """The group that torch's kernel is told: the weight's own, or for a channel the largest that divides it."""
    granularity = spec.weights.granularity
    if granularity.kind == "group":
        fits = granularity.group_size in GROUPS and spec.k % granularity.group_size == 0
        return granularity.group_size if fits else None
    return next((size for size in GROUPS if spec.k % size == 0), None)


def unsupported(spec: LinearSpec) -> str | None:
    fmt, granularity = spec.weights.format, spec.weights.granularity
    if not (isinstance(fmt, IntFormat) and fmt.bits == 4):
        return f"it takes int4 weights; these are {fmt.name}"
    if spec.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    if spec.weights.scale_dtype != torch.bfloat16:
        return f"it takes bfloat16 scales; these are {spec.weights.scale_dtype}"
    if granularity.kind not in ("group", "channel") or granularity.axis != 0:
        return f"it takes a scale per group or output channel; these have one per {granularity}"
    if group_size(spec) is None:
        return f"it takes groups of 32, 64, 128 or 256 that divide in_features; {granularity} and {spec.k} do not"
    if spec.n % 64:
        return f"it takes out_features in multiples of 64; this layer has {spec.n}"
    if block_rows() is None:
        return f"torch {torch.__version__} packs int4 in an order that canopyq does not know on this processor"
    return None


def prepack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Codes (N/block, K, block/2) uint8, and scales and zero points with their groups first: (G, N)."""
    n, k = weight.shape
    half = block_rows() // 2
    pairs = weight.data.view(torch.uint8).view(-1, 2, half, k // 2)  # a byte: two neighbours of a row, the first low
    blocks = torch.empty(len(pairs), k // 2, 2, half, dtype=torch.uint8)
    step = max(1, 2**19 // (2 * half * COLUMNS))
    for i, j in product(range(0, len(pairs), step), range(0, k // 2, COLUMNS)):  # as much as the cache holds
        upper, lower = pairs[i : i + step, :, :, j : j + COLUMNS].unbind(1)
        part = blocks[i : i + step, j : j + COLUMNS]
        part[:, :, 0] = ((upper & 15) | (lower << 4)).transpose(1, 2)
        part[:, :, 1] = ((upper >> 4) | (lower & 240)).transpose(1, 2)
    blocks = blocks.view(len(pairs), k, half)
    packed = {"weight_blocks": blocks, "weight_scale": weight.scale.t().contiguous()}
    if weight.zero_point is not None:
        packed["weight_zero_point"] = weight.zero_point.t().contiguous()
    return packed


def unpack(packed: PackedWeight, spec: LinearSpec) -> QuantizedTensor:
    """The inverse of `prepack`, bit for bit."""
    blocks, zero_point = packed["weight_blocks"], packed.get("weight_zero_point")
    codes = torch.stack([blocks & 15, blocks >> 4], dim=1).transpose(2, 3).reshape(spec.n, spec.k)
    return QuantizedTensor(
        packing.pack_unchecked(codes, 4, 0),
        packed["weight_scale"].t().contiguous(),
        None if zero_point is None else zero_point.t().contiguous(),
        spec.weights,
        torch.Size([spec.n, spec.k]),
        spec.weight_dtype,
    )


def packed_linear(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with x rounded to bfloat16: (M, K) -> (M, N)."""
    size, scale = group_size(spec), packed["weight_scale"]
    # A scale and an offset side by side are twice the bytes, so they last for the call only. As halves of one integer
    # they are written in one pass: the lower half comes first, and a scale has no sign to spread into the upper.
    both = scale.view(torch.int16).to(torch.int32)
    if not spec.weights.symmetric:
        offset = -packed["weight_zero_point"] * scale
        both |= offset.view(torch.int16).to(torch.int32) << 16
    both = both.view(torch.bfloat16).view(len(scale), spec.n, 2)
    if len(scale) != spec.k // size:  # a channel is several of the kernel's groups
        both = both.expand(spec.k // size, -1, -1).contiguous()
    words = packed["weight_blocks"].view(spec.n, spec.k // 2)
    return torch._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), words, size, both).to(x.dtype)


def tiled_linear(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with sums in float32, dequantizing a few blocks at a time: (M, K) -> (M, N)."""
    k, blocks, half = spec.k, packed["weight_blocks"], packed["weight_blocks"].shape[2]
    scale = packed["weight_scale"].float()
    zero = 8 if spec.weights.symmetric else packed["weight_zero_point"] + 8.0
    wide = x.to(torch.float32)
    # x·(U − z)ᵀ·s = x·(U·s)ᵀ − Σx·(z·s): the codes need no subtraction, one small product for each group does it.
    out = -wide.view(len(x), len(scale), -1).sum(-1) @ (scale * zero)
    by_block = scale.view(len(scale), 1, len(blocks), 2, half)
    step = max(1, min(len(blocks), TILE // (2 * half * k)))
    scratch = torch.empty(k * step * 2 * half)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step].transpose(0, 1)
        stop = start + part.shape[1]
        values = scratch[: 2 * part.numel()].view(k, -1, 2, half)
        values[:, :, 0].copy_(part & 15)
        values[:, :, 1].copy_(part >> 4)
        values.view(len(scale), -1, *values.shape[1:]).mul_(by_block[:, :, start:stop])
        columns = out[:, 2 * half * start : 2 * half * stop]
        torch.addmm(columns, wide, values.view(k, -1), out=columns)
    return out.to(x.dtype)


BLOCKS = WeightLayout("in torch's blocks for int4", prepack, unpack)
