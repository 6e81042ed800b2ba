"""INT4 by INT8 on warpgroups: the layout, what is refused and that it compiles, anywhere; right on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels import dispatch
from canopyq.kernels.cuda import launch, nvrtc, selection, tiles, w4a8, weight_only, weight_only_launch
from canopyq.kernels.cuda.quantize_rows import quantize_rows
from canopyq.kernels.cuda.tiles import W4A8Tile, Weight
from canopyq.kernels.spec import LinearSpec
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Recipe, Scheme

BF16, FP16 = torch.bfloat16, torch.float16
INT8 = Scheme("int8", "token")
# tokens, warpgroups, stages, cluster, per_sm: every constant takes each of its values, both kinds of sums
TILES = [
    W4A8Tile(*tile)
    for tile in ((8, 1, 12, 1, 3), (8, 2, 10, 2, 2), (16, 2, 3, 4, 1), (32, 2, 8, 1, 2), (32, 1, 4, 3, 2),
                 (64, 2, 12, 1, 1), (64, 1, 6, 2, 2), (64, 3, 12, 1, 1), (96, 2, 10, 1, 1), (128, 2, 8, 2, 1))
]  # fmt: skip
WEIGHTS = [("g128", True), ("g128", False), ("g32", False), ("g64", True), ("g256", True), ("channel", True),
           ("channel", False)]  # fmt: skip


def weight_of(granularity: str, symmetric: bool, n: int, k: int, scale: torch.dtype = BF16) -> QuantizedTensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) / k**0.5
    return quantize(x, Scheme("int4", granularity, symmetric=symmetric, scale_dtype=scale))


def inputs(rows: int, k: int) -> Tensor:
    """With a token of other size, and one whose largest value is far out."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    x[-1] *= 1e-3
    x[0, 1] = 30
    return x


# --- anywhere ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["g32", "g64", "g128", "g256", "channel"]), st.booleans(), st.integers(1, 130), st.integers(1, 5)
)
@settings(max_examples=30)
def test_restore_is_the_exact_inverse(granularity: str, symmetric: bool, n: int, groups: int) -> None:
    k = groups * int(granularity[1:]) if granularity != "channel" else 48 * groups
    weight = weight_of(granularity, symmetric, n, k)
    found = w4a8.unpack(w4a8.prepack(weight), LinearSpec.of(weight, INT8))
    assert found.parts.keys() == weight.parts.keys()
    for name, tensor in weight.parts.items():
        assert found.parts[name].dtype == tensor.dtype and torch.equal(found.parts[name], tensor), name


