"""What the README says of measurements is in their records, and the records meet their targets: `make check-docs`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kv_answers, linear, real_models, recipes
from benchmarks.quality_table import FP4, RESULT, SETTINGS, Cells, best, cells, fp4_words, pairs, summary, table

README = Path(__file__).parents[2] / "README.md"


def record_of(name: str) -> dict[str, Any]:
    return json.loads(RESULT.with_name(f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found() -> Cells:
    return cells(record_of("quality"))


def test_one_machine_measured_all_of_it_and_nothing_failed() -> None:
    record = record_of("quality")
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
    lines = table(record_of("quality")).splitlines()
    assert lines[0].count("|") == len(SETTINGS) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert sum("(public)" in line for line in lines) == 5


def test_no_method_takes_longer_than_the_public_one_and_the_readme_says_so() -> None:
    timed = record_of("quality")["times"]["rows"]
    ratios = [statistics.median(row["canopyq"]) / statistics.median(row["public"]) for row in timed]
    assert {row["method"] for row in timed} == {"gptq", "hqq", "smoothquant", "smoothquant+gptq"}
    assert max(ratios) <= 1
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of it" in README.read_text(encoding="utf-8")


def test_the_readme_shows_the_record() -> None:
    record = record_of("quality")
    readme = README.read_text(encoding="utf-8")
    assert summary(record) in readme and f"llm-compressor {record['public']['llmcompressor']}" in readme
    known = cells(record)
    draws = {best(known, who, setting)[1].seeds for who in ("public", "canopyq") for setting in SETTINGS}
    assert draws == {4, 5} and "means over four or five draws" in readme


def test_fp4_meets_its_targets_and_the_readme_shows_the_record() -> None:
    record = record_of("quality_fp4")
    assert record["machine"]["processor"] and all("error" not in row for row in record["rows"])
    known = cells(record)
    for setting, most in zip(FP4[:2], (0.45, 0.6), strict=True):
        assert known["canopyq", "gptq", setting].kl <= most * known["canopyq", "rtn", setting].kl
    assert fp4_words(record) in " ".join(README.read_text(encoding="utf-8").split())


def test_the_readme_shows_the_caches_that_were_compared() -> None:
    record = record_of("kv_cache")
    error, step = record["error"], record["time"]["2048"]
    words = " ".join(README.read_text(encoding="utf-8").split())
    for ours, theirs in (("kv4", ["transformers hqq 4", "transformers quanto 4"]), ("kv2", ["transformers quanto 2"])):
        least = min(error[name]["kl"] for name in theirs)
        assert error[ours]["kl"] < least and f"{error[ours]['kl']:.1e} against {least:.1e}" in words
    fastest = min(step[name]["times_full_precision"] for name in ("transformers hqq 4", "transformers quanto 4"))
    assert f"{step['kv4']['times_full_precision']:.2f} times as long as in full precision with 4 bits" in words
    assert f"there {fastest:.2f} times at best" in words
    assert all(step[name]["times_full_precision"] <= 1.5 for name in ("kv8", "kv4", "kv2", "kv-fp8"))


def test_the_record_of_answers_meets_its_target() -> None:
    record = record_of("kv_answers")
    run = record["float32"]
    assert len(run["rows"]) == 500 and run["same"] == kv_answers.summary(run["rows"], run["caches"])
    assert run["same"]["kv8"]["all"]["value"] >= record["target"] == 0.99
    assert run["same"]["kv8"]["codes_least"] >= 192


def test_readme_shows_the_recorded_figures() -> None:
    """The table is what the last recorded run measured, line by line."""
    recorded = record_of("recipes")
    assert recipes.markdown(recorded) in README.read_text(encoding="utf-8")


def test_readme_shows_what_a_real_model_lost() -> None:
    rows = record_of("real_models")["rows"]
    assert real_models.table(rows) in README.read_text(encoding="utf-8")
    assert len({(row["model"], row["text"], row["tokens"]) for row in rows}) == 1  # else they are not to be compared
    runs = [(row["recipe"], row["method"]) for row in rows]
    assert len(set(runs)) == len(runs)


def test_readme_shows_the_recorded_speed() -> None:
    recorded = record_of("linear_w4a16")
    readme = README.read_text(encoding="utf-8")
    assert linear.markdown(recorded) in readme
    decode = record_of("decode")
    for row in decode["rows"]:
        assert f"| {row['name']} | {row['tokens_per_s']:.0f} | {row['GB']:.1f} |" in readme


def speeds(record: str, ours: str) -> list[float]:
    """Of a kernel as times bfloat16's, for every layer and number of rows."""
    us: dict[tuple, dict[str, float]] = {}
    for row in record_of(record)["results"]:
        layer = (row["in"], row["out"]) if "in" in row else (row["k"], row["n"])
        us.setdefault((*layer, row["rows"]), {})[row["name"] if "name" in row else row["kernel"]] = row["us"]
    return [next(time for name, time in of.items() if name.startswith("bf")) / of[ours] for of in us.values()]


