"""Canopy Quantization: what the lessons build by hand, made whole and fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canopyq import advisor, lessons, tutor
    from canopyq.advisor import advise
    from canopyq.calibration.calibrate import Calibration, calibrate
    from canopyq.checkpoint.inspect import inspect
    from canopyq.checkpoint.load import load
    from canopyq.checkpoint.save import save
    from canopyq.errors import CanopyError
    from canopyq.evaluate.generate import fast_generate
    from canopyq.evaluate.harness import harness
    from canopyq.evaluate.quality import compare, examine
    from canopyq.evaluate.text_quality import compare_text, examine_text
    from canopyq.finetune import attach_lora, load_lora
    from canopyq.gguf.export import export_gguf
    from canopyq.gguf.load import load_gguf
    from canopyq.kv_cache import QuantizedCache, StaticQuantizedCache, fuse_attention
    from canopyq.methods.mixed import mixed_precision, sensitivity
    from canopyq.model.quantize import plan, quantize_
    from canopyq.model.report import Plan, Report
    from canopyq.nn.explanation import explain
    from canopyq.nn.linear import QuantizedLinear
    from canopyq.tensor.formats import FORMATS, get_format
    from canopyq.tensor.granularity import Granularity
    from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
    from canopyq.tensor.scheme import RECIPES, Recipe, Scheme

__version__ = "0.1.0"

# Everything loads on first use: torch alone takes seconds, and `canopyq --version` needs none of it.
_WHERE = {
    "": ("advisor", "lessons", "tutor"),
    ".advisor": ("advise",),
    ".calibration.calibrate": ("Calibration", "calibrate"),
    ".checkpoint.inspect": ("inspect",),
    ".checkpoint.load": ("load",),
    ".checkpoint.save": ("save",),
    ".errors": ("CanopyError",),
    ".evaluate.generate": ("fast_generate",),
    ".evaluate.harness": ("harness",),
    ".evaluate.quality": ("compare", "examine"),
    ".evaluate.text_quality": ("compare_text", "examine_text"),
    ".finetune": ("attach_lora", "load_lora"),
    ".gguf.export": ("export_gguf",),
    ".gguf.load": ("load_gguf",),
    ".kv_cache": ("QuantizedCache", "StaticQuantizedCache", "fuse_attention"),
    ".methods.mixed": ("mixed_precision", "sensitivity"),
    ".model.quantize": ("plan", "quantize_"),
    ".model.report": ("Plan", "Report"),
    ".nn.explanation": ("explain",),
    ".nn.linear": ("QuantizedLinear",),
    ".tensor.formats": ("FORMATS", "get_format"),
    ".tensor.granularity": ("Granularity",),
    ".tensor.quantized_tensor": ("QuantizedTensor", "quantize"),
    ".tensor.scheme": ("RECIPES", "Recipe", "Scheme"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "FORMATS", "RECIPES", "Calibration", "CanopyError", "Granularity", "Plan", "QuantizedCache", "QuantizedLinear",
    "QuantizedTensor", "Recipe", "Report", "Scheme", "StaticQuantizedCache", "advise", "advisor", "attach_lora",
    "calibrate", "compare", "compare_text", "examine", "examine_text", "explain", "export_gguf", "fast_generate",
    "fuse_attention", "get_format", "harness", "inspect", "lessons", "load", "load_gguf", "load_lora",
    "mixed_precision", "plan", "quantize", "quantize_", "save", "sensitivity", "tutor",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'canopyq' has no attribute {name!r}")
    module = _MODULES[name]
    return getattr(import_module(f"canopyq{module}"), name) if module else import_module(f"canopyq.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
