"""What a stranger's words and files may do to the `canopyq` command: end it in one readable line, and nothing else."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from canopyq import cli
from canopyq.errors import MOST, CanopyError
from canopyq.tutor import loading

ESCAPES = "\x1b[31m\r\n\x07\u202e\u2028\x9b"
BAD = {
    "empty": "",
    "blank": " ",
    "nobody's home": "~nosuchuser/x",
    "line break": "a\nb",
    "terminal": f"a{ESCAPES}",
    "not UTF-8": "a\udcff",
    "endless": "w" * 100_000,
    "many words": "ab " * 10_000,
    "many digits": "9" * 5000,
    "group of many digits": "w4a16-g" + "9" * 5000,
    "beyond int64": str(2**63),
    "beyond float": "1e999",
    "not a number": "nan",
    "infinite": "-inf",
    "negative": "-1",
    "zero": "0",
    "other digits": "٣",
    "brackets": "[/bold][link=x]",
    "format": "{0.__class__}%s%n",
    "above": "../../../../..",
}
# What makes a command end soon where the bad value is one that it can use.
SOON = {
    "size": ["7B"],
    "eval": ["tutor", "--questions", "1"],
    "chat": ["tutor"],
    "explain": ["tutor", "--device", "meta"],
    "quantize": ["nowhere", "--out", "nowhere too"],
    "export": ["nowhere", "--gguf", "nowhere.gguf"],
    "inspect": ["nowhere"],
    "bench": ["--device", "meta"],
    "tune": ["llama-2-7b", "--recipe", "w3a16"],
    "advise": ["--model", "7B"],
    "doctor": [],
    "course": ["nowhere", "--no-lab"],
}
PLACES = [
    (name, option.opts[-1] if option.param_type_name == "option" else None)
    for name, command in get_command(cli.app).commands.items()
    for option in command.params
    if option.name not in ("help", "as_json", "dry_run", "asymmetric", "lab")
]


@pytest.fixture
def canopyq(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`canopyq …` in this process, nobody at the keyboard: exit code, stdout, stderr. An exception is a failure."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # a slow machine shows progress where a fast one shows none

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["canopyq", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


def obeyed(text: str) -> str:
    """Characters that a terminal would obey."""
    return "".join(c for c in text if not c.isprintable() and c not in "\n\u200b")


@pytest.mark.parametrize(("command", "option"), PLACES, ids=lambda value: value or "argument")
def test_no_value_of_any_option_ends_in_a_traceback(
    command: str, option: str | None, canopyq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    small, here = tmp_path / "small", tmp_path / "here"
    for file in ("notebooks/00_start_here.ipynb", "jupyter/settings.json", "README.md", "docs/when-it-goes-wrong.md"):
        (small / file).parent.mkdir(parents=True, exist_ok=True)
        (small / file).write_text("{}")
    monkeypatch.setattr("canopyq.lessons.files.course_folder", lambda: small)
    here.mkdir()
    monkeypatch.chdir(here)
    for name, value in BAD.items():
        words = [command, *SOON[command]]
        if option is None:
            words[1] = f"./{value}" if value.startswith("-") else value
        else:
            words += [f"{option}={value}"]
        code, out, err = canopyq(*words)
        assert code in (0, 1, 2), (name, code)
        assert not obeyed(out) and not obeyed(err), (name, out, err)
        assert "w" * (MOST + 1) not in out + err and "9" * (MOST + 1) not in out + err, name
        assert "ab " * 40 not in out + err, name
        if err.startswith("canopyq: "):
            assert code == 2 and out == "" and err.count("\n") == 1, (name, out, err)
        else:
            assert not err or "Usage: " in err, (name, err)
        if command == "course" and code == 0:  # any name of a folder will do
            for made in here.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("variable", [loading.VARIABLE, "CANOPYQ_PROGRESS"])
def test_no_value_of_a_variable_ends_in_a_traceback(variable: str, canopyq, tmp_path: Path, monkeypatch) -> None:
    from canopyq.lessons import store

    monkeypatch.chdir(tmp_path)
    for name, value in BAD.items():
        monkeypatch.setenv(variable, value)
        if variable == loading.VARIABLE:
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            code, out, err = canopyq("quantize", "tutor", "--out", "out", "--dry-run")
            assert (code == 0) is (not value.strip()), (name, err)
            assert err == "" or (err.startswith("canopyq: ") and err.count("\n") == 1 and not obeyed(err)), (name, err)
        else:
            store.store().read()


def test_an_error_is_never_endless() -> None:
    assert len(str(CanopyError("a " * 10_000))) <= 1000 and len(str(CanopyError("a" * 10_000))) <= MOST


def test_ctrl_c_is_no_traceback(canopyq, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("canopyq.evaluate.machine.describe", interrupted)
    code, out, err = canopyq("doctor")
    assert code in (1, 130) and out == "" and "Traceback" not in err and err.count("\n") <= 2
