"""Every kernel that this machine can run, held to float64; layouts and their inverses; which kernel runs and why."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.kernels import activations, cpu_int4, cpu_int8, dispatch, operator
from canopyq.kernels.cuda import launch, w8a8
from canopyq.kernels.dispatch import KERNELS, Kernel
from canopyq.kernels.spec import LinearSpec
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme
from tests.kernels import sweep_cpu

BF16 = torch.bfloat16
WEIGHTS = {
    "int4 g32": Scheme("int4", "g32", scale_dtype=BF16),
    "int4 g128": Scheme("int4", "g128", scale_dtype=BF16),
    "int4 g128 asymmetric": Scheme("int4", "g128", symmetric=False, scale_dtype=BF16),
    "int4 channel": Scheme("int4", "channel", scale_dtype=BF16),
    "int4 channel asymmetric": Scheme("int4", "channel", symmetric=False, scale_dtype=BF16),
    "int4 g100": Scheme("int4", "g100", scale_dtype=BF16),
    "int4 g32 float32 scales": Scheme("int4", "g32", scale_dtype=torch.float32),
    "int8 channel": Scheme("int8", "channel", scale_dtype=BF16),
    "int8 channel asymmetric": Scheme("int8", "channel", symmetric=False, scale_dtype=BF16),
    "int8 g128": Scheme("int8", "g128", scale_dtype=BF16),
    "int8 tensor": Scheme("int8", "tensor", scale_dtype=BF16),
    "int3 g64": Scheme("int3", "g64", scale_dtype=BF16),
    "fp8 channel": Scheme("fp8", "channel", scale_dtype=BF16),
    "nf4": Scheme("nf4", scale_dtype=BF16),
    "mxfp4": Scheme("mxfp4"),
}
ACTIVATIONS = {
    "int8 token": Scheme("int8", "token"),
    "int8 token asymmetric": Scheme("int8", "token", symmetric=False),
    "int8 tensor": Scheme("int8", "tensor"),
    "int4 token": Scheme("int4", "token"),
    "fp8 token": Scheme("fp8", "token"),
    "mxfp4": Scheme("mxfp4"),
}


def stands_for(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What the codes of an input stand for, in float64. The scales of MXFP4 inputs are those of compressed-tensors."""
    if scheme.format.name != "mxfp4":
        return quantize(x.float(), scheme).dequantize(torch.float64)
    mxfp = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    rows = x.float().reshape(-1, 32)
    absmax = rows.abs().amax(1, keepdim=True)
    scale = torch.where(absmax > 0, mxfp.generate_mx_scales(absmax.clamp(min=1e-30)).int(), 127).to(torch.uint8)
    return scheme.dequantize_rows(scheme.quantize_rows(rows, scale), scale, dtype=torch.float64).reshape(x.shape)


def weight_of(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5, scheme)


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    assert y.isfinite().all()
    return float((y.double() - exact).norm() / exact.norm())


def kernels_for(spec: LinearSpec, *, codes: bool = False) -> list[Kernel]:
    return [k for k in KERNELS.values() if k.unsupported_reason(spec) is None and k.takes_codes is codes]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (192, 512), (128, 2304)], ids=str)
@pytest.mark.parametrize("scheme", WEIGHTS.values(), ids=WEIGHTS)
def test_every_kernel_that_can_run_is_right(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, n, k)
    spec = LinearSpec.of(weight)
    for rows in (1, 3, 40):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = x.double() @ weight.dequantize(torch.float64).t()
        for kernel in kernels_for(spec):
            y = kernel.run(x, kernel.layout.prepack(weight), spec)
            assert y.dtype == dtype and y.shape == (rows, n)
            bound = {torch.float32: 1e-5, BF16: 4e-3, torch.float16: 6e-4}[dtype]
            if kernel in (KERNELS["cpu_int4"], KERNELS["cpu_w8a16"]):
                bound = 4e-3  # they round x to bfloat16
            if kernel is KERNELS["reference"] and dtype != torch.float32:
                bound = 6e-3  # it rounds the weight too
            assert relative_error(y, exact) < bound, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "onednn"), [("default", "SSE41"), ("avx2", ""), ("avx512", "AVX512_CORE")])
def test_every_kernel_is_right_at_every_capability(capability: str, onednn: str) -> None:
    """At the edges of the grid that `make sweep` covers, strided inputs included, in a process that may crash."""
    found = sweep_cpu.run(capability, onednn, in_brief=True)
    if "missing" in found:
        pytest.skip(f"this processor or this build of torch has no {capability}")
    assert not found["wrong"] and sum(found["counts"].values()) > 3000, found["wrong"][:5]


