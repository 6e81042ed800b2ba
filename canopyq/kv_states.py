"""A layer's tokens as a cache holds them, codes and newest tokens apart: what attention on codes reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from canopyq.tensor.kv_codes import QuantizedStates

ATTENTION = "canopyq"  # the attention implementation that reads codes, see `fused_attention`
FEW = 16  # new tokens of a pass, up to which it does


@dataclass(frozen=True, eq=False)
class CachedStates:
    """What attention on codes gets in the place of keys and of values.

    Attributes:
        before, window: of a cache of fixed size, see `ops.cuda.attention.attend`.
    """

    quantized_keys: QuantizedStates | None
    quantized_values: QuantizedStates | None
    keys: Tensor
    values: Tensor
    before: Tensor | None = None
    window: int = 0

    @property
    def tokens(self) -> int:
        return (0 if self.quantized_keys is None else self.quantized_keys.tokens) + self.keys.shape[2]

    def joined(self) -> tuple[Tensor, Tensor]:
        """All keys and all values (B, H, T, D), dequantized to the dtype of the newest."""
        return _joined(self.quantized_keys, self.keys), _joined(self.quantized_values, self.values)


def _joined(quantized: QuantizedStates | None, newest: Tensor) -> Tensor:
    """All tokens (B, H, T, D) in the dtype of the newest."""
    if quantized is None:
        return newest
    batch, heads, n, head_dim = newest.shape
    out = newest.new_empty(batch, heads, quantized.tokens + n, head_dim)
    quantized.dequantize(out[:, :, : quantized.tokens])
    out[:, :, quantized.tokens :] = newest
    return out
