"""`quantize` and `QuantizedTensor`: error bounds, odd inputs, exact bytes, block formats against their sources."""

from __future__ import annotations

import copy
import io
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor import quantized_tensor as tensor_module
from canopyq.tensor.formats import FORMATS, get_format
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme

INTS = [f"int{bits}" for bits in range(2, 9)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODES = {"symmetric": {}, "restricted": {"restricted": True}, "asymmetric": {"symmetric": False}}
SCALED = [name for name, fmt in FORMATS.items() if fmt.bits <= 8]


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(q: QuantizedTensor) -> Tensor:
    """The step of every value, in the tensor's shape, float64."""
    granularity, shape = q.scheme.granularity, q.shape or torch.Size([1])
    rows = granularity.rows(torch.zeros(shape))
    steps = q.float_scale().double().reshape(-1, 1).expand(rows.shape)
    return granularity.from_rows(steps, shape).reshape(q.shape)


def assert_within_half_a_step(x: Tensor, q: QuantizedTensor, slack: float = 1e-4) -> None:
    error = (q.dequantize(torch.float64) - x.double()).abs()
    bound = spread(q) * (0.5 + slack)
    assert (error <= bound).all(), f"worst excess {(error - bound).max().item():.3g}"


def parts_of(q: QuantizedTensor) -> list[Tensor]:
    return list(q.parts.values())


# The bound ------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, str, Granularity, dict]:
    shape = draw(SHAPES)
    # One magnitude for all, or mixed magnitudes from 1e-30 to 1e30.
    width = draw(st.sampled_from([1.0, 2.0**-100, 2.0**100]))
    elements = st.floats(-width, width, width=32) | st.floats(-(2.0**-40), 2.0**-40, width=32)
    x = torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))
    kinds = ["tensor", "token", "group"] + (["channel"] if len(shape) > 1 else [])
    kind = draw(st.sampled_from(kinds))
    granularity = Granularity(
        kind,
        draw(st.integers(1, shape[-1])) if kind == "group" else None,
        draw(st.integers(-len(shape), len(shape) - 1)) if kind == "channel" else 0,
    )
    return x, draw(st.sampled_from(INTS)), granularity, MODES[draw(st.sampled_from(list(MODES)))]


@given(cases())
def test_error_is_at_most_half_a_step(case: tuple[Tensor, str, Granularity, dict]) -> None:
    x, name, granularity, mode = case
    before = x.clone()
    q = quantize(x, name, granularity, **mode)
    assert torch.equal(x, before)
    fmt = get_format(name)
    assert q.codes.shape == x.shape and q.codes.dtype == torch.int8
    assert q.codes.min() >= fmt.qmin + mode.get("restricted", False) and q.codes.max() <= fmt.qmax
    assert q.scale.shape == granularity.scale_shape(x.shape)
    assert (q.zero_point is None) == mode.get("symmetric", True)
    assert q.dequantize().dtype == x.dtype and q.dequantize().shape == x.shape
    assert_within_half_a_step(x, q)
    assert (q.dequantize()[x == 0] == 0).all()


@pytest.mark.parametrize("mode", ["restricted", "asymmetric"])
@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g16"])
def test_a_second_quantization_changes_nothing(name: str, granularity: str, mode: str) -> None:
    # Both grids put a code on the very end of the range. The full symmetric one does not: ±absmax lie at ±7.5 steps.
    once = quantize(sample(8, 64), name, granularity, **MODES[mode])
    twice = quantize(once.dequantize(), name, granularity, **MODES[mode])
    assert torch.equal(once.codes, twice.codes)
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4", "mxfp4", "nvfp4", "fp16", "bf16", "fp32"])
def test_a_second_quantization_changes_nothing_in_float_grids(name: str) -> None:
    once = quantize(sample(8, 64), name)
    twice = quantize(once.dequantize(), name)
    assert torch.equal(once.codes.float(), twice.codes.float())
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCALED)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 2.0**-60, 2.0**60]))
def test_float_grids_choose_the_nearest_value(name: str, seed: int, magnitude: float) -> None:
    x = sample(4, 64, seed=seed) * magnitude
    q = quantize(x, name, None if name in ("nf4", "mxfp4", "nvfp4") else "channel")
    grid = q.scheme.format.values()
    scaled = x.double() / spread(q)
    distance = (scaled.unsqueeze(-1) - grid).abs().min(dim=-1).values
    reached = (q.dequantize(torch.float64) / spread(q) - scaled).abs()
    torch.testing.assert_close(reached, distance, rtol=0, atol=1e-5 * q.scheme.format.largest)


