"""lm-evaluation-harness on quantized models: its figures are ours, on a text and on multiple choice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import yaml

import canopyq as cq

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'canopyq[eval]'")


@pytest.fixture(scope="module", params=[None, "w4a16-g128"])
def examined(request):
    model, tokenizer = cq.tutor.load()
    if request.param:
        cq.quantize_(model, request.param)
    return model, tokenizer


def rolling(model, tokenizer, text: str) -> float:
    """The log-likelihood of a text, as lm-eval has it."""
    [found] = cq.harness(model, tokenizer, batch_size=1).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    return found


def test_the_likelihood_of_a_text_is_ours(examined) -> None:
    model, tokenizer = examined
    text = "\n".join(f"{q.prompt} {q.answer}" for q in cq.tutor.questions(20, seed=3))
    count = len(tokenizer.encode(text, add_special_tokens=False))
    ours = cq.examine_text(model, tokenizer, text, tokens=count + 1, length=count + 1)
    assert ours.tokens == count
    assert rolling(model, tokenizer, text) == pytest.approx(-count * math.log(ours.perplexity), rel=1e-3)


def test_multiple_choice(examined, tmp_path: Path) -> None:
    """A task of its own in a folder: each choice's likelihood token by token in double precision picks the same."""
    model, tokenizer = examined
    random, rows = Random(0), []
    for question in cq.tutor.questions(12, skill="add", seed=1):
        total = int(question.answer.rstrip("."))
        choices = [question.answer, f"{total + 1}.", f"{total + 10}."]
        random.shuffle(choices)
        prompt = f"<user>{question.prompt}<bot>"
        rows.append({"prompt": prompt, "choices": choices, "right": choices.index(question.answer)})
    from lm_eval.tasks import TaskManager

    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "sums", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model=cq.harness(model, tokenizer, batch_size=4), tasks=["sums"], task_manager=manager, bootstrap_iters=0
    )

    def likelihood(prompt: str, choice: str) -> float:
        start = tokenizer.encode(prompt)
        ids = torch.tensor([start + tokenizer.encode(choice, add_special_tokens=False)])
        with torch.inference_mode():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(log_probs[i - 1, ids[0, i]]) for i in range(len(start), ids.shape[1]))

    right = 0
    for row in rows:
        scores = [likelihood(row["prompt"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["right"]
    assert done["results"]["sums"]["acc,none"] == pytest.approx(right / len(rows))
    assert right >= 0.9 * len(rows)
