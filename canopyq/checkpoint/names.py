"""What the tensors of a model are called in its files.

transformers holds all experts of a layer in two 3-D tensors, while files hold each expert's projections one by one,
and often under other names: Mixtral's ``mlp.experts.gate_up_proj`` is ``block_sparse_moe.experts.0.w1.weight``,
``….0.w3.weight``, ``….1.w1.weight`` … on disk, for transformers as for llm-compressor and vLLM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError, one_line
from canopyq.nn.sites import weight_holders


@dataclass(frozen=True)
class Names:
    """The names in a model's files.

    Attributes:
        tensors: name in the model -> names in the files. Where there are several, each holds an equal part of the
            tensor's rows (all dimensions but the last), in this order.
        layers: name of a quantized expert's projection, ``<experts>.<number>.gate_proj`` -> name in the files.
    """

    tensors: dict[str, tuple[str, ...]]
    layers: dict[str, str]

    def of(self, tensor: str) -> tuple[str, ...]:
        """Where a tensor of the model lies."""
        return self.tensors.get(tensor, (tensor,))

    def of_layer(self, layer: str) -> str:
        """The module, or projection of an expert, as the files name it."""
        if layer in self.layers:
            return self.layers[layer]
        return self.of(f"{layer}.weight")[0].removesuffix(".weight")


def names_of(model: nn.Module) -> Names:
    """The names of a transformers model, asked of transformers itself: it gets numbers to save in place of weights, and
    the name under which each would be written is that of the weight.

    Args:
        model: not quantized; may lie on the meta device.

    Raises:
        CanopyError: if transformers cannot say it of experts that are quantized one by one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    fused = [holder for holder in weight_holders(model) if any(site.part for site in holder.sites)]
    parted = {
        f"{holder.name}.{leaf}": shape
        for holder in fused
        for leaf, shape in holder.kind.parted(holder.module, holder.tensors).items()
    }
    # Numbers that stand for a tensor: two rows for each half of an expert's, which shows whether they alternate.
    shapes = {name: (shape[0], *(2 * n if n > 1 else n for n in shape[1:])) for name, shape in parted.items()}
    state = model.state_dict()
    probes: dict[str, Tensor] = {}
    first = 0
    computed_on = _computed_on(model, state.keys() - shapes.keys())
    for name in (name for name in state if name not in computed_on):
        shape = shapes.get(name, (1,) * state[name].dim())
        probes[name] = torch.arange(first, first + math.prod(shape)).reshape(shape)
        first += probes[name].numel()
    try:
        written = revert_weight_conversion(model, probes)
    except Exception as error:  # whatever a conversion of another shape raises
        if not fused:  # experts that stay unquantized, and whose conversion takes no numbers: the model's own names
            return Names({}, {})
        raise CanopyError(
            f"how {type(model).__name__} is written to files cannot be found out ({one_line(error)}); "
            "checkpoints of it are not written or read yet"
        ) from error
    held = {tuple(numbers.flatten().tolist()): name for name, numbers in written.items()}
    tensors, layers = {}, {}
    for name, numbers in probes.items():
        every = numbers.flatten().tolist()
        if (whole := held.get(tuple(every))) is not None:
            tensors[name] = (whole,)
            continue
        size = math.prod(shapes.get(name, (1,))) // math.prod(parted.get(name, (1,)))
        parts = tuple(held.get(tuple(every[i : i + size]), "") for i in range(0, len(every), size))
        tensors[name] = parts if all(parts) else (name,)
    for holder in fused:
        own = {leaf: probes[f"{holder.name}.{leaf}"] for leaf in holder.tensors}
        split = holder.kind.split(holder.module, own)
        names = {part: held.get(tuple(at.flatten().tolist()), "") for part, (_, at) in split.items()}
        if all(names.values()):  # else files hold them fused too
            layers |= {f"{holder.name}.{part}": file.removesuffix(".weight") for part, file in names.items()}
    return Names(tensors, layers)


def _computed_on(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the names whose tensors transformers cuts, joins or permutes before it writes them: of one number each
    it could not be seen how. Under the model's own name it finds them, too."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = get_model_conversion_mapping(model)
    back = [each.reverse_transform() for each in reversed(conversions) if isinstance(each, WeightConverter)]
    return {name for name in names if any(each.rename_source_key(name)[1] is not None for each in back)}


def foreign_names(model: nn.Module, files: Names, held: Iterable[str]) -> dict[str, str]:
    """Names of a checkpoint's tensors under which transformers would find them though it writes others: name in the
    checkpoint -> the one that it writes. As when it loads, it may rename them, as it does with what older versions
    wrote, and the prefix of the base model (``transformer.`` of GPT-2) may be there or not.

    Args:
        files: of `names_of`.
        held: the names of all tensors of the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    written = {name: files.of(name) for name in model.state_dict()}
    wanted = {file: file for parts in written.values() for file in parts}
    wanted |= {name: parts[0] for name, parts in written.items() if len(parts) == 1}
    left = set(wanted.values()) - set(held)
    renamings = [x for x in get_model_conversion_mapping(model) if not isinstance(x, WeightConverter)]
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in held:
        own = name
        for renaming in renamings:
            own, _ = renaming.rename_source_key(own)
        for each in (own, own.removeprefix(prefix), prefix + own, name.removeprefix(prefix), prefix + name):
            if (new := wanted.get(each)) in left:
                found[name] = new
                left.remove(new)
                break
    return found


def without_place(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names, for which the model has no tensor, that say something: not what it computes anew, which older
    files hold, nor what its class says that it ignores."""
    computed = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ()))
    return [name for name in names if not any(re.search(pattern, name) for pattern in computed)]


def tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one by a second name -> that other one's name, as the model's config has it."""
    names = getattr(model, "all_tied_weights_keys", None)
    return dict(names) if isinstance(names, dict) else {}


def part_shape(tensor: Tensor, parts: int) -> tuple[int, ...]:
    """The shape of each part of a tensor that lies in the files in several; see `Names.tensors`."""
    return tuple(tensor.shape) if parts == 1 else (tensor.shape[:-1].numel() // parts, tensor.shape[-1])
