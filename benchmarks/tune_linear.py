"""Finds the fastest tile of the CUDA kernels for each layer shape and number of rows: writes ops/cuda/tiles.json.

    python -m benchmarks.tune_linear [--recipes w4a16 w8a8] [--rows 16 32]     on an NVIDIA H100 or H200, two minutes

Kernels are compiled first, on all processor cores. Each tile's result is compared with the library's before it is
timed, in a process of its own that a fault of one tile cannot take the others with. Numbers of rows at which
dequantizing and cuBLAS is the fastest, and all larger ones, are left out of the table: that is how
`canopyq.kernels.cuda.tiles` knows. What is not named keeps its rows. Layers of 8-bit codes are timed with the
quantization of their input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.linear import SHAPES
from canopyq.errors import CanopyError
from canopyq.kernels.cuda import eight_bits, nvrtc, products, tiles, warpgroup_codes, wide_int8
from canopyq.kernels.cuda.tiles import DecodeTile, WarpgroupTile, Weight
from canopyq.kernels.cuda.warpgroup_codes import CodesTile
from canopyq.kernels.cuda.wide_int8 import WideTile
from canopyq.kernels.timing import microseconds, rotations

BF16 = torch.bfloat16
ROWS = {
    "w4a16": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "w8a16": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "w8a8": (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
    "fp8": (1, 4, 8, 16, 32, 64, 128, 256),
}
GROUP = {"w4a16": 128, "w8a16": 0}
CODES = {"w8a8": "int8", "fp8": "fp8_e4m3"}
REGISTERS, THREADS, PROCESSORS = 65536, 2048, 132
SILENCE = 40  # seconds without a word after which a process is taken to hang
WRONG = 1e-2  # a relative error beyond rounding

Tile = (
    DecodeTile | WarpgroupTile | CodesTile | WideTile | None
)  # None: the kernel for few rows of codes, which has none
KERNELS = {DecodeTile: "decode", WarpgroupTile: "warpgroup", CodesTile: warpgroup_codes.KERNEL,
           WideTile: wide_int8.KERNEL, type(None): "skinny"}  # fmt: skip
WIDE = [WideTile(256, 1, 4), WideTile(128, 2, 4), WideTile(128, 1, 6)]


# --- what may be worth timing ----------------------------------------------------------------------------------------


def decode_tiles(weight: Weight, rows: int) -> Iterator[DecodeTile]:
    """Up to 16 rows. ``per_sm`` as many blocks as fit; for one row also as many as there are tiles."""
    if rows > 16:
        return
    columns = -(-rows // 8)
    for blocks, cluster in product((1, 2, 4) if rows <= 2 else (1, 2), (1, 2, 4)):
        if cluster == 4 and rows < 4:
            continue
        for warps, depth in ((8, 3), (8, 4), (16, 3), (16, 4)):
            tile = DecodeTile(columns, blocks, warps, depth, cluster, 1)
            shared = tile.shared(weight, rows)
            if shared > tiles.SHARED - tiles.RESERVED or weight.steps // cluster < warps // 2:
                continue
            registers = 64 if blocks == 1 else 80 if columns == 1 else 128
            per_sm = min(tiles.SHARED // (shared + tiles.RESERVED), THREADS // (warps * 32),
                         REGISTERS // (registers * warps * 32))  # fmt: skip
            yield DecodeTile(columns, blocks, warps, depth, cluster, max(1, per_sm))
            if per_sm > 1:  # leaves room for the next kernel's blocks before the end
                yield DecodeTile(columns, blocks, warps, depth, cluster, 1)
            if rows == 1:
                yield DecodeTile(columns, blocks, warps, depth, cluster, 8)


def warpgroup_tiles(weight: Weight, rows: int) -> Iterator[WarpgroupTile]:
    if rows < 4:
        return
    wide = next((tokens for tokens in (8, 16, 32, 64) if rows <= tokens), 128)
    for tokens in {wide} if rows < 128 else {64, 128, 256} if rows == 256 else {64, 128} if rows < 256 else {128, 256}:
        warpgroups = [(1, 2), (2, 1), (2, 2)] if tokens < 128 else [(2, 1), (1, 1)]
        for (beside, deep), tall, per_sm, cluster in product(warpgroups, (1, 2), (1, 2, 3), (1, 2, 3, 4)):
            if tokens <= 16 and (per_sm == 1 or tall * beside * deep == 8):
                continue
            blocks = -(-rows // tokens) * -(-weight.slabs // (beside * tall)) * cluster
            if weight.steps < 2 * cluster * deep or (blocks < 100 and cluster < 4):
                continue  # too few steps to share out, or too few blocks for the GPU
            if tall * tokens > 256 or (blocks > 4 * PROCESSORS * per_sm and cluster > 1):
                continue
            for batch in (2, 4):
                registers = tall * (tokens * (2 if tokens <= 32 else 1) // 2 + 8 * batch) + 40
                threads = beside * deep * 128 * per_sm
                if tall * tokens > 192 and 232 * threads + 40 * 128 * per_sm > REGISTERS:
                    continue  # what the kernel hands over would not be there
                if min(registers, 232) * threads > REGISTERS or (batch == 4 and tall * tokens >= 64):
                    continue
                tile = WarpgroupTile(tokens, tall, beside, deep, 20, batch, cluster, per_sm).fitted(weight)
                if (tile.per_sm, tile.deep) == (per_sm, deep):
                    yield tile
                    if tokens <= 64 and tile.stages >= 6:  # leaves room for the next kernel's blocks before the end
                        yield replace(tile, stages=tile.stages // 2).fitted(weight)


def codes_tiles(recipe: str, n: int, k: int, rows: int) -> Iterator[CodesTile | WideTile | None]:
    if recipe == "w8a8" and rows >= 128:
        yield from WIDE
    if rows <= eight_bits.MOST_ROWS:
        yield None
    wide = next((tokens for tokens in (8, 16, 32, 64) if rows <= tokens), 128)
    for tokens in {wide} if rows < 128 else {64, 128} if rows < 256 else {128, 256}:
        for (tall, warpgroups), per_sm in product(((1, 1), (1, 2), (2, 2)), (1, 2, 3)):
            for cluster in (1, 2, 4):
                blocks = -(-rows // tokens) * -(-n // (64 * tall * warpgroups)) * cluster
                if blocks < 100 and cluster < 4:
                    continue  # too few for the GPU
                if cluster > 1 and (k < 1024 * cluster or blocks > 4 * PROCESSORS * per_sm):
                    continue
                sums = tall * tokens // 2 * (2 if recipe == "fp8" else 1)
                if sums > 128 or (sums + 40) * (warpgroups * 128 + 32) * per_sm > REGISTERS:
                    continue
                if tokens >= 128 and (tall * warpgroups < 2 or warpgroups == 1):
                    continue
                tile = CodesTile(tokens, tall, warpgroups, 20, cluster, per_sm).fitted(k)
                if tile.stages > 2 or (tile.stages == 2 and tokens >= 128):
                    yield tile
                if tokens <= 64 and tile.stages >= 6:  # leaves room for the next kernel's blocks before the end
                    yield replace(tile, stages=tile.stages // 2)


def weight_of(recipe: str, k: int, n: int) -> Weight:
    steps = k // 128
    return Weight(n, n // 64, steps, steps if GROUP[recipe] else 1, int(recipe[1]), GROUP[recipe], False)


def candidates(recipe: str, k: int, n: int, rows: int) -> list[Tile]:
    if recipe in CODES:
        return list(dict.fromkeys(codes_tiles(recipe, n, k, rows)))
    weight = weight_of(recipe, k, n)
    return list(dict.fromkeys([*decode_tiles(weight, rows), *warpgroup_tiles(weight, rows)]))


def compile_tile(job: tuple[str, Tile]) -> bool:
    """Whether it keeps everything in registers and the compiler has no complaint. Runs in a process of its own."""
    recipe, tile = job
    if isinstance(tile, CodesTile):
        constants = warpgroup_codes.constants(CODES[recipe], torch.float32, BF16, tile)
        extra = tiles.codes_product_source(recipe == "w8a8", tile.tokens)
        found = nvrtc.compile("warpgroup_codes.cu", constants, "sm_90a", extra=extra)
    elif isinstance(tile, WideTile):
        constants, extra = wide_int8.constants(torch.float32, BF16, tile), tiles.codes_product_source(True, tile.tokens)
        found = nvrtc.compile("wide_int8.cu", constants, "sm_90a", extra=extra)
    elif tile is None:
        constants = eight_bits.constants(CODES[recipe], 1, torch.float32, BF16)
        found = nvrtc.compile("skinny.cu", constants, "sm_90a")
    else:
        constants = products.constants(int(recipe[1]), GROUP[recipe], False, BF16, BF16)
        if isinstance(tile, DecodeTile):
            found = nvrtc.compile("decode.cu", constants | products.decode_constants(tile), "sm_90a")
        else:
            constants |= products.warpgroup_constants(tile)
            extra = tiles.product_source(tile.tokens, True)
            found = nvrtc.compile("warpgroup.cu", constants, "sm_90a", extra=extra)
    return found.spilled == 0 and not found.warnings


# --- products with random weights ------------------------------------------------------------------------------------


class WeightOnly:
    """A layer of 16-bit activations, with as many copies of its weight as no cache holds."""

    def __init__(self, recipe: str, k: int, n: int) -> None:
        self.weight, self.k = weight_of(recipe, k, n), k
        weight, self.parts = self.weight, []
        for _ in range(rotations(weight.slabs * weight.steps * 4 * weight.step_bytes)):
            shape = (weight.slabs, weight.steps, 4, weight.bits // 2, 32, 4)
            codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
            scale = torch.rand(weight.slabs, weight.groups, 4, 8, 2, device="cuda").mul_(0.01).add_(0.001).to(BF16)
            self.parts.append((codes, scale, None))

    def input(self, rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(rows, self.k, device="cuda", dtype=BF16),)

    def run(self, own: tuple, x: tuple[Tensor, ...], tile: Tile) -> Tensor:
        run = products.run_decode if isinstance(tile, DecodeTile) else products.run_warpgroup
        return run(*x, *own, self.weight, tile)

    def library(self, own: tuple, x: tuple[Tensor, ...]) -> Tensor:
        return torch.nn.functional.linear(*x, products.run_dequantize(*own, self.weight, self.k, BF16))


class Codes:
    """A layer of 8-bit codes on both sides, likewise."""

    def __init__(self, recipe: str, k: int, n: int) -> None:
        self.format, self.k, self.parts = CODES[recipe], k, []
        for _ in range(rotations(n * k)):
            codes, scale = eight_bits.quantize_rows(torch.randn(n, k, device="cuda", dtype=BF16), self.format)
            self.parts.append((codes, scale))

    def input(self, rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(rows, self.k, device="cuda", dtype=BF16),)

    def run(self, own: tuple, x: tuple[Tensor, ...], tile: Tile) -> Tensor:
        x = eight_bits.quantize_rows(*x, self.format)
        if tile is None:
            return eight_bits.multiply_codes(*x, *own, BF16)
        return (wide_int8 if isinstance(tile, WideTile) else warpgroup_codes).run(*x, *own, BF16, tile)

    def library(self, own: tuple, x: tuple[Tensor, ...]) -> Tensor:
        x = eight_bits.quantize_rows(*x, self.format)
        if self.format == "int8":
            return (x[0].float() * x[1] @ (own[0].float() * own[1]).t()).to(BF16)
        columns = own[1].reshape(1, -1)
        return torch._scaled_mm(x[0], own[0].t(), scale_a=x[1], scale_b=columns, out_dtype=BF16, use_fast_accum=True)


# --- timing ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def work(jobs: list[dict], out: Path) -> None:
    """Time jobs in turn, and write to ``out`` which one begins and what came of it."""
    with out.open("a", encoding="utf-8") as file:

        def say(**what: object) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        layer, layer_key, x, x_key = None, None, None, None
        for job in jobs:
            recipe, k, n, rows = key = (job["recipe"], job["k"], job["n"], job["rows"])
            say(begin=job["id"])
            if layer_key != key[:3]:
                layer = None
                torch.cuda.empty_cache()
                torch.manual_seed(0)
                layer, layer_key = (Codes if recipe in CODES else WeightOnly)(recipe, k, n), key[:3]
            if x_key != key:
                x, x_key = layer.input(rows), key
                expected = layer.library(layer.parts[0], x).float()
                if recipe != "w8a8" and rows >= 32:  # to see from where on the library is as fast
                    calls = [lambda own=own, x=x, layer=layer: layer.library(own, x) for own in layer.parts]
                    say(library=list(key), us=microseconds(calls, milliseconds=0.7, repeats=5))
            tile = job["make"]
            try:
                y = layer.run(layer.parts[0], x, tile).float()
                error = float((y - expected).norm() / expected.norm())
                if not error < WRONG:
                    say(id=job["id"], wrong=error)
                    continue
                calls = [lambda own=own, x=x, tile=tile, layer=layer: layer.run(own, x, tile) for own in layer.parts]
                say(id=job["id"], us=microseconds(calls, milliseconds=0.7, repeats=5))
            except CanopyError as error:
                say(id=job["id"], refused=str(error))


def _watched(command: list[str], out: Path) -> int:
    """Run a command to its end, or kill it when it has written nothing for a while: a kernel that hangs."""
    out.touch()
    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(0.2)
        if time.time() - out.stat().st_mtime > SILENCE:
            process.kill()
    return process.wait()


def time_all(jobs: list[dict]) -> tuple[dict[int, float], dict[tuple, float]]:
    """Microseconds of each job that is right, and the library's; a process that dies is followed by another."""
    times, library = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        left = jobs
        for attempt in range(20):
            given, out = Path(folder) / f"{attempt}.json", Path(folder) / f"{attempt}.out"
            given.write_text(json.dumps([{**job, "make": None} for job in left]), encoding="utf-8")
            code = _watched([sys.executable, "-m", "benchmarks.tune_linear", "--work", str(given), str(out)], out)
            said = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
            begun = max((line["begin"] for line in said if "begin" in line), default=left[0]["id"])
            for line in said:
                if "library" in line:
                    library[tuple(line["library"])] = line["us"]
                elif "us" in line:
                    times[line["id"]] = line["us"]
                elif "wrong" in line or "refused" in line:
                    print(f"not timed: {jobs[line['id']]}: {line}", flush=True)
            if code == 0:
                break
            print(f"a process ended with {code} at {jobs[begun]}", flush=True)
            left = [job for job in left if job["id"] > begun]
            if not left:
                break
    return times, library


