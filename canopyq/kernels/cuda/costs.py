"""How long a product takes, from its shape and the tile of a kernel: an analytic model whose constants were fitted.

A kernel's blocks run in waves over the multiprocessors. A block fills its pipeline, does its steps, each at the speed
of the slowest of tensor cores, dequantization and copies, and stores its results; all of them together cannot read
faster than memory gives. `tiles.json` holds the constants, fitted by ``benchmarks/fit_costs.py`` to measurements on an
H200 and checked there on shapes that were held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from canopyq.kernels.cuda.tiles import (
    STEP,
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


@dataclass(frozen=True)
class Product:
    """x (rows, k) · Wᵀ (k, n), as the model sees it.

    Attributes:
        recipe: w4a16, w8a16, w4a8, w8a8 or fp8.
        weight: of 4 bits, or under 16-bit activations; None for 8-bit codes on both sides.
        multiprocessors: of the GPU.
        stored_by_copies: whether the copy engine can store y: 16-bit floats, n a multiple of 8.
    """

    recipe: str
    n: int
    k: int
    rows: int
    weight: Weight | None = None
    multiprocessors: int = 132
    stored_by_copies: bool = True

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def weight_bytes(self) -> float:
        """Of codes and scales."""
        return self.n / 16 * self.steps * self.weight.step_bytes if self.weight else self.n * self.k

    @property
    def moved(self) -> float:
        """Bytes that memory moves at least: the weight, x, y."""
        x = 4 if self.recipe in ("w4a8", "w8a8", "fp8") else 2  # codes are made of 16-bit floats, written and read
        return self.weight_bytes + self.rows * (self.k * x + 2 * self.n)


Constants = Mapping[str, float]


def _most(*times: float) -> float:
    """The longest, and a little more where others come near: what overlaps is in each other's way."""
    return sum(time**4 for time in times) ** 0.25


Blocks = WarpgroupTile | StreamKTile | CodesTile | W4A8Tile | WideTile


def _step(product: Product, tile: Blocks, blocks: int, c: Constants) -> float:
    """µs of a step of 128 columns on a multiprocessor with so many blocks."""
    area, weight = tile.tokens * tile.rows, product.weight
    if weight is None:
        copy = (tile.tokens + tile.rows) * STEP / c["copy"]
        return _most(blocks * 2 * area * STEP / c["operations"], blocks * copy, c["latency"])
    if isinstance(tile, W4A8Tile):
        copy = (tile.tokens * STEP + tile.rows / 16 * weight.step_bytes) / c["copy"]
        # However many blocks there are: a warpgroup's products, then what it makes of their sums.
        alone = c["group"] + tile.tokens * c["alone"]
        return _most(blocks * 2 * area * STEP / c["operations"], blocks * copy, alone, c["latency"])
    sharing = tile.cluster if isinstance(tile, StreamKTile) else 1  # blocks of a cluster copy x together
    copy = (2 * tile.tokens * STEP / sharing + tile.rows / 16 * weight.step_bytes) / c["copy"]
    expand = tile.rows * STEP / c["expand"]
    # However many blocks there are: what a warpgroup takes, batch after batch of 16 columns each.
    alone = (
        STEP / 16 / tile.batch / getattr(tile, "warpgroups_k", 1) * c["batch"]
        + tile.rows * STEP / tile.groups / c["alone"]
    )
    return _most(blocks * 2 * area * STEP / c["operations"], blocks * expand, blocks * copy, alone, c["latency"])


