"""One weight on disk: the tensors of compressed-tensors bit by bit, and what is refused on the way back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from canopyq.checkpoint.layout import (
    BLOCKS,
    FLOAT,
    INT,
    NVFP4,
    PACKED,
    check,
    disk_format,
    expected,
    from_disk,
    to_disk,
)
from canopyq.errors import CanopyError
from canopyq.tensor.packing import pack
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme


def weight(n: int = 24, k: int = 64, seed: int = 0) -> Tensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return (x + 0.3 * torch.arange(n)[:, None] / n).to(torch.bfloat16)  # rows that are not centred on zero


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = [(a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point), (a.global_scale, b.global_scale)]
    return all(x is y if x is None or y is None else identical(x, y) for x, y in pairs)


def identical(x: Tensor, y: Tensor) -> bool:
    return (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(x.double(), y.double())


SCHEMES = [
    Scheme("int4", "g32"), Scheme("int4", "g32", False), Scheme("int4", "channel"), Scheme("int4", "channel", False),
    Scheme("int4", "tensor"), Scheme("int4", "tensor", False), Scheme("int8", "channel"), Scheme("int8", "g16", False),
    Scheme("int2", "g32"), Scheme("int2", "g32", False), Scheme("fp8_e4m3", "channel"), Scheme("fp8_e4m3", "tensor"),
    Scheme("nvfp4"), Scheme("mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_there_and_back(scheme: Scheme) -> None:
    q = quantize(weight(), scheme)
    tensors = to_disk(q, torch.bfloat16)
    back = from_disk(tensors, scheme, (24, 64), torch.bfloat16)
    assert same(q, back) and torch.equal(q.dequantize(), back.dequantize())
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    check(found, scheme, (24, 64), disk_format(scheme))
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("scheme", [Scheme("int8", "channel"), Scheme("int8", "tensor", False)], ids=str)
def test_eight_bits_that_meet_eight_bit_inputs_lie_unpacked(scheme: Scheme) -> None:
    assert disk_format(scheme, Scheme("int8", "token")) == INT and disk_format(scheme) == PACKED
    q = quantize(weight(), scheme)
    tensors = to_disk(q, format=INT)
    assert tensors["weight"].dtype == torch.int8 and torch.equal(tensors["weight"], q.codes)
    assert same(q, from_disk(tensors, scheme, (24, 64), torch.bfloat16))


@given(n=st.integers(1, 20), groups=st.integers(1, 3), size=st.integers(1, 20), bits=st.sampled_from([2, 4, 8]),
       symmetric=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_odd_shapes_there_and_back(n: int, groups: int, size: int, bits: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(f"int{bits}", f"g{size}", symmetric)
    k = groups * size
    q = quantize(weight(n, k, seed), scheme)
    tensors = to_disk(q)
    assert tensors["weight_packed"].shape == (n, math.ceil(k * bits / 32))
    assert tensors["weight_shape"].tolist() == [n, k]
    if not symmetric:
        assert tensors["weight_zero_point"].shape == (math.ceil(n * bits / 32), groups)
    assert same(q, from_disk(tensors, scheme, (n, k), torch.bfloat16))


# Beside compressed-tensors --------------------------------------------------------------------------------------------


def oracle(q: QuantizedTensor, format: str):
    """The library's compressor for such a weight, and the library's scheme."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    granularity = q.scheme.granularity
    arguments = QuantizationArgs(
        num_bits=q.scheme.format.bits, type="float" if format in (FLOAT, *BLOCKS.values()) else "int",
        symmetric=q.scheme.symmetric, strategy="tensor_group" if format == NVFP4 else granularity.kind,
        group_size=granularity.group_size, scale_dtype=q.scheme.format.scale_dtype,
    )  # fmt: skip
    return BaseCompressor.get_value_from_registry(format), QuantizationScheme(targets=["Linear"], weights=arguments)


