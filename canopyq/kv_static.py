"""A quantized KV cache of fixed size: `StaticQuantizedCache`. A CUDA graph of a decode step can hold it.

Every tensor is there from the beginning, and how many tokens are held is a number on the device. So a captured step can
be replayed: each replay appends its tokens, reads all of them, and counts on. It needs `fuse_attention`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels.cuda.append import append, store
from canopyq.kv_shapes import heads_of
from canopyq.kv_states import FEW, CachedStates
from canopyq.tensor.kv_codes import BLOCK, GROUP, WINDOW, CacheFormat, QuantizedStates, get_cache_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class StaticLayer(CacheLayerMixin):
    """One layer: codes for ``room`` tokens, and a ring of the newest ones in full precision."""

    is_compileable = True

    def __init__(self, cache: StaticQuantizedCache, shape: tuple[int, int, int], dtype: torch.dtype, device) -> None:
        super().__init__()
        batch, heads, head_dim = shape
        self.cache, bits, room = cache, cache.format.bits, cache.room
        ring = -(-(cache.window + BLOCK - 1 + FEW) // BLOCK) * BLOCK

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(batch, heads, *shape, dtype=dtype, device=device)

        def states(per: str, *scales: int) -> QuantizedStates:
            kind = torch.float8_e4m3fn if cache.format.is_float else torch.uint8
            offset = None if cache.format.is_float else zeros(*scales)
            codes = zeros(room, head_dim * bits // 8, dtype=kind)
            return QuantizedStates(codes, zeros(*scales), offset, cache.format, per)

        self.quantized_keys = states("channel", room // BLOCK, head_dim)
        self.quantized_values = states("token", room, head_dim // min(GROUP, head_dim))
        self.keys, self.values = zeros(ring, head_dim, dtype=dtype), zeros(ring, head_dim, dtype=dtype)
        self.held, self.is_initialized = 0, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (*self.quantized_keys.tensors, *self.quantized_values.tensors, self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        """Append tokens (B, H, n, D): codes for attention to read, or a prompt's own keys and values."""
        count, cache = key_states.shape[2], self.cache
        if self.held + count > cache.room:
            needed = self.held + count
            raise CanopyError(f"the cache has room for {cache.room} tokens, not for {needed}; make a larger one")
        if count > FEW:
            self.take_prompt(key_states, value_states)
            return key_states, value_states
        whole = [x for s in (self.quantized_keys, self.quantized_values) for x in (s.codes, s.scale, s.offset)]
        append(key_states, value_states, self.keys, self.values, *whole, cache.before, cache.format.name, cache.window)
        states = (self.quantized_keys, self.quantized_values, self.keys, self.values)
        seen = StaticStates(*states, cache.before, cache.window, self.held, count)
        self.held += count
        return seen, seen

    def take_prompt(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold a prompt's keys and values (B, H, n, D), of any length, in an empty cache."""
        if self.held:
            raise CanopyError(
                f"a cache of fixed size takes passes of more than {FEW} tokens only when it is empty, and it holds "
                f"{self.held}; use reset(), or QuantizedCache"
            )
        count, ring, name = key_states.shape[2], self.keys.shape[2], self.cache.format.name
        old = max(count - self.cache.window, 0) // BLOCK * BLOCK
        slots = torch.arange(old, count, device=self.keys.device) % ring
        for x, recent, states in (
            (key_states, self.keys, self.quantized_keys),
            (value_states, self.values, self.quantized_values),
        ):
            if old:
                store(x[:, :, :old], 0, name, states.per, states.codes, states.scale, states.offset)
            recent[:, :, slots] = x[:, :, old:]
        self.held = count

    def get_seq_length(self) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.room

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.held = 0


@dataclass(frozen=True, eq=False)
class StaticStates(CachedStates):
    """What a `StaticLayer` hands to attention: its buffers, and on the device how many tokens came before.

    Attributes:
        held: what ``before`` was when the pass was made; in a replay of a graph it is more.
        count: the pass's own tokens.
    """

    held: int = 0
    count: int = 0

    @property
    def tokens(self) -> int:
        return self.held + self.count

    def joined(self) -> tuple[Tensor, Tensor]:
        old = max(self.held - self.window, 0) // BLOCK * BLOCK
        slots = torch.arange(old, self.tokens, device=self.keys.device) % self.keys.shape[2]
        whole = [s.narrow(0, old) if old else None for s in (self.quantized_keys, self.quantized_values)]
        return CachedStates(*whole, self.keys[:, :, slots], self.values[:, :, slots]).joined()


class StaticQuantizedCache(Cache):
    """Keys and values in 8, 4 or 2 bits, in memory that never moves.

    A prompt goes in by one pass into the empty cache; then passes of at most 16 tokens follow, in a CUDA graph or not.
    In a graph give the model ``position_ids`` from `position_ids`, and call `synchronize` after replays before anything
    else looks at the cache's length.

    Args:
        config: the model's, all of its layers with full attention.
        format: ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``.
        batch: sequences.
        length: tokens that it must hold; rounded up to blocks of 64.
        dtype, device: of the model.
        window: so many of the newest tokens stay in full precision, besides those of the block that is not full yet.

    Raises:
        CanopyError: for an unknown format and layers of another kind. `update` raises it for more tokens than fit.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        format: str | CacheFormat = "kv8",
        *,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        window: int = WINDOW,
    ) -> None:
        config, device, dtype = checks.config(config), checks.device(device), checks.dtype("dtype", dtype)
        checks.count("batch", batch, 1), checks.count("length", length, 1), checks.count("window", window)
        types, _ = get_layer_types_and_kwargs(config)
        if other := [kind for kind in types if kind != "full_attention"]:
            raise CanopyError(f"a cache of fixed size is for full attention, not for {other[0]}; use QuantizedCache")
        self.format, self.window, self.room = get_cache_format(format), window, -(-length // BLOCK) * BLOCK
        # Tokens held, and what that was when the pass began that is under way.
        self.count, self.before = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        super().__init__(layers=[StaticLayer(self, (batch, *heads_of(config)), dtype, device) for _ in types])

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

    def take_prompt(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Forget everything and hold a prompt's keys and values (B, H, n, D), of each layer."""
        self.reset()
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.take_prompt(keys, values)
        self.count.fill_(keys.shape[2])

    def synchronize(self) -> int:
        """How many tokens are held, read from the device: after replays of a graph."""
        held = int(self.count)
        for layer in self.layers:
            layer.held = held
        return held

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.count.zero_()
        super().reset()
