"""Measuring on the user's GPU which tile of which kernel takes a product: `canopyq tune`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels.cuda import fragments, launch, selection, w4a8, w8a8, w8a8_launch, weight_only_launch
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.quantize_rows import quantize_rows
from canopyq.kernels.cuda.selection import Choice
from canopyq.kernels.cuda.tiles import DecodeTile, SkinnyTile, StreamKTile, Tile, Weight, WideTile
from canopyq.kernels.timing import microseconds, rotations
from canopyq.memory import ModelShape
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe
from canopyq.utils import track

RECIPES = {"w4a16-g128": "w4a16", "w8a16": "w8a16", "w4a8-g128": "w4a8", "w8a8": "w8a8", "fp8": "fp8"}
# … and what `selection` calls them.
FORMATS = {"w4a8": "int8", "w8a8": "int8", "fp8": "fp8_e4m3"}  # of the input's codes
CODES = ("w8a8", "fp8")  # whose weights have 8-bit codes too
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672))
ROWS = tuple(rows for rows in selection.ROWS if 1 < rows <= 4096)  # of one token `selection` says why it is left out
CANDIDATES = 8  # that are timed: the first by the model
WRONG = 1e-2  # a relative error beyond rounding
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Tuned:
    """A product that was measured.

    Attributes:
        recipe: one of `RECIPES`.
        k, n, rows: x (rows, k) · Wᵀ (k, n).
        before, after: microseconds of what was taken before, and of the fastest.
        kernel: of the fastest.
    """

    recipe: str
    k: int
    n: int
    rows: int
    before: float
    after: float
    kernel: str


class Layer:
    """A weight (n, k) of random numbers, as often as no cache holds it, and the products with it by any tile.

    Args:
        recipe: as `selection` calls it.
    """

    def __init__(self, recipe: str, k: int, n: int) -> None:
        self.recipe, self.k, self.n = recipe, k, n
        weight = torch.randn(n, k, device="cuda") / k**0.5
        self.weight: Weight | None = None
        if recipe in CODES:
            codes, scale = quantize_rows(weight.to(BF16), FORMATS[recipe])
            self.exact = codes.float() * scale
            first = (codes, scale)
        else:
            name = next(name for name, own in RECIPES.items() if own == recipe)
            quantized = quantize(weight, replace(Recipe.parse(name).weights, scale_dtype=BF16))
            packed = (w4a8 if recipe in FORMATS else fragments).prepack(quantized)
            first = (packed["weight_fragments"], packed["weight_scale"])
            group = quantized.scheme.granularity.group_size or 0
            self.weight = weight_only_launch.describe(*first, None, n, quantized.scheme.format.bits, group)
            self.exact = quantized.dequantize(torch.float32)
        nbytes = sum(part.nbytes for part in first)
        self.copies = [first, *(tuple(part.clone() for part in first) for _ in range(rotations(nbytes) - 1))]

    def product(self, rows: int) -> Product:
        sms = launch.multiprocessors(torch.cuda.current_device())
        return Product(self.recipe, self.n, self.k, rows, self.weight, sms, stored_by_copies=self.n % 8 == 0)

    def run(self, own: tuple[Tensor, Tensor], x: Tensor, tile: Tile | None) -> Tensor:
        """x (rows, k) bfloat16 -> (rows, n), with the quantization of x if it has one."""
        if self.recipe not in FORMATS:
            if tile is None:
                return F.linear(x, weight_only_launch.run_dequantize(*own, None, self.weight, self.k, BF16))
            run = {DecodeTile: weight_only_launch.run_decode, StreamKTile: weight_only_launch.run_stream_k}
            return run.get(type(tile), weight_only_launch.run_warpgroup)(x, *own, None, self.weight, tile)
        codes, scale = quantize_rows(x, FORMATS[self.recipe])
        if self.weight is not None:
            return w4a8.run(codes, scale, *own, None, self.weight, BF16, tile)
        if tile is None:
            scales = {"scale_a": scale, "scale_b": own[1].reshape(1, -1)}
            return torch._scaled_mm(codes, own[0].t(), **scales, out_dtype=BF16, use_fast_accum=True)
        if isinstance(tile, SkinnyTile):
            return w8a8.skinny_linear(codes, scale, *own, BF16)
        run = w8a8_launch.run_wide if isinstance(tile, WideTile) else w8a8_launch.run_wgmma
        return run(codes, scale, *own, BF16, tile)

    def wanted(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product in ``dtype``, of the codes of x if it is quantized."""
        if self.recipe in FORMATS:
            codes, scale = quantize_rows(x, FORMATS[self.recipe])
            x = codes.to(dtype) * scale
        return x.to(dtype) @ self.exact.to(dtype).t()

    def time(self, x: Tensor, wanted: Tensor, tile: Tile | None, milliseconds: float = 0.7, repeats: int = 5) -> float:
        """Microseconds, as `timing.microseconds` takes them, once the result is right.

        Raises:
            CanopyError: if it is not, or the kernel does not run.
        """
        y = self.run(self.copies[0], x, tile).float()
        if not (error := float((y - wanted).norm() / wanted.norm())) < WRONG:
            raise CanopyError(f"{tile} is off by {error:.2g} on {tuple(x.shape)} by {self.n}; please report this GPU")
        return microseconds([lambda own=own: self.run(own, x, tile) for own in self.copies], milliseconds, repeats)


