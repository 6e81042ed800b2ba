"""8 bits by 8 bits on a GPU, held to float64 and to the codes of `quantize`; that every variant compiles, anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch, nvrtc, quantize_rows, w8a8, w8a8_launch
from canopyq.kernels.dispatch import KERNELS, Kernel
from canopyq.kernels.spec import LinearSpec
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe, Scheme

BF16, FP16 = torch.bfloat16, torch.float16
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def relative_error(y: Tensor, exact: Tensor) -> float:
    assert y.isfinite().all()
    return float((y.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("format", quantize_rows.CODE_CONSTANTS)
class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
    @pytest.mark.parametrize(
        ("m", "k"), [(1, 8), (3, 1032), (5, 4096), (2, 8192), (2, 12288), (300, 16384), (2, 20000), (2, 40000)]
    )
    def test_codes_of_rows_are_those_of_quantize(self, format: str, m: int, k: int, dtype: torch.dtype) -> None:
        x = normal(m, k, dtype=dtype)
        x[-1] *= 1e-3
        if m > 2 and dtype == BF16:
            x[1] *= 1e-33
        for each in (x.cuda(), x.cuda().t().contiguous().t(), F.pad(x, (3, 5)).cuda()[:, 3:-5]):
            codes, scales = quantize_rows.quantize_rows(each, format)
            expected = quantize(x.float(), format, "token")
            assert torch.equal(scales.cpu(), expected.scale)
            assert torch.equal(codes.cpu().view(torch.uint8), expected.data.view(torch.uint8))

    def test_zeros_and_bad_rows(self, format: str) -> None:
        x = normal(4, 64, dtype=BF16)
        x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("-inf")
        codes, scales = quantize_rows.quantize_rows(x.cuda(), format)
        assert scales[0] == 1 and not codes[0].float().any()
        assert scales[1].isnan() and scales[2].isnan() and scales[3].isfinite()

    @pytest.mark.parametrize(("m", "k"), [(7, 2056), (7, 11008), (300, 11008), (150, 40000)])
    def test_what_comes_before_is_fused(self, format: str, m: int, k: int) -> None:
        x, up, weight = (normal(*shape, dtype=BF16).cuda() for shape in ((m, k), (m - 1, k), (k,)))
        up = F.pad(up, (0, 0, 0, 1))
        base = (x.float() * 0.75).to(BF16)
        change = x - base
        x = base + change  # as it is rounded
        wide = x.float()
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(BF16)
        for (codes, scales), plain in (
            (quantize_rows.quantize_normed(x.clone(), None, weight, 1e-5, format), normed),
            (quantize_rows.quantize_normed(base, change, weight, 1e-5, format), normed),
            (quantize_rows.quantize_gated(x, up, format), F.silu(x) * up),
        ):
            expected = quantize(plain.float(), format, "token")
            found = codes.float() * scales
            # A value on the edge between two 16-bit numbers may be rounded to either: a code or a scale apart.
            assert float((found - expected.dequantize()).norm() / plain.float().norm()) < 4e-3
        assert torch.equal(base, x)  # what was added stays

    @pytest.mark.parametrize("output", [FP16, BF16, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("m", "n", "k"),
        [
            (1, 64, 256),
            (2, 4096, 4096),
            (5, 40, 1072),
            (16, 1000, 16),
            (9, 200, 528),
            (8, 72, 11008),
            (16, 9000, 1040),
        ],
    )
    def test_products_of_few_rows(self, format: str, m: int, n: int, k: int, output: torch.dtype) -> None:
        x, w = quantize(normal(m, k), format, "token"), quantize(normal(n, k), format, "channel", scale_dtype=BF16)
        exact = x.dequantize(torch.float64) @ w.dequantize(torch.float64).t()
        parts = [t.cuda() for t in (x.data, x.scale, w.data, w.scale)]
        y = w8a8.skinny_linear(*parts, output)
        assert y.dtype == output and y.shape == (m, n)
        assert relative_error(y, exact) < {FP16: 6e-4, BF16: 4e-3, torch.float32: 1e-5}[output]
        assert torch.equal(y, w8a8.skinny_linear(*parts, output))

    @pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 65, 300])
    @pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32], ids=str)
    def test_a_layer_is_right_for_every_number_of_rows(self, format: str, rows: int, dtype: torch.dtype) -> None:
        recipe = Recipe.parse({"int8": "w8a8", "fp8_e4m3": "fp8"}[format])
        weight = quantize(normal(192, 512), recipe.weights).to("cuda")
        layer = QuantizedLinear(weight, activations=recipe.activations)
        x = normal(rows, 512, dtype=dtype)
        exact = (
            quantize(x.float(), recipe.activations).dequantize(torch.float64)
            @ weight.to("cpu").dequantize(torch.float64).t()
        )
        assert relative_error(layer(x.cuda()), exact) < {FP16: 1e-3, BF16: 4e-3, torch.float32: 1e-3}[dtype]

    def test_it_works_in_a_graph_and_compiled(self, format: str) -> None:
        recipe = Recipe.parse({"int8": "w8a8", "fp8_e4m3": "fp8"}[format])
        layer = QuantizedLinear(quantize(normal(64, 256), recipe.weights).to("cuda"), activations=recipe.activations)
        x = normal(3, 256, dtype=BF16).cuda()
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, expected)
        weight, scale = layer.packed["weight"], layer.packed["weight_scale"]

        def step(x: Tensor) -> Tensor:
            codes, scales = quantize_rows.quantize_rows(x, format)
            return w8a8.skinny_linear(codes, scales, weight, scale, x.dtype) + 1

        assert torch.equal(torch.compile(step, fullgraph=True)(x), step(x))

    def test_bad_input_is_refused(self, format: str) -> None:
        x, w = (torch.ones(rows, 64, dtype=torch.int8, device="cuda") for rows in (2, 3))
        sx, sw = torch.ones(2).cuda(), torch.ones(3).cuda()
        for arguments, words in (
            ((x.repeat(9, 1), sx.repeat(9), w, sw, BF16), "up to 16 rows"),
            ((x[:, :40].contiguous(), sx, w[:, :40].contiguous(), sw, BF16), "multiples of 16"),
            ((x, sx, w[:, :32], sw, BF16), "codes .M, K. and .N, K."),
            ((x, sx[:1], w, sw, BF16), "as many scales"),
            ((x, sx, w, sw.double(), BF16), "16- or 32-bit"),
            ((x, sx, w.cpu(), sw, BF16), "move them together"),
        ):
            with pytest.raises(CanopyError, match=words):
                w8a8.skinny_linear(*arguments)
        for arguments, words in (
            ((sx[None].half()[:, :1], format), "multiple of 8"),
            ((sx[None], format), "16-bit floats"),
        ):
            with pytest.raises(CanopyError, match=words):
                quantize_rows.quantize_rows(*arguments)


VARIANTS = (
    [
        ("skinny.cu", w8a8_launch.skinny_constants(format, tiles, BF16, BF16), arch)
        for format, tiles, arch in (
            *(("int8", t, "sm_90a") for t in (1, 2)),
            *(("fp8_e4m3", t, "sm_90a") for t in (1, 2)),
            *(("int8", 2, arch) for arch in ("sm_80", "sm_100")),
            ("fp8_e4m3", 2, "sm_100"),
        )
    ]
    + [
        ("quantize_rows.cu", quantize_rows.constants(format, BF16, source, threads, kept), arch)
        for format, source, threads, kept, arch in (
            ("int8", 0, 256, 1, "sm_80"),
            ("int8", 0, 256, 4, "sm_90a"),
            ("int8", 0, 512, 3, "sm_90a"),
            ("int8", 1, 256, 2, "sm_90a"),
            ("fp8_e4m3", 1, 512, 3, "sm_90a"),
            ("fp8_e4m3", 2, 1024, 2, "sm_90a"),
            ("int8", 2, 512, 3, "sm_90a"),
            ("fp8_e4m3", 0, 1024, 4, "sm_100"),
        )
    ]
    + [
        ("append.cu", {"CODE": code, "HEAD_DIM": head_dim, "ELEMENT_BF16": 1}, arch)
        for code, head_dim, arch in ((8, 128, "sm_80"), (4, 128, "sm_90a"), (2, 64, "sm_90a"), (0, 128, "sm_100"))
    ]
)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(("file", "constants", "arch"), VARIANTS, ids=str)
def test_it_compiles_without_spilling(file: str, constants: dict, arch: str) -> None:
    found = nvrtc.compile(file, constants, arch)
    assert found.spilled == 0 and found.registers <= 128 and not found.warnings


@pytest.mark.parametrize("source", [0, 1, 2])
@pytest.mark.parametrize("m", [1, 132, 133, 4096])
@given(k=st.integers(1, 200_000))
def test_threads_keep_as_much_of_a_row_as_they_can(m: int, source: int, k: int) -> None:
    threads, kept = quantize_rows.row_threads(m, 8 * k, source, 132)
    assert threads in (256, 512, 1024) and 1 <= kept <= quantize_rows.MAX_KEPT
    assert threads * kept >= min(k, 1024 * quantize_rows.MAX_KEPT) and threads * (kept - 1) < k


def spec(recipe: str, k: int = 256, **change: object) -> LinearSpec:
    found = Recipe.parse(recipe)
    schemes = {"weights": found.weights, "activations": found.activations} | change
    return LinearSpec(**schemes, n=64, k=k, weight_dtype=BF16, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("kernel", "given", "words"),
    [
        (KERNELS["skinny_int8"], spec("w8a8", activations=Scheme("int8", "token", symmetric=False)), "a zero point"),
        (KERNELS["skinny_int8"], spec("w8a8", k=72), "multiples of 16"),
        (KERNELS["skinny_int8"], spec("w8a16"), "leaves activations as they are"),
        (KERNELS["skinny_int8"], spec("fp8"), "int8 activations"),
        (KERNELS["skinny_fp8"], spec("w8a8"), "FP8 weights"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(
    kernel: Kernel, given: LinearSpec, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert words in kernel.unsupported_reason(given)


def test_scales_in_float32_are_undone_bit_for_bit() -> None:
    weight = quantize(normal(24, 64), "int8", "channel", scale_dtype=BF16)
    packed = w8a8.prepack(weight)
    back = w8a8.unpack(packed, LinearSpec.of(weight, Scheme("int8", "token")))
    assert packed["weight_scale"].dtype == torch.float32
    assert torch.equal(back.scale, weight.scale) and back.scale.dtype == BF16 and torch.equal(back.data, weight.data)
