"""The capstone accepts any checkpoint of the learner's own that meets budget and floor, and names all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import canopyq as cq
from canopyq import lessons
from canopyq.lessons.capstone import Capstone, examine_folder
from canopyq.lessons.store import store

SPEC = Capstone(questions=34)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the tutor by recipe."""
    root, made = tmp_path_factory.mktemp("made"), {}
    for recipe in ("w4a16-tensor", "w4a16-channel", "w8a16", "w2a16-g32"):
        model, tokenizer = cq.tutor.load()
        cq.quantize_(model, recipe)
        cq.save(model, root / recipe, tokenizer, check=False)
        made[recipe] = root / recipe
    return made


def verdict(folder: object, started: float = 0.0) -> tuple[str, str]:
    finding = examine_folder(folder, SPEC, started)
    return finding.kind, finding.title


def test_a_recipe_that_meets_all_passes(made: dict[str, Path]) -> None:
    finding = examine_folder(str(made["w4a16-channel"]), SPEC, 0.0)
    assert finding.kind == "passed" and "of 4,700,000 bytes" in finding.message


def test_a_method_of_better_rounding_passes_too(tmp_path: Path) -> None:
    model, tokenizer = cq.tutor.load()
    cq.quantize_(model, cq.Recipe("mse", cq.Scheme("int4", "channel", observer="mse", scale_dtype=torch.bfloat16)))
    cq.save(model, tmp_path / "mse", tokenizer, check=False)
    assert verdict(tmp_path / "mse") == ("passed", "Passed")


def test_classic_failures_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    assert verdict(made["w8a16"]) == ("mistake", "too large")
    assert verdict(made["w4a16-tensor"]) == ("mistake", "the server does not take it as it is")
    assert verdict(made["w2a16-g32"]) == ("mistake", "accuracy below the floor")
    assert verdict(made["w4a16-tensor"], started=4e9) == ("mistake", "an older file")
    assert verdict(cq.tutor.path()) == ("mistake", "the original")
    model, tokenizer = cq.tutor.load()
    model.save_pretrained(tmp_path / "untouched")
    assert verdict(tmp_path / "untouched") == ("mistake", "not a quantized checkpoint")
    bare = shutil.copytree(made["w4a16-channel"], tmp_path / "bare")
    (bare / "canopyq.json").unlink()
    assert verdict(bare) == ("mistake", "not saved by cq.save")


def test_another_model_is_named(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = LlamaForCausalLM(config)
    cq.quantize_(model, "w4a16-g32")
    cq.save(model, tmp_path / "foreign", check=False)
    assert verdict(tmp_path / "foreign") == ("mistake", "another model")


def test_a_random_model_of_the_same_shape_fails_on_its_answers(tmp_path: Path) -> None:
    model, tokenizer = cq.tutor.load()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.normal_()
    cq.quantize_(model, "w4a16-channel")
    cq.save(model, tmp_path / "random", tokenizer, check=False)
    assert verdict(tmp_path / "random") == ("mistake", "accuracy below the floor")


def test_what_is_no_checkpoint(made: dict[str, Path], tmp_path: Path) -> None:
    assert verdict(None)[0] == "todo"
    for nothing in (tmp_path / "nowhere", tmp_path, 7, cq.tutor.load()[0]):
        assert verdict(nothing)[0] == "form"
    (tmp_path / "file").write_text("")
    assert verdict(tmp_path / "file")[0] == "form"
    broken = shutil.copytree(made["w4a16-channel"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert verdict(broken)[0] == "error"
    (broken / "config.json").write_text("{")
    assert verdict(broken)[0] == "error"
    dated = shutil.copytree(made["w4a16-channel"], tmp_path / "dated")
    (dated / "canopyq.json").write_text(json.dumps({"date": "yesterday"}))
    assert verdict(dated)[0] == "error"


def test_the_card_counts_tries_and_unlocks(made: dict[str, Path]) -> None:
    store().record("exercises", "11-capstone", started=0.0)
    card = lessons.capstone()
    assert "4.7 MB" in card.static_html() and repr(card).startswith("Exercise 11-capstone: A checkpoint of your own")
    card.widget()
    assert repr(card.check(None)) == "Exercise 11-capstone: not attempted yet"
    assert not card.unlocked
    for _ in range(3):
        assert "not right yet (too large)" in repr(card.check(made["w8a16"]))
    assert card.unlocked and "w4a16-channel" in repr(card.solution())
    row = next(line for line in repr(lessons.progress()).splitlines() if line.startswith("11"))
    assert "exercises 0 of 2" in row


def test_the_solution_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    card = lessons.capstone()
    space: dict = {"cq": cq}
    exec(card.spec.solution, space)
    assert "passed" in repr(card.check(space["folder"]))
    assert lessons.capstone().unlocked
