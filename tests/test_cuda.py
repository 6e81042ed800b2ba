"""The quantizer core and the tutor on an NVIDIA GPU: the same codes as on a CPU, and the same answers."""

from __future__ import annotations

import pytest
import torch

import canopyq as cq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]

SETTINGS = [
    *[("int8", g, s) for g in ("tensor", "channel", "g128", "g100") for s in (True, False)],
    *[(f"int{bits}", "g128", s) for bits in (7, 6, 5, 4, 3, 2) for s in (True, False)],
    *[(name, "channel", True) for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4")],
    *[(name, None, True) for name in ("mxfp4", "nvfp4", "fp16", "bf16", "fp32")],
]


@pytest.mark.parametrize(("name", "granularity", "symmetric"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_codes_are_those_of_the_cpu(name: str, granularity: str | None, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    here = cq.quantize(x, name, granularity, symmetric=symmetric)
    there = cq.quantize(x.cuda(), name, granularity, symmetric=symmetric)
    assert all(part.is_cuda for part in there.parts.values())
    for part, expected in here.parts.items():
        found = there.parts[part].cpu()
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), part
    assert torch.equal(there.dequantize().cpu(), here.dequantize())


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_ranges_are_those_of_the_cpu(observer: str) -> None:
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(2))
    here = cq.quantize(x, "int4", "channel", observer=observer)
    there = cq.quantize(x.cuda(), "int4", "channel", observer=observer)
    torch.testing.assert_close(there.scale.cpu(), here.scale, rtol=0.03, atol=0)  # one candidate of the search apart


def test_bad_values_are_found_on_the_gpu() -> None:
    x = torch.randn(8, 128, device="cuda")
    x[3, 5] = float("nan")
    with pytest.raises(cq.CanopyError, match="1 NaN"):
        cq.quantize(x, "int4", "g128")


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g128", "nf4"])
def test_the_tutor_answers_as_on_the_cpu(recipe: str) -> None:
    questions = cq.tutor.questions(51)
    model, tokenizer = cq.tutor.load(dtype="float32", device="cuda")
    reference = cq.examine(model, tokenizer, questions, keep=True)
    cq.quantize_(model, recipe)
    at_home, _ = cq.tutor.load()
    cq.quantize_(at_home, recipe)
    on_gpu = cq.compare(reference, model, tokenizer, questions)
    on_cpu = cq.examine(at_home, tokenizer, questions)
    assert on_gpu.model.bytes == on_cpu.bytes
    assert on_gpu.model.perplexity == pytest.approx(on_cpu.perplexity, rel=1e-3)
    assert sum(a != b for a, b in zip(on_gpu.model.right, on_cpu.right, strict=True)) <= 1
    assert on_gpu.kl < 0.01


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "fp8", "fp8-static"])
def test_activations_are_quantized_as_on_the_cpu(recipe: str) -> None:
    model, tokenizer = cq.tutor.load(dtype="float32", device="cuda")
    at_home, _ = cq.tutor.load()
    data = cq.tutor.calibration(tokenizer, 4, 64)
    for each in (model, at_home):
        cq.quantize_(each, recipe, calibration=data if recipe.count("static") else None)
    kernels = cq.explain(model).layers[0].runs
    assert any(name.startswith(("int8 by int8", "FP8 by FP8")) for name in kernels), kernels
    questions = cq.tutor.questions(17)
    on_gpu, on_cpu = (cq.examine(each, tokenizer, questions) for each in (model, at_home))
    assert on_gpu.perplexity == pytest.approx(on_cpu.perplexity, rel=1e-2)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    there, here = (each.model.layers[0].mlp.gate_proj for each in (model, at_home))
    for rows in (1, 3):  # fewer than cuBLAS takes
        assert float((there(x[:rows].cuda()).cpu() - here(x[:rows])).norm() / here(x[:rows]).norm()) < 6e-3
