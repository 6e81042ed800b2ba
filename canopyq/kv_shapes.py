"""What keys and values the layers of a model have, read from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.cache_utils import get_layer_types_and_kwargs

from canopyq.errors import CanopyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """KV heads of a layer, and numbers a head."""
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
