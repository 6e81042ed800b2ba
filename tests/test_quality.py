"""What the project says of its quality benchmark, in the README, in lesson 09 and in its targets, is in the record."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality_table import RESULT, SETTINGS, Cells, best, cells, pairs, table


@pytest.fixture(scope="module")
def found() -> Cells:
    return cells(json.loads(RESULT.read_text(encoding="utf-8")))


def test_one_machine_measured_all_of_it_and_nothing_failed() -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert record["machine"]["processor"] and record["date"] and record["public"]
    assert all("error" not in row for row in record["rows"])
    runs = [(row["who"], row["method"], row["setting"], row["seed"]) for row in record["rows"]]
    assert len(set(runs)) == len(runs)


def test_each_method_is_no_worse_than_the_public_one_beyond_the_spread(found: Cells) -> None:
    compared = pairs(found)
    assert {setting for _, setting, _, _ in compared} == set(SETTINGS)
    for method, setting, ours, theirs in compared:
        assert ours.kl <= theirs.kl + max(ours.spread, theirs.spread), (method, setting)
        assert ours.bits <= theirs.bits + 1e-6, (method, setting)


def test_the_best_of_ours_beats_the_best_public_one_in_every_setting(found: Cells) -> None:
    for setting in SETTINGS:
        assert best(found, "canopyq", setting)[1].kl < best(found, "public", setting)[1].kl, setting


def test_methods_that_draw_data_are_measured_with_several_draws(found: Cells) -> None:
    for method, setting, ours, theirs in pairs(found):
        if method in ("gptq", "smoothquant", "smoothquant+gptq"):
            assert min(ours.seeds, theirs.seeds) >= 4, (method, setting)


def test_the_table_has_a_column_for_every_setting(found: Cells) -> None:
    lines = table(json.loads(RESULT.read_text(encoding="utf-8"))).splitlines()
    assert lines[0].count("|") == len(SETTINGS) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert sum("(public)" in line for line in lines) == 5
