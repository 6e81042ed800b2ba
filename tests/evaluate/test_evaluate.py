"""Evaluation against a slow one: one question at a time, no padding, no batches, double precision."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.evaluate import quality as evaluate
from canopyq.evaluate.quality import Comparison, Evaluation, compare, examine
from canopyq.evaluate.stats import Share, mcnemar
from canopyq.kv_cache import as_argument
from canopyq.memory import bytes_held
from canopyq.tutor import SKILLS, Question, loading
from canopyq.utils import track

MIXED = "w3a16-tensor"  # damages the tutor so far that some answers are right and some wrong
KL_ORDER = ["w8a16", "w4a16-g128", "w3a16-g128", "w2a16-tensor"]


@pytest.fixture(scope="session")
def shipped() -> tuple[nn.Module, Any]:
    return loading.load_folder(loading.path())


@pytest.fixture(scope="session")
def tutor(shipped) -> nn.Module:
    return shipped[0]


@pytest.fixture(scope="session")
def tokenizer(shipped):
    return shipped[1]


@pytest.fixture(scope="session")
def asked() -> list[Question]:
    """Two questions of every skill: short ones, and chats of many turns."""
    return cq.tutor.questions(34, seed=3)


@pytest.fixture(scope="session")
def kept(tutor: nn.Module, tokenizer, asked: list[Question]) -> Evaluation:
    return examine(tutor, tokenizer, asked, keep=True)


@pytest.fixture(scope="session")
def quantized(tutor: nn.Module) -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def by(recipe: str) -> nn.Module:
        if recipe not in made:
            made[recipe] = copy.deepcopy(tutor)
            cq.quantize_(made[recipe], recipe)
        return made[recipe]

    return by


@pytest.fixture(scope="session")
def compared(kept: Evaluation, tokenizer, asked, quantized) -> Callable[[str], Comparison]:
    made: dict[str, Comparison] = {}

    def by(recipe: str) -> Comparison:
        if recipe not in made:
            made[recipe] = compare(kept, quantized(recipe), tokenizer, asked)
        return made[recipe]

    return by


def tiny(**config: Any) -> nn.Module:
    """A random model that takes the tutor's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "vocab_size": 1280, "max_position_embeddings": 2048,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config})).eval()


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(CanopyError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The slow evaluation --------------------------------------------------------------------------------------------------


@dataclass
class Slow:
    perplexity: float
    tokens: int
    right: list[bool]
    kl: float
    kls: list[float]


def written(tokenizer, question: Question) -> tuple[list[int], int]:
    """Ids of a chat in the tutor's marks, spelled out by hand, and where its last answer begins."""
    *history, (prompt, answer) = question.turns
    told = "<bos>" + "".join(f"<user>{said}<bot>{replied}<end>" for said, replied in history)
    before = tokenizer.encode(f"{told}<user>{prompt}<bot>", add_special_tokens=False)
    return before + tokenizer.encode(f"{answer}<end>", add_special_tokens=False), len(before)


@torch.no_grad()
def slowly(reference: nn.Module, model: nn.Module, tokenizer, questions: Sequence[Question]) -> Slow:
    loss, kl, tokens, right, kls = 0.0, 0.0, 0, [], []
    for question in questions:
        ids, start = written(tokenizer, question)
        row = torch.tensor([ids] * (1 + 32 // len(ids)))  # more rows than the kernels take that round their input
        p, q = (F.log_softmax(m(input_ids=row).logits[0, :-1].double(), dim=-1) for m in (reference, model))
        loss += float(F.cross_entropy(q, row[0, 1:], reduction="sum"))
        kls.append(float(F.kl_div(q, p, log_target=True, reduction="sum")) / (len(ids) - 1))
        kl += kls[-1] * (len(ids) - 1)
        tokens += len(ids) - 1
        right.append(all(int(q[i - 1].argmax()) == ids[i] for i in range(start, len(ids))))
    return Slow(math.exp(loss / tokens), tokens, right, kl / tokens, kls)


@pytest.mark.parametrize("recipe", ["w8a16", MIXED])
def test_batches_agree_with_one_question_at_a_time(recipe: str, compared, tutor, quantized, tokenizer, asked) -> None:
    fast, slow = compared(recipe), slowly(tutor, quantized(recipe), tokenizer, asked)
    assert fast.model.tokens == fast.reference.tokens == slow.tokens
    assert list(fast.model.right) == slow.right
    assert fast.model.perplexity == pytest.approx(slow.perplexity, rel=1e-5)
    assert fast.kl == pytest.approx(slow.kl, rel=1e-3)
    assert fast.kls == pytest.approx(slow.kls, rel=0.01, abs=1e-6)


def test_the_reference_agrees_with_one_question_at_a_time(tutor, tokenizer, asked, kept: Evaluation) -> None:
    slow = slowly(tutor, tutor, tokenizer, asked[:17])
    fast = examine(tutor, tokenizer, asked[:17])
    assert (fast.tokens, list(fast.right)) == (slow.tokens, slow.right)
    assert fast.perplexity == pytest.approx(slow.perplexity, rel=1e-5)
    assert fast.right == kept.right[:17] and slow.kl == 0


def test_right_is_what_greedy_generation_writes(tutor, tokenizer) -> None:
    model, asked = copy.deepcopy(tutor), cq.tutor.questions(34, seed=11)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):  # noise, until about a quarter of the answers is wrong
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data.add_(0.6 * layer.weight.std() * noise)

    def greedy(question: Question) -> str:
        """Stopped soon after the right answer would end: by then a longer one shows."""
        tokens = len(tokenizer.encode(question.answer, add_special_tokens=False))
        return cq.tutor.ask(model, tokenizer, question, max_new_tokens=tokens + 3)

    right = [greedy(question) == question.answer for question in asked]
    assert list(examine(model, tokenizer, asked).right) == right and 17 < sum(right) < 33


class Scripted(nn.Module):
    """Predicts every token of what it is given, but for one: so many after the last answer's start, or the last."""

    def __init__(self, tokenizer, wrong: int | None) -> None:
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.zeros(())), SimpleNamespace()
        self.bot, self.end = tokenizer.convert_tokens_to_ids(["<bot>", "<end>"])
        self.vocabulary, self.wrong = len(tokenizer), wrong

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        predicted = input_ids.roll(-1, dims=1)
        for ids, row in zip(input_ids, predicted, strict=True):
            start = int((ids == self.bot).nonzero()[-1]) + 1
            last = int((ids == self.end).nonzero()[-1])
            at = last if self.wrong is None else start + self.wrong
            row[at - 1] += 1 if row[at - 1] == 0 else -1
        return SimpleNamespace(logits=9.0 * F.one_hot(predicted, self.vocabulary))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [(-2, True), (-1, True), (0, False), (None, False)],
    ids=["in the question", "where the answer is marked", "at its first token", "at its end"],
)
def test_an_answer_is_graded_from_its_first_token_to_its_end(wrong, right: bool, tokenizer, asked) -> None:
    assert set(examine(Scripted(tokenizer, wrong), tokenizer, asked).right) == {right}


