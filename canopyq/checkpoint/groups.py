"""Which layers are quantized alike, and which not at all: the groups of a ``quantization_config``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from canopyq.checkpoint.config import Group
from canopyq.checkpoint.layout import BLOCKS, disk_format
from canopyq.checkpoint.names import Names
from canopyq.errors import CanopyError, prefixed
from canopyq.methods.registry import Method
from canopyq.methods.rotation import needs_online
from canopyq.nn.hadamard import online_hadamard
from canopyq.nn.kinds import Kind
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away, lies
from canopyq.nn.outlier_linear import OutlierLinear
from canopyq.nn.sites import weight_holders, weight_sites
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.scheme import Recipe, Scheme


@dataclass(frozen=True)
class Layer:
    """A quantized layer, or one that will be.

    Attributes:
        name: in the files.
        kind: of the module that holds its weight before it is quantized.
        weights, activations, static: as in `Group`. What goes into an embedding, token ids, is never quantized.
    """

    name: str
    kind: Kind
    weights: Scheme
    activations: Scheme | None
    static: bool


def grouped(layers: Iterable[Layer]) -> list[Group]:
    """Layers that are quantized alike, together. With one group its targets are classes, as other tools write it.

    Raises:
        CanopyError: for a scheme that the format cannot hold.
    """
    kinds: dict[tuple, list[Layer]] = {}
    for layer in layers:
        weights, inputs = layer.weights, layer.activations
        key = (weights.format, weights.granularity, weights.symmetric, inputs, layer.static, layer.kind.transposed)
        kinds.setdefault(key, []).append(layer)
    groups = []
    for i, alike in enumerate(kinds.values()):
        first = alike[0]
        targets = [layer.name for layer in alike]
        if len(kinds) == 1:
            targets = [layer.kind.config_class for layer in alike]
        format = disk_format(first.weights, first.activations)
        targets = tuple(dict.fromkeys(targets))
        groups.append(Group(f"group_{i}", targets, first.weights, first.activations, format, first.static,
                            first.kind.transposed))  # fmt: skip
    return groups


def layers_of(model: nn.Module, original: nn.Module, files: Names) -> list[Layer]:
    """The quantized layers of a model.

    Args:
        original: the same architecture before it was quantized; may lie on the meta device.

    Raises:
        CanopyError: for a model without quantized layers, or with one that no file holds.
    """
    sites = {name: site for site in weight_sites(original) for name in site.names}
    layers = []
    for name, module in model.named_modules(remove_duplicate=False):
        if is_away(module):
            raise CanopyError(
                f"{name} lies {lies(module)}, and save needs the whole model at hand; load it without offloading, or "
                "quantize from disk to disk: canopyq quantize FOLDER --out DIR"
            )
        if isinstance(module, QuantizedLinear):
            _check(name, module, model)
            if name not in sites:
                raise CanopyError(
                    f"{name} is no layer that quantize_ puts into {type(original).__name__}; only those are written"
                )
            static = module.input_scale is not None
            layers.append(Layer(files.of_layer(name), sites[name].kind, module.scheme, module.activations, static))
    if not layers:
        raise CanopyError("the model is not quantized; call cq.quantize_(model, recipe) first, or use save_pretrained")
    return layers


def cache_note(cache: str) -> str:
    """What becomes of the cache of a recipe when the model is saved."""
    server = "vLLM has one of its own: --kv-cache-dtype fp8" if cache == "kv-fp8" else "servers have their own"
    return f"+{cache}: a saved config.json notes it for canopyq, which takes it again; {server}"


def check_recipe(recipe: Recipe, method: Method) -> None:
    """What can be known of saving before any work is done.

    Raises:
        CanopyError: for a recipe and a method whose result no checkpoint holds, with the reason.
    """
    for scheme in (recipe.weights, *(scheme for _, scheme in recipe.exceptions)):
        disk_format(scheme, recipe.activations)
    if "outliers" in method.transforms:
        raise CanopyError(f"method {method.name} keeps some inputs in 16 bits, which compressed-tensors cannot hold")
    if "rotation" in method.transforms and needs_online(recipe):
        raise CanopyError(
            f"{recipe.name} rotated needs a Hadamard transform at run time, which no file holds; use activations of 8 "
            "bits"
        )


def ignored(model: nn.Module, layers: Iterable[Layer], files: Names) -> list[str]:
    """The layers of a model that stay as they are though the class of a group could mean them, by their names in the
    files and, where those differ, in the model too: transformers goes by the model's. A router is one of them:
    elsewhere it is a linear layer.

    Args:
        model: quantized, or on its way to be.
        layers: what is quantized of it, or will be.
    """
    layers = list(layers)
    quantized, embeds = {layer.name for layer in layers}, any(not layer.kind.multiplies for layer in layers)
    found: list[str] = []
    for holder in weight_holders(model):
        weight = holder.tensors.get("weight")
        for name in holder.names:
            if any(site.part and files.of_layer(site.name) in quantized for site in holder.sites):
                continue  # of experts, all or none are quantized
            if any(site.part for site in holder.sites):
                tensors = dict.fromkeys(f"{name}.{leaf}" for leaf in holder.tensors)
                found += [file.removesuffix(".weight") for tensor in tensors for file in files.of(tensor)]
                if holder.sites[0].name not in files.layers:  # which files hold in one tensor, and load one by one
                    found.append(f"re:{re.escape(name)}\\..*")
            elif weight is not None and weight.dim() == 2 and (embeds or not isinstance(holder.module, nn.Embedding)):
                found += dict.fromkeys([file, name]) if (file := files.of_layer(name)) not in quantized else []
    return [name for name in found if name not in quantized]


def _check(name: str, layer: QuantizedLinear, model: nn.Module) -> None:
    """Raise `CanopyError` if the format cannot hold the layer."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), OutlierLinear):
        raise CanopyError(
            f"{name.rpartition('.')[0]} keeps some inputs in 16 bits beside its codes, which compressed-tensors cannot "
            "hold; use a method without outliers"
        )
    if online_hadamard(layer) is not None:
        raise CanopyError(
            f"{name} has a Hadamard transform at run time, which no file holds; rotate under a recipe with activations "
            "of 8 bits or more"
        )
    with prefixed(f"{name}: "):
        disk_format(layer.scheme, layer.activations)


def word(group: Group) -> str:
    """The name of the recipe that gives such layers, such as ``w4a16-g128-asym``; the schemes in words if none does."""
    weights, inputs = group.weights, group.activations
    if weights.format.name in BLOCKS:
        return weights.format.name + ("" if inputs is None else "-w4a4")
    asymmetric = not (weights if inputs is None else inputs).symmetric
    tail = ("-static" if group.static else "") + ("-asym" if asymmetric else "")
    bits = 16 if inputs is None else inputs.format.bits
    name = f"w{weights.format.bits}a{bits}" if isinstance(weights.format, IntFormat) else "fp8"
    if name != "fp8" and (weights.format.bits, str(weights.granularity)) != (8, "channel"):
        name += f"-{weights.granularity}"
    try:
        meant = Recipe.parse(name + tail)
    except CanopyError:
        meant = None
    if meant is not None and _alike(meant.weights, weights) and _alike(meant.activations, inputs):
        return meant.name
    return str(weights) + (f" with {inputs} activations" if inputs is not None else "")


def _alike(one: Scheme | None, other: Scheme | None) -> bool:
    parts = (None if x is None else (x.format, x.granularity, x.symmetric) for x in (one, other))
    return next(parts) == next(parts)