@torch.inference_mode()
def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    recipes: Sequence[str] = ("w4a16-g128", "w8a16"),
    rows: Sequence[int] = ROWS,
) -> list[Tuned]:
    """Measure the likely tiles for each product, and keep the fastest on this machine for `cuda.selection` to take.

    Args:
        shapes: (in_features, out_features) of the layers.
        recipes: w4a16-g128 or w4a8-g128 (for other groups, too), w8a16, w8a8 or fp8.
        rows: numbers of tokens; each is rounded up to one of those that a choice is made for.

    Raises:
        CanopyError: for an unknown recipe or no number of tokens, without a Hopper GPU, if a result is wrong, or if the
            file cannot be written.
    """
    recipes = [checks.choice("recipe to tune for", name, RECIPES) for name in checks.sequence("recipes", recipes, 1)]
    rows = [checks.count("rows", m, 1) for m in checks.sequence("rows", rows, 1)]
    shapes = checks.layers("shapes", checks.sequence("shapes", shapes, 1))
    if reason := launch.unavailable(torch.device("cuda")):
        raise CanopyError(f"kernels cannot be tuned here: {reason}")
    if (have := torch.cuda.get_device_capability()) != w8a8.HOPPER:
        raise CanopyError(f"tiles are chosen for compute capability 9.0; this GPU has {have[0]}.{have[1]}")
    counts = sorted({selection.rounded_up(count) for count in rows})
    layers = list(dict.fromkeys((name, *shape) for shape in shapes for name in recipes))
    found: list[Tuned] = []
    best: dict[selection.Key, tuple[Tile | None, float]] = {}
    for name, k, n in track(layers, "tuning", len(layers)):
        layer = Layer(recipe := RECIPES[name], k, n)
        for count in counts:
            product = layer.product(count)
            now = selection.choose(product)
            x = torch.randn(count, k, device="cuda", dtype=BF16)
            wanted = layer.wanted(x)
            times = {tile: layer.time(x, wanted, tile) for tile in _likely(product, now)}
            fastest = min(times, key=times.__getitem__)
            best[recipe, k, n, count] = fastest, round(times[fastest], 2)
            kernel = fastest.KERNEL if fastest else selection.LIBRARY
            found.append(Tuned(name, k, n, count, times[now.tile], times[fastest], kernel))
    selection.keep(best)
    return found


def _likely(product: Product, now: Choice) -> list[Tile | None]:
    first = sorted(selection.candidates(product), key=lambda choice: choice.us)[:CANDIDATES]
    return list(dict.fromkeys([now.tile, *(choice.tile for choice in first)]))


def shapes_of(model: ModelShape) -> list[tuple[int, int]]:
    """(in_features, out_features) of a model's layers, each by itself and those of one input joined."""
    block = {name.rsplit(".", 1)[1]: shape for name, shape in model.linears() if ".layers.0." in name}
    alone = [(k, n) for n, k in block.values()]
    joined = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    return list(dict.fromkeys([*alone, *((model.hidden, sum(block[name][0] for name in some)) for some in joined)]))


def gain(found: Sequence[Tuned]) -> float:
    """How many times as fast the fastest are as what was taken before, in the geometric mean."""
    return math.exp(sum(math.log(one.before / one.after) for one in found) / len(found))
