"""Every kernel that this machine can run, held to float64; layouts and their inverses; which kernel runs and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.linear import QuantizedLinear
from canopyq.ops import cpu_int4, cpu_int8, reference, select, sliced
from canopyq.ops.kernel import Kernel, Problem
from canopyq.scheme import Scheme
from canopyq.tensor import QuantizedTensor, quantize

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
    "fp8 token": Scheme("fp8", "token"),
}


def weight_of(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5, scheme)


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    assert y.isfinite().all()
    return float((y.double() - exact).norm() / exact.norm())


def kernels_for(problem: Problem, *, codes: bool = False) -> list[Kernel]:
    return [k for k in select.KERNELS if k.refuse(problem) is None and k.takes_codes is codes]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (192, 512), (128, 2304)], ids=str)
@pytest.mark.parametrize("scheme", WEIGHTS.values(), ids=WEIGHTS)
def test_every_kernel_that_can_run_is_right(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, n, k)
    problem = Problem.of(weight)
    for rows in (1, 3, 8, 9, 40):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = x.double() @ weight.dequantize(torch.float64).t()
        for kernel in kernels_for(problem):
            y = kernel.run(x, kernel.layout.arrange(weight), problem)
            assert y.dtype == dtype and y.shape == (rows, n)
            bound = {torch.float32: 1e-6, BF16: 4e-3, torch.float16: 6e-4}[dtype]
            if kernel in (cpu_int4.PACKED, cpu_int8.WEIGHT_ONLY):
                bound = 4e-3  # they round x to bfloat16
            if kernel is reference.REFERENCE and dtype != torch.float32:
                bound = 6e-3  # it rounds the weight too
            assert relative_error(y, exact) < bound, kernel.name


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int4 g32", "int4 g128 asymmetric", "int4 channel", "int4 channel asymmetric"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_blocks_are_undone_bit_for_bit(name: str, n: int, k: int, seed: int) -> None:
    weight = weight_of(WEIGHTS[name], 64 * n, 128 * k, seed)
    problem = Problem.of(weight)
    back = cpu_int4.restore(cpu_int4.arrange(weight), problem)
    assert torch.equal(back.data, weight.data) and torch.equal(back.scale, weight.scale)
    assert (back.zero_point is None) == (weight.zero_point is None)
    if weight.zero_point is not None:
        assert torch.equal(back.zero_point, weight.zero_point)


def test_blocks_are_what_torch_packs() -> None:
    weight = weight_of(WEIGHTS["int4 g32"], 128, 256)
    ours = cpu_int4.arrange(weight)["weight_blocks"].view(128, 128)
    theirs = torch._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("name", ["int8 channel", "int8 channel asymmetric", "int4 g128", "fp8 channel"])
def test_quantized_inputs_give_the_product_of_what_the_codes_stand_for(name: str, activations: Scheme) -> None:
    weight = weight_of(WEIGHTS[name], 64, 256)
    x = torch.randn(2, 5, 256) + 0.3
    layer = QuantizedLinear(weight, activations=activations)
    exact = quantize(x, activations).dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    assert relative_error(layer(x), exact) < 1e-6


@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_by_integers_are_exact(asymmetric: bool) -> None:
    """The kernel itself, also where this processor is too slow at it for the layer to take it."""
    weight = weight_of(WEIGHTS["int8 channel"], 64, 4096)
    x = quantize(torch.randn(7, 4096) + 1, "int8", "token", symmetric=not asymmetric)
    y = cpu_int8.int8_by_int8(x, reference.arrange(weight), Problem.of(weight, x.scheme))
    assert relative_error(y, x.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()) < 1e-6


def test_a_static_range_is_used_as_it_is() -> None:
    weight = weight_of(WEIGHTS["int8 channel"], 8, 32)
    scale, zero = torch.tensor([0.01]), torch.tensor([20], dtype=torch.int8)
    layer = QuantizedLinear(weight, None, Scheme("int8", "tensor", symmetric=False), scale, zero)
    x = torch.randn(3, 32) * 3
    seen = (torch.clamp(torch.round(x.double() / 0.01) + 20, -128, 127) - 20) * float(scale)
    assert relative_error(layer(x), seen @ weight.dequantize(torch.float64).t()) < 1e-6


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


@pytest.mark.parametrize("name", WEIGHTS)
def test_some_kernel_takes_every_number_of_rows(name: str) -> None:
    kernels = select.usable(Problem.of(weight_of(WEIGHTS[name], 64, 256)))
    assert {kernel.layout for kernel in kernels} == {kernels[0].layout}
    for rows in (1, 8, 9, 10**6):
        assert select.pick(kernels, rows) in kernels


def test_verdicts_speak_of_every_kernel() -> None:
    problem = Problem.of(weight_of(WEIGHTS["int4 g128"], 64, 256))
    found = list(select.verdicts(problem))
    assert [verdict.kernel for verdict in found] == [kernel.name for kernel in select.KERNELS]
    assert all((verdict.runs is None) != (verdict.reason is None) for verdict in found)
    runs = {verdict.kernel: verdict.runs for verdict in found if verdict.runs}
    assert runs == {cpu_int4.PACKED.name: "1 to 8 rows", cpu_int4.SLICED.name: "9 rows and more"}


@pytest.mark.parametrize(
    ("change", "kernel", "words"),
    [
        ({"n": 72}, cpu_int4.PACKED, "multiples of 64; this layer has 72"),
        ({"k": 100}, cpu_int4.PACKED, "do not"),
        ({"weights": Scheme("int4", "g128", scale_dtype=torch.float32)}, cpu_int4.PACKED, "torch.float32"),
        ({"weights": Scheme("int3", "g128", scale_dtype=BF16)}, cpu_int4.PACKED, "these are int3"),
        ({"device": torch.device("cuda")}, cpu_int4.PACKED, "lies on cuda"),
        ({"device": torch.device("cuda")}, sliced.SLICED, "lies on cuda"),
        ({"activations": Scheme("int8", "token")}, cpu_int4.PACKED, "this recipe quantizes them"),
        ({}, cpu_int8.INT8, "leaves activations as they are"),
        ({}, cpu_int8.WEIGHT_ONLY, "these are int4"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(change: dict, kernel: Kernel, words: str) -> None:
    problem = dataclasses.replace(Problem.of(weight_of(WEIGHTS["int4 g128"], 64, 256)), **change)
    assert words in kernel.refuse(problem)
