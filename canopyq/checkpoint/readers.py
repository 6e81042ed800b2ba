"""Which other tools load a checkpoint, and the known bugs in the way.

transformers was tried (5.23, with compressed-tensors 0.20); of vLLM the source was read (August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping

from canopyq.checkpoint.config import Group, Quantization
from canopyq.checkpoint.layout import PACKED

Shapes = Mapping[str, tuple[int, int]]  # quantized module -> (N, K)

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM computes these in one multiplication
YES = "yes, with the compressed-tensors package"
DEQUANTIZE = "only with quantization_config=CompressedTensorsConfig(dequantize=True)"


def readers(quantization: Quantization, quantized: Shapes) -> dict[str, str]:
    """Tool -> whether it loads the checkpoint ("yes", "no: …", or how)."""
    groups = quantization.groups
    ragged = _ragged(quantization, quantized)
    transformers = YES
    if ragged:
        transformers = f"no: {ragged}"
    elif any(map(_packs_zero_points, groups)):
        transformers = DEQUANTIZE
        if len({group.format for group in groups}) > 1:
            transformers = "no: zero points need dequantize=True, and that fails on several formats"
    reason = next((why for group in groups if (why := _vllm(group))), None) or ragged or _fused(quantization, quantized)
    return {"transformers": transformers, "vLLM": "yes, by its source" if reason is None else f"no: {reason}"}


def notes(quantization: Quantization) -> tuple[str, ...]:
    """What to know before relying on the checkpoint elsewhere."""
    found = ["transformers turns all weights into dense 16-bit ones at the first forward; canopyq keeps them packed"]
    if any(map(_packs_zero_points, quantization.groups)):
        found.append(
            "transformers 5.23 with compressed-tensors 0.20 fails on packed zero points (size mismatch on "
            "weight_zero_point) unless dequantize=True"
        )
    if len({group.format for group in quantization.groups}) > 1:
        found.append("transformers 5.23 fails with dequantize=True on groups of different formats")
    return tuple(found)


def _packs_zero_points(group: Group) -> bool:
    weights = group.weights
    return group.format == PACKED and not weights.symmetric and weights.granularity.kind != "tensor"


def _ragged(quantization: Quantization, quantized: Shapes) -> str | None:
    for module, (_, k) in quantized.items():
        group = quantization.group_of(module)
        size = group.weights.granularity.group_size if group else None
        if size and k % size:
            return f"groups of {size} leave a rest in the {k} inputs of {module}"
    return None


def _vllm(group: Group) -> str | None:
    weights, kind = group.weights, group.weights.granularity.kind
    if group.format == PACKED and weights.format.bits not in (4, 8):
        return f"{weights.format.bits}-bit weights have no kernel"
    if group.format == PACKED and kind == "tensor":
        return "packed weights need a scale per group or channel"
    if group.format == PACKED and group.activations is not None:
        return "4-bit weights with quantized activations run on few machines"
    if group.format != PACKED and kind == "group":
        return f"{group.format} weights need a scale per channel or tensor"
    if group.format != PACKED and not weights.symmetric:
        return "W8A8 needs symmetric weights"
    return None


def _fused(quantization: Quantization, quantized: Shapes) -> str | None:
    modules: dict[tuple[str, tuple[str, ...]], set] = {}
    for names in FUSED:
        for module in quantized:
            parent, _, leaf = module.rpartition(".")
            if leaf in names:
                modules.setdefault((parent, names), set()).update(
                    quantization.group_of(f"{parent}.{name}") for name in names
                )
    for (parent, names), groups in modules.items():
        if len(groups) > 1:
            return f"{', '.join(names)} of {parent} are fused there and have to be quantized alike"
    return None
