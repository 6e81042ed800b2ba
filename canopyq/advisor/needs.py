"""What somebody needs of a model, read from the words that people write: 7B, 8GB, 32k, h100.

What each GPU generation has kernels for: the thresholds are those of vLLM's table "Supported Hardware" (docs.vllm.ai,
version 0.14): weight-only kernels (Marlin) from Ampere (8.0), INT8 activations from Turing (7.5) to Hopper (9.0), FP8
from Ada (8.9). INT8 activations end at Hopper: the table does not list Blackwell, and vLLM's page on INT8 W8A8 advises
FP8 there. Group sizes are those of Marlin in vLLM (``MARLIN_SUPPORTED_GROUP_SIZES``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from canopyq import checks
from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, shown, unknown
from canopyq.memory import MODEL_SHAPES, ModelShape, human, parameter_count
from canopyq.tensor.formats import FloatFormat, IntFormat
from canopyq.tensor.scheme import Recipe

# Lesson 06 divides the damage that a step avoids by the memory that it costs, both in per cent. A priority is the rate
# at which a step is worth taking: "balanced" pays one per cent of memory if at least 10 % of the damage go away.
PRIORITIES = {"accuracy": 1.0, "balanced": 10.0, "compression": 50.0, "throughput": 1.0}
SERVERS = {"vllm": "vLLM"}  # whose formats are known here; canopyq runs whatever it has measured
FLOOR = 0.98  # the share of right answers that is asked for where nobody says
MANY = 10_000  # layers: more than any model has
FARTHEST = 1.25  # a count names the nearest known shape, if the two are at most this factor apart
GPUS = {"cpu": 0.0, "v100": 7.0, "t4": 7.5, "a100": 8.0, "a10": 8.6, "a40": 8.6, "rtx3090": 8.6, "l4": 8.9, "l40s": 8.9,
        "rtx4090": 8.9, "h100": 9.0, "h200": 9.0, "gh200": 9.0, "b200": 10.0, "rtx5090": 12.0}  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """What the advisor is asked for; `parse` makes one from words.

    Attributes:
        model: the name of the shape.
        asked: how the caller named it.
        shape: the model's layers.
        memory: bytes for weights and cache together, or None for no limit.
        context: tokens that each sequence's cache holds; 0 leaves the cache out.
        batch: sequences at a time.
        accuracy: the least share of right answers, between 0 and 1; None: what `advise` asks for by itself.
        capability: of the GPU, such as 8.9; 0 for a CPU; None if it is not known.
        priority: one of `PRIORITIES`.
        server: one of `SERVERS`, which has to run the recipe; None for canopyq itself.
    """

    model: str
    asked: str
    shape: ModelShape
    memory: int | None = None
    context: int = 0
    batch: int = 1
    accuracy: float | None = None
    capability: float | None = None
    priority: str = "balanced"
    server: str | None = None

    @classmethod
    def parse(
        cls,
        model: str | int | float,
        *,
        memory: str | int | float | None = None,
        context: str | int = 0,
        batch: int = 1,
        accuracy: float | None = None,
        gpu: str | float | None = None,
        priority: str = "balanced",
        server: str | None = None,
    ) -> Needs:
        """Needs from words.

        Args:
            model: a name in `MODEL_SHAPES`, a count such as ``"7B"``, which stands for the nearest of them, or a folder
                with a config.json.
            memory: ``"8GB"`` (10^9 bytes), ``"8GiB"`` (2^30), or a number of bytes.
            context: tokens, or ``"32k"``, which is 32 · 1024.
            gpu: a GPU such as ``"h100"``, a compute capability such as ``8.9``, or ``"cpu"``.
            server: ``"vllm"``, or None for canopyq itself.

        Raises:
            CanopyError: for anything that cannot be read, with what can.
        """
        checks.choice("priority", priority, PRIORITIES), checks.count("batch", batch, 1, 10**6)
        accuracy = None if accuracy is None else float(checks.number("accuracy", accuracy, 0, 1))
        if server is not None:
            checks.choice("server", server, SERVERS)
        name, shape = find_shape(model)
        limit = None if memory is None else byte_count(memory)
        capability = None if gpu is None else find_capability(gpu)
        return cls(
            name, _words(model), shape, limit, token_count(context), batch, accuracy, capability, priority, server
        )

    def __str__(self) -> str:
        words = [f"priority {self.priority}"]
        words += [f"at least {100 * self.accuracy:.4g} % right"] if self.accuracy else []
        words.append("no memory limit" if self.memory is None else f"{human(self.memory)} of memory")
        if self.context:
            words.append(f"{self.batch} x {self.context:,} tokens of context")
        if self.capability is not None:
            words.append(f"GPU of compute capability {self.capability}" if self.capability else "on a CPU")
        if self.server is not None:
            words.append(f"served by {SERVERS[self.server]}")
        return ", ".join(words)


def _words(given: object) -> str:
    """What was given as text; numbers as Python writes them."""
    return given.strip() if isinstance(given, str) else shown(given)


def find_shape(model: str | int | float) -> tuple[str, ModelShape]:
    """Name and shape of a model: by its name, by the number of its parameters, or by a folder with its config.

    Raises:
        CanopyError: if no known shape is near.
    """
    key = _words(model)
    if key.lower() in MODEL_SHAPES:
        return key.lower(), MODEL_SHAPES[key.lower()]
    if (as_path(key) / "config.json").is_file():
        from canopyq.checkpoint.headers import read_json
        from canopyq.checkpoint.skeleton import read_model_config

        folder = as_path(key)
        return key, ModelShape.of(read_model_config(folder, read_json(folder / "config.json"), MANY))
    if "/" in key or key.startswith((".", "~")):
        raise CanopyError(
            f"{shown(key)} is no folder with a config.json; name one, or a model such as llama-3.1-8b, or 7B"
        )
    count = parameter_count(model)
    name = min(MODEL_SHAPES, key=lambda known: abs(MODEL_SHAPES[known].parameters - count))
    found = MODEL_SHAPES[name].parameters
    if not 1 / FARTHEST <= found / count <= FARTHEST:
        raise CanopyError(
            f"no known model has about {key} parameters, the nearest is {name} with {found / 1e9:.3g}B; "
            "name a model or a folder with its config.json"
        )
    return name, MODEL_SHAPES[name]


def byte_count(text: str | int | float) -> int:
    """``"8GB"`` is 8 · 10^9 bytes, ``"8GiB"`` 8 · 2^30; a bare number is bytes.

    Raises:
        CanopyError: for anything else, and for less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)\s*([kmgt]?)(i?)b?\s*", _words(text).lower())
    number, unit, binary = match.groups() if match else ("0", "", "")
    count = round(float(number) * (1024 if binary else 1000) ** "_kmgt".find(unit or "_"))
    if count < 1 or (binary and not unit):
        raise CanopyError(f"{shown(text)} is no amount of memory; write it as 8GB, 6.5GiB or 500MB")
    return count


