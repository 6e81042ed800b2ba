"""How well a model predicts a text, and what quantizing it cost there: for any model, and any text.

The text is cut into windows that do not overlap (see `texts.windows`), and at every position of a window the model is
asked for the next token. Tokens of one window hang together, windows hardly do: so every interval is the bootstrap's
over windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.evaluate.predictions import CacheMaker, cache_maker, full_cache_bytes, kl_divergences, log_probs_of
from canopyq.evaluate.stats import bootstrap
from canopyq.evaluate.texts import windows
from canopyq.memory import bytes_held, human
from canopyq.utils import Preformatted, eval_mode, track

TOKENS = 8192  # of a text: sixteen windows, enough to order recipes; a minute for a small model on a CPU

Interval = tuple[float, float]


@dataclass(frozen=True)
class TextEvaluation(Preformatted):
    """One model on a text.

    Attributes:
        bytes: storage behind its parameters and buffers.
        tokens: that were predicted, in all windows together.
        losses: mean cross-entropy of each window, in nats per token.
        cache_bytes: storage behind the KV cache a token; None where none was asked for.
    """

    bytes: int
    tokens: int
    losses: tuple[float, ...] = field(repr=False)
    cache_bytes: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return _exp(_mean(self.losses))

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the perplexity, over windows; None for a single one."""
        return _map(_exp, _interval(self.losses))

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "bytes": self.bytes, "cache_bytes_per_token": self.cache_bytes, "tokens": self.tokens,
            "windows": len(self.losses), "perplexity": _figure(self.perplexity, self.interval),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{human(self.bytes)} in memory, perplexity {_shown(self.perplexity, self.interval)}"]
        if self.cache_bytes is not None:
            lines.append(f"  KV cache of {human(self.cache_bytes)} a token")
        return "\n".join([*lines, f"  {_about(self)}"])


@dataclass(frozen=True)
class TextComparison(Preformatted):
    """A model beside the one it came from, on the same text.

    Attributes:
        kls: mean KL divergence of each window, in nats per token, from the reference's next-token distribution to the
            model's.
        agreements: the share of each window's positions at which both find the same token most likely.
    """

    reference: TextEvaluation
    model: TextEvaluation
    kls: tuple[float, ...] = field(repr=False)
    agreements: tuple[float, ...] = field(repr=False)

    @property
    def kl(self) -> float:
        return _mean(self.kls)

    @property
    def kl_interval(self) -> Interval | None:
        return _interval(self.kls)

    @property
    def agreement(self) -> float:
        return _mean(self.agreements)

    @property
    def agreement_interval(self) -> Interval | None:
        return _interval(self.agreements)

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity, divided by the reference's."""
        return _exp(_mean(self._loss_differences))

    @property
    def perplexity_ratio_interval(self) -> Interval | None:
        """Of the same windows in pairs, and so far narrower than the two perplexities' own intervals suggest."""
        return _map(_exp, _interval(self._loss_differences))

    @property
    def _loss_differences(self) -> list[float]:
        return [new - old for old, new in zip(self.reference.losses, self.model.losses, strict=True)]

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
            "perplexity_ratio": _figure(self.perplexity_ratio, self.perplexity_ratio_interval),
            "kl": _figure(self.kl, self.kl_interval),
            "agreement": _figure(self.agreement, self.agreement_interval),
        }

    def __str__(self) -> str:
        a, b = self.reference, self.model
        rows = [("", "reference", "model"), ("in memory", human(a.bytes), human(b.bytes))]
        if b.cache_bytes is not None:
            rows.append(("KV cache, a token", human(a.cache_bytes) if a.cache_bytes else "", human(b.cache_bytes)))
        rows += [
            ("perplexity", _shown(a.perplexity, a.interval), _shown(b.perplexity, b.interval)),
            ("  times as high", "1", _shown(self.perplexity_ratio, self.perplexity_ratio_interval)),
            ("KL, nats per token", "0", _shown(self.kl, self.kl_interval)),
            ("same top token", "100 %", f"{_shown(100 * self.agreement, _map(_percent, self.agreement_interval))} %"),
        ]
        return "\n".join([*(f"{name:<20} {old:<22} {new}".rstrip() for name, old, new in rows), _about(b)])


def examine_text(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    tokens: int = TOKENS,
    length: int | None = None,
    cache: str | CacheMaker | None = None,
) -> TextEvaluation:
    """The perplexity of one model on a text. See `compare_text` for the arguments and errors."""
    checks.language_model("model", model)
    return _Run([(model, cache)], windows(text, tokenizer, model, tokens=tokens, length=length)).evaluations()[0]


