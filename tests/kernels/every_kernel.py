"""Every CUDA kernel of linear layers once, on little: what compute-sanitizer is run over.

    compute-sanitizer --tool memcheck python tests/kernels/every_kernel.py     on an NVIDIA Hopper GPU

racecheck reports hazards between `load_shared_16` and `bulk_copy` in warpgroup.cu and stream_k.cu: it does not see what
orders them, see warpgroup.cu.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from canopyq.evaluate.tune import RECIPES, WRONG, Layer
from canopyq.kernels.cuda import selection
from canopyq.kernels.cuda.tiles import DecodeTile, SkinnyTile, StreamKTile, Tile

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


@torch.inference_mode()
def main() -> None:
    for recipe in RECIPES.values():
        layer = Layer(recipe, K, N)
        for tile in [*kinds(recipe), *[None] * (recipe != "w8a8")]:
            rows = rows_of(tile) if tile else 16
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            fitted = tile and selection.fitted(tile, layer.product(rows))
            for parts in (1, 2, 0) if isinstance(tile, StreamKTile) else (None,):
                own = fitted if parts is None else replace(fitted, parts=parts)
                y, wanted = layer.run(layer.copies[0], x, own).float(), layer.wanted(x)
                error = float((y - wanted).norm() / wanted.norm())
                print(recipe, own, f"{error:.1e}", flush=True)
                assert error < WRONG


if __name__ == "__main__":
    main()
