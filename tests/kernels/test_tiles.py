"""The choice of tiles: every shape gets one that fits, and the table is one that the kernels can take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopyq.kernels.cuda import tiles
from canopyq.kernels.cuda.tiles import DecodeTile, WarpgroupTile, Weight


def weight_of(n: int, k: int, bits: int = 4, group: int = 128, asymmetric: bool = False) -> Weight:
    steps = -(-k // 128)
    return Weight(n, -(-n // 64), steps, steps * 128 // group if group else 1, bits, group, asymmetric)


@given(
    st.integers(1, 40_000),
    st.integers(1, 40_000),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 32, 64, 128, 256]),
    st.booleans(),
    st.integers(1, 2048),
)
def test_every_shape_gets_tiles_that_fit(n: int, k: int, bits: int, group: int, asymmetric: bool, rows: int) -> None:
    weight = weight_of(n, k, bits, group, asymmetric)
    if rows <= tiles.most_rows(weight, "decode"):
        tile = tiles.choose(weight, "decode", rows)
        assert isinstance(tile, DecodeTile) and tile.depth >= 2 and rows <= 8 * tile.columns
        assert (tile.shared(weight, rows) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED + tiles.RESERVED
    if rows <= tiles.most_rows(weight, "warpgroup"):
        tile = tiles.choose(weight, "warpgroup", rows)
        assert isinstance(tile, WarpgroupTile) and tile.stages > tile.deep and tile.cluster <= weight.steps
        assert tile.stages % tile.deep == 0  # else warpgroups that take turns would wait for each other's copies
        assert (tile.shared(weight) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED
        assert tile.threads * tile.per_sm <= 2048


@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_go_to_the_kernel_for_more_rows(bits: int) -> None:
    weight = weight_of(4096, 11008, bits)
    assert 1 <= tiles.most_rows(weight, "decode") < tiles.most_rows(weight, "warpgroup")
    assert tiles.choose(weight, "decode", 1) is not None
    assert tiles.choose(weight, "decode", tiles.most_rows(weight, "decode") + 1) is None
    assert tiles.choose(weight, "warpgroup", tiles.most_rows(weight, "warpgroup") + 1) is None


def test_a_row_too_long_for_shared_memory_is_left_to_another_kernel() -> None:
    weight = weight_of(4096, 128_000)
    assert tiles.most_rows(weight, "decode") == 0 and tiles.most_rows(weight, "warpgroup") > 0


def test_warpgroups_that_take_turns_get_stages_of_their_own() -> None:
    weight = weight_of(4096, 11008)
    for deep in (1, 2, 4):
        for stages in range(5, 21):
            tile = WarpgroupTile(8, 1, 1, deep, stages, 2, 1, 1).fitted(weight)
            assert tile.stages % tile.deep == 0 and stages - tile.deep < tile.stages <= stages
