"""A chat that keeps its KV cache from turn to turn: only what is new goes through the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from canopyq import checks
from canopyq.memory import bytes_held
from canopyq.nn.offload import input_device
from canopyq.tutor.chat import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """A chat with a model, each token of an answer the most likely one.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        cache: a format of `QuantizedCache` such as ``"kv4"``, or None for the cache that transformers makes.
        options: further arguments of `QuantizedCache`.

    Attributes:
        turns: what was asked and answered so far.
        ids: the token ids of all that.
        cache: the transformers cache that holds their keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: str | None = None, **options: Any
    ) -> None:
        self.model, self.tokenizer = checks.language_model("model", model), checks.tokenizer(tokenizer)
        self._new_cache = lambda: _make(model.config, cache, options)
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []
        self.cache = self._new_cache()

    @property
    def tokens(self) -> int:
        """How many tokens the cache holds."""
        return self.cache.get_seq_length()

    @property
    def limit(self) -> int | None:
        """How many tokens the model takes."""
        return checks.context(self.model)

    @property
    def cache_bytes(self) -> int:
        """Storage behind the cache."""
        from canopyq.kv_cache import cache_nbytes

        return cache_nbytes(self.cache)

    @property
    def weight_bytes(self) -> int:
        """Storage behind the model."""
        return bytes_held(self.model)

    def ask(self, question: str, max_new_tokens: int = 96) -> str:
        """The answer to the next turn.

        Raises:
            CanopyError: if the chat has come to the end of the model's context, or the tokenizer is of another model.
                It is then as it was.
        """
        import torch

        from canopyq.kv_cache import as_argument

        new = self._with(checks.text("question", question))
        room = checks.answer_length(max_new_tokens, new, self.model)
        ids = torch.tensor([new], device=input_device(self.model))
        pad = self.tokenizer.pad_token_id
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    **as_argument(self.cache),
                    do_sample=False,
                    max_new_tokens=room,
                    pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                )[0].tolist()
        except BaseException:  # an interruption, too, leaves tokens in the cache that no turn has
            self.cache = self._new_cache()
            raise
        self.ids = output
        answer = str(self.tokenizer.decode(output[len(new) :], skip_special_tokens=True)).strip()
        self.turns.append((question, answer))
        return answer

    def _with(self, question: str) -> list[int]:
        """Token ids up to where the answer begins.

        They begin with those in the cache. Where they do not, since the tokenizer writes an answer otherwise than the
        model did, the chat is read anew.
        """
        ids, cached = prompt_ids(self.tokenizer, self.turns, question), self.tokens
        if ids[:cached] != self.ids[:cached]:
            self.cache = self._new_cache()
        return ids


def _make(config: Any, cache: str | None, options: dict[str, Any]) -> Any:
    if cache is None:
        from transformers import DynamicCache

        return DynamicCache(config=config)
    from canopyq.kv_cache import QuantizedCache

    return QuantizedCache(config, cache, **options)
