"""Which other tools load a checkpoint, and the known bugs in the way.

transformers was tried (5.23, with compressed-tensors 0.20) on a tiny model of every class, and
`tried_by_transformers` tries it on a checkpoint; of vLLM 0.33.0 the source was read, and its own classes were asked
(``tools/servers.py``, docs/serving.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from canopyq.checkpoint.config import Group, Quantization
from canopyq.checkpoint.layout import INT, MXFP4, NVFP4, PACKED
from canopyq.checkpoint.skeleton import quiet
from canopyq.errors import one_line
from canopyq.nn.fused_linear import FUSED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, int]]  # quantized module -> (N, K)
Groups = Mapping[str, Group | None]  # module -> its group

# Families whose code gives layers first values that have no weight while they are packed.
INITIALIZED = (
    "afmoe", "falcon", "gpt_bigcode", "kosmos-2", "longt5", "modernbert", "modernbert-decoder", "modernvbert", "mt5",
    "nanochat", "phi4_multimodal", "pix2struct", "recurrent_gemma", "rwkv", "switch_transformers", "t5", "t5gemma2",
    "udop", "ultravbert", "umt5", "xlstm")  # fmt: skip
MARLIN_GROUPS = (32, 64, 128)
PACKED_ALL = (PACKED, NVFP4, MXFP4)
YES = "yes, by its layout, with the compressed-tensors package"
YES_DENSE = (
    "yes, by its layout, with compressed-tensors 0.18 or newer: older ones pack {} bits another way, and end with an "
    "error"
)
YES_FP4 = f"{YES}, in bfloat16: it decompresses FP4 to nothing else by itself"
DEQUANTIZE = "only with quantization_config=CompressedTensorsConfig(dequantize=True)"
VLLM_YES = "yes, by its source"
VLLM_HUMMING = "yes, by the source of 0.33, on CUDA: of its kernels Humming takes it, and Marlin and Machete do not"
VLLM_NEWER = "yes, by the source of 0.33: older versions keep the head and the embedding unquantized"
# Layers that tensor parallelism splits along their inputs; all others are split along their outputs.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "w2", "dense", "dense_4h_to_h")


def readers(
    quantization: Quantization, quantized: Shapes, config: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Tool -> whether it loads the checkpoint ("yes, …", "no: …", or how), by its layout.

    Args:
        config: the content of config.json.
    """
    types = _model_types(config or {})
    if (expert := next(filter(_is_expert, quantized), None)) is not None and types and not _merged(expert, types):
        family = (config or {}).get("model_type")
        return {
            "transformers": f"no: it does not put the quantized experts of {family} together",
            "vLLM": f"not tried: it may name the experts of {family} otherwise",
        }
    fused = _fused_names(quantized)
    groups = groups_of([*quantized, *(name for names in fused for name in names)], quantization)
    return {
        "transformers": _transformers(quantization, quantized, groups, types),
        "vLLM": _vllm(quantization, quantized, groups, fused),
    }


def _model_types(config: Mapping[str, object]) -> set[str]:
    """Of a model and of its parts."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return {str(part["model_type"]) for part in parts if part.get("model_type")}


def _merged(expert: str, types: set[str]) -> bool:
    """Whether transformers puts experts together that a file holds one by one; others it leaves at random numbers."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    if "llama4_text" in types:  # whose experts it takes apart when they are quantized
        return True
    rules = [rule for each in sorted(types) for rule in get_checkpoint_conversion_mapping(each) or ()]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    return rename_source_key(f"{expert}.weight", renamings, converters)[1] is not None


def tried_by_transformers(folder: Path, model: PreTrainedModel, verdict: str, answer: Callable, most: float) -> str:
    """Whether transformers reads what was written, tried as its ``verdict`` says.

    Args:
        model: what was written.
        answer: gives the answers of a model, and what they are called.
        most: by how much of their norm answers may differ; weights are rounded to 16 bits there.
    """
    import transformers
    from transformers import CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if verdict == DEQUANTIZE else {}
    tried, dtype = f"tried with transformers {transformers.__version__}", next(model.parameters()).dtype
    try:
        with quiet():
            theirs = type(model).from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
            (wanted, kind), (got, _) = answer(model), answer(theirs.to(model.device).eval())
    except Exception as error:  # whatever it raises on what it cannot read
        return f"no: {tried}, which ends with an error ({one_line(error)})"
    if not (off := float((got - wanted).norm() / wanted.norm())) <= most:
        return f"no: {tried}, which gives other answers ({kind} off by {100 * off:.2g} %)"
    how = verdict if options else "yes"
    return f"{how}, {tried}: {kind} differ by at most {float((got - wanted).abs().max()):.2g}"


