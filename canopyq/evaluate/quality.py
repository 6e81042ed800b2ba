"""How good is a model, and what did quantizing it cost?

All figures come from one teacher-forced pass: the right answer is fed in, and at every position the model is asked for
the next token. Perplexity and KL divergence are over all tokens of the chats. An answer counts as right if the most
likely token is the right one at every position of it, its end included: for these models that is the same as greedy
generation reproducing the answer, without the decoding loop.

With a KV cache the chats are fed in passes of a block, 64 tokens. Each token then sees exactly what it would see if the
model wrote the chat token by token: the newest block as it is, and all before through the cache. That is harder than in
use, where a prompt is read in one pass and only the answer goes through the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.evaluate.predictions import CacheMaker, cache_maker, full_cache_bytes, kl_divergences, log_probs_of
from canopyq.evaluate.stats import Share, mcnemar
from canopyq.memory import bytes_held, human
from canopyq.tutor.chat import encode
from canopyq.tutor.exam import Question
from canopyq.utils import Preformatted, eval_mode, track

BATCH_TOKENS = 8192  # padded tokens a batch, or fewer where the vocabulary is large: one logit takes 4 bytes
BATCH_LOGITS = 2**27


@dataclass(frozen=True)
class Evaluation:
    """One model on a list of questions.

    Attributes:
        bytes: storage behind its parameters and buffers.
        perplexity: exp of the mean cross-entropy over all ``tokens``.
        right: for each question, whether its answer was right.
        questions: the questions, in the same order.
        log_probs: the predictions, if they were kept (see `examine`).
        cache_bytes: storage behind the KV cache after the longest chat, a token; None where none was asked for.
    """

    bytes: int
    perplexity: float
    tokens: int
    right: tuple[bool, ...]
    questions: tuple[Question, ...] = field(repr=False)
    log_probs: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    cache_bytes: float | None = None

    @property
    def accuracy(self) -> Share:
        return Share(sum(self.right), len(self.right))

    @property
    def skills(self) -> dict[str, Share]:
        """Accuracy by skill, in the order in which skills first appear."""
        groups: dict[str, list[bool]] = {}
        for question, right in zip(self.questions, self.right, strict=True):
            groups.setdefault(question.skill, []).append(right)
        return {skill: Share(sum(group), len(group)) for skill, group in groups.items()}

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "bytes": self.bytes,
            "cache_bytes_per_token": self.cache_bytes,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "tokens": self.tokens,
            "accuracy": self.accuracy.to_dict(),
            "skills": {skill: share.to_dict() for skill, share in self.skills.items()},
        }

    def __str__(self) -> str:
        lines = [f"{human(self.bytes)} in memory, perplexity {self.perplexity:.4f}, right {self.accuracy}"]
        if self.cache_bytes is not None:
            lines.append(f"  KV cache of {human(self.cache_bytes)} a token")
        lines += [f"  {skill:<12} {share}" for skill, share in self.skills.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison(Preformatted):
    """A model beside the one it came from, on the same questions.

    Attributes:
        kl: mean KL divergence, in nats per token, from the reference's next-token distribution to the model's. It is
            zero only if every probability is the same, and shows damage long before an answer turns wrong.
        kls: the same of each question alone, in their order.
    """

    reference: Evaluation
    model: Evaluation
    kl: float
    kls: tuple[float, ...] = field(default=(), repr=False)

    def _changed(self, before: bool) -> list[Question]:
        pairs = zip(self.model.questions, self.reference.right, self.model.right, strict=True)
        return [question for question, old, new in pairs if old is before and new is not before]

    @property
    def lost(self) -> list[Question]:
        """Questions that the reference answers right and the model wrong."""
        return self._changed(True)

    @property
    def gained(self) -> list[Question]:
        """Questions that the reference answers wrong and the model right."""
        return self._changed(False)

    @property
    def p_value(self) -> float:
        """McNemar's exact p for lost against gained: above 0.05 the change may well be chance."""
        return mcnemar(len(self.lost), len(self.gained))

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
            "kl": self.kl,
            "lost": [_question_dict(question) for question in self.lost],
            "gained": [_question_dict(question) for question in self.gained],
            "p_value": self.p_value,
        }

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, reference, model; of the skills, those whose share of right answers changed."""
        a, b = self.reference, self.model
        yield "in memory", human(a.bytes), human(b.bytes)
        if b.cache_bytes is not None:
            yield "KV cache, a token", human(a.cache_bytes) if a.cache_bytes else "", human(b.cache_bytes)
        yield "perplexity", f"{a.perplexity:.4f}", f"{b.perplexity:.4f}"
        yield "KL, nats per token", "0", f"{self.kl:.2g}"
        yield "right answers", str(a.accuracy), str(b.accuracy)
        for skill, share in a.skills.items():
            if share != b.skills[skill]:
                yield f"  {skill}", str(share), str(b.skills[skill])

    def __str__(self) -> str:
        lines = [f"{'':<20} {'reference':<22} model"]
        lines += [f"{name:<20} {old:<22} {new}" for name, old, new in self._rows()]
        answers = "answer" if len(self.lost) == 1 else "answers"
        lines.append(f"{len(self.lost)} {answers} lost, {len(self.gained)} gained (McNemar p = {self.p_value:.2g})")
        return "\n".join(lines)


def examine(
    model: nn.Module,
    tokenizer,
    questions: Sequence[Question],
    *,
    keep: bool = False,
    cache: str | CacheMaker | None = None,
) -> Evaluation:
    """Examine one model. See `compare` for the arguments and errors.

    With ``keep`` the result holds the model's predictions (4 bytes a token and vocabulary entry), so that it can stand
    for the model as the reference of many comparisons.
    """
    checks.flag("keep", keep)
    [(evaluation, *_)] = _Examiner(tokenizer, questions).run([(model, cache)], keep=keep)
    return evaluation


def compare(
    reference: nn.Module | Evaluation,
    model: nn.Module,
    tokenizer,
    questions: Sequence[Question],
    *,
    cache: str | CacheMaker | None = None,
) -> Comparison:
    """Examine a model and the one that it came from, side by side.

    Args:
        reference: a transformers causal language model, or what ``examine(…, keep=True)`` said of it on these
            questions.
        model: another one with the same vocabulary.
        tokenizer: of both.
        questions: e.g. ``cq.tutor.questions(200)``.
        cache: the KV cache that the model reads through, the reference does not: ``"kv4"``, or a function from its
            config to a transformers cache.

    Raises:
        CanopyError: for no questions, a question longer than the model's context, differing vocabularies, logits that
            are not finite, or a kept evaluation that has no predictions or was of other questions or tokens.
    """
    examiner = _Examiner(tokenizer, questions)
    if isinstance(reference, Evaluation):
        [(evaluation, *kl)] = examiner.run([(model, cache)], reference)
        return Comparison(replace(reference, log_probs=()), evaluation, *kl)
    (before, *_), (after, *kl) = examiner.run([(reference, None), (model, cache)])
    return Comparison(before, after, *kl)


class _Examiner:
    """The questions as padded batches of similar length."""

    def __init__(self, tokenizer, questions: Sequence[Question]) -> None:
        self.questions = tuple(checks.sequence("questions", questions, 1))
        for question in self.questions:
            checks.instance(
                "questions", question, Question, "give a list of Question; use e.g. cq.tutor.questions(200)"
            )
        checks.tokenizer(tokenizer)
        self.encoded = [encode(tokenizer, question.turns) for question in self.questions]
        most = min(BATCH_TOKENS, BATCH_LOGITS // len(tokenizer))
        self.batches: list[list[int]] = [[]]
        for i in sorted(range(len(self.encoded)), key=lambda i: len(self.encoded[i][0])):
            length = len(self.encoded[i][0])
            if first := self.batches[-1]:
                too_much = (len(first) + 1) * length > most
                if too_much or length > 1.25 * len(self.encoded[first[0]][0]):
                    self.batches.append([])
            self.batches[-1].append(i)

    @torch.inference_mode()
    def run(
        self,
        examined: Sequence[tuple[nn.Module, str | CacheMaker | None]],
        kept: Evaluation | None = None,
        *,
        keep: bool = False,
    ) -> list[tuple[Evaluation, float, tuple[float, ...]]]:
        """The evaluation of each model with its cache, and its KL divergence from the kept predictions or else from
        the first one's: of all tokens, and of each question's."""
        models = [model for model, _ in examined]
        for name, model in zip(("reference", "model")[-len(models) :], models, strict=True):
            checks.language_model(name, model)
        self._check(models, kept)
        tallies = [_Tally(model, cache_maker(cache), len(self.questions)) for model, cache in examined]
        with eval_mode(*models):
            for number, batch in enumerate(track(self.batches, "evaluating")):
                ids, real, graded = self._pad(batch)
                reference = kept.log_probs[number] if kept else None
                for tally in tallies:
                    log_probs = tally.add(batch, ids, real, graded, keep)
                    if reference is None:
                        reference = log_probs
                    else:
                        tally.add_kl(batch, kl_divergences(reference, log_probs).split(real[:, 1:].sum(1).tolist()))
            if any(tally.make_cache for tally in tallies):  # beside it: what the others' takes
                for tally in tallies:
                    tally.cache_bytes = tally.cache_bytes or full_cache_bytes(tally.model)
        return [(tally.evaluation(self.questions), tally.kl / tally.tokens, tuple(tally.kls)) for tally in tallies]

    def _check(self, models: Sequence[nn.Module], kept: Evaluation | None) -> None:
        for model in models:
            for i in (i for batch in reversed(self.batches) for i in reversed(batch)):  # the longest first
                checks.tokens(f"a {self.questions[i].skill} question", torch.tensor([self.encoded[i][0]]), model)
        if kept and kept.questions != self.questions:
            raise CanopyError("the reference was examined on other questions; examine it on these, with keep=True")
        if kept and not kept.log_probs:
            raise CanopyError("the reference's predictions were not kept; use examine(…, keep=True)")
        tokens = [sum(len(self.encoded[i][0]) - 1 for i in batch) for batch in self.batches]
        if kept and [len(log_probs) for log_probs in kept.log_probs] != tokens:
            raise CanopyError("the reference was examined with another tokenizer; examine it with this one, keep=True")

    def _pad(self, batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (B, T), which of them are real, and which belong to the graded answer. Padding stands at the
        right, where causal attention keeps it out of every real position's sight."""
        rows = [torch.tensor(self.encoded[i][0]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        position = torch.arange(ids.shape[1])
        length = torch.tensor([[len(row)] for row in rows])
        start = torch.tensor([[self.encoded[i][1]] for i in batch])
        real = position < length
        return ids, real, real & (position >= start)


class _Tally:
    """What one model has shown so far, batch after batch."""

    def __init__(self, model: nn.Module, make_cache: CacheMaker | None, questions: int) -> None:
        self.model, self.make_cache = model, make_cache
        self.right, self.kls = [False] * questions, [0.0] * questions
        self.loss, self.kl, self.tokens = 0.0, 0.0, 0
        self.kept: list[Tensor] = []
        self.cache_bytes: float | None = None

    def add(self, batch: list[int], ids: Tensor, real: Tensor, graded: Tensor, keep: bool) -> Tensor:
        """Score a batch; its log-probabilities (tokens, vocabulary), without those of padding."""
        cache = self.make_cache(self.model.config) if self.make_cache else None
        log_probs = log_probs_of(self.model, ids, cache)
        if hasattr(cache, "nbytes"):
            self.cache_bytes = cache.nbytes / ids.numel()  # the last batch is of the longest chats
        target, real, graded = (x[:, 1:].to(log_probs.device) for x in (ids, real, graded))
        wrong = ((log_probs.argmax(-1) != target) & graded).any(dim=1).tolist()
        for i, any_wrong in zip(batch, wrong, strict=True):
            self.right[i] = not any_wrong
        log_probs, target = log_probs[real], target[real]
        self.tokens += len(target)
        self.loss -= float(log_probs.gather(1, target[:, None]).double().sum())
        if keep:
            self.kept.append(log_probs)
        return log_probs

    def add_kl(self, batch: list[int], kl: Sequence[Tensor]) -> None:
        """The divergences of a batch's tokens, a tensor for each question."""
        sums = [float(each.double().sum()) for each in kl]
        for i, each, total in zip(batch, kl, sums, strict=True):
            self.kls[i] = max(0.0, total / len(each))  # rounding may bring it below zero
        self.kl += max(0.0, sum(sums))

    def evaluation(self, questions: tuple[Question, ...]) -> Evaluation:
        loss = self.loss / self.tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # a float ends at e^709
        right, kept = tuple(self.right), tuple(self.kept)
        return Evaluation(bytes_held(self.model), perplexity, self.tokens, right, questions, kept, self.cache_bytes)


def _question_dict(question: Question) -> dict:
    return {"skill": question.skill, "level": question.level, "prompt": question.prompt, "answer": question.answer}
