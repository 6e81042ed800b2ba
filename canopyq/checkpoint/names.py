"""What the tensors of a model are called in its files.

transformers holds all experts of a layer in two 3-D tensors, while files hold each expert's projections one by one,
and often under other names: Mixtral's ``mlp.experts.gate_up_proj`` is ``block_sparse_moe.experts.0.w1.weight``,
``….0.w3.weight``, ``….1.w1.weight`` … on disk, for transformers as for llm-compressor and vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError, one_line
from canopyq.nn.experts import is_experts


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

    fused = [name for name, module in model.named_modules() if is_experts(module)]
    probes: dict[str, Tensor] = {}
    given: dict[str, range] = {}  # the numbers that stand for a tensor, one for each part of it
    first = 0
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        count = tensor.shape[0] * (2 if leaf == "gate_up_proj" else 1) if module in fused else 1
        given[name] = range(first, first + count)
        numbers = torch.arange(first, first + count)
        probes[name] = numbers.reshape((tensor.shape[0], -1, 1) if module in fused else (1,) * tensor.dim())
        first += count
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
    for name, numbers in given.items():
        parts = tuple(held.get((number,), "") for number in numbers)
        tensors[name] = parts if all(parts) else (held.get(tuple(numbers), name),)
    for module in fused:
        gate_up, down = tensors[f"{module}.gate_up_proj"], tensors[f"{module}.down_proj"]
        if len(gate_up) == 2 * len(down):  # else files hold them fused too
            for i in range(len(down)):
                projections = {"gate_proj": gate_up[2 * i], "up_proj": gate_up[2 * i + 1], "down_proj": down[i]}
                layers |= {f"{module}.{i}.{name}": file.removesuffix(".weight") for name, file in projections.items()}
    return Names(tensors, layers)
