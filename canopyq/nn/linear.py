"""A linear layer that holds only the packed weight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError, shown
from canopyq.kernels import dispatch, operator, reference
from canopyq.kernels.cuda import quantize_rows
from canopyq.kernels.spec import LinearSpec, WeightLayout
from canopyq.tensor import affine
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme

_PREPACKING = threading.Lock()  # one thread lays a weight out; others that call the layer meanwhile wait for it


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ + b with W (out_features, in_features) kept as codes and scales, and nothing else.

    The buffers hold the weight in the layout that the fastest kernel of this machine reads; `state_dict` gives it as
    compressed-tensors checkpoints do: ``weight_packed`` (``weight`` for 8-bit codes), ``weight_scale``, and
    ``weight_zero_point`` when asymmetric. Moved to another device, the weight is laid out anew at the next call.

    A layer may be called by several threads, copied and pickled; a pickle holds the weight as a checkpoint does. (With
    plain pickle torch 2.13 does not read its own FP8 tensors back; ``torch.save`` does.)

    ``.to(dtype)`` and ``.half()`` leave the buffers as they are and cast the bias alone: the weight is dequantized to
    the dtype of the input, and a scale that is rounded a second time would change it.

    Gradients of the input are those of the dequantized weight, g · Ŵ, also where the input is quantized: rounding it
    is passed straight through.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        activations: scheme of the input (…, in_features): per token, or per tensor with ``input_scale``; None leaves
            the input as it is.
        input_scale, input_zero_point: (1,) each, the fixed range of a static scheme; None takes it from each input.
            For NVFP4 ``input_scale`` is the global scale of the input, whose blocks have ranges of their own.

    Raises:
        CanopyError: if ``weight`` is no matrix.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        activations: Scheme | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.instance("weight", weight, QuantizedTensor, "give one, such as cq.quantize(x, 'int8', 'channel')")
        if len(weight.shape) != 2:
            raise CanopyError(f"weight has shape {tuple(weight.shape)}; give one of (out_features, in_features)")
        if activations is not None:
            checks.instance("activations", activations, Scheme, "use a Scheme, such as Scheme('int8', 'token')")
        for name, given, size in (
            ("bias", bias, weight.shape[0]), ("input_scale", input_scale, 1), ("input_zero_point", input_zero_point, 1),
        ):  # fmt: skip
            whole = name == "input_zero_point"
            fits = isinstance(given, Tensor) and tuple(given.shape) == (size,) and whole != given.is_floating_point()
            if given is not None and not fits:
                raise CanopyError(f"{name} is {shown(given)}; give {'int8' if whole else 'floats'} of shape ({size},)")
        self.out_features, self.in_features = weight.shape
        self.scheme, self.activations, self.weight_dtype = weight.scheme, activations, weight.dtype
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self.weight_names: tuple[str, ...] = ()
        self.set_packed(reference.prepack(weight), reference.CHECKPOINT_LAYOUT)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme, activations: Scheme | None = None) -> QuantizedLinear:
        """Quantize a layer's weight by round-to-nearest; the bias stays as it is."""
        checks.instance("linear", linear, nn.Linear, "give an nn.Linear; quantize_ takes whole models")
        checks.instance("scheme", scheme, Scheme, "use a Scheme, such as Scheme('int8', 'channel')")
        return cls(quantize(linear.weight, scheme), linear.bias, activations)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The weight's tensors in the layout that they have now."""
        return {name: self._buffers[name] for name in self.weight_names}

    @property
    def qweight(self) -> Tensor:
        """The codes as they lie now, under the name by which peft looks for a quantized layer's device."""
        return self._buffers[self.weight_names[0]]

    @property
    def spec(self) -> LinearSpec:
        """What the kernels need to know of this layer."""
        device = self._buffers[self.weight_names[0]].device
        shape = (self.out_features, self.in_features)
        return LinearSpec(self.scheme, self.activations, *shape, self.weight_dtype, device)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor`; as long as no kernel wants another layout, it shares memory."""
        return self.layout.unpack(self.packed, self.spec)

    @property
    def input_words(self) -> str:
        """How the input is quantized, for people; empty if it stays as it is."""
        if self.activations is None:
            return ""
        return f"{self.activations} {'dynamic' if self.input_scale is None else 'static'}"

    def set_packed(self, tensors: dict[str, Tensor], layout: WeightLayout) -> None:
        """Take the weight from these tensors, which lie in ``layout``, and let go of the old ones."""
        for name in self.weight_names:
            del self._buffers[name]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.weight_names = tuple(tensors)
        self.layout, self._kernels = layout, None
        self._description = operator.describe(self.spec, layout, self.weight_names)

    def prepack(self) -> QuantizedLinear:
        """Lay the weight out for the fastest kernel that can run here. The first call of `forward` does it too, unless
        it is traced: a graph computes on the weight as it lies."""
        with _PREPACKING:
            kernels = dispatch.candidates(self.spec)
            if kernels[0].layout != self.layout:
                with torch.inference_mode(False), torch.no_grad():
                    self.set_packed(kernels[0].layout.prepack(self.quantized_weight), kernels[0].layout)
            self._kernels = kernels
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,):
            raise CanopyError(f"the layer takes {self.in_features} features, and its input is {shown(x)}")
        if x.dtype not in affine.FLOATS:
            raise CanopyError(f"the layer takes floating-point input, not {x.dtype}")
        out = self._multiply(x.reshape(-1, self.in_features).contiguous())
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def takes_codes_of(self, x: Tensor) -> bool:
        """Whether `multiply` takes codes that were made of inputs such as ``x`` (M, in_features) beforehand."""
        if self._kernels is None:
            self.prepack()
        dynamic = self.activations is not None and self.input_scale is None
        if not dynamic or len(x) > operator.most_rows(self.spec):
            return False
        return dispatch.select(self._kernels, len(x)).takes_codes and quantize_rows.takes(x, self.activations)

    def multiply(self, x: QuantizedTensor) -> Tensor:
        """What `forward` gives for an input whose codes, in the scheme of ``activations``, are known:
        (M, in_features) -> (M, out_features)."""
        out = dispatch.select(self._kernels, len(x.data)).run(x, self.packed, self.spec)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features)."""
        traced, differentiated = operator.is_traced(x), torch.is_grad_enabled() and x.requires_grad
        if self._kernels is None and not traced:
            self.prepack()
        if self.activations is None and differentiated:  # exact, where the kernels round to bfloat16
            return operator.dequantized_linear(x, [*self.packed.values()], self._description, False)
        ranges = self.input_scale, self.input_zero_point
        if traced or differentiated:
            return operator.quantized_linear(x, [*self.packed.values()], self._description, *ranges)
        return operator.multiply(x, self.packed, self.spec, self._kernels, *ranges)

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle take: the weight as a checkpoint has it, since who reads that may have other
        kernels."""
        state = vars(self) | {"_kernels": None}
        if self.layout != reference.CHECKPOINT_LAYOUT:
            packed = reference.prepack(self.quantized_weight)
            others = {name: buffer for name, buffer in self._buffers.items() if name not in self.weight_names}
            state |= {"_buffers": others | packed, "weight_names": tuple(packed), "layout": reference.CHECKPOINT_LAYOUT}
            state["_description"] = operator.describe(self.spec, state["layout"], state["weight_names"])
        return state

    def _unpack(self) -> None:
        if self.layout != reference.CHECKPOINT_LAYOUT:
            self.set_packed(reference.prepack(self.quantized_weight), reference.CHECKPOINT_LAYOUT)
        self._kernels = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to()`, `.half()` and `.cuda()` call: buffers go to another device, but never to another dtype."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        device = self.spec.device
        probe = fn(torch.empty(0, device=device))
        if probe.device != device:
            self._unpack()
            before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.weight_names:
            destination.pop(prefix + name, None)
        for name, tensor in reference.prepack(self.quantized_weight).items():
            destination[prefix + name] = tensor
        if (metadata := getattr(destination, "_metadata", None)) is not None:  # codes do not say whose they are
            metadata.setdefault(prefix[:-1], {})["format"] = self.scheme.format.name

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *arguments: Any
    ) -> None:
        given = metadata.get("format", self.scheme.format.name)
        if given != self.scheme.format.name:
            arguments[-1].append(f"{prefix}{self.weight_names[0]} holds {given} codes, and they are "
                                 f"{self.scheme.format.name} here: quantize by the same recipe first")  # fmt: skip
            return
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, metadata, *arguments)
        for name, tensor in self.packed.items():  # which torch has cast, if it had to
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != tensor.dtype:
                arguments[-1].append(f"{prefix}{name} is {given.dtype}, and codes and scales of {self.scheme} "
                                     f"are {tensor.dtype} here: quantize by the same recipe first")  # fmt: skip

    def extra_repr(self) -> str:
        inputs = f", input {self.input_words}" if self.activations else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}{inputs}"


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized linear layers of a model, by name, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
