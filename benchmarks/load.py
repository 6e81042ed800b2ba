"""How long a packed checkpoint takes to load, beside what transformers takes for the bfloat16 original.

    python benchmarks/load.py              make a random Llama of 2 GB, quantize it, load both in turn, print the times
    python benchmarks/load.py --write      and keep them in benchmarks/results/load.json

Two moments are taken: when the loader returns, and when the model has given its first token. Only the second one can be
compared: transformers maps the original's file and reads it when the model runs, and canopyq reads first and lays its
weights out for the kernel when the model runs. Both with the files in the system's cache, and without.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import canopyq as cq
from benchmarks.stream import random_checkpoint
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.evaluate.machine import describe

RESULT = Path(__file__).parent / "results" / "load.json"


def forget(folder: Path) -> None:
    """Ask the system to drop the folder's files from its cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(load: Callable[[], nn.Module]) -> dict[str, float]:
    """Seconds until the loader returns, until the first token, and of them those that the processor worked."""
    gc.collect()
    start, worked = time.perf_counter(), time.process_time()
    model = load()
    loaded = time.perf_counter() - start
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    return {
        "loaded": loaded,
        "first_token": time.perf_counter() - start,
        "first_token_processor": time.process_time() - worked,
    }


def measure(recipe: str = "w4a16-g128", repeats: int = 5, **sizes: int | bool) -> dict:
    """Medians over ``repeats`` turns of: the packed checkpoint by canopyq, the original by transformers."""
    transformers.utils.logging.disable_progress_bar()
    result: dict = {"recipe": recipe, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch:
        original, packed = Path(scratch, "original"), Path(scratch, "packed")
        random_checkpoint(original, **sizes)
        quantize_checkpoint(original, recipe, packed)
        loaders = {
            "canopyq": (packed, lambda: cq.load(packed, dtype="bfloat16")),
            "transformers_bf16": (original, lambda: transformers.AutoModelForCausalLM.from_pretrained(original)),
        }
        for _, load in loaders.values():  # imports, and the file cache
            timed(load)
        for cache in ("in_cache", "from_disk"):
            times: dict[str, list] = {name: [] for name in loaders}
            for _ in range(repeats):
                for name, (folder, load) in loaders.items():
                    if cache == "from_disk":
                        forget(folder)
                    times[name].append(timed(load))
            result[cache] = {
                name: {key: round(statistics.median(x[key] for x in found), 3) for key in found[0]}
                for name, found in times.items()
            }
            ours, other = (result[cache][name]["first_token"] for name in loaders)
            result[cache]["ratio"] = round(ours / other, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/load.json")
    parser.add_argument("--recipe", default="w4a16-g128")
    parser.add_argument("--layers", type=int, default=16, help="16 make 2 GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": arguments.layers, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    result = {"model": sizes} | measure(arguments.recipe, **sizes)
    print(json.dumps(result, indent=2))
    if arguments.write:
        versions = {"transformers": transformers.__version__}
        RESULT.write_text(json.dumps(result | {"machine": describe() | versions}, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
