"""The `canopyq` command as a user types it: what it prints, where, and how it ends."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import canopyq as cq
from canopyq import cli, utils
from canopyq.cli.examine import MOST_QUESTIONS
from canopyq.cli.output import console
from canopyq.errors import CanopyError, shown
from canopyq.evaluate.machine import Check
from canopyq.kernels import dispatch
from canopyq.tensor.formats import FORMATS
from canopyq.tutor import SKILLS, loading
from canopyq.tutor.exam import up_to

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["doctor", "size", "eval", "chat", "quantize", "explain", "inspect", "advise"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _the_tutor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # a slow machine shows progress where a fast one shows none


@pytest.fixture
def canopyq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`canopyq …` in this process, by the function that the installed command calls."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["canopyq", *arguments])
        capsys.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call


def process(*arguments: str, cwd: Path = ROOT, stdout: Any = subprocess.PIPE, **environment: str) -> Done:
    """`canopyq …` in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CANOPYQ", "HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "canopyq", *arguments],
        cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"} | environment, stdout=stdout, stderr=subprocess.PIPE,
        text=True, timeout=120,
    )  # fmt: skip
    return Done(done.returncode, done.stdout or "", done.stderr)


def failure(done: Done) -> str:
    """The one line on stderr that a mistake ends in."""
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("canopyq: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    return done.err.strip()


def usage_error(done: Done) -> str:
    """What is wrong with the command line, in typer's frame."""
    assert done.code == 2 and done.out == "" and " Error " in done.err and "Traceback" not in done.err, done
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", done.err).split())


def reading(text: str) -> Any:
    """Strict JSON and nothing else."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# canopyq, and canopyq --help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help(arguments: list[str], canopyq) -> None:
    done = canopyq(*arguments)
    assert done.code == 0 and done.err == "" and "Usage: " in done.out


def test_help_names_every_command_and_option(canopyq) -> None:
    assert all(command in canopyq("--help").out for command in COMMANDS)
    options = {"size": ["--format", "--group-size", "--asymmetric"], "eval": ["--recipe", "--questions", "--seed"]}
    for command, names in options.items():
        assert all(name in canopyq(command, "--help").out for name in [*names, "--json"])


def test_version(canopyq) -> None:
    done = canopyq("--version")
    assert (done.code, done.out, done.err) == (0, f"canopyq {cq.__version__}\n", "")


def test_alone_it_shows_its_help(canopyq) -> None:
    done = canopyq()
    assert done.code == 2 and "Usage: " in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["evaluate"], "No such command 'evaluate'"),
        (["--verbose"], "No such option"),
        (["size"], "Missing argument"),
        (["size", "7B", "8B"], "unexpected extra argument"),
        (["size", "7B", "--group-size"], "requires an argument"),
        (["size", "7B", "--group-size", "many"], "--group-size"),
        (["size", "7B", "--groupsize", "128"], "No such option"),
        (["size", "-7B"], "No such option"),
        (["eval", "tutor", "--questions", "0"], "--questions"),
        (["eval", "tutor", "--questions", "-3"], "--questions"),
        (["eval", "tutor", "--questions", "1e2"], "--questions"),
        (["eval", "tutor", "--questions", "1000000000"], "--questions"),
        (["eval", "--recipe"], "requires an argument"),
        (["doctor", "now"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(arguments: list[str], part: str, canopyq) -> None:
    assert part in usage_error(canopyq(*arguments))


# canopyq doctor -------------------------------------------------------------------------------------------------------


def test_doctor(canopyq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = canopyq("doctor")
    assert (done.code, done.err) == (0, "")
    assert f"canopyq {cq.__version__}" in done.out and torch.__version__ in done.out
    assert "ok  tutor: 8,196,352 parameters loaded" in done.out
    assert re.search(r"^no  dequantize, then multiply on CUDA: no GPU", done.out, re.MULTILINE)


def test_doctor_as_json(canopyq) -> None:
    done = canopyq("doctor", "--json")
    found = reading(done.out)
    assert (done.code, done.err) == (0, "") and set(found) == {"machine", "checks"}
    assert {"python", "gpu", "torch"} <= set(found["machine"])
    assert all(set(check) == {"name", "ok", "detail", "needed"} for check in found["checks"])


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_doctor_ends_with_1_if_something_needed_is_missing(option, canopyq, monkeypatch) -> None:
    checks = [Check("python", True, "3"), Check("tutor", False, "the tutor model is missing")]
    monkeypatch.setattr("canopyq.evaluate.machine.checks", lambda: checks)
    done = canopyq("doctor", *option)
    assert done.code == 1 and done.err == "" and "the tutor model is missing" in done.out


def test_doctor_shows_a_cure_with_brackets_in_it(canopyq, monkeypatch) -> None:
    """`[course]` looks like markup to the library that colours the output."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipywidgets" else real(name))
    monkeypatch.setattr("canopyq.evaluate.machine.gpu", lambda: "[/bold] card [red]")
    done = canopyq("doctor")
    assert done.code == 1 and "not installed; pip install 'canopyq[course]'" in done.out
    assert "[/bold] card [red]" in done.out


def test_doctor_with_another_model(folder: Path, canopyq, monkeypatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, str(folder))
    assert f"parameters loaded from CANOPYQ_MODEL='{folder}'" in canopyq("doctor").out


# canopyq size ---------------------------------------------------------------------------------------------------------


def test_size_of_seven_billion_weights(canopyq) -> None:
    done = canopyq("size", "7B", "--group-size", "128")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].strip() == "7,000,000,000 weights, groups of 128"
    assert done.out.splitlines()[-1] == "int4: 3.5 GB of codes + 109 MB of scales = 3.61 GB"
    assert re.search(r"int4 .* 3\.5 GB .* 109 MB .* 3\.61 GB .* 12\.9 %", done.out)


