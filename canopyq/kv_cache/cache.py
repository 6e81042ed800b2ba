"""A KV cache that holds codes: `QuantizedCache`, for ``model.generate(…, past_key_values=…)``, which transformers calls
``cache=…`` from 5.24 on, and its layers.

Tokens wait in full precision until 64 of them are together and 32 newer ones have come; then the block is quantized,
once and for good. Attention reads what the codes stand for. A pass over many new tokens sees those as they are, and
what earlier passes left as the cache holds it. Layers act together: a pass reaches all of them, or is undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels.cuda.attention import MAX_QUERY_TOKENS
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import KV_BLOCK, KV_GROUP_SIZE, KV_RESIDUAL_LENGTH, CacheFormat, get_cache_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = "canopyq"  # the attention implementation that reads codes, see `kv_cache.attention`


def cache_of(config: PreTrainedConfig) -> str | None:
    """The cache of the recipe by which a model was quantized, if it had one."""
    return getattr(config, "canopyq_cache", None)


class QuantizedCache(Cache):
    """Keys and values of a model's layers in 8, 4 or 2 bits.

    Full-attention and sliding-window layers; of the latter, blocks that the window has passed are dropped.

    Args:
        config: the model's, ``model.config``.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``; None takes the one of the model's recipe, such as
            ``w4a16+kv4``, which its config notes, or else ``"kv8"``.
        key_granularity: ``"channel"``: a key channel has a scale for each block of 64 tokens; ``"token"``: keys are
            quantized like values, with a scale for each group of a token's channels.
        residual_length: so many of the newest tokens stay in full precision, besides those of the block that is not
            full yet. Attention looks at them most.
        group_size: channels of a token that share a scale; None takes 64, or all of a smaller head.

    Raises:
        CanopyError: for an unknown format, a head that the group does not divide, and layers of another kind, such as
            linear attention. `update` raises it for keys of another model, and for more tokens than the model's
            context holds; the cache is then as it was before the pass. After a pass that was interrupted the next use
            raises it, and finds the cache as it was before that one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        format: str | CacheFormat | None = None,
        *,
        key_granularity: str = "channel",
        residual_length: int = KV_RESIDUAL_LENGTH,
        group_size: int | None = None,
    ) -> None:
        self.config = config = checks.config(config)
        self.format = get_cache_format((cache_of(config) or "kv8") if format is None else format)
        checks.choice("granularity of keys", key_granularity, ("channel", "token"))
        checks.count("residual_length", residual_length)
        self.limit = getattr(config, "max_position_embeddings", None)
        windows, layers = sliding_windows(config), []
        self.shapes = [heads_of(each) for each in config.per_layer_config]
        for (_, head_dim), sliding in zip(self.shapes, windows, strict=True):
            size = min(KV_GROUP_SIZE, head_dim) if group_size is None else checks.count("group_size", group_size, 1)
            if head_dim % size:
                fits = next(g for g in range(min(KV_GROUP_SIZE, head_dim), 0, -1) if head_dim % g == 0)
                raise CanopyError(
                    f"groups of {size} channels do not divide heads of {head_dim}; use one that does, such as "
                    f"group_size={fits}"
                )
            if head_dim * self.format.bits % 8:
                raise CanopyError(f"heads of {head_dim} codes of {self.format.bits} bits fill no whole bytes; use kv8")
            layers.append(QuantizedCacheLayer(self.format, key_granularity, size, residual_length, sliding))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind everything held. Read, not computed."""
        return cache_nbytes(self)

    @property
    def tokens_until_flush(self) -> int:
        """How many tokens fit before the next block is quantized: those of one pass that see each other as they are."""
        layer = self.layers[0]
        waiting = 0 if layer.keys is None else layer.keys.shape[2]
        return layer.residual_length + KV_BLOCK - waiting

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
            layer.return_quantized = self.config._attn_implementation == ATTENTION
            seen = layer.update(key_states, value_states, *args, **kwargs)
        except CanopyError:
            self._undo()
            raise
        if layer_idx == len(self.layers) - 1:
            for layer in self.layers:
                layer.commit()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, see `QuantizedCacheLayer.crop`: in all layers, or if one cannot, in none."""
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


class QuantizedCacheLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, T, D).

    Args:
        format: of the codes.
        key_granularity, group_size, residual_length: see `QuantizedCache`.
        sliding_window: how many tokens attention sees, the newest included; None for all.

    Attributes:
        keys, values: the newest tokens, in full precision (B, H, R, D).
        quantized_keys, quantized_values: the tokens before them as `QuantizedKV`, or None.
        dropped: how many tokens before those a sliding window has passed.
        return_quantized: whether attention takes a `KVView` for a pass over at most 16 tokens.
    """

    is_croppable = True

    def __init__(
        self,
        format: CacheFormat,
        key_granularity: str,
        group_size: int,
        residual_length: int,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.format, self.key_granularity = format, key_granularity
        self.group_size, self.residual_length = group_size, residual_length
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.record_past = self.return_quantized = False
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
        """All the memory behind it: what is quantized, then the newest keys and values."""
        stored = [x.tensors for x in (self.quantized_keys, self.quantized_values) if x is not None]
        return (*sum(stored, ()), *(x for x in (self.keys, self.values) if x is not None))

    def get_seq_length(self) -> int:
        """How many tokens have been appended, those that a sliding window has passed included."""
        return self.dropped + self._tokens

    def finished_length(self) -> int:
        """How many tokens have been appended by passes that reached all layers."""
        if self._before is None:
            return self.get_seq_length()
        keys, _, quantized = self._before
        return self.dropped + quantized + keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a pass over so many new tokens sees, and the position of the first."""
        return self._tokens + query_length, self.dropped

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        """Append tokens (B, H, n, D); all keys and all values, as attention is to see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._before = (self.keys, self.values, self.quantized_tokens)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        view = KVView(self.quantized_keys, self.quantized_values, self.keys, self.values)
        few = self.quantized_tokens and key_states.shape[2] <= MAX_QUERY_TOKENS
        seen = (view, view) if self.return_quantized and few else view.dequantized()
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
        block, inside = divmod(left - self.dropped, KV_BLOCK)
        if left == length or left - self.dropped >= self.quantized_tokens:
            return left
        if self.dropped and left - self.dropped < self.sliding_window - 1:
            raise CanopyError(
                f"the cache cannot go back to {left} tokens: of those before token {self.dropped} the sliding "
                "window has passed; start a new cache"
            )
        if inside:
            start = self.dropped + block * KV_BLOCK
            raise CanopyError(
                f"the cache cannot go back to {left} tokens, in the middle of a quantized block; crop to {start} and "
                f"feed {inside} again, or make it with residual_length={KV_BLOCK} to keep more of them as they are"
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
    def _tokens(self) -> int:
        return self.quantized_tokens + (0 if self.keys is None else self.keys.shape[2])

    def _quantize_full_blocks(self) -> None:
        waiting = self.keys.shape[2] - self.residual_length - (KV_BLOCK if self.record_past else 0)
        n = waiting // KV_BLOCK * KV_BLOCK
        if n <= 0:
            return
        keys = QuantizedKV.quantize(self.keys[:, :, :n], self.format, self.key_granularity, self.group_size)
        values = QuantizedKV.quantize(self.values[:, :, :n], self.format, "token", self.group_size)
        first = self.quantized_keys is None
        self.quantized_keys = keys if first else self.quantized_keys.append(keys)
        self.quantized_values = values if first else self.quantized_values.append(values)
        self.keys, self.values = self.keys[:, :, n:].clone(), self.values[:, :, n:].clone()

    def _drop_what_slid_out(self) -> None:
        """Forget whole blocks that no coming token sees; the next one sees ``sliding_window − 1`` before itself."""
        out = (self._tokens - self.sliding_window + 1) // KV_BLOCK * KV_BLOCK
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


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """KV heads of a layer, and numbers a head, as its config says."""
    heads = config.num_attention_heads
    one_for_all = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kv_heads = 1 if one_for_all else getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's sliding window, or None where it sees everything.

    Raises:
        CanopyError: for a layer of another kind, or one that reads another's keys.
    """
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


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device


def _words(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def as_argument(cache: Cache) -> dict[str, Cache]:
    """What a model's ``forward`` and ``generate`` take a cache as: ``cache`` from transformers 5.24 on, where
    ``past_key_values`` warns, and before that ``past_key_values``, where ``cache`` is refused."""
    return {"cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values": cache}


def cache_nbytes(cache: Cache) -> int:
    """Bytes of storage behind a `QuantizedCache` or transformers' DynamicCache, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for x in layer.tensors if isinstance(layer, QuantizedCacheLayer) else (layer.keys, layer.values):
            if x is not None and x.numel():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())
