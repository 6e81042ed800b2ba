"""`inspect`: what a checkpoint holds, counted from its headers, and which tools will load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from canopyq import checks
from canopyq.checkpoint.config import Group, Quantization, read_config
from canopyq.checkpoint.files import Checkpoint, Reader
from canopyq.checkpoint.headers import TensorInfo, read_json
from canopyq.checkpoint.load import compare, expected, raise_without_place
from canopyq.checkpoint.readers import groups_of, notes, readers, split_over
from canopyq.errors import CanopyError, cut, printable
from canopyq.memory import human
from canopyq.utils import Preformatted

KINDS = {"weight_packed": "codes", "weight": "codes", "weight_scale": "scales", "weight_global_scale": "scales",
         "weight_zero_point": "zero points", "weight_shape": "shapes", "input_scale": "scales",
         "input_global_scale": "scales", "input_zero_point": "zero points"}  # fmt: skip


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
class Inspection(Preformatted):
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
        lines = [f"{self.folder}: {printable(self.model)}, {self.tensors} tensors in {files}, {human(total)}"]
        for group in self.groups:
            activations = f", input {group.activations}" if group.activations else ""
            lines.append(
                f"  {cut(printable(group.name))}: {group.layers} layers {group.format}, {group.scheme}{activations}, "
                f"{group.bits_per_weight:.3f} bits per weight"
            )
        lines += [f"  {kind:<12} {human(count)}" for kind, count in self.bytes.items() if count]
        lines += [f"  {tool:<12} {verdict}" for tool, verdict in self.tools.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def inspect(folder: str | Path, ranks: int = 1) -> Inspection:
    """What a checkpoint holds, and who can load it. Only headers are read, and compared with the model of the config,
    which takes no memory, as `load` does: what that would refuse for more than a value in a tensor is no "yes" here.

    A checkpoint that canopyq cannot load is described too, with the reason.

    Args:
        ranks: over which a server splits each layer (tensor parallelism). From 2 on ``tools`` says whether the groups
            and packed words of these layers can be split so.

    Raises:
        CanopyError: for a folder that holds no checkpoint, damaged files, and a number of ranks below 1.
    """
    checks.count("ranks", ranks, 1)
    checkpoint = Checkpoint(folder)
    given = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    quantization, problem = None, "no: it is not quantized; use transformers"
    if given is not None:
        try:
            quantization = read_config(given)
        except CanopyError as error:
            problem = f"no: {error}"
    sizes = dict.fromkeys(["codes", "scales", "zero points", "shapes", "unquantized"], 0)
    quantized = _quantized(checkpoint)
    held: dict[str, dict[str, TensorInfo]] = {module: {} for module in quantized}
    for name, (_, info) in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        kind = KINDS.get(leaf, "unquantized") if module in quantized else "unquantized"
        sizes[kind] += info.nbytes
        if kind != "unquantized":
            held[module][leaf] = info
    owners: dict[str, list[str]] = {group.name: [] for group in quantization.groups} if quantization else {}
    groups = groups_of(quantized, quantization) if quantization else {}
    for module in quantized if quantization else ():
        if group := groups[module]:
            owners[group.name].append(module)
    found = tuple(
        _group(group, [quantized[module] for module in owners[group.name]],
               sum(info.nbytes for module in owners[group.name] for info in held[module].values()))
        for group in (quantization.groups if quantization else ())
    )  # fmt: skip
    tools = _tools(checkpoint, quantization, quantized) if quantization else {"canopyq": problem}
    if quantization and ranks > 1:
        why_not = split_over(quantized, quantization, ranks)
        tools[f"over {ranks} ranks"] = f"no: {why_not}" if why_not else "yes"
    note, model_type = checkpoint.folder / "canopyq.json", str(checkpoint.config.get("model_type", "unknown model"))
    return Inspection(
        checkpoint.folder,
        cut(model_type),
        len(checkpoint.files),
        len(checkpoint.tensors),
        sizes,
        found,
        quantization.ignore if quantization else (),
        tools,
        notes(quantization) if quantization else (),
        read_json(note, finite=True) if note.exists() else None,
    )


def _quantized(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Module -> (N, K) of every weight that has scales and a shape."""
    found, read = {}, Reader(checkpoint)
    for name in checkpoint.tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        shape: tuple[int, ...] = ()
        if f"{module}.weight_shape" in checkpoint.tensors:
            info = checkpoint.tensors[f"{module}.weight_shape"][1]
            if (info.dtype, info.shape) == ("I64", (2,)):
                shape = tuple(read(f"{module}.weight_shape").tolist())
        elif f"{module}.weight_packed" in checkpoint.tensors:
            info = checkpoint.tensors[f"{module}.weight_packed"][1]
            if info.dtype == "U8" and len(info.shape) == 2:  # two FP4 codes in a byte
                shape = (info.shape[0], 2 * info.shape[1])
        elif f"{module}.weight" in checkpoint.tensors:
            shape = checkpoint.tensors[f"{module}.weight"][1].shape
        if len(shape) == 2 and min(shape) > 0:
            found[module] = shape
    return found


def _tools(
    checkpoint: Checkpoint, quantization: Quantization, quantized: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Tool -> whether it loads the checkpoint. Of files that do not fit their config.json nobody makes the model."""
    others = readers(quantization, quantized, checkpoint.config)
    try:
        wanted = expected(checkpoint, quantization, torch.device("cpu"))
    except CanopyError as error:
        return {"canopyq": f"no: {error}", **others}
    try:
        compare(wanted, checkpoint)
    except CanopyError as error:
        return dict.fromkeys(["canopyq", *others], f"no: {error}")
    try:
        raise_without_place(wanted, checkpoint)
    except CanopyError as error:
        return {"canopyq": f"no: {error}", **others}
    return {"canopyq": "yes", **others}


def _group(group: Group, shapes: list[tuple[int, int]], nbytes: int) -> GroupFound:
    weights = sum(int(n) * int(k) for n, k in shapes)
    range_ = "static" if group.static else "dynamic"
    activations = None if group.activations is None else f"{group.activations} {range_}"
    bits = 8 * nbytes / weights if weights else 0.0
    return GroupFound(group.name, group.format, str(group.weights), activations, len(shapes), weights, bits)
