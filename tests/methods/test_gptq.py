"""GPTQ, the ranges it starts from and the refinement after it, against slow oracles and on inputs that go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.methods.clip import clip
from canopyq.methods.gptq import gptq, refine
from canopyq.tensor.quantized_tensor import quantize_unpacked
from canopyq.tensor.scheme import Scheme
from tests.methods.cost import output_cost

SCHEMES = [Scheme("int4", "channel"), Scheme("int3", "g16"), Scheme("int4", "g20", symmetric=False),
           Scheme("int2", "g16"), Scheme("int4", "tensor"), Scheme("fp8", "channel"), Scheme("nf4", "g16"),
           Scheme("mxfp4"), Scheme("nvfp4"), Scheme("int8", "channel", restricted=True)]  # fmt: skip


def by_elimination(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """The published algorithm in its slow form: after each column, the inverse Hessian loses a row and a column."""
    start = cq.quantize(weight, scheme)
    step = start.float_scale().double().repeat_interleave(scheme.granularity.group_size or weight.shape[1], 1)
    left, done = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    h = hessian.double()
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    low, high = scheme.format.qmin, scheme.format.qmax
    for j in range(weight.shape[1]):
        done[:, j] = (left[:, j] / step[:, j]).round().clamp(low, high) * step[:, j]
        error = (left[:, j] - done[:, j]) / inverse[j, j]
        left -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return done.float()


@pytest.mark.parametrize("block", [7, 128])
@pytest.mark.parametrize("granularity", ["channel", "g16"])
def test_as_published(granularity: str, block: int, layer) -> None:
    weight, hessian = layer
    scheme = Scheme("int4", granularity)
    got, notes = gptq(weight, hessian, scheme, damp_percent=0.05, desc_act=False, block=block, clipped=False, rounds=0)
    expected = by_elimination(weight, hessian, scheme, 0.05)
    assert (got.dequantize() - expected).abs().gt(1e-5).float().mean() < 0.01  # a tie may fall the other way
    assert not notes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_step_helps(scheme: Scheme, layer) -> None:
    weight, hessian = layer
    nearest = output_cost(weight, cq.quantize(weight, scheme), hessian)
    clipped = output_cost(weight, clip(weight, hessian, scheme), hessian)
    published, _ = gptq(weight, hessian, scheme, clipped=False, rounds=0)
    whole, _ = gptq(weight, hessian, scheme)
    assert clipped <= nearest * 1.02  # groups are chosen one by one, which cannot see their correlation
    assert output_cost(weight, published, hessian) < nearest
    assert output_cost(weight, whole, hessian) < output_cost(weight, published, hessian) * 1.02
    assert whole.scheme == cq.quantize(weight, scheme).scheme
    packed = whole.pack()
    assert packed.nbytes == cq.quantize(weight, scheme).nbytes
    assert torch.equal(packed.codes.view(torch.int8), whole.codes.view(torch.int8))
    assert torch.equal(packed.dequantize(), whole.dequantize())


def test_clip_is_the_best_of_all_its_ranges_by_brute_force(layer) -> None:
    weight, hessian = layer
    scheme = Scheme("int3", "channel", scale_dtype=torch.float32)
    best = torch.full((len(weight),), torch.inf)
    for shrink in torch.linspace(1.0, 0.35, 14):
        step = weight.abs().amax(1, keepdim=True) * shrink / 3.5
        error = weight - (weight / step).round().clamp(-4, 3) * step
        best = torch.minimum(best, ((error @ hessian) * error).sum(1))
    error = weight - clip(weight, hessian, scheme).dequantize()
    torch.testing.assert_close(((error @ hessian) * error).sum(1), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_blocks_get_the_best_of_all_stored_scales_by_brute_force(name: str, layer) -> None:
    """Every E4M3 code between 0.6 and 1.7 times the usual scale, and the powers of two beside it."""
    weight, hessian = layer
    scheme = Scheme(name)
    size, values = scheme.format.block_size, scheme.format.values().float()
    nearest, found = cq.quantize(weight, scheme), clip(weight, hessian, scheme)
    for row, block in ((0, 0), (3, 0), (5, 48 // size - 1)):
        part = slice(block * size, min((block + 1) * size, 48))
        w, h = weight[row, part], hessian[part, part]
        if name == "nvfp4":
            codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / nearest.global_scale
            usual = nearest.float_scale()[row, block]
            steps = codes[(codes > 0.6 * usual) & (codes < 1.67 * usual)]
        else:
            steps = nearest.float_scale()[row, block] * torch.tensor([0.5, 1, 2])
        errors = torch.stack([w - values[(w[:, None] / s - values).abs().argmin(1)] * s for s in steps])
        costs = ((errors @ h) * errors).sum(1)
        error = w - found.dequantize()[row, part]
        assert float(error @ h @ error) <= float(costs.min()) * (1 + 1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from(["channel", "g7", "g16", "tensor"]),
       st.booleans())  # fmt: skip
def test_refining_never_makes_it_worse(seed: int, bits: int, granularity: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k = (int(x) for x in torch.randint(1, 30, (2,), generator=generator))
    k += 16
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(k // 2, k, generator=generator)
    hessian = x.t() @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k)
    start = quantize_unpacked(weight, Scheme(f"int{bits}", granularity, symmetric=symmetric))
    better = refine(weight, hessian, start, damp_percent=0.01)
    assert output_cost(weight, better, damped) <= output_cost(weight, start, damped) * (1 + 1e-4) + 1e-6


def test_a_singular_hessian_is_damped_and_said(layer) -> None:
    weight, _ = layer
    one = torch.randn(1, 48)
    got, notes = gptq(weight, one.t() @ one, Scheme("int4", "channel"), damp_percent=0.0)
    assert got.dequantize().isfinite().all()
    assert len(notes) == 1 and "singular: damping raised from 0 to" in notes[0]


def test_dead_inputs_are_rounded_to_nearest_and_said(layer) -> None:
    weight, hessian = layer
    dead = [0, 7, 47]
    hessian[dead, :] = hessian[:, dead] = 0
    scheme = Scheme("int4", "g16")
    got, notes = gptq(weight, hessian, scheme, clipped=False, rounds=0)
    assert torch.equal(got.codes[:, dead], cq.quantize(weight, scheme).codes[:, dead])
    assert notes == ["3 of 48 inputs were zero in all data: those columns are rounded to nearest"]
    nothing, notes = gptq(weight, torch.zeros(48, 48), scheme)
    assert torch.equal(nothing.codes, cq.quantize(weight, scheme).codes) and "48 of 48" in notes[0]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_zero_and_constant_weights(value: float, layer) -> None:
    weight = torch.full((4, 48), value)
    for scheme in (Scheme("int4", "channel"), Scheme("int4", "g16", symmetric=False)):
        got, _ = gptq(weight, layer[1], scheme)
        assert got.dequantize().isfinite().all()
        assert output_cost(weight, got, layer[1]) <= output_cost(weight, cq.quantize(weight, scheme), layer[1]) + 1e-6


@pytest.mark.parametrize("bad", [torch.full((48, 48), torch.nan), torch.eye(47)])
def test_a_hessian_that_cannot_be_is_refused(bad: Tensor, layer) -> None:
    with pytest.raises(CanopyError, match=r"finite Hessian \(48, 48\)"):
        gptq(layer[0], bad, Scheme("int4", "channel"))


def test_an_indefinite_hessian_is_refused(layer) -> None:
    hessian = torch.eye(48)
    hessian[0, 1] = hessian[1, 0] = 100
    with pytest.raises(CanopyError, match="no Cholesky factor even with damping"):
        gptq(layer[0], hessian, Scheme("int4", "channel"))