# What it says of models -----------------------------------------------------------------------------------------------


def test_identical_models_do_not_differ(tutor, tokenizer, asked, kept: Evaluation) -> None:
    same = compare(tutor, copy.deepcopy(tutor), tokenizer, asked)
    assert same.kl == 0 and not same.lost and not same.gained and same.p_value == 1
    assert same.model == same.reference == kept


def test_kl_grows_as_bits_shrink(compared) -> None:
    kl = [compared(recipe).kl for recipe in KL_ORDER]
    assert 0 < kl[0] and all(2 * less < more for less, more in zip(kl, kl[1:], strict=False))


def test_lost_and_gained_are_the_questions_that_changed(tutor, tokenizer, asked, compared) -> None:
    result = compared(MIXED)
    right = dict(zip(asked, zip(result.reference.right, result.model.right, strict=True), strict=True))
    assert result.lost == [q for q in asked if right[q] == (True, False)] and result.lost
    assert result.gained == [q for q in asked if right[q] == (False, True)]
    assert result.p_value == mcnemar(len(result.lost), len(result.gained))
    assert len(result.lost) - len(result.gained) == result.reference.accuracy.right - result.model.accuracy.right


def test_a_model_that_always_says_the_same_loses_every_answer(tutor, tokenizer, asked, kept: Evaluation) -> None:
    broken = copy.deepcopy(tutor)
    nn.init.zeros_(broken.lm_head.weight)
    away = compare(kept, broken, tokenizer, asked)
    back = compare(broken, tutor, tokenizer, asked)
    known = [question for question, right in zip(asked, kept.right, strict=True) if right]
    assert away.lost == back.gained == known and not away.gained and not back.lost
    assert away.model.perplexity == pytest.approx(1280) and away.model.accuracy.right == 0


