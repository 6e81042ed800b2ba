"""The quantized KV cache beside transformers' own caches: bytes, error and time a token.

    python benchmarks/kv_cache.py                     everything, about a quarter of an hour on one core
    python benchmarks/kv_cache.py bytes error         only these parts: bytes, error, time

Results go to benchmarks/results/kv_cache.json; parts that were not run keep their old figures. transformers'
QuantizedCache needs a backend: `pip install optimum-quanto hqq` in an environment of its own that also has canopyq; a
backend that is missing is left out by name.

* bytes: storage behind each cache after 4,096 tokens of the tutor's shape in bfloat16, as a share of bfloat16.
* error: KL divergence from the predictions without a cache, and recall, on the same questions for all. Chats are fed
  in passes of 64 tokens, so that every cache is read at every token. `seen` is the relative error of what attention
  sees of real keys and values after 1,024 tokens.
* time: one thread, one token at a time behind a context of 2k and 8k tokens; all caches take turns, sixteen tokens
  each. The lower quartile of the steps counts, since whatever else a machine does can only add to a step, and its
  share of the steps in which tokens become codes; by the clock and in processor time. (The tutor's context is 2,048:
  its limit is lifted, only the time is of interest.)

Whether answers change is measured by `kv_answers.py`, recall over long chats by `long_chat.py`.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers import QuantizedCache as TheirCache

import canopyq as cq
from canopyq.evaluate.machine import describe
from canopyq.evaluate.quality import compare, examine
from canopyq.tensor.formats import CACHE_FORMATS, KV_BLOCK
from canopyq.utils import track

RESULT = Path(__file__).parent / "results" / "kv_cache.json"
Maker = Callable[[object], object]


def ours(name: str, **options) -> Maker:
    return lambda config: cq.QuantizedCache(config, name, **options)


def theirs(backend: str, **options) -> Maker:
    return lambda config: TheirCache(backend, config, **options)


OURS = {name: ours(name) for name in CACHE_FORMATS}
VARIANTS = {
    "kv2 window 0": ours("kv2", residual_length=0),
    "kv4 window 0": ours("kv4", residual_length=0),
    "kv2 keys per token": ours("kv2", key_granularity="token"),
    "kv4 keys per token": ours("kv4", key_granularity="token"),
    "kv8 keys per token": ours("kv8", key_granularity="token"),
}
# As the documentation of transformers advises: axis 0 with quanto, axis 1 with HQQ.
THEIRS = {
    "transformers hqq 8": theirs("hqq", nbits=8, axis_key=1, axis_value=1),
    "transformers fp8": theirs("fp8"),
    "transformers quanto 4": theirs("quanto", nbits=4),
    "transformers hqq 4": theirs("hqq", nbits=4, axis_key=1, axis_value=1),
    "transformers quanto 2": theirs("quanto", nbits=2),
    "transformers hqq 2": theirs("hqq", nbits=2, axis_key=1, axis_value=1),
}


def runnable(makers: dict[str, Maker], config) -> dict[str, Maker]:
    """Those whose backend is installed and takes a small cache."""
    found = {}
    for name, make in makers.items():
        try:
            cache = make(config)
            for n in (64, 64, 64):
                cache.update(torch.randn(1, 2, n, 64), torch.randn(1, 2, n, 64), 0)
            found[name] = make
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0][:100]})", flush=True)
    return found


def storages(thing: object) -> dict[int, int]:
    """Every tensor storage inside: address -> bytes. Looks into containers and wrapped tensors."""
    if isinstance(thing, Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            names, _ = thing.__tensor_flatten__()
            return {k: v for name in names for k, v in storages(getattr(thing, name)).items()}
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()} if thing.numel() else {}
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return {k: v for each in thing for k, v in storages(each).items()}
    return storages(vars(thing)) if hasattr(thing, "tensors") else {}


def held(cache) -> int:
    """Bytes behind any cache."""
    return sum({k: v for layer in cache.layers for k, v in storages(vars(layer)).items()}.values())


def longer(config):
    """The tutor's shape with a context that is no limit here."""
    config = copy.deepcopy(config)
    config.max_position_embeddings = 2**17
    return config


def bytes_part(config, makers: dict[str, Maker]) -> dict[str, float]:
    """Share of bfloat16 after 4,096 tokens in chunks of 512."""
    generator = torch.Generator().manual_seed(0)
    config, found = longer(config), {}
    for name, make in makers.items():
        cache = make(config)
        for _ in range(8):
            for layer in range(config.num_hidden_layers):
                cache.update(*torch.randn(2, 1, 2, 512, 64, generator=generator).bfloat16(), layer)
        full = 2 * config.num_hidden_layers * 2 * 64 * 2 * 4096
        found[name] = round(held(cache) / full, 4)
        print(f"{name:<24} {found[name]:.4f} of bf16", flush=True)
    return found