def test_size_in_exact_bytes(canopyq) -> None:
    done = canopyq("size", "7B", "--group-size", "128", "--json")
    found = reading(done.out)
    assert (done.code, done.err) == (0, "")
    assert (found["model"], found["parameters"], found["group_size"]) == ("7B", 7_000_000_000, 128)
    assert found["bytes"]["int4"] == {
        "codes": 3_500_000_000, "scales": 109_375_000, "zero_points": 0, "total": 3_609_375_000,
    }  # fmt: skip
    assert found["bytes"]["fp16"] == {"codes": 14e9, "scales": 0, "zero_points": 0, "total": 14e9}
    assert found["bytes"]["mxfp4"]["scales"] == 7e9 / 32 and found["bytes"]["nvfp4"]["scales"] == 7e9 / 16


def test_size_with_zero_points(canopyq) -> None:
    found = reading(canopyq("size", "7B", "--group-size", "128", "--asymmetric", "--json").out)["bytes"]
    assert found["int4"]["zero_points"] == 7e9 / 128 * 4 / 8 and found["int8"]["zero_points"] == 7e9 / 128
    assert found["nf4"]["zero_points"] == found["fp16"]["zero_points"] == 0
    assert "27.3 MB of zero points = 3.64 GB" in canopyq("size", "7B", "--group-size", "128", "--asymmetric").out


def test_size_without_groups_has_codes_only(canopyq) -> None:
    done = canopyq("size", "7B")
    assert done.out.splitlines()[-1] == "int4: 3.5 GB of codes = 3.5 GB" and "zero points" not in done.out