def notes(quantization: Quantization) -> tuple[str, ...]:
    """What to know before relying on the checkpoint elsewhere."""
    found = [
        "transformers turns all weights into dense 16-bit ones at the first forward, whose answers differ from those "
        "in float32 as bfloat16's do; canopyq keeps them packed"
    ]
    if any(map(_packs_zero_points, quantization.groups)):
        found.append(
            "transformers 5.23 with compressed-tensors 0.20 fails on packed zero points (size mismatch on "
            "weight_zero_point) unless dequantize=True"
        )
    if len({group.format for group in quantization.groups}) > 1:
        found.append("transformers 5.23 fails with dequantize=True on groups of different formats")
    return tuple(found)


def _transformers(quantization: Quantization, quantized: Shapes, of: Groups, types: set[str]) -> str:
    """Why each "no", as it was seen: an error, and only where it says so other answers."""
    groups = quantization.groups
    if any(group.conv1d for group in groups):
        return "no: it has no quantized Conv1D, and the config says so in a key that it refuses"
    if ragged := _ragged(quantized, of):
        return f"no: {ragged}"
    for module in quantized:
        group = of[module]
        if _is_expert(module) and group and group.format == INT:
            return "no: it puts experts together from packed or FP8 weights, not from int-quantized ones"
        if _is_expert(module) and group and group.format == NVFP4:
            return "no: it puts experts together without their global scales, and gives other answers"
        if _is_expert(module) and group and not group.weights.symmetric:
            return "no: it puts experts together without their zero points"
    packs_embedding = any(
        _is_embedding(module) and (group := of[module]) and group.format in PACKED_ALL for module in quantized
    )
    initialized = types & set(INITIALIZED) and any(group.format in PACKED_ALL for group in groups)
    if not packs_embedding and not initialized and not any(map(_packs_zero_points, groups)):
        if any(group.format in (NVFP4, MXFP4) for group in groups):
            return YES_FP4
        dense = {group.weights.format.bits for group in groups if group.format == PACKED} - {2, 4, 8}
        return YES_DENSE.format(" and ".join(map(str, sorted(dense)))) if dense else YES
    what = "a packed embedding" if packs_embedding else "its own code" if initialized else "zero points"
    verb = "need" if what == "zero points" else "needs"
    if len({group.format for group in groups}) > 1:
        return f"no: {what} {verb} dequantize=True, and that fails on several formats"
    if len({(group.weights.format, group.weights.granularity) for group in groups}) > 1:
        return f"no: {what} {verb} dequantize=True, and that takes the first group's scheme for every layer"
    return DEQUANTIZE


def _packs_zero_points(group: Group) -> bool:
    weights = group.weights
    return group.format == PACKED and not weights.symmetric and weights.granularity.kind != "tensor"


def _is_expert(module: str) -> bool:
    return re.search(r"\.experts\.(mlp\.)?\d+\.|\.(input|output)_linear\.\d+$", module) is not None


def _is_embedding(module: str) -> bool:
    """By its name alone: headers do not say what a weight is for."""
    return re.search(r"embed|wte$|wpe$", module.rpartition(".")[2]) is not None


def groups_of(modules: Iterable[str], quantization: Quantization) -> Groups:
    """The groups of modules of which only the names are known."""
    return quantization.groups_of({name: "Embedding" if _is_embedding(name) else "Linear" for name in modules})


def _ragged(quantized: Shapes, of: Groups) -> str | None:
    for module, (_, k) in quantized.items():
        group = of[module]
        size = group.weights.granularity.group_size if group else None
        if size and k % size:
            return f"groups of {size} leave a rest in the {k} inputs of {module}"
    return None


