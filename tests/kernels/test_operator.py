"""Quantized layers under torch's tracers: the graph is right for any number of rows, the layer stays as it was."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from canopyq.kernels import operator
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe

RECIPES = ["w4a16-g32", "w8a16", "w8a8", "w8a8-static", "fp8", "nvfp4"]


def layer_of(name: str) -> QuantizedLinear:
    recipe, draw = Recipe.parse(name), torch.Generator().manual_seed(0)
    scale = torch.tensor([0.03]) if recipe.static else None
    weight = quantize(torch.randn(64, 64, generator=draw) / 8, recipe.weights)
    return QuantizedLinear(weight, torch.randn(64, generator=draw), recipe.activations, scale)


def rows_of(count: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """By way of a file, as another process would have it."""
    file = io.BytesIO()
    rows = torch.export.Dim("rows", min=1, max=4096)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: rows},)), file)
    file.seek(0)
    return torch.export.load(file).module()


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)


@pytest.mark.parametrize("how", [exported, compiled, traced])
@pytest.mark.parametrize("name", RECIPES)
def test_tracing_leaves_a_cold_layer_as_it_is(name: str, how: Callable) -> None:
    layer = layer_of(name)
    before = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    with torch.no_grad():
        graph = how(nn.Sequential(layer, nn.ReLU()), rows_of(5))
        found = {count: graph(rows_of(count)) for count in (2, 16, 17, 33, 100)}
        after = dict(layer.named_buffers())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
        for count, y in found.items():  # the kernel of another layout may round the input to bfloat16
            torch.testing.assert_close(y, layer(rows_of(count)).relu(), rtol=0, atol=0.05)
            torch.testing.assert_close(graph(rows_of(count)), y, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8"])
def test_one_graph_serves_every_number_of_rows(name: str) -> None:
    layer, graphs = layer_of(name).prepack(), []
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(layer, fullgraph=True, dynamic=True, backend=lambda module, _: graphs.append(0) or module)
        for count in (2, 7, 16, 17, 32, 33, 64, 500):
            assert torch.equal(graph(rows_of(count)), layer(rows_of(count)))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8"])
def test_a_compiled_layer_has_its_gradients(name: str) -> None:
    layer = layer_of(name)
    graph = compiled(layer, rows_of(5))
    ours, theirs = (rows_of(5).requires_grad_() for _ in range(2))
    graph(ours).sum().backward()
    layer(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a16", "w8a8", "w8a8-static"])  # opcheck cannot add E4M3 tensors
def test_the_operators_are_well_formed(name: str) -> None:
    layer = layer_of(name).prepack()
    weight, ranges = [*layer.packed.values()], (layer.input_scale, layer.input_zero_point)
    x = rows_of(3).requires_grad_()
    torch.library.opcheck(operator.quantized_linear, (x, weight, layer._description, *ranges))
    for transposed in (False, True):
        torch.library.opcheck(operator.dequantized_linear, (x, weight, layer._description, transposed))