@pytest.mark.parametrize("format", FORMATS)
def test_size_in_every_format(format: str, canopyq) -> None:
    done = canopyq("size", "350m", "--format", format.upper())
    assert done.code == 0 and done.out.splitlines()[-1].startswith(f"{format}: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lama-2-7b"], ["unknown model size 'lama-2-7b'", "did you mean 'llama-2-7b'", "or a count such as 7B"]),
        (["7 B"], ["unknown model size '7 B'"]),
        (["0B"], ["not one to size"]),
        (["9" * 400], ["not one to size"]),
        (["7B\nrm"], ["unknown model size"]),
        ([""], ["unknown model size ''"]),
        (["7B", "--format", "int44"], ["unknown format 'int44'", "did you mean 'int4'"]),
        (["7B", "--format", ""], ["unknown format ''"]),
        (["7B", "--group-size", "0"], ["group_size=0"]),
        (["7B", "--group-size", "1" + "0" * 23], ["group_size=100000"]),
        (["7B", "--group-size", "-5"], ["group_size=-5"]),
        (["7B", "--format", "fp16", "--group-size", "128"], ["fp16 is a plain cast", "leave the group size out"]),
        (["7B", "--format", "mxfp4", "--group-size", "128"], ["mxfp4 fixes its blocks at 32"]),
        (["7B", "--format", "nvfp4", "--group-size", "32"], ["nvfp4 fixes its blocks at 16"]),
        (["7B", "--format", "nf4", "--asymmetric"], ["nf4 has no zero point; leave asymmetric out"]),
        (["7B", "--format", "fp8", "--asymmetric"], ["has no zero point; leave asymmetric out"]),
        (["7B", "--format", "nf4", "--group-size", "0"], ["group_size=0"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_size_of_what_has_none(arguments: list[str], parts: list[str], option: list[str], canopyq) -> None:
    message = failure(canopyq("size", *arguments, *option))
    assert all(part in message for part in parts), message


# canopyq eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated() -> dict[str, Any]:
    """Before and after quantizing."""
    done = CliRunner().invoke(
        cli.app, ["eval", "tutor", "--recipe", "w4a16-g128", "--questions", "34", "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0
    return reading(done.stdout)


def test_eval_says_what_it_examined(evaluated: dict[str, Any]) -> None:
    found = evaluated
    assert found["examined"] == "tutor" and found["recipe"] == "w4a16-g128"
    assert found["dtype"] == "float32" and found["questions"] == 34


def test_eval_says_what_it_saved(evaluated: dict[str, Any]) -> None:
    found = evaluated
    size = found["size"]
    assert (size["before"], size["after"]) == (found["reference"]["bytes"], found["model"]["bytes"])
    assert size["after"] < 0.2 * size["before"] and size["bits_per_quantized_weight"] == 4.125
    assert len(found["layers"]) == 56 and found["kept"]["lm_head"] == "named in the recipe's ignore list"


def test_eval_says_what_it_cost(evaluated: dict[str, Any]) -> None:
    found = evaluated
    assert 0 < found["kl"] < 0.1 and 0 < found["p_value"] <= 1
    for side in (found["reference"], found["model"]):
        assert 1 < side["perplexity"] < 4 and side["accuracy"]["n"] == 34 and list(side["skills"]) == list(SKILLS)
        for share in [side["accuracy"], *side["skills"].values()]:
            assert 0 <= share["low"] <= share["value"] == share["right"] / share["n"] <= share["high"] + 1e-12
    change = found["reference"]["accuracy"]["right"] - found["model"]["accuracy"]["right"]
    assert len(found["lost"]) - len(found["gained"]) == change


def test_eval_without_a_recipe(canopyq) -> None:
    done = canopyq("eval", "--questions", "17", "--json")
    found = reading(done.out)
    assert done.code == 0 and found["examined"] == "tutor" and list(found["skills"]) == list(SKILLS)
    assert found["accuracy"]["n"] == found["questions"] == 17 and "recipe" not in found


def test_eval_reads_well(canopyq) -> None:
    done = canopyq("eval", "tutor", "--recipe", "W3a16-tensor", "--questions", "17")
    assert done.code == 0
    for part in (
        "w3a16-tensor: 56 linear layers quantized",
        "tutor: 17 held-out questions, 95 % intervals in brackets",
        "KL, nats per token",
        "right answers",
        "McNemar",
    ):
        assert part in done.out
    assert any(len(line) > 80 for line in done.out.splitlines()), "a line was broken, so that grep would miss it"


@pytest.mark.parametrize("recipe", ["kv4", "w4a16-g128+kv4"])
def test_eval_through_a_cache(recipe: str, canopyq) -> None:
    found = reading(canopyq("eval", "tutor", "--recipe", recipe, "--questions", "17", "--json").out)
    assert found["cache"] == "kv4"
    before, after = (found[side]["cache_bytes_per_token"] for side in ("reference", "model"))
    assert before == 2 * 8 * 2 * 64 * 4 and after < before
    assert (found["model"]["bytes"] < found["reference"]["bytes"]) is (recipe != "kv4")
    assert found.get("recipe") == (None if recipe == "kv4" else recipe)


def test_eval_asks_other_questions_with_another_seed(canopyq) -> None:
    first, again, other = (
        reading(canopyq("eval", "--questions", "3", "--seed", seed, "--json").out)["perplexity"] for seed in "001"
    )
    assert first == again != other


def test_progress_goes_to_stderr(canopyq, monkeypatch) -> None:
    monkeypatch.setattr("canopyq.utils.EVERY", 0.0)
    monkeypatch.delenv("TQDM_DISABLE")
    done = canopyq("eval", "--questions", "3", "--json")
    assert reading(done.out)["questions"] == 3
    lines = done.err.splitlines()
    assert lines and all(line.startswith("evaluating: ") and "\r" not in line for line in lines)


def test_a_log_gets_a_line_now_and_then(canopyq, monkeypatch) -> None:
    """Not one a step: what stands in a log stays there."""
    monkeypatch.delenv("TQDM_DISABLE")
    begun = time.monotonic()
    lines = canopyq("eval", "--questions", "34", "--json").err.count("\n")
    assert lines <= (time.monotonic() - begun) / utils.EVERY


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["llama"], ["'llama' is neither 'tutor' nor a folder", "--text"]),
        (["./weights"], ["'./weights'", "--text"]),
        (["a\nb"], ["'a\\nb'"]),
        (["--recipe", "w44a16"], ["unknown recipe 'w44a16'", "did you mean", "w4a16-g128"]),
        (["--recipe", "int4"], ["unknown recipe 'int4'"]),
        (["--recipe", ""], ["unknown recipe ''"]),
        (["--recipe", "w4a16-g0"], ["w4a16-g0"]),
        (["--recipe", "w4a16+kv44"], ["unknown addition to w4a16 '+kv44'; did you mean '+kv4'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_of_what_cannot_be(arguments: list[str], parts: list[str], canopyq) -> None:
    message = failure(canopyq("eval", *arguments))
    assert all(part in message for part in parts), message


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file with some 3,000 of the tutor's tokens."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{question.prompt} {question.answer}" for question in cq.tutor.questions(120, seed=7)))
    return str(file)


def test_eval_of_any_model_on_a_text(text: str, canopyq, tmp_path: Path) -> None:
    """The tutor by its folder is any model: nothing is known of it but its files."""
    folder, options = str(loading.path()), ("--text", text, "--tokens", "128", "--length", "32")
    alone = reading(canopyq("eval", folder, *options, "--json").out)
    assert alone["windows"] == 4 and alone["tokens"] == 4 * 31 and alone["peak_bytes"] > alone["bytes"]
    both = reading(canopyq("eval", folder, *options, "--recipe", "w3a16-g128+kv8", "--json").out)
    assert both["reference"]["perplexity"] == alone["perplexity"] and both["recipe"] == "w3a16-g128+kv8"
    assert both["kl"]["low"] < both["kl"]["value"] < both["kl"]["high"] and 0 < both["agreement"]["value"] < 1
    better = canopyq("eval", folder, *options, "--recipe", "w3a16-g128", "--method", "gptq", "--calibration", text)
    assert better.code == 0 and "calibrated on" in better.out and "same top token" in better.out, better.err
    assert re.search(r"peak memory [\d.]+ [MG]B", better.out)
    canopyq("quantize", folder, "--recipe", "w3a16-g128+kv8", "--out", str(tmp_path / "w3"))
    saved = reading(canopyq("eval", str(tmp_path / "w3"), *options, "--original", folder, "--json").out)
    assert saved["kl"]["value"] == pytest.approx(both["kl"]["value"], rel=0.05)  # norms on disk are bfloat16
    assert "name it by --original" in canopyq("eval", str(tmp_path / "w3"), *options, "--recipe", "kv8").out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{folder}", "--text", "{nowhere}"], "nowhere"),
        (["{folder}", "--text", "{empty}"], "whose name ends in .txt"),
        (["{folder}", "--text", "{text}", "--length", "100000"], "length=100000"),
        (["{folder}", "--text", "{text}", "--tokens", "10"], "tokens=10"),
        (["{folder}", "--text", "{text}", "--recipe", "w8a8-static"], "--calibration"),
        (["{folder}", "--text", "{text}", "--recipe", "w4a16-g32", "--method", "gptq"], "--calibration"),
        (
            ["{folder}", "--text", "{text}", "--recipe", "w4a16-g32", "--calibration", "{text}"],
            "leave --calibration, --samples and --length out",
        ),
        (["{folder}", "--text", "{text}", "--method", "gptq"], "name a recipe"),
        (["{folder}", "--text", "{text}", "--recipe", "w4a16-g32", "--original", "tutor"], "leave --original out"),
        (["{folder}", "--text", "{text}", "--revision", "v1"], "'v1'"),
        (["{empty}", "--text", "{text}"], "empty"),
        (["some/model", "--text", "{text}"], "cannot be reached"),
        (["{folder}", "--original", "tutor"], "--text"),
        (["some/model"], "--text"),
    ],
)
def test_eval_of_a_text_that_cannot_be(
    arguments: list[str], part: str, text: str, canopyq, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    places = {"folder": loading.path(), "text": text, "nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}
    assert part in failure(canopyq("eval", *(argument.format(**places) for argument in arguments)))


def test_eval_takes_as_many_questions_as_every_skill_has() -> None:
    assert len(cq.tutor.questions(MOST_QUESTIONS)) == MOST_QUESTIONS
    share = MOST_QUESTIONS // len(SKILLS)
    assert MOST_QUESTIONS == share * len(SKILLS)
    assert min(len(up_to(share + 1, skill)) for skill in SKILLS) == share


# A damaged tutor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tutor's folder, to damage."""
    copy = Path(shutil.copytree(loading.path(), tmp_path / "weights"))
    monkeypatch.setattr(loading, "path", lambda: copy)
    return copy


def test_eval_with_missing_weights(damaged: Path, canopyq) -> None:
    (damaged / loading.WEIGHTS).unlink()
    message = failure(canopyq("eval", "--questions", "1"))
    assert "model.safetensors of the tutor model is missing" in message and "reinstall canopyq" in message


def test_eval_with_corrupt_weights(damaged: Path, canopyq) -> None:
    content = bytearray((damaged / loading.WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 4
    (damaged / loading.WEIGHTS).write_bytes(content)
    assert "SHA-256" in failure(canopyq("eval", "--questions", "1"))


def test_eval_with_truncated_weights(damaged: Path, canopyq) -> None:
    os.truncate(damaged / loading.WEIGHTS, 133)
    assert "has 133 bytes instead of" in failure(canopyq("eval", "--questions", "1"))


def test_eval_without_the_folder(damaged: Path, canopyq) -> None:
    shutil.rmtree(damaged)
    assert "weights.json" in failure(canopyq("eval", "--questions", "1"))


@pytest.mark.parametrize("entry", ['"many"', "null", "{}"])
def test_eval_with_a_manifest_of_other_things(entry: str, damaged: Path, canopyq) -> None:
    text = (damaged / loading.MANIFEST).read_text()
    (damaged / loading.MANIFEST).write_text(re.sub(r'"bytes": \d+', f'"bytes": {entry}', text, count=1))
    assert "weights.json" in failure(canopyq("eval", "--questions", "1"))


def test_eval_with_a_folder_in_place_of_the_manifest(damaged: Path, canopyq) -> None:
    (damaged / loading.MANIFEST).unlink()
    (damaged / loading.MANIFEST).mkdir()
    assert "weights.json" in failure(canopyq("eval", "--questions", "1"))


def test_eval_with_weights_that_may_not_be_read(damaged: Path, canopyq, monkeypatch) -> None:
    def refuse(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = failure(canopyq("eval", "--questions", "1"))
    assert "model.safetensors" in message and "Permission denied" in message


def test_doctor_with_a_damaged_tutor(damaged: Path, canopyq) -> None:
    (damaged / loading.WEIGHTS).unlink()
    done = canopyq("doctor")
    assert done.code == 1 and "no  tutor: " in done.out and "model.safetensors" in done.out


# Another model --------------------------------------------------------------------------------------------------------


def save(folder: Path, *, template: bool = True, **config: Any) -> Path:
    """A small random model that takes the tutor's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 1280, "max_position_embeddings": 2048,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**shape, **config})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(loading.path() / name, folder)
    if not template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("other"))


def examined(name: Path | str, canopyq, monkeypatch, *arguments: str) -> Done:
    monkeypatch.setenv(loading.VARIABLE, str(name))
    return canopyq("eval", "tutor", "--questions", "34", *arguments)


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "plain text"])
def test_eval_examines_another_model(template: bool, tmp_path: Path, canopyq, monkeypatch) -> None:
    name = save(tmp_path / "other", template=template)
    done = examined(name, canopyq, monkeypatch, "--recipe", "w4a16-g32", "--json")
    assert done.code == 0, done.err
    found = reading(done.out)
    assert found["examined"] == str(name) and found["questions"] == 34
    assert found["kl"] > 0 and found["reference"]["perplexity"] > 500
    assert len(found["layers"]) == 7 and found["size"]["after"] < found["size"]["before"]


def test_eval_does_not_call_another_model_the_tutor(folder: Path, canopyq, monkeypatch) -> None:
    done = examined(folder, canopyq, monkeypatch)
    assert done.code == 0 and f"{folder}: 34 held-out questions" in done.out and "tutor" not in done.out


def test_eval_of_a_layer_without_noise_is_still_json(tmp_path: Path, canopyq, monkeypatch) -> None:
    """Zero weights are kept exactly: an infinite ratio, for which JSON has no number."""
    from safetensors.torch import load_file, save_file

    name = save(tmp_path / "other")
    weights = load_file(name / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, name / "model.safetensors", metadata={"format": "pt"})
    found = reading(examined(name, canopyq, monkeypatch, "--recipe", "w4a16-g32", "--json").out)
    assert [layer["sqnr_db"] for layer in found["layers"] if layer["name"].endswith("down_proj")] == [None]


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def without_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()


def of_another_kind(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))


def with_foreign_code(path: Path) -> None:
    config = {"model_type": "my-own", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('foreign code was run')")


def with_nan(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def with_text_as_weights(path: Path) -> None:
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def with_a_refusing_template(path: Path) -> None:
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('one turn only') }}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (without_config, "no config.json"),
        (without_weights, "model.safetensors"),
        (without_tokenizer, "cannot be loaded"),
        (of_another_kind, "shared.weight"),
        (with_foreign_code, "never run"),
        (with_text_as_weights, "model.safetensors is a Git LFS pointer"),
        (with_nan, "down_proj.weight' holds NaN"),
        (with_a_refusing_template, "chat template cannot write this chat (one turn only)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_eval_of_a_folder_that_is_no_model(damage, part: str, folder: Path, tmp_path, canopyq, monkeypatch) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    message = failure(examined(copy, canopyq, monkeypatch))
    assert part in message and "foreign code was run" not in message, message


@pytest.mark.parametrize(
    ("config", "part"),
    [({"max_position_embeddings": 40}, "the model takes 40"), ({"vocab_size": 90}, "the model's vocabulary of 90")],
    ids=["short context", "small vocabulary"],
)
def test_eval_of_a_model_that_the_questions_do_not_fit(config: dict, part: str, tmp_path, canopyq, monkeypatch) -> None:
    assert part in failure(examined(save(tmp_path / "other", **config), canopyq, monkeypatch))


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./nowhere",
        "a/b/c/d",
        "~nobody_of_this_name/model",
        "README.md",
        "no such model!",
        "a" * 5000,
    ],
    ids=lambda name: name[:30],
)
def test_eval_of_a_name_that_is_no_model(name: str, canopyq, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    message = failure(examined(name, canopyq, monkeypatch))
    assert shown(name) in message and "unset CANOPYQ_MODEL" in message


def test_a_name_of_spaces_means_the_tutor(canopyq, monkeypatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, "  ")
    assert reading(canopyq("eval", "--questions", "1", "--json").out)["examined"] == "tutor"


def test_a_hub_that_cannot_be_reached(canopyq, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = failure(examined("some/model", canopyq, monkeypatch))
    assert "'some/model'" in message and "cannot be reached" in message and "unset CANOPYQ_MODEL" in message


def test_a_model_in_the_cache_needs_no_network(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    environment = {"CANOPYQ_MODEL": "some/model", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = process("eval", "--questions", "1", "--json", **environment)
    assert done.code == 0 and reading(done.out)["examined"] == "some/model", done.err
    assert done.err == ""


# Where it is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["size", "7B"], ["--version"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(arguments: list[str]) -> None:
    """As in `canopyq size 7B | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process(*arguments, stdout=writer)
    os.close(writer)
    assert done.err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        assert "No space left on device" in failure(process("--version", stdout=full))


def test_a_terminal_that_has_ascii_only(canopyq, monkeypatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert canopyq("eval", "--questions", "3").code == 0
    assert b"right 100.0 % (44?100)" in screen.getvalue()


@pytest.mark.parametrize("arguments", [["7B", "--group-size", "128"], ["llama-3.1-70b", "--asymmetric"]], ids=" ".join)
def test_a_narrow_terminal_loses_no_number(arguments: list[str], canopyq, monkeypatch) -> None:
    wide = canopyq("size", *arguments).out
    monkeypatch.setattr(console, "width", 40)
    narrow = canopyq("size", *arguments).out
    assert "…" not in narrow and max(map(len, narrow.splitlines()[1:-1])) <= 40
    cells = [re.sub(r"[^\w.%]", "", text) for text in (wide, narrow)]
    assert sorted(cells[0]) == sorted(cells[1])  # every letter and digit is there, if on more lines


def test_a_narrow_doctor(canopyq, monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 40)
    done = canopyq("doctor")
    assert "…" not in done.out and "ok  tutor: 8,196,352 parameters loaded" in done.out


def test_the_app_raises_its_errors_for_python_callers() -> None:
    """`main` alone turns them into a line and an exit code."""
    runner = CliRunner()
    found = runner.invoke(cli.app, ["size", "7B", "--format", "int44"])
    assert isinstance(found.exception, CanopyError) and found.stdout == ""
    assert runner.invoke(cli.app, ["size", "7B", "--foo"]).exit_code == 2
    assert runner.invoke(cli.app, ["size", "7B"]).exit_code == 0


# 80 columns -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`canopyq bench` with long numbers and the longest name of a kernel, and nothing to wait for."""
    from canopyq.evaluate import bench
    from canopyq.evaluate.bench import Timed

    kernel = max((kernel.name for kernel in dispatch.KERNELS.values()), key=len)
    times = [Timed(recipe, 8192, 28672, rows, kernel, 123456.7, 234567.8, 9e-07)
             for recipe in ("w4a16-g128", "w4a16-channel") for rows in (1, 1024)]  # fmt: skip
    monkeypatch.setattr(bench, "bench", lambda *_: times)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize(
    "words",
    ["doctor", "size 70B --group-size 32 --asymmetric", "size 1.5T", "bench", "explain tutor --recipe w8a16",
     "explain tutor --recipe w8a8", "eval tutor --questions 1 --recipe w4a16-g128+kv4",
     "quantize tutor --recipe w4a16-g128 --out x --dry-run", "advise --model 7B --memory 8GB --context 32k --gpu h100",
     "advise --model tutor --memory 5MB", "inspect saved", "chat tutor --recipe w4a16-g128+kv4"],
)  # fmt: skip
def test_everything_can_be_read_in_80_columns(
    words: str, terminal: bool, timed, canopyq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal no line is longer, and in a pipe no table is; no word is broken or left out: they are those that
    are printed where there is room for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_force_terminal", terminal)
    if words.startswith("inspect"):
        model, tokenizer = cq.tutor.load()
        cq.quantize_(model, "w4a16-g128")
        cq.save(model, "saved", tokenizer, check=False)
    printed = {}
    for width in (80, 1000):
        monkeypatch.setattr(console, "_width", width)
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7 + 5?\n"))
        done = canopyq(*words.split())
        assert not done.err and done.code in (0, 1)
        printed[width] = re.sub(r"\x1b\[[\d;]*m", "", done.out)
    if not terminal:
        broken = set(printed[80].splitlines()) - set(printed[1000].splitlines())
    else:
        broken = set(printed[80].splitlines())
    assert max(map(len, broken), default=0) <= 80
    at_80, at_1000 = (Counter(re.sub("[─━│┃┏┓┗┛┡┩┳╇┴┌┐└┘├┤┼█]", " ", text).split()) for text in printed.values())
    assert at_80 == at_1000, (at_80 - at_1000, at_1000 - at_80)


# explain --------------------------------------------------------------------------------------------------------------


def test_explain_names_the_kernels_and_the_refusals(canopyq) -> None:
    done = canopyq("explain", "tutor", "--recipe", "w8a16", "--json")
    layers = json.loads(done.out)["layers"]
    assert len(layers) == 56
    assert all(layer["runs"] and layer["refused"] for layer in layers)
    assert all(8 * layer["bytes"] <= 8.3 * layer["shape"][0] * layer["shape"][1] for layer in layers)
    shown = " ".join(canopyq("explain", "tutor", "--recipe", "w8a16").out.split())
    assert shown.count("model.layers.0.self_attn.q_proj and 55 more: 256x256, 128x256, 1024x256") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--recipe", "w4b16"), "unknown recipe"), (("--device", "gpu"), "device 'gpu' cannot be used here")],
)
def test_explain_refuses_in_one_line(canopyq, arguments: tuple[str, ...], words: str) -> None:
    done = canopyq("explain", "tutor", *arguments)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1


# advise ---------------------------------------------------------------------------------------------------------------


def test_advise_names_recipe_bytes_and_source(canopyq) -> None:
    done = canopyq("advise", "--model", "7B", "--memory", "8GB", "--context", "16k", "--priority", "accuracy")
    assert done.code == 0 and done.err == ""
    assert "mistral-7b" in done.out and "16,384 tokens" in done.out and "recipe   w" in done.out
    assert "not measured on this model" in done.out and "KL" not in done.out, "it was measured on another"
    assert "the tutor model" in done.out, "whose order it is"


def test_advise_in_json_adds_up(canopyq) -> None:
    done = canopyq("advise", "--model", "llama-3.1-8b", "--memory", "8GiB", "--gpu", "h100", "--batch", "2", "--json")
    found = json.loads(done.out)
    assert found["needs"]["capability"] == 9.0 and found["needs"]["batch"] == 2
    sizes = found["bytes"]
    assert sum(sizes.values()) == 2 * sizes["total"] <= 2 * 8 * 2**30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "70B", "--memory", "8GB"], "more memory"),
        (["--model", "7B", "--memory", "lots"], "no amount of memory"),
        (["--model", "7B", "--priority", "cheap"], "unknown priority 'cheap'"),
        (["--model", "7B", "--measurements", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_advise_says_in_one_line_what_is_wrong(canopyq, words: list[str], message: str) -> None:
    assert message in failure(canopyq("advise", *words))


def test_advise_measures_a_model_on_a_text(canopyq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 576 inputs, which groups of 128 do not divide; what is said of it was measured on it."""
    import transformers as tf

    monkeypatch.chdir(tmp_path)
    _, tokenizer = cq.tutor.load()
    config = tf.LlamaConfig(
        hidden_size=576, intermediate_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1,
        vocab_size=1280, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    model.save_pretrained("wide"), tokenizer.save_pretrained("wide")
    text = "What is 7 + 5? It is 12. " * 50
    Path("text.txt").write_text(text)
    asked = ("advise", "--model", "wide", "--text", "text.txt", "--memory", "3MB")
    done = canopyq(*asked)
    assert done.code == 0 and "text.txt" in done.out and "perplexity" in done.out and "% (" not in done.out
    found = json.loads(canopyq(*asked, "--json").out)
    options = [found, *found["others"]]
    assert {option["recipe"] for option in options} <= {
        "bf16", "w8a16", "w8a8", "fp8", "w4a16-g32", "w4a16-g64", "w4a16-channel"}  # fmt: skip
    for option in options:
        if option["recipe"] != "bf16":
            quantized = tf.AutoModelForCausalLM.from_pretrained("wide").eval()
            cq.quantize_(quantized, option["recipe"])
            expected = cq.compare_text(model, quantized, tokenizer, text, tokens=4096)
            assert option["quality"]["kl"] == pytest.approx(expected.kl, rel=0.01)
    for words, message in (
        (("--model", "7B", "--text", "text.txt"), "no folder"),
        (("--model", "wide", "--text", "nowhere.txt"), "nowhere.txt"),
        (("--model", "wide", "--text", "text.txt", "--measurements", "m.json"), "leave one of them out"),
        (("--model", "wide", "--text", "text.txt", "--accuracy", "0.9"), "accuracy 0.9"),
    ):
        assert message in failure(canopyq("advise", *words))


# chat -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(canopyq, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`canopyq chat …` with lines from a pipe."""

    def call(lines: Sequence[str], *arguments: str) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return canopyq("chat", *arguments)

    return call


def test_chat_remembers_shows_bytes_and_ends_with_the_input(say) -> None:
    done = say(["My locker code is 4821.", "", "What is my locker code?"], "--recipe", "w4a16-g128+kv4")
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "tutor, w4a16-g128+kv4: 5.38 MB of weights, up to 2,048 tokens; /new, /quit"
    assert "tutor> 4821." in lines and "you> What is my locker code?" in lines
    caches = [line.split() for line in lines if line.startswith("cache")]
    assert len(caches) == 2 and caches[1][4:] == ["kv4,", "29", "of", "2,048", "tokens"]
    assert sum(line.startswith("weights") and "5.38 MB" in line for line in lines) == 2


def test_chat_starts_anew_and_knows_its_words(say) -> None:
    done = say(["My locker code is 4821.", "/new", "What is 17 + 25?", "/help", "/quit", "What is 1 + 1?"])
    assert done.code == 0
    assert "a new chat: the cache is empty" in done.out and "there is no /help" in done.out
    assert "tutor> 42." in done.out and "tutor> 2." not in done.out
    assert "not quantized" in done.out


def test_chat_says_when_the_context_is_full(say) -> None:
    question = "Sort these numbers: " + ", ".join(str(i) for i in range(500, 0, -1))
    done = say([question, "What is 17 + 25?"], "--recipe", "kv8")
    assert done.code == 0
    assert "and the model takes 2048; start a new chat: type /new" in done.out and "tutor> 42." in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "unknown model 'llama'; chat with 'tutor'"),
        (["--recipe", "kv44"], "unknown recipe 'kv44'; did you mean 'kv4'"),
        ([".", "--recipe", "w4a16"], "is quantized already"),
    ],
)
def test_chat_of_what_cannot_be(arguments: list[str], message: str, say) -> None:
    assert message in failure(say(["Hello"], *arguments))


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A checkpoint of another model: of eight words, with a tokenizer and a chat template of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[END]", "ask:", "say:", "oak", "elm", "ash", "fir", "yew"])}
    inner = Tokenizer(models.WordLevel(words, "oak"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[END]", pad_token="[END]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'ask: ' if m['role'] == 'user' else 'say: ' }}{{ m['content'] }} {% endfor %}say:"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes, eos_token_id=0, pad_token_id=0)).eval()
    cq.quantize_(model, "w8a16")
    cq.save(model, tmp_path / "stranger", tokenizer)
    return tmp_path / "stranger"


def test_chat_speaks_to_a_model_with_its_own_tokenizer(stranger: Path, say) -> None:
    done = say(["elm ash"], str(stranger))
    assert (done.code, done.err) == (0, "")
    answer = next(line for line in done.out.splitlines() if line.startswith("model>")).split()[1:]
    assert answer and set(answer) <= {"ask:", "say:", "oak", "elm", "ash", "fir", "yew"}


def test_chat_with_a_model_that_has_no_words(stranger: Path, say) -> None:
    (stranger / "chat_template.jinja").unlink()
    assert "no chat template" in failure(say(["elm"], str(stranger)))
    (stranger / "tokenizer.json").unlink()
    assert "holds no tokenizer" in failure(say(["elm"], str(stranger)))


def test_eval_compares_no_strangers(stranger: Path, canopyq) -> None:
    message = failure(canopyq("eval", str(stranger), "--questions", "1"))
    assert "is not made from tutor (another vocab_size)" in message and "CANOPYQ_MODEL" in message


# canopyq quantize --method --------------------------------------------------------------------------------------------


def test_quantize_rotated_with_8_bit_inputs(tmp_path: Path, canopyq) -> None:
    """The file is bfloat16, which rotated weights are not, and a code that flips is seen in every answer."""
    done = canopyq("quantize", "tutor", "--method", "rotation", "--recipe", "w8a8", "--out", str(tmp_path / "w8"))
    assert done.code == 0, done.err
    assert reading((tmp_path / "w8" / "canopyq.json").read_text())["check"]["kl"] < 0.1


def test_quantize_by_a_method_that_needs_no_data_and_load_it_in_plain_transformers(tmp_path: Path, canopyq) -> None:
    from transformers import AutoModelForCausalLM

    done = canopyq("quantize", "tutor", "--method", "hqq", "--recipe", "w4a16-g64", "--out", str(tmp_path / "w4"))
    assert done.code == 0 and "quantized by hqq" in done.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "w4", dtype=torch.float32)
    ours = cq.load(tmp_path / "w4", dtype=torch.float32)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=0.2)
    report = reading(canopyq("inspect", str(tmp_path / "w4"), "--json").out)
    assert report


def test_quantize_by_a_method_on_a_text(folder: Path, tmp_path: Path, canopyq) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 17 + 25?\nIt is 42.\n" * 99, encoding="utf-8")
    arguments = ("quantize", str(folder), "--method", "gptq", "--recipe", "w4a16-g32", "--calibration", str(text))
    done = canopyq(*arguments, "--out", str(tmp_path / "out"))
    assert done.code == 0 and "quantized by gptq" in done.out and "windows of 512 tokens" in done.out, done
    assert "transformers" in canopyq("inspect", str(tmp_path / "out")).out


def test_quantize_keeps_calibrates_and_observes_as_it_is_told(folder: Path, tmp_path: Path, canopyq) -> None:
    """By options: which layers stay, how much of which field of JSONL is read, how ranges are chosen."""
    lines = [json.dumps({"id": i, "body": "What is 17 + 25? It is 42. " * 9}) for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ("quantize", str(folder), "--recipe", "w8a8-static", "--calibration", f"{tmp_path}/chats.jsonl:body",
                 "--samples", "3", "--length", "40", "--ignore", "down_proj", "--ignore", "mlp.up_proj")  # fmt: skip
    found = {}
    for observer in ("minmax", "mse"):
        done = canopyq(*arguments, "--observer", observer, "--out", str(tmp_path / observer), "--json")
        assert done.code == 0, done.err
        report, model = reading(done.out), cq.load(tmp_path / observer)
        assert not any("down_proj" in name or "up_proj" in name for name in report["layers"]) and report["layers"]
        assert any("120 tokens" in note for note in report["notes"]), report["notes"]
        found[observer] = torch.stack([model.get_submodule(name).input_scale for name in report["layers"]])
    assert (found["mse"] <= found["minmax"]).all() and not torch.equal(found["mse"], found["minmax"])
    wrong = canopyq(*arguments[:4], "--calibration", str(tmp_path / "chats.jsonl"), "--out", str(tmp_path / "out"))
    assert "'body'" in failure(wrong) and "line 1" in failure(wrong) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["--method", "gptq"], " ", "holds no text"),
        (["--method", "gptq"], None, "looks at the inputs of every layer: name a file"),
        (["--method", "gptq", "--calibration", "/no/such/file"], None, "/no/such/file cannot be read"),
        (["--method", "gptq"], "Too short.", "fills no window"),
        (["--method", "smoothquant"], "Any.", "quantizes only the weights"),
        (["--method", "hqq"], "Any.", "hqq needs no data for w4a16-g32; leave --calibration"),
        (["--samples", "4"], None, "leave --calibration, --samples and --length out"),
        (["--method", "gptq", "--samples", "0"], "Any.", "--samples=0"),
        (["--method", "gptq", "--length", "9999999"], "Any.", "9999999"),
        (["--ignore", "no_such_layer"], None, "no_such_layer"),
        (["--observer", "median"], None, "median"),
        (["--method", "gptk"], None, "did you mean 'gptq'"),
        (["--method", "gptq", "--recipe", "nf4"], None, "has no nf4"),
        (["--method", "outliers", "--calibration", "/no/such/file"], None, "keeps some inputs in 16 bits"),
        (["--method", "rotation", "--recipe", "w4a4-g32"], None, "Hadamard transform at run time"),
    ],
)
def test_quantize_says_what_a_method_cannot_do(
    arguments: list[str], text: str | None, words: str, folder: Path, tmp_path: Path, canopyq
) -> None:
    if text is not None:
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        arguments = [*arguments, "--calibration", str(tmp_path / "text.txt")]
    if "--recipe" not in arguments:
        arguments = [*arguments, "--recipe", "w4a16-g32"]
    done = canopyq("quantize", str(folder), *arguments, "--out", str(tmp_path / "out"))
    assert words in failure(done) and not (tmp_path / "out").exists()


def test_a_gguf_file_is_quantized_and_examined(text: str, tmp_path: Path, canopyq) -> None:
    file, out = str(tmp_path / "tutor.gguf"), str(tmp_path / "out")
    assert canopyq("export", "tutor", "--gguf", file).code == 0
    plan = reading(canopyq("quantize", file, "--recipe", "w4a16-g128", "--out", out, "--dry-run", "--json").out)
    assert len(plan["layers"]) == 56 and not Path(out).exists()
    assert canopyq("quantize", file, "--recipe", "w4a16-g128", "--out", out).code == 0
    options = ("--text", text, "--tokens", "64", "--length", "32", "--json")
    found = reading(canopyq("eval", out, "--original", file, *options).out)
    assert 0 < found["kl"]["value"] < 0.1
    Path(file).write_bytes(Path(file).read_bytes()[:5000])
    assert "tutor.gguf" in failure(canopyq("quantize", file, "--out", str(tmp_path / "other")))
    assert "nowhere.gguf" in failure(canopyq("eval", "nowhere.gguf", *options))


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"Too short.", "window"), (b"\xe9t\xe9 " * 999, "UTF-8"), (None, "no file of text"), (b"", "no text")],
    ids=["shorter than a window", "Latin-1", "a folder without text", "empty"],
)
def test_eval_says_what_is_no_text_to_evaluate_on(content: bytes | None, named: str, tmp_path: Path, canopyq) -> None:
    place = tmp_path / "texts"
    place.mkdir()
    if content is not None:
        (place / "text.txt").write_bytes(content)
    assert named in failure(canopyq("eval", "tutor", "--recipe", "w8a16", "--text", str(place)))


@pytest.mark.parametrize(("recipe", "named"), [("fp8", "fp8_e4m3"), ("w4a16-g16", "groups of 16")])
def test_export_of_what_no_gguf_type_holds_writes_nothing(recipe: str, named: str, tmp_path: Path, canopyq) -> None:
    assert canopyq("quantize", "tutor", "--recipe", recipe, "--out", str(tmp_path / "out")).code == 0
    assert named in failure(canopyq("export", str(tmp_path / "out"), "--gguf", str(tmp_path / "out.gguf")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Activations ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration on so few chats that it takes a second."""
    from canopyq.cli import calibrated

    monkeypatch.setattr(calibrated, "CHATS", 2)


@pytest.mark.usefixtures("few_chats")
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "fp8", "fp8-static"])
def test_eval_of_activations(recipe: str, canopyq) -> None:
    done = canopyq("eval", "tutor", "--recipe", recipe, "--questions", "17")
    assert done.code == 0 and f"{recipe}: 56 linear layers quantized, 8.0" in done.out
    calibrated = "calibrated on 2 samples, 1,024 tokens: chats of the validation split, none of them scored"
    assert (calibrated in done.out) is recipe.endswith("static")
    assert re.search(r"right answers +100.0 % .* (100.0|94.1) %", done.out)


@pytest.mark.usefixtures("few_chats")
def test_quantize_eval_explain_and_inspect_a_static_recipe(canopyq, tmp_path: Path) -> None:
    out = str(tmp_path / "w8")
    plan = reading(canopyq("quantize", "tutor", "--recipe", "w8a8-static", "--out", out, "--dry-run", "--json").out)
    assert plan["out"] is None and len(plan["layers"]) == 56 and not Path(out).exists()
    done = reading(canopyq("quantize", "tutor", "--recipe", "w8a8-static", "--out", out, "--json").out)
    assert done["out"] == out and done["bytes"] == plan["bytes"] and "2 samples" in done["notes"][0]
    disk = reading(canopyq("eval", out, "--questions", "9", "--json").out)
    memory = reading(canopyq("eval", "tutor", "--recipe", "w8a8-static", "--questions", "9", "--json").out)
    for key in ("reference", "model", "kl", "lost", "gained"):
        assert disk[key] == memory[key], key
    assert memory["notes"] == done["notes"] and memory["model"]["bytes"] == done["bytes"]["after"]
    assert "int8 tensor symmetric percentile static" in canopyq("explain", "tutor", "--recipe", "w8a8-static").out
    assert "input int8 tensor symmetric static" in canopyq("inspect", out).out
    again = failure(canopyq("quantize", "tutor", "--recipe", "w8a8-static", "--out", out))
    assert "is not empty" in again


def test_quantize_another_model_on_a_file_of_texts(canopyq, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("What is 3 + 4?\n\nSpell meadow.\nName the days.\n" * 99)
    options = ("--recipe", "fp8-static", "--out", str(tmp_path / "out"))
    folder = str(loading.path())
    done = canopyq("quantize", folder, *options, "--calibration", str(tmp_path / "texts.txt"))
    assert done.code == 0 and re.search(r"calibrated on \d samples, [\d,]+ tokens: .*texts.txt\n", done.out)
    assert "fp8_e4m3 tensor static" in canopyq("inspect", str(tmp_path / "out")).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "--recipe", "w8a8-static"), "name a file or folder of text by --calibration, or use w8a8"),
        (("tutor", "--recipe", "w8a8-static", "--calibration", "{nothing}"), "cannot be read as text"),
        (("tutor", "--recipe", "w8a8-static", "--calibration", "{empty}"), "holds no text"),
        (("tutor", "--recipe", "w8a8-static", "--calibration", "{binary}"), "cannot be read as text"),
        (("tutor", "--recipe", "w4a16", "--calibration", "{empty}"), "w4a16 needs no calibration"),
    ],
)
def test_quantize_without_good_calibration(arguments: tuple[str, ...], message: str, canopyq, tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("nothing", "empty", "binary")} | {"model": str(loading.path())}
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    given = [argument.format(**places) for argument in arguments]
    assert message in failure(canopyq("quantize", *given, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, b"\xff\xfe2+2\n/quit\n"], ids=["closed", "no text"])
def test_chat_with_an_input_that_is_none(given: bytes | None, canopyq, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None if given is None else io.TextIOWrapper(io.BytesIO(given), "utf-8"))
    code, out, err = canopyq("chat")
    assert code == 0 and "of weights" in out and ("tutor>" in out) == (given is not None)


def test_a_device_without_values(canopyq) -> None:
    code, out, err = canopyq("explain", "--device", "meta")
    assert code == 2 and out == "" and "device 'meta' cannot be used here" in err and err.count("\n") == 1


def test_mistakes_with_nowhere_to_say_them(canopyq, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        code, out, _ = canopyq("inspect", "nowhere")
    assert code == 2 and out == ""
