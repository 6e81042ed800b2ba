"""What the advisor chooses from: every recipe with every cache, measured on the tutor.

python benchmarks/advice.py            print them
python benchmarks/advice.py --write    and keep them in canopyq/advisor/measurements.json, which ships with the package
"""

from __future__ import annotations

import argparse
from datetime import date

import torch

import canopyq as cq
from canopyq.advisor.measured import ORIGINAL, RECORDED, Measurement, write
from canopyq.evaluate.machine import describe

# No 4-bit weights with a scale per channel: the tutor's serve 256 or 1,024 weights each and those of a 7B model 4,096
# and more, so what is measured here would not carry over. At 8 bits the damage is below that of 16-bit arithmetic.
WEIGHTS = ("w8a16", "w8a8", "fp8", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-g256", "w2a16-g32")


CACHES = (None, "kv8", "kv-fp8", "kv4", "kv2")


def measure(questions: int) -> list[Measurement]:
    """Each recipe with each cache beside the original, on the same held-out questions."""
    asked = cq.tutor.questions(questions)
    model, tokenizer = cq.tutor.load()
    reference = cq.examine(model, tokenizer, asked, keep=True)
    source = f"the tutor model (8.2 million parameters), {len(asked)} held-out questions, {date.today().isoformat()}"
    found = []
    for recipe in (ORIGINAL, *WEIGHTS):
        quantized, _ = cq.tutor.load(torch.bfloat16 if recipe == ORIGINAL else None)
        if recipe != ORIGINAL:
            cq.quantize_(quantized, recipe)
        for cache in CACHES if recipe != "w2a16-g32" else (None,):  # it has lost answers already
            result = cq.compare(reference, quantized, tokenizer, asked, cache=cache)
            name = recipe if cache is None else f"{recipe}+{cache}"
            share = result.model.accuracy
            kl = float(f"{result.kl:.3g}")  # further digits depend on the processor
            found.append(Measurement(name, kl, share.right, share.n, source=source, model="tutor"))
            print(f"{name:<20} KL {result.kl:.3g}   right {result.model.accuracy}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in the package")
    parser.add_argument("--questions", type=int, default=204, help="held-out questions, spread evenly over the skills")
    arguments = parser.parse_args()
    found = measure(arguments.questions)
    if arguments.write:
        write(RECORDED, found, machine=describe())


if __name__ == "__main__":
    main()
