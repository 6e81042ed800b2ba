"""`cq.save`: what is written is what the model computes with, and a folder is whole or absent."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import canopyq as cq
from canopyq.checkpoint import contents
from canopyq.checkpoint import save as saving
from canopyq.checkpoint.files import INDEX, SINGLE, Checkpoint
from canopyq.checkpoint.load import load_as
from canopyq.errors import CanopyError
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.scheme import Recipe, Scheme
from canopyq.tutor import loading

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, head_dim=16)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=16)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, head_dim=16)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, pad_token_id=0,
        word_embed_proj_dim=64, max_position_embeddings=64)),
}  # fmt: skip


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.1)  # a new model's are zero, which hides mistakes
    return model


@pytest.fixture
def quantized(llama: Callable) -> nn.Module:
    model = llama()
    cq.quantize_(model, "w4a16-g32")
    return model


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_architectures_come_back(name: str, tmp_path: Path, cast: Callable, logits: Callable) -> None:
    model = cast(make(name), torch.bfloat16)
    cq.quantize_(model, "w4a16-g32-asym")
    saved = cq.save(model, tmp_path / "model")
    # Logits are of size 1, where bfloat16 has steps of 2^-8, and above it 2^-7: a few of them.
    assert saved.check.max_abs_difference <= 0.02 and saved.check.kl < 1e-4 and saved.check.tokens == 64
    loaded = cq.load(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model)) and type(loaded) is type(model)
    tied = model.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-tensor", "w2a16-g32", "w8a16-g32-asym", "w8a8", "fp8"])
def test_recipes_come_back(recipe: str, llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama()
    cq.quantize_(model, recipe)
    saved = cq.save(model, tmp_path / "model")
    assert saved.recipe.split("-")[0] == recipe.split("-")[0]
    assert torch.equal(logits(cq.load(tmp_path / "model", dtype=torch.bfloat16)), logits(model))


def test_saved_again_it_is_the_same_file(quantized: nn.Module, tmp_path: Path, logits: Callable) -> None:
    logits(quantized)  # kernels have laid the weights out for themselves
    cq.save(quantized, tmp_path / "one")
    cq.save(cq.load(tmp_path / "one"), tmp_path / "two")  # float32 in memory, bfloat16 on disk
    for name in (SINGLE, "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_bytes_and_note(quantized: nn.Module, tmp_path: Path) -> None:
    saved = cq.save(quantized, tmp_path / "model")
    assert saved.nbytes == sum(x.nbytes for x in load_file(tmp_path / "model" / SINGLE).values())
    note = json.loads((tmp_path / "model" / "canopyq.json").read_text())
    assert note["canopyq"] == cq.__version__ and note["recipe"] == saved.recipe == "w4a16-g32"
    assert note["check"] == vars(saved.check) and "read back, logits differ by at most" in str(saved)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["ignore"] == ["lm_head"]
    cq.save(quantized, tmp_path / "unchecked", check=False)
    assert json.loads((tmp_path / "unchecked" / "canopyq.json").read_text())["check"] is None


def test_no_value_is_rounded(llama: Callable, cast: Callable, tmp_path: Path) -> None:
    """bfloat16 on disk if that changes nothing, else what the model has."""
    for name, dtype, wanted in [("exact", torch.bfloat16, torch.bfloat16), ("fine", torch.float32, torch.float32)]:
        model = cast(llama(dtype), torch.float32)
        cq.quantize_(model, "w4a16-g32")
        cq.save(model, tmp_path / name, check=False)
        held = load_file(tmp_path / name / SINGLE)
        assert held["model.embed_tokens.weight"].dtype == wanted
        assert torch.equal(held["model.embed_tokens.weight"].float(), model.model.embed_tokens.weight)
    cq.save(model, tmp_path / "asked", dtype=torch.float16)
    assert load_file(tmp_path / "asked" / SINGLE)["model.embed_tokens.weight"].dtype == torch.float16


def test_several_files(quantized: nn.Module, tmp_path: Path, logits: Callable) -> None:
    saved = cq.save(quantized, tmp_path / "model", max_shard_bytes=20_000)
    checkpoint = Checkpoint(tmp_path / "model")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert len(checkpoint.files) > 3 and index["metadata"]["total_size"] == saved.nbytes == checkpoint.nbytes
    assert checkpoint.files[0].name == f"model-00001-of-{len(checkpoint.files):05}.safetensors"
    assert torch.equal(logits(cq.load(tmp_path / "model", dtype="bfloat16")), logits(quantized))


def test_tokenizer_and_settings_lie_beside(quantized: nn.Module, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(loading.path())
    quantized.generation_config.max_new_tokens = 9
    cq.save(quantized, tmp_path / "model", tokenizer)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "model").vocab_size == tokenizer.vocab_size
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["max_new_tokens"] == 9


def test_a_head_on_request(llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama(tie_word_embeddings=True)
    cq.quantize_(model, "w8a16+head")
    cq.save(model, tmp_path / "model")
    loaded = cq.load(tmp_path / "model", dtype="bfloat16")
    assert isinstance(loaded.lm_head, QuantizedLinear) and torch.equal(logits(loaded), logits(model))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False


def test_layers_of_several_kinds(llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama()
    for name, scheme in [("model.layers.0.mlp.up_proj", Scheme("int8", "channel")),
                         ("model.layers.1.mlp.up_proj", Scheme("fp8_e4m3", "channel"))]:  # fmt: skip
        linear = model.get_submodule(name)
        model.set_submodule(name, QuantizedLinear(cq.quantize(linear.weight.detach(), scheme), linear.bias))
    saved = cq.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    assert "w8a16" in saved.recipe and "fp8_e4m3" in saved.recipe
    loaded = cq.load(tmp_path / "model", dtype="bfloat16")
    assert torch.equal(logits(loaded), logits(model))
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 2


# What is refused ------------------------------------------------------------------------------------------------------


def test_models_that_are_refused(llama: Callable, quantized: nn.Module, tmp_path: Path) -> None:
    def refuses(model: object, part: str, **options: object) -> None:
        with pytest.raises(CanopyError, match=part) as refused:
            cq.save(model, tmp_path / "out", **options)
        assert "\n" not in str(refused.value) and os.listdir(tmp_path) == []

    refuses(llama(), r"not quantized; call cq.quantize_\(model, recipe\) first")
    refuses(nn.Linear(3, 3), "a Linear; save needs a transformers model")
    refuses(quantized, "dtype=torch.float64", dtype=torch.float64)
    model = llama()
    cq.quantize_(model, Recipe("float", Scheme("nf4", "g32")))
    refuses(model, "layers.0.self_attn.q_proj: .*no nf4")
    model = llama()
    model.model.norm = QuantizedLinear(cq.quantize(torch.randn(4, 64), "int8", "channel"))
    refuses(model, "model.norm .*LlamaForCausalLM")
    quantized.model.norm.to("meta")
    refuses(quantized, r"model.norm.weight has no values \(meta device\)")


def test_folders_that_are_refused(quantized: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for path, part in [("full", "is not empty"), ("full/file", "is a file"), ("full/file/out", "cannot be made")]:
        with pytest.raises(CanopyError, match=part):
            cq.save(quantized, tmp_path / path)
    assert os.listdir(tmp_path) == ["full"] and (tmp_path / "full" / "file").read_text() == "mine"


def test_a_file_that_answers_otherwise_is_removed(
    quantized: nn.Module, llama: Callable, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("canopyq.checkpoint.save.load_as", lambda *a, **k: llama(initializer_range=0.3))
    with pytest.raises(CanopyError, match="q_proj came back .* removed"):
        cq.save(quantized, tmp_path / "out")
    with torch.no_grad():
        quantized.model.norm.weight.fill_(float("nan"))
    monkeypatch.undo()
    with pytest.raises(CanopyError, match="norm.weight.*NaN"):
        cq.save(quantized, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_code_that_no_file_holds_is_found(quantized: nn.Module, tmp_path: Path) -> None:
    quantized.model.layers[0].register_forward_hook(lambda module, given, out: out * 2)
    with pytest.raises(CanopyError, match="gives other answers"):
        cq.save(quantized, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_changed_tensor_is_found(quantized: nn.Module, tmp_path: Path, monkeypatch) -> None:
    """However little it changes the answers."""

    def spoiled(change: Callable) -> Callable:
        def load(*arguments: object, **options: object) -> nn.Module:
            change(model := load_as(*arguments, **options))
            return model

        return load

    def gain(model: nn.Module) -> None:
        model.model.norm.weight.data[0] *= 1.01

    def code(model: nn.Module) -> None:
        model.model.layers[1].mlp.up_proj.weight_packed[0, 0] ^= 1

    for change, name in ((gain, "model.norm.weight"), (code, "layers.1.mlp.up_proj")):
        monkeypatch.setattr("canopyq.checkpoint.save.load_as", spoiled(change))
        with pytest.raises(CanopyError, match=f"{name} came back"):
            cq.save(quantized, tmp_path / "out")


@pytest.mark.parametrize("right", [True, False])
def test_transformers_is_tried_on_request(right: bool, llama: Callable, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("compressed_tensors")
    model = llama(torch.float32)
    cq.quantize_(model, "w4a16-g32")
    if not right:  # as where it leaves weights out without a word
        read = tf.LlamaForCausalLM.from_pretrained

        def other(*arguments: object, **options: object) -> nn.Module:
            theirs = read(*arguments, **options)
            theirs.model.norm.weight.mul_(torch.linspace(-1, 1, len(theirs.model.norm.weight)))
            return theirs

        monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", other)
    verdict = cq.save(model, tmp_path / "out", check="transformers").readers["transformers"]
    assert verdict.startswith("yes" if right else "no") and tf.__version__ in verdict and "layout" not in verdict
    cq.load(tmp_path / "out")
    with pytest.raises(CanopyError, match="'vllm'"):
        cq.save(model, tmp_path / "again", check="vllm")
    assert "layout" in cq.save(model, tmp_path / "again").readers["transformers"]


def test_a_cast_that_moves_the_answers_is_no_mistake(llama: Callable, tmp_path: Path) -> None:
    """Rotated weights are no bfloat16 numbers, and an 8-bit code that flips moves the answers of a random model far."""
    model = llama(torch.float32, initializer_range=0.5)
    cq.quantize_(model, "w8a8", method="rotation")
    saved = cq.save(model, tmp_path / "out", dtype=torch.bfloat16)
    assert saved.check.max_abs_difference > 0 and saved.check.kl > 0
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(CanopyError, match="model.norm.weight reaches 1e.05"):
        cq.save(model, tmp_path / "half", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["out"]


# Whole or absent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["save_file", "_write_json", "_write_others", "read_back"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["control-c", "full disk"]
)
def test_an_end_in_the_middle_leaves_nothing(
    where: str, error: BaseException, quantized: nn.Module, tmp_path: Path, monkeypatch, logits: Callable
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    before = logits(quantized)
    monkeypatch.setattr(saving, where, fail)
    wanted = CanopyError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as ended:
        cq.save(quantized, tmp_path / "out", max_shard_bytes=20_000)
    if wanted is CanopyError:
        assert "No space left on device" in str(ended.value) and "nothing was left behind" in str(ended.value)
    assert os.listdir(tmp_path) == [] and torch.equal(logits(quantized), before)


def test_a_disk_that_takes_no_more(quantized: nn.Module, tmp_path: Path) -> None:
    """The system itself refuses to write beyond 50 kB to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CanopyError, match="could not be written .*; nothing was left behind"):
            cq.save(quantized, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has used torch")
def test_killed_at_random_moments(quantized: nn.Module, tmp_path: Path, logits: Callable) -> None:
    """kill -9: there is no folder, or all of it; what is left over has another name and is in nobody's way."""
    out, moments = tmp_path / "out", random.Random(0)
    fork = multiprocessing.get_context("fork")
    for _ in range(6):
        started = fork.Event()
        child = fork.Process(target=_save_slowly, args=(quantized, out, started))
        child.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL and not out.exists()
    assert all(name.startswith(".out.") and name.endswith(".part") for name in os.listdir(tmp_path))
    cq.save(quantized, out)
    assert torch.equal(logits(cq.load(out, dtype="bfloat16")), logits(quantized))


def _save_slowly(model: nn.Module, out: Path, started) -> None:
    torch.set_num_threads(1)  # OpenMP's other threads do not live on in a forked process, which would wait for them
    real = contents.to_disk

    def slowly(*arguments: object) -> dict:
        started.set()
        time.sleep(0.01)
        return real(*arguments)

    contents.to_disk = slowly
    cq.save(model, out, check=False, max_shard_bytes=10_000)
