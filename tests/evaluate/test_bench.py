"""The short benchmark: right before it is fast, and clear about what it cannot time."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from canopyq.cli import app
from canopyq.errors import CanopyError
from canopyq.evaluate.bench import bench

SMALL = [(256, 128)]


@pytest.mark.parametrize("recipe", ["w8a8", "w3a16-g64"])
def test_every_layer_is_checked_and_timed(recipe: str) -> None:
    found = bench([recipe], shapes=SMALL, rows=(1, 5))
    assert [(x.inputs, x.outputs, x.rows) for x in found] == [(256, 128, 1), (256, 128, 5)]
    assert all(x.us > 0 and x.unquantized_us > 0 and 0 <= x.error < 0.03 for x in found)
    assert found[0].speedup == found[0].unquantized_us / found[0].us


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canopyq.nn.linear.QuantizedLinear.forward", lambda self, x: x[:, : self.out_features] * 0 + 1)
    with pytest.raises(CanopyError, match="w4a16-g128 256x128 on 1 rows is off by"):
        bench(["w4a16-g128"], shapes=SMALL)


@pytest.mark.parametrize(
    ("recipe", "device", "message"),
    [("w4a17", "cpu", "w4a17"), ("w8a8-static", "cpu", "calibrated"), ("w8a16", "meta", "device 'meta'")],
)
def test_what_cannot_be_timed_is_said(recipe: str, device: str, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        bench([recipe], device, shapes=SMALL)


def test_the_command_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canopyq.evaluate.bench.SHAPES", {"cpu": SMALL})
    monkeypatch.setattr("canopyq.evaluate.bench.ROWS", {"cpu": (1,)})
    said = CliRunner().invoke(app, ["bench", "--device", "cpu", "--recipe", "w4a16-g128", "--json"])
    assert said.exit_code == 0, said.output
    content = json.loads(said.stdout)
    assert [row["recipe"] for row in content["results"]] == ["w4a16-g128"] and content["machine"]["torch"]
    said = CliRunner().invoke(app, ["bench", "--device", "cpu"])
    assert "w8a16" in said.stdout and "256→128" in said.stdout
