"""The model card: written from what a training run measured, never by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from canopyq.evaluate.stats import wilson
from canopyq.tutor.skills import SKILLS
from training.batches import CURRICULUM

Score = tuple[int, int]  # right, asked


def below(scores: Mapping[str, Score], gate: float) -> list[str]:
    """The groups of questions with a lower accuracy than the gate."""
    return [group for group, (right, asked) in scores.items() if right < gate * asked]


def write(records: Sequence[Mapping[str, Any]], scores: Mapping[str, Score], gate: float) -> str:
    """The card's text from the lines of the training log and the final scores."""
    start, progress, end = records[0], [r for r in records if "answer_loss" in r], records[-1]
    plan, shape, machine = start["plan"], start["shape"], start["machine"]
    failed = below(scores, gate)
    verdict = (
        f"Below the gate of {gate:.0%}: {', '.join(failed)}. This run should not be shipped."
        if failed
        else f"Every skill reaches the gate of {gate:.0%}."
    )
    return f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, quantization, education]
---

# Canopy tutor

A small language model for a course about quantization. It is really trained, so that quantizing it costs real answers,
and small enough to be examined on a laptop within seconds. `training/train.py` wrote this card from what it
measured.

## Model

Llama architecture: {start["parameters"]:,} parameters, {shape["layers"]} layers, hidden size {shape["hidden"]},
feed-forward size {shape["ffn"]}, {shape["heads"]} query heads and {shape["kv_heads"]} key/value heads of size
{shape["head_dim"]}, tied embeddings, vocabulary {start["vocabulary"]}, context {start["context"]}.
Stored in bfloat16: {end["bytes"]:,} bytes.

A chat reads `<bos><user>question<bot>answer<end><user>question<bot>`; the tokenizer's chat template writes it.

## Data

All text comes from the generator in `canopyq/tutor`, which holds {len(SKILLS)} skills; no other text was used.
A question is held out by a hash of its canonical form: 2 of 20 hash values are the test split, 1 the validation split.
Where only the phrasing can be held out (a fact that was never told cannot be known), the table says so; each of those
items keeps at least two other phrasings for training.

## Accuracy on held-out questions

An answer counts when every token of it is right, `<end>` included. Measured in float32 on the bfloat16 weights as
stored, with the test split, drawn without replacement. The interval is Wilson's at 95 %.
{verdict}

| skill | what | right | n | accuracy | interval | held out |
|---|---|---|---|---|---|---|
{_score_rows(scores)}

`recall@24` asks for something that was told before 24 turns about other things.

## Training

* {plan["steps"]:,} steps of {plan["tokens"]:,} tokens, {end["tokens"]:,} in all, in {end["seconds"]:.0f} s;
  seed {plan["seed"]}.
* AdamW, betas 0.9 and 0.95, peak learning rate {plan["learning_rate"]}, {plan["warmup"]} warm-up steps,
  linear decay over the last {plan["decay"]:.0%}.
* Weight decay {plan["weight_decay"]} on matrices and embedding; gradient norm clipped at {plan["clip"]}.
* Loss weight 1 on answers, {plan["other_weight"]} on everything else. {plan["precision"]}.
* Row lengths: {_curriculum(plan["longest"])}.

| step | tokens (million) | loss on answers | tokens/s | validation: mean | lowest |
|---|---|---|---|---|---|
{_progress_rows(progress)}

Machine: {", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items())}.

The batches repeat exactly for the same seed; the arithmetic of a GPU may round differently from run to run.
`training_log.jsonl` has every line of the run.

## Limits

* It knows the skills above and nothing else, in English, in phrasings close to the training ones. It does not know when
  it does not know: asked anything else, it answers with something that looks like an answer.
* Its numbers stay within the ranges of the table. Longer sums, passages of more than five sentences and chats of more
  than {start["context"]} tokens lie outside of what it learned.
* Its courses, people and rooms are invented.
* Its answers are nearly deterministic, so perplexity on answers alone is close to 1 and says little.
"""


def _curriculum(longest: int) -> str:
    """The row lengths of each stretch of training, as in "128/256 for the first 30%"."""
    stretches = []
    for until, lengths in CURRICULUM:
        stretches.append(f"{'/'.join(str(min(length, longest)) for length in lengths)} until {until:.0%} of the steps")
    return ", ".join(stretches)


def _score_rows(scores: Mapping[str, Score]) -> str:
    rows = []
    for group, (right, asked) in scores.items():
        skill = SKILLS[group.split("@")[0]]
        low, high = wilson(right, asked)
        measured = f"{right} | {asked} | {right / asked:.3f} | {low:.3f} to {high:.3f}"
        rows.append(f"| {group} | {skill.about} | {measured} | {skill.held_out} |")
    return "\n".join(rows)


def _progress_rows(progress: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in progress:
        accuracy = record["validation"]
        worst = min(accuracy, key=accuracy.__getitem__)
        mean = sum(accuracy.values()) / len(accuracy)
        rows.append(
            f"| {record['step']:,} | {record['tokens'] / 1e6:.0f} | {record['answer_loss']:.4f} "
            f"| {record['tokens_per_second']:,} | {mean:.3f} | {accuracy[worst]:.2f} ({worst}) |"
        )
    return "\n".join(rows)
