"""What the public doors ask of what they are given: each question in one place, asked once, before anything is done.

Each function gives the value back, ready to be used, or raises a `CanopyError` that names the parameter, the value and
the cure. What lies behind a door trusts what was asked there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError, cut, shown, unknown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the dtypes that torch computes in
FARTHEST = 1.7e308  # a float ends there


def flag(name: str, value: object) -> bool:
    """True or False: text such as ``"False"`` would count as true."""
    if not isinstance(value, bool):
        raise CanopyError(f"{name}={shown(value)} is neither True nor False; give one of them")
    return value


def count(name: str, value: object, low: int = 0, high: int = 10**9) -> int:
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise CanopyError(f"{name}={shown(value)} is no whole number from {low:,} to {high:,}; give one")
    return int(value)


def number(name: str, value: object, low: float = -FARTHEST, high: float = FARTHEST) -> float:
    """A finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        bounds = "" if (low, high) == (-FARTHEST, FARTHEST) else f" from {low:g} to {high:g}"
        raise CanopyError(f"{name}={shown(value)} is no finite number{bounds}; give one")
    return float(value)


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise CanopyError(f"{name}={shown(value)} is no text; give a str")
    return value


def choice(kind: str, value: object, known: Iterable[str]) -> str:
    """One of the names that exist."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise unknown(kind, value, known)
    return value


def sequence(name: str, value: object, least: int = 0) -> list:
    """The items of a list, or of anything else that gives items, and not too few; text is one thing."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise CanopyError(f"{name}={shown(value)} is no list; put it into one")
    items = list(value)
    if len(items) < least:
        raise CanopyError(f"{name} has {len(items)} items; give {least} or more")
    return items


def layers(name: str, value: object) -> list[tuple[int, int]]:
    """Pairs of in_features and out_features."""
    pairs = [tuple(count(name, size, 1) for size in sequence(name, shape)) for shape in sequence(name, value)]
    for pair in pairs:
        if len(pair) != 2:
            raise CanopyError(f"{name} has {shown(pair)}; give pairs of in_features and out_features")
    return pairs


def function(name: str, value: object) -> Callable:
    if not callable(value) or isinstance(value, type):
        raise CanopyError(f"{name}={shown(value)} cannot be called; give a function")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...], cure: str) -> Any:
    """An object of a class."""
    if not isinstance(value, kind):
        raise CanopyError(f"{name} is {shown(value)}; {cure}")
    return value


def dtype(name: str, value: object, known: tuple[torch.dtype, ...] = FLOATS) -> torch.dtype:
    """One of the dtypes; its name will do."""
    names = {str(each).removeprefix("torch."): each for each in known}
    if isinstance(value, str):
        value = names[choice(name, value, names)]
    if not isinstance(value, torch.dtype) or value not in known:
        raise CanopyError(f"{name}={shown(value)} is none of {', '.join(names)}; use one of them")
    return value


def device(value: object) -> torch.device:
    """A device that torch can put tensors on and read them from."""
    try:
        place = torch.device(instance("device", value, (str, torch.device), "use 'cpu'"))
        torch.empty(1, device=place).tolist()  # the meta device, too, refuses to give values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CanopyError(f"device {shown(str(value))} cannot be used here ({cut(reason)}); use 'cpu'") from None
    return place


def tensor(name: str, x: object) -> Tensor:
    """Floats in a dense tensor that has values: not an empty one, nor one of the meta device."""
    if not isinstance(x, Tensor):
        raise CanopyError(f"{name} is {shown(x)}; give a torch tensor, such as torch.as_tensor(x)")
    if x.dtype not in FLOATS:
        raise CanopyError(f"{name} is {shown(x)}; give float16, bfloat16, float32 or float64, such as x.float()")
    return with_values(name, x)


def with_values(name: str, x: Tensor) -> Tensor:
    """A dense tensor of any dtype that has values."""
    if x.layout != torch.strided or x.is_nested:
        raise CanopyError(f"{name} has the layout {x.layout}; use x.to_dense(), or its parts one by one")
    if x.numel() == 0:
        raise CanopyError(f"{name} is an empty tensor of shape {tuple(x.shape)}; give at least one value")
    if x.is_meta:
        raise CanopyError(f"{name} is a meta tensor of shape {tuple(x.shape)}, without values; load them first")
    return x


