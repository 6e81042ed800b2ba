"""INT8 by INT8 and FP8 by FP8 linear layers on a GPU, activation quantization included, beside the public kernels.

    python -m benchmarks.linear_w8a8            # measure; needs an NVIDIA GPU
    python -m benchmarks.linear_w8a8 --plot     # draw what was measured last

Writes benchmarks/results/linear_w8a8.json and linear_w8a8.png. Every result is first compared with float64. Peers:
cuBLAS in bfloat16, PyTorch's `_scaled_mm` after our quantization, and vLLM's CUTLASS kernels after vLLM's own, if vLLM
is installed, or its libraries lie in a folder that CANOPYQ_VLLM names.
The floor is the larger of two times: to read the weight at 4.57 TB/s, and to do the operations at 1.43 P/s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.linear import SHAPES, every_shape
from benchmarks.peers import load_vllm
from canopyq.evaluate.machine import describe
from canopyq.kernels import dispatch
from canopyq.kernels.cuda.quantize_rows import quantize_rows
from canopyq.kernels.timing import microseconds, rotations
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe

ROWS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
READ_BYTES_PER_US, OPERATIONS_PER_US = 4.57e6, 1.43e9
RESULTS = Path(__file__).parent / "results" / "linear_w8a8.json"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

Make = Callable[[Tensor], Callable[[Tensor], Tensor]]  # of one weight (N, K) bfloat16, memory of its own


def ours(recipe: str) -> Make:
    def make(weight: Tensor) -> Callable[[Tensor], Tensor]:
        found = Recipe.parse(recipe)
        return QuantizedLinear(quantize(weight, found.weights), activations=found.activations).prepack()

    return make


def cublas(weight: Tensor) -> Callable[[Tensor], Tensor]:
    weight = weight.clone()
    return lambda x: F.linear(x, weight)


def scaled_mm(weight: Tensor) -> Callable[[Tensor], Tensor]:
    codes = quantize(weight, "fp8", "channel", scale_dtype=torch.float32)
    data, scale = codes.data.t(), codes.scale.reshape(1, -1)

    def run(x: Tensor) -> Tensor:
        q, s = quantize_rows(x, "fp8_e4m3")
        return torch._scaled_mm(q, data, scale_a=s, scale_b=scale, out_dtype=BF16, use_fast_accum=True)

    return run


def vllm(format: str) -> Make:
    """vLLM quantizes the tokens, then its CUTLASS kernel multiplies and scales."""
    kind = torch.int8 if format == "int8" else FP8

    def make(weight: Tensor) -> Callable[[Tensor], Tensor]:
        codes = quantize(weight, format, "channel", scale_dtype=torch.float32)

        def run(x: Tensor) -> Tensor:
            q, s = torch.empty_like(x, dtype=kind), torch.empty(len(x), 1, device=x.device)
            if kind == FP8:
                torch.ops._C.dynamic_per_token_scaled_fp8_quant(q, x, s, None)
            else:
                torch.ops._C.dynamic_scaled_int8_quant(q, x, s, None)
            y = torch.empty(len(x), len(codes.data), dtype=BF16, device=x.device)
            torch.ops._C.cutlass_scaled_mm(y, q, codes.data.t(), s, codes.scale, None)
            return y

        return run

    return make


def makers() -> dict[str, Make]:
    found = {"bf16 (cuBLAS)": cublas, "w8a8": ours("w8a8"), "fp8": ours("fp8"), "fp8 (_scaled_mm)": scaled_mm}
    if reason := load_vllm():
        print(f"not compared with vLLM's CUTLASS kernels: {reason}")
    else:
        found |= {"int8 (vLLM CUTLASS)": vllm("int8"), "fp8 (vLLM CUTLASS)": vllm("fp8")}
    return found


def measure(k: int, n: int, rows: tuple[int, ...]) -> Iterator[dict]:
    torch.manual_seed(0)
    weight = (torch.randn(n, k, device="cuda") / k**0.5).to(BF16)
    exact_weight = weight.double()
    for name, make in makers().items():
        read = n * k * (2 if name.startswith("bf16") else 1)
        layers = [make(weight) for _ in range(rotations(read))]
        for m in rows:
            x = torch.randn(m, k, device="cuda").to(BF16)
            row = {"k": k, "n": n, "rows": m, "name": name}
            try:
                y = layers[0](x)
            except Exception as error:  # a peer that cannot do this shape is a row of the table, not the end of it
                yield row | {"absent": str(error).splitlines()[0][:120]}
                continue
            exact = x[:64].double() @ exact_weight.t()
            error = float((y[:64].double() - exact).norm() / exact.norm())
            assert error < (0.06 if "fp8" in name else 0.02), (name, m, error)
            us = microseconds([lambda layer=layer, x=x: layer(x) for layer in layers])
            floor = max((read + 2 * m * (n + k)) / READ_BYTES_PER_US, 2 * m * n * k / OPERATIONS_PER_US)
            row |= {"us": round(us, 2), "floor_us": round(floor, 2), "percent_of_floor": round(100 * floor / us, 1),
                    "relative_error": float(f"{error:.2g}")}  # fmt: skip
            if isinstance(layers[0], QuantizedLinear):
                row["kernel"] = dispatch.select(dispatch.candidates(layers[0].spec), m).name
            yield row
        del layers


def plot() -> None:
    import matplotlib.pyplot as plt

    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [row for row in content["results"] if "us" in row]
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), squeeze=False)
    for axis, (k, n) in zip(axes.flat, SHAPES, strict=True):
        here = [row for row in rows if (row["k"], row["n"]) == (k, n)]
        for i, name in enumerate(dict.fromkeys(row["name"] for row in here)):
            line = [(row["rows"], row["us"]) for row in here if row["name"] == name]
            own = name in ("w8a8", "fp8")
            axis.plot(*zip(*line, strict=True), label=name, marker=".", color=f"C{i}", linewidth=2.5 if own else 1)
        axis.set(title=f"{k} → {n}", xscale="log", yscale="log", xlabel="rows of x")
        axis.set_xscale("log", base=2)
    axes[0, 0].set_ylabel("microseconds")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"8-bit linear layers with quantization, {content['machine'].get('gpu', 'GPU')}")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


@torch.inference_mode()
def main(shapes: list[tuple[int, int]] | None = None, rows: tuple[int, ...] = ROWS) -> None:
    if "--plot" not in sys.argv:
        found = []
        for k, n in shapes or every_shape():
            for row in measure(k, n, rows):
                found.append(row)
                print(row, flush=True)
            content = {"machine": describe(), "date": date.today().isoformat(), "results": found}
            RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # after every layer
    plot()


if __name__ == "__main__":
    main()
