"""Models of every class, and files under the names that their authors gave the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import canopyq as cq
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
CLASSES = {
    "encoder": lambda: tf.BertModel(BERT),
    "classifier": lambda: tf.BertForSequenceClassification(BERT),
    "tagger": lambda: tf.BertForTokenClassification(BERT),
    "reader": lambda: tf.BertForQuestionAnswering(BERT),
    "base": lambda: tf.LlamaModel(LLAMA),
    "decoder that classifies": lambda: tf.LlamaForSequenceClassification(LLAMA),
    "t5": lambda: tf.T5ForConditionalGeneration(T5),
    "t5 encoder": lambda: tf.T5EncoderModel(T5),
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
