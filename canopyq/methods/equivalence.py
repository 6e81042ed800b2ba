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
from canopyq.methods.transaction import Transaction

KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # RMS norms with a plain gain, separate q, k, v, and a gated MLP


@dataclass(frozen=True)
class ScalePair:
    """Two sides of a place where channels can be rescaled for free: what is divided there is multiplied here.

    Attributes:
        name: of what makes the channels: a norm or a linear layer.
        producer: that module.
        consumers: layer name -> linear layer that reads the channels.
        groups: consumers' input channels by the producer's channel, (channels of the producer, consumers of each): with
            grouped query attention one value channel is read by several heads.
    """

    name: str
    producer: nn.Module
    consumers: dict[str, nn.Linear]
    groups: Tensor

    def by_producer(self, x: Tensor) -> Tensor:
        """The largest of what the consumers' channels have (K,), for each channel of the producer."""
        return x[self.groups].amax(dim=1)

    def by_consumer(self, scales: Tensor) -> Tensor:
        """One scale for each channel of the producer, as one for each input of the consumers (K,)."""
        spread = torch.empty(self.groups.numel(), device=scales.device, dtype=scales.dtype)
        spread[self.groups] = scales[:, None]
        return spread

    def share(self, x: Tensor) -> Tensor:
        """Give consumers' channels (K,) that one channel of the producer feeds the largest of their values."""
        return self.by_consumer(self.by_producer(x))

    @property
    def is_norm(self) -> bool:
        return not isinstance(self.producer, nn.Linear)


def require_known(model: nn.Module, what: str) -> None:
    """Raise `CanopyError` unless the model's architecture is one of `KNOWN`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise CanopyError(
            f"{what} folds into neighbouring weights, which is not known for {kind or type(model).__name__} models, "
            f"only for {', '.join(KNOWN)}; use gptq, clip or hqq"
        )


def scale_pairs(model: nn.Module, block: str) -> list[ScalePair]:
    """The pairs of one decoder block, in the order in which data passes them."""
    layer = model.get_submodule(block)
    attention, mlp, config = layer.self_attn, layer.mlp, model.config
    size = attention.head_dim
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    repeats = config.num_attention_heads // kv_heads
    heads = torch.arange(kv_heads * repeats * size).reshape(kv_heads, repeats, size)

    def linear(parent: str, *names: str) -> dict[str, nn.Linear]:
        module = getattr(layer, parent)
        return {f"{block}.{parent}.{name}": getattr(module, name) for name in names}

    def plain(producer: nn.Module) -> Tensor:
        return torch.arange(producer.weight.shape[0])[:, None]

    return [
        ScalePair(f"{block}.input_layernorm", layer.input_layernorm, linear("self_attn", "q_proj", "k_proj", "v_proj"),
                  plain(layer.input_layernorm)),
        ScalePair(f"{block}.self_attn.v_proj", attention.v_proj, linear("self_attn", "o_proj"),
                  heads.transpose(1, 2).reshape(kv_heads * size, repeats)),
        ScalePair(f"{block}.post_attention_layernorm", layer.post_attention_layernorm,
                  linear("mlp", "gate_proj", "up_proj"), plain(layer.post_attention_layernorm)),
        ScalePair(f"{block}.mlp.up_proj", mlp.up_proj, linear("mlp", "down_proj"), plain(mlp.up_proj)),
    ]  # fmt: skip


def rescale(pair: ScalePair, scales: Tensor, transaction: Transaction) -> None:
    """Divide the producer's channels by ``scales`` (channels of the producer,), and multiply the consumers' columns by
    them."""
    producer, scales = pair.producer, scales.double()
    if pair.is_norm:
        transaction.change(producer.weight, producer.weight / scales)
    else:
        transaction.change(producer.weight, producer.weight / scales[:, None])
        if producer.bias is not None:
            transaction.change(producer.bias, producer.bias / scales)
    columns = pair.by_consumer(scales)
    for consumer in pair.consumers.values():
        transaction.change(consumer.weight, consumer.weight * columns)


def foldable(pair: ScalePair, scales: Tensor) -> Tensor:
    """``scales`` moved a little, so that a norm's gain divided by them is exact in bfloat16, and the model and its file
    stay equal. They are float64, in which the quotient comes out exact. Channels with a gain of zero carry nothing and
    keep 1."""
    if not pair.is_norm:
        return scales
    gain = pair.producer.weight.double()
    stored = (gain / scales).to(torch.bfloat16).double()
    return torch.where((stored != 0) & stored.isfinite(), gain / stored, torch.ones_like(gain))
