"""An embedding that holds only its quantized rows."""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.linear import QuantizedLinear
from canopyq.tensor import QuantizedTensor


class QuantizedEmbedding(QuantizedLinear):
    """Looks rows of a weight (vocabulary, hidden) up and dequantizes those alone.

    It keeps its weight, moves and is saved like a `QuantizedLinear`, but multiplies nothing.
    """

    def __init__(self, weight: QuantizedTensor, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.padding_idx = padding_idx

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    def arrange(self) -> QuantizedEmbedding:
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
            torch.Size([len(flat), self.in_features]),
            weight.dtype,
            weight.tensor_scale,
        )
        return rows.dequantize().reshape(*ids.shape, self.in_features)
