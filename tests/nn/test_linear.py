"""`QuantizedLinear`: the product, what is saved, and what a change of dtype must leave alone."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from canopyq.errors import CanopyError
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import RECIPES, Recipe, Scheme

SCHEMES = {name: Recipe.parse(name).weights for name in RECIPES if "g128" not in name} | {
    "int8 tensor float32 scale": Scheme("int8"),
    "int4 g32 asymmetric": Scheme("int4", "g32", symmetric=False, scale_dtype=torch.float16),
    "fp8 channel": Scheme("fp8", "channel"),
    "bf16": Scheme("bf16"),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def linear(bias: bool = True, seed: int = 0, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return layer


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))


def off_by(y: torch.Tensor, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Relative error against the product in float64."""
    exact = F.linear(given.double(), weight.double(), None if bias is None else bias.double())
    return float((y.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_output_equals_the_dequantized_weight(scheme: Scheme, shape: tuple[int, ...], bias: bool) -> None:
    layer = linear(bias)
    quantized = QuantizedLinear.from_linear(layer, scheme)
    weight = quantize(layer.weight, scheme).dequantize()
    with torch.no_grad():
        y = quantized(x(*shape))
        assert off_by(y, x(*shape), weight, layer.bias) < 4e-3  # bfloat16 where the kernel rounds its input
        exact, weight = quantized(x(*shape).double()), quantized.quantized_weight.dequantize(torch.float64)
        assert off_by(exact, x(*shape).double(), weight, layer.bias) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_change_of_dtype_leaves_the_weight_alone(scheme: Scheme, dtype: torch.dtype) -> None:
    # Tiny weights: their scales are subnormal in float16, so a cast of the buffers would show.
    quantized = QuantizedLinear.from_linear(linear(scale=1e-4), scheme)
    before = {name: buffer.clone() for name, buffer in quantized.named_buffers()}
    size = quantized.quantized_weight.nbytes
    quantized.to(dtype)
    for name, buffer in quantized.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8))
    assert quantized.quantized_weight.nbytes == size
    assert quantized.bias.dtype == dtype
    y = quantized(x(3).to(dtype))
    assert y.dtype == dtype
    weight = quantized.quantized_weight.dequantize(torch.float64)
    assert off_by(y, x(3).to(dtype), weight, quantized.bias) < 1e-2


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_the_casting_methods_do_the_same(cast: str) -> None:
    model = nn.Sequential(QuantizedLinear.from_linear(linear(), SCHEMES["nvfp4"]), nn.LayerNorm(48))
    getattr(model, cast)()
    assert {b.dtype for b in model[0].buffers()} == {torch.int32, torch.float8_e4m3fn, torch.float32}
    assert model[1].weight.dtype == model[0].bias.dtype


def test_moving_to_another_device_takes_the_buffers_along() -> None:
    quantized = QuantizedLinear.from_linear(linear(), SCHEMES["nvfp4"]).to("meta", torch.float16)
    assert {b.device.type for b in quantized.buffers()} == {"meta"}
    assert quantized.weight_scale.dtype == torch.float8_e4m3fn and quantized.bias.dtype == torch.float16


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_state_dict_goes_to_a_file_and_back(scheme: Scheme) -> None:
    source, target = (QuantizedLinear.from_linear(linear(seed=seed), scheme) for seed in (0, 1))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert not torch.equal(source(x(2)), target(x(2)))
    target.load_state_dict(torch.load(file))
    assert torch.equal(source(x(2)), target(x(2)))


def test_buffers_bear_the_names_of_the_checkpoint_format() -> None:
    names = {
        "w4a16-g32": {"weight_packed", "weight_scale", "bias"},
        "int4 g32 asymmetric": {"weight_packed", "weight_scale", "weight_zero_point", "bias"},
        "w8a16": {"weight", "weight_scale", "bias"},
        "fp8 channel": {"weight", "weight_scale", "bias"},
        "nvfp4": {"weight_packed", "weight_scale", "weight_global_scale", "bias"},
    }
    for scheme, expected in names.items():
        assert set(QuantizedLinear.from_linear(linear(), SCHEMES[scheme]).state_dict()) == expected


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_deep_copies_are_independent(scheme: Scheme) -> None:
    source = QuantizedLinear.from_linear(linear(), scheme)
    before = source(x(2))
    for buffer in copy.deepcopy(source).buffers():
        buffer.zero_()
    assert torch.equal(source(x(2)), before)


