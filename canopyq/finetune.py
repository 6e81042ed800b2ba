"""LoRA on a quantized model (Hu et al. 2021; on 4-bit weights Dettmers et al. 2023, "QLoRA"), with peft.

The codes stay as they are and frozen; beside each layer two small matrices are trained: y = Q(x) + B·A·x · scaling.
peft knows nothing of `QuantizedLinear`, and lets its callers name a class of theirs that goes around such a layer. All
else, training, saving, merging, is peft's own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from canopyq import checks
from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, shown, wrapped
from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.hadamard import online_hadamard
from canopyq.nn.linear import QuantizedLinear, quantized_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ALL = "all-linear"


def attach_lora(model: nn.Module, config: LoraConfig | None = None, adapter_name: str = "default") -> PeftModel:
    """Put a trainable LoRA adapter on a quantized model; nothing else of it is trainable then.

    ``save_pretrained(folder)`` of the result writes the adapter alone, and `load_lora` puts it on the model again.
    ``merge_and_unload()`` gives the model with its adapter merged into plain, dequantized layers, which `quantize_`
    rounds anew, by a method of the caller's choice, and `save` writes.

    Args:
        model: a causal language model that `quantize_` or `load` made; it is changed in place.
        config: of peft; ``target_modules="all-linear"`` stands for every quantized layer. None takes rank 16 on all.
        adapter_name: of the adapter, where a model has several.

    Raises:
        CanopyError: without peft, for a model that is not quantized, and what peft refuses.
    """
    checks.language_model("model", model), checks.text("adapter_name", adapter_name)
    layers = _layers(model)
    if config is not None and not hasattr(config, "lora_alpha"):
        raise CanopyError(f"config is {shown(config)}; give a peft.LoraConfig, or leave it out")
    peft = _peft()
    if config is None:
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=ALL, task_type="CAUSAL_LM")
    if config.target_modules == ALL:
        config.target_modules = sorted({name.rpartition(".")[2] for name in layers})
    _register(config)
    with wrapped("peft cannot attach this adapter", "change its config"):
        return peft.get_peft_model(model, config, adapter_name)


def load_lora(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put the adapter in a folder, that ``save_pretrained`` wrote, on a quantized model.

    Args:
        model: as it was when the adapter was attached; it is changed in place.
        folder: with adapter_config.json and adapter_model.safetensors.
        trainable: whether training goes on.

    Raises:
        CanopyError: without peft, for a model that is not quantized, a folder without such an adapter, and one that
            does not fit the model.
    """
    checks.language_model("model", model), checks.flag("trainable", trainable)
    _layers(model)
    folder = as_path(folder)
    if not (folder / "adapter_model.safetensors").is_file():  # peft would look for a pickle, and on the hub
        raise CanopyError(f"{folder} holds no adapter_model.safetensors; name a folder that save_pretrained wrote")
    peft = _peft()
    with wrapped(f"the adapter in {folder} does not go on this model"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise CanopyError(f"{folder} holds {shown(config)}, and only LoRA adapters go on quantized layers")
        config.inference_mode = not trainable
        _register(config)
        return peft.PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)


def _peft() -> Any:
    return checks.extra("peft", "finetune")


def _layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    layers = {name: layer for name, layer in quantized_layers(model) if not isinstance(layer, QuantizedEmbedding)}
    if not layers:
        raise CanopyError(f"model is {shown(model)}, which has no quantized layer; quantize it first, by cq.quantize_")
    return layers


def _register(config: LoraConfig) -> None:
    """Tell peft which class of layers goes around ours."""
    config._register_custom_module({QuantizedLinear: _lora_class()})


@cache
def _lora_class() -> type[nn.Module]:
    """The class of layers with adapters; it is made here because it is one of peft's, which need not be installed."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraQuantizedLinear(Linear):
        """A `QuantizedLinear` with LoRA adapters beside it."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int | None, int | None]:
            if isinstance(module, QuantizedLinear):
                return module.in_features, module.out_features
            return super()._get_in_out_features(module)

        def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
            """Where adapters go; they are float32, whatever codes and inputs are."""
            if isinstance(base_layer, QuantizedLinear):
                return base_layer.spec.device, None
            return super()._get_base_layer_device_and_dtype(base_layer)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Dequantize the layer and add the adapters to it: its codes cannot hold the sum."""
            names = check_adapters_to_merge(self, adapter_names)
            if names and isinstance(self.base_layer, QuantizedLinear):
                plain = _dequantized(self.base_layer)
                self.before_merging, self.base_layer = (self.base_layer,), plain  # a tuple is no part of the model
            super().merge(safe_merge, names)

        def unmerge(self) -> None:
            """Take the layer's own codes again."""
            if self.merged:
                (self.base_layer,), self.before_merging = self.before_merging, ()
                self.merged_adapters.clear()

    return LoraQuantizedLinear


def _dequantized(layer: QuantizedLinear) -> nn.Linear:
    """A plain layer of the numbers that the codes stand for; what goes into it is not quantized any more."""
    if online_hadamard(layer) is not None:
        raise CanopyError("a layer whose input is rotated at run time cannot be merged; keep its adapter beside it")
    weight = layer.quantized_weight.dequantize()
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)
