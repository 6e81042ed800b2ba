"""Models that are published in FP8 or MXFP4 as a source: what transformers and compressed-tensors read there is what is
quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import canopyq as cq
from canopyq.checkpoint.derived import dequantized
from canopyq.checkpoint.files import SINGLE, Checkpoint
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError
from canopyq.tensor.scheme import Recipe, Scheme
from canopyq.tutor.loading import load_other

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen3 moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)),
    "gpt oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
        **SIZES | {"intermediate_size": 64}, num_local_experts=3, num_experts_per_tok=2, head_dim=16)),
}  # fmt: skip


def write(folder: Path, name: str, change: Callable[[str, Tensor], dict[str, Tensor]], **config: object) -> Path:
    """A tiny random model in bfloat16, with other tensors in the place of each that ``change`` changes."""
    torch.manual_seed(0)
    MODELS[name]().to(torch.bfloat16).save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / SINGLE).items():
        tensors |= change(key, tensor)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    return folder


def is_linear(key: str) -> bool:
    return key.endswith("_proj.weight")


def blocks(rows: int, columns: int) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """DeepSeek's: E4M3 times a float32 scale for each block."""

    def change(key: str, tensor: Tensor) -> dict[str, Tensor]:
        if not is_linear(key):
            return {key: tensor}
        n, k = tensor.shape
        wide = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns)
        wide[:n, :k] = tensor
        grid = wide.reshape(wide.shape[0] // rows, rows, -1, columns)
        scale = grid.abs().amax((1, 3)) / 448
        codes = (grid / scale[:, None, :, None]).reshape(wide.shape)[:n, :k].to(torch.float8_e4m3fn)
        return {key: codes.contiguous(), f"{key}_scale_inv": scale}

    return change


def mxfp4(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """gpt_oss': (experts, out, groups, 16) of two codes a byte, and exponents."""
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {key: tensor}
    experts, k, n = tensor.shape
    made = torch.Generator().manual_seed(len(key))
    codes = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8, generator=made)
    exponents = torch.randint(118, 124, (experts, n, k // 32), dtype=torch.uint8, generator=made)
    return {f"{key}_blocks": codes, f"{key}_scales": exponents}


def compressed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """E4M3 with a scale for each row, as llm-compressor writes it."""
    if not is_linear(key):
        return {key: tensor}
    scale = tensor.float().abs().amax(1, keepdim=True) / 448
    return {key: (tensor / scale).to(torch.float8_e4m3fn), key + "_scale": scale.to(torch.bfloat16)}


COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": {"type": "float", "num_bits": 8, "strategy": "token",
                                                     "dynamic": True},
        "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}}},
}  # fmt: skip
SOURCES = {
    "fp8": ("llama", blocks(32, 32), FP8, None),
    "fp8 experts": ("qwen3 moe", blocks(32, 32), FP8, None),
    "mxfp4": ("gpt oss", mxfp4, {"quant_method": "mxfp4"}, None),
    "compressed-tensors": ("llama", compressed, COMPRESSED, {"dequantize": True}),
}


def tensors(folder: Path) -> dict[str, bytes]:
    held = load_file(folder / SINGLE)
    return {name: x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for name, x in held.items()}


def theirs(folder: Path, options: dict | None) -> nn.Module:
    """The model as transformers dequantizes it."""
    if options is None:  # without a GPU it dequantizes by itself
        return tf.AutoModelForCausalLM.from_pretrained(folder)
    pytest.importorskip("compressed_tensors")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=tf.CompressedTensorsConfig(**options))
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_what_transformers_reads_is_quantized(name: str, tmp_path: Path) -> None:
    model, change, config, options = SOURCES[name]
    source = write(tmp_path / "source", model, change, **config)
    original = theirs(source, options)
    assert original.dtype == torch.bfloat16
    done = quantize_checkpoint(source, "w4a16-g32", tmp_path / "streamed")
    assert done.plan.share > 0.99 and not done.plan.dropped
    cq.quantize_(original, "w4a16-g32")
    cq.save(original, tmp_path / "saved", check=False)
    assert tensors(tmp_path / "streamed") == tensors(tmp_path / "saved")
    loaded = cq.load(tmp_path / "streamed", dtype="bfloat16")
    ids = torch.arange(3, 35)[None]
    assert torch.equal(loaded(ids).logits, original(ids).logits)


