"""What a checkpoint has to hold, by the model that its config.json describes and the groups of its quantization."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from canopyq.checkpoint.config import Group, Quantization
from canopyq.checkpoint.files import Checkpoint
from canopyq.checkpoint.names import Names
from canopyq.errors import CanopyError
from canopyq.nn.embedding import is_embedding
from canopyq.nn.experts import expert_weights
from canopyq.nn.targets import linear_kind


@dataclass(frozen=True)
class Wanted:
    """A quantized weight, and what becomes of it.

    Attributes:
        layer: its name in the model: the module's, or for an expert ``<module>.<number>.<projection>``.
        module: what holds the weight in a model that is not quantized.
        kind: ``"linear"``, ``"conv1d"``, ``"embedding"`` or ``"expert"``.
        shape: (out_features, in_features); of an embedding (vocabulary, hidden).
    """

    layer: str
    module: nn.Module
    kind: str
    shape: tuple[int, int]
    group: Group


def tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one by a second name -> that other one's name, as the model's config has it."""
    names = getattr(model, "all_tied_weights_keys", None)
    return dict(names) if isinstance(names, dict) else {}


def quantized(model: nn.Module, files: Names, quantization: Quantization) -> dict[str, Wanted]:
    """What the config says is quantized, by the names that layers have in the files.

    Raises:
        CanopyError: if that is nothing, a layer of a kind that is never held quantized, or some experts of a layer and
            not all of them.
    """
    found: dict[str, Wanted] = {}
    modules = [(name, module, list(_weights(name, module))) for name, module in model.named_modules()]
    groups = quantization.groups_of(
        {
            files.of_layer(layer): "Embedding" if isinstance(module, nn.Embedding) else "Linear"
            for _, module, weights in modules
            for layer, _, _ in weights
        }
    )
    for name, module, weights in modules:
        own = {}
        for layer, kind, shape in weights:
            file = files.of_layer(layer)
            group = groups[file]
            if group is not None and kind is None:
                raise CanopyError(
                    f"{file} is a {type(module).__name__}; canopyq holds plain nn.Linear and nn.Embedding quantized"
                )
            if group is not None:
                own[file] = Wanted(layer, module, kind, shape, group)
        if own and len(own) < len(weights):
            raise CanopyError(
                f"{len(own)} of {len(weights)} projections of {name} are quantized; canopyq holds all experts of a "
                "layer quantized or none"
            )
        found |= own
    if not found:
        raise CanopyError("quantization_config names no linear layer of this model; mend its targets")
    return found


def _weights(name: str, module: nn.Module) -> Iterator[tuple[str, str | None, tuple[int, int]]]:
    """Layer, kind and shape of every weight of a module that a config can name; the kind is None for layers that do
    more with it than multiply or look up."""
    kind = "embedding" if is_embedding(module) else linear_kind(module)
    if kind == "expert":
        for part, weight in expert_weights(module).items():
            yield f"{name}.{part}", kind, tuple(weight.shape)
    elif kind is not None or isinstance(module, (nn.Linear, nn.Embedding)):
        yield name, kind, tuple(module.weight.t().shape if kind == "conv1d" else module.weight.shape)


def plain(model: nn.Module, files: Names, found: Mapping[str, Wanted], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name in the model -> parameter or buffer, of all that the checkpoint has to hold beside quantized weights."""
    left = dict(model.state_dict(keep_vars=True))
    for wanted in found.values():
        if wanted.kind == "expert":
            module = wanted.layer.rsplit(".", 2)[0]
            left.pop(f"{module}.gate_up_proj", None)
            left.pop(f"{module}.down_proj", None)
        else:
            del left[f"{wanted.layer}.weight"]
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    second = {name: of for name, of in tied(model).items() if name in left}

    def held(name: str) -> bool:
        return all(file in checkpoint.tensors for file in files.of(name))

    for name in list(left):
        optional = not left[name].is_meta and any(re.search(pattern, name) for pattern in may_lack)
        if not held(name) and (optional or (name in second and held(second[name]))):
            del left[name]
    return left


def part_shape(tensor: Tensor, parts: int) -> tuple[int, ...]:
    """The shape of each part of a tensor that lies in the files in several; see `Names.tensors`."""
    return tuple(tensor.shape) if parts == 1 else (tensor.shape[:-1].numel() // parts, tensor.shape[-1])
