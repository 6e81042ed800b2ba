"""The short benchmark: quantized layers on this machine beside the unquantized one, checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels import dispatch
from canopyq.kernels.timing import microseconds, rotations, rounds
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe
from canopyq.utils import track

SHAPES = {"cuda": ((4096, 4096), (4096, 11008), (8192, 28672)), "cpu": ((2048, 2048),)}  # (in_features, out_features)
ROWS = {"cuda": (1, 16, 64, 256, 1024), "cpu": (1, 16, 64)}
WRONG = 3e-2  # a relative error beyond rounding, for 16-bit inputs; quantized inputs are compared after rounding them


@dataclass(frozen=True)
class Timed:
    """One layer on one number of rows.

    Attributes:
        recipe, inputs, outputs, rows: what was measured.
        kernel: that ran.
        us: microseconds of a call.
        unquantized_us: of the same layer in bfloat16 (float32 on a CPU).
        error: relative, against float64 of the dequantized weight.
    """

    recipe: str
    inputs: int
    outputs: int
    rows: int
    kernel: str
    us: float
    unquantized_us: float
    error: float

    @property
    def speedup(self) -> float:
        return self.unquantized_us / self.us


@torch.no_grad()
def bench(
    recipes: Sequence[str] = ("w4a16-g128", "w8a16"),
    device: str = "cpu",
    shapes: Sequence[tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
) -> list[Timed]:
    """Time linear layers as `QuantizedLinear` runs them.

    Args:
        recipes: names such as ``"w4a16-g128"`` or ``"w8a8"``.
        device: ``"cpu"``, in float32 and on as many threads as torch uses, or ``"cuda"``, in bfloat16.
        shapes: (in_features, out_features) of the layers; None takes a few that fit the device.
        rows: numbers of tokens; None takes from 1 to 64 on a CPU, to 1024 on a GPU.

    Raises:
        CanopyError: for an unknown recipe, one with static activations, a device that torch does not have, or a kernel
            whose result is wrong.
    """
    kind = checks.choice("device", checks.device(device).type, SHAPES)
    parsed = [Recipe.of_weights(recipe) for recipe in checks.sequence("recipes", recipes)]
    rows = [checks.count("rows", m, 1) for m in checks.sequence("rows", ROWS[kind] if rows is None else rows)]
    shapes = checks.layers("shapes", SHAPES[kind] if shapes is None else shapes)
    if static := [recipe.name for recipe in parsed if recipe.static]:
        raise CanopyError(f"{static[0]} needs ranges calibrated on a model; time the dynamic recipe")
    layers = [(recipe, *shape) for shape in shapes for recipe in parsed]
    return [timed for layer in track(layers, "timing", len(layers)) for timed in _layer(*layer, device, rows)]


def _layer(recipe: Recipe, k: int, n: int, device: str, rows: Sequence[int]) -> Iterator[Timed]:
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=device) / k**0.5
    quantized = quantize(weight, recipe.weights)
    exact = quantized.dequantize(torch.float64)
    copies = rotations(quantized.nbytes) if on_gpu else 1
    layers = [QuantizedLinear(quantized, None, recipe.activations).prepack() for _ in range(copies)]
    plain = [weight.to(dtype).clone() for _ in range(rotations(2 * n * k) if on_gpu else 1)]
    for m in rows:
        x = torch.randn(m, k, generator=generator, device=device).to(dtype)
        seen = x if recipe.activations is None else quantize(x, recipe.activations).dequantize()
        wanted = seen.double() @ exact.t()
        error = float((layers[0](x).double() - wanted).norm() / wanted.norm())
        if not error < WRONG:
            raise CanopyError(f"{recipe.name} {k}x{n} on {m} rows is off by {error:.2g}; please report this GPU")
        ours = _calls(layers, x)
        theirs: list[Callable[[], Tensor]] = [lambda w=w, x=x: F.linear(x, w) for w in plain]
        times = (microseconds(ours), microseconds(theirs)) if on_gpu else rounds([ours[0], theirs[0]])
        kernel = dispatch.select(dispatch.candidates(layers[0].spec), m).name
        yield Timed(recipe.name, k, n, m, kernel, *times, error)


def _calls(layers: list[QuantizedLinear], x: Tensor) -> list[Callable[[], Tensor]]:
    return [lambda layer=layer: layer(x) for layer in layers]
