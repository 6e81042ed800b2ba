"""Quantize the tutor with a public implementation, in that implementation's own virtual environment.

`benchmarks.quality` runs it and says how to make the environment. It writes the whole model after quantizing, with
every weight as what its codes stand for, so that all methods are evaluated by the same code.

    python benchmarks/quality_peer.py MODEL METHOD SETTING IDS OUT
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.utils import update_offload_parameter
from datasets import Dataset
from hqq.core.quantize import Quantizer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

warnings.filterwarnings("ignore")
GROUPS = {"w4a16-channel": (4, None, None), "w4a16-g128": (4, 128, None), "w3a16-g128": (3, 128, None),
          "w2a16-g64": (2, 64, None), "w8a8": (8, None, 8), "w4a4-g128": (4, 128, 4)}  # fmt: skip


def rss() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_hqq(model: torch.nn.Module, bits: int, group: int | None) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, meta = Quantizer.quantize(
                module.weight.data, nbits=bits, group_size=group, axis=1, optimize=True, device="cpu",
                compute_dtype=torch.float32,
            )  # fmt: skip
            module.weight.data = Quantizer.dequantize(codes, meta).float().reshape(module.weight.shape)


def with_llmcompressor(model: torch.nn.Module, method: str, setting: str, ids: torch.Tensor) -> None:
    bits, group, inputs = GROUPS[setting]
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, group_size=group,
                               strategy="group" if group else "channel")  # fmt: skip
    activations = None
    if inputs:
        activations = QuantizationArgs(num_bits=inputs, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    steps = [SmoothQuantModifier(smoothing_strength=0.8)] if "smoothquant" in method else []
    steps += [AWQModifier()] if "awq" in method else []
    rounding = GPTQModifier if "gptq" in method else QuantizationModifier
    steps.append(rounding(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=data, recipe=steps, num_calibration_samples=len(ids), max_seq_length=ids.shape[1])
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            zero = getattr(module, "weight_zero_point", None)
            values = fake_quantize(module.weight, module.weight_scale, zero, weights)
            update_offload_parameter(module, "weight", values)


def main() -> None:
    folder, method, setting, ids, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = load_file(ids)["ids"]
    before, start, cpu = rss(), time.perf_counter(), time.process_time()
    if method == "hqq":
        with_hqq(model, *GROUPS[setting][:2])
    else:
        with_llmcompressor(model, method, setting, data)
    cost = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": rss() - before,
    }
    kept = {name: x for name, x in model.state_dict().items() if name.endswith((".weight", "norm.weight"))}
    save_file({name: x.float().contiguous().clone() for name, x in kept.items() if name != "lm_head.weight"}, out)
    Path(out).with_suffix(".json").write_text(json.dumps(cost), encoding="utf-8")


if __name__ == "__main__":
    main()
