"""A quantized linear layer as operators of torch: what a traced graph holds, and what gradients go through.

The kernel is chosen when the operator runs, so a graph fits any number of rows. The weight's tensors are arguments, and
one line of JSON has all else, so an exported program needs no object of the process that traced it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from canopyq.errors import CanopyError
from canopyq.kernels import activations, dispatch
from canopyq.kernels.dispatch import Kernel
from canopyq.kernels.spec import LinearSpec, PackedWeight, WeightLayout
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.scheme import Scheme

MOST_ELEMENTS = 2**31 - 1
LAYOUTS = {kernel.layout.name: kernel.layout for kernel in dispatch.KERNELS.values()}


def is_traced(x: Tensor) -> bool:
    """Whether a graph is being made of what happens to ``x``, so that nothing may change but what the graph says."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor) or torch.jit.is_tracing()


def most_rows(spec: LinearSpec) -> int:
    """Rows of x that any kernel takes at once: each counts elements in 32 bits."""
    return MOST_ELEMENTS // max(spec.n, spec.k, 1)


def multiply(
    x: Tensor,
    packed: PackedWeight,
    spec: LinearSpec,
    kernels: Sequence[Kernel],
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ by the first of ``kernels`` that takes so many rows: (M, K) contiguous -> (M, N) in x's dtype. The input
    is quantized if the spec says so, by a static range (1,) if one is given. Of float64 the product is exact to its
    last bits, where the kernels round to less."""
    if not len(x):
        return x.new_empty(0, spec.n)
    scheme, most = spec.activations, most_rows(spec)
    by_rows = scheme is None or input_scale is not None or scheme.granularity.kind == "token"
    if len(x) > most and by_rows:
        parts = (multiply(part, packed, spec, kernels, input_scale, input_zero_point) for part in x.split(most))
        return torch.cat([*parts])
    kernel = dispatch.select(kernels, len(x))
    if x.dtype == torch.float64:
        given = x if scheme is None else activations.rounded(x, scheme, input_scale, input_zero_point)
        return given @ kernel.layout.unpack(packed, spec).dequantize(x.dtype).t()
    if scheme is None:
        return kernel.run(x, packed, spec)
    if not kernel.takes_codes:
        return kernel.run(activations.rounded(x, scheme, input_scale, input_zero_point), packed, spec)
    if input_scale is None:
        return kernel.run(activations.dynamic(x, scheme), packed, spec)
    return kernel.run(activations.fixed(x, scheme, input_scale, input_zero_point), packed, spec)


def describe(spec: LinearSpec, layout: WeightLayout, names: Sequence[str]) -> str:
    """All that the operators need to know of a weight beside its tensors, whose ``names`` come in their order."""
    return json.dumps(
        {
            "layout": layout.name,
            "tensors": list(names),
            "weights": _scheme_as_dict(spec.weights),
            "activations": spec.activations and _scheme_as_dict(spec.activations),
            "n": spec.n,
            "k": spec.k,
            "weight_dtype": _name(spec.weight_dtype),
        }
    )


@torch.library.custom_op("canopyq::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor, weight: list[Tensor], description: str, input_scale: Tensor | None, input_zero_point: Tensor | None
) -> Tensor:
    """x · Wᵀ by the fastest kernel that reads the weight as it lies: (M, K) -> (M, N) in x's dtype. The gradient of x
    is that of x · Ŵᵀ, straight through the rounding of x.

    Args:
        weight: tensors of the weight.
        description: by `describe`.
        input_scale, input_zero_point: (1,) each, a static range for x; None takes it from x.
    """
    names, spec, layout, kernels = _read(description, weight[0].device)
    packed = dict(zip(names, weight, strict=True))
    return multiply(x.contiguous(), packed, spec, kernels, input_scale, input_zero_point)


@torch.library.custom_op("canopyq::dequantized_linear", mutates_args=())
def dequantized_linear(x: Tensor, weight: list[Tensor], description: str, transposed: bool) -> Tensor:
    """x · Ŵᵀ, or x · Ŵ if ``transposed``, in x's dtype, with Ŵ dequantized to it: (M, K) -> (M, N), (M, N) -> (M, K).
    The arguments are those of `quantized_linear`."""
    names, spec, layout, _ = _read(description, weight[0].device)
    dequantized = layout.unpack(dict(zip(names, weight, strict=True)), spec).dequantize(x.dtype)
    return x @ (dequantized if transposed else dequantized.t())


@quantized_linear.register_fake
def _(x: Tensor, weight: list[Tensor], description: str, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], json.loads(description)["n"])


@dequantized_linear.register_fake
def _(x: Tensor, weight: list[Tensor], description: str, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], json.loads(description)["k" if transposed else "n"])


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, weight, ctx.description, *rest = inputs
    ctx.transposed = rest == [True]
    ctx.rest = len(rest)
    ctx.save_for_backward(*weight)


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple:
    """Of x · Ŵᵀ it is g · Ŵ, and the other way round."""
    weight = list(ctx.saved_tensors)
    of_x = dequantized_linear(gradient, weight, ctx.description, not ctx.transposed)
    return of_x, [None] * len(weight), None, *[None] * ctx.rest


quantized_linear.register_autograd(_gradient, setup_context=_remember)
dequantized_linear.register_autograd(_gradient, setup_context=_remember)


@cache
def _read(
    description: str, device: torch.device
) -> tuple[tuple[str, ...], LinearSpec, WeightLayout, tuple[Kernel, ...]]:
    said = json.loads(description)
    weights, inputs = _scheme_of_dict(said["weights"]), said["activations"] and _scheme_of_dict(said["activations"])
    if said["layout"] not in LAYOUTS:
        raise CanopyError(f"this canopyq holds no weight {said['layout']!r}; export the program again")
    spec = LinearSpec(weights, inputs, said["n"], said["k"], getattr(torch, said["weight_dtype"]), device)
    layout = LAYOUTS[said["layout"]]
    return tuple(said["tensors"]), spec, layout, dispatch.candidates_in_layout(spec, layout)


def _scheme_as_dict(scheme: Scheme) -> dict:
    said = {"format": scheme.format.name, "granularity": asdict(scheme.granularity)}
    said |= {name: getattr(scheme, name) for name in ("symmetric", "restricted", "observer")}
    return said | {"scale_dtype": scheme.scale_dtype and _name(scheme.scale_dtype)}


def _scheme_of_dict(said: dict) -> Scheme:
    scale_dtype = said["scale_dtype"] and getattr(torch, said["scale_dtype"])
    return Scheme(**{**said, "granularity": Granularity(**said["granularity"]), "scale_dtype": scale_dtype})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
