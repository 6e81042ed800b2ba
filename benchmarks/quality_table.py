"""The table and the plot of benchmarks/results/quality.json, and what is compared with what."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

RESULT = Path(__file__).parent / "results" / "quality.json"
FP4_RESULT = RESULT.with_name("quality_fp4.json")
SETTINGS = ("w4a16-channel", "w4a16-g128", "w3a16-g128", "w2a16-g64", "w8a8", "w4a4-g128")
FP4 = ("nvfp4", "mxfp4", "nvfp4-w4a4", "mxfp4-w4a4")  # in a record of their own, without a public method beside them
# The public hqq has a zero point of 16 bits beside each scale of 16. Ours beside it has zero points of as many bits as
# a weight, and never more bits in all.
WITH_ZERO_POINTS = {"w4a16-channel": "w4a16-g256-asym", "w4a16-g128": "w4a16-g128-asym",
                    "w3a16-g128": "w3a16-g128-asym", "w2a16-g64": "w2a16-g64-asym"}  # fmt: skip
ZERO_POINTS = ", zero points"


class Cell(NamedTuple):
    """One method in one setting, over the seeds.

    Attributes:
        kl, spread: mean and standard deviation of KL; the spread of one seed is 0.
        cpu_seconds: the median.
        bits: per weight.
        seeds: how many.
    """

    kl: float
    spread: float
    cpu_seconds: float
    bits: float
    seeds: int


Cells = dict[tuple[str, str, str], Cell]


def cells(found: dict[str, Any]) -> Cells:
    """(who, method, setting) -> what was measured. Zero points make another method of one."""
    column = {named: setting for setting, named in WITH_ZERO_POINTS.items()}
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if "kl" in row:
            method = row["method"] + (ZERO_POINTS if row["setting"] in column else "")
            rows.setdefault((row["who"], method, column.get(row["setting"], row["setting"])), []).append(row)
    return {key: _cell(group) for key, group in rows.items()}


def _cell(rows: list[dict[str, Any]]) -> Cell:
    kls = [row["kl"] for row in rows]
    spread = statistics.stdev(kls) if len(kls) > 1 else 0.0
    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    return Cell(statistics.mean(kls), spread, seconds, rows[0]["bits_per_weight"], len(rows))


def pairs(found: Cells) -> list[tuple[str, str, Cell, Cell]]:
    """Method, setting, ours, the public one; ours never has more bits."""
    paired = []
    for (who, method, setting), theirs in found.items():
        if who == "public":
            ours = found["canopyq", method + (ZERO_POINTS if method == "hqq" else ""), setting]
            paired.append((method, setting, ours, theirs))
    return paired


def best(found: Cells, who: str, setting: str) -> tuple[str, Cell]:
    """The method with the least KL; without hqq, whose bits are others."""
    own = {name: cell for (by, name, of), cell in found.items() if (by, of) == (who, setting) and "hqq" not in name}
    return min(own.items(), key=lambda item: item[1].kl)


def _names(found: Cells) -> list[tuple[str, str]]:
    names = dict.fromkeys((who, method) for who, method, _ in found)
    return sorted(names, key=lambda name: (name[1].split(",")[0], name[0] != "canopyq", name[1]))


def table(found: dict[str, Any], settings: tuple[str, ...] = SETTINGS) -> str:
    """KL of every method in every setting, the mean over seeds and, where there are several, their spread."""
    known = cells(found)
    lines = ["| method | " + " | ".join(settings) + " |", "|---|" + "---:|" * len(settings)]
    for who, method in _names(known):
        shown = []
        for setting in settings:
            cell = known.get((who, method, setting))
            spread = f" ± {cell.spread:.1g}" if cell and cell.seeds > 1 else ""
            shown.append(f"{cell.kl:.2g}{spread}" if cell else "")
        lines.append(f"| {method if who == 'canopyq' else f'{method} (public)'} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> str:
    """The best public method of every setting and the best of ours, with their KL."""
    known = cells(found)
    lines = ["| | " + " | ".join(SETTINGS) + " |", "|---|" + "---|" * len(SETTINGS)]
    for who, called in (("public", "the best public one"), ("canopyq", "the best of ours")):
        shown = [f"{name} {cell.kl:.2g}" for name, cell in (best(known, who, setting) for setting in SETTINGS)]
        lines.append(f"| {called} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def fp4_words(found: dict[str, Any]) -> str:
    """What each step gains over rounding FP4 to nearest."""
    known = cells(found)

    def kl(method: str, setting: str) -> str:
        return f"{known['canopyq', method, setting].kl:.2g}"

    return "; ".join(
        f"{setting.upper()} {kl('rtn', setting)} rounded to nearest, {kl('clip', setting)} on searched scales, "
        f"{kl('gptq', setting)} by GPTQ on those"
        for setting in FP4[:2]
    )


def plot(found: dict[str, Any], file: Path) -> None:
    """KL by setting, a mark a method with its spread over the seeds: ours filled, the public ones hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10.5, 4.6), layout="constrained")
    known = cells(found)
    names = [(who, method) for who, method in _names(known) if "," not in method]
    methods = list(dict.fromkeys(method for _, method in names))
    for who, method in names:
        place = methods.index(method)
        own = [(i, known[who, method, s]) for i, s in enumerate(SETTINGS) if (who, method, s) in known]
        colour = plt.get_cmap("tab20")(place * 2 % 20 + (place >= 10))
        axes.errorbar(
            [i + (place - (len(methods) - 1) / 2) * 0.065 for i, _ in own],
            [cell.kl for _, cell in own],
            [cell.spread for _, cell in own],
            fmt="o" if who == "canopyq" else "D",
            markersize=5 if who == "canopyq" else 7,
            color=colour,
            markerfacecolor=colour if who == "canopyq" else "none",
            linewidth=1,
            label=method if who == "canopyq" else f"{method} (public)",
        )
    for edge in range(1, len(SETTINGS)):
        axes.axvline(edge - 0.5, color="0.85", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(SETTINGS)), SETTINGS)
    axes.set_xlim(-0.5, len(SETTINGS) - 0.5)
    axes.set_ylabel("KL to the original, nats per token")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
