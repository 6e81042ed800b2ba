"""What a checkpoint has to hold, by the model that its config.json describes and the groups of its quantization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from canopyq.checkpoint.config import Group, Quantization
from canopyq.checkpoint.files import Checkpoint
from canopyq.checkpoint.names import Names
from canopyq.errors import CanopyError
from canopyq.nn.sites import Site, weight_holders


@dataclass(frozen=True, eq=False)
class Wanted(Site):
    """A quantized weight.

    Attributes:
        group: how it is quantized.
    """

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
    left = dict(model.state_dict(keep_vars=True))
    for wanted in found.values():
        left.pop(wanted.tensor, None)  # which holds several experts
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
