"""How far each layer's output moves when its weight is quantized, measured on data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from canopyq.calibration.blocks import call
from canopyq.calibration.data import Batch
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.targets import Target
from canopyq.utils import eval_mode, track


@torch.no_grad()
def output_errors(
    model: nn.Module, targets: list[Target], layers: dict[str, QuantizedLinear], batches: list[Batch]
) -> dict[str, float]:
    """‖y − ŷ‖ / ‖y‖ of every linear layer over all real tokens; each layer sees what the original model puts into it.
    Experts and embeddings are left out."""
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    real = torch.empty(0)

    def watch(target: Target):
        def hook(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            x, y = (part.reshape(-1, part.shape[-1])[real.to(part.device)] for part in (given[0], y))
            change = y - layers[target.name](x)
            noise[target.name] = noise.get(target.name, 0.0) + float(change.double().square().sum())
            signal[target.name] = signal.get(target.name, 0.0) + float(y.double().square().sum())

        return hook

    handles = [t.module.register_forward_hook(watch(t)) for t in targets if t.kind.is_linear]
    try:
        with eval_mode(model):
            for batch in track(batches, "measuring output errors", len(batches)):
                real = batch.real.flatten()
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (noise[name] / signal[name]) ** 0.5 if signal[name] else 0.0 for name in noise}
