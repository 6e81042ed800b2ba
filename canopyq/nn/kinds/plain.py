"""Modules with one weight: linear layers, GPT-2's Conv1D, embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.kinds.base import Kind, own_tensors
from canopyq.nn.linear import QuantizedLinear


class Linear(Kind):
    """nn.Linear, and of its subclasses those that do the same with their weight."""

    def fits(self, module: nn.Module) -> bool:
        own = type(module)
        same = isinstance(module, nn.Linear) and (own.forward is nn.Linear.forward or own.__name__ == "FalconLinear")
        return same and "weight" in own_tensors(module) and not hasattr(module, "parametrizations")


class Conv1D(Kind):
    """GPT-2's: a linear layer with its weight transposed."""

    transposed = True

    def fits(self, module: nn.Module) -> bool:
        return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        return {"": ("weight", tensors["weight"].t())}


class Embedding(Kind):
    """Looks rows up as they are, or as transformers' ``…ScaledWordEmbedding`` times ``embed_scale``. Other subclasses
    of nn.Embedding, such as OPT's positions, do something else with their input."""

    is_linear = False
    multiplies = False
    config_class = "Embedding"

    def fits(self, module: nn.Module) -> bool:
        scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
        return isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or scaled) and module.max_norm is None

    def layer(self, module: nn.Module, *packed) -> QuantizedLinear:
        return QuantizedEmbedding.like(module, packed[0])
