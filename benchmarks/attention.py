"""One decode step's attention on a quantized KV cache, beside its peers: microseconds, error, share of the floor.

    python -m benchmarks.attention            # measure; needs an NVIDIA GPU
    python -m benchmarks.attention --plot     # draw what was measured last

Writes benchmarks/results/attention.json and attention.png. 32 query heads share 8 key heads of 128 channels; a batch of
sequences, one new token each. Every result is first compared with float64 attention on the original keys and values.
Peers: PyTorch's attention in bfloat16 (its two fused backends), and FlashAttention-3 in bfloat16 and FP8 if vLLM is
installed. The floor is the time to read codes, scales and recent tokens once at 4.57 TB/s, which an H200 reaches.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from canopyq.evaluate.machine import describe
from canopyq.kernels.cuda import attention
from canopyq.kernels.timing import microseconds, rotations
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import get_cache_format

HEADS, KV_HEADS, D, RECENT = 32, 8, 128, 64
CASES = [(1, 4096), (1, 32768), (16, 4096), (16, 32768)]
FORMATS = ("kv8", "kv-fp8", "kv4", "kv2")
READ_BYTES_PER_US = 4.57e6
RESULTS = Path(__file__).parent / "results" / "attention.json"

Run = Callable[[], Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, 1, D) float64."""
    outs = []
    for i in range(len(q)):
        queries = q[i].double().view(KV_HEADS, HEADS // KV_HEADS, D)
        weights = (queries @ k[i].double().transpose(1, 2) * D**-0.5).softmax(-1)
        outs.append((weights @ v[i].double()).view(HEADS, 1, D))
    return torch.stack(outs)


def ours(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, int]:
    """A call on codes in memory of their own, and the bytes that it must read."""
    old = k.shape[2] - RECENT
    keys = QuantizedKV.quantize(k[:, :, :old], get_cache_format(name), "channel")
    values = QuantizedKV.quantize(v[:, :, :old], get_cache_format(name), "token")
    new = [x[:, :, old:].clone() for x in (k, v)]
    view = KVView(keys, values, *new)
    read = sum(x.nbytes for x in (*view.tensors, q, q))

    def run() -> Tensor:
        return attention.attend(q, view, D**-0.5).transpose(1, 2)

    return run, read


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Run:
    k, v = k.clone(), v.clone()

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def flash3(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Run:
    """vLLM's build of FlashAttention-3, dense keys (B, T, kv_heads, D); FP8 takes a scale per batch entry and head."""
    b, tokens = len(k), k.shape[2]
    parts, scales = [], []
    for x in (q, k, v):
        x = x.transpose(1, 2)
        scale = torch.ones(b, KV_HEADS, device="cuda")
        if dtype == torch.float8_e4m3fn:
            scale *= x.abs().amax().float() / 448
            x = (x.float() / scale[0, 0]).to(dtype)
        parts.append(x.contiguous() if x.stride(-1) == 1 else x)
        scales.append(scale if dtype == torch.float8_e4m3fn else None)
    used = torch.full((b,), tokens, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        out = torch.ops._vllm_fa3_C.fwd(
            *parts, *[None] * 8, used, *[None] * 8, *scales, D**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0,
            None, 1, 0, None,
        )  # fmt: skip
        return out[0].transpose(1, 2)

    return run


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Run]]:
    found = {
        f"SDPA bf16 ({backend.name.split('_')[0].lower()})": lambda q, k, v, backend=backend: sdpa(backend, q, k, v)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    }
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm.vllm_flash_attn")
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        found["FlashAttention-3 bf16"] = lambda q, k, v: flash3(q, k, v, torch.bfloat16)
        found["FlashAttention-3 fp8"] = lambda q, k, v: flash3(q, k, v, torch.float8_e4m3fn)
    else:
        print("FlashAttention-3 is absent: install vLLM to compare with it")
    return found


def states(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys with a few channels that stand out as those of real models do, and values; bfloat16."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)

    loud = 1 + 4 * (torch.arange(D, device="cuda") % 32 == 0)
    k = (normal(batch, KV_HEADS, tokens, D) * loud + normal(batch, KV_HEADS, 1, D)).to(torch.bfloat16)
    v = normal(batch, KV_HEADS, tokens, D).to(torch.bfloat16)
    q = (normal(batch, HEADS, 1, D) / loud).to(torch.bfloat16)
    return q, k, v


def measure(batch: int, tokens: int) -> Iterator[dict]:
    torch.manual_seed(0)
    q, k, v = states(batch, tokens, seed=batch + tokens)
    reference = exact(q, k, v)
    makers: dict[str, Callable[[], tuple[Run, int]]] = {name: lambda name=name: ours(name, q, k, v) for name in FORMATS}
    for name, make in peers().items():
        width = 1 if "fp8" in name else 2
        makers[name] = lambda make=make, width=width: (make(q, k, v), 2 * width * k.numel())
    for name, make in makers.items():
        row = {"batch": batch, "context": tokens, "name": name}
        try:
            run, read = make()
            out = run()
            error = float((out.double() - reference).norm() / reference.norm())
            again = run()
        except Exception as problem:  # a peer that cannot do this shape is a row of the table, not the end of it
            yield row | {"absent": str(problem).splitlines()[0][:120]}
            continue
        assert bool(out.isfinite().all()) and (name not in FORMATS or torch.equal(out, again)), name
        calls = [run] + [make()[0] for _ in range(rotations(read) - 1)]
        us = microseconds(calls)
        floor = read / READ_BYTES_PER_US
        yield row | {"us": round(us, 2), "floor_us": round(floor, 2), "percent_of_floor": round(100 * floor / us, 1),
                     "relative_error": float(f"{error:.2g}")}  # fmt: skip
        del calls, run
        torch.cuda.empty_cache()


def plot() -> None:
    import matplotlib.pyplot as plt

    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [row for row in content["results"] if "us" in row]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, len(CASES), figsize=(12, 3.6), sharey=True)
    for axis, (batch, tokens) in zip(axes, CASES, strict=True):
        here = {row["name"]: row for row in rows if (row["batch"], row["context"]) == (batch, tokens)}
        for y, name in enumerate(reversed(names)):
            if name in here:
                axis.barh(y, here[name]["us"], color="tab:green" if name in FORMATS else "tab:gray")
                axis.vlines(here[name]["floor_us"], y - 0.4, y + 0.4, color="black", linewidth=1.5)
                axis.text(here[name]["us"], y, f" {here[name]['us']:.3g}", va="center", fontsize=8)
        axis.set(title=f"batch {batch}, {tokens // 1024}k tokens", xlabel="microseconds")
        axis.set_xlim(0, 1.2 * max(row["us"] for row in here.values()))
        axis.set_yticks(range(len(names)), list(reversed(names)))
    figure.suptitle(f"One step's attention, {content['machine'].get('gpu', 'GPU')}; black: the floor of memory traffic")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


@torch.inference_mode()
def main() -> None:
    if "--plot" not in sys.argv:
        rows = []
        for batch, tokens in CASES:
            for row in measure(batch, tokens):
                rows.append(row)
                print(row, flush=True)
            content = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D, "recent": RECENT, "machine": describe(),
                       "date": date.today().isoformat(), "results": rows}  # fmt: skip
            RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot()


if __name__ == "__main__":
    main()
