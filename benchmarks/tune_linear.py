"""Measures the CUDA kernels of linear layers over many shapes and tiles: what `fit_costs` makes tiles.json of.

    python -m benchmarks.tune_linear sweep.json [--recipes w4a16 w8a8] [--seconds 400]     on an NVIDIA H200

Tiles are compiled first, on all processor cores; those that spill registers are left out. Each is compared with float64
on odd shapes, over memory that holds NaN, before it is timed. All of that happens in processes that a tile which hangs
or faults cannot take the rest with. Of each kernel only the tiles that the cost model likes best are timed, and one at
random. Layers of 8-bit codes are timed with the quantization of their input.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
import torch.nn.functional as F

from benchmarks.linear import HELD_OUT, SHAPES
from canopyq.errors import CanopyError
from canopyq.evaluate.tune import CODES, FORMATS, Layer
from canopyq.kernels.cuda import costs, nvrtc, selection, tiles, w4a8, w8a8_launch, weight_only_launch
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import (
    CodesTile,
    DecodeTile,
    SkinnyTile,
    StreamKTile,
    Tile,
    W4A8Tile,
    WarpgroupTile,
    Weight,
    WideTile,
)
from canopyq.kernels.timing import microseconds, rotations

BF16 = torch.bfloat16
MORE_SHAPES = [
    (2048, 8192), (8192, 2048), (3584, 3584), (18944, 3584), (4096, 12288), (8192, 10240), (3072, 8192), (2048, 2048),
    (4096, 1024), (28672, 8192), (2560, 6912), (3584, 4608), (5120, 15360), (1024, 4096), (6912, 2560),
]  # fmt: skip
ROWS = {"w4a16": (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096),
        "w8a16": (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096),
        "w4a8": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
        "w8a8": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
        "fp8": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)}  # fmt: skip
GROUP = {"w4a16": 128, "w8a16": 0, "w4a8": 128}
REGISTERS, THREADS, PROCESSORS = 65536, 2048, 132
MOST = {"decode": 60, "warpgroup": 9, "stream_k": 24, "w4a8": 10, "w8a8_wgmma": 9}  # tiles of a kernel that are timed
HOPELESS = 1.4  # times as long as the fastest by the model: what the table's tiles are not timed for
SILENCE = 20  # seconds without a word after which a process is taken to hang
WRONG = 4e-3  # a relative error beyond rounding
ODD = ((1000, 640), (2136, 2176))  # (n, k) on which tiles are checked
WIDE = [WideTile(256, 1, 4), WideTile(128, 2, 4), WideTile(128, 1, 6)]


# --- what may be worth timing ----------------------------------------------------------------------------------------


STREAM_K = (
    (256, 1, 2, 1),
    (192, 1, 2, 1),
    (128, 2, 2, 1),
    (128, 1, 2, 1),
    (256, 1, 1, 1),
    (192, 1, 1, 1),
    (128, 2, 1, 1),
    (96, 1, 2, 1),
    (64, 2, 2, 1),
    (64, 1, 2, 2),
    (64, 4, 2, 1),
)  # tokens, m_tiles, warpgroups, per_sm


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
    many = [tokens for tokens in (64, 128, 192, 256) if -(-rows // tokens) * tokens < 1.4 * rows]
    for tokens in {wide} if rows < 128 else many if rows <= 256 else many[1:]:
        warpgroups = [(1, 2), (2, 1), (2, 2)] if tokens < 128 else [(2, 1), (1, 1)]
        for (warpgroups_m, warpgroups_k), m_tiles, per_sm, cluster in product(
            warpgroups, (1, 2), (1, 2, 3), (1, 2, 3, 4, 6, 8)
        ):
            if tokens <= 16 and (per_sm == 1 or m_tiles * warpgroups_m * warpgroups_k == 8):
                continue
            blocks = -(-rows // tokens) * -(-weight.slabs // (warpgroups_m * m_tiles)) * cluster
            if (
                weight.steps < 2 * cluster * warpgroups_k
                or (blocks < 60 and cluster < 4)
                or (cluster > 4 and blocks > 160)
            ):
                continue  # too few steps to share out, or too few blocks for the GPU
            if m_tiles * tokens > 256 or (blocks > 4 * PROCESSORS * per_sm and cluster > 1):
                continue
            for batch in (2, 4):
                registers = m_tiles * (tokens * (2 if tokens <= 32 else 1) // 2 + 8 * batch) + 40
                threads = warpgroups_m * warpgroups_k * 128 * per_sm
                if m_tiles * tokens > 192 and 232 * threads + 40 * 128 * per_sm > REGISTERS:
                    continue  # what the kernel hands over would not be there
                if min(registers, 232) * threads > REGISTERS or (
                    batch == 4 and m_tiles * tokens >= 64 and warpgroups_m * warpgroups_k > 1
                ):
                    continue
                tile = WarpgroupTile(tokens, m_tiles, warpgroups_m, warpgroups_k, 20, batch, cluster, per_sm).fitted(
                    weight
                )
                if (tile.per_sm, tile.warpgroups_k) == (per_sm, warpgroups_k):
                    yield tile
                    if tokens <= 64 and tile.stages >= 6:  # leaves room for the next kernel's blocks before the end
                        yield replace(tile, stages=tile.stages // 2).fitted(weight)


def stream_k_tiles(weight: Weight, rows: int) -> Iterator[StreamKTile]:
    if rows <= 32:
        return
    for (tokens, m_tiles, warpgroups, per_sm), batch, cluster in product(STREAM_K, (2, 4), (1, 2)):
        across = -(-rows // tokens)
        if (
            (tokens > 64 and tokens * across >= 1.6 * rows)
            or (tokens == 64 and rows > 256)
            or (tokens == 96 and rows > 400)
        ):
            continue
        if (cluster == 2 and tokens < 96) or (batch == 4 and tokens < 128):
            continue
        tile = StreamKTile(tokens, m_tiles, warpgroups, 12, batch, cluster, per_sm, 1).fitted(weight)
        if tile is None:
            continue
        count = across * -(-weight.n // (tile.rows * cluster))
        slots = PROCESSORS * per_sm // cluster
        for parts in (1, 2, 3, 4, 6, 8, 0):
            if parts == 1 and count < 60 / cluster:
                continue
            if count * parts > (1.1 if parts > 4 else 8) * slots or weight.steps < 2 * parts:
                continue
            if parts == 0 and count % slots == 0:
                continue
            yield replace(tile, parts=parts)


def codes_tiles(recipe: str, n: int, k: int, rows: int) -> Iterator[CodesTile | WideTile | SkinnyTile]:
    if recipe == "w8a8" and rows >= 128:
        yield from WIDE
    if rows <= SkinnyTile.ROWS:
        yield SkinnyTile()
    wide = next((tokens for tokens in (8, 16, 32, 64) if rows <= tokens), 128)
    for tokens in {wide} if rows < 128 else {64, 128} if rows < 256 else {64, 128, 256} if rows < 1024 else {128, 256}:
        for (m_tiles, warpgroups), per_sm in product(((1, 1), (1, 2), (2, 2)), (1, 2, 3)):
            for cluster in (1, 2, 4, 8):
                blocks = -(-rows // tokens) * -(-n // (64 * m_tiles * warpgroups)) * cluster
                if (blocks < 60 and cluster < 4) or (cluster == 8 and blocks > 160):
                    continue  # too few for the GPU
                if cluster > 1 and (k < 512 * cluster or blocks > 4 * PROCESSORS * per_sm):
                    continue
                sums = m_tiles * tokens // 2 * (2 if recipe == "fp8" else 1)
                if sums > 128 or (sums + 40) * (warpgroups * 128 + 32) * per_sm > REGISTERS:
                    continue
                if tokens >= 128 and (m_tiles * warpgroups < 2 or warpgroups == 1):
                    continue
                tile = CodesTile(tokens, m_tiles, warpgroups, 20, cluster, per_sm).fitted(k)
                if tile.stages > 2 or (tile.stages == 2 and tokens >= 128):
                    yield tile
                if tokens <= 64 and tile.stages >= 6:  # leaves room for the next kernel's blocks before the end
                    yield replace(tile, stages=tile.stages // 2)


def w4a8_tiles(weight: Weight, rows: int) -> Iterator[W4A8Tile]:
    wide = next((tokens for tokens in (8, 16, 32, 64) if rows <= tokens), 128)
    for tokens in {wide} if rows <= 64 else {64, 96, 128} if rows < 256 else {96, 128}:
        for warpgroups, per_sm, cluster in product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 6, 8)):
            blocks = -(-rows // tokens) * -(-weight.slabs // warpgroups) * cluster
            if (blocks < 60 and cluster < 4) or (cluster > 4 and blocks > 160):
                continue  # too few for the GPU
            if cluster > 1 and (weight.steps < 4 * cluster or blocks > 4 * PROCESSORS * per_sm):
                continue
            if warpgroups * per_sm > (2 if tokens > 64 else 3 if tokens > 32 else 6):
                continue  # registers
            tile = W4A8Tile(tokens, warpgroups, 20, cluster, per_sm).fitted(weight)
            if tile.stages > 2:
                yield tile
            if tokens <= 64 and tile.stages >= 6:  # leaves room for the next kernel's blocks before the end
                yield replace(tile, stages=tile.stages // 2)


def product_of(recipe: str, k: int, n: int, rows: int) -> Product:
    if recipe in CODES:
        return Product(recipe, n, k, rows)
    steps = -(-k // tiles.STEP)
    weight = Weight(n, -(-n // 64), steps, steps if GROUP[recipe] else 1, int(recipe[1]), GROUP[recipe], False)
    return Product(recipe, n, k, rows, weight)


def candidates(recipe: str, k: int, n: int, rows: int) -> list[Tile]:
    """Those that the cost model likes best of each kernel, and one of the others."""
    asked = product_of(recipe, k, n, rows)
    if asked.weight is None:
        found: Iterator[Tile] = codes_tiles(recipe, n, k, rows)
    elif recipe in FORMATS:
        found = w4a8_tiles(asked.weight, rows)
    else:
        weight = asked.weight
        found = (*decode_tiles(weight, rows), *warpgroup_tiles(weight, rows), *stream_k_tiles(weight, rows))
    by_kernel: dict[tuple[str, bool], list[Tile]] = {}
    for tile in dict.fromkeys(found):
        alone = isinstance(tile, StreamKTile | WarpgroupTile) and tile.groups == 1  # of these the model knows less
        by_kernel.setdefault((tile.KERNEL, alone), []).append(tile)
    chosen = []
    for (kernel, alone), some in by_kernel.items():
        liked = sorted(some, key=lambda tile: costs.microseconds(asked, tile, selection.constants()))
        most = MOST.get(kernel, 7) // (1 + alone)
        chosen += liked[:most] + random.sample(liked[most:], min(1, len(liked[most:])))
    return chosen


def known(recipe: str, k: int, n: int, rows: int) -> list[Tile]:
    """Those of the table that fit, and are not hopeless by the model."""
    found = [choice for choice in selection.candidates(product_of(recipe, k, n, rows)) if choice.tile]
    least = min(choice.us for choice in found)
    return [choice.tile for choice in found if choice.us < HOPELESS * least]


def compiled(tile: Tile) -> Tile:
    """The same where what is not compiled is not told apart."""
    return replace(tile, parts=1) if isinstance(tile, StreamKTile) else tile


def compiles(job: tuple[str, Tile]) -> bool:
    """Whether a tile keeps everything in registers and the compiler has no complaint. Runs in a process of its own."""
    recipe, tile = job
    if isinstance(tile, CodesTile | WideTile):
        integers = recipe == "w8a8"
        if isinstance(tile, WideTile):
            file, constants = "wide_int8.cu", w8a8_launch.wide_constants(torch.float32, BF16, tile)
        else:
            file, constants = (
                "w8a8_wgmma.cu",
                w8a8_launch.wgmma_constants(FORMATS[recipe], torch.float32, BF16, tile),
            )
        found = nvrtc.compile(file, constants, "sm_90a", extra=tiles.codes_product_source(integers, tile.tokens))
    elif isinstance(tile, W4A8Tile):
        constants, extra = (
            w4a8.constants(GROUP[recipe], False, BF16, BF16, tile),
            tiles.w4a8_product_source(tile.tokens),
        )
        found = nvrtc.compile("w4a8.cu", constants, "sm_90a", extra=extra)
    elif isinstance(tile, SkinnyTile):
        constants = w8a8_launch.skinny_constants(FORMATS[recipe], 1, torch.float32, BF16)
        found = nvrtc.compile("skinny.cu", constants, "sm_90a")
    else:
        constants = weight_only_launch.constants(int(recipe[1]), GROUP[recipe], False, BF16, BF16)
        if isinstance(tile, DecodeTile):
            found = nvrtc.compile("decode.cu", constants | weight_only_launch.decode_constants(tile), "sm_90a")
        else:
            streams = isinstance(tile, StreamKTile)
            own = (weight_only_launch.stream_k_constants if streams else weight_only_launch.warpgroup_constants)(tile)
            extra = tiles.product_source(tile.tokens, True)
            found = nvrtc.compile(f"{tile.KERNEL}.cu", constants | own, "sm_90a", extra=extra)
    return found.spilled == 0 and not found.warnings


# --- checking and timing, in processes of their own ------------------------------------------------------------------


class Said:
    """A file to which a process writes, line by line, what it begins and what came of it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, **what: object) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()


