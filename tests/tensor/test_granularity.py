"""Rows that share a scale: cut and put back, for any shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canopyq.errors import CanopyError
from canopyq.tensor.granularity import Granularity

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Granularity]:
    """A shape and a granularity that fits it."""
    shape = draw(SHAPES)
    kinds = ["tensor", "token", "group"] + (["channel"] if len(shape) > 1 else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "group":
        return shape, Granularity("group", draw(st.integers(1, shape[-1])))
    if kind == "channel":
        return shape, Granularity("channel", axis=draw(st.integers(-len(shape), len(shape) - 1)))
    return shape, Granularity(kind)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """1, 2, 3, … so that no value is like another, nor like padding."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).reshape(shape)


@given(cuts())
def test_from_rows_undoes_rows(cut: tuple[tuple[int, ...], Granularity]) -> None:
    shape, granularity = cut
    granularity.check(shape)
    x = numbered(shape)
    back = granularity.from_rows(granularity.rows(x), shape)
    assert back.shape == x.shape and torch.equal(back, x)


@given(cuts())
def test_every_value_is_in_one_row_and_every_row_has_one_scale(cut: tuple[tuple[int, ...], Granularity]) -> None:
    shape, granularity = cut
    rows = granularity.rows(numbered(shape))
    assert math.prod(granularity.scale_shape(shape)) == len(rows)
    assert sorted(rows[rows != 0].tolist()) == list(range(1, math.prod(shape) + 1))
    pads = int((rows == 0).sum())
    assert pads == granularity.padding(shape) * math.prod(shape[:-1])


@given(cuts())
def test_scales_in_their_kept_shape_belong_to_their_rows(cut: tuple[tuple[int, ...], Granularity]) -> None:
    # A row's maximum, kept as a scale and spread over the tensor by broadcasting, must be the maximum of that row.
    shape, granularity = cut
    x = numbered(shape)
    kept = granularity.rows(x).amax(dim=1).reshape(granularity.scale_shape(shape))
    spread = granularity.from_rows(granularity.rows(x).amax(dim=1, keepdim=True).expand_as(granularity.rows(x)), shape)
    if granularity.kind == "group":
        kept = kept.repeat_interleave(granularity.group_size, dim=-1)[..., : shape[-1]]
    assert torch.equal(kept.expand(shape), spread)


@pytest.mark.parametrize(
    ("granularity", "shape", "rows", "scales"),
    [
        ("tensor", (4, 6), (1, 24), (1,)),
        ("channel", (4, 6), (4, 6), (4, 1)),
        ("token", (2, 3, 6), (6, 6), (2, 3, 1)),
        ("g3", (4, 6), (8, 3), (4, 2)),
        ("g4", (2, 3, 6), (12, 4), (2, 3, 2)),
        ("g6", (6,), (1, 6), (1,)),
        (Granularity("channel", axis=-1), (2, 3, 6), (6, 6), (1, 1, 6)),
        (Granularity("channel", axis=1), (2, 3, 6), (3, 12), (1, 3, 1)),
    ],
    ids=str,
)
def test_shapes(
    granularity: str | Granularity, shape: tuple[int, ...], rows: tuple[int, int], scales: tuple[int, ...]
) -> None:
    parsed = Granularity.parse(granularity)
    assert tuple(parsed.rows(torch.zeros(shape)).shape) == rows
    assert parsed.scale_shape(shape) == scales


def test_a_ragged_last_group_is_filled_with_zeros() -> None:
    rows = Granularity.parse("g4").rows(torch.ones(2, 6))
    assert rows.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("spec", ["tensor", "channel", "token", "g1", "g128", "G64", "Channel"])
def test_names_read_back(spec: str) -> None:
    assert str(Granularity.parse(spec)) == spec.lower()
    assert Granularity.parse(Granularity.parse(spec)) == Granularity.parse(spec)


def test_an_axis_shows() -> None:
    assert str(Granularity("channel", axis=-1)) == "channel axis -1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tensor", "group_size": 4}, "takes no group size.*use g4"),
        ({"kind": "group", "group_size": 4, "axis": 1}, "has no axis 1"),
    ],
    ids=str,
)
def test_granularities_that_mean_nothing(arguments: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        Granularity(**arguments)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (Granularity("channel"), (6,), "at least 2 dimensions.*use 'tensor'"),
        (Granularity("channel", axis=2), (4, 6), "axis 2 does not exist"),
        (Granularity("channel", axis=-3), (4, 6), "axis -3 does not exist"),
        (Granularity("group", 7), (4, 6), "group size 7 does not fit.*use g6"),
    ],
    ids=str,
)
def test_tensors_that_cannot_be_cut_so(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        granularity.check(shape)
