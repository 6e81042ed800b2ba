"""Models of every class, and files under the names that their authors gave the tensors."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import canopyq as cq
from canopyq.checkpoint.files import SINGLE
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError
from canopyq.tensor.scheme import Recipe

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = tf.BertConfig(**SIZES, max_position_embeddings=64)
LLAMA = tf.LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64, **ENDS)
T5 = tf.T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0)
WHISPER = tf.WhisperConfig(
    vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=32, max_target_positions=64, num_mel_bins=16,
    decoder_start_token_id=1, **ENDS)  # fmt: skip
VIT = tf.ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32)
TEXT = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **ENDS}
SEEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
GEMMA3 = tf.Gemma3Config(text_config=TEXT, vision_config=SEEN, mm_tokens_per_image=4, image_token_index=90,
                         boi_token_index=91, eoi_token_index=92)  # fmt: skip
LLAVA = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**SEEN),
                       image_token_index=90)  # fmt: skip
QWEN = tf.Qwen2_5_VLConfig(
    text_config={**{name: size for name, size in TEXT.items() if name != "head_dim"}, "rope_parameters": ROPE},
    vision_config={"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64,
                   "fullatt_block_indexes": [1], "window_size": 28}, **TOKENS)  # fmt: skip
SEEING = {
    "gemma 3": lambda: tf.Gemma3ForConditionalGeneration(GEMMA3),
    "llava": lambda: tf.LlavaForConditionalGeneration(LLAVA),
    "mistral 3": lambda: tf.Mistral3ForConditionalGeneration(tf.Mistral3Config(
        text_config=tf.MistralConfig(**TEXT), vision_config=tf.PixtralVisionConfig(**SEEN, head_dim=16),
        image_token_index=90)),
    "qwen 2.5 vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(QWEN),
}  # fmt: skip
CLASSES = {
    "encoder": lambda: tf.BertModel(BERT),
    "classifier": lambda: tf.BertForSequenceClassification(BERT),
    "tagger": lambda: tf.BertForTokenClassification(BERT),
    "reader": lambda: tf.BertForQuestionAnswering(BERT),
    "base": lambda: tf.LlamaModel(LLAMA),
    "decoder that classifies": lambda: tf.LlamaForSequenceClassification(LLAMA),
    "t5": lambda: tf.T5ForConditionalGeneration(T5),
    "t5 encoder": lambda: tf.T5EncoderModel(copy.deepcopy(T5)),  # which writes into its config
    "whisper": lambda: tf.WhisperForConditionalGeneration(WHISPER),
    "images": lambda: tf.ViTForImageClassification(VIT),
}


def make(of: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return of().eval()


def state(model: nn.Module) -> dict[str, bytes]:
    """Every tensor, bit by bit."""
    return {name: x.reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_any_class_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = make(CLASSES[name])
    model.save_pretrained(tmp_path / "source")
    recipe = Recipe.parse("w8a16")
    if name == "whisper":
        recipe = replace(recipe, ignore=[*recipe.ignore, "proj_out"])  # the head, tied to the embedding
    cq.quantize_(model, recipe)
    saved = cq.save(model, tmp_path / "saved")
    assert saved.check.tokens >= 64 and saved.check.max_abs_difference == 0
    loaded = cq.load(tmp_path / "saved")
    assert type(loaded) is type(model) and state(loaded) == state(model)
    quantize_checkpoint(tmp_path / "source", recipe, tmp_path / "streamed")
    assert state(cq.load(tmp_path / "streamed")) == state(model)


@pytest.mark.parametrize("name", SEEING)
def test_of_a_model_that_sees_the_language_part_is_quantized(name: str, tmp_path: Path) -> None:
    model = make(SEEING[name])
    model.save_pretrained(tmp_path / "source")
    report = cq.quantize_(model, "w4a16-g32")
    assert report.share == 1 and all("language_model.layers" in layer.name for layer in report.layers)
    assert len(report.layers) == 14
    apart = {name: why for name, why in report.kept.items() if re.search("vision_tower|visual|projector", name)}
    assert len(apart) > 5 and all("language model" in why for why in apart.values())
    cq.save(model, tmp_path / "saved")
    done = quantize_checkpoint(tmp_path / "source", "w4a16-g32", tmp_path / "streamed")
    assert done.plan.kept == report.kept and not done.plan.dropped
    for folder in ("saved", "streamed"):
        loaded = cq.load(tmp_path / folder)
        assert type(loaded) is type(model) and state(loaded) == state(model)
    text = loaded.generate(torch.arange(3, 35)[None], past_key_values=cq.QuantizedCache(loaded.config, "kv8"),
                           max_new_tokens=4, min_new_tokens=4, do_sample=False)  # fmt: skip
    assert text.shape == (1, 36)


def test_an_image_is_seen_as_before(tmp_path: Path) -> None:
    model = make(SEEING["llava"])
    cq.quantize_(model, "w8a16")
    cq.save(model, tmp_path / "saved")
    loaded = cq.load(tmp_path / "saved")
    given = {"input_ids": torch.tensor([[1, 90, 90, 90, 90, 5, 6]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert not torch.equal(model(**given).logits, model(given["input_ids"]).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.skipif(not tf.__version__.startswith("5.23"), reason="verdicts are those of the version that was tried")
@pytest.mark.parametrize(("name", "recipe", "verdict"), [
    ("encoder", "w4a16-g32", "yes"), ("classifier", "w8a8", "yes"), ("base", "w8a16", "yes"),
    ("t5", "w4a16-g32", "only"), ("t5 encoder", "w4a16-g32", "only"), ("t5", "w8a8", "yes"), ("whisper", "fp8", "yes"),
    ("images", "w8a16", "yes"), ("gemma 3", "w4a16-g32", "yes"), ("qwen 2.5 vl", "w8a8", "yes"),
])  # fmt: skip
def test_transformers_reads_a_model_of_any_class(name: str, recipe: str, verdict: str, tmp_path: Path) -> None:
    """T5's code gives its layers first values, for which packed ones have no weight."""
    pytest.importorskip("compressed_tensors")
    model = make((CLASSES | SEEING)[name])
    cq.quantize_(model, recipe)
    saved = cq.save(model, tmp_path / "saved", check="transformers")
    assert saved.readers["transformers"].startswith(verdict) and "tried" in saved.readers["transformers"]
    assert cq.inspect(tmp_path / "saved").tools["transformers"].startswith(verdict)


