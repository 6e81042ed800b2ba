"""An embedding that holds only its quantized rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import QuantizedTensor


class QuantizedEmbedding(QuantizedLinear):
    """Looks rows of a weight (vocabulary, hidden) up and dequantizes those alone.

    It keeps its weight, moves and is saved like a `QuantizedLinear`, but multiplies nothing. ``.to(dtype)`` and
    ``.half()`` leave the codes as they are too, and from then on rows come in that dtype, as nn.Embedding's do.

    Args:
        weight: (vocabulary, hidden).
        padding_idx: as nn.Embedding has it.
        embed_scale: what every row is multiplied by, as Gemma's embedding does; None for nothing.
    """

    def __init__(
        self, weight: QuantizedTensor, padding_idx: int | None = None, embed_scale: Tensor | float | None = None
    ) -> None:
        super().__init__(weight)
        self.padding_idx = padding_idx
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    @classmethod
    def like(cls, module: nn.Embedding, weight: QuantizedTensor) -> QuantizedEmbedding:
        """What takes the place of a module, plain or scaling its rows."""
        return cls(weight, module.padding_idx, getattr(module, "embed_scale", None)).train(module.training)

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    def prepack(self) -> QuantizedEmbedding:
        """Rows are looked up in the checkpoint's layout."""
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (…) to rows (…, hidden), in the dtype that the embedding had."""
        flat, weight = ids.reshape(-1), self.quantized_weight

        def pick(part: Tensor | None) -> Tensor | None:
            return part[flat] if part is not None and part.dim() == 2 else part

        rows = QuantizedTensor(
            weight.data[flat],
            pick(weight.scale),
            pick(weight.zero_point),
            weight.scheme,
            torch.Size([flat.shape[0], self.in_features]),
            weight.dtype,
            weight.global_scale,
        )
        out = rows.dequantize().reshape(*ids.shape, self.in_features)
        scale = self.embed_scale
        if scale is None:
            return out
        return out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self
