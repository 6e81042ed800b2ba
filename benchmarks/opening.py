"""What the first picture of lesson 00 shows: the tutor with ever fewer bits a weight, and ever more scales.

python benchmarks/opening.py            print answers and shares
python benchmarks/opening.py --write    and keep them in benchmarks/results/opening.json
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import canopyq as cq
from canopyq.evaluate.machine import describe

BITS = (8, 6, 4, 3, 2)
GRANULARITIES = ("tensor", "g128", "g32")
QUESTIONS = (
    "Continue the sequence 1, 4, 7, 10.",
    "What is 47 + 85?",
    "Spell harbor.",
    "Sort 62, 17, 90, 35.",
    "Today is Tuesday. What day is it in 16 days?",
    "Count 4 days back from Saturday.",
)
RESULT = Path(__file__).parent / "results" / "opening.json"


def measure(questions: int) -> dict[str, Any]:
    asked = cq.tutor.questions(questions)
    model, tokenizer = cq.tutor.load()
    before = cq.examine(model, tokenizer, asked, keep=True)
    answers = [cq.tutor.ask(model, tokenizer, q) for q in QUESTIONS]
    size = (cq.tutor.path() / "model.safetensors").stat().st_size
    rows = [{"bits": 16, "granularity": None, "bytes": size, "kl": 0.0, "right": before.accuracy.right,
             "answers": answers}]  # fmt: skip
    for bits in BITS:
        for granularity in GRANULARITIES:
            other, _ = cq.tutor.load()
            report = cq.quantize_(other, f"w{bits}a16-{granularity}")
            result = cq.compare(before, other, tokenizer, asked)
            answers = [cq.tutor.ask(other, tokenizer, q) for q in QUESTIONS]
            plain = (report.bytes_before - sum(layer.bytes_before for layer in report.layers)) // 2
            size = sum(layer.bytes_after for layer in report.layers) + plain
            rows.append({"bits": bits, "granularity": granularity, "bytes": size, "kl": result.kl,
                         "right": result.model.accuracy.right, "answers": answers})  # fmt: skip
            print(bits, granularity, size, f"{result.kl:.2g}", result.model.accuracy, answers, flush=True)
    return {"questions": questions, "asked": list(QUESTIONS), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=170)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    result = measure(options.questions)
    machine = describe()
    told = {name: machine[name] for name in ("processor", "torch", "transformers")}
    if options.write:
        content = {"date": date.today().isoformat(), "machine": told, **result}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
