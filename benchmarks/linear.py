"""Linear layers with 4- and 8-bit weights on a GPU beside every public kernel that is installed.

    python -m benchmarks.linear [--bits 4] [--short]       on an NVIDIA GPU: writes results/linear_w4a16.json
    python -m benchmarks.linear --bits 4 --plot            anywhere: draws results/linear_w4a16.png from it

The layers are those that our kernels were tuned on, those of other models, which were held out of all tuning, and one
that each run draws at random. Each kernel's result is compared with float64 before it is timed, and one that is wrong
is not. Times are medians of CUDA graphs over rotating weights that no cache holds. The floor is what the memory or the
arithmetic takes at least. vLLM's kernels are also found in a folder that CANOPYQ_VLLM names.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import canopyq as cq
from benchmarks.peers import available
from canopyq.evaluate.machine import describe
from canopyq.kernels import dispatch
from canopyq.kernels.spec import LinearSpec
from canopyq.kernels.timing import microseconds, rotations
from canopyq.tensor.quantized_tensor import QuantizedTensor
from canopyq.tensor.scheme import Recipe

# (in_features, out_features) of the layers of 7B to 70B models
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (4096, 28672), (8192, 8192),
          (8192, 28672)]  # fmt: skip
HELD_OUT = [(5120, 5120), (5120, 13824), (13824, 5120), (3584, 18944), (4096, 6144)]  # of 7B to 13B models
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RECIPES = {4: "w4a16-g128", 8: "w8a16"}
OURS, FULL = "canopyq", "bfloat16 (cuBLAS)"
READ, MULTIPLY = 4.57e12, 700e12  # bytes/s and operations/s that an H200 sustains; as in canopyq.lessons.roofline
WRONG = 2e-2  # a relative error beyond rounding
ENOUGH = 0.95  # of bfloat16's speed: what no layer and no number of rows should fall below
RESULTS = Path(__file__).parent / "results"


def ours(weight: QuantizedTensor, copies: int) -> tuple[list[Callable[[Tensor], Tensor]], int]:
    """The layer as `select` runs it, over so many copies of its weight; and the weight's bytes."""
    spec = LinearSpec.of(weight)
    kernels = dispatch.candidates(spec)
    if kernels[0] is dispatch.KERNELS["reference"]:
        raise SystemExit(f"canopyq has no kernel for this GPU: {next(dispatch.verdicts(spec)).reason}")
    packed = kernels[0].layout.prepack(weight)
    sets = [packed] + [{name: part.clone() for name, part in packed.items()} for _ in range(copies - 1)]

    def layer(own: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: dispatch.select(kernels, len(x)).run(x, own, spec)

    return [layer(own) for own in sets], sum(part.untyped_storage().nbytes() for part in packed.values())


def every_shape() -> list[tuple[int, int]]:
    """Those of the table, those held out, and one at random."""
    k, n = 128 * random.randint(8, 112), 64 * random.randint(16, 320)
    return [*SHAPES, *HELD_OUT, (k, n)]


@torch.inference_mode()
def measure(bits: int, shapes: list[tuple[int, int]], rows: tuple[int, ...], path: Path) -> None:
    """Writes after every layer, so that a run that is cut short keeps what it measured."""
    peers, absent = available(bits)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    results, failed = [], {}
    for k, n in shapes:
        torch.manual_seed(0)
        weight = cq.quantize(torch.randn(n, k, device="cuda") / k**0.5, Recipe.parse(RECIPES[bits]).weights)
        exact_weight = weight.dequantize(torch.float32)
        codes, scale = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), weight.scale
        copies = rotations(n * k * bits // 8)
        layers, nbytes = ours(weight, copies)
        entries = [(OURS, torch.bfloat16, 1 << 30, layers), (f"{OURS} float16", torch.float16, 16, layers)]
        full = exact_weight.to(torch.bfloat16)
        copies_full = [full, *(full.clone() for _ in range(rotations(2 * n * k) - 1))]
        entries.append(
            (FULL, torch.bfloat16, 1 << 30, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies_full])
        )
        for peer in peers:
            try:
                made = [peer.make(codes, scale) for _ in range(copies)]
                entries.append((peer.name, peer.dtype, peer.max_rows, made))
            except (RuntimeError, ImportError, TypeError) as error:
                failed[f"{peer.name} {k}x{n}"] = str(error).splitlines()[0]
        for m in rows:
            times = {}
            for name, dtype, most, calls in entries:
                if m > most:
                    continue
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                exact = x.double() @ exact_weight.double().t() if m <= 256 else x.float() @ exact_weight.t()
                try:
                    error = float((calls[0](x).double() - exact).norm() / exact.norm())
                    if not error < WRONG:
                        failed[f"{name} {k}x{n} at {m}"] = f"relative error {error:.2g}"
                        continue
                    times[name] = time = microseconds([lambda call=call, x=x: call(x) for call in calls])
                except RuntimeError as reason:
                    failed[f"{name} {k}x{n} at {m}"] = str(reason).splitlines()[0]
                    continue
                floor = max(nbytes / READ, 2 * m * n * k / MULTIPLY) * 1e6
                row = {"in": k, "out": n, "rows": m, "kernel": name, "us": round(time, 2)}
                row |= {"relative_error": float(f"{error:.2g}"), "percent_of_floor": round(100 * floor / time)}
                results.append(row)
            below = " BELOW bfloat16" if times[FULL] < ENOUGH * times[OURS] else ""
            best = min((name for name in times if not name.startswith(OURS)), key=times.__getitem__)
            gain, over = times[best] / times[OURS], times[FULL] / times[OURS]
            line = f"{k}x{n} {m:5d} rows: {times[OURS]:7.1f} µs, {best} {times[best]:.1f}"
            print(f"{line}, {gain:.2f}x, bfloat16 {over:.2f}x{below}", flush=True)
        del layers, entries, copies_full
        torch.cuda.empty_cache()
        content = {"recipe": RECIPES[bits], "machine": describe(), "date": date.today().isoformat(), "absent": absent,
                   "failed": failed, "results": results}  # fmt: skip
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def plot(content: dict, path: Path) -> None:
    """One panel a layer: µs against rows, ours, bfloat16 and the best of the others."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), sharex=True, layout="constrained")
    for axis, (k, n) in zip(axes.flat, SHAPES, strict=True):
        series: dict[str, dict[int, float]] = {}
        for row in content["results"]:
            if (row["in"], row["out"]) == (k, n):
                name = row["kernel"] if row["kernel"] in (OURS, FULL) else "best other 4- or 8-bit kernel"
                if row["kernel"] != f"{OURS} float16":
                    times = series.setdefault(name, {})
                    times[row["rows"]] = min(row["us"], times.get(row["rows"], float("inf")))
        for name, times in series.items():
            axis.plot(list(times), list(times.values()), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", title=f"{k} → {n}")
        axis.grid(alpha=0.3)
    figure.supxlabel("rows of input (tokens)")
    figure.supylabel("µs")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{content['recipe']} on {content['machine']['gpu'].split(',')[0]}")
    figure.savefig(path, dpi=110)


def markdown(content: dict) -> str:
    """The table of the README: µs, and how many times as fast as the best other 4-bit kernel and as bfloat16."""
    times = {(row["in"], row["out"], row["rows"], row["kernel"]): row["us"] for row in content["results"]}
    lines = ["| layer | 1 token | 16 | 64 | 1024 |", "| --- | ---: | ---: | ---: | ---: |"]
    for k, n in [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672)]:
        cells = []
        for m in (1, 16, 64, 1024):
            mine, full = times[k, n, m, OURS], times[k, n, m, FULL]
            others = [us for (*where, name), us in times.items() if where == [k, n, m] and OURS not in name]
            best = min(us for us in others if us != full)
            cells.append(f"{mine:.1f} µs, {best / mine:.2f}×, {full / mine:.2f}×")
        lines.append(f"| {k} → {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--short", action="store_true", help="two layers and four numbers of rows")
    parser.add_argument("--plot", action="store_true", help="draw what was measured before")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/linear_w4a16.json or linear_w8a16.json")
    options = parser.parse_args()
    path = options.out or RESULTS / f"linear_w{options.bits}a16.json"
    if options.plot:
        plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        return
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU that torch can use")
    shapes, rows = (SHAPES[:2], (1, 16, 128, 1024)) if options.short else (every_shape(), ROWS)
    measure(options.bits, shapes, rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
