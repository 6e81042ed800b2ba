"""A quantized KV cache of fixed size: `StaticQuantizedCache`. A CUDA graph of a decode step can hold it.

Every tensor is there from the beginning, and how many tokens are held is a number on the device. So a captured step can
be replayed: each replay appends its tokens, reads all of them, and counts on. It needs `fuse_attention`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels.cuda import kv_append
from canopyq.kernels.cuda.attention import MAX_QUERY_TOKENS
from canopyq.kv_cache.layers import check_heads, heads_of
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import KV_BLOCK, KV_RESIDUAL_LENGTH, CacheFormat, get_cache_format, kv_group_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class StaticCacheLayer(CacheLayerMixin):
    """One layer: codes for ``capacity`` tokens, and a ring of the newest ones in full precision.

    Args:
        cache: that it is part of.
        shape: sequences, KV heads, numbers a head.
        dtype, device: of the keys and values.

    Attributes:
        length: tokens appended, as far as this process knows: replays of a graph count on the device.
    """

    is_compileable = True

    def __init__(
        self,
        cache: StaticQuantizedCache,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        batch, heads, head_dim = shape
        ring = -(-(cache.residual_length + KV_BLOCK - 1 + MAX_QUERY_TOKENS) // KV_BLOCK) * KV_BLOCK
        self.cache, self.length, self.is_initialized = cache, 0, True
        self.keys, self.values = (
            torch.zeros(batch, heads, ring, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        codes, group_size = (batch, heads, cache.capacity, head_dim), kv_group_size(head_dim)
        self.quantized_keys = QuantizedKV.zeros(codes, cache.format, "channel", group_size, device)
        self.quantized_values = QuantizedKV.zeros(codes, cache.format, "token", group_size, device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """transformers' caches take their memory here; this one has it from the beginning."""

    @property
    def tensors(self) -> list[Tensor]:
        """All the memory behind it."""
        return self._view(0).tensors

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        """Append tokens (B, H, n, D): a `KVView` for attention to read, or a prompt's own keys and values."""
        count, cache = key_states.shape[2], self.cache
        if self.length + count > cache.capacity:
            raise CanopyError(
                f"the cache has a capacity of {cache.capacity} tokens, not of {self.length + count}; make a larger one"
            )
        if count > MAX_QUERY_TOKENS:
            self.prefill(key_states, value_states)
            return key_states, value_states
        view = self._view(count)
        _check_new(view, key_states, value_states)
        if key_states.device.type == "cuda":
            kv_append.append(key_states, value_states, view)
        else:
            _append(key_states, value_states, view)
        self.length += count
        return view, view

    def prefill(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take a prompt's keys and values (B, H, n, D), of any length, into an empty cache."""
        if self.length:
            raise CanopyError(
                f"a cache of fixed size takes passes of more than {MAX_QUERY_TOKENS} tokens only when it is empty, and "
                f"it holds {self.length}; use reset(), or QuantizedCache"
            )
        count, view = key_states.shape[2], self._view(0)
        old = view.quantized_before(count)
        slots = view.slots(old, count)
        for x, recent, quantized in (
            (key_states, self.keys, self.quantized_keys),
            (value_states, self.values, self.quantized_values),
        ):
            if old:
                quantized.write(0, x[:, :, :old])
            recent[:, :, slots] = x[:, :, old:]
        self.length = count

    def _view(self, new_tokens: int) -> KVView:
        states = (self.quantized_keys, self.quantized_values, self.keys, self.values)
        return KVView(*states, self.cache.before, self.cache.residual_length, self.length, new_tokens)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0


def _check_new(view: KVView, keys: Tensor, values: Tensor) -> None:
    """Refuse new tokens that are not of the cache's kind."""
    batch, heads, _, head_dim = view.keys.shape
    for name, x in (("keys", keys), ("values", values)):
        wanted = ((batch, heads, keys.shape[2], head_dim), view.keys.dtype, view.keys.device)
        if (x.shape, x.dtype, x.device) != wanted:
            raise CanopyError(
                f"the cache is for {batch} sequences of {heads} heads of {head_dim} in {view.keys.dtype} on "
                f"{view.keys.device}, got {name} {tuple(x.shape)} in {x.dtype} on {x.device}"
            )


def _append(keys: Tensor, values: Tensor, view: KVView) -> None:
    """Write new tokens (B, H, n, D) into the ring, and the blocks that are now old enough as codes: what the CUDA
    kernel `kernels.cuda.kv_append` does, in PyTorch."""
    start, stop = int(view.before), int(view.before) + keys.shape[2]
    slots = view.slots(start, stop)
    view.keys[:, :, slots], view.values[:, :, slots] = keys, values
    for token in range(view.quantized_before(start), view.quantized_before(stop), KV_BLOCK):
        block = view.slots(token, token + KV_BLOCK)
        view.quantized_keys.write(token, view.keys[:, :, block])
        view.quantized_values.write(token, view.values[:, :, block])


class StaticQuantizedCache(Cache):
    """Keys and values in 8, 4 or 2 bits, in memory that never moves.

    A prompt goes in by one pass into the empty cache; then passes of at most 16 tokens follow, in a CUDA graph or not.
    In a graph give the model ``position_ids`` from `position_ids`, and call `synchronize` after replays before anything
    else looks at the cache's length.

    Args:
        config: the model's, all of its layers with full attention.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``.
        batch: sequences.
        capacity: tokens that it must hold; rounded up to blocks of 64.
        dtype, device: of the model.
        residual_length: so many of the newest tokens stay in full precision, besides those of the block that is not
            full yet.

    Raises:
        CanopyError: for an unknown format, layers of another kind, and heads that fill no whole bytes. `update`
            raises it for more tokens than fit, and for keys of another model.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        format: str | CacheFormat = "kv8",
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        residual_length: int = KV_RESIDUAL_LENGTH,
    ) -> None:
        config, device, dtype = checks.config(config), checks.device(device), checks.dtype("dtype", dtype)
        checks.count("batch", batch, 1), checks.count("capacity", capacity, 1)
        checks.count("residual_length", residual_length)
        types, _ = get_layer_types_and_kwargs(config)
        if other := [kind for kind in types if kind != "full_attention"]:
            raise CanopyError(f"a cache of fixed size is for full attention, not for {other[0]}; use QuantizedCache")
        self.format, self.residual_length = get_cache_format(format), residual_length
        self.capacity = -(-capacity // KV_BLOCK) * KV_BLOCK
        if (shape := heads_of(config)) is None:
            raise CanopyError(f"a cache of fixed size holds no latents, as {config.model_type} has; use QuantizedCache")
        heads, head_dim = shape
        check_heads(self.format, head_dim)
        # Tokens held, and what that was when the pass began that is under way.
        self.count, self.before = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        super().__init__(layers=[StaticCacheLayer(self, (batch, heads, head_dim), dtype, device) for _ in types])

    @property
    def nbytes(self) -> int:
        """Bytes of storage behind everything held. Read, not computed."""
        return sum(x.untyped_storage().nbytes() for layer in self.layers for x in layer.tensors)

    def position_ids(self, count: int) -> Tensor:
        """Positions (1, count) of the next tokens, computed on the device, so that a replay has its own."""
        return (self.count + torch.arange(count, device=self.count.device, dtype=torch.int32))[None].long()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        """Append a layer's tokens (B, H, n, D): what attention is to read."""
        if layer_idx == 0:
            self.before.copy_(self.count)
        seen = self.layers[layer_idx].update(key_states, value_states)
        if layer_idx == len(self.layers) - 1:
            self.count += key_states.shape[2]  # the last layer's attention still reads `before`
        return seen

    def prefill(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Forget everything and take a prompt's keys and values (B, H, n, D), of each layer."""
        self.reset()
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.prefill(keys, values)
        self.count.fill_(keys.shape[2])

    def synchronize(self) -> int:
        """How many tokens are held, read from the device: after replays of a graph."""
        length = int(self.count)
        for layer in self.layers:
            layer.length = length
        return length

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.count.zero_()
        super().reset()
