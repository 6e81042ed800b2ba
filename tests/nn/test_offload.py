"""Models that accelerate has spread over devices, RAM and disk: quantized where their layers lie."""

from __future__ import annotations

import copy
from pathlib import Path

import accelerate
import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import nn

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.memory import bytes_held, bytes_of
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away

SIZES = {"vocab_size": 96, "max_position_embeddings": 64, "hidden_size": 128, "num_hidden_layers": 3, "pad_token_id": 0,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}  # fmt: skip
TOKENS = torch.arange(3, 39).reshape(2, 18)
ENDS = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
PARTS = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp.gate_proj", "mlp.up_proj")
MAPS = {
    "blocks on disk": ENDS | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
    "single layers on disk": ENDS
    | {f"model.layers.{i}.{part}": "cpu" for i in range(3) for part in PARTS}
    | {f"model.layers.{i}.mlp.down_proj": "disk" for i in range(3)},
    "everything on disk": {"": "disk"},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=request.param, mlp_bias=True)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("model") / "m"
    model.save_pretrained(folder)
    return folder


def load(folder: Path, device_map: object, offload: Path | None = None, **options: object) -> nn.Module:
    if device_map == {"": "disk"} and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip(f"accelerate {accelerate.__version__} refuses to put everything on the disk")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload, **options)
    return model.eval()


def in_memory(folder: Path, recipe: str) -> nn.Module:
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    cq.quantize_(model, recipe)
    return model


@pytest.mark.parametrize(
    ("where", "recipe"),
    [
        ("blocks on disk", "w4a16-g128"),
        ("blocks on disk", "w8a8"),
        ("single layers on disk", "w4a16-g32-asym"),
        ("everything on disk", "w8a16"),
        ("everything on disk", "w4a16-g32+head+embed"),
    ],
)
@torch.no_grad()
def test_layers_are_quantized_where_they_lie(saved: Path, where: str, recipe: str, tmp_path: Path) -> None:
    model = load(saved, MAPS[where], tmp_path)
    away = {name for name, module in model.named_modules() if is_away(module)}
    planned = cq.plan(model, recipe)
    report = cq.quantize_(model, recipe)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert set(layers) == {layer.name for layer in report.layers}
    assert {name for name, module in model.named_modules() if is_away(module)} == away
    for name, layer in layers.items():
        assert all(tensor.is_meta == (name in away) for tensor in layer.state_dict().values()), name
    reference = in_memory(saved, recipe)
    for _ in range(2):  # what was fetched is let go, and fetched again
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    assert planned.bytes_before == report.bytes_before
    assert planned.bytes_after == report.bytes_after == bytes_of(model) == bytes_held(reference)
    assert bytes_held(model) < 0.6 * bytes_held(reference) or where == "single layers on disk"
    files = list(tmp_path.glob("canopyq-*/*.safetensors"))
    assert len(files) == len(away & set(layers))


def test_auto_leaves_to_the_disk_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    model = load(saved, "auto", tmp_path, max_memory={"cpu": 1_000_000})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    report = cq.quantize_(model, "w4a16-g128", calibration=[TOKENS])
    reference = tf.AutoModelForCausalLM.from_pretrained(saved).eval()
    expected = cq.quantize_(reference, "w4a16-g128", calibration=[TOKENS])
    assert [layer.name for layer in report.worst] == [layer.name for layer in expected.worst]
    assert report.worst[0].output_error == pytest.approx(expected.worst[0].output_error, rel=1e-3)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    ids = TOKENS[:1, :4]
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False),
                       reference.generate(ids, max_new_tokens=4, do_sample=False))  # fmt: skip


@pytest.mark.parametrize("recipe", ["w4a16-g32", "w8a16"])
@torch.no_grad()
def test_weights_in_ram_stay_there(recipe: str) -> None:
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    reference = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    cq.quantize_(model, recipe)
    cq.quantize_(reference, recipe)
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    assert bytes_held(model) < 0.1 * bytes_held(reference)
    found = cq.explain(model)
    assert {layer.device for layer in found.layers} == {"cpu, its weight in RAM"}
    assert found.layers[0].runs == cq.explain(reference).layers[0].runs


def test_explain_and_save_say_where_a_layer_lies(saved: Path, tmp_path: Path) -> None:
    model = load(saved, MAPS["blocks on disk"], tmp_path / "offload")
    cq.quantize_(model, "w4a16-g128", strict=True)
    text = str(cq.explain(model))
    assert " on cpu\n" in text and " on cpu, its weight on disk\n" in text
    with pytest.raises(CanopyError, match=r"model.layers.1.self_attn.q_proj lies on disk.*canopyq quantize FOLDER"):
        cq.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_folder_the_model_stays_as_it_was(saved: Path) -> None:
    model = load(saved, MAPS["blocks on disk"])
    before = model(TOKENS).logits
    with pytest.raises(CanopyError, match=r"model.layers.1.self_attn.q_proj lies on disk.*offload_folder"):
        cq.quantize_(model, "w8a16")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


def test_a_full_disk_leaves_the_model_as_it_was(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(saved, MAPS["blocks on disk"], tmp_path)
    before = model(TOKENS).logits
    written = []

    def save_file(tensors: dict, file: Path) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(file)
        Path(file).write_bytes(b"x")

    monkeypatch.setattr("canopyq.nn.offload.save_file", save_file)
    with pytest.raises(CanopyError, match="No space left on device"):
        cq.quantize_(model, "w8a16")
    assert not list(tmp_path.iterdir())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


def test_weights_that_are_gone_are_missed_by_name(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    (tmp_path / "model.layers.2.mlp.up_proj.weight.dat").unlink()
    with pytest.raises(CanopyError, match=r"model.layers.2.mlp.up_proj: its weights lie elsewhere and cannot be read"):
        cq.quantize_(model, "w8a16")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_the_tutor_answers_from_the_disk(tmp_path: Path) -> None:
    model = load(cq.tutor.path(), MAPS["everything on disk"], tmp_path, dtype=torch.float32)
    tokenizer = cq.tutor.load()[1]
    cq.quantize_(model, "w8a16")
    questions = cq.tutor.questions(4)
    assert cq.examine(model, tokenizer, questions).accuracy.right == 4


def test_methods_that_change_weights_refuse_what_is_not_at_hand(saved: Path, tmp_path: Path) -> None:
    model = load(saved, MAPS["blocks on disk"], tmp_path)
    with pytest.raises(CanopyError, match=r"method gptq .*model.layers.1.self_attn.q_proj lies on disk"):
        cq.quantize_(model, "w4a16-g32", method="gptq", calibration=[TOKENS])
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    cq.quantize_(model, "w4a16-g32", method="hqq")
    assert model(TOKENS).logits.isfinite().all()
