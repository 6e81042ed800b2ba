"""How good is each method? Every method in six settings on the tutor, beside public implementations on equal data.

    python benchmarks/quality.py                       print the recorded table
    python benchmarks/quality.py --run [--peers PYTHON] [--seeds 5]
                                                       measure what benchmarks/results/quality.json does not have yet

The public implementations run in a virtual environment of their own, whose python goes to --peers:

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 hqq==0.2.8

Everybody calibrates on the same 64 chats of 128 tokens (8,192 tokens) from the validation split; a seed draws others.
Everybody is judged by the same code on the same held-out questions. llm-compressor's AWQ stops on a machine without
an accelerator ("Cannot access accelerator device when none is available"), so it has no row. HQQ uses no data. Its zero
points are floats where a checkpoint's have as many bits as a weight, so its rows hold more bits than ours.
One thread; each run in a process of its own; seconds and memory are those of quantizing alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import canopyq as cq
from canopyq.machine import describe
from canopyq.ops.activations import rounded
from canopyq.scheme import Recipe

RESULT = Path(__file__).parent / "results" / "quality.json"
SETTINGS = ("w4a16-channel", "w4a16-g128", "w3a16-g128", "w2a16-g64", "w8a8", "w4a4-g128")
WEIGHT_ONLY = ("rtn", "hqq", "clip", "awq", "gptq", "awq+gptq", "rotation", "rotation+gptq")
WITH_INPUTS = ("rtn", "gptq", "smoothquant", "smoothquant+gptq", "rotation", "rotation+gptq",
               "rotation+smoothquant+gptq")  # fmt: skip
PEERS_WEIGHT_ONLY, PEERS_WITH_INPUTS = ("gptq", "hqq"), ("gptq", "smoothquant", "smoothquant+gptq")
QUESTIONS, CHATS, TOKENS = 170, 64, 128
REPEATED = ("gptq", "rotation+gptq", "smoothquant+gptq", "rotation+smoothquant+gptq")  # with every seed


def runs(seeds: int, peers: bool) -> Iterator[tuple[str, str, str, int]]:
    """Who, method, setting, seed: what says most comes first."""
    for seed in range(seeds):
        for setting in SETTINGS:
            inputs = Recipe.parse(setting).activations is not None
            theirs = PEERS_WITH_INPUTS if inputs else PEERS_WEIGHT_ONLY
            ours = WITH_INPUTS if inputs else WEIGHT_ONLY
            if peers:
                yield from (("public", method, setting, seed) for method in theirs if not seed or method != "hqq")
            yield from (("canopyq", method, setting, seed) for method in ours if not seed or method in REPEATED)
            if not seed and not inputs:
                yield "canopyq", "hqq", f"{setting}-asym", seed


class Judge:
    """The original's predictions, and what every model is compared with."""

    def __init__(self) -> None:
        self.model, self.tokenizer = cq.tutor.load()
        self.questions = cq.tutor.questions(QUESTIONS)
        self.reference = cq.examine(self.model, self.tokenizer, self.questions, keep=True)

    def score(self, model: nn.Module) -> dict[str, Any]:
        found = cq.compare(self.reference, model, self.tokenizer, self.questions)
        return {
            "kl": found.kl, "perplexity": found.model.perplexity, "right": found.model.accuracy.right,
            "lost": len(found.lost),
        }  # fmt: skip

    def ours(self, method: str, setting: str, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        data = cq.tutor.calibration(self.tokenizer, CHATS, TOKENS, seed)
        before, start, cpu = _most_memory(), time.perf_counter(), time.process_time()
        report = cq.quantize_(model, setting, method=method, calibration=data if _needs_data(method) else None)
        cost = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": _most_memory() - before,
        }
        weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        bits = sum(8 * layer.bytes_after for layer in report.layers) / weights
        return self.score(model) | cost | {"bits_per_weight": bits}

    def public(self, method: str, setting: str, seed: int, python: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            ids, out = Path(folder) / "ids.safetensors", Path(folder) / "out.safetensors"
            chats = torch.cat(cq.tutor.calibration(self.tokenizer, CHATS, TOKENS, seed))
            save_file({"ids": chats.contiguous()}, ids)
            script = Path(__file__).with_name("quality_peer.py")
            command = [python, str(script), str(cq.tutor.path()), method, setting, str(ids), str(out)]
            clean = {"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"error": done.stderr.strip().splitlines()[-1][:200]}
            model = copy.deepcopy(self.model)
            model.load_state_dict(load_file(out), strict=False)
            cost = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        if (activations := Recipe.parse(setting).activations) is not None:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.register_forward_pre_hook(lambda _, given: (rounded(given[0], activations, None, None),))
        return self.score(model) | cost


def _needs_data(method: str) -> bool:
    return method not in ("rtn", "hqq", "rotation")


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(seeds: int, python: str | None) -> None:
    """Measure what is missing; the file is written after every run."""
    torch.set_num_threads(1)
    judge = Judge()
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
    have = {(row["who"], row["method"], row["setting"], row["seed"]) for row in found["rows"]}
    for who, method, setting, seed in runs(seeds, python is not None):
        if (who, method, setting, seed) in have:
            continue
        job = judge.ours if who == "canopyq" else judge.public
        arguments = (method, setting, seed) if who == "canopyq" else (method, setting, seed, python)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            row = {"who": who, "method": method, "setting": setting, "seed": seed} | pool.apply(job, arguments)
        print(row, flush=True)
        found["rows"].append(row)
        found |= {"machine": describe(), "date": date.today().isoformat(), "questions": QUESTIONS,
                  "calibration": {"chats": CHATS, "tokens": TOKENS}, "original": {
                      "perplexity": judge.reference.perplexity, "right": judge.reference.accuracy.right},
                  "public": {"llmcompressor": "0.14.0.1", "hqq": "0.2.8", "torch": "2.13.0"}}  # fmt: skip
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def columns(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a result, by the setting whose column they stand in; zero points make another method of one."""
    rows = []
    for row in found["rows"]:
        if "kl" in row:
            setting = row["setting"].removesuffix("-asym")
            named = row["method"] if setting == row["setting"] else f"{row['method']}, zero points"
            rows.append(row | {"setting": setting, "method": named})
    return rows


def table(found: dict[str, Any]) -> str:
    """KL of every method in every setting, the mean over seeds and, where there are several, their spread."""
    rows = columns(found)
    lines = ["| method | " + " | ".join(SETTINGS) + " |", "|---|" + "---:|" * len(SETTINGS)]
    names = dict.fromkeys((row["who"], row["method"]) for row in rows)
    for who, method in sorted(names, key=lambda name: (name[0] != "canopyq", name[1])):
        cells = []
        for setting in SETTINGS:
            key = (who, method, setting)
            kls = [row["kl"] for row in rows if (row["who"], row["method"], row["setting"]) == key]
            spread = f" ± {statistics.stdev(kls):.1g}" if len(kls) > 1 else ""
            cells.append(f"{statistics.mean(kls):.2g}{spread}" if kls else "")
        lines.append(f"| {method if who == 'canopyq' else f'{method} (public)'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """KL by setting, a dot a method: ours filled, the public ones hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    rows = columns(found)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for who, offset in (("canopyq", -0.12), ("public", 0.12)):
        for i, method in enumerate(methods):
            mine = [row for row in rows if (row["who"], row["method"]) == (who, method)]
            if mine:
                colour = f"C{i}" if i < 10 else "black"
                axes.scatter(
                    [SETTINGS.index(row["setting"]) + offset for row in mine],
                    [row["kl"] for row in mine],
                    s=36,
                    marker="o" if who == "canopyq" else "D",
                    label=method if who == "canopyq" else f"{method} (public)",
                    edgecolors=colour,
                    facecolors=colour if who == "canopyq" else "none",
                )
    axes.set_yscale("log")
    axes.set_xticks(range(len(SETTINGS)), SETTINGS)
    axes.set_ylabel("KL to the original, nats per token")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure what is missing")
    parser.add_argument("--peers", help="the python of the public implementations' environment")
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of calibration chats")
    arguments = parser.parse_args()
    if arguments.run:
        measure(arguments.seeds, arguments.peers)
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    plot(found, RESULT.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
