"""`inspect`: what a checkpoint holds, counted from its headers, and which tools will load it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from canopyq.checkpoint.config import Group, Quantization, read_config
from canopyq.checkpoint.files import Checkpoint, read_json
from canopyq.checkpoint.layout import PACKED
from canopyq.errors import CanopyError
from canopyq.memory import human

KINDS = {"weight_packed": "codes", "weight": "codes", "weight_scale": "scales", "weight_zero_point": "zero points",
         "weight_shape": "shapes", "input_scale": "scales", "input_zero_point": "zero points"}  # fmt: skip
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM computes these in one multiplication


@dataclass(frozen=True)
class GroupFound:
    """A group of the config and what the files hold of it.

    Attributes:
        bits_per_weight: all bytes of its layers over their weights: scales and zero points count.
    """

    name: str
    format: str
    scheme: str
    activations: str | None
    layers: int
    weights: int
    bits_per_weight: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        bytes: kind (codes, scales, zero points, shapes, unquantized) -> bytes on disk.
        tools: name -> whether it loads the checkpoint ("yes", "no: …", or how).
        notes: what to know before relying on it.
        made_by: what canopyq noted when it saved the checkpoint, if it did.
    """

    folder: Path
    model: str
    files: int
    tensors: int
    bytes: dict[str, int]
    groups: tuple[GroupFound, ...]
    ignore: tuple[str, ...]
    tools: dict[str, str]
    notes: tuple[str, ...]
    made_by: dict | None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {**vars(self), "folder": str(self.folder), "groups": [vars(group) for group in self.groups],
                "ignore": list(self.ignore), "notes": list(self.notes)}  # fmt: skip

    def __str__(self) -> str:
        total = sum(self.bytes.values())
        files = "1 file" if self.files == 1 else f"{self.files} files"
        lines = [f"{self.folder}: {self.model}, {self.tensors} tensors in {files}, {human(total)}"]
        for group in self.groups:
            activations = f", input {group.activations}" if group.activations else ""
            lines.append(
                f"  {group.name}: {group.layers} layers {group.format}, {group.scheme}{activations}, "
                f"{group.bits_per_weight:.3f} bits per weight"
            )
        lines += [f"  {kind:<12} {human(count)}" for kind, count in self.bytes.items() if count]
        lines += [f"  {tool:<12} {verdict}" for tool, verdict in self.tools.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def inspect(folder: str | Path) -> Inspection:
    """What a checkpoint holds, and who can load it. Only headers are read, and no model is built.

    A checkpoint that canopyq cannot load is described too, with the reason.

    Raises:
        CanopyError: for a folder that holds no checkpoint, or damaged files.
    """
    checkpoint = Checkpoint(Path(folder))
    given = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    quantization, problem = None, "no: it is not quantized; use transformers"
    if given is not None:
        try:
            quantization, problem = read_config(given), None
        except CanopyError as error:
            problem = f"no: {error}"
    sizes = dict.fromkeys(["codes", "scales", "zero points", "shapes", "unquantized"], 0)
    quantized = _quantized(checkpoint)
    held: dict[str, list[int]] = {}
    for name, (_, info) in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        kind = KINDS.get(leaf, "unquantized") if module in quantized else "unquantized"
        sizes[kind] += info.nbytes
        if kind != "unquantized":
            held.setdefault(module, []).append(info.nbytes)
    owners: dict[str, list[str]] = {group.name: [] for group in quantization.groups} if quantization else {}
    for module in quantized:
        if quantization and (group := quantization.group_of(module)):
            owners[group.name].append(module)
        elif problem is None:
            problem = f"no: {module} is quantized, and no group of the config names it"
    found = tuple(
        _group(group, [quantized[module] for module in owners[group.name]],
               sum(sum(held[module]) for module in owners[group.name]))
        for group in (quantization.groups if quantization else ())
    )  # fmt: skip
    note = checkpoint.folder / "canopyq.json"
    return Inspection(
        checkpoint.folder,
        str(checkpoint.config.get("model_type", "unknown model")),
        len(checkpoint.files),
        len(checkpoint.tensors),
        sizes,
        found,
        quantization.ignore if quantization else (),
        {"canopyq": problem or "yes", **_others(quantization, quantized)},
        _notes(quantization),
        read_json(note) if note.is_file() else None,
    )


def _quantized(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Module -> (N, K) of every weight that has scales."""
    found = {}
    for name in checkpoint.tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        if f"{module}.weight_shape" in checkpoint.tensors:
            info = checkpoint.tensors[f"{module}.weight_shape"][1]
            shape = tuple(checkpoint.read(f"{module}.weight_shape").tolist()) if info.shape == (2,) else ()
        else:
            shape = checkpoint.tensors[f"{module}.weight"][1].shape if f"{module}.weight" in checkpoint.tensors else ()
        if len(shape) == 2 and min(shape) > 0:
            found[module] = shape
    return found


def _group(group: Group, shapes: list[tuple[int, int]], nbytes: int) -> GroupFound:
    weights = sum(int(n) * int(k) for n, k in shapes)
    range_ = "static" if group.static else "dynamic"
    activations = None if group.activations is None else f"{group.activations} {range_}"
    bits = 8 * nbytes / weights if weights else 0.0
    return GroupFound(group.name, group.format, str(group.weights), activations, len(shapes), weights, bits)


def _others(quantization: Quantization | None, quantized: dict[str, tuple[int, int]]) -> dict[str, str]:
    """What transformers (5.23, with compressed-tensors 0.20) and vLLM (by its source of August 2026) make of it."""
    if quantization is None:
        return {}
    groups = quantization.groups
    asymmetric = any(group.format == PACKED and not group.weights.symmetric for group in groups)
    mixed = len({group.format for group in groups}) > 1
    transformers = "yes, with the compressed-tensors package"
    if asymmetric and mixed:
        transformers = "no: zero points need dequantize=True, and that fails on several formats"
    elif asymmetric:
        transformers = "only with quantization_config=CompressedTensorsConfig(dequantize=True)"
    reason = next((why for group in groups if (why := _vllm(group))), None) or _fused(quantization, quantized)
    return {"transformers": transformers, "vLLM": "yes, by its source" if reason is None else f"no: {reason}"}


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


def _fused(quantization: Quantization, quantized: dict[str, tuple[int, int]]) -> str | None:
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


def _notes(quantization: Quantization | None) -> tuple[str, ...]:
    if quantization is None:
        return ()
    notes = ["transformers turns all weights into dense 16-bit ones at the first forward; canopyq keeps them packed"]
    if any(group.format == PACKED and not group.weights.symmetric for group in quantization.groups):
        notes.append(
            "transformers 5.23 with compressed-tensors 0.20 fails on packed zero points (size mismatch on "
            "weight_zero_point) unless dequantize=True"
        )
    if len({group.format for group in quantization.groups}) > 1:
        notes.append("transformers 5.23 fails with dequantize=True on groups of different formats")
    return tuple(notes)
