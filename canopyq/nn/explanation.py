"""`explain(model)`: every quantized layer's scheme and bytes, the kernel that runs it, why each other one does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from canopyq import checks
from canopyq.errors import CanopyError, and_more
from canopyq.kernels import dispatch
from canopyq.kernels.dispatch import Verdict
from canopyq.kernels.spec import LinearSpec
from canopyq.memory import human
from canopyq.nn.linear import QuantizedLinear, quantized_layers
from canopyq.nn.offload import is_away, lies, runs_on
from canopyq.utils import Preformatted


@dataclass(frozen=True)
class LayerExplained:
    """One quantized layer.

    Attributes:
        name, shape, scheme: of the layer.
        nbytes: that its weight holds, read from storage.
        device: where it runs, and where its weight lies if that is elsewhere.
        verdicts: what becomes of each kernel.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    nbytes: int
    device: str
    verdicts: tuple[Verdict, ...]

    @property
    def runs(self) -> dict[str, str]:
        """Kernel -> for inputs of how many rows (tokens in a batch)."""
        return {verdict.kernel: verdict.runs for verdict in self.verdicts if verdict.runs}

    @property
    def refused(self) -> dict[str, str]:
        """Kernel -> why it does not run."""
        return {verdict.kernel: verdict.reason for verdict in self.verdicts if verdict.reason}


@dataclass(frozen=True)
class Explanation(Preformatted):
    """All quantized layers of a model. Layers of which the same is true share a paragraph when printed."""

    layers: tuple[LayerExplained, ...]

    def groups(self) -> dict[str, LayerExplained]:
        """The first of all layers that run alike, under a line that says which they are."""
        found: dict[tuple, list[LayerExplained]] = {}
        for layer in self.layers:
            found.setdefault((layer.scheme, layer.device, layer.verdicts), []).append(layer)
        return {_line(layers): layers[0] for layers in found.values()}

    def __str__(self) -> str:
        lines = []
        for line, first in self.groups().items():
            lines.append(line)
            lines += [f"  runs    {kernel}: {rows}" for kernel, rows in first.runs.items()]
            lines += [f"  refused {kernel}: {reason}" for kernel, reason in first.refused.items()]
        return "\n".join(lines)


def _line(layers: list[LayerExplained]) -> str:
    first = layers[0]
    shapes = list(dict.fromkeys(f"{n}x{k}" for n, k in (layer.shape for layer in layers)))
    sizes = ", ".join(shapes) if len(shapes) <= 4 else f"{len(shapes)} shapes"
    held = human(sum(layer.nbytes for layer in layers))
    return f"{and_more([layer.name for layer in layers])}: {sizes}, {first.scheme}, {held} on {first.device}"


def explain(model: nn.Module) -> Explanation:
    """Say for every quantized linear layer of ``model`` which kernel runs it, and why each other one does not.

    Raises:
        CanopyError: if there is none.
    """
    checks.module("model", model)
    layers = [
        LayerExplained(
            name,
            (layer.out_features, layer.in_features),
            str(layer.scheme) + (f", input {layer.input_words}" if layer.activations else ""),
            sum(tensor.nbytes for tensor in layer.packed.values()),
            _place(layer),
            tuple(dispatch.verdicts(_spec(layer, runs_on(layer)))),
        )
        for name, layer in quantized_layers(model)
        if type(layer) is QuantizedLinear
    ]
    if not layers:
        raise CanopyError(f"{type(model).__name__} has no quantized layer to explain; use quantize_ or load first")
    return Explanation(tuple(layers))


def require_fast(name: str, layer: QuantizedLinear, device: torch.device | None = None) -> None:
    """Raise unless a kernel other than the reference runs single tokens through the layer.

    Args:
        device: where the layer will run, if not where it lies.

    Raises:
        CanopyError: with the reason of every kernel that refused.
    """
    if type(layer) is not QuantizedLinear:
        return
    spec = _spec(layer, device)
    kernel = dispatch.select(dispatch.candidates(spec), 1)
    if kernel == dispatch.KERNELS["reference"]:
        reasons = "; ".join(f"{v.kernel}: {v.reason}" for v in dispatch.verdicts(spec) if v.reason)
        raise CanopyError(f"strict: {name} would run on the reference. {reasons}")


def _spec(layer: QuantizedLinear, device: torch.device | None) -> LinearSpec:
    return layer.spec if device is None else replace(layer.spec, device=device)


def _place(layer: QuantizedLinear) -> str:
    return f"{runs_on(layer)}, its weight {lies(layer)}" if is_away(layer) else str(layer.spec.device)