def test_accuracy_by_skill_adds_up(compared, asked) -> None:
    result = compared(MIXED).model
    assert list(result.skills) == list(SKILLS)
    assert result.accuracy == Share(sum(result.right), 34)
    assert sum(share.right for share in result.skills.values()) == result.accuracy.right
    assert all(share.n == 2 for share in result.skills.values())


def test_bytes_are_those_held(tutor, quantized, compared) -> None:
    result = compared("w4a16-g128")
    assert (result.reference.bytes, result.model.bytes) == (bytes_held(tutor), bytes_held(quantized("w4a16-g128")))
    assert result.model.bytes < 0.2 * result.reference.bytes


@pytest.mark.slow
def test_the_shipped_tutor_passes_its_gate(tutor, tokenizer) -> None:
    """At least 0.9 on every skill, on questions that it never trained on."""
    result = examine(tutor, tokenizer, cq.tutor.questions(10 * len(SKILLS), seed=5))
    assert {skill: share.n for skill, share in result.skills.items()} == dict.fromkeys(SKILLS, 10)
    below = {skill: str(share) for skill, share in result.skills.items() if share.value < 0.9}
    assert not below and result.accuracy.value > 0.97


# What must not matter -------------------------------------------------------------------------------------------------


def same_figures(a: Comparison, b: Comparison) -> bool:
    """Sums in another order differ in their last bits."""
    figures = [(x.kl, x.model.perplexity, x.reference.perplexity) for x in (a, b)]
    return a.model.tokens == b.model.tokens and figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_order_of_questions_does_not_matter(tutor, tokenizer, asked, quantized, compared) -> None:
    shuffled = Random(0).sample(asked, len(asked))
    again = compare(tutor, quantized(MIXED), tokenizer, shuffled)
    assert again.model.questions == tuple(shuffled)
    assert same_figures(again, compared(MIXED))
    before, after = (dict(zip(r.model.questions, r.model.right, strict=True)) for r in (compared(MIXED), again))
    assert before == after and set(again.lost) == set(compared(MIXED).lost)


@pytest.mark.parametrize("tokens", [1, 300])
def test_batch_size_does_not_matter(tokens: int, tutor, tokenizer, asked, quantized, compared, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", tokens)
    again = compare(tutor, quantized(MIXED), tokenizer, asked)
    assert same_figures(again, compared(MIXED))
    assert again.model.right == compared(MIXED).model.right


def test_large_vocabularies_get_small_batches(tokenizer, asked, monkeypatch) -> None:
    """A vocabulary a hundred times larger must not take a hundred times the memory."""
    shapes: list[tuple[int, int]] = []
    real = evaluate.log_probs_of

    def spy(model: nn.Module, ids: torch.Tensor, cache: object) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return real(model, ids, cache)

    monkeypatch.setattr(evaluate, "log_probs_of", spy)
    monkeypatch.setattr(evaluate, "BATCH_LOGITS", 100 * len(tokenizer))
    examine(tiny(), tokenizer, asked)
    assert all(rows == 1 or rows * length <= 100 for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == len(asked) and max(rows for rows, _ in shapes) > 1


def test_comparing_keeps_no_predictions_of_models(tokenizer, asked, monkeypatch) -> None:
    """Keeping all predictions of a model with a large vocabulary would fill the memory."""
    alive: list[int] = []
    real = evaluate.log_probs_of

    def spy(model: nn.Module, ids: torch.Tensor, cache: object) -> torch.Tensor:
        import gc

        alive.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-1:] == (1279,)))
        return real(model, ids, cache)

    monkeypatch.setattr(evaluate, "log_probs_of", spy)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 600)
    limited = tiny(vocab_size=1279)
    result = compare(limited, limited, tokenizer, asked)
    assert max(alive) <= 2 * 2048 * 1279 and max(alive) < result.model.tokens * 1279 / 2


def test_a_kept_reference_gives_exactly_what_the_model_gives(tutor, tokenizer, asked, quantized, compared) -> None:
    again = compare(tutor, quantized(MIXED), tokenizer, asked)
    assert again == compared(MIXED)
    assert not again.reference.log_probs and not compared(MIXED).reference.log_probs


def test_a_model_in_training_mode_is_examined_without_dropout(tokenizer, asked) -> None:
    model = tiny(attention_dropout=0.5)
    expected = examine(model, tokenizer, asked[:17])
    model.train()
    model.lm_head.eval()
    assert examine(model, tokenizer, asked[:17]) == expected
    assert model.training and model.model.training and not model.lm_head.training