def _vllm(quantization: Quantization, quantized: Shapes, of: Groups, fused: list[tuple[str, ...]]) -> str:
    modules = {module: group for module in quantized if (group := of[module])}
    reasons = [_no_kernel(group) for group in quantization.groups]
    reasons += [_ragged(quantized, of), _fused(fused, of)]
    reasons += [_no_expert(group) for module, group in modules.items() if _is_expert(module)]
    reasons += [_no_embedding(group) for module, group in modules.items() if _is_embedding(module)]
    if (reason := next(filter(None, reasons), None)) is not None:
        return f"no: {reason}"
    if any(_is_embedding(module) or module.rpartition(".")[2] == "lm_head" for module in quantized):
        return VLLM_NEWER
    return VLLM_HUMMING if any(map(_needs_humming, quantization.groups)) else VLLM_YES


def _needs_humming(group: Group) -> bool:
    weights = group.weights
    odd = weights.format.bits not in (4, 8) or weights.granularity.group_size not in (None, *MARLIN_GROUPS)
    return group.format == PACKED and odd


def _no_kernel(group: Group) -> str | None:
    weights, kind = group.weights, group.weights.granularity.kind
    if group.format in (NVFP4, MXFP4):
        return "it turns the weights of a Conv1D unless they are packed integers" if group.conv1d else None
    if group.format == PACKED and kind == "tensor":
        return "packed weights need a scale per group or channel"
    if group.format == PACKED and (inputs := group.activations) is not None:
        if inputs.format.bits not in (4, 8) or not inputs.symmetric or group.static:
            return "packed weights take inputs of 4 or 8 bits, symmetric and by each token's own range"
    if group.format != PACKED and kind == "group":
        return f"{group.format} weights need a scale per channel or tensor"
    if group.format != PACKED and not weights.symmetric:
        return "W8A8 needs symmetric weights"
    if group.conv1d and group.format != PACKED:
        return "it turns the weights of a Conv1D unless they are packed"
    return None


def _no_expert(group: Group) -> str | None:
    if not group.weights.symmetric:
        return "experts need symmetric weights"
    if group.static and group.format != NVFP4:
        return "experts need activations quantized per token"
    size = group.weights.granularity.group_size
    if group.format == NVFP4 or size in (None, *MARLIN_GROUPS):
        return None
    return f"experts need groups of 32, 64 or 128, not {size}"


def _no_embedding(group: Group) -> str | None:
    weights = group.weights
    if group.format != PACKED or not weights.symmetric or 32 % weights.format.bits:
        return "an embedding needs packed symmetric weights of 2, 4 or 8 bits"
    return None


def split_over(quantized: Shapes, quantization: Quantization, ranks: int) -> str | None:
    """Why a server cannot split the quantized layers over so many ranks; None if it can.

    vLLM and SGLang give each rank a part of the inputs of `ROW_PARALLEL` layers, of the outputs of all others, and
    refuse a group, or a word of packed codes, that would lie on two ranks.
    """
    groups, found = groups_of(quantized, quantization), {}
    for module, (n, k) in quantized.items():
        if (group := groups[module]) is None or ranks == 1:
            continue
        leaf, weights = module.rpartition(".")[2], group.weights
        by_inputs = leaf in ROW_PARALLEL and not _is_embedding(module)
        whole, side = (k, "inputs") if by_inputs else (n, "outputs")
        size, bits = weights.granularity.group_size, weights.format.bits
        share = whole // ranks
        if whole % ranks:
            reason = f"{whole} {side} are no multiple of {ranks}"
        elif by_inputs and size and share % size:
            reason = f"groups of {size} would straddle ranks of {share} inputs"
        elif group.format == PACKED and share * bits % 32 and (by_inputs or not weights.symmetric):
            reason = f"{share} {side} of {bits} bits fill no whole 32-bit words"
        else:
            continue
        found.setdefault((leaf, reason), module)
    told = [f"{module}: {reason}" for (_, reason), module in found.items()]
    return "; ".join(told) or None


def _fused_names(quantized: Shapes) -> list[tuple[str, ...]]:
    """The modules that vLLM makes one of, if one of them is quantized."""
    pairs = {(module.rpartition(".")[0], names): None for names in FUSED for module in quantized
             if module.rpartition(".")[2] in names}  # fmt: skip
    return [tuple(f"{parent}.{name}" for name in names) for parent, names in pairs]


def _fused(fused: list[tuple[str, ...]], of: Groups) -> str | None:
    for names in fused:
        if len({of[name] for name in names}) > 1:
            leaves = ", ".join(name.rpartition(".")[2] for name in names)
            parent = names[0].rpartition(".")[0]
            return f"{leaves} of {parent} are fused there and have to be quantized alike"
    return None