def operand(name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor as a kernel reads it: of a shape, in which None stands for any size, a dtype and a device."""
    fits = len(x.shape) == len(shape) and all(due in (None, size) for size, due in zip(x.shape, shape, strict=True))
    if not fits or (x.dtype, x.device) != (dtype, device):
        due = ", ".join("…" if size is None else str(size) for size in shape)
        raise CanopyError(f"{name} is {shown(x)} on {x.device}; it has to be {dtype} ({due}) on {device}")
    return x


def extra(module: str, name: str) -> ModuleType:
    """A module of a package that canopyq runs without, of the extra of this name."""
    package, _, _ = module.partition(".")
    try:
        return import_module(module)
    except ImportError as error:
        raise CanopyError(f"this needs {package}, which is not here ({error}); pip install 'canopyq[{name}]'") from None


def module(name: str, model: object) -> nn.Module:
    return instance(name, model, nn.Module, "give a torch module: load the model first")


def loaded(name: str, model: object) -> nn.Module:
    """A module with values, wherever accelerate keeps them."""
    weights = list(module(name, model).parameters())
    if weights and all(x.is_meta for x in weights) and not any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise CanopyError(f"{name} is {shown(model)} on the meta device, without values; load its weights first")
    return model


def language_model(name: str, model: object) -> nn.Module:
    """A model with values that goes from token ids to the next token, as transformers has them."""
    config = getattr(module(name, model), "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise CanopyError(f"{name} is {shown(model)}, no causal language model; load one by cq.load or transformers")
    return loaded(name, model)


def config(value: Any) -> Any:
    """The text part of a transformers config."""
    if isinstance(value, (type, nn.Module)) or not hasattr(value, "get_text_config"):
        raise CanopyError(f"config is {shown(value)}; a cache is made from a model's config, use model.config")
    return value.get_text_config(decoder=True)


def tokenizer(value: Any) -> Any:
    if isinstance(value, (str, bytes, type)) or not callable(getattr(value, "encode", None)):
        raise CanopyError(f"tokenizer is {shown(value)}, no tokenizer; load the model's own with AutoTokenizer")
    return value


def tokens(name: str, ids: object, model: nn.Module) -> Tensor:
    """Token ids (B, T) that the model knows, no more in a row than its context."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise CanopyError(f"{name} is {shown(ids)}; give token ids (B, T), int64, such as tokenizer(…).input_ids")
    low, high = (int(end) for end in with_values(name, ids).aminmax())
    words = vocabulary(model)
    if low < 0 or (words is not None and high >= words):
        wrong = low if low < 0 else high
        raise CanopyError(
            f"{name} has token {wrong}, which is none of the model's vocabulary of {words}; use its own tokenizer"
        )
    limit = context(model)
    if limit is not None and ids.shape[1] > limit:
        raise CanopyError(f"{name} has {ids.shape[1]} tokens in a row, and the model takes {limit}; shorten it")
    return ids


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model knows; None if it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find else None, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0]
    return getattr(getattr(model, "config", None), "vocab_size", None)


def context(model: Any) -> int | None:
    """How many tokens a model takes, by its config, which may stand in its place; None if it does not say.

    Rotary embedding that is scaled (linear, dynamic, YaRN) reaches ``factor`` times as far as it was trained.
    """
    config = getattr(model, "config", model)
    trained = getattr(config, "max_position_embeddings", None)
    if not trained:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    of_kinds = [each for each in rope.values() if isinstance(each, Mapping)]  # some have one for each kind of layer
    return max(trained, *(_rotary_reach(each, trained) for each in (rope, *of_kinds)))


def _rotary_reach(rope: Mapping, trained: int) -> int:
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return trained
    return int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1))


def answer_length(max_new_tokens: object, ids: list[int], model: nn.Module) -> int:
    """How many tokens may follow a prompt: so many, or what is left of the model's context."""
    most, limit = count("max_new_tokens", max_new_tokens, 1), context(model)
    if limit is not None and len(ids) >= limit:
        raise CanopyError(f"the chat has {len(ids)} tokens now, and the model takes {limit}; start a new chat")
    tokens("the question", torch.tensor([ids]), model)
    return most if limit is None else min(most, limit - len(ids))