def test_every_code_lies_where_its_lane_looks() -> None:
    """Lane 4g + t of the operand of m64n…k32 holds rows g and g + 8 of its warp's 16 at columns 4t … 4t + 3, then both
    at 4t + 16 … (PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk32"); the kernel unpacks a word of low nibbles,
    then high ones."""
    weight = weight_of("channel", True, 70, 256)
    codes = torch.zeros(128, 256, dtype=torch.int64)
    codes[:70] = weight.codes.long() + 8
    data = w4a8.prepack(weight)["weight_fragments"].numpy().view("uint32").reshape(2, 2, 4, 2, 32, 4)
    for row in range(0, 128, 3):
        for column in range(0, 256, 5):
            slab, block, half, g = row // 64, row % 64 // 16, row % 16 // 8, row % 8
            step, product, right, t, byte = (
                column // 128,
                column % 128 // 32,
                column % 32 // 16,
                column % 16 // 4,
                column % 4,
            )
            word = int(data[slab, step, block, product // 2, 4 * g + t, product % 2 * 2 + right])
            assert word >> (8 * byte + 4 * half) & 15 == codes[row, column], (row, column)


@pytest.mark.parametrize(("granularity", "symmetric"), WEIGHTS)
def test_what_the_kernel_computes_is_the_reference(granularity: str, symmetric: bool) -> None:
    """Exact integer sums of a group, scaled: in float64, as the layer without a kernel has it."""
    weight, x = weight_of(granularity, symmetric, 40, 512), inputs(5, 512)
    codes, zero = weight.codes.double(), 0 if weight.zero_point is None else weight.zero_point.double()[:, :, None]
    input_codes = quantize(x, INT8)
    groups = weight.scale.shape[1]
    products = (codes.view(40, groups, -1) - zero) * input_codes.data.double().view(5, 1, groups, -1)
    sums = products.sum(-1)
    assert sums.abs().max() < 2**31 / 16
    found = (sums * weight.scale.double()).sum(-1) * input_codes.scale.double()
    layer = QuantizedLinear(weight, activations=INT8)
    assert float((layer(x).double() - found).norm() / found.norm()) < 1e-5


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(weight_only, "_capability", lambda device: (9, 0))


def problem(recipe: str, k: int = 256, **change: object) -> LinearSpec:
    found = Recipe.parse(recipe)
    schemes = {"weights": found.weights, "activations": found.activations} | change
    return LinearSpec(**schemes, n=64, k=k, weight_dtype=BF16, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (problem("w4a16-g128"), "leaves activations as they are"),
        (problem("w8a8"), "int8"),
        (problem("w4a4-g128"), "int4"),
        (problem("w4a8-g128", activations=Scheme("int8", "token", symmetric=False)), "symmetric activations"),
        (problem("w4a8-channel", k=72), "multiples of 16"),
        (problem("w4a8-channel", k=2**17), "32 bits"),
        (problem("w4a8-g128", weights=Scheme("int4", "g128", scale_dtype=torch.float32)), "torch.float32"),
        (problem("w4a8-g128", weights=Scheme("int4", "g100", scale_dtype=BF16)), "g100"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(given: LinearSpec, words: str, hopper: None) -> None:
    assert words in w4a8.unsupported(given)


@pytest.mark.parametrize("recipe", ["w4a8-g128", "w4a8-g32", "w4a8-channel", "w4a8-g64-static"])
def test_it_takes_every_number_of_rows_on_a_hopper_gpu(recipe: str, hopper: None) -> None:
    kernels = dispatch.candidates(problem(recipe))
    assert kernels == (dispatch.KERNELS["w4a8"],) and dispatch.select(kernels, 5000).takes_codes


def test_it_refuses_other_gpus(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "_capability", lambda device: (8, 0))
    assert "8.0" in w4a8.unsupported(problem("w4a8-g128"))


def described(granularity: str, symmetric: bool, n: int, k: int) -> Weight:
    group = int(granularity[1:]) if granularity != "channel" else 0
    steps = -(-k // 128)
    return Weight(n, -(-n // 64), steps, steps * 128 // group if group else 1, 4, group, not symmetric)


@given(st.sampled_from(WEIGHTS), st.integers(1, 5000), st.integers(1, 40_000), st.integers(1, 150))
def test_every_shape_gets_a_tile_that_fits(weight: tuple[str, bool], m: int, n: int, groups: int) -> None:
    own = described(*weight, n, 256 * groups)
    tile = selection.choose(w4a8.product_of(own, 256 * groups, m)).tile
    assert isinstance(tile, W4A8Tile) and tile.stages >= 2 and tile.cluster <= own.steps
    assert (tile.shared(own) + tiles.RESERVED) * tile.per_sm <= tiles.SHARED and tile.threads * tile.per_sm <= 2048


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_it_compiles_without_spilling(tile: W4A8Tile) -> None:
    for granularity, symmetric, output in (("g128", True, BF16), ("g32", False, FP16), ("channel", True, BF16)):
        weight = described(granularity, symmetric, 4096, 4096)
        constants = w4a8.constants(weight.group, not symmetric, BF16, output, tile.fitted(weight))
        extra = tiles.w4a8_product_source(tile.tokens)
        found = nvrtc.compile("w4a8.cu", constants, "sm_90a", extra=extra)
        assert found.spilled == 0 and not found.warnings, (granularity, symmetric)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def needs_hopper(self) -> None:
        if torch.cuda.get_device_capability() != w4a8.HOPPER:
            pytest.skip("needs compute capability 9.0")

    @pytest.mark.parametrize(("granularity", "symmetric"), WEIGHTS)
    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_every_tile_is_right_for_odd_shapes(self, tile: W4A8Tile, granularity: str, symmetric: bool) -> None:
        """Over memory that held NaN; the same bit for bit when run again."""
        for m, n, k in ((1, 64, 256), (5, 40, 1280), (67, 333, 768), (300, 1000, 2048), (130, 4096, 4096)):
            weight = weight_of(granularity, symmetric, n, k - 16 if granularity == "channel" else k)
            k = weight.shape[1]
            x = quantize(inputs(m, k), INT8)
            exact = x.dequantize(torch.float64).cuda() @ weight.dequantize(torch.float64).cuda().t()
            packed = w4a8.prepack(weight.to("cuda"))
            parts = packed["weight_fragments"], packed["weight_scale"], packed.get("weight_zero_point")
            own = weight_only_launch.describe(*parts, n, 4, weight.scheme.granularity.group_size or 0)
            arguments = x.data.cuda(), x.scale.cuda(), *parts, own, torch.float32, tile.fitted(own)
            poison = torch.full((m, n), float("nan"), device="cuda")
            del poison
            y = w4a8.run(*arguments)
            error = float((y.double() - exact).norm() / exact.norm())
            assert error < 1e-6, (m, n, k, error)
            assert torch.equal(y, w4a8.run(*arguments))

    @pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32], ids=str)
    @pytest.mark.parametrize("scale", [FP16, BF16], ids=str)
    @pytest.mark.parametrize("recipe", ["w4a8-g128", "w4a8-g32", "w4a8-channel"])
    def test_a_layer_is_right_for_every_number_of_rows(
        self, recipe: str, scale: torch.dtype, dtype: torch.dtype
    ) -> None:
        weight = weight_of(str(Recipe.parse(recipe).weights.granularity), True, 200, 512, scale)
        layer = QuantizedLinear(weight.to("cuda"), activations=INT8)
        exact_weight = weight.dequantize(torch.float64).t()
        for rows in (1, 2, 7, 16, 33, 64, 130, 300):
            x = inputs(rows, 512).to(dtype)
            y = layer(x.cuda())
            assert y.dtype == dtype and layer.layout is w4a8.INTEGER_FRAGMENTS
            exact = quantize(x.float(), INT8).dequantize(torch.float64) @ exact_weight
            error = float((y.cpu().double() - exact).norm() / exact.norm())
            assert error < {FP16: 6e-4, BF16: 4e-3, torch.float32: 1e-3}[dtype], rows

    def test_a_static_range_and_a_layer_of_parts(self) -> None:
        weight, x = weight_of("g64", True, 192, 512), inputs(20, 512)
        scheme = Scheme("int8", "tensor")
        scale = torch.tensor([0.05], device="cuda")
        layer = QuantizedLinear(weight.to("cuda"), activations=scheme, input_scale=scale)
        codes = (x / 0.05).round().clamp(-128, 127).double() * 0.05
        exact = codes @ weight.dequantize(torch.float64).t()
        assert float((layer(x.cuda()).cpu().double() - exact).norm() / exact.norm()) < 1e-3

    def test_it_reads_what_the_kernel_before_it_wrote(self) -> None:
        """It starts before the quantization has ended."""
        weight = weight_of("g128", True, 512, 512).to("cuda")
        exact_weight, layer = weight.dequantize(torch.float64).t(), QuantizedLinear(weight, activations=INT8).prepack()
        with torch.cuda.stream(torch.cuda.Stream()):
            for m in (1, 16, 64, 300):
                for seed in range(20):
                    x = torch.randn(m, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(BF16)
                    found = quantize_rows(x, "int8")
                    y = layer(x)
                    exact = (found[0].double() * found[1].double()) @ exact_weight
                    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3

    def test_it_works_in_a_graph_and_is_well_formed(self) -> None:
        layer = QuantizedLinear(weight_of("g128", False, 64, 256).to("cuda"), activations=INT8)
        x = inputs(20, 256).to(BF16).cuda()
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, expected)
        codes = quantize_rows(x, "int8")
        torch.library.opcheck(w4a8.w4a8_linear, (*codes, *layer.packed.values(), 64, 128, BF16))

    def test_bad_input_is_refused(self) -> None:
        layer = QuantizedLinear(weight_of("g128", True, 64, 256).to("cuda"), activations=INT8).prepack()
        parts = *layer.packed.values(), None, 64, 128
        x, scale = torch.ones(20, 256, dtype=torch.int8, device="cuda"), torch.ones(20, device="cuda")
        for arguments, words in (
            ((x[:, :40].contiguous(), scale, *parts, BF16), "multiple of 16"),
            ((x.float(), scale, *parts, BF16), "torch.float32"),
            ((x.repeat(1, 2), scale, *parts, BF16), "256 at most"),
            ((x, scale[:3], *parts, BF16), "3 scales"),
            ((x.cpu(), scale, *parts, BF16), "cpu"),
            ((x, scale, *parts, torch.float64), "torch.float64"),
        ):
            with pytest.raises(CanopyError, match=words):
                w4a8.w4a8_linear(*arguments)
        assert w4a8.w4a8_linear(x[:0], scale[:0], *parts, BF16).shape == (0, 64)