def compare_text(
    reference: nn.Module,
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    tokens: int = TOKENS,
    length: int | None = None,
    cache: str | CacheMaker | None = None,
) -> TextComparison:
    """Perplexity, KL divergence and agreement of a model and the one that it came from, on a text.

    Args:
        reference: a transformers causal language model.
        model: another one with the same vocabulary.
        tokenizer: of both.
        text: of the kind that the model will see, some pages of it or more; several texts are joined by blank lines.
        tokens: so many from the beginning of the text are used.
        length: tokens of a window; None takes 512, or the model's context if that is shorter.
        cache: the KV cache that the model reads through, the reference does not: ``"kv4"``, or a function from its
            config to a transformers cache.

    Raises:
        CanopyError: for a text that fills no window or does not fit the model, differing vocabularies, and logits that
            are not finite.
    """
    checks.language_model("reference", reference), checks.language_model("model", model)
    cut = windows(text, tokenizer, reference, tokens=tokens, length=length)
    checks.tokens("the text", torch.cat(cut), model)
    run = _Run([(reference, None), (model, cache)], cut)
    return TextComparison(*run.evaluations(), tuple(run.kls), tuple(run.agreements))


class _Run:
    """Models over the windows, one window at a time: the logits of one are the memory that it takes."""

    @torch.inference_mode()
    def __init__(self, examined: list[tuple[nn.Module, str | CacheMaker | None]], cut: list[Tensor]) -> None:
        self.models, makers = [model for model, _ in examined], [cache_maker(cache) for _, cache in examined]
        self.losses: list[list[float]] = [[] for _ in examined]
        self.cache_bytes: list[float | None] = [None] * len(examined)
        self.kls: list[float] = []
        self.agreements: list[float] = []
        self.tokens = sum(ids.numel() - 1 for ids in cut)
        with eval_mode(*self.models):
            for ids in track(cut, "evaluating"):
                found = []
                for n, (model, make) in enumerate(zip(self.models, makers, strict=True)):
                    cache = make(model.config) if make else None
                    log_probs = log_probs_of(model, ids, cache)[0]
                    target = ids[0, 1:, None].to(log_probs.device)
                    self.losses[n].append(-float(log_probs.gather(1, target).double().mean()))
                    if hasattr(cache, "nbytes"):
                        self.cache_bytes[n] = cache.nbytes / ids.numel()
                    found.append(log_probs)
                if len(found) == 2:
                    kl = float(kl_divergences(*found).double().mean())
                    self.kls.append(max(0.0, kl))  # rounding may bring it below zero
                    same = found[0].argmax(-1).to(found[1].device) == found[1].argmax(-1)
                    self.agreements.append(float(same.double().mean()))
            if any(size is not None for size in self.cache_bytes):  # beside it: what the other's takes
                pairs = zip(self.cache_bytes, self.models, strict=True)
                self.cache_bytes = [full_cache_bytes(model) if size is None else size for size, model in pairs]

    def evaluations(self) -> list[TextEvaluation]:
        return [
            TextEvaluation(bytes_held(model), self.tokens, tuple(losses), size)
            for model, losses, size in zip(self.models, self.losses, self.cache_bytes, strict=True)
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # windows are of one length


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a float ends at e^709


def _percent(share: float) -> float:
    return 100 * share


def _interval(values: Sequence[float]) -> Interval | None:
    return bootstrap(values) if len(values) > 1 else None


def _map(function, interval: Interval | None) -> Interval | None:
    return None if interval is None else (function(interval[0]), function(interval[1]))


def _figure(value: float, interval: Interval | None) -> dict[str, float | None]:
    numbers = (value, *(interval or (math.nan, math.nan)))
    return dict(zip(("value", "low", "high"), (x if math.isfinite(x) else None for x in numbers), strict=True))


def _shown(value: float, interval: Interval | None) -> str:
    return f"{value:.4g}" + ("" if interval is None else f" ({interval[0]:.3g}–{interval[1]:.3g})")


def _about(done: TextEvaluation) -> str:
    count = len(done.losses)
    if count == 1:
        return f"{done.tokens:,} tokens in one window, so no interval can be given"
    return f"{done.tokens:,} tokens in {count} windows; in brackets 95 % intervals over windows"