def test_readme_says_how_many_layers_are_slower_than_bfloat16() -> None:
    words = " ".join(README.read_text(encoding="utf-8").split())
    four, eight = (speeds(f"linear_w{bits}a16", "canopyq") for bits in (4, 8))
    for found, said in ((four, "{} of 182 cells, at {} % in the lowest"), (eight, "in {}, at {} % in the lowest")):
        assert len(found) == 182
        assert said.format(sum(x >= 0.95 for x in found), round(100 * min(found))) in words
    assert min(speeds("linear_w8a8", "w8a8") + speeds("linear_w8a8", "fp8")) >= 0.95


def test_readme_shows_the_recorded_speed_of_8_bit_layers() -> None:
    """Ours against the fastest other of the same codes, layer by layer."""
    us: dict[tuple, dict[str, float]] = {}
    for row in record_of("linear_w8a8")["results"]:
        us.setdefault((row["k"], row["n"], row["rows"]), {})[row["name"]] = row["us"]
    others = {"w8a8": ["int8 (vLLM CUTLASS)"], "fp8": ["fp8 (vLLM CUTLASS)", "fp8 (_scaled_mm)"]}
    gains = {
        (name, *layer): min(of[other] for other in others[name]) / of[name]
        for layer, of in us.items()
        for name in others
    }
    few = [gain for (_, _, _, rows), gain in gains.items() if rows <= 64]
    fp8, int8 = (
        [100 * gain for (n, *_, rows), gain in gains.items() if n == name and rows >= 1024] for name in ("fp8", "w8a8")
    )
    words = " ".join(README.read_text(encoding="utf-8").split())
    assert f"are {min(few):.2f} to {max(few):.2f} times as fast as the fastest other" in words
    assert f"at {min(fp8):.0f} to {max(fp8):.0f} % of the faster one's speed" in words
    assert f"INT8 is at {min(int8):.0f} to {max(int8):.0f} % of CUTLASS's" in words


def test_readme_shows_the_recorded_speed_of_w4a8() -> None:
    us: dict[tuple, dict[str, float]] = {}
    error: dict[str, float] = {}
    for row in record_of("linear_w4a8")["results"]:
        us.setdefault((row["k"], row["n"], row["rows"]), {})[row["name"]] = row["us"]
        error[row["name"]] = max(error.get(row["name"], 0), row["relative_error"])
    ours, full, vllm = "w4a8-g128", "bf16 (cuBLAS)", "int4 by fp8 (vLLM CUTLASS)"

    def gains(other: str, rows: range) -> list[float]:
        return [of[other] / of[ours] for (*_, count), of in us.items() if count in rows]

    words = " ".join(README.read_text(encoding="utf-8").split())
    few, many = range(1, 65), range(256, 4097)
    assert f"it is {min(gains(full, few)):.2f} to {max(gains(full, few)):.2f} times as fast as bfloat16" in words
    assert f"and {min(gains(vllm, few)):.2f} to {max(gains(vllm, few)):.2f} times as fast as vLLM's CUTLASS" in words
    assert f"off by {100 * error[ours]:.1f} % at most where that is off by {100 * error[vllm]:.1f} %" in words
    said = f"at {100 * min(gains(full, many)):.0f} to {100 * max(gains(full, many)):.0f} % of bfloat16's speed"
    assert said in words and sum(gain > 1 for gain in gains(vllm, many)) < len(gains(vllm, many)) / 5
    assert max(gains("w8a8", many)) < 1 and sum(gain > 1 for gain in gains("w4a16-g128", range(1, 2))) <= 2
