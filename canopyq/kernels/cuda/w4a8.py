"""INT4 weights by INT8 codes of the input on a Hopper GPU, for any number of rows: ``w4a8.cu``.

Half the weight's bytes of W8A8 where memory decides, and integer products at twice the speed of 16-bit ones where
arithmetic does.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import fragments, launch, selection, tiles, weight_only, weight_only_launch
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import STEP, W4A8Tile, Weight
from canopyq.kernels.cuda.w8a8_launch import FLOAT_CONSTANTS
from canopyq.kernels.spec import LinearSpec, PackedWeight, WeightLayout
from canopyq.tensor import packing
from canopyq.tensor.quantized_tensor import QuantizedTensor

HOPPER = (9, 0)
COLUMNS = 16  # that change places, and must divide in_features
MOST_COLUMNS = 2**31 // (16 * 8 * 128)  # of an int32 sum of 16 times a code of W by one of x
# A word of `fragments` holds, of a row, columns 2t, 2t + 8, 2t + 1 and 2t + 9 of 16; here these hold 4t … 4t + 3.
ORDER = (4, 2, 2), (2, 0, 1)  # 16 columns as (t, neighbour, half), and in which order fragments want them


# --- the layout -------------------------------------------------------------------------------------------------------


def _reordered(weight: QuantizedTensor, shape: tuple[int, ...], order: tuple[int, ...]) -> QuantizedTensor:
    n, k = weight.shape
    codes = weight.codes.view(n, k // COLUMNS, *shape).permute(0, 1, *(2 + axis for axis in order)).reshape(n, k)
    data = packing.pack_unchecked(codes, 4, 8)
    return QuantizedTensor(data, weight.scale, weight.zero_point, weight.scheme, weight.shape, weight.dtype)


def prepack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """As `fragments.prepack`, of a weight whose columns change places within every 16."""
    return fragments.prepack(_reordered(weight, *ORDER))


def unpack(packed: PackedWeight, spec: LinearSpec) -> QuantizedTensor:
    """The inverse of `prepack`, bit for bit."""
    return _reordered(fragments.unpack(packed, spec), (2, 4, 2), (1, 2, 0))


INTEGER_FRAGMENTS = WeightLayout(
    "in the order of the tensor cores' integer products", prepack, unpack, fragments.slice_rows
)


# --- launching --------------------------------------------------------------------------------------------------------


def constants(group: int, asymmetric: bool, scale: torch.dtype, output: torch.dtype, tile: W4A8Tile) -> dict[str, int]:
    """What the kernel is compiled for."""
    kinds = {"CODE": 8, "BITS": 4, "SCALE": FLOAT_CONSTANTS[scale], "SCALE_BF16": int(scale == torch.bfloat16)}
    kinds |= {"OUTPUT": FLOAT_CONSTANTS[output], "ELEMENT_BF16": int(output == torch.bfloat16)}
    kinds |= {"GROUP": group, "ASYMMETRIC": int(asymmetric), "TOKENS": tile.tokens}
    return kinds | {
        "WARPGROUPS": tile.warpgroups, "STAGES": tile.stages, "CLUSTER": tile.cluster, "BLOCKS_PER_SM": tile.per_sm,
    }  # fmt: skip


@cache
def _function(
    group: int, asymmetric: bool, scale: torch.dtype, output: torch.dtype, tile: W4A8Tile, device: int
) -> launch.Function:
    defined = constants(group, asymmetric, scale, output, tile)
    kind = {"cluster": tile.cluster, "extra": tiles.w4a8_product_source(tile.tokens)}
    return launch.Function("w4a8.cu", "w4a8", defined, "128sPPPPPiiiii", device, tile.threads, **kind)


def run(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight,
    dtype: torch.dtype, tile: W4A8Tile,
) -> Tensor:  # fmt: skip
    """The product with this tile; operands as `w4a8_linear` checks them."""
    (m, k), device = x.shape, x.device.index
    function = _function(weight.group, weight.asymmetric, scale.dtype, dtype, tile, device)
    y = torch.empty(m, weight.n, dtype=dtype, device=x.device)
    grid = (-(-m // tile.tokens), -(-weight.slabs // (tile.rows // fragments.SLAB)), tile.cluster)
    x_map = launch.matrix_map(x.data_ptr(), m, k, 1, tile.tokens, STEP)
    places = codes.data_ptr(), scale.data_ptr(), codes.data_ptr() if zero is None else zero.data_ptr()
    sizes = m, weight.n, weight.slabs, weight.steps, weight.groups
    function(grid, x_map, *places, x_scale.data_ptr(), y.data_ptr(), *sizes, shared=tile.shared(weight))
    return y


@torch.library.custom_op("canopyq::w4a8_linear", mutates_args=())
def w4a8_linear(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, n: int, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(x · x_scale) · Wᵀ for any number of rows: (M, K) -> (M, n). Sums are exact within a group of columns.

    Args:
        x: int8 (M, K), K a multiple of 16.
        x_scale: float32, M of them.
        codes, scale, zero: the weight (n, K) as `prepack` gives it.
        group: columns of the weight that share a scale; 0 for all of them.
        dtype: of the result, float16, bfloat16 or float32.

    Raises:
        CanopyError: for shapes, dtypes and devices that do not fit together, and on another GPU than a Hopper.
    """
    weight_only.check_weight(codes, scale, zero)
    if x.dtype != torch.int8 or x.dim() != 2 or x.shape[1] % COLUMNS:
        raise CanopyError(
            f"the kernel takes int8 codes (M, K) with K a multiple of {COLUMNS}, got {x.dtype} {tuple(x.shape)}"
        )
    m, k = x.shape
    if fragments.padded(k, STEP) != codes.shape[1] * STEP:
        raise CanopyError(f"the kernel takes an input (rows, {codes.shape[1] * STEP} at most), got {tuple(x.shape)}")
    if x_scale.numel() != m or x_scale.dtype != torch.float32 or dtype not in FLOAT_CONSTANTS:
        raise CanopyError(
            f"{m} rows need as many float32 scales, and give 16- or 32-bit floats; got {x_scale.numel()} scales in "
            f"{x_scale.dtype}, and {dtype}"
        )
    if x.device != codes.device or x_scale.device != codes.device:
        raise CanopyError(
            f"the input is on {x.device}, its scales on {x_scale.device}, the weight on {codes.device}; move them"
        )
    if m * max(n, k) >= 2**31:
        raise CanopyError(f"{m} rows make 2^31 elements or more; split the input")
    if (have := torch.cuda.get_device_capability(x.device)) != HOPPER:
        raise CanopyError(f"the kernel needs compute capability 9.0; this GPU has {have[0]}.{have[1]}")
    if not m * n:
        return x.new_empty(m, n, dtype=dtype)
    x, x_scale = x.contiguous(), x_scale.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    weight = weight_only_launch.describe(codes, scale, zero, n, 4, group)
    tile = selection.choose(product_of(weight, k, m, launch.multiprocessors(x.device.index))).tile
    return run(x, x_scale, codes, scale, zero, weight, dtype, tile)


