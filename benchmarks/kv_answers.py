"""Does generate write the same text through a quantized KV cache? Greedy answers, compared letter by letter.

    python benchmarks/kv_answers.py [--questions 500] [--dtype float32|bfloat16] [--caches kv8 …] [--again]

About 12 minutes in float32 on one core; with kv8 alone 25 in bfloat16, which most processors compute slowly. The file
benchmarks/results/kv_answers.json is written after every ten questions; a run that was stopped goes on from there.

The expected text is that of the same model through transformers' DynamicCache, which keeps keys and values as the model
computes them: in float32, as the tutor runs on a CPU, or in bfloat16 with the whole model in bfloat16, as on a GPU.

A question of a dozen tokens alone would prove nothing: it lies in the window that stays in full precision. So each
stands at the end of a chat. Half of the questions are of all skills, after twelve turns about other things. The other
half ask for a fact that was told 12, 25 or 50 turns before, which can only come from the codes. The chat is read in one
pass, as `generate` reads a prompt, and then the question is asked through the cache: everything before it that is
behind the window is codes, and the result says how many tokens those were.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch
from transformers import DynamicCache

import canopyq as cq
from canopyq.evaluate.machine import describe
from canopyq.evaluate.stats import Share
from canopyq.tutor.chat import prompt_ids
from canopyq.tutor.exam import Question
from canopyq.utils import track

Maker = Callable[[object], cq.QuantizedCache]
RESULT = Path(__file__).parent / "results" / "kv_answers.json"
CACHES = {
    "kv8": lambda config: cq.QuantizedCache(config, "kv8"),
    "kv8 window 0": lambda config: cq.QuantizedCache(config, "kv8", residual_length=0),
    "kv-fp8": lambda config: cq.QuantizedCache(config, "kv-fp8"),
    "kv4": lambda config: cq.QuantizedCache(config, "kv4"),
    "kv2": lambda config: cq.QuantizedCache(config, "kv2"),
}
TARGET = 0.99  # of kv8's answers are the same text
PART = 10  # questions between two writes
NEW = 96  # tokens of an answer at most


def questions(n: int) -> list[Question]:
    """``n`` different questions, each at the end of a chat: in turn one of any skill and one of recall."""
    half = -(-n // 2)
    chats = cq.tutor.questions(half, skill="recall", fillers=12, seed=1)
    single = [q for q in cq.tutor.questions(half + half // 8 + 1) if q.skill != "recall"]
    mixed = [Question(q.skill, q.level, (*chat.turns[:-1], *q.turns)) for chat, q in zip(chats, single, strict=False)]
    lengths = [cq.tutor.questions(half, skill="recall", fillers=fillers) for fillers in (12, 25, 50)]
    recalled = [lengths[i % 3][i] for i in range(half)]
    return [q for pair in zip(mixed, recalled, strict=True) for q in pair][:n]


@torch.inference_mode()
def answers(model, tokenizer, question: Question, caches: dict[str, Maker]) -> dict[str, tuple[str, int]]:
    """What ``generate`` writes through each cache, and how many tokens were codes when the question came.

    The first is "full precision", transformers' DynamicCache. Its chat is read in one pass; in such a pass the model
    sees its own keys and values as they are, so that every cache is left with the same ones to hold.
    """
    before = cq.tutor.encode(tokenizer, question.turns[:-1])[0]
    prompt = torch.tensor([prompt_ids(tokenizer, question.turns[:-1], question.prompt)])
    assert prompt[0, : len(before)].tolist() == before
    full = DynamicCache(config=model.config)
    model(input_ids=prompt[:, : len(before)], past_key_values=full, logits_to_keep=1)
    held = {"full precision": full} | {name: make(model.config) for name, make in caches.items()}
    for number, layer in enumerate(full.layers):
        for cache in list(held.values())[1:]:
            cache.update(layer.keys, layer.values, number)
    found = {}
    for name, cache in held.items():
        codes = getattr(cache.layers[0], "quantized_tokens", 0)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
                             max_new_tokens=NEW, pad_token_id=0)  # fmt: skip
        found[name] = tokenizer.decode(out[0, prompt.shape[1] :]), codes
    return found


def measure(model, tokenizer, asked: list[Question], caches: dict[str, Maker], found: list[dict],
            keep: Callable[[], None] = lambda: None) -> list[dict]:  # fmt: skip
    """A row a question, appended to those that are ``found`` already."""
    for number in track(range(len(found), len(asked)), "answering"):
        question = asked[number]
        written = answers(model, tokenizer, question, caches)
        expected = written.pop("full precision")[0]
        row = {"skill": question.skill, "turns": len(question.turns), "expected": expected,
               "right": expected.removesuffix(tokenizer.eos_token).strip() == question.answer,
               "codes": [codes for _, codes in written.values()],
               "differ": {name: text for name, (text, _) in written.items() if text != expected}}  # fmt: skip
        found.append(row)
        if (number + 1) % PART == 0:
            keep()
    keep()
    return found


def summary(rows: list[dict], caches: Iterable[str]) -> dict[str, dict]:
    """For each cache: texts that are the same, with the interval, and how many tokens were read as codes."""
    found = {}
    for number, name in enumerate(caches):
        groups = {"all": rows, "recall": [row for row in rows if row["skill"] == "recall"]}
        codes = sorted(row["codes"][number] for row in rows)
        found[name] = {
            group: Share(sum(name not in row["differ"] for row in members), len(members)).to_dict()
            for group, members in groups.items()
        } | {"codes_least": codes[0], "codes_median": codes[len(codes) // 2], "codes_most": codes[-1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), metavar="CACHE")
    parser.add_argument("--again", action="store_true", help="begin anew rather than go on with the recorded answers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    old = {} if options.again else content.get(options.dtype, {})
    names = old.get("caches", options.caches)
    model, tokenizer = cq.tutor.load()
    model.to(getattr(torch, options.dtype))
    rows = old.get("rows", [])

    def keep() -> None:
        right = Share(sum(row["right"] for row in rows), len(rows)).to_dict()
        run = {"caches": names, "same": summary(rows, names), "right": right, "machine": describe(),
               "date": date.today().isoformat(), "rows": rows}  # fmt: skip
        write(content | {"target": TARGET, options.dtype: run})

    measure(model, tokenizer, questions(options.questions), {name: CACHES[name] for name in names}, rows, keep)
    for name, row in summary(rows, names).items():
        print(f"{name:<14} {Share(row['all']['right'], row['all']['n'])} the same text; of recall "
              f"{Share(row['recall']['right'], row['recall']['n'])}; {row['codes_least']} to {row['codes_most']} "
              f"tokens were codes, {row['codes_median']} in the median")  # fmt: skip


def write(content: dict) -> None:
    """One row a line."""
    lines = [f'"target": {content["target"]}']
    for dtype in (key for key in ("float32", "bfloat16") if key in content):
        run = dict(content[dtype])
        rows = ",\n   ".join(json.dumps(row, ensure_ascii=False) for row in run.pop("rows"))
        head = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run.items())
        lines.append(f'"{dtype}": {{\n  {head},\n  "rows": [\n   {rows}\n  ]\n }}')
    RESULT.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
