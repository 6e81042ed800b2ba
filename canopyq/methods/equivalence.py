"""Changes to neighbouring weights that leave what a model computes as it is.

Between a norm's gain and the linear layers that read the norm, and between two linear layers with nothing but products
between them, as v_proj and o_proj or up_proj and down_proj, a channel may be divided by any number on one side and
multiplied by it on the other. `structure` finds such places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq.methods.transaction import Transaction


@dataclass(frozen=True)
class ScalePair:
    """Two sides of a place where channels can be rescaled for free: what is divided there is multiplied here.

    All tensors are views of what the model holds.

    Attributes:
        name: of what makes the channels: a norm or a linear layer.
        gain: of the norm (channels,), or the rows of the linear layer's weight that make the channels (channels, K).
        bias: likewise (channels,), or None.
        consumers: layer name -> its weight (N, K): all that reads the channels.
        groups: consumers' input channels by the producer's channel, (channels of the producer, consumers of each): with
            grouped query attention one value channel is read by several heads.
        offset: what the norm adds to its gain before it multiplies; 1 for Gemma's.
        head: channels in each run that may also be rotated among themselves, as the values of a head; 0 if none.
    """

    name: str
    gain: Tensor
    bias: Tensor | None
    consumers: dict[str, Tensor]
    groups: Tensor
    offset: float = 0.0
    head: int = 0

    @property
    def is_norm(self) -> bool:
        return self.gain.dim() == 1

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


def rescale(pair: ScalePair, scales: Tensor, transaction: Transaction) -> None:
    """Divide the producer's channels by ``scales`` (channels of the producer,), and multiply the consumers' columns by
    them."""
    scales = scales.double()
    divide(pair, scales, transaction)
    columns = pair.by_consumer(scales)
    for weight in pair.consumers.values():
        transaction.change(weight, weight * columns)


def divide(pair: ScalePair, scales: Tensor, transaction: Transaction) -> None:
    """One side of `rescale`: the producer's channels divided by ``scales``, float64 (channels of the producer,)."""
    by = scales if pair.is_norm else scales[:, None]
    transaction.change(pair.gain, (pair.gain.double() + pair.offset) / by - pair.offset)
    if pair.bias is not None:
        transaction.change(pair.bias, pair.bias / scales)


def foldable(pair: ScalePair, scales: Tensor) -> Tensor:
    """``scales`` moved a little, so that a norm's gain divided by them is exact in bfloat16, and the model and its file
    stay equal. They are float64, in which the quotient comes out exact. Channels with a gain of zero carry nothing and
    keep 1."""
    if not pair.is_norm:
        return scales
    gain = pair.gain.double() + pair.offset
    stored = (gain / scales - pair.offset).to(torch.bfloat16).double() + pair.offset
    return torch.where((stored != 0) & stored.isfinite(), gain / stored, torch.ones_like(gain))


def turn_inputs(weight: Tensor, rotation: Tensor, transaction: Transaction) -> None:
    """weight (N, K) -> weight · R, in runs of R's size along K."""
    turned = weight.double().reshape(-1, len(rotation)) @ rotation
    transaction.change(weight, turned.reshape(weight.shape))


def turn_outputs(weight: Tensor, bias: Tensor | None, rotation: Tensor, transaction: Transaction) -> None:
    """weight (N, K) -> Rᵀ · weight, in runs of R's size along N; the bias (N,) likewise."""
    turned = rotation.t() @ weight.double().reshape(-1, len(rotation), weight.shape[1])
    transaction.change(weight, turned.reshape(weight.shape))
    if bias is not None:
        transaction.change(bias, (bias.double().reshape(-1, len(rotation)) @ rotation).flatten())
