"""Every CPU kernel over a grid of shapes, held to float64, at every capability that this processor has.

    python tests/kernels/sweep_cpu.py           the whole grid: a process for each capability, and a table at the end
    python tests/kernels/sweep_cpu.py --brief   a few shapes of each form, which the tests run too

The grid of a form of weights and inputs, for every kernel that takes it, contiguous and strided each time: every
in_features, each with a third of the out_features, the next third in the next form, while rows and dtype rotate; so
that every two values of two of these axes meet. And at the edges, where vectors and blocks are just full or just not,
every in_features, out_features and rows together.

A process that ends by a signal is a failure like any other: an operator that reads past its row may do that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from canopyq.kernels import activations, cpu_tiled, dispatch
from canopyq.kernels.dispatch import Kernel
from canopyq.kernels.spec import ANY_ROWS, LinearSpec
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme

BF16 = torch.bfloat16
ROUNDOFF = {torch.float32: 2.0**-24, BF16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place
INS = (*range(1, 131), *range(1000, 1041))
OUTS = (*range(1, 71), 128, 192)
ROWS = (*range(1, 18), 33, 64)
EDGE_INS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 128, 129, 1000, 1008, 1023, 1024, 1040)
EDGE_OUTS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 52, 63, 64, 65, 70, 128, 192)
EDGE_ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 33, 64)


DTYPES = tuple(ROUNDOFF)
Shape = tuple[int, tuple[int, ...], tuple[torch.dtype, ...]]  # out_features, numbers of rows, dtypes of the input
Shapes = dict[int, list[Shape]]  # by in_features


@dataclass(frozen=True)
class Form:
    """A weight's scheme and its input's, static if so."""

    weights: Scheme
    inputs: Scheme | None = None
    static: bool = False


INT8, FP8 = Scheme("int8", "channel", scale_dtype=BF16), Scheme("fp8", "channel", scale_dtype=BF16)
FORMS = {
    "int8": Form(INT8),
    "int8 float32 scales": Form(Scheme("int8", "channel", scale_dtype=torch.float32)),
    "int8 asymmetric": Form(Scheme("int8", "channel", symmetric=False, scale_dtype=BF16)),
    "int8 tensor": Form(Scheme("int8", "tensor", scale_dtype=BF16)),
    "int8 g32": Form(Scheme("int8", "g32", scale_dtype=BF16)),
    "int8 by column": Form(Scheme("int8", Granularity("channel", axis=1), scale_dtype=BF16)),
    "int4 g32": Form(Scheme("int4", "g32", scale_dtype=BF16)),
    "int4 g32 asymmetric": Form(Scheme("int4", "g32", symmetric=False, scale_dtype=BF16)),
    "int4 g48": Form(Scheme("int4", "g48", scale_dtype=BF16)),
    "int4 channel": Form(Scheme("int4", "channel", scale_dtype=BF16)),
    "int4 channel asymmetric": Form(Scheme("int4", "channel", symmetric=False, scale_dtype=BF16)),
    "int3 g7": Form(Scheme("int3", "g7", scale_dtype=BF16)),
    "fp8": Form(FP8),
    "nf4": Form(Scheme("nf4", scale_dtype=BF16)),
    "mxfp4": Form(Scheme("mxfp4")),
    "nvfp4": Form(Scheme("nvfp4")),
    "int8 by int8": Form(INT8, Scheme("int8", "token")),
    "int8 by int8 asymmetric": Form(INT8, Scheme("int8", "token", symmetric=False)),
    "int8 by int8 static": Form(INT8, Scheme("int8", "tensor"), static=True),
    "int8 by int8 static asymmetric": Form(INT8, Scheme("int8", "tensor", symmetric=False), static=True),
    "int4 by int8": Form(Scheme("int4", "g32", scale_dtype=BF16), Scheme("int8", "token")),
    "fp8 by fp8": Form(FP8, Scheme("fp8", "token")),
    "fp8 by fp8 static": Form(FP8, Scheme("fp8", "tensor"), static=True),
}
KERNELS = tuple(kernel for kernel in dispatch.KERNELS.values() if kernel.device != "cuda")
ROUNDS_INPUT = (dispatch.KERNELS["cpu_int4"], dispatch.KERNELS["cpu_w8a16"])  # to bfloat16
IN_BFLOAT16 = (*ROUNDS_INPUT, dispatch.KERNELS["cpu_w8a8_bfloat16"])  # what they return


def bound(kernel: Kernel, form: Form, dtype: torch.dtype, k: int, exact: Tensor, total: Tensor) -> Tensor:
    """How far a kernel may be from ``exact`` = Σ x·ŵ, where ``total`` = Σ |x|·(|ŵ| + |z·s|): one rounding for each
    thing that it rounds (inputs, weights, the result), and one of float32 for each addition and factor."""
    share = (k + 8) * 2.0**-24
    if kernel in ROUNDS_INPUT:
        share += ROUNDOFF[BF16] if dtype != BF16 else 0
    if kernel is dispatch.KERNELS["cpu_int4"]:  # it multiplies in bfloat16, with offsets z·s in bfloat16 too
        share += 2 * ROUNDOFF[BF16]
    if kernel is dispatch.KERNELS["reference"]:
        share += ROUNDOFF[dtype]
    if form.inputs is not None and not kernel.takes_codes:  # gets what the codes stand for, in the input's dtype
        share += ROUNDOFF[dtype]
    last = ROUNDOFF[dtype] + (ROUNDOFF[BF16] if kernel in IN_BFLOAT16 else 0)
    return share * total + 1.1 * last * exact.abs() + 2.0**-24


def input_codes(x: Tensor, form: Form, ranges: tuple[Tensor | None, Tensor | None]) -> QuantizedTensor:
    return activations.fixed(x, form.inputs, *ranges) if form.static else activations.dynamic(x, form.inputs)


def static_range(form: Form) -> tuple[Tensor | None, Tensor | None]:
    if not form.static:
        return None, None
    zero = None if form.inputs.symmetric else torch.tensor([20], dtype=torch.int8)
    return torch.tensor([0.02 if form.inputs.format.name == "int8" else 0.01]), zero


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous: the transpose of its transpose, but for a single row, whose every second value
    they are."""
    return x.t().contiguous().t() if min(x.shape) > 1 else x.repeat_interleave(2, dim=1)[:, ::2]


