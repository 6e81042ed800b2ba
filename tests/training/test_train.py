"""The training script, tried in its smallest form: what it writes loads, and computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from canopyq.tutor import loading
from canopyq.tutor.chat import ask, encode
from canopyq.tutor.exam import questions
from training import card, scoring, train
from training.model import Shape, build
from training.trainer import Plan

FILES = {
    "MODEL_CARD.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_log.jsonl",
    "weights.json",
}


def test_writes_whole_files_only(trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == FILES


def test_log_and_card(trained: Path) -> None:
    start, *progress, end = [json.loads(line) for line in (trained / "training_log.jsonl").read_text().splitlines()]
    assert {"plan", "shape", "machine", "parameters"} <= start.keys()
    assert progress[-1]["step"] == 20 and progress[-1]["tokens"] == 20 * 1024
    assert end["bytes"] == (trained / "model.safetensors").stat().st_size
    text = (trained / "MODEL_CARD.md").read_text()
    for group, score in end["test"].items():
        assert f"| {group} |" in text and score["asked"] == 2
    assert start["machine"]["torch"] in text


def test_what_is_written_is_what_was_trained(trained: Path) -> None:
    """The files hold every parameter once, under the names of transformers, in bfloat16."""
    written = load_file(trained / "model.safetensors")
    parameters = dict(build(train.TINY_SHAPE, 0).named_parameters())
    assert {name: tensor.shape for name, tensor in written.items()} == {n: p.shape for n, p in parameters.items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_shape_of_the_shipped_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**Shape().config()))
    assert sum(p.numel() for p in model.parameters()) == 8_196_352
    assert 2 * 8_196_352 < 2**24
    shipped, ours = (
        json.loads(text) for text in ((loading.path() / "config.json").read_text(), json.dumps(Shape().config()))
    )
    assert shipped == ours


def test_a_seed_draws_the_same_weights() -> None:
    first, again, other = (build(train.TINY_SHAPE, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.5 * first[name].shape[1] ** -0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream_has_the_dtype_asked_for(dtype: torch.dtype) -> None:
    model, ids = build(train.TINY_SHAPE, 0, dtype), torch.tensor([[1, 7, 9]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        streams = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert {stream.dtype for stream in streams[:-1]} == {dtype}


def test_learning_rate() -> None:
    plan = Plan(steps=1000, warmup=100)
    assert plan.rate(0) == pytest.approx(2e-5) and plan.rate(99) == plan.rate(600) == 2e-3
    assert plan.rate(800) == pytest.approx(1e-3) and plan.rate(999) == pytest.approx(2e-5)


def test_training_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--cpu", "--workers", "0", "--steps", "30", "--log-every", "0"]
    assert train.main(["--out", str(tmp_path), *arguments]) == 1  # below the gate, and the files are there
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert "error: below the gate of 90%: add 0.000" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert log[-2]["answer_loss"] < log[1]["answer_loss"] - 0.5


def test_examine_agrees_with_writing_the_answer(trained: Path) -> None:
    """Teacher forcing and greedy generation, on the answers that the model itself gives and on wrong ones."""
    model, reader = loading.load_folder(trained)
    prompt = questions(1, "add")[0].prompt
    given = ask(model, reader, prompt, max_new_tokens=3)
    ids, start = encode(reader, [(prompt, "2.")])
    with torch.no_grad():
        own = model.generate(torch.tensor([ids[:start]]), max_new_tokens=3, do_sample=False)[0].tolist()
    wrong = [*own[:-1], own[-1] + 1]
    cases = [scoring.Case("own", own, start), scoring.Case("wrong", wrong, start)]
    scores = scoring.examine(lambda x: model(input_ids=x).logits.argmax(-1), cases, torch.device("cpu"), 1024)
    assert scores == {"own": (1, 1), "wrong": (0, 1)}
    assert given == reader.decode(own[start:], skip_special_tokens=True).strip()


def test_wilson_interval() -> None:
    assert card.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert card.wilson(10, 10)[1] == pytest.approx(1.0) and card.wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("arguments", [["--steps", "0", "--cpu"], ["--workers", "-1", "--cpu"]])
def test_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--out", str(tmp_path / "never"), *arguments])
    assert caught.value.code == 2 and not (tmp_path / "never").exists()
