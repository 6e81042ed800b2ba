"""Every CUDA kernel once, on little: what compute-sanitizer is run over.

    compute-sanitizer --tool memcheck python tests/kernels/every_kernel.py [linear|step|cache]   on an NVIDIA Hopper GPU

racecheck reports hazards between `load_shared_16` and `bulk_copy` in warpgroup.cu and stream_k.cu. What orders them,
and how that was shown, benchmarks/results/compute_sanitizer.txt says.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.evaluate.tune import RECIPES, WRONG, Layer
from canopyq.kernels import decode_step
from canopyq.kernels.cuda import attention, kv_append, quantize_rows, selection
from canopyq.kernels.cuda.tiles import DecodeTile, SkinnyTile, StreamKTile, Tile
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import CACHE_FORMATS, get_cache_format

K, N = 640, 272


def kinds(recipe: str) -> list[Tile]:
    """Tiles of the table that differ in more than the lengths of rings."""
    found = {}
    for tile, _ in selection.palette(recipe):
        how = ("columns", "m_tiles", "warpgroups", "warpgroups_m", "warpgroups_k")
        key = tuple(getattr(tile, name, None) for name in how), getattr(tile, "cluster", 1) > 1
        found.setdefault((tile.KERNEL, *key), tile)
    return list(found.values())


def rows_of(tile: Tile) -> int:
    if isinstance(tile, DecodeTile):
        return 8 * tile.columns - 1
    return SkinnyTile.MAX_ROWS if isinstance(tile, SkinnyTile) else tile.tokens + 5


def check(name: str, found: Tensor, wanted: Tensor) -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    print(name, f"{error:.1e}", flush=True)
    assert error < WRONG


def linear() -> None:
    for recipe in RECIPES.values():
        layer = Layer(recipe, K, N)
        for tile in [*kinds(recipe), *[None] * (recipe not in ("w4a8", "w8a8"))]:
            rows = rows_of(tile) if tile else 16
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            fitted = tile and selection.fitted(tile, layer.product(rows))
            for parts in (1, 2, 0) if isinstance(tile, StreamKTile) else (None,):
                own = fitted if parts is None else replace(fitted, parts=parts)
                check(f"{recipe} {own}", layer.run(layer.copies[0], x, own), layer.wanted(x))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def step_kernels() -> None:
    """What a decoding step has beside its linear layers, and rows of activations to codes."""
    x, change, weight = normal(3, 640), normal(3, 640), normal(640)
    normed = (x + change).double() * weight.double() * (x + change).double().square().mean(-1, keepdim=True).rsqrt()
    check("add_rms_norm", decode_step.add_rms_norm(x.clone(), change, weight, 0.0), normed)
    gate, up = normal(3, 1280).chunk(2, dim=-1)
    gated = F.silu(gate.double()) * up.double()
    check("silu_mul", decode_step.silu_mul(torch.cat([gate, up], -1)), gated)
    for format in quantize_rows.CODE_CONSTANTS:
        for name, (codes, scales), wanted in (
            ("quantize_rows", quantize_rows.quantize_rows(x, format), x),
            ("quantize_normed", quantize_rows.quantize_normed(x.clone(), change, weight, 0.0, format), normed),
            ("quantize_gated", quantize_rows.quantize_gated(gate, up, format), gated),
        ):
            error = float((codes.double() * scales - wanted.double()).norm() / wanted.double().norm())
            print(name, format, f"{error:.1e}", flush=True)
            assert error < 0.05  # of 8 bits
    for d, group, length in ((64, 4, 70), (128, 1, 300)):
        position = torch.tensor([length - 3], device="cuda")
        keys, values = normal(2, 2, length, d), normal(2, 2, length, d)
        angles = torch.randn(length, d // 2, device="cuda")
        given = normal(2, (2 * group + 4) * d), angles.cos(), angles.sin(), position
        copies = keys.clone(), values.clone()
        turned = decode_step.rotate_and_append_reference(*given, *copies)
        check(f"rotate_and_append {d}", decode_step.rotate_and_append(*given, keys, values), turned)
        q = normal(2, 2 * group, d)
        check(
            f"attend {d}",
            decode_step.attend(q, keys, values, position),
            decode_step.attend_reference(q, keys, values, position),
        )


def cache_kernels() -> None:
    """Attention on the codes of a cache, and new tokens into one of fixed size."""
    for name in CACHE_FORMATS:
        for d, quantized, recent in ((64, 128, 7), (128, 640, 64)):
            format, scaling = get_cache_format(name), d**-0.5
            old = [normal(2, 2, quantized, d) for _ in range(2)]
            codes = [QuantizedKV.quantize(x, format, of) for x, of in zip(old, ("channel", "token"), strict=True)]
            view, starts = KVView(*codes, normal(2, 2, recent, d), normal(2, 2, recent, d)), torch.tensor([0, 70])
            for n, group in ((1, 4), (2, 8)):
                q = normal(2, 2 * group, n, d)
                k, v = (x.double().repeat_interleave(group, 1) for x in view.dequantized())
                position = torch.arange(quantized + recent, device="cuda")
                mask = position <= quantized + recent - n + torch.arange(n, device="cuda")[:, None]
                mask = mask & (position >= starts.cuda()[:, None, None, None])
                wanted = F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scaling).transpose(1, 2)
                found = attention.attend(q, view, scaling, starts.int().cuda())
                check(f"attend {name} {d} {n} {group}", found, wanted)
            room = [QuantizedKV.zeros((2, 2, 192, d), format, of, 64, "cuda") for of in ("channel", "token")]
            ring = [torch.zeros(2, 2, 128, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            static = KVView(*room, *ring, torch.zeros(1, dtype=torch.int32, device="cuda"), 5)
            for count in (70, 60, 1, 2):
                kv_append.append(normal(2, 2, count, d), normal(2, 2, count, d), static)
                found = attention.attend(normal(2, 8, count if count < 3 else 1, d), static, scaling)
                assert found.isfinite().all()
                static.before.add_(count)


PARTS = {"linear": linear, "step": step_kernels, "cache": cache_kernels}


@torch.inference_mode()
def main() -> None:
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
