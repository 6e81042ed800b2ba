"""Ten broken checkpoints: `cq.inspect` is the answer key, and the check knows right from wrong letters."""

from __future__ import annotations

from pathlib import Path

import pytest

import canopyq as cq
from canopyq import lessons
from canopyq.errors import CanopyError
from canopyq.lessons.checkpoints import ANSWER, FAULTS, LAYER, TenCheckpointsCard

NAMED = {  # what `cq.inspect` has to name of each fault
    "a": "weight_packed", "b": "weight_scale", "c": "weight_zero_point is missing", "d": "not quantized",
    "e": f"{LAYER}.weight_scale", "f": f"{LAYER}: weight_shape", "g": "model.safetensors cannot be read", "h": "'gptq'",
    "i": f"{LAYER}.weight_packed is uint8", "j": f"{LAYER} is quantized",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "w4"
    model, tokenizer = cq.tutor.load()
    cq.quantize_(model, "w4a16-g128")
    cq.save(model, folder, tokenizer, check=False)
    return folder


@pytest.fixture
def ten(sound: Path, tmp_path: Path) -> TenCheckpointsCard:
    return lessons.ten_checkpoints(sound, tmp_path / "ten")


def verdict(folder: Path) -> str:
    try:
        return cq.inspect(folder).tools["canopyq"]
    except CanopyError as error:
        return str(error)


def test_inspect_names_each_fault_and_none_in_the_sound_one(sound: Path, ten: TenCheckpointsCard) -> None:
    assert verdict(sound) == "yes"
    for folder, letter in zip(ten.folders, ANSWER, strict=True):
        assert NAMED[letter] in verdict(folder), (folder.name, FAULTS[letter].text)
        with pytest.raises(CanopyError):
            cq.load(folder)
    assert sorted(ANSWER) == list(FAULTS)


def test_the_letters_are_judged(ten: TenCheckpointsCard) -> None:
    assert ten.judge("").kind == "todo"
    assert "3" in ten.judge("abc").message and ten.judge("klmnopqrst").kind == ten.judge(7).kind == "form"
    swapped = ANSWER[1] + ANSWER[0] + ANSWER[2:]
    assert [row[0] for row in ten.judge(swapped).rows] == ["copy 0", "copy 1"]
    assert "8 of 10" in ten.judge(swapped).message
    space: dict = {"cq": cq, "ten": ten}
    exec(ten.spec.solution, space)
    assert repr(ten.check(space["answer"].upper())) == f"Exercise {ten.spec.id}: passed"
    assert "exercises 1 of 3" in next(line for line in repr(lessons.progress()).splitlines() if line[:2] == "07")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CanopyError, match="config.json"):
        lessons.ten_checkpoints(tmp_path, tmp_path / "ten")