# Inputs of every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_dtype_keeps_its_scale_and_comes_back(name: str, dtype: torch.dtype) -> None:
    x = sample(6, 64).to(dtype)
    q = quantize(x, name)
    back = q.dequantize()
    assert back.dtype == dtype and back.shape == x.shape
    # The same scale dtype on the wide copy gives the same codes: nothing is computed in a narrow dtype.
    wide = quantize(x.double(), q.scheme)
    assert torch.equal(q.codes.float(), wide.codes.float())
    if isinstance(q.scheme.scale_dtype, torch.dtype):
        assert q.scale.dtype == (dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32)


@pytest.mark.parametrize("name", [*INTS, "fp8", "nf4", "fp4", "bf16"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (2, 3, 5), (2, 1, 3, 4), (1, 1, 1, 1, 7)], ids=str)
def test_any_number_of_dimensions(name: str, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.75) if math.prod(shape) == 1 else sample(*shape)
    q = quantize(x, name, None if name == "bf16" else "tensor")
    assert q.shape == x.shape and q.codes.shape == x.shape and q.dequantize().shape == x.shape
    assert repr(q).startswith(f"QuantizedTensor({tuple(shape)}, ")
    if name.startswith("int"):
        assert_within_half_a_step(x, q)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "g8", Granularity("channel", axis=-1)], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.T, id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="strided"),
        pytest.param(lambda x: x[1:, 3:], id="sliced"),
        pytest.param(lambda x: x[:1].expand(5, 64), id="expanded"),
    ],
)
def test_views_quantize_like_copies(view: object, granularity: object) -> None:
    x = view(sample(16, 64))  # type: ignore[operator]
    q, copied = quantize(x, "int4", granularity), quantize(x.clone().contiguous(), "int4", granularity)
    assert torch.equal(q.codes, copied.codes) and torch.equal(q.scale, copied.scale)
    assert q.nbytes == copied.nbytes


def test_channel_axis_shares_scales_along_it() -> None:
    x = sample(2, 3, 5) * torch.tensor([1.0, 10, 100, 1000, 10000])
    q = quantize(x, "int8", Granularity("channel", axis=-1))
    torch.testing.assert_close(q.scale, x.abs().amax(dim=(0, 1), keepdim=True) / 127.5)
    assert_within_half_a_step(x, q)


def test_gradients_stay_out() -> None:
    x = torch.nn.Parameter(sample(4, 64))
    q = quantize(x, "int4", "g32")
    assert not q.dequantize().requires_grad and x.requires_grad and x.grad is None