def test_models_are_left_as_they_were(tutor, tokenizer, asked) -> None:
    before = {name: tensor.clone() for name, tensor in tutor.state_dict().items()}
    compare(tutor, tutor, tokenizer, asked[:17])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tutor.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tutor.parameters())


@pytest.mark.parametrize("make", [tuple, list, iter], ids=["tuple", "list", "iterator"])
def test_any_collection_of_questions(make, tokenizer, asked) -> None:
    assert examine(tiny(), tokenizer, make(asked[:3])).questions == tuple(asked[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, tokenizer, asked) -> None:
    model = tiny()
    result = compare(model, copy.deepcopy(model).to(dtype), tokenizer, asked[:17])
    assert result.model.bytes < 0.51 * result.reference.bytes and 0 < result.kl < 1e-4


# Through a KV cache ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(model: nn.Module, ids: list[int], cache) -> torch.Tensor:
    """Log-probabilities (1, T, vocabulary) of a model that reads one token at a time."""
    rows = [model(input_ids=torch.tensor([[i]]), **as_argument(cache), use_cache=True).logits for i in ids]
    return F.log_softmax(torch.cat(rows, 1).double(), dim=-1)


def test_a_cache_is_read_as_if_the_chat_were_written_token_by_token(tutor, tokenizer) -> None:
    [question] = cq.tutor.questions(1, skill="recall", fillers=5)
    ids, _ = written(tokenizer, question)
    assert len(ids) > 128
    result = compare(tutor, tutor, tokenizer, [question], cache="kv2")
    with torch.no_grad():
        plain = F.log_softmax(tutor(input_ids=torch.tensor([ids])).logits.double(), dim=-1)
    slow = token_by_token(tutor, ids, cq.QuantizedCache(tutor.config, "kv2"))
    expected = F.kl_div(slow[0, :-1], plain[0, :-1], log_target=True, reduction="sum") / (len(ids) - 1)
    assert result.kl == pytest.approx(float(expected), rel=1e-3)
    assert result.kl > 1e-5


def test_damage_and_bytes_of_caches(tutor, tokenizer, kept: Evaluation, asked) -> None:
    caches = {
        "kv8": "kv8",
        "kv4": "kv4",
        "kv2": "kv2",
        "token": lambda c: cq.QuantizedCache(c, "kv2", key_granularity="token"),
    }
    found = {name: compare(kept, tutor, tokenizer, asked, cache=cache) for name, cache in caches.items()}
    assert 0 < found["kv8"].kl < found["kv4"].kl / 10 < found["kv2"].kl / 100
    assert found["kv2"].kl < found["token"].kl
    assert found["kv8"].model.right == kept.right
    sizes = [found[name].model.cache_bytes for name in ("kv8", "kv4", "kv2")]
    assert sizes == sorted(sizes, reverse=True)
    both = compare(tutor, tutor, tokenizer, asked[17:], cache="kv4")
    assert both.reference.cache_bytes == 2 * 8 * 2 * 64 * 4 > both.model.cache_bytes
    assert "KV cache, a token" in str(both) and "8.19 kB" in str(both)
    assert both.to_dict()["model"]["cache_bytes_per_token"] == both.model.cache_bytes
    assert kept.cache_bytes is None and "KV cache" not in str(kept)


# How it reads ---------------------------------------------------------------------------------------------------------


def test_a_comparison_reads_as_a_table(compared) -> None:
    result = compared(MIXED)
    text = str(result)
    changed = [skill for skill, share in result.reference.skills.items() if share != result.model.skills[skill]]
    for part in ("in memory", "perplexity", "KL", "right answers", str(result.model.accuracy), *changed):
        assert part in text
    assert f"{len(result.lost)} answers lost" in text
    assert max(map(len, text.splitlines())) <= 72
    assert text in result._repr_html_()


def test_an_evaluation_reads_as_a_list(kept: Evaluation) -> None:
    lines = str(kept).splitlines()
    assert lines[0].startswith("32.8 MB in memory, perplexity 2.") and len(lines) == 1 + len(SKILLS)


def test_numbers_for_json_are_plain(compared) -> None:
    import json

    result = compared(MIXED)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["kl"] == result.kl and found["model"]["skills"]["add"]["n"] == 2
    assert [question["prompt"] for question in found["lost"]] == [question.prompt for question in result.lost]
    assert set(found["lost"][0]) == {"skill", "level", "prompt", "answer"}


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_other_questions_than_the_reference_s(tutor, tokenizer, asked, kept: Evaluation) -> None:
    for others in (asked[:5], list(reversed(asked)), [*asked, asked[0]]):
        assert "examined on other questions" in failure(lambda o=others: compare(kept, tutor, tokenizer, o))


def test_predictions_that_were_not_kept(tutor, tokenizer, asked, kept: Evaluation) -> None:
    forgotten = replace(kept, log_probs=())
    assert "use examine(…, keep=True)" in failure(lambda: compare(forgotten, tutor, tokenizer, asked))


def test_a_reference_kept_in_other_batches(tokenizer, asked, monkeypatch) -> None:
    """As with another tokenizer: its predictions cannot be put beside these."""
    model = tiny()
    kept = examine(model, tokenizer, asked, keep=True)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 1)
    assert "another tokenizer" in failure(lambda: compare(kept, model, tokenizer, asked))