def tile_of(job: dict) -> Tile:
    """The tile of a job that was written to a file."""
    kinds = {name: kind for kind, name in KERNELS.items()}
    return kinds[job["kernel"]](*job["tile"]) if job["kernel"] != "skinny" else None


def tune(recipes: list[str], only: set[int]) -> list[dict]:
    jobs = []
    for recipe in recipes:
        for (k, n), rows in product(SHAPES, [count for count in ROWS[recipe] if count in only]):
            for tile in candidates(recipe, k, n, rows):
                kernel, constants = KERNELS[type(tile)], [] if tile is None else list(vars(tile).values())
                jobs.append({"recipe": recipe, "k": k, "n": n, "rows": rows, "kernel": kernel, "tile": constants})
    kinds = list(dict.fromkeys((job["recipe"], tile_of(job)) for job in jobs))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        good = dict(zip(kinds, pool.map(compile_tile, kinds, chunksize=4), strict=True))
    print(f"{len(kinds)} tiles, {sum(good.values())} of them without spilled registers; {len(jobs)} runs", flush=True)
    jobs = [{"id": i} | job for i, job in enumerate(job for job in jobs if good[job["recipe"], tile_of(job)])]
    times, library = time_all(jobs)
    rows = []
    for recipe in recipes:
        for k, n in SHAPES:
            for count in ROWS[recipe]:
                key = (recipe, k, n, count)
                here = [job for job in jobs if tuple(job.values())[1:5] == key and job["id"] in times]
                if not here:
                    continue
                best = min(here, key=lambda job: times[job["id"]])
                us = times[best["id"]]
                if library.get(key, us + 1) < us and (recipe == "fp8" or count >= 512):
                    break
                rows.append({name: value for name, value in best.items() if name != "id"} | {"us": round(us, 2)})
                second = sorted(times[job["id"]] for job in here)[1:4]
                print(rows[-1], f"library {library.get(key, 0):.1f}", [round(x, 2) for x in second], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        "--rows", nargs="*", type=int, default=sorted({count for rows in ROWS.values() for count in rows})
    )
    parser.add_argument("--out", type=Path, default=tiles.TABLE)
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        jobs = json.loads(options.work[0].read_text(encoding="utf-8"))
        work([{**job, "make": tile_of(job)} for job in jobs], options.work[1])
        return
    kept = [row for row in tiles.measured() if row["recipe"] not in options.recipes or row["rows"] not in options.rows]
    rows = kept + tune(options.recipes, set(options.rows))
    rows.sort(key=lambda row: (list(ROWS).index(row["recipe"]), row["k"], row["n"], row["rows"]))
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    gpu = torch.cuda.get_device_name()
    options.out.write_text(f'{{"gpu": "{gpu}", "tiles": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
