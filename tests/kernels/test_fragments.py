"""The layout for tensor cores: where every code lies, its exact inverse, what it costs in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.kernels.cuda.fragments import prepack, slice_rows, unpack
from canopyq.kernels.spec import LinearSpec
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme


def weight_of(name: str, granularity: str, symmetric: bool, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    scheme = Scheme(name, granularity, symmetric=symmetric, scale_dtype=torch.bfloat16)
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), scheme)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_lies_where_its_lane_looks(bits: int) -> None:
    weight = weight_of(f"int{bits}", "g128", True, 70, 200 if bits == 4 else 256) if bits == 8 else None
    weight = weight or weight_of("int4", "channel", True, 70, 200)
    data = prepack(weight)["weight_fragments"].numpy().view("uint8").reshape(2, 2, 4, -1, 32, 16)
    codes = torch.zeros(128, 256, dtype=torch.int64)
    codes[:70, : weight.shape[1]] = weight.codes.long() + 2 ** (bits - 1)
    columns_of_a_piece = 512 * 8 // bits // 16
    for row in range(0, 128, 3):
        for column in range(0, 256, 5):
            slab, block, half, g = row // 64, row % 64 // 16, row % 16 // 8, row % 8
            step, piece = divmod(column % 256, 128)[0], column % 128 // columns_of_a_piece
            product, inside = divmod(column % columns_of_a_piece, 16)
            right, t, neighbour = inside // 8, inside % 8 // 2, inside % 2
            register = half + 2 * right  # of the operand a of m16n8k16
            found = data[slab, step, block, piece, 4 * g + t]
            if bits == 4:  # a word a product; a register is nibble i of each half of it
                word = int.from_bytes(found[4 * product : 4 * product + 4].tobytes(), "little")
                code = word >> (4 * register + 16 * neighbour) & 15
            else:  # two words a product; two bytes a register
                code = int(found[8 * product + 2 * (half + 2 * right) + neighbour])
            assert code == codes[row, column], (row, column)


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(["g32", "g64", "g128", "g256", "channel"]),
    st.booleans(),
    st.integers(1, 130),
    st.integers(1, 5),
    st.integers(0, 31),
)
@settings(max_examples=40)
def test_restore_is_the_exact_inverse(bits: int, granularity: str, symmetric: bool, n: int, groups: int, more: int):
    k = groups * int(granularity[1:]) if granularity != "channel" else groups * 100 + more
    weight = weight_of(f"int{bits}", granularity, symmetric, n, k)
    packed = prepack(weight)
    found = unpack(packed, LinearSpec.of(weight))
    assert found.parts.keys() == weight.parts.keys()
    for name, tensor in weight.parts.items():
        assert found.parts[name].dtype == tensor.dtype and torch.equal(found.parts[name], tensor), name
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize(("name", "granularity", "most"), [("int4", "g128", 4.3), ("int8", "channel", 8.3)])
def test_memory(name: str, granularity: str, most: float) -> None:
    packed = prepack(weight_of(name, granularity, True, 256, 1024))
    assert 8 * sum(part.untyped_storage().nbytes() for part in packed.values()) / (256 * 1024) <= most


def test_a_part_is_what_its_rows_alone_would_be() -> None:
    weight = weight_of("int4", "g64", False, 200, 256)
    packed, spec = prepack(weight), LinearSpec.of(weight)
    for start, stop in ((0, 64), (64, 200), (128, 192), (0, 200)):
        rows = prepack(weight_of_rows(weight, start, stop))
        found = slice_rows(packed, spec, start, stop)
        for name, tensor in rows.items():
            assert found[name].data_ptr() == packed[name][start // 64 :].data_ptr() and torch.equal(found[name], tensor)
    assert slice_rows(packed, spec, 32, 200) is None and slice_rows(packed, spec, 0, 100) is None


def weight_of_rows(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    shape = torch.Size([stop - start, weight.shape[1]])
    parts = (weight.data[start:stop], weight.scale[start:stop], weight.zero_point[start:stop])
    return QuantizedTensor(*parts, weight.scheme, shape, weight.dtype)
