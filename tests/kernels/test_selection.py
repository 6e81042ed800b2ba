"""The choice of a tile: measurements come before the model, those of this machine before those of the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import costs, nvrtc, selection
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import StreamKTile, Weight


def product(recipe: str = "w4a16", k: int = 4096, n: int = 4096, rows: int = 1) -> Product:
    weight = None
    if recipe.endswith("a16"):
        group = 128 if recipe == "w4a16" else 0
        weight = Weight(n, -(-n // 64), -(-k // 128), -(-k // 128) if group else 1, int(recipe[1]), group, False)
    return Product(recipe, n, k, rows, weight)


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w8a8", "fp8"])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (5120, 13824), (1000, 64), (28672, 8192), (64, 40)])
def test_every_number_of_rows_has_one_kernel(recipe: str, k: int, n: int) -> None:
    names = {selection.choose(product(recipe, k, n, rows)).kernel for rows in selection.ROWS}
    any_rows = product(recipe, k, n)
    taken = sorted((part.start, part.stop) for name in names for part in selection.rows_taken(any_rows, name))
    assert taken[0][0] == 1 and taken[-1][1] == selection.ROW_LIMIT
    assert [start for start, _ in taken[1:]] == [stop for _, stop in taken[:-1]]
    for start, stop in taken:
        first, last = (selection.choose(product(recipe, k, n, rows)).kernel for rows in (start, stop - 1))
        assert first == last or recipe == "w8a8"


def test_few_rows_go_to_the_decode_kernel_and_many_to_stream_k() -> None:
    assert selection.choose(product(rows=1)).kernel == "decode"
    assert selection.choose(product(rows=1024)).kernel == "stream_k"
    assert selection.choose(replace(product(n=4097, rows=1024), stored_by_copies=False)).kernel != "stream_k"


def test_more_work_never_takes_less_time_by_the_model() -> None:
    tile = StreamKTile(256, 1, 2, 5, 2, 1, 1, 0)
    constants = selection._table()["constants"]
    times = [costs.microseconds(product(rows=rows), tile, constants) for rows in (256, 512, 1024, 2048, 4096)]
    assert times == sorted(times) and times[-1] > 6 * times[0]


def test_what_was_measured_comes_first() -> None:
    row = next(row for row in selection._table()["measured"] if row["recipe"] == "w4a16")
    found = selection.choose(product(k=row["k"], n=row["n"], rows=row["rows"]))
    assert found.measured and found.us == row["us"]
    assert not selection.choose(product(k=row["k"] + 128, n=row["n"], rows=row["rows"])).measured


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w8a8", "fp8"])
@pytest.mark.parametrize(("n", "nearest"), [(12288, 11008), (22016, 28672), (32000, 28672)])
def test_for_one_token_the_nearest_shape_decides(recipe: str, n: int, nearest: int) -> None:
    found, like = (selection.choose(product(recipe, n=size)) for size in (n, nearest))
    assert found.tile == like.tile and like.measured and not found.measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kept" / "tuned.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selection, "tuned_path", lambda: path)
    _forget()
    yield path
    _forget()


def _forget() -> None:
    selection._tuned.cache_clear()
    selection._choose.cache_clear()


def test_what_this_machine_measured_comes_before_the_table(cache: Path) -> None:
    tile = StreamKTile(64, 1, 2, 4, 2, 1, 2, 3)
    selection.keep({("w4a16", 4096, 4096, 64): (tile, 3.5), ("w4a16", 4096, 4096, 1): (None, 1.0)})
    found = selection.choose(product(rows=50))
    assert (replace(found.tile, stages=4), found.us, found.measured) == (tile, 3.5, True)
    assert selection.choose(product(rows=1)).tile is None
    selection.keep({("w4a16", 4096, 4096, 64): (tile, 3.0)})
    assert {row["us"] for row in json.loads(cache.read_text())} == {3.0, 1.0}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '[{"recipe": "w4a16"}]', "[7]"])
def test_a_cache_of_something_else_is_not_used(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert selection.choose(product(rows=1)).kernel == "decode"


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(CanopyError, match=nvrtc.VARIABLE):
        selection.keep({("w4a16", 64, 64, 1): (None, 1.0)})