@pytest.mark.parametrize("name", FORMATS)
def test_result_shares_no_memory_with_the_input_or_its_own_output(name: str) -> None:
    fmt = get_format(name)
    x = sample(4, 64).to(getattr(fmt, "dtype", None) if fmt.bits >= 16 else torch.float32)
    before, q = x.clone(), quantize(x, name)
    held = [part.clone() for part in parts_of(q)]
    q.dequantize().zero_()
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(held, parts_of(q), strict=True))
    for part in parts_of(q):
        part.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([0.0, 0.0, 0.0, 0.0], id="zeros"),
        pytest.param([-0.0, 0.0, -0.0, 0.0], id="minus zeros"),
        pytest.param([2.5, 2.5, 2.5, 2.5], id="constant"),
        pytest.param([-2.5, -2.5, -2.5, -2.5], id="negative constant"),
        pytest.param([3.0, 3.5, 5.0, 4.0], id="all positive"),
        pytest.param([-3.0, -3.5, -5.0, -4.0], id="all negative"),
        pytest.param([1e38, -1e38, 5e37, 0.0], id="huge"),
        pytest.param([3.4028235e38, -3.4028235e38, 0.0, 1.0], id="the ends of float32"),
        pytest.param([1e-40, -1e-40, 0.0, 5e-41], id="subnormal"),
        pytest.param([1e-45, 0.0, 0.0, 0.0], id="the smallest of all"),
        pytest.param([1e30, 1e-30, -1.0, 0.0], id="mixed magnitudes"),
        pytest.param([0.0, 0.0, 0.0, 7.0], id="one value"),
    ],
)
def test_odd_rows_keep_the_bound_and_exact_zeros(row: list[float], name: str, mode: str) -> None:
    x = torch.tensor([row, [1.0, -1.0, 0.5, 0.25]])
    for granularity in ("tensor", "channel", "g2", "g3"):
        q = quantize(x, name, granularity, **MODES[mode])
        restored = q.dequantize()
        assert restored.isfinite().all()
        assert (restored[x == 0] == 0).all()
        assert_within_half_a_step(x, q)


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "fp4", "nf4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 3.4e38], ids=str)
def test_float_grids_take_any_magnitude(name: str, magnitude: float) -> None:
    x = sample(4, 64).clamp(-1, 1) * magnitude
    restored = quantize(x, name).dequantize()
    assert restored.isfinite().all()
    error = (restored.double() - x.double()).abs().max()
    assert error <= max(0.26 * magnitude, 1e-38)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_float16_weights_of_small_magnitude_keep_their_precision(name: str) -> None:
    x = sample(8, 128).half() * 1e-3  # scales lie among float16's subnormals
    error = (quantize(x, name, "channel").dequantize() - x).float().square().mean().sqrt()
    wide = (quantize(x.float(), name, "channel").dequantize() - x.float()).square().mean().sqrt()
    assert error < 1.1 * wide


def test_float16_extremes_survive() -> None:
    x = torch.tensor([[-65504.0, 65504.0, 1.0, 0.0]], dtype=torch.float16)
    for mode in MODES.values():
        assert quantize(x, "int4", **mode).dequantize().isfinite().all()


# Inputs that are refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite_is_counted_over_the_whole_tensor(
    bad: float, symmetric: bool, observer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_module, "CHUNK", 2048)
    x = sample(9, 1024)
    x[8, 5] = x[2, 1] = bad
    counted = "2 NaN and 0 infinite" if math.isnan(bad) else "0 NaN and 2 infinite"
    with pytest.raises(CanopyError, match=rf"shape \(9, 1024\) holds {counted} values.*torch.nan_to_num"):
        quantize(x, "int8", "channel", symmetric=symmetric, observer=observer)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_not_finite_is_refused_by_every_format(name: str, bad: float) -> None:
    x = sample(4, 64)
    x[3, 63] = bad
    with pytest.raises(CanopyError, match=r"holds . NaN and . infinite values"):
        quantize(x, name)


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_refused() -> None:
    with pytest.raises(CanopyError, match="to_dense"):
        quantize(torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "int8")


