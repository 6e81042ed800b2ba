"""`canopyq tune`: what it measures, what it refuses, and on a GPU that the choice takes what it found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from canopyq.cli import app
from canopyq.errors import CanopyError
from canopyq.evaluate import tune
from canopyq.evaluate.tune import Tuned, gain, shapes_of
from canopyq.kernels.cuda import nvrtc, selection
from canopyq.memory import MODEL_SHAPES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def test_layers_of_a_model_alone_and_joined() -> None:
    assert set(shapes_of(MODEL_SHAPES["llama-3.1-8b"])) == {
        (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 6144), (4096, 28672)
    }  # fmt: skip


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(CanopyError, match="w3a16"):
        tune.tune(recipes=("w4a16-g128", "w3a16"))


@no_gpu
def test_without_a_gpu_it_says_what_is_missing() -> None:
    for arguments in (["tune"], ["tune", "llama-2-7b"]):
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, CanopyError) and "cannot be tuned here" in str(found.exception)


def test_the_gain_is_a_geometric_mean() -> None:
    found = [Tuned("w4a16", 64, 64, 1, before, 1.0, "decode") for before in (2.0, 8.0)]
    assert gain(found) == pytest.approx(4.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
def test_what_was_found_is_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path))
    selection._tuned.cache_clear()
    selection._choose.cache_clear()
    try:
        found = tune.tune([(1024, 1152)], tuple(tune.RECIPES), (1, 100))
        assert {(one.recipe, one.rows) for one in found} == {(name, m) for name in tune.RECIPES for m in (1, 128)}
        assert all(0 < one.after <= one.before for one in found)
        for name, recipe in tune.RECIPES.items():
            choice = selection.choose(tune.Layer(recipe, 1024, 1152).product(100))
            assert choice.measured and choice.kernel in {one.kernel for one in found if one.recipe == name}
        assert [path.name for path in tmp_path.glob("tuned-*")] == [selection.tuned_path().name]
    finally:
        selection._tuned.cache_clear()
        selection._choose.cache_clear()
