"""What the notebooks call: quizzes, exercises, guesses, progress, plots and sliders.

lessons.quiz("memory")          lessons.exercise("02-symmetric")        lessons.predict("02-error", "How large …?")
lessons.progress()              lessons.plots.four_panels(q, x)         lessons.explore.bits(x)

And what they import from the rooms of the package, so that a notebook need not know where it lives:

from canopyq.lessons import gptq, human, pack
"""

from importlib import import_module
from typing import Any

from . import canvas, explore, plots
from .capstone import capstone
from .checkpoints import ten_checkpoints
from .exercise import exercise
from .html import table
from .inputs import inputs_of
from .predict import predict
from .progress import progress, strip
from .quiz import quiz
from .recorded import recorded

_ROOMS = {  # loaded when one of its names is asked for
    "canopyq.tensor": ("affine",),  # a module
    "canopyq.advisor": ("GPUS", "PRIORITIES", "ROWS", "Measurement", "Needs", "Option", "advise", "costs", "refuse"),
    "canopyq.evaluate.bench": ("bench",),
    "canopyq.calibration.calibrate": ("calibrate",),
    "canopyq.checkpoint.layout": ("to_disk",),
    "canopyq.evaluate.chat": ("Conversation",),
    "canopyq.nn.hadamard": ("hadamard",),
    "canopyq.kv_cache": ("cache_nbytes",),
    "canopyq.kv_cache.layers": ("QuantizedCacheLayer",),
    "canopyq.kv_cache.quantized_kv": ("QuantizedKV",),
    "canopyq.tensor.formats": ("get_cache_format",),
    "canopyq.lessons.roofline": ("H200", "Machine", "crossover", "linear_work"),
    "canopyq.evaluate.machine": ("describe",),
    "canopyq.memory": ("MODEL_SHAPES", "bytes_held", "cache_bytes", "human", "model_bytes", "tensors_held",
                       "weight_bytes"),
    "canopyq.methods.awq": ("awq_scales",),
    "canopyq.methods.gptq": ("gptq",),
    "canopyq.methods.mixed": ("sensitivity",),
    "canopyq.methods.smoothquant": ("smooth_scales",),
    "canopyq.kernels.cuda.fragments": ("prepack",),
    "canopyq.tensor.packing": ("pack", "unpack", "unpack_bytes"),
    "canopyq.tensor.scheme": ("Recipe",),
    "canopyq.calibration.static_range": ("static_range",),
    "canopyq.evaluate.stats": ("Share", "bootstrap"),
}  # fmt: skip
canvas.sharpen()
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "capstone", "exercise", "explore", "inputs_of", "plots", "predict", "progress", "quiz", "recorded", "strip",
    "table", "ten_checkpoints",
    *_ROOM_OF,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = _ROOM_OF[name]
    return import_module(f"{room}.{name}") if name == "affine" else getattr(import_module(room), name)
