"""How good is each method? Every method in six settings on the tutor, beside public implementations on equal data.

    python -m benchmarks.quality                     print the recorded table, draw the plot
    python -m benchmarks.quality --run [--peers PYTHON] [--seeds 5] [--jobs 2]
                                                     measure what benchmarks/results/quality.json does not have yet
    python -m benchmarks.quality --fp4 [--run] [--seeds 5] [--jobs 2]
                                                     the same for NVFP4 and MXFP4, in quality_fp4.json, without peers
    python -m benchmarks.quality --time 3 --peers PYTHON
                                                     time ours and the public ones in turn, so many times

The public implementations run in a virtual environment of their own, whose python goes to --peers:

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 hqq==0.2.8

Everybody calibrates on the same 64 chats of 128 tokens (8,192 tokens) from the validation split; a seed draws others.
Everybody is judged by the same code on the same held-out questions. One thread; each run in a process of its own,
--jobs of them at a time; seconds and memory are those of quantizing alone, imports not counted. What is compared are
the seconds of the processor that --time takes, one run at a time, ours and theirs alternating. llm-compressor's AWQ
stops on a machine without an accelerator ("Cannot access accelerator device when none is available"), so --awq runs it
on a GPU, and its seconds are not compared. HQQ uses no data. The public one has a zero point of 16 bits beside each
scale; ours beside it has zero points of as many bits as a weight, as checkpoints do, and so fewer bits in all.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import canopyq as cq
from benchmarks.quality_table import FP4, FP4_RESULT, RESULT, SETTINGS, WITH_ZERO_POINTS, plot, table
from canopyq.disk import write_atomic
from canopyq.evaluate.machine import describe
from canopyq.kernels.activations import rounded
from canopyq.tensor.scheme import Recipe

WEIGHT_ONLY = ("gptq", "awq", "rotation+gptq", "awq+gptq", "rtn", "hqq", "clip", "rotation")
WITH_INPUTS = ("smoothquant+gptq", "gptq", "smoothquant", "rotation+smoothquant+gptq", "rotation+gptq", "rtn",
               "rotation")  # fmt: skip
WITH_BLOCKS = ("rtn", "gptq", "rotation+gptq", "clip", "awq", "awq+gptq")
WITH_BLOCKS_OF_INPUTS = ("rtn", "gptq", "rotation+gptq", "smoothquant+gptq")
PEERS_WEIGHT_ONLY, PEERS_WITH_INPUTS = ("gptq", "hqq"), ("gptq", "smoothquant", "smoothquant+gptq")
NO_DATA = ("rtn", "hqq", "rotation")
QUESTIONS, CHATS, TOKENS = 170, 64, 128
TIMED = (("gptq", "w4a16-channel"), ("gptq", "w3a16-g128"), ("hqq", "w4a16-g128"), ("smoothquant", "w8a8"),
         ("smoothquant+gptq", "w4a4-g128"))  # fmt: skip
REPEATED = ("gptq", "awq", "rotation+gptq", "smoothquant", "smoothquant+gptq", "rotation+smoothquant+gptq")  # each seed
PUBLIC = {"llmcompressor": "0.14.0.1", "hqq": "0.2.8"}

Run = tuple[str, str, str, int]  # who, method, setting, seed


def runs(seeds: int, peers: bool, awq: bool) -> list[Run]:
    """Every run; those that are compared stand side by side, and the slowest, AWQ with other seeds, last."""
    found: list[Run] = []
    for seed in range(seeds):
        for setting in SETTINGS:
            inputs = Recipe.parse(setting).activations is not None
            theirs = (PEERS_WITH_INPUTS if inputs else PEERS_WEIGHT_ONLY + ("awq",) * awq) if peers else ()
            for method in WITH_INPUTS if inputs else WEIGHT_ONLY:
                if not seed or method in REPEATED:
                    found.append(("canopyq", method, setting, seed))
                    found += [("public", method, setting, seed)] if method in theirs else []
            if not seed and not inputs:
                found.append(("canopyq", "hqq", WITH_ZERO_POINTS[setting], seed))
    return sorted(found, key=lambda run: run[1] == "awq" and run[3] > 0)


def fp4_runs(seeds: int) -> list[Run]:
    """Every run of NVFP4 and MXFP4; of each further seed GPTQ alone."""
    weights, inputs = FP4[:2], FP4[2:]
    first = [("canopyq", method, setting, 0) for method in WITH_BLOCKS for setting in weights]
    first += [("canopyq", method, setting, 0) for method in WITH_BLOCKS_OF_INPUTS for setting in inputs]
    return first + [("canopyq", "gptq", setting, seed) for seed in range(1, seeds) for setting in FP4]


class Judge:
    """The original's predictions, and what every model is compared with."""

    def __init__(self) -> None:
        self.model, self.tokenizer = cq.tutor.load()
        self.questions = cq.tutor.questions(QUESTIONS)
        self.reference = cq.examine(self.model, self.tokenizer, self.questions, keep=True)
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}

    def score(self, model: nn.Module) -> dict[str, Any]:
        found = cq.compare(self.reference, model, self.tokenizer, self.questions)
        return {
            "kl": found.kl, "perplexity": found.model.perplexity, "right": found.model.accuracy.right,
            "lost": len(found.lost),
        }  # fmt: skip

    def ours(self, method: str, setting: str, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        needs_none = method in NO_DATA and not Recipe.parse(setting).static
        data = None if needs_none else cq.tutor.calibration(self.tokenizer, CHATS, TOKENS, seed)
        before, start, cpu = _most_memory(), time.perf_counter(), time.process_time()
        report = cq.quantize_(model, setting, method=method, calibration=data)
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
            clean |= {} if method == "awq" else {"CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"error": done.stderr.strip().splitlines()[-1][:200]}
            model = copy.deepcopy(self.model)
            model.load_state_dict(load_file(out), strict=False)
            cost = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        recipe = Recipe.parse(setting)
        if recipe.activations is not None:
            for name, module in model.named_modules():
                if name in self.layers:
                    module.register_forward_pre_hook(lambda _, x: (rounded(x[0], recipe.activations, None, None),))
        return self.score(model) | cost | {"bits_per_weight": self._public_bits(method, recipe)}

    def _public_bits(self, method: str, recipe: Recipe) -> float:
        """Codes, and for every group a scale of 16 bits; hqq has a zero point of 16 bits too."""
        group, extra = recipe.weights.granularity.group_size, 32 if method == "hqq" else 16
        weights = {name: layer.weight for name, layer in self.layers.items()}
        groups = sum(w.numel() / (group or w.shape[1]) for w in weights.values())
        return recipe.weights.format.bits + extra * groups / sum(w.numel() for w in weights.values())


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured(judge: Judge, run: Run, python: str | None) -> dict[str, Any]:
    who, *what = run
    found = judge.ours(*what) if who == "canopyq" else judge.public(*what, python)
    return dict(zip(("who", "method", "setting", "seed"), run, strict=True)) | found


_judge: Judge


def _job(job: tuple[Run, str | None]) -> dict[str, Any]:
    return _measured(_judge, *job)


def measure(wanted: list[Run], python: str | None, jobs: int, result: Path) -> None:
    """Measure what is missing of ``wanted``, ``jobs`` runs at a time. This process alone writes the file, after every
    run."""
    global _judge
    torch.set_num_threads(1)
    _judge = Judge()
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"rows": []}
    have = {(row["who"], row["method"], row["setting"], row["seed"]) for row in found["rows"]}
    missing = [(run, python) for run in wanted if run not in have]
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        about = {
            "machine": pool.apply(describe),
            "jobs": jobs,
            "date": date.today().isoformat(),
            "questions": QUESTIONS,
            "calibration": {"chats": CHATS, "tokens": TOKENS},
            "original": {"perplexity": _judge.reference.perplexity, "right": _judge.reference.accuracy.right},
        }
        for row in pool.imap_unordered(_job, missing):
            print(json.dumps(row), flush=True)
            found["rows"].append(row)
            whole = found | about | ({} if python is None else {"public": PUBLIC})
            write_atomic(result, (json.dumps(whole, indent=1) + "\n").encode())


def time_in_turn(rounds: int, python: str, result: Path) -> None:
    """Seconds of the processor, ours and the public ones in turn; kept beside the rows."""
    global _judge
    torch.set_num_threads(1)
    _judge = Judge()
    rows = [{"method": method, "setting": setting, "canopyq": [], "public": []} for method, setting in TIMED]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        about = pool.apply(describe)
        for seed in range(rounds):
            for row in rows:
                for who in ("canopyq", "public"):
                    zeros = WITH_ZERO_POINTS[row["setting"]] if row["method"] == "hqq" else row["setting"]
                    run = (who, row["method"], zeros if who == "canopyq" else row["setting"], seed)
                    row[who].append(pool.apply(_job, [(run, python)])["cpu_seconds"])
                print(row, flush=True)
                times = {"machine": about, "date": date.today().isoformat(), "rows": [r for r in rows if r["public"]]}
                found = json.loads(result.read_text(encoding="utf-8")) | {"times": times}
                write_atomic(result, (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure what is missing")
    parser.add_argument("--peers", help="the python of the public implementations' environment")
    parser.add_argument("--awq", action="store_true", help="the public AWQ too, on a GPU")
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of calibration chats")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="time ours and the public ones in turn")
    parser.add_argument("--fp4", action="store_true", help="NVFP4 and MXFP4")
    parser.add_argument("--result", type=Path, help="the file to complete")
    arguments = parser.parse_args()
    arguments.result = arguments.result or (FP4_RESULT if arguments.fp4 else RESULT)
    if arguments.run:
        seeds, python = arguments.seeds, arguments.peers
        wanted = fp4_runs(seeds) if arguments.fp4 else runs(seeds, python is not None, arguments.awq)
        measure(wanted, python, arguments.jobs, arguments.result)
    if arguments.time:
        time_in_turn(arguments.time, arguments.peers, arguments.result)
    found = json.loads(arguments.result.read_text(encoding="utf-8"))
    if not arguments.fp4:
        plot(found, arguments.result.with_suffix(".png"))
    print(table(found, FP4 if arguments.fp4 else SETTINGS))


if __name__ == "__main__":
    main()