def test_the_grid_has_every_pair() -> None:
    """Of in_features, out_features, rows and dtype every two values meet: the first two in three forms in a row, all
    others in each form."""
    axes = (sweep_cpu.INS, sweep_cpu.OUTS, sweep_cpu.ROWS, sweep_cpu.DTYPES)
    forms = [
        {(k, n, m, d) for k, shapes in sweep_cpu.grid(form).items() for n, rows, dtypes in shapes
         for m in rows for d in dtypes}
        for form in range(3)
    ]  # fmt: skip
    for a, b in itertools.combinations(range(4), 2):
        every = set(itertools.product(axes[a], axes[b]))
        for points in [set().union(*forms)] if (a, b) == (0, 1) else forms:
            assert {(point[a], point[b]) for point in points} == every, (a, b)


known_blocks = pytest.mark.skipif(
    cpu_int4.block_rows() is None, reason="torch packs int4 in another order here, and the kernel refuses"
)


@known_blocks
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int4 g32", "int4 g128 asymmetric", "int4 channel", "int4 channel asymmetric"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_blocks_are_undone_bit_for_bit(name: str, n: int, k: int, seed: int) -> None:
    weight = weight_of(WEIGHTS[name], 64 * n, 128 * k, seed)
    spec = LinearSpec.of(weight)
    back = cpu_int4.unpack(cpu_int4.prepack(weight), spec)
    assert torch.equal(back.data, weight.data) and torch.equal(back.scale, weight.scale)
    assert (back.zero_point is None) == (weight.zero_point is None)
    if weight.zero_point is not None:
        assert torch.equal(back.zero_point, weight.zero_point)


@known_blocks
def test_blocks_are_what_torch_packs() -> None:
    weight = weight_of(WEIGHTS["int4 g32"], 128, 256)
    ours = cpu_int4.prepack(weight)["weight_blocks"].view(128, 128)
    theirs = torch._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("name", ["int8 channel", "int8 channel asymmetric", "int4 g128", "fp8 channel"])
def test_quantized_inputs_give_the_product_of_what_the_codes_stand_for(
    name: str, activations: Scheme, rows: int
) -> None:
    weight = weight_of(WEIGHTS[name], 64, 256)
    x = torch.randn(2, rows, 256) + 0.3
    layer = QuantizedLinear(weight, activations=activations)
    exact = stands_for(x, activations) @ weight.dequantize(torch.float64).t()
    codes = dispatch.select(dispatch.candidates(layer.spec), 2 * rows) is KERNELS["cpu_w8a8_bfloat16"]
    assert relative_error(layer(x), exact) < (4e-3 if codes else 1e-6)