def compressed(q: QuantizedTensor, format: str) -> dict[str, Tensor]:
    """What the compressed-tensors library writes for the same weight, scales and zero points."""
    compressor, scheme = oracle(q, format)
    # What the codes stand for, and not what they came from: it rounds halves after the zero point is added.
    state = {"weight": q.dequantize(torch.float32), "weight_scale": q.scale}
    if q.zero_point is not None:
        state["weight_zero_point"] = q.zero_point
    if format in BLOCKS.values():  # it turns scales into bytes itself
        state["weight_scale"] = q.scale.float() if format == NVFP4 else q.float_scale()
    if q.global_scale is not None:
        state["weight_global_scale"] = q.global_scale
    return compressor.compress(state, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_tensors_are_those_of_compressed_tensors(scheme: Scheme) -> None:
    q = quantize(weight(), scheme)
    ours, theirs = to_disk(q), compressed(q, disk_format(scheme))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.dtype == torch.uint8 and name == "weight_packed":
            tensor, ours[name] = nonnegative_zeros(tensor), nonnegative_zeros(ours[name])
        assert identical(ours[name], tensor), name


def nonnegative_zeros(packed: Tensor) -> Tensor:
    """FP4 codes (two a byte) with +0 for −0: the library keeps the sign of a zero on some devices only."""
    halves = torch.stack([packed & 15, packed >> 4])
    return torch.where(halves == 8, 0, halves)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("name", BLOCKS)
def test_compressed_tensors_reads_the_same_weights_bit_by_bit(name: str, magnitude: float) -> None:
    q = quantize(weight(seed=1).float() * magnitude, Scheme(name))
    compressor, scheme = oracle(q, BLOCKS[name])
    theirs = compressor.decompress(to_disk(q), scheme)["weight"]
    assert theirs.dtype == torch.bfloat16 and torch.equal(q.dequantize(torch.bfloat16), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_is_that_of_compressed_tensors(symmetric: bool) -> None:
    q = quantize(weight(), Scheme("int8", "channel", symmetric))
    ours, theirs = to_disk(q, format=INT), compressed(q, INT)
    assert ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in ours)


def test_worked_values() -> None:
    codes = torch.tensor([[-8.0, -7, -1, 0, 1, 2, 6, 7]])
    q = quantize(codes, Scheme("int4", "channel"))
    q = QuantizedTensor(pack(codes.to(torch.int8), 4), q.scale, None, q.scheme, q.shape, q.dtype)
    words = to_disk(q)["weight_packed"]
    assert words.shape == (1, 1) and words.item() & 0xFFFFFFFF == 0xFEA98710
    zero_points = torch.tensor([[-8, 0], [-7, 1], [-6, 2], [-5, 3], [-4, 4], [-3, 5], [-2, 6], [-1, 7]]).to(torch.int8)
    q = quantize(torch.randn(8, 16), Scheme("int4", "g8", False))
    q = QuantizedTensor(q.data, q.scale, zero_points, q.scheme, q.shape, q.dtype)
    packed = to_disk(q)["weight_zero_point"]
    assert packed.shape == (1, 2) and [w & 0xFFFFFFFF for w in packed[0].tolist()] == [0x76543210, 0xFEDCBA98]


# Scales ---------------------------------------------------------------------------------------------------------------


def test_a_scale_is_never_rounded_a_second_time() -> None:
    q = quantize(weight().float(), Scheme("int4", "g32"))
    assert q.scale.dtype == torch.float32
    kept = to_disk(q, torch.bfloat16)["weight_scale"]
    assert kept.dtype == torch.float32 and torch.equal(kept, q.scale)
    q = quantize(weight(), Scheme("int4", "g32", scale_dtype=torch.bfloat16))
    assert to_disk(q, torch.float32)["weight_scale"].dtype == torch.bfloat16  # wider holds no more
    half = quantize(torch.ones(2, 32), Scheme("int4", "g32"))  # 1/7.5 is no bfloat16, 2^-k would be
    assert to_disk(half, torch.bfloat16)["weight_scale"].dtype == torch.float32


# What the format cannot hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        (Scheme("bf16"), "plain cast"),
        (Scheme("nf4"), "no nf4"),
        (Scheme("fp8_e5m2", "channel"), "no E5M2"),
        (Scheme("int4", "token"), "no weights with a scale per token"),
    ],
    ids=str,
)
def test_schemes_that_no_file_holds(scheme: Scheme, part: str) -> None:
    with pytest.raises(CanopyError, match=part):
        disk_format(scheme)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_whose_packing_the_shape_does_not_tell(bits: int) -> None:
    """compressed-tensors before 0.18 put 32 // bits codes into a word, and now lets them go over from word to word."""
    told = [k for k in range(1, 257) if -(-k * bits // 32) != -(-k // (32 // bits))]
    scheme = Scheme(f"int{bits}", "channel")
    for k in range(1, 257):
        if k in told:
            assert to_disk(quantize(weight(2, k), scheme))["weight_packed"].shape == (2, -(-k * bits // 32))
            continue
        assert k < 160  # and so no layer of a model
        with pytest.raises(CanopyError, match=f"{k} codes of {bits} bits"):
            to_disk(quantize(weight(2, k), scheme))
        with pytest.raises(CanopyError, match=f"{k} codes of {bits} bits"):
            expected(scheme, (2, k), PACKED)


def test_formats_that_do_not_fit_the_weight() -> None:
    with pytest.raises(CanopyError, match="no int8 weights with fp8_e4m3 activations"):
        disk_format(Scheme("int8", "channel"), Scheme("fp8", "token"))
    with pytest.raises(CanopyError, match="nvfp4 weights have nvfp4 inputs or none quantized, not mxfp4"):
        disk_format(Scheme("nvfp4"), Scheme("mxfp4"))
    for format in (INT, FLOAT):
        with pytest.raises(CanopyError, match=f"stored as {PACKED}, not as {format}"):
            to_disk(quantize(weight(), Scheme("int4", "g32")), format=format)
    with pytest.raises(CanopyError, match="out_features, in_features"):
        to_disk(quantize(torch.randn(2, 3, 32), Scheme("int4", "g32")))


def read(tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """As `load` does: first the headers, then the tensors."""
    check({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, scheme, (24, 64), disk_format(scheme))
    return from_disk(tensors, scheme, (24, 64), torch.bfloat16)


def damaged(symmetric: bool = True, **changes: Tensor | None) -> dict[str, Tensor]:
    tensors = to_disk(quantize(weight(), Scheme("int4", "g32", symmetric)), torch.bfloat16) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def scales(value: float) -> Tensor:
    out = torch.ones(24, 2, dtype=torch.bfloat16)
    out[5, 1] = value
    return out


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"weight_packed": torch.zeros(24, 7, dtype=torch.int32)}, r"by the config it has to be int32 \(24, 8\)"),
        ({"weight_packed": torch.zeros(24, 8, dtype=torch.int64)}, "weight_packed is int64"),
        ({"weight_shape": None}, "weight_shape is missing"),
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_scale": torch.ones(24, 4)}, r"has to be .* \(24, 2\)"),
        ({"weight_scale": torch.ones(24, 2, dtype=torch.float64)}, "weight_scale is float64"),
        ({"weight_scale": scales(math.nan)}, "not finite and positive"),
        ({"weight_scale": scales(math.inf)}, "not finite and positive"),
        ({"weight_scale": scales(0.0)}, "not finite and positive"),
        ({"weight_scale": scales(-1.0)}, "not finite and positive"),
        ({"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "weight_zero_point has no place"),
        ({"weight": torch.zeros(24, 64, dtype=torch.bfloat16)}, "weight has no place"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx has no place"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_packed_tensors_that_are_refused(changes: dict, part: str) -> None:
    with pytest.raises(CanopyError, match=part):
        read(damaged(**changes), Scheme("int4", "g32"))


BYTES = torch.zeros(24, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("nvfp4", {"weight_global_scale": None}, "weight_global_scale is missing"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "weight_global_scale holds values that are not finite and"),
        ("nvfp4", {"weight_global_scale": torch.tensor([math.nan])}, "weight_global_scale holds values"),
        ("nvfp4", {"weight_global_scale": torch.tensor([1e-38])}, "more than bfloat16 holds"),
        ("nvfp4", {"weight_scale": torch.full((24, 4), math.nan).to(torch.float8_e4m3fn)}, "weight_scale holds values"),
        ("nvfp4", {"weight_scale": torch.ones(24, 4)}, "weight_scale is float32"),
        ("nvfp4", {"weight_packed": BYTES[:, :31]}, r"has to be uint8 \(24, 32\)"),
        ("mxfp4", {"weight_scale": torch.full((24, 2), 255, dtype=torch.uint8)}, "weight_scale holds NaN"),
        ("mxfp4", {"weight_scale": torch.full((24, 2), 254, dtype=torch.uint8)}, "more than bfloat16 holds"),
        ("mxfp4", {"weight_global_scale": torch.ones(1)}, "weight_global_scale has no place"),
        ("mxfp4", {"weight_shape": torch.tensor([24, 64])}, "weight_shape has no place"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_blocks_that_are_refused(name: str, changes: dict, part: str) -> None:
    tensors = to_disk(quantize(weight(), Scheme(name))) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CanopyError, match=part):
        read(tensors, Scheme(name))


@pytest.mark.parametrize(("name", "size"), [("nvfp4", 16), ("mxfp4", 32)])
def test_blocks_of_fp4_have_to_fill_the_row(name: str, size: int) -> None:
    with pytest.raises(CanopyError, match=f"blocks of {size} leave a rest in 72 inputs"):
        to_disk(quantize(weight(4, 72), Scheme(name)))


def test_other_tensors_that_are_refused() -> None:
    with pytest.raises(CanopyError, match="weight_zero_point is missing"):
        read(damaged(False, weight_zero_point=None), Scheme("int4", "g32", False))
    tensors = to_disk(quantize(weight(), Scheme("fp8_e4m3", "channel")))
    tensors["weight"].view(torch.uint8)[3, 4] = 0xFF  # one of the two NaN of E4M3
    with pytest.raises(CanopyError, match="weight holds NaN"):
        read(tensors, Scheme("fp8_e4m3", "channel"))
    tensors = to_disk(quantize(weight(), Scheme("int4", "tensor", False)))
    tensors["weight_zero_point"] = torch.tensor([9], dtype=torch.int8)
    with pytest.raises(CanopyError, match="outside the codes of int4"):
        read(tensors, Scheme("int4", "tensor", False))


def test_what_is_expected_before_anything_is_read() -> None:
    assert expected(Scheme("int4", "g32", False), (24, 64), PACKED) == {
        "weight_packed": ((torch.int32,), (24, 8)),
        "weight_shape": ((torch.int64,), (2,)),
        "weight_scale": ((torch.bfloat16, torch.float16, torch.float32), (24, 2)),
        "weight_zero_point": ((torch.int32,), (3, 2)),
    }
    assert expected(Scheme("int4", "g48"), (24, 64), PACKED)["weight_scale"][1] == (24, 2)  # the last group is ragged