def test_a_plain_tensor_as_bias_is_saved_and_moved_too() -> None:
    quantized = QuantizedLinear(quantize(torch.randn(8, 64), "int8"), torch.ones(8))
    assert "bias" in quantized.state_dict()
    assert quantized.half().bias.dtype == torch.float16
    assert not quantized.bias.requires_grad


RECIPES_OF_GRADIENTS = ["w8a16", "w4a16-g32", "nvfp4", "w8a8", "w8a8-asym", "w8a8-static", "w4a8-g32", "fp8"]


def layer_of(name: str, bias: bool = True) -> QuantizedLinear:
    recipe = Recipe.parse(name)
    scale = torch.tensor([0.03]) if recipe.static else None
    return QuantizedLinear(quantize(linear(bias).weight, recipe.weights), linear(bias).bias, recipe.activations, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES_OF_GRADIENTS)
def test_gradients_are_those_of_the_dequantized_weight(name: str, dtype: torch.dtype) -> None:
    """Rounding the input is passed straight through; what autograd makes of F.linear is the oracle."""
    quantized, ours, theirs = layer_of(name).to(dtype), *(x(2, 3).to(dtype).requires_grad_() for _ in range(2))
    plain = F.linear(theirs, quantized.quantized_weight.dequantize(dtype), quantized.bias.detach())
    found = quantized(ours)
    gradient = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found.backward(gradient)
    plain.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantized.bias.grad, gradient.flatten(0, 1).sum(0))
    with torch.no_grad():
        rounds = quantized.activations is not None  # weight-only layers are exact where there is a gradient
        torch.testing.assert_close(quantized(x(2, 3).to(dtype)), found, rtol=0, atol=0 if rounds else 0.05)


@pytest.mark.parametrize("name", RECIPES_OF_GRADIENTS)
def test_gradients_after_a_first_call_in_inference_mode_and_under_autocast(name: str) -> None:
    quantized, given = layer_of(name), x(5)
    with torch.inference_mode():
        quantized(given)
    wanted = torch.ones(5, 48) @ quantized.quantized_weight.dequantize()
    for autocast, bound in ((False, 1e-6), (True, 2**-7)):  # float32's rounding; a gradient's in bfloat16, with room
        ours = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            quantized(ours).sum().backward()
        assert ours.grad.dtype == torch.float32 and (ours.grad - wanted).norm() <= bound * wanted.norm()


def test_gradients_of_gradients_are_exact_too() -> None:
    quantized = layer_of("w4a16-g32").double()
    assert torch.autograd.gradcheck(quantized, x(2).double().requires_grad_())
    assert torch.autograd.gradgradcheck(quantized, x(2).double().requires_grad_())


def test_a_layer_in_training_keeps_no_dequantized_weight() -> None:
    quantized = layer_of("w4a16-g32")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized(x(2).requires_grad_())
    packed = sum(buffer.nbytes for buffer in quantized.buffers())
    assert sum(tensor.nbytes for tensor in kept) <= packed


@pytest.mark.parametrize("given", [
    x(7).t().contiguous().t(), x(4, 3).transpose(0, 1), x(3, 5)[:, -1], x(1).expand(6, 64), x(14)[::2],
    x(2, 2, 3)[1:, :, 1:], torch.randn(128)[::2], torch.randn(64, 3).t()[:1], torch.randn(64).expand(2, 3, 64),
    torch.randn(2, 64, 0).mT,
], ids=lambda t: f"{tuple(t.shape)} {t.stride()}")  # fmt: skip
@pytest.mark.parametrize("name", [*RECIPES_OF_GRADIENTS, "w8a16-tensor", "fp8-static"])
def test_strided_input_gives_what_contiguous_gives(name: str, given: torch.Tensor) -> None:
    quantized = layer_of(name)
    assert torch.equal(quantized(given), quantized(given.contiguous()))
    assert torch.equal(quantized(given.bfloat16()), quantized(given.contiguous().bfloat16()))


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "fp8", "w4a16-g32"])
@pytest.mark.parametrize(("k", "n"), [(1, 3), (40, 64), (100, 52), (33, 1)])
def test_odd_shapes_are_right_for_any_number_of_rows(name: str, k: int, n: int) -> None:
    recipe = Recipe.parse(name if k >= 32 or "g32" not in name else "w4a16-channel")
    layer = QuantizedLinear.from_linear(nn.Linear(k, n), recipe.weights, recipe.activations)
    weight = layer.quantized_weight.dequantize(torch.float64)
    for rows in (1, 4, 17):
        given = torch.randn(rows, k)
        seen = given if recipe.activations is None else quantize(given, recipe.activations).dequantize(torch.float64)
        assert off_by(layer(given), seen, weight, layer.bias) < 4e-3


