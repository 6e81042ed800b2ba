"""The CUDA kernels for 4- and 8-bit weights on a GPU, held to float64 of the dequantized weight; bad input; graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from canopyq.errors import CanopyError
from canopyq.kernels import dispatch, reference
from canopyq.kernels.cuda import selection, weight_only, weight_only_launch
from canopyq.kernels.cuda.fragments import FRAGMENTS, prepack
from canopyq.kernels.cuda.tiles import StreamKTile
from canopyq.kernels.dispatch import KERNELS
from canopyq.kernels.spec import LinearSpec
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Scheme

BF16, FP16 = torch.bfloat16, torch.float16
MOST = {BF16: 4e-3, FP16: 6e-4, torch.float32: 1e-5}  # relative error
ROWS = (1, 2, 3, 5, 8, 17, 33, 64, 65, 130, 300)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]


def layer_of(
    name: str = "int4", granularity: str = "g128", symmetric: bool = True, n: int = 200, k: int = 512, scale=BF16
) -> QuantizedLinear:
    generator = torch.Generator("cuda").manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator, device="cuda") / k**0.5
    scheme = Scheme(name, granularity, symmetric=symmetric, scale_dtype=scale)
    return QuantizedLinear(quantize(weight, scheme)).prepack()


def check(layer: QuantizedLinear, x: torch.Tensor) -> None:
    with torch.no_grad():
        y = layer(x)
    exact = x.double() @ layer.quantized_weight.dequantize(torch.float64).t()
    assert y.shape == exact.shape and y.dtype == x.dtype and y.isfinite().all()
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= MOST[x.dtype], (tuple(x.shape), x.dtype, error)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("granularity", "n", "k"),
    [
        ("g32", 144, 544),
        ("g64", 200, 960),
        ("g128", 512, 4096),
        ("g256", 130, 1280),
        ("channel", 65, 1000),
        ("channel", 7, 100),
    ],
)
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_right_for_every_shape_and_number_of_rows(name: str, granularity: str, n: int, k: int, symmetric: bool) -> None:
    layer = layer_of(name, granularity, symmetric, n, k)
    assert layer.layout is FRAGMENTS
    for rows in ROWS:
        check(layer, torch.randn(rows, k, device="cuda", dtype=BF16 if (n + k) % 3 else FP16))


@pytest.mark.parametrize("scale", [BF16, FP16], ids=["bfloat16", "float16"])
def test_both_kinds_of_scales(scale: torch.dtype) -> None:
    layer = layer_of(scale=scale)
    for dtype in (BF16, FP16, torch.float32):
        for rows in (1, 16, 130):
            check(layer, torch.randn(rows, 512, device="cuda", dtype=dtype))


def test_small_weights_in_float16() -> None:
    weight = torch.randn(128, 512, device="cuda") * 1e-4
    layer = QuantizedLinear(quantize(weight, Scheme("int4", "g128", scale_dtype=BF16))).prepack()
    for rows in (1, 16, 130):
        check(layer, 100 * torch.randn(rows, 512, device="cuda", dtype=FP16))


@pytest.mark.parametrize(
    "kernel",
    [kernel for name, kernel in KERNELS.items() if name.startswith("weight_only")],
    ids=lambda kernel: kernel.name,
)
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_each_kernel_by_itself(kernel, name: str) -> None:
    layer = layer_of(name, "g128", False, 320, 1024)
    if reason := kernel.unsupported_reason(layer.spec):
        pytest.skip(reason)
    most = 16 if kernel is KERNELS["weight_only_decode"] else 4096
    exact = layer.quantized_weight.dequantize(torch.float64).t()
    for rows in sorted({1, min(2, most), most}):
        x = torch.randn(rows, 1024, device="cuda", dtype=BF16)
        y = kernel.run(x, layer.packed, layer.spec)
        assert float((y.double() - x.double() @ exact).norm() / (x.double() @ exact).norm()) <= MOST[BF16]


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper")
@pytest.mark.parametrize(
    "weight",
    [("int4", "g128", True), ("int4", "g32", False), ("int8", "channel", True), ("int8", "g64", False)],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 0])
def test_stream_k_however_the_work_is_shared_out(weight: tuple[str, str, bool], parts: int) -> None:
    """Whole tiles, parts that several blocks add up, ends that are cut off; over memory that held NaN."""
    name, granularity, symmetric = weight
    for n, k in ((200, 640), (4104, 896 if granularity == "g128" else 960), (1000, 8192)):
        layer = layer_of(name, granularity, symmetric, n, k)
        exact_weight = layer.quantized_weight.dequantize(torch.float64).t()
        own, scale, zero, *rest = weight_only._arguments(layer.packed, layer.spec)
        described = weight_only_launch.describe(own, scale, zero, *rest)
        for tile in {tile for tile, _ in selection.palette("w4a16") if isinstance(tile, StreamKTile)}:
            fitted = replace(tile.fitted(described), parts=parts)
            for rows in (1, fitted.tokens - 3, 2 * fitted.tokens + 5):
                for dtype in (BF16, FP16):
                    x = torch.randn(rows, -(-k // 64) * 64, device="cuda", dtype=dtype)
                    x[:, k:] = 0
                    poison = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
                    del poison
                    y = weight_only_launch.run_stream_k(x, own, scale, zero, described, fitted)
                    exact = x[:, :k].double() @ exact_weight
                    error = float((y.double() - exact).norm() / exact.norm())
                    assert error <= MOST[dtype], (fitted, rows, dtype, error)
                    assert torch.equal(y, weight_only_launch.run_stream_k(x, own, scale, zero, described, fitted))


def test_two_streams_at_a_time_do_not_meet() -> None:
    """Each launch has its own memory for sums and its own mark."""
    layers = [layer_of(n=n, k=4096) for n in (1000, 1024)]
    x = torch.randn(300, 4096, device="cuda", dtype=BF16)
    with torch.no_grad():
        alone = [layer(x) for layer in layers]
        streams = [torch.cuda.Stream() for _ in layers]
        torch.cuda.synchronize()
        for _ in range(200):
            found = []
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x))
        torch.cuda.synchronize()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)


def test_any_input_of_the_right_width_is_right() -> None:
    layer = layer_of(k=512)
    many = torch.randn(40, 1100, device="cuda", dtype=BF16)
    for rows in (1, 16, 33):
        check(layer, many[:rows, :512])  # rows far apart
        check(layer, many[:rows, 3:515])  # begins at 6 bytes
        check(layer, torch.randn(512, rows, device="cuda", dtype=BF16).t())
        check(layer, torch.randn(rows * 512 + 1, device="cuda", dtype=BF16)[1:].view(rows, 512))
    check(layer, torch.randn(2, 3, 512, device="cuda", dtype=BF16))
    assert layer(torch.empty(0, 512, device="cuda", dtype=BF16)).shape == (0, 200)
    assert layer(torch.empty(2, 0, 512, device="cuda", dtype=FP16)).shape == (2, 0, 200)


def test_gradients_and_float64_go_through_the_dequantized_weight() -> None:
    layer = layer_of()
    x = torch.randn(3, 512, device="cuda", dtype=BF16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    y = layer(torch.randn(3, 512, device="cuda", dtype=torch.float64))
    assert y.dtype == torch.float64


def test_bad_input_is_refused_in_words() -> None:
    layer = layer_of()
    arguments = weight_only._arguments(layer.packed, layer.spec)
    with pytest.raises(CanopyError, match="input is on cpu and the weight on cuda:0"):
        layer(torch.randn(2, 512, dtype=BF16))
    with pytest.raises(CanopyError, match="takes floating-point input"):
        layer(torch.ones(2, 512, device="cuda", dtype=torch.int32))
    for op in (weight_only.decode_linear, weight_only.warpgroup_linear, weight_only.stream_k_linear):
        with pytest.raises(CanopyError, match="bfloat16 and float16 input, not torch.float32"):
            op(torch.randn(2, 512, device="cuda"), *arguments)
        with pytest.raises(CanopyError, match=r"takes an input \(rows, 512 at most\)"):
            op(torch.randn(2, 640, device="cuda", dtype=BF16), *arguments)
        with pytest.raises(CanopyError, match=r"takes an input"):
            op(torch.randn(512, device="cuda", dtype=BF16), *arguments)
        with pytest.raises(CanopyError, match="2\\^31 elements or more"):
            op(torch.empty(1, 512, device="cuda", dtype=BF16).expand(2**22, 512), *arguments)
        with pytest.raises(CanopyError, match="contiguous and begin at a multiple of 16 bytes"):
            shifted = torch.empty(arguments[0].numel() + 1, dtype=torch.int32, device="cuda")[1:]
            op(torch.randn(2, 512, device="cuda", dtype=BF16), shifted.view_as(arguments[0]), *arguments[1:])


def test_what_the_kernels_do_not_take_runs_on_the_reference() -> None:
    for scheme in (Scheme("int4", "g100", scale_dtype=BF16), Scheme("int3", "g64", scale_dtype=BF16)):
        layer = QuantizedLinear(quantize(torch.randn(64, 192, device="cuda"), scheme)).prepack()
        assert layer.layout is reference.CHECKPOINT_LAYOUT
        reasons = {verdict.kernel: verdict.reason for verdict in dispatch.verdicts(layer.spec)}
        assert "it takes" in reasons[KERNELS["weight_only_decode"].name]
        check(layer, torch.randn(5, 192, device="cuda", dtype=torch.float32))


def test_a_cuda_graph_replays_it() -> None:
    for rows in (1, 16, 130, 3000):
        layer, x = layer_of(n=256), torch.randn(rows, 512, device="cuda", dtype=BF16)
        with torch.no_grad():
            layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            exact = x.double() @ layer.quantized_weight.dequantize(torch.float64).t()
            assert float((y.double() - exact).norm() / exact.norm()) <= MOST[BF16]


def test_one_after_the_other_on_a_stream_of_its_own() -> None:
    """Each kernel starts before the one ahead has ended, and must still see what it wrote."""
    layers = [layer_of(n=512, k=512) for _ in range(4)]
    weights = [layer.quantized_weight.dequantize(torch.float64).t() for layer in layers]
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for rows in (1, 8, 64):
            for _ in range(20):
                x = torch.randn(rows, 512, device="cuda", dtype=FP16)
                y, exact = x, x.double()
                for layer, weight in zip(layers, weights, strict=True):
                    y, exact = layer(y), exact @ weight
                torch.cuda.current_stream().synchronize()
                assert float((y.double() - exact).norm() / exact.norm()) <= 2e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_takes_it_whole(mode: str) -> None:
    layer = layer_of(n=256)
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (1, 16):
            for _ in range(3):
                x = torch.randn(rows, 512, device="cuda", dtype=BF16)
                torch.testing.assert_close(compiled(x), torch.relu(layer(x)) + 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["decode_linear", "warpgroup_linear", "stream_k_linear"])
def test_the_operators_are_well_formed(name: str) -> None:
    layer = layer_of()
    x = torch.randn(1, 512, device="cuda", dtype=BF16)
    torch.library.opcheck(getattr(weight_only, name), (x, *weight_only._arguments(layer.packed, layer.spec)))


def test_weights_come_back_as_they_were() -> None:
    weight = quantize(torch.randn(200, 512, device="cuda"), Scheme("int4", "g128", symmetric=False, scale_dtype=BF16))
    layer = QuantizedLinear(weight).prepack()
    assert layer.layout is FRAGMENTS
    found = layer.cpu().state_dict()
    assert torch.equal(found["weight_packed"], weight.data.cpu())
    assert torch.equal(found["weight_zero_point"], weight.zero_point.cpu())
    assert LinearSpec.of(weight).device.type == "cuda" and prepack(weight)["weight_fragments"].is_cuda
