"""Long chats: how much a cache of few bits still recalls, and where the cache outgrows the weights.

    python benchmarks/long_chat.py            about three minutes on one core; writes benchmarks/results/long_chat.json

Recall is measured on the tutor: facts told early, 0 to 50 turns about other things, then one of the facts is asked
(`canopyq.long_chat`). The bytes of the tutor are read from real caches, turn by turn. Those of real models are computed
from their published shapes, by the function that a test compares with real caches.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import torch

import canopyq as cq
from canopyq.conversation import Conversation
from canopyq.long_chat import long_chat
from canopyq.machine import describe
from canopyq.memory import MODEL_SHAPES, cache_bytes, model_bytes
from canopyq.scheme import Recipe

RESULT = Path(__file__).parent / "results" / "long_chat.json"
CACHES = {
    "kv8": "kv8",
    "kv4": "kv4",
    "kv4 keys per token": lambda config: cq.QuantizedCache(config, "kv4", keys="token"),
    "kv2": "kv2",
    "kv2 keys per token": lambda config: cq.QuantizedCache(config, "kv2", keys="token"),
    "kv2 window 0": lambda config: cq.QuantizedCache(config, "kv2", window=0),
}
SHAPES = ("tutor", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b")
FORMATS = (None, "kv8", "kv4", "kv2")
TURN = 250  # tokens of a question and its answer, for real models: an assumption


def recall(model, tokenizer) -> list[dict]:
    found = long_chat(
        model, tokenizer, CACHES, fillers=(0, 12, 25, 50), questions=24, say=lambda r: print(r, flush=True)
    )
    return [row.to_dict() for row in found]


def grown(model, tokenizer) -> dict[str, list]:
    """Bytes of the tutor's cache after each turn of one chat, and its length in tokens."""
    [question] = cq.tutor.questions(1, skill="recall", fillers=50)
    found = {}
    for cache in FORMATS:
        talk, rows = Conversation(model, tokenizer, cache), []
        for asked, _ in question.turns:
            talk.ask(asked)
            rows.append([talk.tokens, talk.cache_bytes])
        found[cache or "full precision"] = rows
        print(
            f"{cache or 'full precision'}: {rows[-1][1]:,} bytes after {len(rows)} turns, {rows[-1][0]} tokens",
            flush=True,
        )
    return found


def crossing(shape: str, weights: int, format: str | None, batch: int) -> int:
    """The length of the chats, in tokens, at which their cache is larger than the weights."""
    low, high = 0, 2**32  # in blocks of 64, of which bytes grow steadily
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if cache_bytes(MODEL_SHAPES[shape], 64 * middle, batch, format) > weights else (middle, high)
        )
    return 64 * high


def memory() -> list[dict]:
    rows = []
    for name in SHAPES:
        shape = MODEL_SHAPES[name]
        sizes = {"bf16": model_bytes(shape).total, "w4a16-g128": model_bytes(shape, Recipe.parse("w4a16-g128")).total}
        for batch in (1, 16):
            for format in FORMATS:
                row = {"model": name, "batch": batch, "cache": format or "bf16"}
                row |= {"bytes_per_token": cache_bytes(shape, 64 * 10**6, batch, format) / (64 * 10**6)}
                for weights, size in sizes.items():
                    tokens = crossing(name, size, format, batch)
                    row |= {f"{weights}_weights": size, f"outgrows_{weights}_at_tokens": tokens}
                    row |= {f"outgrows_{weights}_at_turns": round(tokens / TURN)}
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = cq.tutor.load()
    content = {"memory": memory(), "turn_tokens": TURN, "tutor_turns": grown(model, tokenizer)}
    content |= {"recall": recall(model, tokenizer), "machine": describe(), "date": date.today().isoformat()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
