"""A few input features in 16 bits, the others in codes, as in LLM.int8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear


class OutlierLinear(nn.Module):
    """y = x' · Ŵᵀ + x_o · W_oᵀ, where o are the loudest inputs, W_o their columns in 16 bits, and x' is x without them.

    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3.2. There the
    loud inputs are looked for anew in every batch; here they are fixed beforehand, from calibration data.

    Args:
        inner: the quantized layer, its columns ``columns`` zero.
        columns: indices of the inputs kept, int64 (k,).
        weight: their columns, (out_features, k).
    """

    def __init__(self, inner: QuantizedLinear, columns: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("columns", columns)
        self.register_buffer("kept", weight.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rest = self.inner(x.index_fill(-1, self.columns, 0))
        return rest + F.linear(x[..., self.columns], self.kept.to(x.dtype))
