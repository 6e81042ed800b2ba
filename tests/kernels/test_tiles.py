"""Tiles: every one of the table fits whatever it is fitted to, and is one that the kernels can take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopyq.kernels.cuda import selection, tiles
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import DecodeTile, StreamKGrid, StreamKTile, WarpgroupTile, Weight


def weight_of(n: int, k: int, bits: int = 4, group: int = 128, asymmetric: bool = False) -> Weight:
    steps = -(-k // 128)
    return Weight(n, -(-n // 64), steps, steps * 128 // group if group else 1, bits, group, asymmetric)


@given(
    st.integers(1, 40_000),
    st.integers(1, 40_000),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 32, 64, 128, 256]),
    st.booleans(),
    st.integers(1, 9000),
)
def test_every_tile_that_a_product_may_get_fits(
    n: int, k: int, bits: int, group: int, asymmetric: bool, rows: int
) -> None:
    weight = weight_of(n, k, bits, group, asymmetric)
    product = Product(weight.recipe, n, k, rows, weight, stored_by_copies=n % 8 == 0)
    for choice in selection.candidates(product):
        tile = choice.tile
        assert choice.us > 0
        if isinstance(tile, DecodeTile):
            assert tile.depth >= 2 and rows <= 8 * tile.columns
            assert (tile.shared(weight, rows) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED + tiles.RESERVED
        elif isinstance(tile, WarpgroupTile):
            assert tile.stages > tile.warpgroups_k and tile.cluster <= weight.steps
            assert (
                tile.stages % tile.warpgroups_k == 0
            )  # else warpgroups that take turns would wait for each other's copies
            assert (tile.shared(weight) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED
            assert tile.threads * tile.per_sm <= 2048
        elif tile is not None:
            assert isinstance(tile, StreamKTile) and n % 8 == 0
            assert (tile.shared(weight) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED and tile.stages >= 3
            grid = tile.grid(rows, weight, 132)
            assert 1 <= grid.clusters * tile.cluster <= 132 * tile.per_sm and 1 <= grid.parts <= weight.steps
            rows_of_w = (grid.whole + grid.shared) // grid.across * tile.rows * tile.cluster
            assert grid.across * tile.tokens >= rows and rows_of_w >= n and grid.whole % grid.clusters == 0


def walk(grid: StreamKGrid, cluster: int, steps: int) -> list[tuple[int, int, int]]:
    """Tiles that a cluster of blocks does, with the first step and the one behind the last, in its order: as `Walk` in
    stream_k.cu."""
    first, stop = (grid.shared * grid.parts * c // grid.clusters for c in (cluster, cluster + 1))
    found = []
    for tile in range((stop - 1) // grid.parts, first // grid.parts - 1, -1) if stop > first else ():
        begin, end = max(first - tile * grid.parts, 0), min(stop - tile * grid.parts, grid.parts)
        found.append((grid.whole + tile, steps * begin // grid.parts, steps * end // grid.parts))
    return found + [(tile, 0, steps) for tile in range(grid.whole - grid.clusters + cluster, -1, -grid.clusters)]


@given(st.integers(1, 20_000), st.integers(1, 5000), st.integers(1, 200), st.integers(0, 60), st.sampled_from([1, 2]))
def test_stream_k_does_every_step_once_and_waits_for_earlier_blocks_alone(
    n: int, rows: int, steps: int, parts: int, cluster: int
) -> None:
    weight = weight_of(n, 128 * steps)
    grid = StreamKTile(128, 1, 2, 5, 2, cluster, 1, parts).grid(rows, weight, 132)
    done: dict[int, list[tuple[int, int, int]]] = {}
    for c in range(grid.clusters):
        for i, (tile, begin, end) in enumerate(walk(grid, c, steps)):
            assert begin < end
            assert i == 0 or end == steps  # what others need of a block, it does first; its other tiles it ends
            done.setdefault(tile, []).append((begin, end, c))
    assert sorted(done) == list(range(grid.whole + grid.shared))
    for shares in done.values():
        shares.sort()
        assert [begin for begin, _, _ in shares] == [0, *(end for _, end, _ in shares[:-1])]
        assert shares[-1][1] == steps and shares[-1][2] == max(c for _, _, c in shares)


def test_a_row_too_long_for_shared_memory_is_left_to_another_kernel() -> None:
    product = Product("w4a16", 4096, 300_000, 1, weight_of(4096, 300_000))
    assert selection.choose(product, DecodeTile.KERNEL) is None
    assert selection.choose(product).kernel != DecodeTile.KERNEL


def test_warpgroups_that_take_turns_get_stages_of_their_own() -> None:
    weight = weight_of(4096, 11008)
    for warpgroups_k in (1, 2, 4):
        for stages in range(5, 21):
            tile = WarpgroupTile(8, 1, 1, warpgroups_k, stages, 2, 1, 1).fitted(weight)
            assert tile.stages % tile.warpgroups_k == 0 and stages - tile.warpgroups_k < tile.stages <= stages


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w8a8", "fp8"])
def test_tables_name_tiles_by_their_fields(recipe: str) -> None:
    for tile, factor in selection.palette(recipe):
        assert tiles.of_dict(tiles.as_dict(tile)) == tile and 0.5 < factor < 2
