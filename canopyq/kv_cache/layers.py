"""The layers of a KV cache that holds codes: `QuantizedCacheLayer`, the same beside a recurrent state, and which of
them, or of transformers' own, a model's layers need.

Tokens wait in full precision until 64 of them are together and 32 newer ones have come; then the block is quantized,
once and for good. Attention reads what the codes stand for. A pass over many new tokens sees those as they are, and
what earlier passes left as the cache holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer, get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from canopyq.errors import CanopyError
from canopyq.kernels.cuda.attention import MAX_QUERY_TOKENS
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import KV_BLOCK, CacheFormat, kv_group_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WINDOWS = ("sliding_attention", "chunked_attention", "hybrid_sliding")  # kinds that see so many of the newest tokens
ATTENTION_KINDS = ("full_attention", *WINDOWS, "hybrid")
RECURRENT_KINDS = ("conv", "linear_attention", "hybrid", "hybrid_sliding")
EMPTY_KINDS = ("dummy", "moe", "mlp")  # hold nothing: no attention, or another layer's keys


class QuantizedCacheLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, T, D).

    Args:
        format: of the codes.
        key_granularity, group_size, residual_length: see `QuantizedCache`.
        sliding_window: how many tokens attention sees, the newest included; None for all.
        value_granularity: of what stands in the place of values.

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
        group_size: int | None,
        residual_length: int,
        sliding_window: int | None = None,
        value_granularity: str = "token",
    ) -> None:
        super().__init__()
        self.format, self.key_granularity, self.value_granularity = format, key_granularity, value_granularity
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
        keys = self._quantize(self.keys[:, :, :n], self.key_granularity)
        values = self._quantize(self.values[:, :, :n], self.value_granularity)
        first = self.quantized_keys is None
        self.quantized_keys = keys if first else self.quantized_keys.append(keys)
        self.quantized_values = values if first else self.quantized_values.append(values)
        self.keys, self.values = self.keys[:, :, n:].clone(), self.values[:, :, n:].clone()

    def _quantize(self, x: Tensor, granularity: str) -> QuantizedKV:
        return QuantizedKV.quantize(x, self.format, granularity, kv_group_size(x.shape[3], self.group_size))

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

    def copy(self) -> QuantizedCacheLayer:
        """A layer that goes on from the same tokens on its own; no tensor of it is changed in place."""
        return copy.copy(self)


class QuantizedHybridLayer(LinearAttentionLayer, QuantizedCacheLayer):
    """A layer with attention beside a recurrent state: keys and values as codes, the state as transformers keeps it.

    Args:
        number_of_states: of each kind, see transformers' LinearAttentionLayer.
        options: of `QuantizedCacheLayer`.
    """

    is_compileable = is_croppable = False

    def __init__(self, number_of_states: int = 1, **options: Any) -> None:
        QuantizedCacheLayer.__init__(self, **options)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Tensor, **states: Any) -> None:
        (LinearAttentionLayer if states else QuantizedCacheLayer).lazy_initialization(self, *args, **states)

    def reset(self) -> None:
        """Forget everything."""
        QuantizedCacheLayer.reset(self)
        if hasattr(self, "conv_states"):  # not while it is made
            LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        QuantizedCacheLayer.reorder_cache(self, beam_idx)

    def copy(self) -> QuantizedHybridLayer:
        other = copy.copy(self)
        vars(other).update(states_of(self))
        return other


def states_of(layer: LinearAttentionLayer) -> dict[str, Any]:
    """A copy of what a recurrent layer changes in place, by the names of its attributes."""

    def copied(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x

    names = [name for name, value in vars(LinearAttentionLayer()).items() if isinstance(value, dict)]
    return {name: {i: copied(x) for i, x in getattr(layer, name).items()} for name in names}


def state_tensors(layer: LinearAttentionLayer) -> list[Tensor]:
    """All the memory behind a recurrent layer's states."""
    return [x for x in (*layer.conv_states.values(), *layer.recurrent_states.values()) if x is not None]


def heads_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """KV heads of a layer, and numbers a head, as its config says; None if it holds latents (MLA) of another shape."""
    if getattr(config, "kv_lora_rank", None):
        return None
    heads = config.num_attention_heads
    one_for_all = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kv_heads = 1 if one_for_all else getattr(config, "num_key_value_heads", None) or heads
    own = getattr(config, "head_dim", None) or getattr(config, "attention_head_dim", None)
    return kv_heads, own or config.hidden_size // heads


def check_heads(format: CacheFormat, head_dim: int, group_size: int | None = None) -> None:
    """Raise `CanopyError` unless the codes of a head fill whole bytes, and groups of channels whole heads."""
    kv_group_size(head_dim, group_size)
    if head_dim * format.bits % 8:
        raise CanopyError(f"heads of {head_dim} codes of {format.bits} bits fill no whole bytes; use kv8")


def layer_kinds(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """What transformers calls each layer from the view of a cache, and the options that such a layer takes.

    Raises:
        CanopyError: for a layer of a kind that `QuantizedCache` does not hold.
    """
    if config.model_type in ("minimax", "recurrent_gemma"):
        raise CanopyError(f"{config.model_type} keeps states beside its cache or in one of its own; use transformers'")
    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(made, type) and "past_key_values" not in signature(made.forward).parameters:
        raise CanopyError(f"a {made.__name__} takes no cache of keys and values; generate without one")
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers before 5.20 gives all layers the same
        options = [options] * len(kinds)
    for i, kind in enumerate(kinds):
        if kind not in (*ATTENTION_KINDS, *RECURRENT_KINDS, *EMPTY_KINDS):
            raise CanopyError(
                f"layer {i} is of the kind {kind}, which this cache does not hold; use transformers' DynamicCache"
            )
    if set(kinds) & set(RECURRENT_KINDS) and not hasattr(cache_utils.Cache, "get_conv_state"):
        raise CanopyError(
            f"{config.model_type} has recurrent states, which transformers {transformers.__version__} lets models "
            "change behind a cache's back; install a newer one"
        )
    if not set(kinds) & set(ATTENTION_KINDS):
        raise CanopyError(f"no layer of this {config.model_type} has keys and values; use transformers' DynamicCache")
    return list(zip(kinds, options, strict=True))


def make_layer(kind: str, options: dict[str, Any], config: PreTrainedConfig, **own: Any) -> Any:
    """A layer of a cache: with codes where it has keys and values, else transformers' own.

    Args:
        kind, options: from `layer_kinds`.
        config: of the layer.
        own: options of `QuantizedCacheLayer`.
    """
    if kind not in ATTENTION_KINDS:
        return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
    if getattr(config, "kv_lora_rank", None):  # keys in two parts: latents, and what rotary embedding has turned
        own["value_granularity"] = own["key_granularity"]
    own["sliding_window"] = options["sliding_window"] if kind in WINDOWS else None
    if kind in RECURRENT_KINDS:
        return QuantizedHybridLayer(options["number_of_states"], **own)
    return QuantizedCacheLayer(**own)
