"""What each GPU generation has kernels for.

The thresholds are those of vLLM's table "Supported Hardware" (docs.vllm.ai, version 0.14): weight-only kernels (Marlin)
from Ampere (8.0), INT8 activations from Turing (7.5) to Hopper (9.0), FP8 from Ada (8.9). INT8 activations end at
Hopper: the table does not list Blackwell, and vLLM's page on INT8 W8A8 advises FP8 there.
Group sizes are those of Marlin in vLLM (``MARLIN_SUPPORTED_GROUP_SIZES``).
"""

from __future__ import annotations

import re

from canopyq.errors import unknown
from canopyq.formats import FloatFormat, IntFormat
from canopyq.scheme import Recipe

GPUS = {"cpu": 0.0, "v100": 7.0, "t4": 7.5, "a100": 8.0, "a10": 8.6, "a40": 8.6, "rtx3090": 8.6, "l4": 8.9, "l40s": 8.9,
        "rtx4090": 8.9, "h100": 9.0, "h200": 9.0, "gh200": 9.0, "b200": 10.0, "rtx5090": 12.0}  # fmt: skip


def find_capability(gpu: str | float) -> float:
    """The compute capability that a GPU's name, ``"sm_89"`` or ``8.9`` stands for; 0 for a CPU.

    Raises:
        CanopyError: for a GPU that is not known, with the nearest that are.
    """
    key = re.sub(r"[\s_]|(?<=\w)-", "", str(gpu).lower()).removeprefix("nvidia")
    if key in GPUS:
        return GPUS[key]
    if match := re.fullmatch(r"sm(\d{2,3})a?", key):
        key = f"{match.group(1)[:-1]}.{match.group(1)[-1]}"
    if re.fullmatch(r"\d{1,2}(\.\d)?", key) and 5 <= float(key) < 20:
        return float(key)
    raise unknown("GPU", gpu, GPUS, more=", or a compute capability such as 8.9 or sm_89")


def refuse(recipe: Recipe | None, cache: str | None, capability: float | None) -> str | None:
    """Why a GPU of this capability has no kernel for a recipe and a cache; None if it has, or is not known."""
    if capability is None:
        return None
    if recipe is None:
        needed, what = (8.0, "bfloat16 arithmetic") if capability else (0.0, "")
    elif recipe.activations is not None and isinstance(recipe.activations.format, FloatFormat):
        needed, what = 8.9, "FP8 tensor cores"
    elif recipe.activations is not None:
        if capability >= 10:
            return f"vLLM has no INT8 kernels for compute capability {capability}; FP8 takes their place"
        needed, what = (7.5, "INT8 tensor cores") if capability else (0.0, "")
    elif capability and (not isinstance(recipe.weights.format, IntFormat) or recipe.weights.format.bits not in (4, 8)):
        return f"no GPU kernel reads {recipe.weights.format.name} weights"
    else:
        needed, what = (8.0, "the weight-only kernels") if capability else (0.0, "")
    if cache == "kv-fp8" and needed < 8.9:
        needed, what = 8.9, "FP8 caches"
    if capability >= needed:
        return None
    return f"{what} need compute capability {needed}, " + (f"and this is {capability}" if capability else "not a CPU")


def remarks(recipe: Recipe | None, cache: str | None, capability: float | None, batch: int) -> list[str]:
    """What to know of the speed of a recipe."""
    said = []
    weight_only = recipe is not None and recipe.activations is None
    if weight_only and batch >= 32:
        said.append(
            f"batch {batch}: weight-only recipes save reading, not arithmetic, and lose their lead as the batch grows; "
            "FP8 (compute capability 8.9 and newer) or W8A8 also save arithmetic"
        )
    if recipe is not None and recipe.activations is not None and capability is None:
        said.append(
            "FP8 needs compute capability 8.9 (Ada, Hopper) or newer"
            if isinstance(recipe.activations.format, FloatFormat)
            else "INT8 needs compute capability 7.5 (Turing) to 9.0 (Hopper); name the GPU with gpu="
        )
    if cache in ("kv8", "kv4", "kv2"):
        said.append(f"+{cache} is a cache of canopyq's; vLLM quantizes its cache to FP8 only")
    group = recipe.weights.granularity.group_size if weight_only else None
    if group not in (None, 32, 64, 128) and capability != 0:
        said.append(f"vLLM's fast kernels (Marlin) read groups of 32, 64 or 128, or whole rows, and none of {group}")
    if weight_only and isinstance(recipe.weights.format, IntFormat) and recipe.weights.format.bits not in (4, 8):
        said.append(f"vLLM has no kernel for {recipe.weights.format.bits}-bit weights; canopyq runs them")
    return said
