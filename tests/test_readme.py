"""What the README tells a reader to type, typed: the commands in their order, and the lines of Python."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import canopyq as cq
from canopyq import cli
from canopyq.cli import calibrated
from canopyq.kv_cache import as_argument
from canopyq.tutor import loading

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "bash" and re.match(r"(\.venv/bin/)?canopyq ", line)
]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader in an empty folder. The exam, the calibration and the benchmark are shorter than theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    questions = cq.tutor.questions
    monkeypatch.setattr(cq.tutor, "questions", lambda n, **options: questions(min(n, 34), **options))
    monkeypatch.setattr(calibrated, "CHATS", 4)
    monkeypatch.setattr("canopyq.evaluate.bench.SHAPES", {"cpu": [(256, 128)], "cuda": [(256, 128)]})
    return tmp_path


@pytest.mark.slow
def test_every_command_ends_well(reader: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert {"quantize", "inspect", "eval", "chat"} <= {command[0] for command in COMMANDS}
    failed = {}
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["canopyq", *command])
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 17 + 25?\n/quit\n"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        if ended.value.code or not out.strip():
            failed[" ".join(command)] = (ended.value.code, err)
    assert not failed, failed


@pytest.mark.slow
def test_the_lines_of_python_run(reader: Path) -> None:
    [block] = [block for language, block in BLOCKS if language == "python"]
    space = {"x": torch.randn(4, 256)}
    exec(block, space)
    assert isinstance(space["cache"], cq.QuantizedCache) and (reader / "out" / "w4").is_dir()
    ids = torch.tensor([[1, 5]])
    out = space["model"].generate(ids, attention_mask=ids, **as_argument(space["cache"]), max_new_tokens=2)
    assert out.shape == (1, 4)
