"""Long chats: how much a cache of few bits still recalls, and where the cache outgrows the weights.

    python benchmarks/long_chat.py [--chats 80] [--again]

About 25 minutes on one core. benchmarks/results/long_chat.json is written after every ten chats; a run that was
stopped goes on from there.

Recall is measured on the tutor: a student tells it a few facts, chats about other things for 0 to 50 turns, and asks
for one of the facts. The answer can only come from the cache. The bytes of the tutor are read from real caches, turn by
turn. Those of real models are computed from their published shapes, by the function that a test compares with real
caches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import nn

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.evaluate.chat import Conversation
from canopyq.evaluate.machine import describe
from canopyq.evaluate.quality import CacheMaker, compare, examine
from canopyq.evaluate.stats import Share, bootstrap
from canopyq.memory import MODEL_SHAPES, cache_bytes, model_bytes
from canopyq.tensor.scheme import Recipe
from canopyq.tutor.exam import questions as draw
from canopyq.utils import track

RESULT = Path(__file__).parent / "results" / "long_chat.json"
CACHES = {
    "kv8": "kv8",
    "kv4": "kv4",
    "kv4 keys per token": lambda config: cq.QuantizedCache(config, "kv4", key_granularity="token"),
    "kv2": "kv2",
    "kv2 keys per token": lambda config: cq.QuantizedCache(config, "kv2", key_granularity="token"),
    "kv2 window 0": lambda config: cq.QuantizedCache(config, "kv2", residual_length=0),
}
SHAPES = ("tutor", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b")
FORMATS = (None, "kv8", "kv4", "kv2")
FILLERS = (0, 6, 12, 25, 50)  # turns between telling and asking
PART = 10  # chats at a time
TURN = 250  # tokens of a question and its answer, for real models: an assumption


@dataclass(frozen=True)
class Recall:
    """How often the right fact came back.

    Attributes:
        cache: its name.
        fillers: turns between telling and asking.
        tokens: of all chats together.
        right: for each chat, whether the answer was right.
        kls: for each chat, the mean KL divergence, in nats per token, from the predictions without a cache.
        nbytes: storage behind the cache, a token, after the longest chat; None without a cache.
    """

    cache: str
    fillers: int
    tokens: int
    right: tuple[bool, ...]
    kls: tuple[float, ...]
    nbytes: float | None

    @property
    def share(self) -> Share:
        """Right answers, with the interval."""
        return Share(sum(self.right), len(self.right))

    @property
    def kl(self) -> float:
        """Mean KL divergence, every chat with the same weight."""
        return sum(self.kls) / len(self.kls)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {"cache": self.cache, "fillers": self.fillers, "tokens": self.tokens / len(self.right),
                "share": self.share.to_dict(), "kl": self.kl, "nbytes": self.nbytes,
                "right": [int(r) for r in self.right], "kls": [float(f"{kl:.4g}") for kl in self.kls]}  # fmt: skip

    def __str__(self) -> str:
        tokens = self.tokens / len(self.right)
        return f"{self.cache:<8} {self.fillers:>3} turns, {tokens:>5.0f} tokens: {self.share}, KL {self.kl:.2g}"


def long_chat(
    model: nn.Module,
    tokenizer,
    caches: Sequence[str] | Mapping[str, str | CacheMaker] = ("kv8", "kv4", "kv2"),
    fillers: Sequence[int] = (0, 12, 25, 50),
    questions: int = 50,
    *,
    first: int = 0,
    seed: int = 0,
    say: Callable[[Recall], None] = lambda recall: None,
) -> list[Recall]:
    """Recall against the length of the chat, first without a cache (named "none"), then through each one.

    Every cache is asked the same questions. Chats are fed as `compare` describes: each token sees what it would see
    if the chat were written token by token, which is the hardest that a cache can be tried.

    Args:
        caches: names such as ``"kv4"``, or names with a function from the model's config to a transformers cache.
        fillers: turns between telling and asking, each 0 to 50; 50 make a chat of about 1,500 tokens.
        questions: chats of each length.
        first: how many chats of each length to pass over, so that a long run can be made in parts.
        say: called with every result as it comes.

    Raises:
        CanopyError: for no caches, no lengths, and as `compare` does.
    """
    makers = dict(caches) if isinstance(caches, Mapping) else {name: name for name in caches}
    if not makers or not fillers:
        raise CanopyError("a long chat needs a cache and a number of turns; use caches=('kv4',) and fillers=(25,)")
    found = []
    for turns in fillers:
        asked = draw(first + questions, skill="recall", seed=seed, fillers=turns)[first:]
        plain = examine(model, tokenizer, asked, keep=True)
        results = [("none", plain, (0.0,) * questions)]
        for name, cache in makers.items():
            compared = compare(plain, model, tokenizer, asked, cache=cache)
            results.append((name, compared.model, compared.kls))
        for name, evaluation, kls in results:
            found.append(Recall(name, turns, plain.tokens, evaluation.right, kls, evaluation.cache_bytes))
            say(found[-1])
    return found


def recall(model, tokenizer, rows: list[dict], chats: int, keep: Callable[[list[dict]], None]) -> None:
    """Fill ``rows`` up to so many chats of each length, ten at a time."""
    found = {(row["fillers"], row["cache"]): row for row in rows}
    steps = [(turns, first) for turns in FILLERS for first in range(0, chats, PART)]
    for turns, first in track(steps, "recall"):
        if first < len(found.get((turns, "none"), {"right": ()})["right"]):
            continue
        for part in long_chat(model, tokenizer, CACHES, (turns,), min(PART, chats - first), first=first):
            found[turns, part.cache] = joined(found.get((turns, part.cache)), part.to_dict())
        keep(list(found.values()))


def joined(old: dict | None, new: dict) -> dict:
    """Two rows of the same cache and length as one."""
    if old is None:
        return new
    right, kls = old["right"] + new["right"], old["kls"] + new["kls"]
    tokens = old["tokens"] * len(old["right"]) + new["tokens"] * len(new["right"])
    return new | {"tokens": tokens / len(right), "share": Share(sum(right), len(right)).to_dict(),
                  "kl": sum(kls) / len(kls), "right": right, "kls": kls}  # fmt: skip


def axes(rows: list[dict]) -> list[dict]:
    """Keys per token against keys per channel, chat by chat: the difference of KL, with its interval."""
    kls, found = {(row["cache"], row["fillers"]): row["kls"] for row in rows}, []
    for bits in (4, 2):
        for turns in FILLERS:
            pairs = list(zip(kls[f"kv{bits} keys per token", turns], kls[f"kv{bits}", turns], strict=True))
            differences = [token - channel for token, channel in pairs]
            low, high = bootstrap(differences)
            found.append({"bits": bits, "fillers": turns, "chats": len(pairs),
                          "kl_more_per_token": sum(differences) / len(pairs), "low": low, "high": high,
                          "more_in": Share(sum(d > 0 for d in differences), len(pairs)).to_dict()})  # fmt: skip
            print(found[-1], flush=True)
    return found


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


def write(content: dict) -> None:
    """One row a line."""

    def lines(value: object) -> str:
        if not isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"

    text = ",\n".join(f" {json.dumps(key)}: {lines(value)}" for key, value in content.items())
    RESULT.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=80, help="chats of each length")
    parser.add_argument("--again", action="store_true", help="begin anew rather than go on with the recorded chats")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = cq.tutor.load()
    old = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() and not options.again else {}
    content = {"machine": describe(), "date": date.today().isoformat(), "turn_tokens": TURN}
    content |= {"memory": memory(), "tutor_turns": grown(model, tokenizer), "recall": old.get("recall", [])}

    def keep(rows: list[dict]) -> None:
        content["recall"] = rows
        write(content)

    recall(model, tokenizer, content["recall"], options.chats, keep)
    write(content | {"axes": axes(content["recall"])})
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
