"""`load`: a checkpoint back into a model, its weights packed as they lie on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.checkpoint.config import Group, Quantization, read_config
from canopyq.checkpoint.files import GENERATION, Checkpoint, Reader, raise_not_finite
from canopyq.checkpoint.headers import read_json
from canopyq.checkpoint.layout import check, from_disk, input_from_disk
from canopyq.checkpoint.names import Names, names_of, part_shape, tied, without_place
from canopyq.checkpoint.pretrained import teach_transformers
from canopyq.checkpoint.skeleton import build, compute_buffers, quiet, read_model_config
from canopyq.errors import CanopyError, and_more, prefixed, wrapped
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.sites import Site, put_layers, weight_holders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class LoadedModel(PreTrainedModel):
        """What type checkers see of a model that was loaded: transformers' own class has no ``generate``."""

        def generate(self, *inputs: Any, **options: Any) -> Any: ...

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    strict: bool = True,
) -> LoadedModel:
    """The model in a compressed-tensors checkpoint, ready to answer, its quantized layers packed (`QuantizedLinear`).

    Headers are compared with the config tensor by tensor before any data is read.

    Args:
        folder: with config.json and safetensors, written by `save`, llm-compressor or another tool.
        device: where the model goes.
        dtype: of what is not quantized, and of the computation. None takes float32 on a CPU, and on a GPU what the
            config says. Codes and scales stay as they are.
        strict: refuse tensors that the model has no place for; else they are left out.

    Raises:
        CanopyError: for a checkpoint that is damaged, incomplete, pickled, or in a format that is not read.
    """
    return load_as(folder, device, dtype, strict=strict)


def load_as(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    *,
    strict: bool = True,
    attention: str | None = None,
) -> LoadedModel:
    """`load` with a choice of transformers' attention implementation."""
    checks.flag("strict", strict)
    place = checks.device(device)
    dtype = None if dtype is None else checks.dtype("dtype", dtype, FLOATS)
    checkpoint = Checkpoint(folder)
    given = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if given is None:
        raise CanopyError(f"{folder} holds no quantized model (no quantization_config); use transformers to load it")
    wanted = expected(checkpoint, read_config(given), place, dtype, attention)
    parts = compare(wanted, checkpoint)
    if strict:
        raise_without_place(wanted, checkpoint)
    return _fill(wanted, parts, checkpoint, place)


def _dtype(dtype: torch.dtype | None, place: torch.device, config) -> torch.dtype:
    own = config.dtype if config.dtype in FLOATS else torch.bfloat16
    return dtype or (torch.float32 if place.type == "cpu" else own)


# What the checkpoint has to hold, by its config.json ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Wanted(Site):
    """A quantized weight.

    Attributes:
        group: how it is quantized.
    """

    group: Group


@dataclass(frozen=True, eq=False)
class Expected:
    """A model without its weights, and what the files have to hold of it.

    Attributes:
        model: on the meta device, its computed buffers aside.
        files: what the files call its tensors.
        layers: name in the files -> quantized weight.
        rest: name in the model -> any other parameter or buffer that the files hold.
    """

    model: PreTrainedModel
    files: Names
    layers: Mapping[str, Wanted]
    rest: Mapping[str, Tensor]