def test_a_model_that_wants_two_inputs_is_saved_unjudged_or_not(tmp_path: Path) -> None:
    text = {**SIZES, "max_position_embeddings": 64}
    model = make(lambda: tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VIT.to_dict())))
    cq.quantize_(model, "w8a16")
    with pytest.raises(CanopyError, match="check=False"):
        cq.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    cq.save(model, tmp_path / "out", check=False)
    assert state(cq.load(tmp_path / "out")) == state(model)


def test_settings_of_generation_are_judged_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(lambda: tf.LlamaForCausalLM(LLAMA))
    cq.quantize_(model, "w8a16")
    model.generation_config.temperature = 0.5  # and do_sample=False, which transformers will not write
    monkeypatch.setattr("canopyq.checkpoint.save.contents", lambda model: pytest.fail("the work had begun"))
    with pytest.raises(CanopyError, match="temperature"):
        cq.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Names ----------------------------------------------------------------------------------------------------------------

GPT2 = tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=64, **ENDS)
NAMES = {
    # The files of GPT-2, Bloom and OPT on the hub were written by the base model, and those of BERT by older versions.
    "gpt2": (lambda: tf.GPT2LMHeadModel(GPT2), lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": 1}),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=2, **ENDS)),
              lambda name: name.removeprefix("transformer."), {}),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, ffn_dim=128,
            num_attention_heads=2, word_embed_proj_dim=64, max_position_embeddings=64, **ENDS)),
            lambda name: name.removeprefix("model."), {}),
    "gemma 3": (SEEING["gemma 3"], lambda name: name.replace("vision_tower.", "vision_tower.vision_model."), {}),
    "llava": (SEEING["llava"], lambda name: name.replace("vision_tower.", "vision_tower.vision_model."), {}),
    "qwen 2.5 vl": (SEEING["qwen 2.5 vl"], lambda name: re.sub(r"^(visual\.)", r"model.\1",
                    re.sub(r"^model\.", "model.language_model.", name)), {}),
    "base": (lambda: tf.LlamaModel(LLAMA), lambda name: f"model.{name}", {"lm_head.weight": 96}),
    "llama": (lambda: tf.LlamaForCausalLM(LLAMA), lambda name: name,
              {"model.layers.0.self_attn.rotary_emb.inv_freq": 16, "model.layers.2.mtp.weight": 64}),
    "bert": (lambda: tf.BertForSequenceClassification(BERT),
             lambda name: re.sub(r"Norm\.\w+$", lambda of: "Norm.beta" if "bias" in of[0] else "Norm.gamma", name),
             {"bert.embeddings.position_ids": 64, "cls.seq_relationship.bias": 2}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has no place for")
@pytest.mark.parametrize("name", NAMES)
def test_names_that_transformers_finds_are_found(name: str, tmp_path: Path) -> None:
    of, rename, more = NAMES[name]
    model = make(of)
    model.save_pretrained(tmp_path / "ours")
    theirs = Path(shutil.copytree(tmp_path / "ours", tmp_path / "theirs"))
    tensors = {rename(name): x for name, x in load_file(theirs / SINGLE).items()}
    assert name == "llama" or tensors.keys() != load_file(theirs / SINGLE).keys()
    save_file(tensors | {name: torch.zeros(n) for name, n in more.items()}, theirs / SINGLE, metadata={"format": "pt"})
    assert state(type(model).from_pretrained(theirs)) == state(model)  # transformers reads them so
    for folder in ("ours", "theirs"):
        done = quantize_checkpoint(tmp_path / folder, "w4a16-g32", tmp_path / f"{folder}-w4")
    assert sorted(done.plan.dropped) == sorted(more)
    assert state(cq.load(tmp_path / "theirs-w4")) == state(cq.load(tmp_path / "ours-w4"))


@pytest.mark.parametrize(("tensor", "warned"), [("model.mtp.weight", 1), ("model.rotary_emb.inv_freq", 0)])
def test_what_the_model_does_not_compute_itself_is_warned_of(tensor: str, warned: int, tmp_path: Path) -> None:
    make(lambda: tf.LlamaForCausalLM(LLAMA)).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / SINGLE
    save_file(load_file(file) | {tensor: torch.zeros(4)}, file, metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quantize_checkpoint(tmp_path / "source", "w8a16", tmp_path / "out")
    assert [tensor in str(each.message) for each in seen if "no place" in str(each.message)] == [True] * warned


def test_what_tokenizers_and_chats_need_is_copied(tmp_path: Path) -> None:
    make(lambda: tf.LlamaForCausalLM(LLAMA)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    for file in ("tekken.json", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/code.py"):
        (tmp_path / "source" / file).write_text(file)
    quantize_checkpoint(tmp_path / "source", "w8a16", tmp_path / "out")
    for file in ("tekken.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / file).read_text() == file
    assert [path.name for path in (tmp_path / "out" / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
