"""Tokens per second of a 7B model, one sequence, one token at a time: ours, and peers in the same run.

    python benchmarks/decode.py [--layers 32] [--json benchmarks/results/decode.json] [--no-compile]

The model has the shape of Llama-2-7B and random weights, which take as long to multiply as trained ones. Every row runs
the same number of steps after the same prompt. The rows:

* canopyq: `Decoder`, one CUDA graph a token, in bfloat16 and quantized;
* canopyq with tinygemm: the same loop with PyTorch's own INT4 kernel in place of ours;
* transformers: ``model.generate`` as it comes, and with a static cache and torch.compile;
* torchao: its INT4 weights under torch.compile in a loop without ``generate``, if torchao is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import canopyq as cq
from canopyq.evaluate.generate import Decoder
from canopyq.evaluate.machine import describe
from canopyq.memory import bytes_held
from canopyq.nn.linear import QuantizedLinear

PROMPT, STEPS = 128, 256


def llama_7b(layers: int) -> nn.Module:
    """Llama-2-7B in bfloat16 on the GPU, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, dtype=torch.bfloat16,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval()


def seconds_a_step(step: Callable[[], object], steps: int = STEPS) -> float:
    for _ in range(8):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def ours(model: nn.Module, prompt: Tensor, change: Callable[[Decoder], None] | None = None) -> tuple[float, Decoder]:
    """Seconds a step of our loop, after checking its logits.

    They may differ from the model's own by what bfloat16 costs: twice the difference between the logits that the model
    gives for a text as a whole and for its last token after the rest.
    """
    decoder = Decoder(model, 1, PROMPT + STEPS + 64)
    if change:
        change(decoder)
    ids = decoder.generate(prompt, 4)[:, :-1]
    whole = model(input_ids=ids).logits[0, -1].float()
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].float()
    noise, error = (float((x - whole).norm() / whole.norm()) for x in (last, decoder.logits[0].float()))
    print(f"   logits differ by {error:.3f}, the model's own two ways by {noise:.3f}", flush=True)
    assert error < 2 * noise, f"a step is off by {error:.3f} where bfloat16 costs {noise:.3f}"
    return seconds_a_step(decoder.step, STEPS), decoder


@torch.inference_mode()
def transformers_eager(model: nn.Module, prompt: Tensor) -> float:
    model.generate(prompt, max_new_tokens=4, do_sample=False)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 64


@torch.inference_mode()
def compiled_loop(model: nn.Module, prompt: Tensor) -> float:
    """transformers' static cache, one compiled forward a token, no generate around it."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 64)
    position = torch.arange(PROMPT, device="cuda")
    model(input_ids=prompt, past_key_values=cache, cache_position=position)
    token, at = prompt[:, -1:].clone(), torch.tensor([PROMPT], device="cuda")
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def step() -> None:
        logits = forward(input_ids=token, past_key_values=cache, cache_position=at).logits
        token.copy_(logits[:, -1:].argmax(-1))
        at.add_(1)

    return seconds_a_step(step, STEPS)


class Tinygemm(nn.Module):
    """PyTorch's INT4 kernel on a weight that canopyq quantized."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight = layer.quantized_weight
        codes = (weight.codes.int() + 8).to(torch.uint8)
        self.packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
        scales = weight.scale.t().to(torch.bfloat16)
        self.scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, self.in_features), self.packed, 128, self.scales_and_zeros)
        return y.reshape(*x.shape[:-1], self.out_features)


def with_tinygemm(decoder: Decoder) -> None:
    """Put PyTorch's kernel where ours is, joined projections included."""
    for block in decoder.blocks:
        for name in ("qkv", "gate_up", "out", "down"):
            setattr(block, name, Tinygemm(getattr(block, name)))


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows that take minutes to compile")
    parser.add_argument("--only-torchao", action="store_true", help="measure its row, and add it to the file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/decode.py needs an NVIDIA GPU that torch can use, and finds none here.")
    result = {"machine": describe(), "date": date.today().isoformat(), "steps": STEPS, "rows": [], "absent": []}
    if options.only_torchao:
        result = json.loads(options.json.read_text(encoding="utf-8"))
        result["rows"] = [row for row in result["rows"] if not row["name"].startswith("torchao")]
    result["shape"] = f"Llama-2-7B, {options.layers} layers, batch 1, prompt {PROMPT}"

    def add(name: str, seconds: float, held: int, **more: object) -> None:
        row = {"name": name, "tokens_per_s": round(1 / seconds, 1), "ms": round(seconds * 1e3, 3),
               "GB": round(held / 1e9, 2)} | more  # fmt: skip
        result["rows"].append(row)
        print(f"{name:42} {row['tokens_per_s']:8.1f} tokens/s {row['ms']:8.3f} ms {row['GB']:6.2f} GB", flush=True)
        _write(options.json, result)

    prompt = torch.randint(3, 32000, (1, PROMPT), device="cuda")
    if options.only_torchao:
        _torchao(options, prompt, add, result["absent"])
        _write(options.json, result)
        return
    model = llama_7b(options.layers)
    add("transformers generate, bf16", transformers_eager(model, prompt), bytes_held(model))
    if not options.no_compile:
        add("transformers static cache, compiled, bf16", compiled_loop(model, prompt), bytes_held(model))
        torch._dynamo.reset()
    seconds, decoder = ours(model, prompt)
    add("canopyq, bf16", seconds, bytes_held(model), notes=decoder.notes)
    del decoder
    for recipe in ("w8a16", "w4a16-g128", "w8a8", "fp8"):
        free()
        model = llama_7b(options.layers)
        cq.quantize_(model, recipe)
        seconds, decoder = ours(model, prompt)
        add(f"canopyq, {recipe}", seconds, bytes_held(model), notes=decoder.notes)
        del decoder
    free()
    model = llama_7b(options.layers)
    cq.quantize_(model, "w4a16-g128")
    seconds, decoder = ours(model, prompt, with_tinygemm)
    add("canopyq's loop with tinygemm, w4a16-g128", seconds, bytes_held(model), notes=decoder.notes)
    del decoder
    _torchao(options, prompt, add, result["absent"])
    _write(options.json, result)


def _write(path: Path | None, result: dict) -> None:
    """After every row, so that a run that is cut short keeps what it measured."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _torchao(options: argparse.Namespace, prompt: Tensor, add: Callable, absent: list[str]) -> None:
    if options.no_compile:
        absent.append("torchao: left out with --no-compile")
        return
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError as error:
        absent.append(f"torchao: {error}")
        return
    free()
    before = torch.cuda.memory_allocated()
    model = llama_7b(options.layers)
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    free()
    held = torch.cuda.memory_allocated() - before  # its tensors have no storage to count
    add("torchao INT4 g128, static cache, compiled", compiled_loop(model, prompt), held)


if __name__ == "__main__":
    main()