@pytest.mark.parametrize("name", SOURCES)
def test_in_memory(name: str, tmp_path: Path) -> None:
    """For methods that need the whole model, in float32 as on every CPU."""
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model, change, config, _ = SOURCES[name]
    source = write(tmp_path / "source", model, change, **config)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1}, "one"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(source)
    loaded, _ = load_other(source)
    made = dequantized(Checkpoint(source))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.get_parameter(name), made.read(name).float(), rtol=2**-8, atol=0)
    cq.quantize_(loaded, "w4a16-g32", method="hqq")
    cq.save(loaded, tmp_path / "out")
    assert torch.equal(cq.load(tmp_path / "out")(torch.arange(3, 35)[None]).logits,
                       loaded(torch.arange(3, 35)[None]).logits)  # fmt: skip


def test_a_model_that_transformers_holds_quantized(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = write(tmp_path / "source", "llama", compressed, **COMPRESSED)
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(CanopyError, match="compressed-tensors.*dequantize=True"):
        cq.quantize_(model, "w4a16-g32")


def test_what_stays_is_written_as_floats(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", blocks(32, 32), **FP8)
    original = theirs(source, None)
    recipe = Recipe("some", Scheme("int4", "g32"), ignore=("lm_head", "down_proj"))
    quantize_checkpoint(source, recipe, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[name], original.get_parameter(name))
    assert cq.load(tmp_path / "out").config.model_type == "llama"


@pytest.mark.parametrize("scale", ["blocks that leave a rest", "row", "tensor"])
def test_scales_of_any_shape(scale: str, tmp_path: Path) -> None:
    """96 and 64 are no multiples of 40, as 576 of DeepSeek's latent is none of 128."""
    change = {
        "blocks that leave a rest": blocks(40, 40),
        "row": blocks(1, 96),
        "tensor": lambda key, x: {key: x.to(torch.float8_e4m3fn), key + "_scale_inv": torch.tensor(0.5)}
        if is_linear(key) else {key: x},
    }[scale]  # fmt: skip
    source = write(tmp_path, "llama", change, **FP8 | {"weight_block_size": [40, 40]})
    held, made = load_file(source / SINGLE), dequantized(Checkpoint(source))
    for name in filter(is_linear, held):
        codes, factors = held[name].double(), held[f"{name}_scale_inv"].double()
        for i in (0, 31, 39, 40, 63)[: 2 if len(codes) < 64 else 5]:
            for j in (0, 39, 40, 63):
                place = {"row": (i, 0), "tensor": ()}.get(scale, (i // 40, j // 40))
                assert made.read(name)[i, j] == (codes[i, j] * factors[place]).to(torch.bfloat16), name


@pytest.mark.parametrize("groups", [["FP8"], {"group_0": 8}, {"group_0": {}}, 3])
def test_groups_that_are_none_are_passed_over(groups: object, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", blocks(32, 32), **FP8 | {"config_groups": groups})
    quantize_checkpoint(source, "w4a16-g32", tmp_path / "out")
    assert cq.load(tmp_path / "out").config.model_type == "llama"


def test_experts_with_one_scale_for_all(tmp_path: Path) -> None:
    codes = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    save_file({"experts": codes, "experts_scale_inv": torch.tensor([0.5])}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    read = dequantized(Checkpoint(tmp_path)).read
    expected = (codes.float() / 2).bfloat16()
    assert torch.equal(read("experts"), expected) and torch.equal(read("experts", 1), expected[1])


@pytest.mark.parametrize("config", [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}}, {},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp8",
    {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": ["FP8"]},
    {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": 8}}},
])  # fmt: skip
def test_other_formats_are_refused(config: object, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", lambda key, x: {key: x})
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    with pytest.raises(CanopyError, match="is quantized already") as caught:
        quantize_checkpoint(source, "w4a16-g32", tmp_path / "out")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("change", "part"), [
    (lambda key, x: {key: x.to(torch.float8_e4m3fn)} if is_linear(key) else {key: x}, "scale"),
    (lambda key, x: {key: x.to(torch.float8_e4m3fn), key + "_scale_inv": torch.ones(3, 5)} if is_linear(key)
     else {key: x}, r"\(3, 5\)"),
    (lambda key, x: {key: x}, "no FP8 or MXFP4"),
])  # fmt: skip
def test_scales_that_are_not_there_or_do_not_fit(change: Callable, part: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", change, **FP8)
    with pytest.raises(CanopyError, match=part):
        quantize_checkpoint(source, "w4a16-g32", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
