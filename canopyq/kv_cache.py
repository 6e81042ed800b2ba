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
            context holds; the cache is then as it was before the pass. After a pass that was interrupted the next use
            raises it, and finds the cache as it was before that one.
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
        self.limit = getattr(config, "max_position_embeddings", None)
        windows, layers = _sliding_windows(config), []
        self.shapes = [_shape(each) for each in config.per_layer_config]
        for (_, head_dim), sliding in zip(self.shapes, windows, strict=True):
            size = min(GROUP, head_dim) if group is None else group
            if not isinstance(size, int) or size < 1 or head_dim % size:
                raise CanopyError(
                    f"groups of {size} channels do not divide heads of {head_dim}; use one that does, such as group="
                    f"{next(g for g in range(min(GROUP, head_dim), 0, -1) if head_dim % g == 0)}"
                )
            if head_dim * self.format.bits % 8:
                raise CanopyError(f"heads of {head_dim} codes of {self.format.bits} bits fill no whole bytes; use kv8")
            layers.append(QuantizedLayer(self.format, keys, size, window, sliding))
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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are held, without those of a pass that was interrupted."""
        return self.layers[layer_idx].finished_length() if layer_idx < len(self.layers) else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append a layer's tokens (B, H, n, D); all of its keys and values, as attention is to see them."""
        if layer_idx == 0:
            self._check_finished()
        try:
            self._check(key_states, value_states, layer_idx)
            layer = self.layers[layer_idx]
            layer.gives_codes = self.config._attn_implementation == ATTENTION
            seen = layer.update(key_states, value_states, *args, **kwargs)
        except CanopyError:
            self._undo()
            raise
        if layer_idx == len(self.layers) - 1:
            for layer in self.layers:
                layer.commit()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, see `QuantizedLayer.crop`: in all layers, or if one cannot, in none."""
        self._check_finished()
        for layer in self.layers:
            layer.left_after(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._check_finished()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._check_finished()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._check_finished()
        super().batch_select_indices(indices)

    def copy(self) -> QuantizedCache:
        """A cache that goes on from the same tokens on its own. What both hold is held once."""
        self._check_finished()
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def __repr__(self) -> str:
        return f"QuantizedCache({self.format.name}, {self.get_seq_length()} tokens, {self.nbytes} bytes)"

    def _undo(self) -> None:
        for layer in self.layers:
            layer.undo()

    def _check_finished(self) -> None:
        """Between two passes. One that was interrupted, or was another model's, may have left tokens in some layers."""
        if done := sum(layer._before is not None for layer in self.layers):
            self._undo()
            raise CanopyError(
                f"the pass before reached {done} of the cache's {len(self.layers)} layers and was undone; if nothing "
                "interrupted it, the cache belongs to another model: make one from this model's config"
            )

    def _check(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        if layer_idx >= len(self.layers):
            self.reset()
            raise CanopyError(
                f"the cache is for {len(self.layers)} layers, and a model with more used it; it was emptied: make one "
                "from this model's config"
            )
        expected = self.shapes[layer_idx]
        for name, x in (("keys", keys), ("values", values)):
            if x.dim() != 4 or (x.shape[1], x.shape[3]) != expected:
                got = f"{x.shape[1]} heads of {x.shape[3]}" if x.dim() == 4 else f"a tensor {tuple(x.shape)}"
                raise CanopyError(
                    f"the cache is for {expected[0]} heads of {expected[1]}, and got {name} of {got}; make one from "
                    "this model's config, or use transformers' DynamicCache"
                )
        if _kind(keys) != _kind(values) or keys.shape != values.shape or not keys.is_floating_point():
            raise CanopyError(
                f"keys are {_words(keys)} and values {_words(values)}; a cache takes both alike, as floats"
            )
        layer = self.layers[layer_idx]
        if layer.is_initialized and (len(keys), *_kind(keys)) != (len(layer.keys), layer.dtype, layer.device):
            raise CanopyError(
                f"the cache holds {len(layer.keys)} chats in {layer.dtype} on {layer.device}, and got {len(keys)} in "
                f"{keys.dtype} on {keys.device}; start a new one, or use reset()"
            )
        tokens = layer.get_seq_length() + keys.shape[2]
        if self.limit is not None and tokens > self.limit:
            raise CanopyError(
                f"{tokens} tokens are more than the model's context of {self.limit}; shorten the chat, or start a new "
                "one with a new cache"
            )


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device


def _words(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


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


def _shape(config: PreTrainedConfig) -> tuple[int, int]:
    """KV heads of a layer, and numbers a head."""
    heads = config.num_attention_heads
    one_for_all = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kv_heads = 1 if one_for_all else getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's sliding window, or None where it sees everything."""
    types, options = get_layer_types_and_kwargs(config)
    types = [*types, *["dummy"] * (config.num_hidden_layers - len(types))]  # before 5.20 those are left out
    if isinstance(options, dict):  # transformers before 5.20 gives all layers the same
        options = [options] * len(types)
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            what = "reads another layer's keys" if kind == "dummy" else f"is of the kind {kind}"
            raise CanopyError(f"layer {i} {what}, which this cache does not hold; use transformers' DynamicCache")
    return [
        o["sliding_window"] if kind == "sliding_attention" else None for kind, o in zip(types, options, strict=True)
    ]
