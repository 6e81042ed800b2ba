"""8-bit products on warpgroups: right for every kind of tile and odd shape on a GPU; tiles that fit, anywhere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels import dispatch
from canopyq.kernels.cuda import launch, nvrtc, tiles, w8a8, w8a8_launch
from canopyq.kernels.cuda.quantize_rows import quantize_rows
from canopyq.kernels.cuda.tiles import CodesTile, WideTile
from canopyq.kernels.dispatch import KERNELS
from canopyq.kernels.spec import LinearSpec
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe

BF16, FP16 = torch.bfloat16, torch.float16
# tokens, m_tiles, warpgroups, stages, cluster, per_sm: every constant takes each of its values
TILES = [
    CodesTile(*tile).fitted(4096)
    for tile in (
        (8, 1, 1, 4, 1, 2), (16, 1, 1, 20, 2, 2), (16, 2, 1, 8, 3, 1), (32, 1, 2, 2, 4, 2), (64, 1, 2, 8, 1, 1),
        (64, 1, 1, 3, 2, 3),
    )
]  # fmt: skip
LARGE = [
    CodesTile(*tile).fitted(4096)
    for tile in ((64, 2, 2, 8, 1, 1), (128, 2, 2, 8, 1, 1), (128, 1, 2, 3, 1, 2), (256, 1, 2, 3, 2, 1))
]
WIDE = [WideTile(256, 1, 4), WideTile(128, 2, 4), WideTile(128, 1, 6), WideTile(128, 1, 2)]
EVERY = [("int8", tile) for tile in TILES + LARGE] + [("fp8_e4m3", tile) for tile in TILES]


def codes(rows: int, k: int, format: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what they stand for in float64."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    found = quantize(x, format, "token")
    return found.data.cuda(), found.scale.cuda(), found.dequantize(torch.float64).cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def hopper(self) -> None:
        if torch.cuda.get_device_capability() != w8a8.HOPPER:
            pytest.skip("needs compute capability 9.0")

    @pytest.mark.parametrize(("format", "tile"), EVERY, ids=str)
    def test_every_tile_is_right_for_odd_shapes(self, format: str, tile: CodesTile) -> None:
        for m, n, k in ((1, 64, 128), (5, 40, 1072), (67, 333, 528), (300, 1000, 2064), (130, 4096, 4096)):
            x, x_scale, exact_x = codes(m, k, format, 1)
            w, w_scale, exact_w = codes(n, k, format, 2)
            fitted = tile.fitted(k)
            y = w8a8_launch.run_wgmma(x, x_scale, w, w_scale, torch.float32, fitted)
            exact = exact_x @ exact_w.t()
            error = float((y.double() - exact).norm() / exact.norm())
            assert error < (1e-6 if format == "int8" else 2e-3), (m, n, k, error)
            assert torch.equal(y, w8a8_launch.run_wgmma(x, x_scale, w, w_scale, torch.float32, fitted))

    @pytest.mark.parametrize("tile", WIDE, ids=str)
    @pytest.mark.parametrize("output", [FP16, BF16], ids=str)
    def test_every_tile_for_many_rows_is_right(self, tile: WideTile, output: torch.dtype) -> None:
        """One tile and many to a block; results cut off on both sides; one step and many."""
        for m, n, k in ((1, 64, 128), (67, 328, 528), (300, 1000, 2064), (3000, 4096, 1024), (1500, 7000, 16)):
            x, x_scale, exact_x = codes(m, k, "int8", 1)
            w, w_scale, exact_w = codes(n, k, "int8", 2)
            y = w8a8_launch.run_wide(x, x_scale, w, w_scale, output, tile)
            exact = exact_x @ exact_w.t()
            assert float((y.double() - exact).norm() / exact.norm()) < {FP16: 6e-4, BF16: 4e-3}[output], (m, n, k)
            assert torch.equal(y, w8a8_launch.run_wide(x, x_scale, w, w_scale, output, tile))
            plain = w8a8_launch.run_wgmma(x, x_scale, w, w_scale, output, LARGE[0].fitted(k))
            assert torch.equal(y, plain)

    @pytest.mark.parametrize("output", [FP16, BF16, torch.float32], ids=str)
    @pytest.mark.parametrize("scale", [FP16, BF16, torch.float32], ids=str)
    def test_every_dtype(self, output: torch.dtype, scale: torch.dtype) -> None:
        x, x_scale, exact_x = codes(40, 512, "int8", 3)
        w, w_scale, _ = codes(200, 512, "int8", 4)
        w_scale = w_scale.to(scale)
        exact = exact_x @ (w.double() * w_scale.double()).t()
        y = w8a8.wgmma_linear(x, x_scale, w, w_scale, output)
        assert y.dtype == output
        assert float((y.double() - exact).norm() / exact.norm()) < {FP16: 6e-4, BF16: 4e-3, torch.float32: 1e-6}[output]

    def test_it_reads_what_the_kernel_before_it_wrote(self) -> None:
        """It starts before the quantization has ended."""
        w, w_scale, exact_w = codes(512, 512, "int8", 5)
        with torch.cuda.stream(torch.cuda.Stream()):
            for m in (1, 16, 64, 300):
                for seed in range(20):
                    x = torch.randn(m, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(BF16)
                    found = quantize_rows(x, "int8")
                    y = w8a8.wgmma_linear(*found, w, w_scale, BF16)
                    exact = (found[0].double() * found[1].double()) @ exact_w.t()
                    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3

    def test_it_works_in_a_graph_and_is_well_formed(self) -> None:
        x, x_scale, _ = codes(20, 256, "int8", 6)
        w, w_scale, _ = codes(64, 256, "int8", 7)
        arguments = (x, x_scale, w, w_scale, BF16)
        expected = w8a8.wgmma_linear(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = w8a8.wgmma_linear(*arguments)
        graph.replay()
        assert torch.equal(y, expected)
        torch.library.opcheck(w8a8.wgmma_linear, arguments)

    def test_bad_input_is_refused(self) -> None:
        x, x_scale, _ = codes(20, 256, "int8", 6)
        for arguments, words in (
            ((x[:, :40].contiguous(), x_scale, x[:, :40].contiguous(), x_scale, BF16), "multiples of 16"),
            ((x, x_scale, x.cpu(), x_scale, BF16), "move them together"),
            ((x, x_scale[:3], x, x_scale, BF16), "as many scales"),
        ):
            with pytest.raises(CanopyError, match=words):
                w8a8.wgmma_linear(*arguments)
        assert w8a8.wgmma_linear(x[:0], x_scale[:0], x, x_scale, BF16).shape == (0, 20)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(("format", "tile"), EVERY[::2], ids=str)
def test_it_compiles_without_spilling(format: str, tile: CodesTile) -> None:
    constants = w8a8_launch.wgmma_constants(format, torch.float32, BF16, tile)
    extra = tiles.codes_product_source(format == "int8", tile.tokens)
    found = nvrtc.compile("w8a8_wgmma.cu", constants, "sm_90a", extra=extra)
    assert found.spilled == 0 and not found.warnings


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("tile", WIDE, ids=str)
def test_the_kernel_for_many_rows_compiles_without_spilling(tile: WideTile) -> None:
    constants = w8a8_launch.wide_constants(torch.float32, BF16, tile)
    extra = tiles.codes_product_source(True, tile.tokens)
    found = nvrtc.compile("wide_int8.cu", constants, "sm_90a", extra=extra)
    assert found.spilled == 0 and not found.warnings
    assert tile.shared + 640 <= tiles.SHARED  # barriers and scales beside it


@given(st.sampled_from(["int8", "fp8_e4m3"]), st.integers(1, 5000), st.integers(1, 40_000), st.integers(1, 2500))
def test_every_shape_gets_a_tile_that_fits(format: str, m: int, n: int, sixteens: int) -> None:
    k = 16 * sixteens
    tile = w8a8_launch.choose(format, m, n, k, torch.float32)
    assert (
        isinstance(tile, CodesTile)
        and tile.stages >= 2
        and (tile.shared + tiles.RESERVED) * tile.per_sm <= tiles.SHARED
    )
    assert tile.threads * tile.per_sm <= 2048 and tile.cluster <= -(-k // 128)
    across, down, cluster = tile.blocks(m, n)
    assert across * tile.tokens >= m and down * tile.rows >= n
    assert cluster == tile.cluster


def test_results_that_the_copy_engine_cannot_store_go_to_the_other_kernel() -> None:
    assert w8a8_launch.wide_unsupported_reason(4096, BF16) is None
    assert "float32" in w8a8_launch.wide_unsupported_reason(
        4096, torch.float32
    ) and "multiples of 8" in w8a8_launch.wide_unsupported_reason(4100, BF16)
    for n, dtype in ((4096, torch.float32), (4100, BF16)):
        assert isinstance(w8a8_launch.choose("int8", 5000, n, 4096, dtype), CodesTile)


def test_a_stage_never_holds_less_than_two_tiles() -> None:
    assert replace(TILES[0], stages=100).fitted(4096).stages > 10


def spec(recipe: str, n: int = 4096, k: int = 4096) -> LinearSpec:
    found = Recipe.parse(recipe)
    return LinearSpec(found.weights, found.activations, n, k, BF16, torch.device("cuda"))


@pytest.mark.parametrize(("capability", "many"), [((9, 0), KERNELS["wgmma_int8"]), ((8, 0), KERNELS["cublas_int8"])])
def test_int8_takes_our_kernels_and_cublas_elsewhere(capability, many, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    kernels = dispatch.candidates(spec("w8a8"))
    assert dispatch.select(kernels, 1) is kernels[0] and kernels[0].name == KERNELS["skinny_int8"].name
    assert dispatch.select(kernels, 5000).name == many.name


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("recipe", ["w8a8", "fp8", "w4a8-g128", "w4a16-g128", "w8a16", "w8a8-asym", "nvfp4"])
def test_some_kernel_takes_every_number_of_rows_on_any_gpu(
    recipe: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows of 10 outputs ran on a kernel, and no other one in its layout takes more rows of so few outputs."""
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for n, k in itertools.product((10, 64, 50257), (128, 136, 100, 4096)):
        if k % 128 and "g128" in recipe:
            continue
        kernels = dispatch.candidates(spec(recipe, n, k))
        for rows in (1, 2, 15, 16, 17, 64, 65, 1000, 10**6):
            assert dispatch.select(kernels, rows) in kernels


def test_fp8_goes_to_cublas_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    kernels = dispatch.candidates(spec("fp8"))
    assert dispatch.select(kernels, 5000).name == KERNELS["cublas_fp8"].name
    assert KERNELS["wgmma_fp8"].name in [dispatch.select(kernels, rows).name for rows in (16, 32, 64)]
