"""``model.save_pretrained`` of a quantized model: what `cq.save` would write, or one line that says why not."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import canopyq as cq
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "qwen3 moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)),
    "gpt neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(  # files call its head embed_out
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"})),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
}  # fmt: skip


def quantized(name: str, recipe: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    cq.quantize_(model, recipe, **options)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama", "w4a16-g32"), ("llama", "w8a8"), ("llama tied", "w4a16-g32+head+embed"), ("llama tied", "fp8"),
     ("mixtral", "w4a16-g32"), ("qwen3 moe", "fp8"), ("gpt2", "w8a16"), ("gpt neox", "w8a16")],
)  # fmt: skip
def test_it_writes_what_save_writes(name: str, recipe: str, tmp_path: Path, logits: Callable) -> None:
    model = quantized(name, recipe)
    cq.save(model, tmp_path / "save", dtype=torch.float32)
    model.save_pretrained(tmp_path / "own", max_shard_size="20kB")
    wanted, found = tensors(tmp_path / "save"), tensors(tmp_path / "own")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("save", "own")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    loaded = cq.load(tmp_path / "own")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == wanted.keys()


@pytest.mark.parametrize("way", ["save", "save_pretrained", "stream"])
def test_the_cache_of_a_recipe_comes_back(way: str, tmp_path: Path) -> None:
    if way == "stream":
        MODELS["llama"]().save_pretrained(tmp_path / "original")
        quantize_checkpoint(tmp_path / "original", "w8a16+kv4", tmp_path / "model")
    else:
        model = quantized("llama", "w8a16+kv4")
        cq.save(model, tmp_path / "model") if way == "save" else model.save_pretrained(tmp_path / "model")
    assert cq.QuantizedCache(cq.load(tmp_path / "model").config).format.name == "kv4"
    assert cq.QuantizedCache(MODELS["llama"]().config).format.name == "kv8"


def test_files_have_the_names_that_transformers_gives_them(tmp_path: Path, logits: Callable) -> None:
    model = MODELS["gpt neox"]().eval()
    model.save_pretrained(tmp_path / "original")
    cq.quantize_(model, "w8a16")
    cq.save(model, tmp_path / "saved", dtype=torch.float32)
    quantize_checkpoint(tmp_path / "original", "w8a16", tmp_path / "streamed")
    for way in ("saved", "streamed"):
        assert "embed_out.weight" in tensors(tmp_path / way) and "embed_out.weight" in tensors(tmp_path / "original")
        assert torch.allclose(logits(cq.load(tmp_path / way)), logits(model), atol=1e-5)


@pytest.mark.parametrize(("name", "recipe"), [("llama", "w4a16-g32"), ("gpt neox", "w8a16")])
def test_transformers_reads_it(name: str, recipe: str, tmp_path: Path, logits: Callable) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantized(name, recipe)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    # transformers multiplies dense weights, kernels here may round inputs to bfloat16: five steps of 2^-8.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.02, atol=0.02)


def test_the_trainer_writes_it_too(tmp_path: Path, logits: Callable) -> None:
    pytest.importorskip("accelerate")
    model = quantized("llama", "w8a16")
    arguments = tf.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    tf.Trainer(model, arguments).save_model(str(tmp_path / "model"))
    assert torch.equal(logits(cq.load(tmp_path / "model")), logits(model))


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    quantized("llama", "w8a16").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "options", "part"),
    [("nf4", {}, "nf4"),
     ("w8a16", {"method": "outliers", "calibration": [torch.arange(3, 51).reshape(2, 24)]}, "in 16 bits")],
)  # fmt: skip
def test_what_no_file_holds_is_refused(recipe: str, options: dict, part: str, tmp_path: Path) -> None:
    with pytest.raises(CanopyError, match=part):
        quantized("llama", recipe, **options).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_model_is_written_by_itself(tmp_path: Path) -> None:
    model, ids = quantized("llama", "w8a16").model, torch.arange(3, 19)[None]
    model.save_pretrained(tmp_path)
    loaded = cq.load(tmp_path)
    assert type(loaded) is tf.LlamaModel
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a16-g32", "w4a16-g32-asym+head+embed", "w8a8", "fp8", "nf4"])
def test_copies_answer_the_same(recipe: str, logits: Callable) -> None:
    """Layers take the layout of a kernel at the first call: before it and after it copies have to be whole."""
    model, early = quantized("llama", recipe), quantized("llama", recipe)
    wanted = logits(model)
    for original in (early, model):
        assert torch.equal(logits(copy.deepcopy(original)), wanted)
        held = io.BytesIO()
        torch.save(original.state_dict(), held)
        held.seek(0)
        torch.manual_seed(1)
        other = MODELS["llama"]().eval()
        cq.quantize_(other, recipe)
        assert not torch.equal(logits(other), wanted)
        other.load_state_dict(torch.load(held))
        assert torch.equal(logits(other), wanted)
        held = io.BytesIO()
        torch.save(original, held)
        held.seek(0)
        assert torch.equal(logits(torch.load(held, weights_only=False)), wanted)


def test_a_state_dict_of_another_scheme_is_refused() -> None:
    """Codes of another width, or of another format of the same width, would be read as this one's."""
    recipes = ("w4a16-g32", "w4a16-g64", "nf4", "w8a16", "w2a16-g32", "fp8")
    states = {each: quantized("llama", each).state_dict() for each in recipes}
    for recipe in states:
        for other in states.keys() - {recipe}:
            with pytest.raises(RuntimeError, match="codes, and they are|size mismatch"):
                quantized("llama", recipe).load_state_dict(states[other])
            if {recipe, other} != {"nf4", "w4a16-g64"}:  # which differ in nothing that a plain dict holds
                with pytest.raises(RuntimeError, match="size mismatch|Missing key|float8_e4m3fn"):
                    quantized("llama", recipe).load_state_dict(dict(states[other]))
    held = io.BytesIO()
    torch.save(states["nf4"], held)
    held.seek(0)
    with pytest.raises(RuntimeError, match="holds nf4 codes, and they are int4 here"):
        quantized("llama", "w4a16-g64").load_state_dict(torch.load(held))


@pytest.mark.parametrize(
    ("name", "recipe", "more"),
    [("llama", "w4a16-g32", 0), ("llama", "w8a8+head+embed", 0), ("llama tied", "w4a16-g32", 0),
     ("llama tied", "w4a16-g32+head", 96 * 64), ("mixtral", "w4a16-g32", 0), ("gpt2", "w8a16", 0)],
)  # fmt: skip
def test_every_weight_is_counted_as_transformers_counted_it(name: str, recipe: str, more: int, tmp_path: Path) -> None:
    """``more``: a head that shared the embedding's weight has one of its own once it is quantized."""
    plain, model = MODELS[name](), quantized(name, recipe)
    cq.save(model, tmp_path / "saved", dtype=torch.float32)
    for one in (model, copy.deepcopy(model), cq.load(tmp_path / "saved")):
        assert one.num_parameters() == plain.num_parameters() + more
        assert one.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True) + more
        assert one.num_parameters(only_trainable=True) == sum(p.numel() for p in one.parameters() if p.requires_grad)


def test_a_copy_counts_its_own_weights() -> None:
    model = quantized("llama", "w4a16-g32")
    twin = copy.deepcopy(model)
    count = model.num_parameters()
    twin.lm_head = nn.Linear(64, 10, bias=False)
    assert (twin.num_parameters(), model.num_parameters()) == (count - 86 * 64, count)