def error_part(model, tokenizer, makers: dict[str, Maker]) -> dict[str, dict]:
    asked = cq.tutor.questions(34, seed=1) + cq.tutor.questions(30, skill="recall", fillers=24, seed=1)
    plain = examine(model, tokenizer, asked, keep=True)
    seen, found = attention_sees(model, tokenizer, makers), {}
    for name, make in makers.items():
        try:
            result = compare(plain, model, tokenizer, asked, cache=make)
        except Exception as problem:
            if name not in THEIRS:
                raise
            found[name] = {"absent": f"it breaks off: {str(problem).splitlines()[0]}", "seen": seen[name]}
            print(f"{name:<24} {found[name]}", flush=True)
            continue
        recall = [r for q, r in zip(asked, result.model.right, strict=True) if q.skill == "recall"]
        found[name] = {"kl": float(f"{result.kl:.3g}"), "right": sum(result.model.right), "of": len(asked),
                       "recall": f"{sum(recall)}/{len(recall)}", "seen": seen[name]}  # fmt: skip
        print(f"{name:<24} {found[name]}", flush=True)
    return found


@torch.inference_mode()
def attention_sees(model, tokenizer, makers: dict[str, Maker]) -> dict[str, dict[str, float]]:
    """Relative error of the keys and values that an update hands to attention, over all layers, after 1,024 tokens."""
    ids = [i for q in cq.tutor.questions(3, skill="recall", fillers=30, seed=2)
           for i in cq.tutor.encode(tokenizer, q.turns)[0]][:1025]  # fmt: skip
    full = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([ids]), past_key_values=full, use_cache=True)
    found = {}
    for name, make in makers.items():
        cache = make(model.config)
        for start in range(0, 1025, 64):
            errors = []  # those of the last pass count
            for layer, states in enumerate(full.layers):
                pair = (states.keys, states.values)
                seen = cache.update(*(x[:, :, start : start + 64] for x in pair), layer)
                errors.append([float((a - b[:, :, : start + 64]).norm() / b.norm())
                               for a, b in zip(seen, pair, strict=True)])  # fmt: skip
        mean = torch.tensor(errors).mean(0).tolist()
        found[name] = {"keys": float(f"{mean[0]:.3g}"), "values": float(f"{mean[1]:.3g}")}
    return found


@torch.inference_mode()
def time_part(model, makers: dict[str, Maker], tokens: int, rounds: int) -> dict[str, dict]:
    """Milliseconds a token behind ``tokens`` tokens.

    Of our caches both ways are timed: transformers' attention on dequantized values, and attention on the codes.
    """
    cq.fuse_attention(model)
    model.config.max_position_embeddings = 2**17
    ids = torch.randint(5, 1280, (1, tokens), generator=torch.Generator().manual_seed(0))
    runs = {}
    for name, make in {"full precision": lambda config: DynamicCache(config=config), **makers}.items():
        cache = make(model.config)
        for start in range(0, tokens, 512):
            part = ids[:, start : start + 512]
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        runs[name] = (cache, "sdpa")
        if name in OURS:
            runs[f"{name}, attention on codes"] = (cache.copy(), "canopyq")
    taken: dict[str, dict[bool, list[tuple[float, float]]]] = {name: {False: [], True: []} for name in runs}
    for _ in track(range(rounds), f"time behind {tokens} tokens"):
        for name, (cache, attention) in runs.items():
            model.set_attn_implementation(attention)
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # not timed: it finds cold memory
            for _ in range(15):
                waiting = cache.layers[0].keys.numel()
                wall, used = time.perf_counter(), time.thread_time()
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
                step = time.perf_counter() - wall, time.thread_time() - used
                taken[name][cache.layers[0].keys.numel() < waiting].append(step)  # whether tokens became codes
    period = {name: flush_period(cache) for name, (cache, _) in runs.items()}
    ms, cpu = ({name: 1000 * a_step(steps, which, period[name]) for name, steps in taken.items()} for which in (0, 1))
    found = {
        name: {
            "ms": round(ms[name], 2),
            "times_full_precision": round(ms[name] / ms["full precision"], 3),
            "processor_time_times_full_precision": round(cpu[name] / cpu["full precision"], 3),
        }
        for name in runs
    }
    for name, row in found.items():
        print(f"{tokens} tokens, {name:<28} {row}", flush=True)
    return found


def flush_period(cache: DynamicCache | TheirCache | cq.QuantizedCache) -> int:
    """Every how many tokens some become codes: ours quantize block by block, transformers' a whole residual."""
    return KV_BLOCK if isinstance(cache, cq.QuantizedCache) else getattr(cache.layers[0], "residual_length", KV_BLOCK)


def a_step(steps: dict[bool, list[tuple[float, float]]], which: int, period: int) -> float:
    """The lower quartile of the steps, and what the one of so many takes longer in which tokens become codes."""
    usual, quantizing = (sorted(step[which] for step in steps[kind]) for kind in (False, True))
    quartile = usual[len(usual) // 4]
    return quartile + (quantizing[len(quantizing) // 4] - quartile) / period if quantizing else quartile


def main() -> None:
    parts = sys.argv[1:] or ["bytes", "error", "time"]
    torch.set_num_threads(1)
    model, tokenizer = cq.tutor.load()
    peers = runnable(THEIRS, model.config)
    machine = describe() | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}
    run = {
        "bytes": lambda: bytes_part(model.config, OURS | VARIANTS | peers),
        "error": lambda: error_part(model, tokenizer, OURS | VARIANTS | peers),
        "time": lambda: {"2048": time_part(model, OURS | peers, 2048, 16), "8192": time_part(model, OURS, 8192, 10)},
    }
    for part in parts:
        found = {part: run[part]() | {"date": date.today().isoformat()}, "machine": machine}
        content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        RESULT.write_text(json.dumps(content | found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
