"""One layer of a KV cache: the newest tokens as they are, those before them as codes. `QuantizedLayer`.

Tokens wait in full precision until 64 of them are together and 32 newer ones have come; then the block is quantized,
once and for good. Attention reads what the codes stand for. A pass over many new tokens sees those as they are, and
what earlier passes left as the cache holds it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from canopyq.errors import CanopyError
from canopyq.kv_states import FEW, CachedStates
from canopyq.tensor.kv_codes import BLOCK, CacheFormat, QuantizedStates


class QuantizedLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, T, D).

    Attributes:
        keys, values: the newest tokens, in full precision (B, H, R, D).
        quantized_keys, quantized_values: the tokens before them as `QuantizedStates`, or None.
        dropped: how many tokens before those a sliding window has passed.
        gives_codes: whether attention takes `CachedStates` for a pass over few tokens.
    """

    is_croppable = True

    def __init__(
        self, format: CacheFormat, keys: str, group: int, window: int, sliding_window: int | None = None
    ) -> None:
        super().__init__()
        self.format, self.per, self.group, self.window = format, keys, group, window
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.record_past = self.gives_codes = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.quantized_keys = self.quantized_values = None
        self.dropped = 0
        self.is_initialized = False
        self._before: tuple | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def quantized_tokens(self) -> int:
        return 0 if self.quantized_keys is None else self.quantized_keys.tokens

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        stored = [x.tensors for x in (self.quantized_keys, self.quantized_values) if x is not None]
        return (*sum(stored, ()), *(x for x in (self.keys, self.values) if x is not None))

    def get_seq_length(self) -> int:
        return self.dropped + self._held

    def finished_length(self) -> int:
        """The same without the tokens of a pass that has not reached all layers."""
        if self._before is None:
            return self.get_seq_length()
        keys, _, quantized = self._before
        return self.dropped + quantized + keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a pass over so many new tokens sees, and the position of the first."""
        return self._held + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        """Append tokens (B, H, n, D); all keys and all values, as attention is to see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._before = (self.keys, self.values, self.quantized_tokens)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        held = CachedStates(self.quantized_keys, self.quantized_values, self.keys, self.values)
        few = self.quantized_tokens and key_states.shape[2] <= FEW
        seen = (held, held) if self.gives_codes and few else held.joined()
        self._quantize_full_blocks()
        return seen

    def commit(self) -> None:
        """All layers have their tokens: there is no way back behind them."""
        self._before = None
        if self.sliding_window is not None:
            self._drop_what_slid_out()

    def undo(self) -> None:
        """Back to before the last update, unless that is committed."""
        if self._before is not None:
            self.keys, self.values, tokens = self._before
            self._keep_quantized(0, tokens)
            self._before = None

    def left_after(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` leaves.

        Raises:
            CanopyError: for a cut inside a quantized block, or behind what a sliding window has passed.
        """
        length, change = self.get_seq_length(), int(tokens_to_remove)  # transformers before 5.20 gives a tensor
        left = max(0, length + change) if change <= 0 else min(change, length)
        block, inside = divmod(left - self.dropped, BLOCK)
        if left == length or left - self.dropped >= self.quantized_tokens:
            return left
        if self.dropped and left - self.dropped < self.sliding_window - 1:
            raise CanopyError(
                f"the cache cannot go back to {left} tokens: of those before token {self.dropped} the sliding "
                "window has passed; start a new cache"
            )
        if inside:
            start = self.dropped + block * BLOCK
            raise CanopyError(
                f"the cache cannot go back to {left} tokens, in the middle of a quantized block; crop to {start} "
                f"and feed {inside} again, or make it with window={BLOCK} to keep more tokens in full precision"
            )
        return left

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: −n removes n of them, as transformers has it; a positive n keeps n.

        Tokens in full precision can go one by one; quantized ones in whole blocks. Raises as `left_after` does.
        """
        left = self.left_after(tokens_to_remove)
        if left == self.get_seq_length():
            return
        kept = left - self.dropped - self.quantized_tokens
        if kept < 0:
            self._keep_quantized(0, left - self.dropped)
            kept = 0
        self.keys, self.values = self.keys[:, :, :kept].clone(), self.values[:, :, :kept].clone()

    def activate_past_recording(self) -> None:
        """Keep 64 tokens more in full precision, so that they can be cropped: for speculative decoding."""
        self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    @property
    def _held(self) -> int:
        return self.quantized_tokens + (0 if self.keys is None else self.keys.shape[2])

    def _quantize_full_blocks(self) -> None:
        waiting = self.keys.shape[2] - self.window - (BLOCK if self.record_past else 0)
        n = waiting // BLOCK * BLOCK
        if n <= 0:
            return
        keys = QuantizedStates.quantize(self.keys[:, :, :n], self.format, self.per, self.group)
        values = QuantizedStates.quantize(self.values[:, :, :n], self.format, "token", self.group)
        first = self.quantized_keys is None
        self.quantized_keys = keys if first else self.quantized_keys.append(keys)
        self.quantized_values = values if first else self.quantized_values.append(values)
        self.keys, self.values = self.keys[:, :, n:].clone(), self.values[:, :, n:].clone()

    def _drop_what_slid_out(self) -> None:
        """Forget whole blocks that no coming token sees; the next one sees ``sliding_window − 1`` before itself."""
        out = (self._held - self.sliding_window + 1) // BLOCK * BLOCK
        if out > 0 and self.quantized_tokens:
            out = min(out, self.quantized_tokens)
            self.dropped += out
            self._keep_quantized(out, self.quantized_tokens)

    def _keep_quantized(self, start: int, stop: int) -> None:
        if start == stop:
            self.quantized_keys = self.quantized_values = None
        elif stop - start < self.quantized_tokens:
            self.quantized_keys = self.quantized_keys.narrow(start, stop)
            self.quantized_values = self.quantized_values.narrow(start, stop)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """``change`` done to every tensor; it works along the batch."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.quantized_tokens:
            self.quantized_keys = self.quantized_keys.map(change)
            self.quantized_values = self.quantized_values.map(change)