def token_count(text: str | int) -> int:
    """``"32k"`` is 32 · 1024 tokens, as context lengths are named; a bare number is tokens.

    Raises:
        CanopyError: for anything else, and for a fraction of a token.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([km]?)\s*", _words(text).lower().replace("_", ""))
    count = float(match.group(1)) * {"": 1, "k": 1024, "m": 1024**2}[match.group(2)] if match else 0.5
    if count != int(count) or count > 10**9:
        raise CanopyError(f"{shown(text)} is no context length; write it as 32k or 32768")
    return int(count)


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


def misfit(recipe: Recipe | None, shape: ModelShape) -> str | None:
    """Why no fast kernel takes a recipe's groups on a model of this shape, and no server loads them; None if they do:
    Marlin, torch's kernels and compressed-tensors all want a row to be a whole number of groups."""
    size = None if recipe is None else recipe.weights.granularity.group_size
    ragged = next((inputs for inputs in shape.inputs if size and inputs % size), None)
    return ragged and f"groups of {size} do not divide {ragged} inputs: no fast kernel and no server takes them"


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


def not_served(
    recipe: Recipe | None, cache: str | None, server: str | None, capability: float | None = None
) -> str | None:
    """Why a server does not run a recipe and a cache; None if it does, or none was named. On a CPU (a capability of 0)
    group sizes are not those of Marlin."""
    if server is None:
        return None
    if cache not in (None, "kv-fp8"):
        return f"+{cache} is a cache of canopyq's; vLLM has others of its own, by --kv-cache-dtype"
    if recipe is None or recipe.activations is not None:
        return None
    group = recipe.weights.granularity.group_size
    if capability != 0 and group not in (None, 32, 64, 128):
        return f"vLLM's fast kernels (Marlin) read groups of 32, 64 or 128, or whole rows, and none of {group}"
    if isinstance(recipe.weights.format, IntFormat) and recipe.weights.format.bits not in (4, 8):
        bits = recipe.weights.format.bits
        return f"of vLLM's kernels only Humming takes {bits}-bit weights, from version 0.33 on; canopyq runs them"
    return None


def speed_remarks(recipe: Recipe | None, cache: str | None, capability: float | None, batch: int) -> list[str]:
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
    reasons = not_served(None, cache, "vllm"), not_served(recipe, None, "vllm", capability)
    return said + [reason for reason in reasons if reason is not None]
