"""From turns to token ids, and back to an answer: for the tutor model and for any other.

A chat model has a chat template, which knows how its turns are marked. A model without one gets plain text with
"Question:" and "Answer:" in front of the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from canopyq import checks
from canopyq.errors import CanopyError, shown, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from canopyq.tutor.exam import Question

Turn = tuple[str, str]  # what the student says, what the tutor answers


def encode(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> tuple[list[int], int]:
    """Token ids of a conversation, and where its graded part starts: the last answer and the token that ends it.

    Predicting ``ids[i]`` from ``ids[:i]`` for every ``i`` from that start on is answering the question right. Plain
    text has no token that ends a turn, so there only the answer itself is graded.
    """
    checks.tokenizer(tokenizer)
    *history, (question, answer) = _pairs("turns", turns, 1)
    before, inside = _prompt(tokenizer, history, question), answer
    if tokenizer.chat_template:
        whole = _render(tokenizer, [*_messages(history), *_messages([(question, answer)])])
        lead, found, tail = whole[len(before) :].partition(answer)
        if whole.startswith(before) and found:
            before, inside = before + lead, answer + tail  # some templates put marks between the prompt and the answer
        else:
            inside = answer + (tokenizer.eos_token or "")
    else:
        inside = " " + answer
    prompt_ids, answer_ids = _ids(tokenizer, before), tokenizer.encode(inside, add_special_tokens=False)
    specials = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(answer_ids, start=1) if token in specials), len(answer_ids))
    return prompt_ids + answer_ids[:end], len(prompt_ids)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str | Question,
    history: Sequence[Turn] = (),
    max_new_tokens: int = 96,
) -> str:
    """The model's answer, each token the most likely one. A ``Question`` brings its own history."""
    import torch

    from canopyq.nn.offload import input_device

    checks.language_model("model", model), checks.tokenizer(tokenizer)
    if hasattr(question, "turns"):
        history, question = [*history, *question.turns[:-1]], question.prompt
    prompt = prompt_ids(tokenizer, _pairs("history", history), checks.text("question", question))
    room = checks.answer_length(max_new_tokens, prompt, model)
    ids = torch.tensor([prompt], device=input_device(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=pad,
        )
    text = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    return text if tokenizer.chat_template else text.split("\n")[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, history: Sequence[Turn], question: str) -> list[int]:
    """Token ids of a chat up to where the answer to ``question`` begins."""
    return _ids(tokenizer, _prompt(tokenizer, history, question))


def _pairs(name: str, turns: object, least: int = 0) -> list[Turn]:
    turns = checks.sequence(name, turns, least)
    for turn in turns:
        if not isinstance(turn, (tuple, list)) or [type(part) for part in turn] != [str, str]:
            raise CanopyError(f"{name} has {shown(turn)}; give pairs of what is said and answered, both str")
    return turns


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    with wrapped(
        "the tokenizer's chat template cannot write this chat", "use another model"
    ):  # whatever the template does
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _prompt(tokenizer: PreTrainedTokenizerBase, history: Sequence[Turn], question: str) -> str:
    """The text up to where the answer begins."""
    if tokenizer.chat_template:
        messages = [*_messages(history), {"role": "user", "content": question}]
        return _render(tokenizer, messages, add_generation_prompt=True)
    told = "".join(f"Question: {asked}\nAnswer: {answered}\n\n" for asked, answered in history)
    return f"{told}Question: {question}\nAnswer:"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt. A chat template has written the start token already; plain text still needs it."""
    with wrapped("the tokenizer cannot read a text", "use another model"):
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not tokenizer.chat_template and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return ids
