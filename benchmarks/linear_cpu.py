"""Quantized linear layers on the processor beside float32: ratios of one run, one thread.

    python benchmarks/linear_cpu.py

Writes benchmarks/results/linear_cpu.json. The weights of a layer (4096, 4096) do not fit in most caches, so that a
single token is bound by reading them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import canopyq as cq
from canopyq.machine import describe
from canopyq.ops import select
from canopyq.scheme import Recipe

SIZE = 4096
ROWS = (1, 4, 16, 32, 64)
TARGETS = {("w4a16-g128", 1): 3.0, ("w8a16", 1): 2.0, ("w4a16-g128", 64): 0.8, ("w8a16", 64): 0.8,
           ("w8a8", 1): 3.0, ("w8a8", 64): 3.0}  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Median of enough calls to fill half a second."""
    run()
    times = []
    while sum(times) < 0.5 or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure() -> list[dict]:
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    rows = []
    for name in ("w4a16-g128", "w4a16-g128-asym", "w8a16", "w8a16-g128", "w8a8"):
        recipe = Recipe.parse(name)
        layer = cq.QuantizedLinear(cq.quantize(weight, recipe.weights), activations=recipe.activations).arrange()
        for m in ROWS:
            x = torch.randn(m, SIZE)
            exact = x.double() @ layer.quantized_weight.dequantize(torch.float64).t()
            error = float((layer(x).double() - exact).norm() / exact.norm())
            assert error < (2e-2 if recipe.activations else 4e-3), (name, m, error)
            full, quantized = seconds(lambda x=x: F.linear(x, weight)), seconds(lambda x=x, layer=layer: layer(x))
            kernel = select.pick(select.usable(layer.problem), m).name
            row = {"recipe": name, "rows": m, "kernel": kernel, "times_float32": round(full / quantized, 2)}
            row |= {"relative_error": float(f"{error:.2g}"), "target": TARGETS.get((name, m))}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    machine = describe() | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}
    content = {"layer": [SIZE, SIZE], "machine": machine, "date": date.today().isoformat(), "results": rows}
    path = Path(__file__).parent / "results" / "linear_cpu.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
