"""How far each layer's output moves when its weight is quantized, measured on data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.errors import CanopyError
from canopyq.linear import QuantizedLinear
from canopyq.targets import Target
from canopyq.track import track


@torch.no_grad()
def output_errors(
    model: nn.Module, targets: list[Target], layers: dict[str, QuantizedLinear], batches: Iterable[Tensor]
) -> dict[str, float]:
    """‖y − ŷ‖ / ‖y‖ of every linear layer over all batches of token ids (B, T); each layer sees what the original
    model puts into it. Experts and embeddings are left out.

    Raises:
        CanopyError: for no batches, or for one that is not token ids (B, T).
    """
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}

    def watch(target: Target):
        def hook(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            x = given[0]
            change = F.linear(x, target.weight, module.bias) - layers[target.name](x)
            noise[target.name] = noise.get(target.name, 0.0) + float(change.double().square().sum())
            signal[target.name] = signal.get(target.name, 0.0) + float(y.double().square().sum())

        return hook

    batches = list(batches)
    if not batches:
        raise CanopyError("the calibration data is empty; give batches of token ids (B, T), or leave it out")
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point() or not batch.numel():
            what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CanopyError(f"calibration takes batches of token ids (B, T), got {what}; tokenize the texts first")
    handles = [t.module.register_forward_hook(watch(t)) for t in targets if t.kind in ("linear", "conv1d")]
    training = model.training
    model.eval()
    try:
        for batch in track(batches, "measuring output errors", len(batches)):
            model(batch.to(next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: (noise[name] / signal[name]) ** 0.5 if signal[name] else 0.0 for name in noise}
