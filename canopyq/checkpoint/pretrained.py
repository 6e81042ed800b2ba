"""``model.save_pretrained`` of a quantized model, and all that calls it: the Trainer, ``push_to_hub``.

transformers asks a model's ``hf_quantizer`` what to write in place of its state dict. This one gives the tensors that
`save` writes, under the same names, and puts the ``quantization_config`` into the model's config. Folder, shards, main
process and upload stay transformers' own; so does ``state_dict``, which it ignores for every model with a quantizer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from canopyq.checkpoint.config import write_config
from canopyq.checkpoint.contents import contents, own_memory, tensors_of


def teach_save_pretrained(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a quantized model, and of every transformers model in it, write what `save` would."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = Writer()


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
