"""A transformers model without its weights, from a config that anybody may have written: every module is there, and
none of them takes memory."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError, cut, shown, wrapped

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMPUTED = 2**24  # values that buffers may have though no file holds them: rotary frequencies, causal masks
COUNTS = re.compile(r"(?:^|_)(?:layer|depth|block|expert|head|label|stage|codebook)s?$")  # keys: so many of something
# Keys: from, to. Beyond them roots of negative numbers and quotients by zero make every answer NaN.
WORKING = {r"(?:^|_)(?:eps|epsilon)$": (0, 1), r"(?:^|_)theta$": (1e-3, 1e15), r"^factor$": (1e-6, 1e6)}
# Keys of what every forward is asked for.
FLAGS = re.compile(r"^(?:output_(?:attentions|hidden_states|router_logits)|return_dict|use_cache)$")
MANY = 10_000  # more of anything than a model has, unless its files say so
SPARE = 1000  # parameters that a model may register beside the tensors that the files hold for it


def read_model_config(folder: Path, content: Mapping[str, Any], tensors: int) -> PretrainedConfig:
    """The config of the model in a folder, without its ``quantization_config``.

    Args:
        content: of its config.json.
        tensors: how many tensors the checkpoint has. A config with more layers than that, or more of anything than a
            model has, is refused before anything is made of it: some configs make a list of their layers or labels.
            So is one that names kernels on the hub, which transformers would fetch and run.

    Raises:
        CanopyError: for a config that transformers does not understand, or foreign code.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    _check_numbers(content, max(tensors, MANY))
    if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING:
        raise _code_beside(content.get("model_type"))
    with wrapped(f"{folder / 'config.json'} is no model's config", "mend it"):
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 0)
        if type(layers) is not int or not 0 <= layers <= tensors:
            raise CanopyError(f"config.json says {shown(layers)} layers, and the files hold {tensors} tensors")
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _check_numbers(content: object, most: int, key: str = "") -> None:
    """Raise `CanopyError` for a number of layers, heads and the like, at any depth, that is more than ``most``, and for
    numbers with which every answer is NaN."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name.endswith("_implementation") and "/" in str(value):
                raise CanopyError(
                    f"config.json says {cut(name)}: {shown(value)}, which is code on the hub; do not trust it"
                )
            if FLAGS.search(name) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
                raise CanopyError(f"config.json says {cut(name)}: {shown(value)}, which is true or false; mend it")
            _check_numbers(value, most, name)
    elif isinstance(content, list):
        for value in content:
            _check_numbers(value, most, key)
    elif isinstance(content, (int, float)):
        if COUNTS.search(key) and not content <= most:
            raise CanopyError(f"config.json says {key}: {shown(content)}, more than the files hold; mend it")
        low, high = next((own for keys, own in WORKING.items() if re.search(keys, key)), (-math.inf, math.inf))
        if not low <= content <= high:
            raise CanopyError(f"config.json says {key}: {shown(content)}, which gives no answers; mend it")


def build(
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    *,
    most: int | None = None,
    tensors: int | None = None,
) -> PreTrainedModel:
    """The model of a config, on the meta device: shapes and names, no memory. Its class is the one that the config's
    ``architectures`` names, and else the causal language model.

    Args:
        most: values that the checkpoint can hold. A config whose model has more is refused.
        tensors: that the checkpoint holds. A config whose model has more parameters is refused while it is built.

    Raises:
        CanopyError: if transformers has no such model, or the config's numbers make no model.
    """
    from transformers.initialization import meta_device_safe_creation_ops

    make = _maker(config)
    options = {} if dtype is None else {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    with (
        _understood(),
        quiet(),
        nullcontext() if tensors is None else _few_parameters(tensors),
        torch.device("meta"),
        meta_device_safe_creation_ops(),
    ):
        model = make(config, **options).eval()
    if most is not None:
        _refuse_larger(model, most)
    return model


def _maker(config: PretrainedConfig) -> Callable[..., PreTrainedModel]:
    """What makes the model of a config.

    Raises:
        CanopyError: if the config names a class of another kind of model, or one whose code lies beside the weights.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
    from transformers.models.auto import modeling_auto

    names = config.architectures if isinstance(config.architectures, list) else []
    name = str(next(iter(names), ""))
    named = getattr(transformers, name, None)
    is_class = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if is_class and named.config_class is type(config):
        return named._from_config
    if is_class and MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not named:
        every = (mapping for name, mapping in vars(modeling_auto).items() if re.fullmatch("MODEL_.*MAPPING", name))
        if any(mapping.get(type(config), None) is named for mapping in every):
            return named._from_config
        raise CanopyError(
            f"config.json says that the model is a {name}, and that its model_type is {shown(config.model_type)}, of "
            "which there is no such class; mend it"
        )
    if name and not is_class and getattr(config, "auto_map", None):
        raise _code_beside(name)
    return partial(AutoModelForCausalLM.from_config, trust_remote_code=False)


def _code_beside(name: object) -> CanopyError:
    return CanopyError(
        f"config.json says that the model is {shown(name)}, whose code lies with the files (auto_map), and is never "
        "run; use a model that transformers has"
    )


def compute_buffers(model: PreTrainedModel) -> None:
    """Give the buffers of a model on the meta device, such as rotary frequencies, the values that its class gives them.
    Those to which it gives none, because files hold them, stay where they are.

    As in ``from_pretrained``, the model's own ``initialize_weights`` does it; parameters are said to be ready.
    """
    given: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                given.append((module, name, buffer))
                module._buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with _understood(), quiet():
        model.initialize_weights()
    for module, name, buffer in given:
        value, unset = module._buffers[name], _unset(buffer.dtype)
        if bool((value.isnan() if unset != unset else value == unset).any()) and buffer.dtype != torch.bool:
            module._buffers[name] = buffer


def _unset(dtype: torch.dtype) -> float | int | bool:
    """What a buffer holds before it has a value; of booleans both values may be meant."""
    if dtype == torch.bool:
        return False
    return math.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


@contextmanager
def _understood() -> Iterator[None]:
    with wrapped("config.json makes no model", "mend it"):
        yield


def _refuse_larger(model: nn.Module, most: int) -> None:
    for tensors, room in ((model.named_parameters(), 2 * most), (model.named_buffers(), most + COMPUTED)):
        values = 0
        for name, tensor in tensors:
            values += tensor.numel()
            if tensor.numel() > most + COMPUTED or values > room:
                raise CanopyError(
                    f"by config.json {name} has {tensor.numel():,} values, more than the files hold; mend it"
                )


@contextmanager
def _few_parameters(tensors: int) -> Iterator[None]:
    """Stop a model that is built meanwhile at more parameters than the files can hold tensors for.

    A layer has its parameters in several tensors once it is quantized, never the other way round.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    builder, registered = threading.get_ident(), 0  # the hook sees what other threads build, too

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        registered += threading.get_ident() == builder
        if registered > 2 * tensors + SPARE:
            raise CanopyError(f"config.json makes more parameters than the {tensors} tensors of the files; mend it")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


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
