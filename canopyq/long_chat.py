"""Told early, asked late: how much of a long chat survives in the KV cache.

A student tells the tutor a few facts, chats about other things for some turns, and asks for one of the facts. The
answer can only come from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from canopyq.errors import CanopyError
from canopyq.evaluate import CacheMaker, compare, examine
from canopyq.stats import Share
from canopyq.tutor.questions import questions as draw


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
