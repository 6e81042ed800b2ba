"""Loading the tutor model: offline, checked, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from canopyq.errors import CanopyError
from canopyq.tutor import loading
from canopyq.tutor.chat import ask
from canopyq.tutor.exam import questions
from training import files


@pytest.fixture(autouse=True)
def _no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loading.VARIABLE, raising=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(loading.path(), tmp_path / "model"))


def failure(call) -> str:
    with pytest.raises(CanopyError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_dtype_and_device() -> None:
    assert loading.load_folder(loading.path())[0].dtype is torch.float32
    assert loading.load_folder(loading.path(), "bfloat16")[0].dtype is torch.bfloat16
    model, _ = loading.load_folder(loading.path(), torch.float16, "cpu")
    assert model.dtype is torch.float16 and model.device.type == "cpu" and not model.training
    assert "did you mean 'bfloat16'" in failure(lambda: loading.load_folder(loading.path(), "bfloat"))
    assert "device 'cuda:99' cannot be used" in failure(lambda: loading.load_folder(loading.path(), device="cuda:99"))


def test_loads_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    loading.load_folder(loading.path())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    message = failure(lambda: loading.load_folder(copy))
    assert str(copy / name) in message and "reinstall" in message


def test_missing_model(tmp_path: Path) -> None:
    assert "weights.json" in failure(lambda: loading.load_folder(tmp_path / "nowhere"))


def test_truncated_weights(copy: Path) -> None:
    os.truncate(copy / loading.WEIGHTS, 5000)
    assert "has 5,000 bytes instead of 16,400,760" in failure(lambda: loading.load_folder(copy))


def test_one_flipped_bit(copy: Path) -> None:
    content = bytearray((copy / loading.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / loading.WEIGHTS).write_bytes(content)
    assert "SHA-256" in failure(lambda: loading.load_folder(copy))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model.safetensors": 3}'])
def test_damaged_manifest(copy: Path, content: str) -> None:
    (copy / loading.MANIFEST).write_text(content)
    assert "weights.json" in failure(lambda: loading.load_folder(copy))


@pytest.mark.parametrize("change", [{"intermediate_size": 128}, {"num_hidden_layers": 9}])
def test_weights_of_another_config(copy: Path, change: dict) -> None:
    config = json.loads((copy / "config.json").read_text())
    files.write_json(copy / "config.json", config | change)
    files.write_manifest(copy)
    message = failure(lambda: loading.load_folder(copy))
    assert "do not match" in message or "mismatch" in message


def test_another_model_by_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, str(copy))
    model, tokenizer = loading.load()
    assert model.config.num_hidden_layers == 8 and isinstance(ask(model, tokenizer, "What is 1 + 1?"), str)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "no such model!"])
def test_another_model_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, name)
    message = failure(loading.load)
    assert repr(name) in message and f"unset {loading.VARIABLE}" in message


def test_another_folder_that_holds_no_model(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, str(tmp_path))
    assert str(tmp_path) in failure(loading.load)
    monkeypatch.setenv(loading.VARIABLE, str(copy))
    os.truncate(copy / loading.WEIGHTS, 5000)
    assert str(copy) in failure(loading.load)
    (copy / loading.WEIGHTS).rename(copy / "pytorch_model.bin")  # a pickle is never read
    assert str(copy) in failure(loading.load)


def test_the_model_that_ships() -> None:
    model, tokenizer = loading.load()
    assert sum(p.numel() for p in model.parameters()) == 8_196_352
    assert (loading.path() / loading.WEIGHTS).stat().st_size < 2**24
    drawn = questions(17)
    right = [ask(model, tokenizer, question) == question.answer for question in drawn]
    assert sum(right) >= 15, [q.skill for q, hit in zip(drawn, right, strict=True) if not hit]


def test_every_skill_reached_the_gate() -> None:
    end = json.loads((loading.path() / "training_log.jsonl").read_text().splitlines()[-1])
    assert all(score["right"] >= 0.9 * score["asked"] for score in end["test"].values())
