"""What callers pass by mistake: each public call answers in one line that names it, and changes nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import canopyq as cq
from canopyq import cli
from canopyq.conversation import Conversation
from canopyq.errors import CanopyError
from canopyq.linear import quantized_layers
from canopyq.scheme import Recipe

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TOKENS = torch.arange(3, 39).reshape(2, 18)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A quantized model of another vocabulary than the tutor's."""
    model = llama()
    cq.quantize_(model, "w8a16")
    return model


@pytest.fixture(scope="module")
def tutor() -> tuple:
    return cq.tutor.load()


CALLS: dict[str, tuple[Callable, str]] = {
    "load a number": (lambda m, t: cq.load(3), r"3 \(int\) names no folder"),
    "load nothing": (lambda m, t: cq.load(None), r"NoneType\) names no folder"),
    "load a NUL": (lambda m, t: cq.load("a\0b"), "names no folder"),
    "load ~": (lambda m, t: cq.load("~/no such folder"), f"'{os.path.expanduser('~')}/no such folder' is no folder"),
    "inspect a list": (lambda m, t: cq.inspect(["x"]), "names no folder"),
    "save to a long name": (lambda m, t: cq.save(m, t / ("x" * 300)), "has 300 characters, too many for a folder"),
    "save a number for a tokenizer": (lambda m, t: cq.save(m, t / "out", 3), "a int is no tokenizer"),
    "explain a text": (lambda m, t: cq.explain("tutor"), "explain needs a torch module, got str"),
    "texts with a number": (lambda m, t: cq.quantize_(llama(), "w8a8-static", calibration=["a"], tokenizer=3),
                            "a int is no tokenizer"),
    "texts with a text": (lambda m, t: cq.quantize_(llama(), "w8a8-static", calibration=["a"], tokenizer="x"),
                          "a str is no tokenizer"),
    "questions that are texts": (lambda m, t: cq.examine(m, None, ["2+2?"]), "questions are a list of Question"),
    "one number for questions": (lambda m, t: cq.examine(m, None, 3), "questions are a list of Question"),
    "no tokenizer": (lambda m, t: cq.examine(m, None, cq.tutor.questions(1)), "a NoneType is no tokenizer"),
    "half a question": (lambda m, t: cq.tutor.questions(1.5), "cannot draw 1.5 questions"),
    "a text of questions": (lambda m, t: cq.tutor.questions("3"), "cannot draw '3' questions"),
    "too many chats": (lambda m, t: cq.tutor.calibration(None, 10**7), "cannot draw 10000000 chats"),
    "chats by a text": (lambda m, t: cq.tutor.calibration(None, "3"), "cannot draw 3 chats"),
    "measurements by number": (lambda m, t: cq.advise("7B", measurements=[1]), "are a list of Measurement"),
    "no measurements": (lambda m, t: cq.advise("7B", measurements=3), "are a list of Measurement"),
    "a negative GPU": (lambda m, t: cq.advise("7B", gpu="-8"), "unknown GPU '-8'"),
    "digits of another script": (lambda m, t: Recipe.parse("w4a16-g٣٢"), "unknown recipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_one_line_says_what_is_wrong(name: str, small: nn.Module, tmp_path: Path) -> None:
    call, part = CALLS[name]
    with pytest.raises(CanopyError, match=part) as refused:
        call(small, tmp_path)
    assert "\n" not in str(refused.value) and os.listdir(tmp_path) == []


def test_a_model_of_another_vocabulary(small: nn.Module, tutor: tuple) -> None:
    model, tokenizer = tutor
    with pytest.raises(CanopyError, match="the model's vocabulary has 96; use the model's own"):
        Conversation(small, tokenizer).ask("what is 2 plus 2?")
    with pytest.raises(CanopyError, match="a NoneType is no model"):
        cq.compare(None, model, tokenizer, cq.tutor.questions(1))


def test_the_current_folder_is_not_replaced(small: nn.Module, tmp_path: Path, monkeypatch) -> None:
    """It would take a new folder's name, and whoever is in it would be left in one without a name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "", tmp_path / "here", "../here/"):
        with pytest.raises(CanopyError, match="is the current folder; name one in it"):
            cq.save(small, name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_home_is_understood(small: nn.Module, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    saved = cq.save(small, "~/models/w8", check=False)
    assert saved.folder == tmp_path / "home" / "models" / "w8" and cq.load("~/models/w8") is not None


def test_additions_named_twice_count_once() -> None:
    assert Recipe.parse("w4a16+head+head+kv4") == Recipe.parse("w4a16+head+kv4")


def test_the_advisor_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)  # 64 and 96 inputs: no groups of 128
    assert cq.advise(str(tmp_path)).recipe in ("w4a16-g32", "w4a16-channel", "nf4", "mxfp4", "nvfp4", "w8a16")


def test_hooks_stay_on_their_layer_and_can_be_taken_off() -> None:
    model, seen = llama(), []
    layer = model.model.layers[0].mlp.up_proj
    handles = [layer.register_forward_hook(lambda *given: seen.append("after")),
               layer.register_forward_pre_hook(lambda *given: seen.append("before"))]  # fmt: skip
    cq.quantize_(model, "w8a16")
    model(TOKENS)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(TOKENS)
    assert seen == ["before", "after"] and len(dict(quantized_layers(model))) == 7


@pytest.fixture
def canopyq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["canopyq", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("given", [None, b"\xff\xfe2+2\n/quit\n"], ids=["closed", "no text"])
def test_chat_with_an_input_that_is_none(given: bytes | None, canopyq, monkeypatch, tutor: tuple) -> None:
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