def test_a_question_longer_than_the_context(tokenizer, asked) -> None:
    message = failure(lambda: examine(tiny(max_position_embeddings=64), tokenizer, asked))
    longest = max(len(written(tokenizer, question)[0]) for question in asked)
    assert f"{longest:,} tokens" in message.replace(f"{longest} ", f"{longest:,} ") and "takes 64" in message
    assert "recall" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float, tokenizer, asked) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = value
    for call in (lambda: examine(model, tokenizer, asked), lambda: compare(tiny(), model, tokenizer, asked)):
        assert "not finite; look for NaN" in failure(call)


def test_weights_that_are_finite_but_absurd(tokenizer, asked) -> None:
    """Logits fit into float32 and their differences do not: no number may come out of that."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[::2] = 6e36
        model.lm_head.weight[1::2] = -6e36
        model.model.norm.weight.fill_(3)
    assert "not finite" in failure(lambda: compare(tiny(), model, tokenizer, asked[:3]))


def test_a_hopeless_model_has_infinite_perplexity(tokenizer, asked) -> None:
    """exp(1000) does not fit into a float, and that is no reason to end in a traceback."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    result = compare(tiny(), model, tokenizer, asked[:3])
    assert result.model.perplexity == math.inf and math.isfinite(result.kl)
    assert "perplexity" in str(result) and result.to_dict()["model"]["perplexity"] is None


def test_a_bad_model_has_its_own_perplexity(tokenizer, asked) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    expected = slowly(model, model, tokenizer, asked[:3]).perplexity
    assert examine(model, tokenizer, asked[:3]).perplexity == pytest.approx(expected, rel=1e-4) and expected > 1e10


def test_vocabularies_that_differ(tutor, tokenizer, asked, kept: Evaluation) -> None:
    wider = tiny(vocab_size=1300)
    for reference in (tutor, kept):
        message = failure(lambda r=reference: compare(r, wider, tokenizer, asked))
        assert "vocabularies of 1280 and 1300 tokens" in message


def test_a_vocabulary_too_small_for_the_tokenizer(tokenizer, asked) -> None:
    highest = max(max(written(tokenizer, question)[0]) for question in asked)
    message = failure(lambda: examine(tiny(vocab_size=highest), tokenizer, asked))
    assert f"token {highest}" in message and f"vocabulary of {highest}" in message
    assert examine(tiny(vocab_size=highest + 1), tokenizer, asked).tokens > 0


def test_a_chat_template_that_refuses(tokenizer, asked) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    assert "chat template" in failure(lambda: examine(tiny(), strict, asked))


# The progress bar -----------------------------------------------------------------------------------------------------


def paced(pauses: Sequence[float]) -> Iterator[int]:
    for i, pause in enumerate(pauses):
        time.sleep(pause)
        yield i


def test_a_bar_appears_after_two_seconds_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pauses = [1.1, 1.1, 0.15]
    seen = []
    for i in track(paced(pauses), "counting sheep", len(pauses)):
        seen.append(i)
        if i == 0:
            assert capsys.readouterr() == ("", "")
    out, err = capsys.readouterr()
    assert seen == [0, 1, 2] and out == "" and "counting sheep" in err and "/3" in err
    assert err.endswith("\r") and not err.rsplit("\r", 2)[-2].strip()  # wiped away at the end


def test_nothing_appears_for_a_short_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(1000), "counting sheep")) == list(range(1000))
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_is_tracked(tokenizer, asked, monkeypatch) -> None:
    said: list[str] = []

    def spy(items: list, what: str) -> list:
        said.append(what)
        return items

    monkeypatch.setattr(evaluate, "track", spy)
    compare(tiny(), tiny(), tokenizer, asked)
    assert said == ["evaluating"]
