"""What of a decoder block may be rescaled or rotated without changing the model, for the architectures where it is
known.

Between a norm's gain and the linear layers that read the norm, between v_proj and o_proj, and between up_proj and
down_proj, a channel may be divided by any number on one side and multiplied by it on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError
from canopyq.methods.undo import Undo

KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # RMS norms with a plain gain, separate q, k, v, and a gated MLP


@dataclass(frozen=True)
class Site:
    """A place where channels can be rescaled for free.

    Attributes:
        name: of what makes the channels: a norm or a linear layer.
        maker: that module.
        readers: layer name -> linear layer that reads the channels.
        groups: readers' input channels by the maker's channel, (channels of the maker, readers of each): with grouped
            query attention one value channel is read by several heads.
    """

    name: str
    maker: nn.Module
    readers: dict[str, nn.Linear]
    groups: Tensor

    def by_maker(self, x: Tensor) -> Tensor:
        """The largest of what the readers' channels have (K,), for each channel of the maker."""
        return x[self.groups].amax(dim=1)

    def by_reader(self, scales: Tensor) -> Tensor:
        """One scale for each channel of the maker, as one for each input of the readers (K,)."""
        spread = torch.empty(self.groups.numel(), device=scales.device, dtype=scales.dtype)
        spread[self.groups] = scales[:, None]
        return spread

    def share(self, x: Tensor) -> Tensor:
        """Give readers' channels (K,) that one channel of the maker feeds the largest of their values."""
        return self.by_reader(self.by_maker(x))

    @property
    def is_norm(self) -> bool:
        return not isinstance(self.maker, nn.Linear)


def require_known(model: nn.Module, what: str) -> None:
    """Raise `CanopyError` unless the model's architecture is one of `KNOWN`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise CanopyError(
            f"{what} folds into neighbouring weights, which is not known for {kind or type(model).__name__} models, "
            f"only for {', '.join(KNOWN)}; use gptq, clip or hqq"
        )


def sites(model: nn.Module, block: str) -> list[Site]:
    """The sites of one decoder block, in the order in which data passes them."""
    layer = model.get_submodule(block)
    attention, mlp, config = layer.self_attn, layer.mlp, model.config
    size = attention.head_dim
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    repeats = config.num_attention_heads // kv_heads
    heads = torch.arange(kv_heads * repeats * size).reshape(kv_heads, repeats, size)

    def linear(parent: str, *names: str) -> dict[str, nn.Linear]:
        module = getattr(layer, parent)
        return {f"{block}.{parent}.{name}": getattr(module, name) for name in names}

    def plain(maker: nn.Module) -> Tensor:
        return torch.arange(maker.weight.shape[0])[:, None]

    return [
        Site(f"{block}.input_layernorm", layer.input_layernorm, linear("self_attn", "q_proj", "k_proj", "v_proj"),
             plain(layer.input_layernorm)),
        Site(f"{block}.self_attn.v_proj", attention.v_proj, linear("self_attn", "o_proj"),
             heads.transpose(1, 2).reshape(kv_heads * size, repeats)),
        Site(f"{block}.post_attention_layernorm", layer.post_attention_layernorm, linear("mlp", "gate_proj", "up_proj"),
             plain(layer.post_attention_layernorm)),
        Site(f"{block}.mlp.up_proj", mlp.up_proj, linear("mlp", "down_proj"), plain(mlp.up_proj)),
    ]  # fmt: skip


def rescale(site: Site, scales: Tensor, undo: Undo) -> None:
    """Divide the maker's channels by ``scales`` (channels of the maker,) and multiply the readers' columns by them."""
    maker, scales = site.maker, scales.double()
    if site.is_norm:
        undo.change(maker.weight, maker.weight / scales)
    else:
        undo.change(maker.weight, maker.weight / scales[:, None])
        if maker.bias is not None:
            undo.change(maker.bias, maker.bias / scales)
    columns = site.by_reader(scales)
    for reader in site.readers.values():
        undo.change(reader.weight, reader.weight * columns)


def foldable(site: Site, scales: Tensor) -> Tensor:
    """``scales`` moved a little, so that a norm's gain divided by them is exact in bfloat16, and the model and its file
    stay equal. They are float64, in which the quotient comes out exact. Channels with a gain of zero carry nothing and
    keep 1."""
    if not site.is_norm:
        return scales
    gain = site.maker.weight.double()
    stored = (gain / scales).to(torch.bfloat16).double()
    return torch.where((stored != 0) & stored.isfinite(), gain / stored, torch.ones_like(gain))
