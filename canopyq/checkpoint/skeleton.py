"""A transformers model without its weights: every module is there, no parameter takes memory.

Buffers that no checkpoint holds, such as the rotary frequencies, are computed for real. To put the whole model on the
meta device would lose them, and every architecture has its own way to make them again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from canopyq.errors import CanopyError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMPUTED = 2**24  # values that a buffer may have though no file holds them: rotary frequencies, causal masks
_ONE_AT_A_TIME = threading.Lock()


def read_model_config(folder: Path, tensors: int) -> PretrainedConfig:
    """The config of the model in a folder, without its ``quantization_config``.

    Args:
        tensors: how many tensors the checkpoint has. A config with more layers than that is refused before any of
            them is built.

    Raises:
        CanopyError: for a config that transformers does not understand, or foreign code.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 0)
        if type(layers) is not int or not 0 <= layers <= tensors:
            raise CanopyError(f"config.json says {str(layers)[:40]} layers, and the files hold {tensors} tensors")
    except CanopyError:
        raise
    except Exception as error:  # whatever the configuration classes raise
        raise CanopyError(f"{folder / 'config.json'} is no model's config ({one_line(error)}); mend it") from error
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def build(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None, *, most: int | None = None
) -> PreTrainedModel:
    """The causal language model of a config, its parameters on the meta device.

    Args:
        most: values that the checkpoint can hold. A config whose model has a larger tensor is refused before memory is
            taken for it.

    Raises:
        CanopyError: if transformers has no such model, or the config's numbers make no model.
    """
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options).eval()

    try:
        if most is not None:
            with quiet(), torch.device("meta"):
                _refuse_larger(make(), most)
        with quiet(), _parameters_on_meta():
            return make()
    except CanopyError:
        raise
    except Exception as error:  # whatever the model classes raise
        raise CanopyError(f"config.json makes no model ({one_line(error)}); mend it") from error


def _refuse_larger(model: nn.Module, most: int) -> None:
    held = [(name, tensor, most) for name, tensor in model.named_parameters()]
    held += [(name, tensor, most + COMPUTED) for name, tensor in model.named_buffers()]
    for name, tensor, room in held:
        if tensor.numel() > room:
            raise CanopyError(
                f"by config.json {name} has {tensor.numel():,} values, more than the files hold; download both again"
            )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers meanwhile goes to the meta device before anything is written to it."""
    with _ONE_AT_A_TIME:
        register = nn.Module.register_parameter
        builder = threading.get_ident()

        def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and threading.get_ident() == builder and not parameter.is_meta:
                parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                parameter._is_hf_initialized = True  # saves transformers the time of drawing what is not kept
            register(module, name, parameter)

        nn.Module.register_parameter = on_meta
        try:
            yield
        finally:
            nn.Module.register_parameter = register


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter from transformers about a file that canopyq judges itself."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
