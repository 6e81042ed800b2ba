"""What a checkpoint of a quantized model holds and how it is called there, for `save` and for ``save_pretrained``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.checkpoint.config import Group
from canopyq.checkpoint.groups import grouped, ignored, layers_of
from canopyq.checkpoint.layout import disk_format, input_to_disk, to_disk
from canopyq.checkpoint.names import Names, names_of, tied
from canopyq.checkpoint.skeleton import build
from canopyq.errors import CanopyError, shown
from canopyq.nn.linear import QuantizedLinear


@dataclass(frozen=True)
class Contents:
    """What is written of a model.

    Attributes:
        groups, ignore: of its ``quantization_config``.
        files: what its tensors are called in files.
        plain: name in the model -> tensor, of what is not quantized.
    """

    groups: list[Group]
    ignore: list[str]
    files: Names
    plain: dict[str, Tensor]


def contents(model: nn.Module) -> Contents:
    """What is to be written of a quantized transformers model.

    Raises:
        CanopyError: for another model, and one that the format cannot hold.
    """
    original = _original(model)
    files = names_of(original)
    layers = layers_of(model, original, files)
    return Contents(grouped(layers), ignored(model, layers, files), files, _plain(model))


def tensors_of(model: nn.Module, held: Contents, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Module by module in the model's order: name in the file -> tensor on the CPU, made when its turn comes.

    Args:
        dtype: of what is not quantized; None leaves every tensor its own.
    """
    plain, files = held.plain, held.files
    scales = dtype or widest(plain.values())
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        found = {}
        if isinstance(module, QuantizedLinear):
            weight = module.quantized_weight
            parts = to_disk(weight, scales, disk_format(module.scheme, module.activations))
            if module.input_scale is not None:
                parts |= input_to_disk(module.input_scale, module.input_zero_point, module.activations, scales)
            found |= {f"{files.of_layer(name)}.{leaf}": tensor for leaf, tensor in parts.items()}
        for leaf in [*module._parameters, *module._buffers]:
            if prefix + leaf in plain:
                found |= _in_files(_cast(prefix + leaf, plain[prefix + leaf], dtype), files.of(prefix + leaf))
        if found:
            yield {file: tensor.detach().cpu().contiguous() for file, tensor in found.items()}


def _in_files(tensor: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A tensor under its name in the files, or its parts under theirs."""
    if len(names) == 1:
        return {names[0]: tensor}
    parts = tensor.reshape(len(names), -1, tensor.shape[-1])
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
        most = float(tensor.abs().max())
        raise CanopyError(f"{name} reaches {most:.3g}, beyond float16; leave dtype out, or use torch.bfloat16")
    return cast


def own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; of those that lie at one place, each but the first is copied: safetensors refuses two names for
    the same bytes."""
    own, seen = {}, set()
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def _original(model: nn.Module) -> nn.Module:
    """The architecture without its weights, as it was before it was quantized."""
    if not hasattr(getattr(checks.loaded("model", model), "config", None), "to_json_string"):
        raise CanopyError(f"model is {shown(model)}; save needs a transformers model")
    config = bare_config(model)
    config.architectures = [type(model).__name__]
    return build(config, torch.float32)


def bare_config(model: nn.Module):
    """A copy of the model's config that says nothing of quantization."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """What is written beside quantized weights, each tied tensor once: under the name of the first of its names."""
    plain = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        held = dict(module._parameters)  # of a quantized layer, its bias
        if not isinstance(module, QuantizedLinear):
            held |= {leaf: x for leaf, x in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
        plain |= {prefix + leaf: tensor.detach() for leaf, tensor in held.items() if tensor is not None}
    for second, first in tied(model).items():
        if second in plain and first in plain and plain[second].data_ptr() == plain[first].data_ptr():
            del plain[second]
    if unset := [name for name, tensor in plain.items() if tensor.is_meta]:
        raise CanopyError(f"{unset[0]} has no values (meta device); load the model before saving it")
    return plain


def widest(tensors) -> torch.dtype:
    """The dtype that config.json names: one that holds every tensor of the file."""
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32
