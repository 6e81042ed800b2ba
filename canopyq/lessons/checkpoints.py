"""Ten damaged copies of one checkpoint, each with a fault of its own, and the card that asks which has which."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, shown

from .diagnose import Finding
from .exercise import ExerciseCard

ID = "07-ten-checkpoints"
ANSWER = "gcjaeibdhf"  # the fault of checkpoint 0, of 1, …
LAYER = "model.layers.3.mlp.down_proj"
FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Fault:
    """What can be wrong with a checkpoint of INT4 weights in groups of 128, and how it comes about."""

    text: str
    damage: Callable[[Path], None]


def _in_config(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    return damage


def _in_weights(**changes: Any) -> Callable[[Path], None]:
    return _in_config(lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes))


def _in_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors[f"{LAYER}.{name}"] = change(tensors[f"{LAYER}.{name}"]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size * 9 // 10)


FAULTS = {
    "a": Fault("the config promises 8 bits a weight", _in_weights(num_bits=8)),
    "b": Fault("the config promises groups of 64", _in_weights(group_size=64)),
    "c": Fault("the config promises zero points, and there are none", _in_weights(symmetric=False)),
    "d": Fault(
        "the config does not say that anything is quantized", _in_config(lambda c: c.pop("quantization_config"))
    ),
    "e": Fault("one layer has half of its scales", _in_tensor("weight_scale", lambda scale: scale[:, ::2])),
    "f": Fault("one layer's `weight_shape` says another shape", _in_tensor("weight_shape", lambda shape: shape // 2)),
    "g": Fault("the file is cut short", _cut),
    "h": Fault(
        "the config names another format",
        _in_config(lambda c: c["quantization_config"].update(quant_method="gptq")),
    ),
    "i": Fault(
        "one layer's codes are kept as bytes, not as words",
        _in_tensor("weight_packed", lambda words: words.view(torch.uint8)),
    ),
    "j": Fault(
        "the config says that one layer is not quantized, and it is",
        _in_config(lambda c: c["quantization_config"]["ignore"].append(LAYER)),
    ),
}


@dataclass(frozen=True)
class TenCheckpoints:
    """The texts of the card."""

    id: str = ID
    title: str = "Ten broken checkpoints"
    minutes: int = 12
    difficulty: int = 3
    stub: str = 'answer = ""\n'
    solution: str = f"""\
for copy in ten.folders:
    try:
        print(copy.name, cq.inspect(copy).tools["canopyq"])
    except cq.CanopyError as error:
        print(copy.name, error)
answer = "{ANSWER}"
"""
    hints: tuple[str, str, str] = (
        "Look into the config first: `json.loads((ten.folders[0] / "
        "'config.json').read_text())['quantization_config']`, "
        "beside that of the sound checkpoint. Five faults are in there.",
        f"The others are in the file. Its header names every tensor with dtype and shape: `header_of`, and look at "
        f"`{LAYER}`.",
        "`cq.inspect(folder)`, or `canopyq inspect FOLDER` in a terminal, says what is wrong with each. It is the "
        "answer key.",
    )

    @property
    def task(self) -> str:
        faults = "\n".join(f"- **{letter}**: {fault.text}" for letter, fault in FAULTS.items())
        return f"""
Ten copies of the tutor's checkpoint have been written, `ten.folders[0]` to `ten.folders[9]`, and each is broken in its
own way. Which has which fault?

{faults}

Look into `config.json` and into the header of `model.safetensors`, as this lesson did, and set `answer` to ten letters:
the fault of copy 0, of copy 1, and so on.
"""


class TenCheckpointsCard(ExerciseCard):
    """An exercise whose answer is ten letters."""

    css = "canopyq-checkpoints"

    def __init__(self, folders: list[Path]) -> None:
        self.spec = TenCheckpoints()
        self.folders = folders

    def judge(self, answer: Any) -> Finding:
        """What is to be said about ten letters."""
        if not isinstance(answer, str):
            return _form(f'`check` needs ten letters in one text, such as `"abcdefghij"`, not {shown(answer)}.')
        letters = "".join(answer.lower().split())
        if not letters:
            return Finding("todo", "Not attempted yet", "Look into the ten copies, then set `answer` to ten letters.")
        if len(letters) != len(ANSWER) or not set(letters) <= set(FAULTS):
            return _form(f"Ten letters from a to j are needed; these are {len(letters)}: `{letters}`.")
        wrong = [i for i, (mine, right) in enumerate(zip(letters, ANSWER, strict=True)) if mine != right]
        if not wrong:
            return Finding("passed", "Passed", "All ten. `canopyq inspect` says the same of each, in a second.")
        rows = [(f"copy {i}", "", "another fault", f"{letters[i]}: {FAULTS[letters[i]].text}") for i in wrong[:4]]
        said = f"{len(ANSWER) - len(wrong)} of {len(ANSWER)} are right."
        return Finding("wrong", "Not right yet", said, rows=rows)


def ten_checkpoints(source: str | os.PathLike, target: str | os.PathLike) -> TenCheckpointsCard:
    """Damage ten copies of the checkpoint in ``source``, INT4 in groups of 128, and ask what is wrong with each.

    They are written to ``target``/0 to ``target``/9; what is there already is replaced.
    """
    source, target = as_path(source), as_path(target)
    if missing := [name for name in FILES if not (source / name).is_file()]:
        raise CanopyError(f"{source} has no {missing[0]}: give a folder that cq.save wrote")
    folders = [target / str(i) for i in range(len(ANSWER))]
    for folder, letter in zip(folders, ANSWER, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(source / name, folder / name)
        FAULTS[letter].damage(folder)
    return TenCheckpointsCard(folders)


def _form(message: str) -> Finding:
    return Finding("form", "Not right yet", message)