def first_rows(given: Tensor | QuantizedTensor, rows: int) -> Tensor | QuantizedTensor:
    """Inputs of the first rows; each row's codes and scale are its own."""
    if isinstance(given, Tensor):
        return given[:rows]
    scale, zero = (part if part is None or part.dim() < 2 else part[:rows] for part in (given.scale, given.zero_point))
    data = given.data[:rows]
    return replace(given, data=data, scale=scale, zero_point=zero, shape=data.shape)


class Sweep:
    """Counts shapes and the worst error, as a share of its bound, by kernel; keeps what was wrong."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.worst: dict[str, float] = {}
        self.wrong: list[str] = []

    def form(self, name: str, shapes: Shapes) -> None:
        """Hold the kernels that take it to float64 on a form of weights and inputs."""
        form, ranges = FORMS[name], static_range(FORMS[name])
        granularity = form.weights.granularity
        for k, outs in shapes.items():
            if granularity.kind == "group" and granularity.group_size > k:
                continue
            draw = torch.Generator().manual_seed(k)
            whole = quantize(torch.randn(max(n for n, *_ in outs), k, generator=draw) / k**0.5, form.weights)
            values = whole.dequantize(torch.float64)
            size = values.abs()
            if whole.zero_point is not None:
                offsets = (whole.zero_point.double() * whole.float_scale()).abs()
                size += offsets.repeat_interleave(-(-k // offsets.shape[1]), dim=1)[:, :k]
            for dtype in DTYPES:
                x = torch.randn(max(ROWS), k, generator=draw).to(dtype)
                codes = None if form.inputs is None else input_codes(x, form, ranges)
                stand_for = x if codes is None else activations.rounded(x, form.inputs, *ranges)
                seen = x.double() if codes is None else codes.dequantize(torch.float64)
                exact, total = seen @ values.t(), seen.abs() @ size.t()
                for n, rows in ((n, rows) for n, rows, dtypes in outs if dtype in dtypes):
                    weight = cpu_tiled._rows(whole, 0, n)
                    spec = LinearSpec.of(weight, form.inputs)
                    for kernel in KERNELS:
                        if kernel.unsupported_reason(spec) is None:
                            layer = QuantizedLinear(weight, None, form.inputs, *ranges)
                            layer.set_packed(kernel.layout.prepack(weight), kernel.layout)
                            layer._kernels = (replace(kernel, rows=ANY_ROWS),)
                            limit = bound(kernel, form, dtype, k, exact[:, :n], total[:, :n])
                            given = codes if kernel.takes_codes else stand_for
                            self._layer(name, layer, x, given, exact[:, :n], limit, rows)

    def _layer(
        self,
        name: str,
        layer: QuantizedLinear,
        x: Tensor,
        given: Tensor | QuantizedTensor,
        exact: Tensor,
        limit: Tensor,
        row_counts: tuple[int, ...],
    ) -> None:
        """The kernel on ``given`` for so many rows, and once the whole layer on a strided ``x``."""
        kernel, packed, spec = layer._kernels[0], layer.packed, layer.spec
        found = [kernel.run(first_rows(given, rows), packed, spec) for rows in row_counts]
        odd = (layer.in_features + layer.out_features) % len(row_counts)
        same = torch.equal(layer(strided(x[: row_counts[odd]])), found[odd])
        well = all(y.dtype == x.dtype and y.shape == exact[: len(y)].shape for y in found)
        index = torch.cat([torch.arange(rows) for rows in row_counts])
        errors = ((torch.cat(found).double() - exact[index]).abs() / limit[index]).nan_to_num(torch.inf).amax(1)
        worst = float(errors.max())
        if not (worst <= 1 and same and well):
            by_count = [float(part.max()) for part in errors.split(row_counts)]
            rows = row_counts[by_count.index(worst) if same else odd]
            shape = f"{rows} x {layer.in_features} -> {layer.out_features} in {str(x.dtype)[6:]}"
            what = f"{worst:.3g} of the bound" if same else "another result for strided input"
            self.wrong.append(f"{name}, {kernel.name}: {shape}: {what}")
        self.worst[kernel.name] = max(self.worst.get(kernel.name, 0.0), worst)
        self.counts[kernel.name] = self.counts.get(kernel.name, 0) + len(row_counts) + 1


def brief(form: int) -> Shapes:
    """Each second of the edges, with one out_features and two numbers of rows."""
    draw = random.Random(form)
    return {
        k: [(draw.choice((64, 128) if k % 32 == 0 else EDGE_OUTS), (1, draw.choice(EDGE_ROWS)), DTYPES)]
        for k in EDGE_INS[form % 2 :: 2]
    }


def grid(form: int) -> Shapes:
    """The whole grid of the form of this number; ``test_the_grid_has_every_pair`` holds it to what is said above."""
    return {
        k: [(n, EDGE_ROWS, (DTYPES[(i + j) % 3],)) for j, n in enumerate(EDGE_OUTS) if k in EDGE_INS]
        + [
            (n, (ROWS[(7 * i + j) % len(ROWS)],), (DTYPES[(i // 3 + j // 3) % 3],))
            for j, n in enumerate(OUTS)
            if (i + j + form) % 3 == 0
        ]
        for i, k in enumerate(INS)
    }


def sweep(in_brief: bool) -> Sweep:
    found = Sweep()
    for number, name in enumerate(FORMS):
        found.form(name, (brief if in_brief else grid)(number))
    return found


# ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA: torch's own vectors, and oneDNN's. They lower what there is.
SETTINGS = (("default", ""), ("avx2", ""), ("avx512", ""), ("default", "SSE41"), ("avx2", "AVX2"),
            ("avx512", "AVX512_CORE"))  # fmt: skip


def run(capability: str, onednn: str, in_brief: bool = False) -> dict:
    """What a process of its own finds: ``{"counts", "worst", "wrong"}``, or ``{"missing": capability}``."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"ONEDNN_MAX_CPU_ISA": onednn} if onednn else {}
    command = [sys.executable, __file__, "--here", *(["--brief"] if in_brief else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        wrong = f"the process ended with {done.returncode}: {done.stderr[-1500:]}"
        return {"wrong": [wrong], "counts": {}, "worst": {}}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="a few shapes of each form")
    parser.add_argument("--here", action="store_true", help="in this process, at the capability that it has")
    chosen = parser.parse_args()
    if chosen.here:
        wanted, have = os.environ.get("ATEN_CPU_CAPABILITY"), torch.backends.cpu.get_cpu_capability().lower()
        if wanted and wanted != have:
            print(json.dumps({"missing": wanted}))
            return 0
        torch.set_grad_enabled(False)
        found = sweep(chosen.brief)
        print(json.dumps({"counts": found.counts, "worst": found.worst, "wrong": found.wrong}))
        return 0
    results = {}
    for capability, onednn in SETTINGS:
        name = capability + (f", oneDNN {onednn}" if onednn else "")
        begin, found = time.monotonic(), run(capability, onednn, chosen.brief)
        if "missing" in found:
            print(f"{name}: this processor has it not", flush=True)
            continue
        results[name] = found
        for line in found["wrong"][:20]:
            print(f"  WRONG {line}")
        print(f"{name}: {len(found['wrong'])} wrong, {time.monotonic() - begin:.0f} s", flush=True)
    print("\nresults compared, by kernel and capability, and the largest error as a share of its bound")
    for kernel in KERNELS:
        print(kernel.name)
        for name, found in results.items():
            if kernel.name in found["counts"]:
                print(f"  {found['counts'][kernel.name]:>9,}  {found['worst'][kernel.name]:.2f}  {name}")
    return int(any(found["wrong"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
