"""HQQ, and the scales of AWQ and SmoothQuant."""

from __future__ import annotations

import pytest
import torch

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.methods.awq import awq_scales
from canopyq.methods.hqq import hqq
from canopyq.methods.smoothquant import smooth_scales
from canopyq.tensor.quantized_tensor import UnpackedTensor
from canopyq.tensor.scheme import Scheme
from tests.methods.cost import output_cost


@pytest.mark.parametrize("granularity", ["channel", "g16", "g20", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_fits_every_row_better(symmetric: bool, granularity: str) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(2.0).sample((32, 64)) * 0.1
    scheme = Scheme("int3", granularity, symmetric=symmetric)

    def cost(quantized: cq.QuantizedTensor | UnpackedTensor) -> torch.Tensor:
        return scheme.granularity.rows(weight - quantized.dequantize()).square().sum(1)

    fitted, nearest = cost(hqq(weight, scheme)), cost(cq.quantize(weight, scheme))
    assert bool((fitted <= nearest * (1 + 1e-5)).all()) and fitted.sum() < 0.97 * nearest.sum()


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_hqq_of_zero_and_constant_weights(value: float) -> None:
    weight = torch.full((3, 32), value)
    for symmetric in (True, False):
        got = hqq(weight, Scheme("int4", "g16", symmetric=symmetric)).dequantize()
        assert (got - weight).abs().max() <= 0.04


def test_hqq_refuses_what_is_not_evenly_spaced() -> None:
    with pytest.raises(CanopyError, match="evenly spaced codes, which nf4 has not"):
        hqq(torch.randn(4, 64), Scheme("nf4"))


def test_awq_scales_protect_loud_inputs(layer) -> None:
    weight, hessian = layer
    scheme, loud = Scheme("int3", "channel"), hessian.diagonal().sqrt()
    scales, left = awq_scales({"a": weight, "kept": weight * 100}, loud, hessian, {"a": scheme})
    rounded = cq.quantize(weight * scales, scheme).dequantize() / scales
    error = weight - rounded
    cost = float(((error @ hessian) * error).sum())
    before = output_cost(weight, cq.quantize(weight, scheme), hessian)
    assert cost == pytest.approx(left * before, rel=1e-4) and left < 0.9
    assert scales[[4, 30]].min() > scales.median()


def test_awq_leaves_even_inputs_alone() -> None:
    weights, scheme = {"a": torch.randn(8, 32)}, Scheme("int4", "channel")
    scales, left = awq_scales(weights, torch.ones(32), torch.eye(32), {"a": scheme})
    assert torch.equal(scales, torch.ones(32)) and left == 1.0


def test_smoothing_helps_inputs_with_outliers_and_never_harms() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    weight = {"a": torch.randn(32, 64) * 0.1}
    x[:, 7] *= 60
    schemes, activations = {"a": Scheme("int8", "channel")}, Scheme("int8", "token")

    def error(scales: torch.Tensor) -> float:
        there = cq.quantize(weight["a"] * scales, schemes["a"]).dequantize()
        return float((x @ weight["a"].t() - cq.quantize(x / scales, activations).dequantize() @ there.t()).norm())

    scales, alpha = smooth_scales(weight, x, x.abs().amax(0), schemes, activations)
    assert error(scales) < 0.4 * error(torch.ones(64)) and 0.2 <= alpha <= 0.9
    shared, _ = smooth_scales(weight, x, x.abs().amax(0), schemes, activations, lambda v: v.max().expand(64))
    assert torch.equal(shared, shared[:1].expand(64)) and error(shared) <= error(torch.ones(64)) * (1 + 1e-6)