@torch.inference_mode()
def check(jobs: list[dict], say: Said) -> None:
    """Every tile on odd shapes and numbers of rows."""
    layers: dict[tuple, Layer] = {}
    for job in jobs:
        say(begin=job["id"])
        recipe, tile, worst = job["recipe"], tiles.of_dict(job["tile"]), 0.0
        for n, k in ODD:
            if (recipe, n, k) not in layers:
                torch.manual_seed(0)
                layers[recipe, n, k] = Layer(recipe, k, n)
            layer = layers[recipe, n, k]
            few = 16 if isinstance(tile, SkinnyTile) else 8 * tile.columns if isinstance(tile, DecodeTile) else None
            for rows in (1, few) if few else (tile.tokens - 3, 2 * tile.tokens + 5):
                x = torch.randn(rows, k, device="cuda", dtype=BF16)
                fitted = selection.fitted(tile, layer.product(min(rows, few or rows)))
                if fitted is None:
                    continue
                wanted = layer.wanted(x, torch.float64)
                for _ in range(2):
                    poison = torch.full((rows, n), float("nan"), device="cuda", dtype=BF16)
                    del poison
                    error = float((layer.run(layer.copies[0], x, fitted).double() - wanted).norm() / wanted.norm())
                    worst = max(worst, error) if error == error else float("inf")
        say(id=job["id"], error=worst)


