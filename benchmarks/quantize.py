"""How long `quantize` takes, as a multiple of reading a tensor once and writing it once.

    python benchmarks/quantize.py            print the ratio
    python benchmarks/quantize.py --write    and keep it in benchmarks/results/quantize.json

The yardstick is `x.abs().amax()` and `x * 0.5`: the least that any method must do, finding the range and touching every
value. Both are timed in turn, so that other work on the machine slows both, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from canopyq.evaluate.machine import describe
from canopyq.tensor.quantized_tensor import quantize

TARGET = 3.0
RESULT = Path(__file__).parent / "results" / "quantize.json"


def yardstick(x: Tensor) -> None:
    x.abs().amax()
    x * 0.5


def interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of two functions, called in turn; the first call of each does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def measure(rows: int = 4096, columns: int = 11008, rounds: int = 9) -> dict[str, float | str]:
    """Seconds and their ratio for INT4 in groups of 128, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        taken, least = interleaved(lambda: quantize(x, "int4", "g128"), lambda: yardstick(x), rounds)
    finally:
        torch.set_num_threads(threads)
    return {
        "tensor": f"{rows}x{columns} float32, int4 g128 symmetric, one thread",
        "quantize_seconds": round(taken, 4),
        "yardstick_seconds": round(least, 4),
        "ratio": round(taken / least, 3),
        "target": TARGET,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/quantize.json")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each whose median counts")
    arguments = parser.parse_args()
    result = measure(rounds=arguments.rounds)
    print(
        f"{result['tensor']}: {result['quantize_seconds']} s, {result['ratio']} times the yardstick (target {TARGET:g})"
    )
    if arguments.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result | {"machine": describe()}, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
