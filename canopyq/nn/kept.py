"""Why a module keeps its weights as they are, whatever the recipe says."""

from __future__ import annotations

import re
from functools import cache
from inspect import getsource, isfunction

from torch import nn

from canopyq.nn.kinds import kind_of, own_tensors


def reason_kept(model: nn.Module, name: str, module: nn.Module) -> str:
    """Why the weights of a module cannot be quantized; "" if they can."""
    made, kind = type(module).__name__, kind_of(module)
    if (kind is not None or isinstance(module, nn.Embedding)) and (reader := _reader(model, name)):
        return f"{reader} computes with its weight itself; only plain calls are quantized"
    if kind is not None:
        return ""
    if isinstance(module, nn.Embedding):
        return f"a {made}: of embeddings only plain ones and those that scale their rows are quantized"
    if isinstance(module, nn.Linear) and ("weight" not in own_tensors(module) or hasattr(module, "parametrizations")):
        return (
            f"a {made} whose weight is computed anew for each call, as pruning and norms of weights do; make it a "
            "plain one first, by prune.remove, remove_weight_norm or remove_parametrizations"
        )
    if all(weight.dim() < 2 for weight in own_tensors(module).values()):
        return "a norm: a vector, too small to matter"
    return f"a {made}: only plain nn.Linear, GPT-2's Conv1D and experts as transformers holds them are quantized"


def _reader(model: nn.Module, name: str) -> str | None:
    """The class of the module around a layer if its code reads the layer's weight."""
    path, _, leaf = name.rpartition(".")
    around = model.get_submodule(path)
    if getattr(around, "slow_but_exact", None) is False:  # Bloom reads weights only where that is set
        return None
    if name and leaf in _weights_read_by(type(around)):
        return type(around).__name__
    for end in range(path.count(".") + 1):  # a model may read them in its blocks, as RWKV's rescales some
        further = type(model.get_submodule(".".join(path.split(".")[:end])))
        if f"{path.rpartition('.')[2]}.{leaf}" in _weights_read_by(further):
            return further.__name__
    return None


@cache
def _weights_read_by(parent: type[nn.Module]) -> frozenset[str]:
    """The layers whose weight the code of a module reads instead of calling them, as Mamba's mixer does with
    ``dt_proj``: codes in place of the weight would end in an error, or in other numbers. Of layers in its blocks the
    last two parts of the name."""
    found: set[str] = set()
    for name, method in vars(parent).items():
        if isfunction(method) and name not in ("__init__", "_init_weights", "tie_weights"):
            try:
                source = getsource(method)
                found |= set(re.findall(r"\bself\.(\w+)\.weight\b", source))
                found |= set(re.findall(r"\bblock\.(\w+\.\w+)\.weight\b", source))
            except (OSError, TypeError):  # no source at hand
                continue
    return frozenset(found)