@torch.inference_mode()
def measure(jobs: list[dict], say: Said) -> None:
    """Time the tiles of each product in turn; with INT4 also bfloat16, and the library where it may be faster."""
    layer, dense = None, []
    for job in jobs:
        recipe, k, n, rows = cell = job["cell"]
        say(begin=job["id"])
        if layer is None or (layer.recipe, layer.k, layer.n) != (recipe, k, n):
            layer = dense = None
            torch.cuda.empty_cache()
            torch.manual_seed(0)
            layer = Layer(recipe, k, n)
            copies = rotations(2 * n * k) if recipe == "w4a16" else 0
            dense = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(copies)]
        x = torch.randn(rows, k, device="cuda", dtype=BF16)
        wanted = layer.wanted(x)
        if dense:
            us = microseconds([lambda w=w, x=x: F.linear(x, w) for w in dense], milliseconds=0.5, repeats=3)
            say(cell=cell, kernel="bfloat16", us=us)
        for said in [*job["tiles"], *[None] * job["library"]]:
            tile = said and tiles.of_dict(said)
            try:
                us = layer.time(x, wanted, tile, milliseconds=0.5, repeats=3)
                say(cell=cell, kernel=tile.KERNEL if tile else selection.LIBRARY, tile=said, us=round(us, 2))
            except CanopyError as error:
                say(cell=cell, tile=said, failed=str(error))


