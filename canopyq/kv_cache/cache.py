"""A KV cache that holds codes: `QuantizedCache`, for ``model.generate(…, past_key_values=…)``, which transformers calls
``cache=…`` from 5.24 on.

What becomes of a token in it, `layers` says. Here layers act together: a pass reaches all of them, or is undone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kv_cache.layers import (
    RECURRENT_KINDS,
    QuantizedCacheLayer,
    check_heads,
    heads_of,
    layer_kinds,
    make_layer,
    state_tensors,
    states_of,
)
from canopyq.tensor.formats import KV_BLOCK, KV_RESIDUAL_LENGTH, CacheFormat, get_cache_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = "canopyq"  # the attention implementation that reads codes, see `kv_cache.attention`


def cache_of(config: PreTrainedConfig) -> str | None:
    """The cache of the recipe by which a model was quantized, if it had one."""
    return getattr(config, "canopyq_cache", None)


class QuantizedCache(Cache):
    """Keys and values of a model's layers in 8, 4 or 2 bits.

    Layers with full, sliding-window and chunked attention; where a window has passed blocks, they are dropped. Latents
    in the place of keys and values (MLA) are quantized as they are. Recurrent states of hybrid models (convolutions,
    linear attention, Mamba) do not grow: they stay in transformers' own layers.

    Args:
        config: the model's, ``model.config``.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``; None takes the one of the model's recipe, such as
            ``w4a16+kv4``, which its config notes, or else ``"kv8"``.
        key_granularity: ``"channel"``: a key channel has a scale for each block of 64 tokens; ``"token"``: keys are
            quantized like values, with a scale for each group of a token's channels.
        residual_length: so many of the newest tokens stay in full precision, besides those of the block that is not
            full yet. Attention looks at them most.
        group_size: channels of a token that share a scale; None takes the largest number up to 64 that divides a head.

    Raises:
        CanopyError: for an unknown format, a head that the group does not divide, and a model without keys and values
            or with layers of another kind. `update` raises it for keys of another model, and for more tokens than the
            model's context holds; the cache is then as it was before the pass. After a pass that was interrupted the
            next use raises it, and finds the cache as it was before that one.
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
        self.group_size = None if group_size is None else checks.count("group_size", group_size, 1)
        self.limit = checks.context(config)
        kinds = layer_kinds(config)
        own = {"format": self.format, "key_granularity": key_granularity, "group_size": self.group_size}
        own["residual_length"] = residual_length
        configs = config.per_layer_config[: len(kinds)]  # before 5.20 layers that hold nothing are left out at the end
        layers = [make_layer(*kind, each, **own) for kind, each in zip(kinds, configs, strict=True)]
        self.attention = [i for i, layer in enumerate(layers) if isinstance(layer, QuantizedCacheLayer)]
        self.recurrent = [i for i, (kind, _) in enumerate(kinds) if kind in RECURRENT_KINDS]
        self.shapes = [heads_of(each) if i in self.attention else None for i, each in enumerate(configs)]
        for _, head_dim in filter(None, self.shapes):
            check_heads(self.format, head_dim, self.group_size)
        # Which parts of which layers the pass under way has reached, and the states of recurrent ones before it.
        self._reached: dict[int, set[str]] = {}
        self._states: dict[int, dict] = {}
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind everything held between passes. Read, not computed."""
        return cache_nbytes(self)

    @property
    def tokens_until_flush(self) -> int:
        """How many tokens fit before the next block is quantized: those of one pass that see each other as they are."""
        layer = self.layers[self.attention[0]]
        waiting = 0 if layer.keys is None else layer.keys.shape[2]
        return layer.residual_length + KV_BLOCK - waiting

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are held, without those of a pass that was interrupted. Of the first layer with attention,
        if ``layer_idx`` has none."""
        if layer_idx >= len(self.layers):
            return 0
        if self._all_reached():
            self._commit()
        return self.layers[layer_idx if layer_idx in self.attention else self.attention[0]].finished_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys a pass over so many new tokens sees in a layer, and the position of the first. Of the first
        layer with attention, if ``layer_idx`` has none."""
        return super().get_mask_sizes(query_length, layer_idx if layer_idx in self.attention else self.attention[0])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append a layer's tokens (B, H, n, D); all of its keys and values, as attention is to see them."""
        self._enter(layer_idx, "attention")
        try:
            self._check(key_states, value_states, layer_idx)
            layer = self.layers[layer_idx]
            layer.return_quantized = self.config._attn_implementation == ATTENTION
            seen = layer.update(key_states, value_states, *args, **kwargs)
        except CanopyError:
            self._undo()
            raise
        if layer_idx not in self.recurrent and self._all_reached():  # what comes after it in a recurrent layer, may too
            self._commit()
        return seen

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Of a recurrent layer, see transformers' Cache. Models write into it."""
        self._enter(layer_idx, f"convolution's inputs {state_idx}")
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Of a recurrent layer, see transformers' Cache. Models write into it."""
        self._enter(layer_idx, f"state {state_idx}")
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs) -> Tensor:
        """Of a recurrent layer, see transformers' Cache."""
        self._enter(layer_idx, f"convolution's inputs {state_idx}, new")
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs) -> Tensor:
        """Of a recurrent layer, see transformers' Cache."""
        self._enter(layer_idx, f"state {state_idx}, new")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        self._reached, self._states = {}, {}
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, see `QuantizedCacheLayer.crop`: in all layers, or if one cannot, in none."""
        self._check_finished()
        for i in self.recurrent:
            layer = self.layers[i]
            if any(layer.is_recurrent_states_initialized.values()) or not layer.record_past or tokens_to_remove > 0:
                raise CanopyError(
                    f"the cache cannot be cropped by {tokens_to_remove}: layer {i} has a recurrent state, in which all "
                    "tokens are one; start a new cache"
                )
        for i in self.attention:
            self.layers[i].left_after(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._check_finished()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._check_rows()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._check_rows()
        super().batch_select_indices(indices)

    def copy(self) -> QuantizedCache:
        """A cache that goes on from the same tokens on its own. What both hold is held once, but for recurrent states,
        which change in place."""
        self._check_finished()
        other = copy.copy(self)
        other._reached, other._states = {}, {}
        other.layers = [
            layer.copy() if isinstance(layer, QuantizedCacheLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return other

    def __repr__(self) -> str:
        return f"QuantizedCache({self.format.name}, {self.get_seq_length()} tokens, {self.nbytes} bytes)"

    def _enter(self, layer_idx: int, part: str) -> None:
        """A pass reaches a part of a layer, each once and layer by layer: whatever else comes is the next pass."""
        if layer_idx not in (self.attention if part == "attention" else self.recurrent):
            self.reset()
            raise CanopyError(
                f"the model's layer {layer_idx} is of another kind than the cache's, which is for {len(self.layers)} "
                "layers; it was emptied: make one from this model's config"
            )
        if self._reached and (layer_idx < next(reversed(self._reached)) or part in self._reached.get(layer_idx, ())):
            self._check_finished()
        self._reached.setdefault(layer_idx, set()).add(part)
        if layer_idx in self.recurrent and layer_idx not in self._states:
            self._states[layer_idx] = states_of(self.layers[layer_idx])

    def _all_reached(self) -> bool:
        return len(self._reached) == len({*self.attention, *self.recurrent})

    def _commit(self) -> None:
        """All layers have their tokens: there is no way back behind them."""
        for i in self.attention:
            self.layers[i].commit()
        self._reached, self._states = {}, {}

    def _undo(self) -> None:
        for i in self.attention:
            self.layers[i].undo()
        for i, states in self._states.items():
            vars(self.layers[i]).update(states)
        self._reached, self._states = {}, {}

    def _check_finished(self) -> None:
        """Between two passes. One that was interrupted, or was another model's, may have left tokens in some layers."""
        if self._all_reached():
            self._commit()
        if done := len(self._reached):
            self._undo()
            raise CanopyError(
                f"the pass before reached {done} of the cache's {len(self.layers)} layers and was undone; if nothing "
                "interrupted it, the cache belongs to another model: make one from this model's config"
            )

    def _check_rows(self) -> None:
        self._check_finished()
        if self.recurrent:
            raise CanopyError(
                f"layer {self.recurrent[0]} has a recurrent state, of which transformers repeats and selects no "
                "sequences; use reorder_cache, or a cache for each"
            )

    def _shape(self, layer_idx: int, name: str) -> tuple[int, int] | None:
        """Heads, and numbers a head, of a layer's keys or values. Latents have what the first pass brings; before that
        it is None."""
        layer, shape = self.layers[layer_idx], self.shapes[layer_idx]
        if shape is None and layer.is_initialized:
            x = getattr(layer, name)
            shape = (x.shape[1], x.shape[3])
        return shape

    def _check(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        layer = self.layers[layer_idx]
        for name, x in (("keys", keys), ("values", values)):
            expected = self._shape(layer_idx, name)
            if x.dim() != 4 or (expected or (x.shape[1], x.shape[3])) != (x.shape[1], x.shape[3]):
                kind = f"{expected[0]} heads of {expected[1]}" if expected else "latents of four dimensions"
                got = f"{x.shape[1]} heads of {x.shape[3]}" if x.dim() == 4 else f"a tensor {tuple(x.shape)}"
                raise CanopyError(
                    f"the cache is for {kind}, and got {name} of {got}; make one from this model's config, or use "
                    "transformers' DynamicCache"
                )
            if expected is None:
                check_heads(self.format, x.shape[3], self.group_size)
        if _kind(keys) != _kind(values) or keys.shape[:3] != values.shape[:3] or not keys.is_floating_point():
            raise CanopyError(
                f"keys are {_words(keys)} and values {_words(values)}; a cache takes both alike, as floats"
            )
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


def _kind(x: Tensor) -> tuple:
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
        tensors = (
            layer.tensors
            if isinstance(layer, QuantizedCacheLayer)
            else [getattr(layer, name, None) for name in ("keys", "values")]
        )
        states = state_tensors(layer) if hasattr(layer, "conv_states") else ()
        for x in (*tensors, *states):
            if x is not None and x.numel():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())
