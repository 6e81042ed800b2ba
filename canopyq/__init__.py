"""Canopy Quantization: what the lessons build by hand, made whole and fast."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from canopyq.calibration import Calibration, calibrate
from canopyq.errors import CanopyError
from canopyq.explain import explain
from canopyq.formats import FORMATS, get_format
from canopyq.granularity import Granularity
from canopyq.linear import QuantizedLinear
from canopyq.methods.mixed import search as mixed_precision
from canopyq.methods.mixed import sensitivity
from canopyq.model import plan, quantize_
from canopyq.report import Plan, Report
from canopyq.scheme import RECIPES, Recipe, Scheme
from canopyq.tensor import QuantizedTensor, quantize

__version__ = "0.1.0"

# What needs transformers, matplotlib or ipywidgets loads on first use, so that `import canopyq` stays quick.
_LATER = {
    "QuantizedCache": "canopyq.kv_cache",
    "StaticQuantizedCache": "canopyq.kv_static",
    "advise": "canopyq.advisor",
    "compare": "canopyq.evaluate",
    "fast_generate": "canopyq.generate",
    "fuse_attention": "canopyq.fused_attention",
    "examine": "canopyq.evaluate",
    "inspect": "canopyq.checkpoint.inspect",
    "load": "canopyq.checkpoint.load",
    "save": "canopyq.checkpoint.save",
}
_MODULES = ("advisor", "lessons", "tutor")

__all__ = [
    "FORMATS", "RECIPES", "Calibration", "CanopyError", "Granularity", "Plan", "QuantizedCache", "QuantizedLinear",
    "QuantizedTensor", "Recipe", "Report", "Scheme", "StaticQuantizedCache", "advise", "advisor", "calibrate",
    "compare", "examine", "explain", "fast_generate", "fuse_attention", "get_format", "inspect", "lessons", "load",
    "mixed_precision", "plan", "quantize", "quantize_", "save", "sensitivity", "tutor",
]  # fmt: skip


def __getattr__(name: str) -> Any | ModuleType:
    if name in _MODULES:
        return import_module(f"canopyq.{name}")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'canopyq' has no attribute {name!r}")
