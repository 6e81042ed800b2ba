"""Train the tutor model from nothing: ``python -m training.train --out FOLDER``.

On one data-centre GPU this takes a few minutes, most of it 6,300 steps of 65,536 tokens. ``--tiny --cpu --steps 20``
tries the whole script in seconds, and learns nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from canopyq.disk import write_atomic
from canopyq.tutor.loading import WEIGHTS, load_folder
from training import card, scoring, tokenizer
from training.batches import Batches, loader
from training.files import write_json, write_manifest
from training.log import Log, machine
from training.model import Shape
from training.trainer import Plan, Trainer, run

TINY = Plan(tokens=1024, longest=128, warmup=5, precision="float32", validation=1, test=2)
TINY_SHAPE = Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=64)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the tutor model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, made if it does not exist")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--workers", type=int, default=14, help="processes that make batches; 0 for none")
    parser.add_argument("--log-every", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--gate", type=float, default=0.9, help="accuracy that every skill must reach")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (slow: for --tiny)")
    parser.add_argument("--tiny", action="store_true", help="a very small model and batches, to try the script")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.workers < 0:
        parser.error(f"--steps {options.steps} --workers {options.workers}: steps start at 1, workers at 0")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("no CUDA GPU found; add --cpu --tiny to try the script without one")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the batch workers are forked
    torch.set_float32_matmul_precision("high")
    plan, shape = (TINY, TINY_SHAPE) if options.tiny else (Plan(), Shape())
    plan = replace(plan, steps=options.steps, seed=options.seed)
    device = torch.device("cpu" if options.cpu else "cuda")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    learned = tokenizer.build(chats=600 if options.tiny else 6000)
    tokenizer.write_files(learned, out)
    batches = Batches(tokenizer.CachedEncoder(learned), plan.steps, plan.tokens, plan.seed, plan.longest)
    ready = iter(loader(batches, options.workers, pin_memory=device.type == "cuda"))  # forks before CUDA is in use
    validation = scoring.cases(tokenizer.read(out), "val", plan.validation)
    trainer = Trainer(plan, shape, device)

    def examine() -> dict[str, float]:
        scores = scoring.examine(trainer.predict, validation, device, plan.tokens)
        return {group: round(right / asked, 4) for group, (right, asked) in scores.items()}

    log = Log(out / "training_log.jsonl")
    facts = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "vocabulary": tokenizer.VOCABULARY,
        "context": tokenizer.CONTEXT,
    }
    log.write({"plan": asdict(plan), "shape": asdict(shape), "machine": machine(device), **facts})
    began = time.perf_counter()
    trainer.warm_up(batches, examine)
    log.note(f"ready to train after {time.perf_counter() - began:.0f} s of compiling")
    run(trainer, ready, examine, log, options.log_every)
    trained = log.records[-1]

    save(trainer, shape, out)
    scores = final_scores(out, plan, device)
    log.write(
        {
            "seconds": trained["seconds"],
            "tokens": trained["tokens"],
            "bytes": (out / WEIGHTS).stat().st_size,
            "test": {group: {"right": right, "asked": asked} for group, (right, asked) in scores.items()},
        }
    )
    log.finish()
    text = card.write(log.records, scores, options.gate)
    write_atomic(out / "MODEL_CARD.md", text.encode())
    return verdict(scores, options.gate, out)


def save(trainer: Trainer, shape: Shape, out: Path) -> None:
    """Weights in bfloat16, the configuration, and the manifest that ``load`` checks them by."""
    import safetensors.torch

    state = trainer.model.state_dict()
    del state["lm_head.weight"]  # the embedding again
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(out / WEIGHTS, content)
    write_json(out / "config.json", shape.config())
    special = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.END, "pad_token_id": tokenizer.PAD}
    write_json(out / "generation_config.json", {**special, "do_sample": False, "max_new_tokens": 96})
    write_manifest(out)


def final_scores(out: Path, plan: Plan, device: torch.device) -> dict[str, tuple[int, int]]:
    """Examine what was written, as a reader will load it: by transformers, in float32."""
    torch.set_float32_matmul_precision("highest")
    model, reader = load_folder(out, torch.float32, device)
    cases = scoring.cases(reader, "test", plan.test)

    def predict(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.argmax(-1)

    return scoring.examine(predict, cases, device, plan.tokens)


def verdict(scores: dict[str, tuple[int, int]], gate: float, out: Path) -> int:
    """Say whether the model may be shipped; the exit status."""
    failed = card.below(scores, gate)
    if not failed:
        print(f"every skill reaches {gate:.0%}; the model is in {out}")
        return 0
    found = ", ".join(f"{group} {scores[group][0] / scores[group][1]:.3f}" for group in failed)
    print(f"error: below the gate of {gate:.0%}: {found}; train again with another --seed or more --steps")
    return 1


if __name__ == "__main__":
    sys.exit(main())
