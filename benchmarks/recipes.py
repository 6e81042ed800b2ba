"""What each weight recipe costs the tutor: bytes held, KL, answers lost.

python benchmarks/recipes.py            print the table that the README shows
python benchmarks/recipes.py --write    and keep the figures in benchmarks/results/recipes.json
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import canopyq as cq
from canopyq.evaluate.machine import describe
from canopyq.evaluate.stats import Share

RECIPES = ("w8a16", "w4a16-g32", "nvfp4", "nf4", "w4a16-g128", "mxfp4", "w4a16-channel", "w3a16-g128", "w4a16-tensor",
           "w2a16-g32", "w3a16-tensor", "w2a16-tensor")  # fmt: skip
RESULT = Path(__file__).parent / "results" / "recipes.json"
HEAD = ("weights", "bits per weight", "model in memory", "KL, nats per token", "right answers", "lost")


def measure(questions: int) -> dict[str, Any]:
    """Each recipe against the original, on the same held-out questions."""
    asked = cq.tutor.questions(questions)
    model, tokenizer = cq.tutor.load()
    reference = cq.examine(model, tokenizer, asked, keep=True)
    rows = []
    for recipe in RECIPES:
        quantized, _ = cq.tutor.load()
        report = cq.quantize_(quantized, recipe)
        result = cq.compare(reference, quantized, tokenizer, asked)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        rows.append(
            {
                "recipe": recipe,
                "bits_per_weight": sum(8 * layer.bytes_after for layer in report.layers) / weights,
                "bytes": result.model.bytes,
                "kl": result.kl,
                "perplexity": result.model.perplexity,
                "right": result.model.accuracy.right,
                "lost": len(result.lost),
                "gained": len(result.gained),
            }
        )
    original = {"bytes": reference.bytes, "perplexity": reference.perplexity, "right": reference.accuracy.right}
    return {"questions": questions, "original": original, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """The table, the recipe with the least KL first."""
    n, original = result["questions"], result["original"]
    lines = [HEAD, ("---",) + ("---:",) * (len(HEAD) - 1)]
    lines.append(
        (
            "FP32, as loaded on a CPU",
            "32",
            f"{original['bytes'] / 1e6:.1f} MB",
            "0",
            str(Share(original["right"], n)),
            "",
        )
    )
    for row in sorted(result["rows"], key=lambda row: row["kl"]):
        size = f"{row['bytes'] / 1e6:.1f} MB"
        right = str(Share(row["right"], n))
        lines.append(
            (f"`{row['recipe']}`", f"{row['bits_per_weight']:.2f}", size, f"{row['kl']:.2g}", right, str(row["lost"]))
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/recipes.json")
    parser.add_argument("--questions", type=int, default=510, help="held-out questions, spread evenly over the skills")
    arguments = parser.parse_args()
    result = measure(arguments.questions)
    print(markdown(result))
    if arguments.write:
        whole = result | {"date": date.today().isoformat(), "machine": describe()}
        RESULT.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
