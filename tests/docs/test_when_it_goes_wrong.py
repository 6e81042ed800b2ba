"""docs/when-it-goes-wrong.md: each message that it quotes is provoked here, and is the one that comes."""

from __future__ import annotations

import importlib.abc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import canopyq as cq
from canopyq.checkpoint.hub import model_folder
from canopyq.cli.named import load_named
from canopyq.lessons import html

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "when-it-goes-wrong.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"```text\n(.*?)\n```", PAGE, re.S)
PATTERNS = {quote: re.compile(re.escape(quote).replace("…", ".*"), re.S) for quote in QUOTED}


def tiny(width: int = 64, vocab: int = 1280) -> LlamaForCausalLM:
    """A random Llama of one layer, whose vocabulary is the tutor's."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, vocab_size=vocab, **heads)
    config.max_position_embeddings = 64
    return LlamaForCausalLM(config).eval()


def quantized(recipe: str = "w4a16-g32", width: int = 64) -> LlamaForCausalLM:
    model = tiny(width)
    cq.quantize_(model, recipe)
    return model


def saved(folder: Path, recipe: str = "w4a16-g32", width: int = 64) -> Path:
    cq.save(quantized(recipe, width), folder)
    return folder


def plain(folder: Path) -> Path:
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return cq.tutor.load()[1]


class Missing(importlib.abc.MetaPathFinder):
    """As if these packages were not installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def another_python(tmp: Path, tokenizer) -> str:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", "import canopyq"], capture_output=True, text=True, cwd=tmp)
    return done.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ")


def a_late_cell(tmp: Path, tokenizer) -> None:
    exec("cq_model.eval()", {})


def a_card_without_its_kernel(tmp: Path, tokenizer) -> str:
    return re.search(r'content: "(Not connected.*?)"', html._CSS)[1]


def no_hub(tmp: Path, tokenizer) -> None:
    model_folder("no-such-owner/no-such-model")


def a_wrong_path(tmp: Path, tokenizer) -> None:
    model_folder("./no-such-folder")


def pointers(tmp: Path, tokenizer) -> None:
    file = plain(tmp / "m") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n")
    load_named(str(tmp / "m"))


def half_a_download(tmp: Path, tokenizer) -> None:
    file = saved(tmp / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    cq.load(tmp / "m")


def a_pickle(tmp: Path, tokenizer) -> None:
    file = plain(tmp / "m") / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    load_named(str(tmp / "m"))


def load_of_a_plain_model(tmp: Path, tokenizer) -> None:
    cq.load(plain(tmp / "m"))


def a_format_for_a_recipe(tmp: Path, tokenizer) -> None:
    cq.quantize_(tiny(), "int4")


def hardly_quantized(tmp: Path, tokenizer) -> str:
    return str(cq.quantize_(tiny(96), "w4a16-g128"))


def quantized_twice(tmp: Path, tokenizer) -> None:
    cq.quantize_(quantized(), "w4a16-g32")


def nan(tmp: Path, tokenizer) -> None:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    cq.quantize_(model, "w4a16-g32")


def no_gpu(tmp: Path, tokenizer) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    cq.tutor.load(device="cuda")


def gptq(calibration: list | None, tokenizer=None, vocab: int = 1280) -> str:
    return str(
        cq.quantize_(tiny(vocab=vocab), "w4a16-g32", method="gptq", calibration=calibration, tokenizer=tokenizer)
    )


def no_window(tmp: Path, tokenizer) -> None:
    cq.compare_text(tiny(), tiny(), tokenizer, "What is 3 + 4?")


def too_long_a_chat(tmp: Path, tokenizer) -> None:
    cq.tutor.ask(tiny(), tokenizer, "What is 47 + 85? " * 20)


def over_another(tmp: Path, tokenizer) -> None:
    cq.save(quantized(), saved(tmp / "m"))


def asymmetric_gguf(tmp: Path, tokenizer) -> None:
    cq.export_gguf(quantized("nf4"), tmp / "m.gguf", tokenizer)


PROVOKED: dict[str, Callable] = {
    f.__name__: f
    for f in (
        another_python, a_late_cell, a_card_without_its_kernel, no_hub, a_wrong_path, pointers, half_a_download,
        a_pickle, load_of_a_plain_model, a_format_for_a_recipe, hardly_quantized, quantized_twice, nan, no_gpu,
        no_window, too_long_a_chat, over_another, asymmetric_gguf,
    )
} | {
    "gptq without data": lambda tmp, tokenizer: gptq(None),
    "texts without a tokenizer": lambda tmp, tokenizer: gptq(["What is 3 + 4?"]),
    "another model's tokenizer": lambda tmp, tokenizer: gptq(["What is 3 + 4?" * 50], tokenizer, vocab=100),
    "hardly any data": lambda tmp, tokenizer: gptq(["What is 3 + 4?"], tokenizer),
    "a plain model saved": lambda tmp, tokenizer: cq.save(tiny(), tmp / "m"),
    "nf4 saved": lambda tmp, tokenizer: cq.save(quantized("nf4"), tmp / "m"),
    "three bits for vLLM": lambda tmp, tokenizer: str(cq.inspect(saved(tmp / "m", "w3a16-g32"))),
    "four GPUs": lambda tmp, tokenizer: str(cq.inspect(saved(tmp / "m", "w4a16-g128", 128), 4)),
    "lora on a plain model": lambda tmp, tokenizer: cq.attach_lora(tiny()),
    "no gguf": lambda tmp, tokenizer: cq.export_gguf(quantized(), tmp / "m.gguf", tokenizer),
    "no peft": lambda tmp, tokenizer: cq.attach_lora(quantized()),
    "no lm-eval": lambda tmp, tokenizer: cq.harness(tiny(), tokenizer),
}  # fmt: skip
SEVERAL = {"hardly_quantized": 2}  # quotes that one provocation is for; else one


@pytest.mark.parametrize("name", PROVOKED)
def test_the_page_has_the_message(name: str, tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name.startswith("no "):
        missing = name.removeprefix("no ").replace("-", "_")
        for module in [m for m in sys.modules if m.split(".")[0] == missing]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Missing(missing), *sys.meta_path])
    try:
        said = PROVOKED[name](tmp_path, tokenizer)
    except (cq.CanopyError, NameError) as error:
        said = str(error)
    found = [quote for quote, pattern in PATTERNS.items() if pattern.search(said)]
    assert len(found) == SEVERAL.get(name, 1), (said, found)


def test_every_message_of_the_page_is_provoked() -> None:
    assert len(QUOTED) == len(set(QUOTED)) == len(PROVOKED) + sum(n - 1 for n in SEVERAL.values())
