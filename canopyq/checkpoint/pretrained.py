"""What transformers' own methods do with a quantized model: ``model.save_pretrained`` and all that calls it, as the
Trainer and ``push_to_hub`` do; and ``model.num_parameters``, which would count only what is not packed.

transformers asks a model's ``hf_quantizer`` what to write in place of its state dict. This one gives the tensors that
`save` writes, under the same names, and puts the ``quantization_config`` into the model's config. Folder, shards, main
process and upload stay transformers' own; so does ``state_dict``, which it ignores for every model with a quantizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from canopyq.checkpoint.config import write_config
from canopyq.checkpoint.contents import contents, own_memory, tensors_of
from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.linear import QuantizedLinear


def teach_transformers(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a quantized model, and of every transformers model in it, write what `save` would, and
    ``num_parameters`` count every weight."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = Writer()
            module.num_parameters = partial(num_parameters, module)  # copies of the model get one of their own


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Like transformers' method of this name, but a packed weight counts its out_features · in_features numbers,
    none of them trainable."""
    excluded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    count = sum(
        parameter.numel()
        for parameter in model.parameters()
        if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in excluded)
    )
    for module in () if only_trainable else model.modules():
        if isinstance(module, QuantizedLinear) and not (exclude_embeddings and isinstance(module, QuantizedEmbedding)):
            count += module.out_features * module.in_features
    return count


class Writer(HfQuantizer):
    """What a model that `quantize_` or `load` made carries as ``hf_quantizer``."""

    def __init__(self) -> None:
        super().__init__(QuantizationConfigMixin(QuantizationMethod.COMPRESSED_TENSORS))

    def is_serializable(self, *_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Name in the file -> tensor.

        Raises:
            CanopyError: for a model that no file holds, see `save`.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are written, and transformers finds them
            return None, {}
        held = contents(model)
        model.config.quantization_config = write_config(held.groups, held.ignore)
        found: dict[str, Tensor] = {}
        for tensors in tensors_of(model, held, None):
            found |= tensors
        return own_memory(found), {}
