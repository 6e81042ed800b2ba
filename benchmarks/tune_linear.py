"""Finds the fastest tile of the CUDA kernels for each layer shape and number of rows: writes ops/cuda/tiles.json.

    python -m benchmarks.tune_linear          on an NVIDIA H100 or H200, about two minutes

Kernels are compiled first, on all processor cores. Numbers of rows at which dequantizing and cuBLAS is the fastest, and
all larger ones, are left out of the table: that is how `canopyq.ops.cuda.tiles` knows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.linear import SHAPES
from canopyq.ops.cuda import nvrtc, products, tiles
from canopyq.ops.cuda.tiles import DecodeTile, WarpgroupTile, Weight
from canopyq.timing import microseconds, rotations

BF16 = torch.bfloat16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GROUP = {4: 128, 8: 0}
REGISTERS, THREADS, PROCESSORS = 65536, 2048, 132

Parts = tuple[Tensor, Tensor, None]


def decode_tiles(weight: Weight, rows: int) -> Iterator[DecodeTile]:
    """What may be worth timing: ``per_sm`` as many blocks as fit, and as many as there are tiles."""
    if rows > 8:
        return
    for blocks in (1, 2):
        for warps, depth in ((8, 3), (8, 4), (8, 6), (16, 3), (16, 4)):
            for cluster in (1, 2):
                tile = DecodeTile(1, blocks, warps, depth, cluster, 1)
                shared = tile.shared(weight, rows)
                if shared > tiles.SHARED - tiles.RESERVED or weight.steps // cluster < warps // 2:
                    continue
                per_sm = min(tiles.SHARED // (shared + tiles.RESERVED), THREADS // (warps * 32),
                             REGISTERS // ((48 if blocks == 1 else 64) * warps * 32))  # fmt: skip
                yield DecodeTile(1, blocks, warps, depth, cluster, max(1, per_sm))
                yield DecodeTile(1, blocks, warps, depth, cluster, 8)


def warpgroup_tiles(weight: Weight, rows: int) -> Iterator[WarpgroupTile]:
    if rows < 4:
        return
    wide = next((tokens for tokens in (8, 16, 32, 64) if rows <= tokens), 128)
    for tokens in {wide} if rows < 128 else {64, 128} if rows < 256 else {128, 256}:
        warpgroups = [(1, 2), (2, 1), (2, 2)] if tokens < 128 else [(2, 1)]
        for (beside, deep), tall, per_sm, cluster in product(warpgroups, (1, 2), (1, 2, 3), (1, 2, 3, 4)):
            blocks = -(-rows // tokens) * -(-weight.slabs // (beside * tall)) * cluster
            if weight.steps < 2 * cluster * deep or (blocks < 100 and cluster < 4):
                continue  # too few steps to share out, or too few blocks for the GPU
            if tall * tokens > 256 or (blocks > 4 * PROCESSORS * per_sm and cluster > 1):
                continue
            for batch in (2, 4):
                registers = tall * (tokens * (3 if tokens <= 32 else 2) // 2 + 8 * batch) + 40
                if registers * beside * deep * 128 * per_sm > REGISTERS or (batch == 4 and tall * tokens >= 64):
                    continue
                tile = WarpgroupTile(tokens, tall, beside, deep, 20, batch, cluster, per_sm).fitted(weight)
                if (tile.per_sm, tile.deep) == (per_sm, deep):
                    yield tile


def compile_tile(job: tuple[int, DecodeTile | WarpgroupTile]) -> tuple[int, str]:
    """Bytes spilled and the compiler's warnings. Runs in a process of its own."""
    bits, tile = job
    constants = products.constants(bits, GROUP[bits], False, BF16, BF16)
    if isinstance(tile, DecodeTile):
        found = nvrtc.compile("decode.cu", constants | products.decode_constants(tile), "sm_90a")
    else:
        extra = tiles.product_source(tile.tokens, True)
        found = nvrtc.compile("warpgroup.cu", constants | products.warpgroup_constants(tile), "sm_90a", extra=extra)
    return found.spilled, found.warnings


def random_weights(weight: Weight) -> list[Parts]:
    """Random codes and scales, as many copies as no cache holds."""
    parts = []
    for _ in range(rotations(weight.slabs * weight.steps * 4 * weight.step_bytes)):
        shape = (weight.slabs, weight.steps, 4, weight.bits // 2, 32, 4)
        codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        scale = torch.rand(weight.slabs, weight.groups, 4, 8, 2, device="cuda").mul_(0.01).add_(0.001).to(BF16)
        parts.append((codes, scale, None))
    return parts


def library(x: Tensor, parts: Parts, weight: Weight) -> Tensor:
    return torch.nn.functional.linear(x, products.run_dequantize(*parts, weight, x.shape[1], BF16))


def tune(bits: int, good: dict[tuple, bool]) -> Iterator[dict]:
    for k, n in SHAPES:
        weight = weight_of(bits, k, n)
        parts = random_weights(weight)
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=BF16)

            def time(run: Callable[[Parts], Tensor], parts: list[Parts] = parts) -> float:
                return microseconds([lambda own=own: run(own) for own in parts], milliseconds=0.7, repeats=5)

            found = []
            for tile in candidates(weight, rows):
                if good[bits, tile]:
                    run = products.run_decode if isinstance(tile, DecodeTile) else products.run_warpgroup
                    found.append((time(lambda own, x=x, run=run, tile=tile, w=weight: run(x, *own, w, tile)), tile))
            us, tile = min(found, key=lambda one: one[0])
            if rows >= 512 and time(lambda own, x=x, w=weight: library(x, own, w)) < us:
                break
            kernel = "decode" if isinstance(tile, DecodeTile) else "warpgroup"
            yield {"bits": bits, "k": k, "n": n, "rows": rows, "kernel": kernel, "tile": list(vars(tile).values()),
                   "us": round(us, 2)}  # fmt: skip
        del parts
        torch.cuda.empty_cache()


def weight_of(bits: int, k: int, n: int) -> Weight:
    steps = k // 128
    return Weight(n, n // 64, steps, steps if GROUP[bits] else 1, bits, GROUP[bits], False)


def candidates(weight: Weight, rows: int) -> list[DecodeTile | WarpgroupTile]:
    return [*decode_tiles(weight, rows), *warpgroup_tiles(weight, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=tiles.TABLE)
    options = parser.parse_args()
    jobs = {(bits, tile) for bits in GROUP for k, n in SHAPES for rows in ROWS
            for tile in candidates(weight_of(bits, k, n), rows)}  # fmt: skip
    # As `launch` compiles them: the tile's number of blocks does not matter to the decode kernel, so some are the same.
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(compile_tile, jobs, chunksize=4)
        good = {job: spilled == 0 and not warnings for job, (spilled, warnings) in zip(jobs, reports, strict=True)}
    print(f"{len(jobs)} tiles, {sum(good.values())} of them without spilled registers")
    rows = []
    for bits in GROUP:
        for row in tune(bits, good):
            rows.append(row)
            print(row, flush=True)
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    gpu = torch.cuda.get_device_name()
    options.out.write_text(f'{{"gpu": "{gpu}", "tiles": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