def decode(product: Product, tile: DecodeTile, c: Constants) -> float:
    weight, sms = product.weight, product.multiprocessors
    count = -(-weight.blocks // tile.blocks)
    grid = min(count, max(1, sms * tile.per_sm // tile.cluster))
    turns, together = -(-count // grid), -(-grid * tile.cluster // sms)
    share = tile.blocks * weight.step_bytes * weight.steps / tile.cluster
    rate = 1 / (1 / c["copy"] + c["latency"] / (together * tile.warps * tile.depth * tile.blocks * weight.step_bytes))
    fill = product.rows * product.k * 2 / tile.cluster * together / c["fill"]
    end = c["turn"] * turns + c["cluster"] * (tile.cluster > 1)
    return c["start"] + fill + end + _most(product.moved / c["memory"], turns * together * share / rate)


def warpgroup(product: Product, tile: WarpgroupTile | CodesTile | W4A8Tile, c: Constants) -> float:
    sms = product.multiprocessors
    blocks = -(-product.rows // tile.tokens) * -(-product.n // tile.rows) * tile.cluster
    size = next((size for size in (3, 4, 6, 8) if tile.cluster <= size), 8)
    fit = c[f"clusters_of_{size}"] if tile.cluster > 2 else 1.0  # they must lie in one group of multiprocessors
    slots = int(sms * tile.per_sm * fit)
    steps = -(-product.steps // tile.cluster)
    area = tile.tokens * tile.rows
    end = area * (c["store"] + c["reduce"] * (tile.cluster > 1)) + c["cluster"] * (tile.cluster > 1)

    def wave(blocks: float) -> float:
        together = min(tile.per_sm, -(-blocks // sms))
        return c["fill"] + steps * _step(product, tile, together, c) + end * together

    full, rest = divmod(blocks, slots)
    time = full * wave(slots) + (wave(rest) if rest >= 1 else 0.0)
    return c["start"] + _most(product.moved / c["memory"], time)


def stream_k(product: Product, tile: StreamKTile, c: Constants) -> float:
    grid = tile.grid(product.rows, product.weight, product.multiprocessors)
    shared = -(-grid.shared * grid.parts // grid.clusters) / grid.parts  # tiles to a cluster
    split = grid.parts > 1 and grid.shared > 0
    others = min(grid.parts, -(-grid.clusters // grid.shared)) if split else 0  # that add to a tile
    together = min(tile.per_sm, -(-grid.clusters * tile.cluster // product.multiprocessors))
    area, tiles = tile.tokens * tile.rows * together, grid.whole // grid.clusters + shared
    ends = area * (c["store"] * tiles + c["reduce"] * others) + c["split"] * split
    time = c["fill"] + tiles * product.steps * _step(product, tile, together, c) + ends
    return c["start"] + _most(product.moved / c["memory"], time)


def wide_int8(product: Product, tile: WideTile, c: Constants) -> float:
    count = -(-product.rows // tile.tokens) * -(-product.n // tile.rows)
    turns = -(-count // product.multiprocessors)
    area = tile.tokens * tile.rows
    time = c["fill"] + turns * (product.steps * _step(product, tile, 1, c) + area * c["store"])
    return c["start"] + _most(product.moved / c["memory"], time)


def skinny(product: Product, tile: SkinnyTile, c: Constants) -> float:
    return c["start"] + product.moved / c["memory"] + product.rows * product.k * c["fill"]


CUBLAS_TILES = ((256, 128), (192, 128), (128, 128), (64, 128), (64, 64), (256, 192))  # which it seems to have


def cublas(product: Product, c: Constants) -> float:
    """bfloat16, or FP8, of a weight that lies there as the library takes it."""
    size = 2 if product.weight else 1
    moved = size * (product.n * product.k + product.rows * product.k) + 2 * product.rows * product.n
    best = min(
        -(-(-(-product.rows // a) * -(-product.n // b)) // product.multiprocessors) * (a * b + c["edge"] * (a + b))
        for a, b in (*CUBLAS_TILES, *((b, a) for a, b in CUBLAS_TILES))
    )
    even = product.rows * product.n / product.multiprocessors
    area = even ** c["even"] * max(best, even) ** (1 - c["even"])
    return c["start"] + _most(moved / c["memory"], 2 * area * product.k / c["operations"])


def library(product: Product, c: Constants) -> float:
    """Dequantize, then `cublas`."""
    written = product.weight_bytes + 2 * product.n * product.k
    return c["dequantize_start"] + written / c["dequantize"] + cublas(product, c)


MODELS = {
    DecodeTile: decode,
    WarpgroupTile: warpgroup,
    StreamKTile: stream_k,
    CodesTile: warpgroup,
    W4A8Tile: warpgroup,
    WideTile: wide_int8,
    SkinnyTile: skinny,
}


def microseconds(product: Product, tile: Tile | None, constants: Mapping[str, Constants]) -> float:
    """Of the product with this tile, or by the library for None; of 8-bit codes without the quantization of x.

    Args:
        constants: by recipe and kernel, such as ``"w4a16 stream_k"``.
    """
    if tile is None:
        how = library if product.weight else cublas
        return how(product, constants[f"{product.recipe} library"])
    return MODELS[type(tile)](product, tile, constants[f"{product.recipe} {tile.KERNEL}"])
