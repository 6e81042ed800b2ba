"""How modules hold weights that can be quantized. A model that holds them otherwise needs one more kind in `KINDS`."""

from __future__ import annotations

from torch import nn

from canopyq.nn.kinds.base import Kind, own_tensors
from canopyq.nn.kinds.experts import Experts, ParallelExperts, SortedExperts, StackedExperts
from canopyq.nn.kinds.plain import Conv1D, Embedding, Linear

__all__ = ["KINDS", "Conv1D", "Embedding", "Experts", "Kind", "Linear", "kind_of", "own_tensors"]

KINDS = (Linear(), Conv1D(), Embedding(), SortedExperts(), ParallelExperts(), StackedExperts(), Experts())


def kind_of(module: nn.Module) -> Kind | None:
    """How a module holds weights that can be quantized; None if it holds none."""
    return next((kind for kind in KINDS if kind.fits(module)), None)
