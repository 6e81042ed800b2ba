"""Quantized linear layers on the processor beside float32: ratios of one run, one thread.

    python benchmarks/linear_cpu.py

Writes benchmarks/results/linear_cpu.json. The weights of a layer (4096, 4096) do not fit in most caches, so that a
single token is bound by reading them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import canopyq as cq
from canopyq.evaluate.machine import describe
from canopyq.kernels import dispatch
from canopyq.tensor import affine
from canopyq.tensor.scheme import Recipe

SIZE = 4096
ROWS = (1, 4, 16, 32, 64)
ROUNDS, SECONDS = 8, 0.1
RECIPES = ("w4a16-g128", "w4a16-g128-asym", "w8a16", "w8a16-g128", "w8a8", "w8a8-asym", "w8a8-static", "fp8",
           "fp8-static")  # fmt: skip
TARGETS = {("w4a16-g128", 1): 3.0, ("w8a16", 1): 2.0, ("w4a16-g128", 64): 0.8, ("w8a16", 64): 0.8,
           ("w8a8", 1): 3.0, ("w8a8", 64): 3.0,
           ("w8a8-static", 1): 3.0, ("w8a8-static", 64): 3.0}  # fmt: skip


def best_of_rounds(*runs: Callable[[], object]) -> list[float]:
    """Seconds of one call of each, at its fastest: rounds alternate, so that a busy moment hurts all alike."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            begin = start = time.perf_counter()
            while start - begin < SECONDS:
                run()
                start, before = time.perf_counter(), start
                best[i] = min(best[i], start - before)
    return best


def make(name: str, weight: torch.Tensor) -> cq.QuantizedLinear:
    """A layer by a recipe; a static one expects inputs of a normal distribution."""
    recipe = Recipe.parse(name)
    scale = zero_point = None
    if recipe.static:
        ends = torch.tensor([-4.5]), torch.tensor([4.5])
        scale, zero_point = affine.scale_and_zero_point(
            *ends, recipe.activations.format, scale_dtype=recipe.activations.scale_dtype
        )
    return cq.QuantizedLinear(
        cq.quantize(weight, recipe.weights), None, recipe.activations, scale, zero_point
    ).prepack()


@torch.inference_mode()
def measure() -> list[dict]:
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    rows = []
    for name in RECIPES:
        layer = make(name, weight)
        for m in ROWS:
            x = torch.randn(m, SIZE)
            exact = x.double() @ layer.quantized_weight.dequantize(torch.float64).t()
            error = float((layer(x).double() - exact).norm() / exact.norm())
            bound = {"int": 2e-2, "fp8": 4e-2, None: 4e-3}[layer.activations and layer.activations.format.name[:3]]
            assert error < bound, (name, m, error)
            full, quantized = best_of_rounds(lambda x=x: F.linear(x, weight), lambda x=x, layer=layer: layer(x))
            kernel = dispatch.select(dispatch.candidates(layer.spec), m).name
            row = {"recipe": name, "rows": m, "kernel": kernel, "times_float32": round(full / quantized, 2)}
            row |= {"relative_error": float(f"{error:.2g}"), "target": TARGETS.get((name, m))}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    machine = describe() | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
                            "int8_dot_product": torch.cpu._is_vnni_supported()}  # fmt: skip
    content = {"layer": [SIZE, SIZE], "machine": machine, "date": date.today().isoformat(), "results": rows}
    path = Path(__file__).parent / "results" / "linear_cpu.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
