"""A KV cache that holds codes: `QuantizedCache`, for ``model.generate(…, past_key_values=…)``.

Tokens wait in full precision until 64 of them are together and 32 newer ones have come; then the block is quantized,
once and for good. Attention reads what the codes stand for. A pass over many new tokens sees those as they are, and
what earlier passes left as the cache holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from canopyq.errors import CanopyError, unknown
from canopyq.kv_codes import BLOCK, GROUP, WINDOW, CacheFormat, QuantizedStates, get_cache_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


ATTENTION = "canopyq"  # the attention implementation that reads codes, see `fused_attention`
FEW = 16  # new tokens of a pass, up to which it does


@dataclass(frozen=True, eq=False)
class CachedStates:
    """A layer's tokens as the cache holds them: what attention on codes gets in the place of keys and of values.

    Attributes:
        before, window: of a cache of fixed size, see `ops.cuda.attention.attend`.
    """

    quantized_keys: QuantizedStates | None
    quantized_values: QuantizedStates | None
    keys: Tensor
    values: Tensor
    before: Tensor | None = None
    window: int = 0

    @property
    def tokens(self) -> int:
        return (0 if self.quantized_keys is None else self.quantized_keys.tokens) + self.keys.shape[2]

    def joined(self) -> tuple[Tensor, Tensor]:
        """All keys and all values (B, H, T, D), dequantized to the dtype of the newest."""
        return _joined(self.quantized_keys, self.keys), _joined(self.quantized_values, self.values)


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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: −n removes n of them, as transformers has it; a positive n keeps n.

        Tokens in full precision can go one by one; quantized ones in whole blocks.

        Raises:
            CanopyError: for a cut inside a quantized block, or behind what a sliding window has passed.
        """
        length = self.get_seq_length()
        left = max(0, length + tokens_to_remove) if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if left == length:
            return
        kept = left - self.dropped - self.quantized_tokens
        if kept < 0:
            block, inside = divmod(left - self.dropped, BLOCK)
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
            self._keep_quantized(0, block * BLOCK)
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