def test_only_matrices_make_a_layer() -> None:
    with pytest.raises(CanopyError, match=r"\(2, 3, 4\).*\(out_features, in_features\)"):
        QuantizedLinear(quantize(torch.randn(2, 3, 4), "int8"))


@pytest.mark.parametrize("bias", [torch.ones(47), torch.ones(1, 48), torch.ones(48).int()], ids=lambda b: str(b.shape))
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    with pytest.raises(CanopyError, match=r"bias .*\(48,\)"):
        QuantizedLinear(quantize(linear().weight, SCHEMES["w8a16"]), bias)


def test_it_says_what_it_is() -> None:
    quantized = QuantizedLinear.from_linear(linear(), SCHEMES["w4a16-g32"])
    assert repr(quantized) == "QuantizedLinear(in_features=64, out_features=48, int4 g32 symmetric)"


# Where and how a layer is called -------------------------------------------------------------------------------------

KINDS = ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w8a8", "fp8", "nvfp4"]


def square(name: str) -> QuantizedLinear:
    """64 → 64: of these shapes there are kernels that lay INT4 out in their own way."""
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(64, 64), (recipe := Recipe.parse(name)).weights, recipe.activations)


@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_rows_and_none(name: str) -> None:
    quantized = square(name)
    for shape in [(0,), (2, 0), (), (1, 1, 1)]:
        assert quantized(x(*shape)).shape == (*shape, 64)
    for given in [torch.ones(()), torch.ones(0), torch.ones(3, 63), *(torch.ones(3, 64).to(dtype) for dtype in (
        torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn))]:  # fmt: skip
        with pytest.raises(CanopyError) as refused:
            quantized(given)
        assert str(given.dtype) in str(refused.value) and str(refused.value).count("\n") == 0


@pytest.mark.parametrize("name", KINDS)
def test_threads_that_call_a_new_layer_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lays the weight out, here slowly; the others wait for that."""
    register = QuantizedLinear.register_buffer
    monkeypatch.setattr(QuantizedLinear, "register_buffer", lambda *a, **k: (time.sleep(0.01), register(*a, **k))[1])
    quantized, expected = square(name), square(name)(x(3))
    start, found = threading.Barrier(4), []

    def call() -> None:
        start.wait()
        with torch.no_grad():
            found.append(quantized(x(3)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(y, expected) for y in found)


def pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def stored(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("take", [copy.deepcopy, pickled, stored])
@pytest.mark.parametrize("name", KINDS)
def test_copies(name: str, take: Callable, called: bool) -> None:
    if take is pickled and name in ("fp8", "nvfp4"):
        pytest.skip("torch 2.13 does not read its own FP8 tensors back from a plain pickle")
    quantized = square(name)
    with torch.no_grad():
        expected = square(name)(x(3))
        if called:
            quantized(x(3))
        assert torch.equal(take(take(quantized))(x(3)), expected) and torch.equal(quantized(x(3)), expected)


def test_workers_that_were_forked() -> None:
    quantized = square("w4a16-g32")
    with torch.no_grad():
        expected = quantized(x(3))
        work = {"num_workers": 1, "multiprocessing_context": "fork"}
        assert all(torch.equal(y, expected) for y in DataLoader([0, 1], collate_fn=lambda _: quantized(x(3)), **work))
