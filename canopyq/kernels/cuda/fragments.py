"""Weights in the order in which the lanes of a warp feed them to the tensor cores; ``fragments.cuh`` reads it.

The operand of the tensor cores is 16 rows by 16 columns. Lane 4g + t holds of it rows g and g + 8 at columns 2t,
2t + 1, 2t + 8 and 2t + 9 (PTX ISA, "Matrix fragments for mma.m16n8k16"). What a lane needs for several products in a
row lies together in 16 bytes, so that a warp reads 512 bytes of the weight with one load and no lane needs another's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.kernels.spec import LinearSpec, PackedWeight, WeightLayout
from canopyq.tensor import packing
from canopyq.tensor.quantized_tensor import QuantizedTensor

SLAB, BLOCK, STEP = 64, 16, 128  # rows of a slab and of a block; columns that a warp takes at a time


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def prepack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Codes (slabs, steps, 4 blocks, pieces, 32 lanes, 4) int32; scales and zero points (slabs, groups, 4 blocks, 8, 2)
    in their own dtype and int16; padded with zeros to whole slabs and steps."""
    (n, k), bits = weight.shape, weight.scheme.format.bits
    high, wide, middle = padded(n, SLAB), padded(k, STEP), 2 ** (bits - 1)
    codes = F.pad(weight.codes + middle if bits < 8 else weight.codes ^ -128, (0, wide - k, 0, high - n))
    pieces, products = bits // 2, 16 // bits  # of 512 bytes to a step, of the tensor cores to a piece
    codes = codes.view(torch.uint8).view(high // SLAB, 4, 2, 8, wide // STEP, pieces, products, 2, 4, 2)
    # now: slab, block, half of the rows, g, step, piece, product, half of the columns, t, neighbour
    if bits == 4:  # nibbles of a word: neighbour, half of the columns, half of the rows, the last one lowest
        words = packing.pack_unchecked(codes.permute(0, 4, 1, 5, 3, 8, 6, 9, 7, 2).reshape(-1, 8), 4, 0)
    else:  # bytes: half of the columns, half of the rows, neighbour
        words = codes.permute(0, 4, 1, 5, 3, 8, 6, 7, 2, 9).contiguous().flatten().view(torch.int32)
    fragments = words.reshape(high // SLAB, wide // STEP, 4, pieces, 32, 4)
    packed = {"weight_fragments": fragments, "weight_scale": _pairs(weight.scale, wide, k)}
    if weight.zero_point is not None:
        packed["weight_zero_point"] = _pairs(weight.zero_point.to(torch.int16) + middle, wide, k)
    if words.is_cuda:  # kernels fetch weights before earlier work of their stream is done, so the weights must be there
        torch.cuda.current_stream(words.device).synchronize()
    return packed


def unpack(packed: PackedWeight, spec: LinearSpec) -> QuantizedTensor:
    """The inverse of `prepack`, bit for bit."""
    words, bits = packed["weight_fragments"], spec.weights.format.bits
    (slabs, steps), middle, pieces, products = words.shape[:2], 2 ** (bits - 1), bits // 2, 16 // bits
    if bits == 4:
        codes = packing.unpack(words.reshape(-1, 1), 4, 8, signed=False)
        codes = codes.view(slabs, steps, 4, pieces, 8, 4, products, 2, 2, 2).permute(0, 2, 9, 4, 1, 3, 6, 8, 5, 7)
    else:
        codes = words.reshape(-1).view(torch.uint8)
        codes = codes.view(slabs, steps, 4, pieces, 8, 4, products, 2, 2, 2).permute(0, 2, 8, 4, 1, 3, 6, 7, 5, 9)
    codes = codes.reshape(slabs * SLAB, -1)[: spec.n, : spec.k]
    data = packing.pack_unchecked(codes, 4, 0) if bits == 4 else (codes.contiguous().view(torch.int8) ^ -128)
    groups = spec.weights.granularity.scale_shape((spec.n, spec.k))[1]
    zero_point = packed.get("weight_zero_point")
    if zero_point is not None:
        zero_point = (_rows(zero_point, spec.n, groups) - middle).to(torch.int8)
    scale = _rows(packed["weight_scale"], spec.n, groups)
    shape = torch.Size([spec.n, spec.k])
    return QuantizedTensor(data, scale, zero_point, spec.weights, shape, spec.weight_dtype)


def slice_rows(packed: PackedWeight, spec: LinearSpec, start: int, stop: int) -> dict[str, Tensor] | None:
    """Rows start to stop in the same memory, if they are whole slabs."""
    if start % SLAB or (stop % SLAB and stop != spec.n):
        return None
    return {name: tensor[start // SLAB : -(-stop // SLAB)] for name, tensor in packed.items()}


def _pairs(part: Tensor, wide: int, k: int) -> Tensor:
    """(n, groups) -> (slabs, groups, 4, 8, 2): the rows g and g + 8 of a block side by side."""
    n, groups = part.shape
    more = wide * groups // k - groups if groups > 1 else 0  # groups of the padding
    part = F.pad(part, (0, more, 0, -n % SLAB))
    return part.view(-1, 4, 2, 8, groups + more).permute(0, 4, 1, 3, 2).contiguous()


def _rows(pairs: Tensor, n: int, groups: int) -> Tensor:
    return pairs.permute(0, 2, 4, 3, 1).reshape(-1, pairs.shape[1])[:n, :groups].contiguous()


FRAGMENTS = WeightLayout("in the tensor cores' order", prepack, unpack, slice_rows)