def watched(what: str, jobs: list[dict], end: float) -> list[dict]:
    """What processes say that check or measure jobs; one that dies or falls silent is followed by another."""
    lines, left = [], jobs
    with tempfile.TemporaryDirectory() as folder:
        while left and time.time() < end:
            given, out = Path(folder) / f"{len(left)}.json", Path(folder) / f"{len(left)}.out"
            given.write_text(json.dumps(left), encoding="utf-8")
            out.touch()
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.tune_linear", str(given), "--work", what, str(out)]
            )
            while process.poll() is None:
                time.sleep(0.2)
                if time.time() - out.stat().st_mtime > SILENCE or time.time() > end:
                    process.kill()
            said = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            lines += [line for line in said if "begin" not in line]
            begun = [line["begin"] for line in said if "begin" in line]
            if process.returncode == 0:
                break
            print(f"{what}: a process ended with {process.returncode} at {begun[-1:]}", flush=True)
            left = [job for job in left if job["id"] > (begun[-1] if begun else left[0]["id"])]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--kernels", nargs="*", default=[*tiles.KINDS, selection.LIBRARY], help="to time")
    parser.add_argument("--rows", nargs="*", type=int, help="numbers of rows; without it, those of `ROWS`")
    parser.add_argument("--table", action="store_true", help="time every tile of the table, and no other")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        what, out = options.work
        {"check": check, "measure": measure}[what](json.loads(options.out.read_text(encoding="utf-8")), Said(Path(out)))
        return
    end = time.time() + options.seconds
    random.seed(0)
    cells = [
        (recipe, k, n, rows)
        for k, n in [*HELD_OUT, *SHAPES, *MORE_SHAPES]
        for recipe in options.recipes
        for rows in options.rows or ROWS[recipe]
    ]
    tiles_of = known if options.table else candidates
    of_cell = {cell: [tile for tile in tiles_of(*cell) if tile.KERNEL in options.kernels] for cell in cells}
    of_cell = {cell: some for cell, some in of_cell.items() if some}
    kinds = list(dict.fromkeys((cell[0], compiled(tile)) for cell, some in of_cell.items() for tile in some))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        fine = [kind for kind, good in zip(kinds, pool.map(compiles, kinds, chunksize=4), strict=True) if good]
    print(f"{len(kinds)} kinds of tiles, {len(fine)} of them without spilled registers", flush=True)
    jobs = [{"id": i, "recipe": recipe, "tile": tiles.as_dict(tile)} for i, (recipe, tile) in enumerate(fine)]
    errors = {line["id"]: line["error"] for line in watched("check", jobs, end)}
    right = {fine[i] for i, error in errors.items() if error < WRONG}
    print(f"{len(right)} of them are right; the worst of these is off by {max(errors.values()):.2g}", flush=True)
    jobs = [
        {
            "id": i,
            "cell": cell,
            "tiles": [tiles.as_dict(tile) for tile in some if (cell[0], compiled(tile)) in right],
            "library": selection.LIBRARY in options.kernels and cell[0] not in ("w4a8", "w8a8") and cell[3] >= 64,
        }
        for i, (cell, some) in enumerate(of_cell.items())
    ]
    lines = watched("measure", jobs, end)
    about = {"gpu": torch.cuda.get_device_name(), "timed": [line for line in lines if "us" in line]}
    about["failed"] = [line for line in lines if "failed" in line]
    options.out.write_text(json.dumps(about) + "\n", encoding="utf-8")
    print(f"{len(about['timed'])} products timed, {len(about['failed'])} failed; wrote {options.out}")


if __name__ == "__main__":
    main()