def expected(
    checkpoint: Checkpoint,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> Expected:
    """What a checkpoint has to hold by its config.json. No tensor is read, and none of the model takes memory.

    Raises:
        CanopyError: for a config of which transformers makes no model, or none that the files have room for.
    """
    tensors = len(checkpoint.tensors)
    config = read_model_config(checkpoint.folder, checkpoint.config, tensors)
    most = 4 * checkpoint.nbytes  # 2-bit codes at least
    model = build(config, _dtype(dtype, device, config), attention, most=most, tensors=tensors)
    compute_buffers(model)
    _generation(model, checkpoint.folder)
    files = names_of(model)
    layers = quantized(model, files, quantization)
    return Expected(model, files, layers, plain(model, files, layers, checkpoint))


def quantized(model: nn.Module, files: Names, quantization: Quantization) -> dict[str, Wanted]:
    """What the config says is quantized, by the names that layers have in the files.

    Raises:
        CanopyError: if that is nothing, a layer of a kind that is never held quantized, or some experts of a layer and
            not all of them.
    """
    named: dict[str, str] = {}  # in the files -> what configs call such layers
    holders = weight_holders(model)
    for holder in holders:
        if holder.kind is not None:
            named |= {files.of_layer(site.name): holder.kind.config_class for site in holder.sites}
        elif isinstance(holder.module, (nn.Linear, nn.Embedding)):
            named[files.of_layer(holder.name)] = "Linear" if isinstance(holder.module, nn.Linear) else "Embedding"
    groups = quantization.groups_of(named)
    found: dict[str, Wanted] = {}
    for holder in holders:
        own = {files.of_layer(site.name): site for site in holder.sites}
        if not own and groups.get(file := files.of_layer(holder.name)) is not None:
            raise CanopyError(f"{file} is said to be quantized, and is {holder.reason}")
        wanted = {file: Wanted(**vars(site), group=groups[file]) for file, site in own.items() if groups[file]}
        if wanted and len(wanted) < len(own):
            raise CanopyError(
                f"{len(wanted)} of {len(own)} projections of {holder.name} are quantized; canopyq holds all experts of "
                "a layer quantized or none"
            )
        found |= wanted
    if not found:
        raise CanopyError("quantization_config names no linear layer of this model; mend its targets")
    return found


def plain(model: nn.Module, files: Names, found: Mapping[str, Wanted], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name in the model -> parameter or buffer, of all that the checkpoint has to hold beside quantized weights."""
    replaced = {wanted.owner for wanted in found.values() if wanted.part}  # experts: all of their tensors go
    left = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in replaced
    }
    for wanted in found.values():
        left.pop(wanted.tensor, None)
        if wanted.part and (bias := wanted.bias()) is not None:
            left[f"{wanted.name}.bias"] = bias
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    second = {name: of for name, of in tied(model).items() if name in left}

    def held(name: str) -> bool:
        return all(file in checkpoint.tensors for file in files.of(name))

    for name in list(left):
        optional = not left[name].is_meta and any(re.search(pattern, name) for pattern in may_lack)
        if not held(name) and (optional or (name in second and held(second[name]))):
            del left[name]
    return left


def compare(wanted: Expected, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Compare the headers with what is expected: after this, reading takes the memory that it should.

    Returns:
        Quantized weight, as the files name it -> the tensors that they hold of it.

    Raises:
        CanopyError: for tensors that are missing, or of another shape or dtype.
    """
    headers = {name: (info.torch_dtype, info.shape) for name, (_, info) in checkpoint.tensors.items()}
    rest = _files_of(wanted)
    if missing := sorted(rest.keys() - headers.keys()):
        module = missing[0].rpartition(".")[0]
        if f"{module}.weight_scale" in headers:
            raise CanopyError(f"{module} is quantized, and no group of the config names it; mend the config")
        raise CanopyError(f"{checkpoint.folder} lacks {and_more(missing)}; download or write it again")
    for file, (tensor, count) in rest.items():
        dtype, shape = headers[file]
        kind = "floats" if tensor.is_floating_point() else str(tensor.dtype)
        due = part_shape(tensor, count)
        if shape != due or (dtype not in FLOATS if kind == "floats" else dtype != tensor.dtype):
            raise CanopyError(f"{file} is {dtype} {shape}; by config.json it has to be {kind} {due}")
    parts: dict[str, dict[str, tuple]] = {name: {} for name in wanted.layers}
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        if name not in rest and module in parts:
            parts[module][leaf] = header
    read = Reader(checkpoint)
    for name, layer in wanted.layers.items():
        group = layer.group
        with prefixed(f"{name}."):
            check(parts[name], group.weights, layer.shape, group.format, group.activations if group.static else None)
        if "weight_shape" in parts[name] and (says := read(f"{name}.weight_shape").tolist()) != list(layer.shape):
            raise CanopyError(f"{name}: weight_shape says {says}, the model's config {list(layer.shape)}")
    return {name: list(found) for name, found in parts.items()}


def raise_without_place(wanted: Expected, checkpoint: Checkpoint) -> None:
    """Raise `CanopyError` for tensors that the model has no place for."""
    rest = _files_of(wanted)
    extra = [name for name in checkpoint.tensors if name not in rest and name.rpartition(".")[0] not in wanted.layers]
    if extra := without_place(wanted.model, extra):
        raise CanopyError(f"the model has no place for {and_more(extra)}; mend config.json, or use strict=False")


def _files_of(wanted: Expected) -> dict[str, tuple[Tensor, int]]:
    """Name in the files of all that is not quantized -> the model's tensor, and in how many parts the files hold it."""
    names = {name: wanted.files.of(name) for name in wanted.rest}
    return {file: (wanted.rest[name], len(own)) for name, own in names.items() for file in own}


def _fill(
    expected: Expected, parts: Mapping[str, list[str]], checkpoint: Checkpoint, place: torch.device
) -> PreTrainedModel:
    model, files, layers, rest = expected.model, expected.files, expected.layers, expected.rest
    read = Reader(checkpoint)
    biases: dict[str, Tensor | None] = {f"{layer.name}.bias": None for layer in layers.values() if layer.part}
    for name, wanted in rest.items():
        own = [_own(read(file), place, wanted.dtype) for file in files.of(name)]
        for file, part in zip(files.of(name), own, strict=True):
            raise_not_finite(part, file)
        tensor = own[0] if len(own) == 1 else torch.cat(own).reshape(wanted.shape)
        if isinstance(wanted, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=wanted.requires_grad)
        if name in biases:
            biases[name] = tensor
        else:
            _set(model, name, tensor)
    made = {}
    for name, layer in layers.items():
        bias = biases[f"{layer.name}.bias"] if layer.part else layer.bias()
        tensors = {leaf: _own(read(f"{name}.{leaf}"), place) for leaf in parts[name]}
        made[layer.name] = _layer(layer, name, tensors, bias)
    owners = {layer.module: layer.owner for layer in layers.values()}
    for module, new in put_layers(list(layers.values()), made).items():
        model.set_submodule(owners[module], new)
    _tie(model, rest)
    if left := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        raise CanopyError(f"{left[0]} was given no value: this architecture is not one that canopyq can load")
    for name, buffer in list(model.named_buffers()):
        checked = buffer.dtype.itemsize == 1  # E4M3 codes, when they were read; and as one of them, infinity is 448
        if buffer.is_floating_point() and not checked and bool((buffer.isnan() | (buffer == math.inf)).any()):
            raise CanopyError(f"with config.json {name} becomes NaN or infinity; mend its numbers")
        if buffer.device != place:
            _set(model, name, buffer.to(place))
    teach_transformers(model)
    return model.eval()


def _layer(layer: Wanted, file: str, tensors: Mapping[str, Tensor], bias: Tensor | None) -> QuantizedLinear:
    """What takes the place of a layer, from its tensors in the files."""
    group, dtype = layer.group, next(layer.module.parameters()).dtype
    with prefixed(f"{file}: "):
        fixed = input_from_disk(tensors, group.activations, dtype) if group.static else (None, None)
        own = {leaf: tensor for leaf, tensor in tensors.items() if leaf.startswith("weight")}
        weight = from_disk(own, group.weights, layer.shape, dtype)
    return layer.kind.layer(layer.module, weight, bias, group.activations, *fixed).eval()


def _tie(model: nn.Module, plain: Mapping[str, Tensor]) -> None:
    """One tensor again where the model has two names for it; two that the file holds apart stay two if they differ."""
    apart = False
    for second, first in tied(model).items():
        if second in plain and first in plain:
            one, other = model.get_parameter(first), model.get_parameter(second)
            if not torch.equal(one, other):
                apart = True
                continue
        elif first not in plain and second in plain:
            first, second = second, first
        elif first not in plain:
            apart = True  # quantized by itself
            continue
        module, _, leaf = second.rpartition(".")
        if not isinstance(model.get_submodule(module), QuantizedLinear):
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))
        else:
            apart = True
    if apart:
        model.config.tie_word_embeddings = False


def _own(tensor: Tensor, place: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of its own: what is mapped from a file changes, or ends the process, when the file does."""
    moved = tensor.to(place, dtype or tensor.dtype)
    return moved.clone() if moved is tensor else moved


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _generation(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if not (folder / GENERATION).exists():
        return
    read_json(folder / GENERATION)  # that it is one
    with wrapped(f"{folder / GENERATION} is not understood"):
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
