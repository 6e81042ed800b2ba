"""A linear layer that holds only the packed weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.errors import CanopyError
from canopyq.scheme import Scheme
from canopyq.tensor import QuantizedTensor, quantize


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ + b with W (out_features, in_features) kept as codes and scales.

    The buffers bear the names of the compressed-tensors checkpoint: ``weight_packed`` (or ``weight`` for 8-bit codes
    that need no packing), ``weight_scale``, and ``weight_zero_point`` when asymmetric. W is dequantized for each call
    and then dropped: the memory is saved for good, the time is not.

    ``.to(dtype)`` and ``.half()`` leave the buffers as they are and cast the bias alone: the weight is dequantized to
    the dtype of the input, and a scale that is rounded a second time would change it.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise CanopyError(f"a linear layer's weight is (out_features, in_features), got {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.scheme, self.weight_dtype = weight.scheme, weight.dtype
        self.data_name = "weight_packed" if weight.data.dtype == torch.int32 else "weight"
        self.register_buffer(self.data_name, weight.data)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_point)
        self.register_buffer("weight_tensor_scale", weight.tensor_scale)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """Quantize a layer's weight by round-to-nearest; the bias stays as it is."""
        return cls(quantize(linear.weight, scheme), linear.bias)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor`; it shares memory with the buffers."""
        return QuantizedTensor(
            getattr(self, self.data_name),
            self.weight_scale,
            self.weight_zero_point,
            self.scheme,
            torch.Size([self.out_features, self.in_features]),
            self.weight_dtype,
            self.weight_tensor_scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight.dequantize(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to()`, `.half()` and `.cuda()` call: buffers go to another device, but never to another dtype."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"
