"""How much memory and time `canopyq quantize` takes for a checkpoint that is larger than the memory it may use.

    python benchmarks/stream.py              make a random Llama of 3 GB, quantize it, print what that took
    python benchmarks/stream.py --write      and keep it in benchmarks/results/stream.json

The checkpoint is quantized by a process of its own. Its peak is what the system says was resident at most (VmHWM): the
pages of the mapped source count too. What Python, torch and transformers take without a model stands beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from canopyq.checkpoint.output import Writer
from canopyq.evaluate.machine import describe

LIMIT = 1_000_000_000  # bytes resident at most
RESULT = Path(__file__).parent / "results" / "stream.json"
CHILD = """
import json, sys, time
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
from canopyq.checkpoint.stream import quantize_checkpoint

def resident():
    # Not ru_maxrss: that one starts with what the process had that started this one.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
before, start = resident(), time.perf_counter()
done = quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "peak_bytes": resident(), "import_bytes": before,
                  "expected_bytes": done.plan.peak_bytes, "source_bytes": done.plan.bytes_before,
                  "written_bytes": done.plan.bytes_after, "files": len(done.plan.shards)}))
"""


def random_checkpoint(
    folder: Path, files: int = 1, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **sizes
) -> None:
    """Write a Llama with normal random weights, tensor by tensor. ``sizes`` are arguments of its LlamaConfig."""
    config = transformers.LlamaConfig(dtype=str(dtype).removeprefix("torch."), **sizes)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    shapes = {name: (dtype, tuple(weight.shape)) for name, weight in model.named_parameters()}  # a tied head only once
    generator = torch.Generator().manual_seed(seed)
    weight_map, names = {}, list(shapes)
    for i in range(files):
        own = names[len(names) * i // files : len(names) * (i + 1) // files]
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        with Writer(folder / file, {name: shapes[name] for name in own}) as writer:
            for name in own:
                writer.write(name, torch.empty(shapes[name][1], dtype=dtype).normal_(0, 0.02, generator=generator))
        weight_map |= dict.fromkeys(own, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(recipe: str = "w4a16-g128", files: int = 3, **sizes: int | bool) -> dict:
    """What quantizing a random checkpoint took, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        random_checkpoint(source, files, **sizes)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(source), recipe, str(out)], stdout=subprocess.PIPE, text=True, check=True
        )
        start = time.perf_counter()
        for file in source.glob("*.safetensors"):
            file.read_bytes()
        read = round(time.perf_counter() - start, 2)
    return {"recipe": recipe, **json.loads(done.stdout), "reading_alone_seconds": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/stream.json")
    parser.add_argument("--recipe", default="w4a16-g128")
    parser.add_argument("--layers", type=int, default=21, help="21 make 3 GB")
    arguments = parser.parse_args()
    sizes = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": arguments.layers, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    result = {"model": sizes} | measure(arguments.recipe, **sizes) | {"limit_bytes": LIMIT}
    print(json.dumps(result, indent=2))
    if result["peak_bytes"] >= LIMIT:
        sys.exit(f"{result['peak_bytes']:,} bytes were resident, more than {LIMIT:,}")
    if arguments.write:
        versions = {"transformers": transformers.__version__}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result | {"machine": describe() | versions}, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
