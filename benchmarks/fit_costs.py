"""Fits the cost model of the CUDA kernels and writes kernels/cuda/tiles.json, from what `tune_linear` measured.

    python -m benchmarks.fit_costs sweep.json [--seconds 20]     anywhere; so many seconds a kernel and recipe

Shapes in `HELD_OUT` take no part: on them it is printed how far the model is off, and how much longer the tiles that it
chooses take than the fastest that were measured. The tiles to choose from are few, taken in turn by what each adds, so
that a prefill of any length compiles few kernels. For each of them the table has a factor by which the model is off,
and for each shape that was not held out the fastest of them. What the table has for one token stays: whole decoding
steps (`benchmarks.decode`) judge that. So does all that it has of recipes which the sweep leaves out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.linear import HELD_OUT
from benchmarks.tune_linear import compiled, product_of
from canopyq.kernels.cuda import costs, selection, tiles
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import StreamKTile, Tile

HELD = {*HELD_OUT, (8192, 10240), (3584, 3584), (6912, 2560)}  # (k, n)
GOOD = 1.5  # times as long as the fastest: what takes longer is not chosen, and not fitted
ENOUGH = 2e-4  # the least that a tile must take off the mean logarithm of the times
UNLIKELY = 1.3  # the factor of a tile that the model never likes
POINTS = 700  # that a fit looks at, at random
# Of the multiprocessors, the share that clusters of a size can fill: cuOccupancyMaxActiveClusters on an H200, with
# blocks that take a multiprocessor each. (With smaller blocks it is up to a tenth more.)
CLUSTERS = {"clusters_of_3": 39 / 44, "clusters_of_4": 30 / 33, "clusters_of_6": 17 / 22, "clusters_of_8": 15 / 16.5}
START = {
    "decode": {"start": 2.0, "copy": 3e5, "latency": 0.8, "memory": 4.1e6, "fill": 3e4, "turn": 0.6, "cluster": 1.2},
    "warpgroup": {"start": 2.8, "fill": 0.5, "operations": 6.4e6, "expand": 9e4, "alone": 3e4, "batch": 0.03,
                  "copy": 8.7e4, "latency": 0.1, "store": 9e-5, "reduce": 2.7e-5, "cluster": 0.1, **CLUSTERS,
                  "memory": 3e6},
    "stream_k": {"start": 0.3, "fill": 2.0, "operations": 6.8e6, "expand": 8e4, "alone": 3e4, "batch": 0.03,
                 "copy": 1.2e5, "latency": 0.8, "store": 3e-5, "reduce": 5e-5, "split": 2.0, "memory": 3e6},
    "w8a8_wgmma": {"start": 3.5, "fill": 0.3, "operations": 1.4e7, "copy": 8e4, "latency": 0.1, "store": 1.8e-4,
                        "reduce": 1e-5, "cluster": 0.1, **CLUSTERS, "memory": 3.4e6},
    "w4a8": {"start": 3.5, "fill": 0.3, "operations": 1.2e7, "copy": 8e4, "latency": 0.1, "group": 0.1,
                     "alone": 2e-3, "store": 1.8e-4, "reduce": 1e-5, "cluster": 0.1, **CLUSTERS, "memory": 3.4e6},
    "wide_int8": {"start": 2.3, "fill": 0.2, "operations": 1.4e7, "copy": 1e5, "latency": 0.4, "store": 7e-5,
                  "memory": 3.2e6},
    "skinny": {"start": 2.5, "memory": 3.2e6, "fill": 3e-5},
    "library": {"start": 3.0, "operations": 6.7e6, "memory": 3.5e6, "edge": 10.0, "even": 0.2, "dequantize": 4.1e6,
                "dequantize_start": 2.0},
}  # fmt: skip
Times = Mapping[Product, Mapping[Tile | None, float]]
Point = tuple[Product, Tile | None, float]


def read(path: Path) -> Times:
    """Microseconds of each tile for each product; None is the library."""
    found: dict[Product, dict[Tile | None, float]] = defaultdict(dict)
    for line in json.loads(path.read_text(encoding="utf-8"))["timed"]:
        if line["kernel"] != "bfloat16":
            found[product_of(*line["cell"])][line["tile"] and tiles.of_dict(line["tile"])] = line["us"]
    return found


def is_held_out(product: Product) -> bool:
    return (product.k, product.n) in HELD


def fit(recipe: str, kernel: str, points: list[Point], seconds: float) -> costs.Constants:
    """The constants with the least robust squared error of logarithms, by pattern searches in logarithms."""

    some = random.sample(points, min(POINTS, len(points)))

    def loss(constants: costs.Constants) -> float:
        total, by_name = 0.0, {f"{recipe} {kernel}": constants}
        for product, tile, us in some:
            off = abs(math.log(costs.microseconds(product, tile, by_name) / us))
            total += off * off if off < 0.3 else 0.6 * off - 0.09
        return total / len(some)

    best, least = dict(START[kernel]), loss(START[kernel])
    end, generator = time.process_time() + seconds, random.Random(0)
    while time.process_time() < end:  # from the start, then from near the best
        now = dict(best) if best == START[kernel] else _shaken(best, generator)
        lowest, steps = loss(now), {name: 0.4 for name in now if name not in CLUSTERS}
        while time.process_time() < end and max(steps.values()) > 0.01:
            for name, step in steps.items():
                better = False
                for factor in (math.exp(step), math.exp(-step)):
                    if (found := loss(now | {name: now[name] * factor})) < lowest - 1e-7:
                        lowest, now[name], better = found, now[name] * factor, True
                        break
                steps[name] = min(0.8, step * (1.3 if better else 0.5))
        if lowest < least:
            best, least = now, lowest
    return {name: float(f"{value:.4g}") for name, value in best.items()}


def _shaken(constants: costs.Constants, generator: random.Random) -> costs.Constants:
    return {
        name: value if name in CLUSTERS else value * math.exp(generator.gauss(0, 0.3))
        for name, value in constants.items()
    }


def few_tiles(times: Times) -> list[Tile]:
    """Tiles, as they are compiled, of which the fastest is hardly ever far from the fastest of all."""
    best_of = {
        product: _least((compiled(tile) if tile else None, us) for tile, us in some.items())
        for product, some in times.items()
    }
    now = {product: some.get(None, 4 * min(some.values())) for product, some in best_of.items()}
    chosen: list[Tile] = []
    while True:
        gains: dict[Tile, float] = defaultdict(float)
        for product, some in best_of.items():
            for tile, us in some.items():
                if tile is not None and us < now[product]:
                    gains[tile] += math.log(now[product] / us)
        tile = max(gains, key=gains.__getitem__, default=None)
        if tile is None or gains[tile] < ENOUGH * len(best_of):
            return chosen
        chosen.append(tile)
        now = {product: min(us, best_of[product].get(tile, us)) for product, us in now.items()}


def _least(pairs: Iterable[tuple[Tile | None, float]]) -> dict[Tile | None, float]:
    found: dict[Tile | None, float] = {}
    for tile, us in pairs:
        found[tile] = min(us, found.get(tile, us))
    return found


def factors(times: Times, chosen: list[Tile], constants: Mapping[str, costs.Constants]) -> list[float]:
    """By how much each tile takes longer than the model says, where the model would take it or nearly so."""
    off: dict[Tile, list[float]] = defaultdict(list)
    for product, some in times.items():
        said = {
            tile: costs.microseconds(product, tile, constants)
            for tile in some
            if tile is None or compiled(tile) in chosen
        }
        for tile, us in said.items():
            if tile is not None and us < 1.25 * min(said.values()):
                off[compiled(tile)].append(math.log(some[tile] / us))
    # as if three more had shown the model to be right; a tile that it never likes is disliked
    return [round(math.exp(sum(off[tile]) / (len(off[tile]) + 3)) if off[tile] else UNLIKELY, 3) for tile in chosen]


def regrets(
    times: Times, chosen: list[Tile], factor: list[float], constants: Mapping[str, costs.Constants]
) -> list[float]:
    """How many times as long as the fastest tile that was measured the one takes that the model chooses."""
    by_tile = dict(zip(chosen, factor, strict=True))
    found = []
    for product, some in times.items():
        said = {
            tile: costs.microseconds(product, tile, constants) * (by_tile[compiled(tile)] if tile else 1.0)
            for tile in some
            if tile is None or compiled(tile) in by_tile
        }
        if said:
            found.append(some[min(said, key=said.__getitem__)] / min(some.values()))
    return sorted(found)


def measured(times: Times, chosen: list[Tile]) -> list[dict]:
    """Rows of the table."""
    rows = []
    for product, some in times.items():
        able = {tile: us for tile, us in some.items() if tile is None or compiled(tile) in chosen}
        if not able:
            continue
        tile = min(able, key=able.__getitem__)
        row = {"recipe": product.recipe, "k": product.k, "n": product.n, "rows": product.rows}
        row["tile"] = None if tile is None else chosen.index(compiled(tile))
        if isinstance(tile, StreamKTile):
            row["parts"] = tile.parts
        rows.append(row | {"us": round(able[tile], 1)})
    return sorted(rows, key=lambda row: (row["k"], row["n"], row["rows"]))


def one_token(rows: list[dict], chosen: dict[str, list[dict]], table: dict) -> list[dict]:
    """The rows, those of one token as the table has them. Their tiles are added to those chosen, with a factor that
    keeps the model from them."""
    rows = [row for row in rows if row["rows"] > 1]
    for row in [row for row in table["measured"] if row["rows"] == 1 and row["recipe"] in chosen]:
        tile, some = {**table["tiles"][row["recipe"]][row["tile"]], "factor": UNLIKELY}, chosen[row["recipe"]]
        place = next((i for i, one in enumerate(some) if {**one, "factor": UNLIKELY} == tile), len(some))
        some += [tile] * (place == len(some))
        rows.append({**row, "tile": place})
    return sorted(rows, key=lambda row: (list(chosen).index(row["recipe"]), row["k"], row["n"], row["rows"]))


def write(path: Path, gpu: str, constants: Mapping, chosen: Mapping[str, list[dict]], rows: list[dict]) -> None:
    """JSON with a line for each thing, so that a difference can be read."""
    by_kernel = ",\n".join(f" {json.dumps(name)}: {json.dumps(some)}" for name, some in sorted(constants.items()))
    by_recipe = ",\n".join(
        f" {json.dumps(recipe)}: [\n" + ",\n".join(f"  {json.dumps(one)}" for one in some) + "\n ]"
        for recipe, some in chosen.items()
    )
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    text = f'{{"gpu": {json.dumps(gpu)},\n"constants": {{\n{by_kernel}\n}},\n"tiles": {{\n{by_recipe}\n}},\n'
    path.write_text(f'{text}"measured": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=selection.TABLE)
    options = parser.parse_args()
    random.seed(0)
    constants, chosen, rows = {}, {}, []
    every = read(options.sweep)
    for recipe in dict.fromkeys(product.recipe for product in every):
        times = {product: some for product, some in every.items() if product.recipe == recipe}
        points: dict[tuple[str, bool], list[Point]] = defaultdict(list)
        for product, some in times.items():
            for tile, us in some.items():
                if us < GOOD * min(some.values()):
                    kernel = tile.KERNEL if tile else selection.LIBRARY
                    points[kernel, is_held_out(product)].append((product, tile, us))
        for kernel in dict.fromkeys(kernel for kernel, _ in points):
            known = points[kernel, False]
            constants[f"{recipe} {kernel}"] = fit(recipe, kernel, known, options.seconds)
            off = {
                held: [abs(math.log(costs.microseconds(*one[:2], constants) / one[2])) for one in points[kernel, held]]
                for held in (False, True)
            }
            words = [f"{100 * sum(some) / max(1, len(some)):.1f} %" for some in off.values()]
            print(f"{recipe} {kernel}: off by {words[0]} in the mean, {words[1]} on held-out shapes", flush=True)
        ours = {product: some for product, some in times.items() if not is_held_out(product)}
        few = few_tiles(ours)
        factor = factors(ours, few, constants)
        for held, name in ((False, "shapes fitted"), (True, "shapes held out")):
            some = {product: of for product, of in times.items() if is_held_out(product) == held}
            regret = regrets(some, few, factor, constants)
            mean = math.exp(sum(map(math.log, regret)) / len(regret))
            print(f"{recipe}, {len(few)} tiles, {name}: {mean:.3f} times the fastest, at the most {regret[-1]:.2f}")
        chosen[recipe] = [tiles.as_dict(tile) | {"factor": one} for tile, one in zip(few, factor, strict=True)]
        rows += measured(ours, few)
    table = json.loads(selection.TABLE.read_text(encoding="utf-8"))
    rows = one_token(rows, chosen, table)
    constants |= {name: some for name, some in table["constants"].items() if name.split()[0] not in chosen}
    rows = [row for row in table["measured"] if row["recipe"] not in chosen] + rows
    chosen = {recipe: some for recipe, some in table["tiles"].items() if recipe not in chosen} | chosen
    gpu = json.loads(options.sweep.read_text(encoding="utf-8"))["gpu"]
    write(options.out, gpu, constants, chosen, rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
