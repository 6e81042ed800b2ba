"""INT4 weights by INT8 activations (w4a8-g128) on a GPU, the quantization of the input included, beside other recipes.

    python -m benchmarks.linear_w4a8            # measure; needs an NVIDIA Hopper GPU

Writes benchmarks/results/linear_w4a8.json. All kernels have the same weights, INT4 in groups of 128; those of 8 and 16
bits take what these stand for. So each result is compared with float64 of the same weight: what it is off by is the
rounding of its input, and of its own weights or scales. Beside ours: bfloat16 (cuBLAS), our other recipes, and vLLM's
CUTLASS kernel for INT4 by FP8, if vLLM is installed or its libraries lie in a folder that CANOPYQ_VLLM names. That one
rounds the scales of groups to FP8. The floor is as in `linear_w8a8`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.linear import HELD_OUT
from benchmarks.linear_w8a8 import OPERATIONS_PER_US, READ_BYTES_PER_US, cublas, ours
from benchmarks.peers import load_vllm
from canopyq.evaluate.machine import describe
from canopyq.kernels import dispatch
from canopyq.kernels.timing import microseconds, rotations
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor import packing
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Recipe

# Layers of 7B to 70B models, those held out of all tuning, and the layer of vLLM's own benchmark.
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672), *HELD_OUT, (12288, 14336)]
ROWS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
RESULTS = Path(__file__).parent / "results" / "linear_w4a8.json"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
WRONG = 0.06  # a relative error beyond that of FP8
LARGEST_GROUP_SCALE = 56.0  # of vLLM's: 8 times it is E4M3's largest number

Product = Callable[[Tensor], Tensor]


def int4(recipe: str) -> Callable[[QuantizedTensor], Product]:
    """Ours, of the codes as they are."""
    return lambda weight: QuantizedLinear(weight, activations=Recipe.parse(recipe).activations).prepack()


def wider(make: Callable[[Tensor], Product]) -> Callable[[QuantizedTensor], Product]:
    """Of what the codes stand for."""
    return lambda weight: make(weight.dequantize(BF16))


def vllm(weight: QuantizedTensor) -> Product:
    """INT4 by FP8: vLLM quantizes the tokens, then its CUTLASS kernel multiplies and scales."""
    ops = torch.ops._C
    words = packing.pack_unchecked((weight.codes & 15).to(torch.uint8), 4, 0)
    codes = ops.cutlass_encode_and_reorder_int4b(words.t())
    scale = weight.scale.float()
    channel = scale.amax(1, keepdim=True) / LARGEST_GROUP_SCALE
    group = ops.cutlass_pack_scale_fp8((scale / channel).t().contiguous().to(FP8))

    def run(x: Tensor) -> Tensor:
        q, token = torch.empty_like(x, dtype=FP8), torch.empty(len(x), 1, device=x.device)
        ops.dynamic_per_token_scaled_fp8_quant(q, x, token, None)
        return ops.cutlass_w4a8_mm(q, codes, group, 128, channel, token, None, None)

    return run


def makers() -> dict[str, Callable[[QuantizedTensor], Product]]:
    found = {"bf16 (cuBLAS)": wider(cublas), "w4a8-g128": int4("w4a8-g128"), "w4a16-g128": int4("w4a16-g128")}
    found |= {"w8a8": wider(ours("w8a8")), "fp8": wider(ours("fp8"))}
    if reason := load_vllm():
        print(f"not compared with vLLM's CUTLASS kernel: {reason}")
    else:
        found["int4 by fp8 (vLLM CUTLASS)"] = vllm
    return found


def measure(k: int, n: int, rows: tuple[int, ...]) -> Iterator[dict]:
    torch.manual_seed(0)
    weight = quantize(torch.randn(n, k, device="cuda") / k**0.5, Recipe.parse("w4a8-g128").weights)
    exact_weight = weight.dequantize(torch.float64).t()
    for name, make in makers().items():
        read = n * k * (2 if name.startswith("bf16") else 1 if name in ("w8a8", "fp8") else 0.516)
        layers = [make(weight) for _ in range(rotations(read))]
        for m in rows:
            x = torch.randn(m, k, device="cuda").to(BF16)
            exact = x[:64].double() @ exact_weight
            error = float((layers[0](x)[:64].double() - exact).norm() / exact.norm())
            assert error < WRONG, (name, m, error)
            us = microseconds([lambda layer=layer, x=x: layer(x) for layer in layers], milliseconds=1.5, repeats=7)
            speed = OPERATIONS_PER_US / (2 if name.startswith(("bf16", "w4a16")) else 1)
            floor = max((read + 2 * m * (n + k)) / READ_BYTES_PER_US, 2 * m * n * k / speed)
            row = {"k": k, "n": n, "rows": m, "name": name, "us": round(us, 2),
                   "percent_of_floor": round(100 * floor / us, 1), "relative_error": float(f"{error:.2g}")}  # fmt: skip
            if isinstance(layers[0], QuantizedLinear):
                row["kernel"] = dispatch.select(dispatch.candidates(layers[0].spec), m).name
            yield row
        del layers


@torch.inference_mode()
def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU that torch can use")
    found = []
    for k, n in SHAPES:
        found += measure(k, n, ROWS)
        here = {row["name"]: row["us"] for row in found if (row["k"], row["n"], row["rows"]) == (k, n, 64)}
        print(k, n, "64 rows:", here, flush=True)
        content = {"machine": describe(), "date": date.today().isoformat(), "results": found}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # after every layer


if __name__ == "__main__":
    main()
