"""A KV cache that holds codes: `QuantizedCache`, for ``model.generate(…, past_key_values=…)``, which transformers calls
``cache=…`` from 5.24 on.

What becomes of a token in it, `kv_layer` says. Here layers act together: a pass reaches all of them, or is undone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kv_layer import QuantizedLayer
from canopyq.kv_shapes import heads_of, sliding_windows
from canopyq.kv_states import ATTENTION
from canopyq.tensor.kv_codes import BLOCK, GROUP, WINDOW, CacheFormat, get_cache_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def cache_of(config: PreTrainedConfig) -> str | None:
    """The cache of the recipe by which a model was quantized, if it had one."""
    return getattr(config, "canopyq_cache", None)


class QuantizedCache(Cache):
    """Keys and values of a model's layers in 8, 4 or 2 bits.

    Full-attention and sliding-window layers; of the latter, blocks that the window has passed are dropped.

    Args:
        config: the model's, ``model.config``.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``; None takes the one of the model's recipe, such
            as ``w4a16+kv4``, which its config notes, or else ``"kv8"``.
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
        format: str | CacheFormat | None = None,
        *,
        keys: str = "channel",
        window: int = WINDOW,
        group: int | None = None,
    ) -> None:
        self.config = config = checks.config(config)
        self.format = get_cache_format((cache_of(config) or "kv8") if format is None else format)
        checks.choice("way to quantize keys", keys, ("channel", "token")), checks.count("window", window)
        self.limit = getattr(config, "max_position_embeddings", None)
        windows, layers = sliding_windows(config), []
        self.shapes = [heads_of(each) for each in config.per_layer_config]
        for (_, head_dim), sliding in zip(self.shapes, windows, strict=True):
            size = min(GROUP, head_dim) if group is None else checks.count("group", group, 1)
            if head_dim % size:
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


def as_argument(cache: Cache) -> dict[str, Cache]:
    """What a model's ``forward`` and ``generate`` take a cache as: ``cache`` from transformers 5.24 on, where
    ``past_key_values`` warns, and before that ``past_key_values``, where ``cache`` is refused."""
    return {"cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values": cache}


def cache_nbytes(cache: Cache) -> int:
    """Bytes of storage behind a `QuantizedCache` or transformers' DynamicCache, each storage counted once."""
    storages = {}
    for layer in cache.layers:
        for x in layer.tensors if isinstance(layer, QuantizedLayer) else (layer.keys, layer.values):
            if x is not None and x.numel():
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())