@w4a8_linear.register_fake
def _(x, x_scale, codes, scale, zero, n, group, dtype):
    return x.new_empty(x.shape[0], n, dtype=dtype)


def product_of(weight: Weight, k: int, rows: int, multiprocessors: int = 132) -> Product:
    """As `selection` takes it."""
    return Product("w4a8", weight.n, k, rows, weight, multiprocessors)


# --- what `dispatch` lists -----------------------------------------------------------------------------------


def unsupported(spec: LinearSpec) -> str | None:
    inputs = spec.activations
    if reason := launch.unavailable(spec.device):
        return reason
    if spec.weights.format.name != "int4":
        return f"it takes int4 weights; these are {spec.weights.format.name}"
    if inputs is None or inputs.format.name != "int8":
        return "it takes int8 activations; " + (
            "this recipe leaves activations as they are" if inputs is None else f"these are {inputs.format.name}"
        )
    if inputs.granularity.kind not in ("token", "tensor") or not inputs.symmetric:
        return f"it takes symmetric activations with one scale for each token or one in all; these are {inputs}"
    if reason := weight_only.unsupported_weight(spec) or weight_only.no_wgmma(spec):
        return reason
    if spec.k % COLUMNS:
        return f"it takes in_features in multiples of {COLUMNS}, not {spec.k}"
    return f"sums of {spec.k} products may not fit in 32 bits" if spec.k >= MOST_COLUMNS else None


def linear(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """(M, K) -> (M, N) in x's dtype."""
    scale = x.scale.to(torch.float32).reshape(-1, 1).expand(len(x.data), 1)
    parts = packed["weight_fragments"], packed["weight_scale"], packed.get("weight_zero_point")
    return w4a8_linear(x.data, scale, *parts, spec.n, spec.weights.granularity.group_size or 0, x.dtype)