@pytest.mark.parametrize(
    ("shape", "name", "granularity", "message"),
    [
        ((4, 64), "int4", "g128", "group size 128 does not fit.*use g64"),
        ((4, 32), "nf4", None, "group size 64 does not fit.*use g32"),
        ((4, 16), "mxfp4", None, "mxfp4 takes blocks of 32 values.*has 16; use int4 or nf4 with g16"),
        ((4, 8), "nvfp4", None, "nvfp4 takes blocks of 16 values.*has 8; use int4 or nf4 with g8"),
        ((64,), "int4", "channel", "at least 2 dimensions.*use 'tensor'"),
        ((), "int4", "channel", "at least 2 dimensions"),
        ((), "int4", "g2", "group size 2 does not fit"),
        ((4, 3, 8), "int4", Granularity("channel", axis=3), "axis 3 does not exist"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], name: str, granularity: object, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        quantize(torch.ones(shape), name, granularity)  # type: ignore[arg-type]


@pytest.mark.parametrize("observer", ["percentile", "entropy"])
def test_ragged_groups_need_an_observer_that_padding_does_not_mislead(observer: str) -> None:
    with pytest.raises(CanopyError, match="need whole groups.*use observer='minmax' or 'mse'"):
        quantize(sample(2, 700), "int8", "g600", observer=observer)
    assert_within_half_a_step(sample(2, 700), quantize(sample(2, 700), "int8", "g600"))


@pytest.mark.parametrize("name", SCALED)
def test_values_beyond_float32_are_refused(name: str) -> None:
    with pytest.raises(CanopyError, match="reaches 1e.300, beyond float32; divide it"):
        quantize(torch.full((2, 64), 1e300, dtype=torch.float64), name)


def test_a_plain_cast_that_overflows_is_refused() -> None:
    with pytest.raises(CanopyError, match=r"fp16 ends at 65504 and the tensor reaches 1e\+06; use bf16 or fp32"):
        quantize(torch.full((2, 2), 1e6), "fp16")


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(CanopyError, match="does not fit in torch.float16; use scale_dtype=torch.float32"):
        quantize(torch.full((2, 2), 1e7), "int4", scale_dtype=torch.float16)


@pytest.mark.parametrize(
    "extra",
    [{"granularity": "g32"}, {"symmetric": False}, {"restricted": True}, {"observer": "mse"},
     {"scale_dtype": torch.float16}],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_a_scheme_and_further_arguments_contradict(extra: dict) -> None:
    with pytest.raises(CanopyError, match="the scheme 'int4 tensor symmetric' decides everything"):
        quantize(sample(4, 64), Scheme("int4"), **extra)


def test_a_plain_cast_has_no_step() -> None:
    with pytest.raises(CanopyError, match="bf16 is a plain cast and has no scale"):
        quantize(sample(4, 8), "bf16").float_scale()


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("shape", [(13, 96), (5, 3, 96), (96,), (1, 96)], ids=str)
@pytest.mark.parametrize(
    "granularity", ["tensor", "token", "g32", "g40", "channel", Granularity("channel", axis=-1)], ids=str
)
@pytest.mark.parametrize("name", ["int3", "int4", "int8", "fp8"])
def test_chunks_change_nothing(
    name: str, granularity: object, shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(shape) == 1 and str(granularity).startswith("channel"):
        granularity = "g96"  # a vector has no channels
    x = sample(*shape)
    symmetric = name == "fp8"
    whole = quantize(x, name, granularity, symmetric=symmetric)  # type: ignore[arg-type]
    monkeypatch.setattr(tensor_module, "CHUNK", chunk)
    chunked = quantize(x, name, granularity, symmetric=symmetric)  # type: ignore[arg-type]
    for a, b in zip(parts_of(whole), parts_of(chunked), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nf4"])
def test_chunks_change_nothing_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(13, 96) * torch.logspace(-3, 3, 13).unsqueeze(1)
    whole = quantize(x, name)
    monkeypatch.setattr(tensor_module, "CHUNK", 200)
    for a, b in zip(parts_of(whole), parts_of(quantize(x, name)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "granularity", "options", "expected"),
    [
        ("int4", "g128", {"scale_dtype": torch.bfloat16}, 64 * 256 // 2 + 64 * 2 * 2),
        ("int4", "g128", {}, 64 * 256 // 2 + 64 * 2 * 4),
        ("int4", "g128", {"symmetric": False, "scale_dtype": torch.float16}, 64 * 256 // 2 + 64 * 2 * (2 + 1)),
        ("int4", "tensor", {}, 64 * 256 // 2 + 4),
        ("int8", "channel", {}, 64 * 256 + 64 * 4),
        ("int3", "channel", {}, 64 * 256 * 3 // 8 + 64 * 4),
        ("int2", "g32", {"scale_dtype": torch.bfloat16}, 64 * 256 // 4 + 64 * 8 * 2),
        ("fp8", "channel", {}, 64 * 256 + 64 * 4),
        ("nf4", None, {"scale_dtype": torch.bfloat16}, 64 * 256 // 2 + 64 * 4 * 2),
        ("mxfp4", None, {}, 64 * 256 // 2 + 64 * 8),
        ("nvfp4", None, {}, 64 * 256 // 2 + 64 * 16 + 4),
        ("bf16", None, {}, 64 * 256 * 2),
        ("fp32", None, {}, 64 * 256 * 4),
    ],
    ids=str,
)
def test_bytes_are_exact(name: str, granularity: str | None, options: dict, expected: int) -> None:
    q = quantize(sample(64, 256), name, granularity, **options)
    assert q.nbytes == expected == sum(part.nbytes for part in parts_of(q))
    assert q.bits_per_value == 8 * expected / (64 * 256)


def test_int4_in_groups_of_128_takes_4_125_bits() -> None:
    assert quantize(sample(64, 256), "int4", "g128", scale_dtype=torch.bfloat16).bits_per_value == 4.125


@pytest.mark.parametrize("name", ["int4", "int3", "nf4"])
def test_bytes_stay_exact_when_rows_are_ragged_or_views(name: str) -> None:
    q = quantize(sample(10, 200)[:, 50:151].T, name, "tensor")
    bits = get_format(name).bits
    assert q.nbytes == 101 * math.ceil(10 * bits / 32) * 4 + 4


# QuantizedTensor ------------------------------------------------------------------------------------------------------


def test_plain_casts_equal_torch() -> None:
    x = sample(4, 8)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        q = quantize(x, name)
        assert q.data.dtype == dtype and q.scale is None and list(q.parts) == ["data"]
        assert torch.equal(q.dequantize(), x.to(dtype).float())


def test_fp8_codes_equal_a_torch_cast() -> None:
    x = sample(16, 64)
    q = quantize(x, "fp8", "channel")
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    assert torch.equal(q.data.float(), (x / scale).to(torch.float8_e4m3fn).float())


def test_moves_copies_and_files_keep_everything() -> None:
    q, file = quantize(sample(4, 64), "nvfp4"), io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (q.to("cpu"), copy.deepcopy(q), torch.load(file, weights_only=False)):
        assert torch.equal(other.dequantize(), q.dequantize()) and other.scheme == q.scheme


def test_two_quantized_tensors_compare_by_identity() -> None:
    q = quantize(sample(4, 8), "int4")
    assert q == q and q != quantize(sample(4, 8), "int4") and len({q, q}) == 1


def test_a_scheme_may_be_given_whole() -> None:
    x = sample(4, 64)
    whole = quantize(x, Scheme("int4", "g32", symmetric=False))
    spelt = quantize(x, "int4", "g32", symmetric=False)
    assert torch.equal(whole.codes, spelt.codes) and whole.scheme == spelt.scheme


# MXFP4 and NVFP4 ------------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def slow_e2m1(value: float) -> float:
    """Nearest element, ties to the even mantissa, saturating: OCP Microscaling 1.0, section 5.3.3 and table 5."""
    magnitude = min(abs(value), 6.0)
    best = min(range(8), key=lambda code: (abs(E2M1[code] - magnitude), code % 2))
    return math.copysign(E2M1[best], value)


def slow_mxfp4(block: list[float]) -> tuple[int, list[float]]:
    """Section 6.3: the shared exponent is floor(log2(absmax)) − emax, with emax = 2 for E2M1; E8M0 holds −127…127."""
    absmax = max(abs(v) for v in block)
    exponent = 0 if absmax == 0 else max(-127, min(127, math.frexp(absmax)[1] - 1 - 2))
    return exponent, [slow_e2m1(v / 2.0**exponent) * 2.0**exponent for v in block]


@pytest.mark.parametrize("magnitude", [1e-39, 1e-30, 1e-3, 1.0, 7.5, 1e30, 3e38], ids=str)
def test_mxfp4_equals_a_slow_reading_of_the_specification(magnitude: float) -> None:
    x = (sample(8, 128).clamp(-1, 1) * magnitude).float()
    x[0, :32] = 0
    q = quantize(x, "mxfp4")
    assert q.scale.dtype == torch.uint8 and q.scale.shape == (8, 4)
    restored = q.dequantize(torch.float64)
    for (r, b), exponent in np.ndenumerate(q.scale.numpy()):
        block = slice(32 * b, 32 * b + 32)
        expected_exponent, expected = slow_mxfp4(x[r, block].double().tolist())
        assert int(exponent) - 127 == expected_exponent
        assert restored[r, block].tolist() == expected


def test_mxfp4_scales_equal_compressed_tensors_below_its_rounding_up() -> None:
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    # compressed-tensors goes one power of two up from 1.75 · 2^k, where the specification stays and saturates.
    absmax = torch.cat([torch.tensor([1.0, 1.2, 1.5, 1.7499]) * 2.0**k for k in range(-20, 20)])
    x = absmax.unsqueeze(1).expand(-1, 32)
    assert torch.equal(quantize(x, "mxfp4").scale.flatten().float(), generate_mx_scales(absmax))


def test_fp4_elements_equal_compressed_tensors() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    x = sample(16, 64) * 3
    fmt = get_format("fp4")
    assert torch.equal(fmt.round(x), cast_to_fp4(x.clone()))
    q = quantize(x, "mxfp4")
    as_bytes = q.data.view(torch.uint8)  # both put the first element into the low nibble
    assert torch.equal(fmt.decode(q.codes), unpack_fp4_from_uint8(as_bytes, 16, 64, torch.float32))


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1.0, 1e4, 1e30], ids=str)
def test_nvfp4_equals_compressed_tensors(magnitude: float) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    x = sample(8, 64) * torch.logspace(0, 2, 8).unsqueeze(1) * magnitude
    q = quantize(x, "nvfp4")
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    global_scale = generate_gparam(x.amin(), x.amax())
    assert torch.equal(q.global_scale, global_scale)
    blocks = x.reshape(8, 4, 16)
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=global_scale)
    assert q.scale.dtype == torch.float8_e4m3fn
    assert torch.equal(q.scale.float(), scale.float())
    theirs = fake_quantize(x, scale, zero_point, args, global_scale=global_scale)
    assert torch.equal(q.dequantize(), theirs)


def test_nvfp4_takes_empty_blocks_and_far_apart_ones() -> None:
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 16] = 1e6, 1.0
    restored = quantize(x, "nvfp4").dequantize()
    assert restored[0, 0].item() == pytest.approx(1e6, rel=1e-6)
    assert (restored[2] == 0).all() and restored.isfinite().all()
    assert (quantize(torch.zeros(2, 32), "nvfp4").dequantize() == 0).all()


# compressed-tensors' integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_groups_equal_compressed_tensors(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    x = sample(16, 256).to(dtype)
    q = quantize(x, f"int{bits}", "g128", symmetric=symmetric)
    blocks = x.reshape(16, 2, 128).float()
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=128)
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    torch.testing.assert_close(q.scale.float(), scale.to(dtype).float(), rtol=1e-6, atol=0)
    if not symmetric and dtype == torch.float32:
        assert torch.equal(q.zero_point, zero_point.to(torch.int8))
