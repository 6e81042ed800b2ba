"""Which tile of which kernel takes a product: the fastest one measured for its shape, or the one that `costs` says.

`tiles.json` holds the tiles to choose from, each with a factor by which the model is off for it, the constants of the
model, and the fastest tile of some shapes and numbers of rows: made by ``benchmarks/fit_costs.py`` of what
``benchmarks/tune_linear.py`` measured on an H200, from which some shapes were held out to check the choice. What
``canopyq tune`` measured on this machine comes before them. Rows are rounded up to one of `ROWS`, so that any prefill
meets few kernels.

For one token the nearest shape of the table decides, and its tiles were judged by whole decoding steps: there other,
small kernels run before and after a product, while measurements repeat it, and its next run fills the gaps of the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from canopyq import __version__
from canopyq.disk import write_atomic
from canopyq.errors import wrapped
from canopyq.kernels.cuda import costs, nvrtc, tiles
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import (
    CodesTile,
    DecodeTile,
    SkinnyTile,
    StreamKTile,
    Tile,
    W4A8Tile,
    WarpgroupTile,
    WideTile,
)
from canopyq.kernels.spec import ROW_LIMIT

TABLE = Path(__file__).with_name("tiles.json")
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
LIBRARY = "library"  # no tile: dequantize, then cuBLAS; for FP8 cuBLAS alone
PARTS = (1, 2, 3, 4, 0)  # of a stream-K tile
Key = tuple[str, int, int, int]  # recipe, k, n, rows


@dataclass(frozen=True)
class Choice:
    """What takes a product.

    Attributes:
        tile: of a kernel, or None for the library.
        us: microseconds, measured or estimated.
        measured: whether on this shape and number of rows, rounded up.
    """

    tile: Tile | None
    us: float
    measured: bool

    @property
    def kernel(self) -> str:
        return self.tile.KERNEL if self.tile else LIBRARY


def rounded_up(rows: int) -> int:
    """To one of `ROWS`, or the last of them."""
    return next((count for count in ROWS if count >= rows), ROWS[-1])


def choose(product: Product, kernel: str | None = None) -> Choice | None:
    """The fastest, or the fastest tile of one kernel; None if no tile of it fits."""
    return _choose(replace(product, rows=rounded_up(product.rows)), kernel)


def rows_taken(product: Product, *kernels: str) -> tuple[range, ...]:
    """For how many rows one of these kernels is the fastest, whatever the rows of ``product``."""
    found: list[range] = []
    for before, count in zip((0, *ROWS), ROWS, strict=False):
        if choose(replace(product, rows=count)).kernel in kernels:
            stop = count + 1 if count < ROWS[-1] else ROW_LIMIT
            if found and found[-1].stop == before + 1:
                found[-1] = range(found[-1].start, stop)
            else:
                found.append(range(before + 1, stop))
    return tuple(found)


def candidates(product: Product) -> Iterator[Choice]:
    """The tiles that fit a product, and the library where it takes it too, with the times that the model says."""

    def estimated(tile: Tile | None, factor: float) -> Choice:
        return Choice(tile, factor * costs.microseconds(product, tile, constants()), measured=False)

    if product.recipe not in ("w4a8", "w8a8"):  # of INT8 cuBLAS writes int32 sums, which take longer than the product
        yield estimated(None, 1.0)
    for unfitted, factor in palette(product.recipe):
        tile = fitted(unfitted, product)
        if isinstance(tile, StreamKTile):
            steps = product.weight.steps
            yield from (estimated(replace(tile, parts=parts), factor) for parts in PARTS if parts <= steps)
        elif tile is not None:
            yield estimated(tile, factor)


@cache
def palette(recipe: str) -> tuple[tuple[Tile, float], ...]:
    """The tiles to choose from, before they are fitted to a weight, and what to multiply their estimates by."""
    return tuple(
        (tiles.of_dict({name: value for name, value in said.items() if name != "factor"}), said["factor"])
        for said in _table()["tiles"][recipe]
    )


@cache
def _choose(product: Product, kernel: str | None) -> Choice | None:
    key = (product.recipe, product.k, product.n, product.rows)
    for found in (_tuned(), _measured()):
        if key in found:
            tile, us = found[key]
            fits = tile and fitted(tile, product)
            if (tile is None) == (fits is None) and kernel in (None, tile.KERNEL if tile else LIBRARY):
                return Choice(fits, us, measured=True)
    able = [choice for choice in candidates(product) if kernel in (None, choice.kernel)]
    if product.rows == 1 and (nearest := _nearest(product)) and (near := fitted(nearest, product)):
        able = [choice for choice in able if choice.tile == near] or able
    return min(able, key=lambda choice: choice.us, default=None)


def _nearest(product: Product) -> Tile | None:
    """That of the nearest shape that was measured for one token, if any was."""

    def distance(key: Key) -> float:
        return abs(math.log(key[1] / product.k)) + abs(math.log(key[2] / product.n))

    near = min((key for key in _measured() if key[0] == product.recipe and key[3] == 1), key=distance, default=None)
    return near and _measured()[near][0]


def fitted(tile: Tile, product: Product) -> Tile | None:
    """The tile with rings as deep as fit, or None if it does not take the product."""
    if isinstance(tile, DecodeTile):
        if tile.columns != -(-product.rows // 8):
            return None
        return tile.fitted(product.weight, product.rows, tiles.SHARED - tiles.RESERVED)
    if isinstance(tile, SkinnyTile):
        return tile if product.rows <= tile.MAX_ROWS else None
    if isinstance(tile, StreamKTile | WideTile) and not product.stored_by_copies:
        return None
    if isinstance(tile, StreamKTile | WarpgroupTile | W4A8Tile):
        return tile.fitted(product.weight)
    return tile.fitted(product.k) if isinstance(tile, CodesTile) else tile


def constants() -> Mapping[str, costs.Constants]:
    """Of the model, by recipe and kernel."""
    return _table()["constants"]


@cache
def _table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _key(row: dict) -> Key:
    return row["recipe"], row["k"], row["n"], row["rows"]


@cache
def _measured() -> dict[Key, tuple[Tile | None, float]]:
    """Rows of the table name a tile by its place among those of their recipe."""

    def tile_of(row: dict) -> Tile | None:
        if row["tile"] is None:
            return None
        tile, _ = palette(row["recipe"])[row["tile"]]
        return replace(tile, parts=row["parts"]) if isinstance(tile, StreamKTile) else tile

    return {_key(row): (tile_of(row), row["us"]) for row in _table()["measured"]}


# --- what `canopyq tune` measured here --------------------------------------------------------------------------------


def tuned_path() -> Path:
    """Where measurements on this machine are kept: a file for each GPU, driver and version of canopyq."""
    from cuda.bindings import driver

    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name())
    return nvrtc.folder() / f"tuned-{name}-{driver.cuDriverGetVersion()[1]}-{__version__}.json"


@cache
def _tuned() -> dict[Key, tuple[Tile | None, float]]:
    if not torch.cuda.is_available():
        return {}
    try:
        rows = json.loads(tuned_path().read_text(encoding="utf-8"))
        return {_key(row): (row["tile"] and tiles.of_dict(row["tile"]), row["us"]) for row in rows}
    except (OSError, ImportError, ValueError, KeyError, TypeError):  # none, or of a tool that wrote something else
        return {}


def keep(found: dict[Key, tuple[Tile | None, float]]) -> Path:
    """Add the fastest tiles that were measured here, None for the library, and their microseconds to those known; the
    choice uses them at once.

    Raises:
        CanopyError: if the file cannot be written.
    """
    path = tuned_path()
    rows = [
        {"recipe": recipe, "k": k, "n": n, "rows": count, "tile": tile and tiles.as_dict(tile), "us": us}
        for (recipe, k, n, count), (tile, us) in (_tuned() | found).items()
    ]
    with wrapped(f"{path} cannot be written", f"name another folder in {nvrtc.VARIABLE}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(rows, indent=1).encode())
    _tuned.cache_clear()
    _choose.cache_clear()
    return path