class QuantizedCache(Cache):
    """Keys and values of a model's layers in 8, 4 or 2 bits.

    Full-attention and sliding-window layers; of the latter, blocks that the window has passed are dropped.

    Args:
        config: the model's, ``model.config``.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``.
        keys: ``"channel"``: a key channel has a scale for each block of 64 tokens; ``"token"``: keys are quantized like
            values, with a scale for each group of a token's channels.
        window: so many of the newest tokens stay in full precision, besides those of the block that is not full yet.
            Attention looks at them most.
        group: channels of a token that share a scale; None takes 64, or all of a smaller head.

    Raises:
        CanopyError: for an unknown format, a head that the group does not divide, and layers of another kind, such as
            linear attention. `update` raises it for keys of another model, and for more tokens than the model's
            context holds; the cache is then as it was before the pass.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        format: str | CacheFormat = "kv8",
        *,
        keys: str = "channel",
        window: int = WINDOW,
        group: int | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise CanopyError(f"a cache is made from a model's config, got {type(config).__name__}; use model.config")
        self.config = config = config.get_text_config(decoder=True)
        self.format = get_cache_format(format)
        if keys not in ("channel", "token"):
            raise unknown("way to quantize keys", keys, ("channel", "token"))
        if not isinstance(window, int) or window < 0:
            raise CanopyError(f"a window of {window!r} tokens cannot be kept in full precision; use 0 or more")
        heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.limit = getattr(config, "max_position_embeddings", None)
        group = min(GROUP, self.head_dim) if group is None else group
        if not isinstance(group, int) or group < 1 or self.head_dim % group:
            raise CanopyError(
                f"groups of {group} channels do not divide heads of {self.head_dim}; use one that does, such as group="
                f"{next(g for g in range(min(GROUP, self.head_dim), 0, -1) if self.head_dim % g == 0)}"
            )
        if self.head_dim * self.format.bits % 8:
            raise CanopyError(f"heads of {self.head_dim} codes of {self.format.bits} bits fill no whole bytes; use kv8")
        layers = [QuantizedLayer(self.format, keys, group, window, sliding) for sliding in _sliding_windows(config)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind everything held. Read, not computed."""
        return cache_nbytes(self)

    @property
    def room(self) -> int:
        """How many tokens fit before the next block is quantized: those of one pass that see each other as they are."""
        layer = self.layers[0]
        waiting = 0 if layer.keys is None else layer.keys.shape[2]
        return layer.window + BLOCK - waiting

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append a layer's tokens (B, H, n, D); all of its keys and values, as attention is to see them."""
        if layer_idx == 0:
            self._check_start(key_states)
        try:
            self._check(key_states, value_states, layer_idx)
            layer = self.layers[layer_idx]
            layer.gives_codes = self.config._attn_implementation == ATTENTION
            seen = layer.update(key_states, value_states, *args, **kwargs)
        except CanopyError:
            for layer in self.layers:
                layer.undo()
            raise
        if layer_idx == len(self.layers) - 1:
            for layer in self.layers:
                layer.commit()
        return seen

    def copy(self) -> QuantizedCache:
        """A cache that goes on from the same tokens on its own. What both hold is held once."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def __repr__(self) -> str:
        return f"QuantizedCache({self.format.name}, {self.get_seq_length()} tokens, {self.nbytes} bytes)"

    def _check_start(self, key_states: Tensor) -> None:
        """Before the first layer of a pass."""
        done = sum(layer._before is not None for layer in self.layers)
        if done:
            for layer in self.layers:
                layer.undo()
            raise CanopyError(
                f"the pass before reached {done} of the cache's {len(self.layers)} layers and was undone; if nothing "
                "interrupted it, the cache belongs to another model: make one from this model's config"
            )
        tokens = self.get_seq_length() + key_states.shape[2]
        if self.limit is not None and tokens > self.limit:
            raise CanopyError(
                f"{tokens} tokens are more than the model's context of {self.limit}; shorten the chat, or start a new "
                "one with a new cache"
            )

    def _check(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        if layer_idx >= len(self.layers):
            self.reset()
            raise CanopyError(
                f"the cache is for {len(self.layers)} layers, and a model with more used it; it was emptied: make one "
                "from this model's config"
            )
        expected = (self.kv_heads, self.head_dim)
        for name, x in (("keys", key_states), ("values", value_states)):
            if (x.shape[1], x.shape[3]) != expected:
                raise CanopyError(
                    f"the cache is for {expected[0]} heads of {expected[1]}, and got {name} of {x.shape[1]} heads of "
                    f"{x.shape[3]}; make one from this model's config"
                )
        layer = self.layers[layer_idx]
        if layer.is_initialized and (len(key_states), key_states.dtype) != (len(layer.keys), layer.dtype):
            raise CanopyError(
                f"the cache holds {len(layer.keys)} chats in {layer.dtype}, and got {len(key_states)} in "
                f"{key_states.dtype}; start a new one, or use reset()"
            )


def cache_nbytes(cache: Cache) -> int:
    """Bytes of storage behind a `QuantizedCache` or transformers' DynamicCache, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for x in layer.tensors if isinstance(layer, QuantizedLayer) else (layer.keys, layer.values):
            if x is not None and x.numel():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def _joined(quantized: QuantizedStates | None, newest: Tensor) -> Tensor:
    """All tokens (B, H, T, D) in the dtype of the newest."""
    if quantized is None:
        return newest
    batch, heads, n, head_dim = newest.shape
    out = newest.new_empty(batch, heads, quantized.tokens + n, head_dim)
    quantized.dequantize(out[:, :, : quantized.tokens])
    out[:, :, quantized.tokens :] = newest
    return out


def _sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's sliding window, or None where it sees everything."""
    types, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers before 5.20 gives all layers the same
        options = [options] * len(types)
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise CanopyError(
                f"layer {i} is of the kind {kind}, which this cache does not hold; use transformers' DynamicCache"
            )
    return [
        o["sliding_window"] if kind == "sliding_attention" else None for kind, o in zip(types, options, strict=True)
    ]