def codes_of(rows: int, k: int, symmetric: bool, seed: int, edge: bool) -> QuantizedTensor:
    """Inputs in codes per token; at the edge all of them are the lowest or the highest."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, k), generator=draw).to(torch.int8)
    if edge:
        codes = torch.where(codes < 0, -128, 127).to(torch.int8)
    zero = torch.randint(-128, 128, (rows, 1), generator=draw).to(torch.int8)
    scheme = Scheme("int8", "token", symmetric=symmetric)
    scale = torch.rand(rows, 1, generator=draw) + 0.1
    return QuantizedTensor(codes, scale, None if symmetric else zero, scheme, codes.shape, torch.float64)


exact_products = pytest.mark.skipif(
    not cpu_int8.products_are_exact(), reason="torch's product of integers saturates here: oneDNN sees no VNNI"
)


@exact_products
@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 300), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_integers_by_integers_are_exact(rows: int, k: int, n: int, symmetric: bool, edge: bool, seed: int) -> None:
    """Σ (q − z)·w in int32 is what int64 gives, for any codes; only the two scales round."""
    x, w = codes_of(rows, k, symmetric, seed, edge), codes_of(n, k, True, seed + 1, edge)
    one = {"weight": w.data, "weight_scale": torch.ones(n, 1)}
    x = dataclasses.replace(x, scale=torch.ones(rows, 1))
    spec = LinearSpec(w.scheme, x.scheme, n, k, torch.float32, torch.device("cpu"))
    zero = 0 if symmetric else x.zero_point.long()
    exact = (x.data.long() - zero) @ w.data.long().t()
    assert torch.equal(cpu_int8.int8_by_int8(x, one, spec).long(), exact.float().long())
    assert int(exact.abs().max()) < 2**31


@exact_products
def test_the_longest_sums_still_fit() -> None:
    k = 2**16
    x = QuantizedTensor(torch.full((1, k), -128, dtype=torch.int8), torch.ones(1, 1),
                        torch.full((1, 1), 127, dtype=torch.int8), Scheme("int8", "token", symmetric=False),
                        torch.Size([1, k]), torch.float64)  # fmt: skip
    packed = {"weight": torch.full((1, k), -128, dtype=torch.int8), "weight_scale": torch.ones(1, 1)}
    spec = LinearSpec(Scheme("int8", "channel"), x.scheme, 1, k, torch.float32, torch.device("cpu"))
    assert cpu_int8.sums_overflow(spec) is None
    assert int(cpu_int8.int8_by_int8(x, packed, spec)) == 255 * 128 * k
    assert "may not fit" in cpu_int8.sums_overflow(dataclasses.replace(spec, k=k + 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_in_bfloat16_lose_only_the_rounding_of_the_output(symmetric: bool) -> None:
    x, w = codes_of(7, 512, symmetric, 0, False), codes_of(64, 512, True, 1, False)
    spec = LinearSpec(w.scheme, x.scheme, 64, 512, torch.float32, torch.device("cpu"))
    y = cpu_int8.codes_in_bfloat16(x, {"weight": w.data, "weight_scale": w.scale}, spec)
    zero = 0 if symmetric else x.zero_point.double()
    exact = (x.data.double() - zero) * x.scale.double() @ (w.data.double() * w.scale.double()).t()
    assert float(((y - exact).abs() / exact.abs().clamp(min=1e-9)).max()) < 2**-8


@pytest.mark.parametrize("scheme", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_dynamic_codes_are_those_of_quantize(scheme: Scheme, dtype: torch.dtype) -> None:
    x = (torch.randn(6, 96) * torch.tensor([1, 0, 3, 1e-3, 200, 1])[:, None]).to(dtype)
    assert torch.equal(activations.rounded(x, scheme), stands_for(x, scheme).to(dtype))
    if scheme.format.bits == 8:
        expected = quantize(x.float(), scheme)
        found = activations.dynamic(x, scheme)
        assert torch.equal(found.codes.view(torch.int8), expected.codes.view(torch.int8))
        assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("scheme", [Scheme("int8", "token", symmetric=False), Scheme("fp8", "token")], ids=str)
def test_a_token_with_nan_spoils_no_other(scheme: Scheme) -> None:
    layer = QuantizedLinear(weight_of(WEIGHTS["int8 channel"], 64, 256), activations=scheme)
    x = torch.randn(3, 256)
    whole = layer(x)
    x[1, 7] = torch.nan
    spoiled = layer(x)
    assert spoiled[1].isnan().all() and torch.equal(spoiled[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", ["int8 channel", "int4 g128"])
def test_a_static_range_is_used_as_it_is(name: str, rows: int) -> None:
    weight = weight_of(WEIGHTS[name], 64, 256)
    scale, zero = torch.tensor([0.01]), torch.tensor([20], dtype=torch.int8)
    layer = QuantizedLinear(weight, None, Scheme("int8", "tensor", symmetric=False), scale, zero)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) * 3  # none of them near a half
    seen = (torch.clamp(torch.round(x.double() / 0.01) + 20, -128, 127) - 20) * float(scale)
    assert relative_error(layer(x), seen @ weight.dequantize(torch.float64).t()) < (1e-6 if rows > 16 else 4e-3)
    assert "input int8 tensor asymmetric static" in repr(layer)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_layer_holds_one_copy_of_its_weight(name: str) -> None:
    layer = QuantizedLinear(weight_of(WEIGHTS[name], 256, 1024))
    plain = sum(t.untyped_storage().nbytes() for t in layer.buffers())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(1, 1024))
    held = sum(t.untyped_storage().nbytes() for t in layer.buffers())
    assert held == plain
    if name in ("int4 g128", "int8 channel"):
        assert 8 * held / (256 * 1024) <= {"int4 g128": 4.3, "int8 channel": 8.3}[name]
    for key, value in layer.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key


def test_few_rows_and_many_rows_agree() -> None:
    layer = QuantizedLinear(weight_of(WEIGHTS["int4 g128"], 128, 256))
    x = torch.randn(64, 256)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    assert relative_error(one_by_one, layer(x).double()) < 4e-3


def test_an_empty_batch_passes_through() -> None:
    assert QuantizedLinear(weight_of(WEIGHTS["int4 g32"], 64, 256))(torch.empty(0, 3, 256)).shape == (0, 3, 64)


@pytest.mark.parametrize("activations", [None, Scheme("int8", "token", symmetric=True)])
def test_rows_beyond_what_a_kernel_counts_are_multiplied_in_parts(activations, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(weight_of(WEIGHTS["int8 channel"], 64, 256), activations=activations)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    whole, seen = layer(x), []
    monkeypatch.setattr(operator, "MOST_ELEMENTS", 16 * 256)

    def noted(kernel: Kernel) -> Kernel:
        def run(x, *rest):
            seen.append(len(x.data))  # of a tensor, or the codes of a quantized one
            return kernel.run(x, *rest)

        return dataclasses.replace(kernel, run=run)

    layer._kernels = tuple(map(noted, layer._kernels))
    tolerance = 4e-3 * whole.abs().max().item()  # the kernel for 16 rows rounds to bfloat16
    torch.testing.assert_close(layer(x), whole, atol=tolerance, rtol=0)
    assert seen == [16, 16, 8] and not layer.takes_codes_of(x)


@pytest.mark.parametrize("name", WEIGHTS)
def test_some_kernel_takes_every_number_of_rows(name: str) -> None:
    kernels = dispatch.candidates(LinearSpec.of(weight_of(WEIGHTS[name], 64, 256)))
    assert {kernel.layout for kernel in kernels} == {kernels[0].layout}
    for rows in (1, 16, 17, 33, 10**6):
        assert dispatch.select(kernels, rows) in kernels


def test_verdicts_speak_of_every_kernel() -> None:
    spec = LinearSpec.of(weight_of(WEIGHTS["int4 g128"], 64, 256))
    found = list(dispatch.verdicts(spec))
    assert [verdict.kernel for verdict in found] == [kernel.name for kernel in KERNELS.values()]
    assert all((verdict.runs is None) != (verdict.reason is None) for verdict in found)
    runs = {verdict.kernel: verdict.runs for verdict in found if verdict.runs}
    packed = {KERNELS["cpu_int4"].name: "1 to 32 rows", KERNELS["cpu_int4_tiled"].name: "33 rows and more"}
    assert runs == (packed if cpu_int4.block_rows() else {KERNELS["cpu_tiled"].name: "any number of rows"})


W8A8 = {"weights": WEIGHTS["int8 channel"], "activations": Scheme("int8", "token")}


@pytest.mark.parametrize(
    ("change", "kernel", "words"),
    [
        ({"n": 72}, KERNELS["cpu_int4"], "multiples of 64; this layer has 72"),
        ({"k": 100}, KERNELS["cpu_int4"], "do not"),
        ({"weights": Scheme("int4", "g128", scale_dtype=torch.float32)}, KERNELS["cpu_int4"], "torch.float32"),
        ({"weights": Scheme("int3", "g128", scale_dtype=BF16)}, KERNELS["cpu_int4"], "these are int3"),
        ({"device": torch.device("cuda")}, KERNELS["cpu_int4"], "lies on cuda"),
        ({"device": torch.device("cuda")}, KERNELS["cpu_tiled"], "lies on cuda"),
        ({"activations": Scheme("int8", "token")}, KERNELS["cpu_int4"], "this recipe quantizes them"),
        ({}, KERNELS["cpu_w8a8"], "leaves activations as they are"),
        ({}, KERNELS["cpu_w8a16"], "these are int4"),
        ({"weights": WEIGHTS["int8 channel"], "k": 40}, KERNELS["cpu_w8a16"], "multiples of 16; this layer has 40"),
        (W8A8 | {"k": 264}, KERNELS["cpu_w8a8_bfloat16"], "multiples of 16; this layer has 264"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(change: dict, kernel: Kernel, words: str) -> None:
    spec = dataclasses.replace(LinearSpec.of(weight_of(WEIGHTS["int4 g128"], 64, 256)), **change)
    assert words in kernel.unsupported_reason(spec)


def test_integer_products_are_refused_where_torch_gets_them_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    spec = dataclasses.replace(LinearSpec.of(weight_of(WEIGHTS["int4 g128"], 64, 256)), **W8A8)
    assert "one input feature" in KERNELS["cpu_w8a8"].unsupported_reason(dataclasses.replace(spec, k=1))
    monkeypatch.setattr(cpu_int8, "products_are_exact", lambda: False)
    assert "saturates" in KERNELS["cpu_w8a8"].unsupported_reason(spec)


GPU = LinearSpec(Scheme("int8", "channel"), Scheme("int8", "token"), 64, 256, BF16, torch.device("cuda"))
FP8 = dataclasses.replace(GPU, weights=Scheme("fp8", "channel"), activations=Scheme("fp8", "token"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launch, "unavailable", lambda device: None if device.type == "cuda" else "no GPU")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("spec", "kernel"),
    [
        (GPU, KERNELS["cublas_int8"]),
        (dataclasses.replace(GPU, activations=Scheme("int8", "tensor", symmetric=False)), KERNELS["cublas_int8"]),
        (FP8, KERNELS["cublas_fp8"]),
        (
            dataclasses.replace(FP8, weights=Scheme("fp8", "tensor"), activations=Scheme("fp8", "tensor")),
            KERNELS["cublas_fp8"],
        ),
    ],
)
def test_on_a_gpu_8_bits_go_to_cublas(spec: LinearSpec, kernel: Kernel) -> None:
    kernels = dispatch.candidates(spec)
    assert kernel in kernels and dispatch.select(kernels, 10**6) is kernel


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("spec", "kernel", "change", "words"),
    [
        (GPU, KERNELS["cublas_int8"], {"device": torch.device("cpu")}, "the layer lies on cpu"),
        (GPU, KERNELS["cublas_int8"], {"activations": None}, "leaves activations as they are"),
        (
            GPU,
            KERNELS["cublas_int8"],
            {"activations": Scheme("int4", "token")},
            "takes int8 activations; these are int4",
        ),
        (GPU, KERNELS["cublas_int8"], {"activations": Scheme("int8", "g32")}, "one per g32"),
        (GPU, KERNELS["cublas_int8"], {"weights": Scheme("int8", "g128")}, "one per g128"),
        (
            GPU,
            KERNELS["cublas_int8"],
            {"weights": Scheme("int8", "channel", symmetric=False)},
            "symmetric int8 weights",
        ),
        (GPU, KERNELS["cublas_int8"], {"n": 60}, "multiples of 8; this layer has 256 in and 60 out"),
        (GPU, KERNELS["cublas_int8"], {"k": 2**17}, "may not fit in 32 bits"),
        (FP8, KERNELS["cublas_fp8"], {"device": torch.device("cpu")}, "the layer lies on cpu"),
        (FP8, KERNELS["cublas_fp8"], {"activations": None}, "these are fp8_e4m3 and not quantized"),
        (FP8, KERNELS["cublas_fp8"], {"weights": Scheme("int8", "channel")}, "these are int8 and fp8_e4m3"),
        (FP8, KERNELS["cublas_fp8"], {"weights": Scheme("fp8", "g64")}, "one per g64"),
        (FP8, KERNELS["cublas_fp8"], {"activations": Scheme("fp8", "g64")}, "one per g64"),
        (FP8, KERNELS["cublas_fp8"], {"n": 72}, "multiples of 16"),
    ],
)
def test_cublas_refuses_what_torch_would(spec: LinearSpec, kernel: Kernel, change: dict, words: str) -> None:
    assert words in kernel.unsupported_reason(dataclasses.replace(spec, **change))


def test_cublas_needs_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in KERNELS["cublas_int8"].unsupported_reason(GPU) and "finds no GPU" in KERNELS[
        "cublas_fp8"
    ].unsupported_reason(FP8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert (
        "this GPU has 8.0" in KERNELS["cublas_fp8"].unsupported_reason(FP8)
        and KERNELS["cublas_int8"].unsupported_reason(GPU) is None
    )


@exact_products
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_rows_are_filled_up_for_cublas(symmetric: bool) -> None:
    """The arithmetic of the GPU's path, run on the processor."""
    x, w = codes_of(3, 64, symmetric, 0, False), codes_of(16, 64, True, 1, False)
    packed = {"weight": w.data, "weight_scale": w.scale}
    spec = dataclasses.replace(GPU, n=16, k=64)
    got, expected = (f(x, packed, spec) for f in (w8a8.cublas_int8, cpu_int8.int8_by_int8))
    assert got.shape == (3, 16) and torch.equal(got, expected)
