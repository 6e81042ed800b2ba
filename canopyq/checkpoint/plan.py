"""What streaming quantization is going to do: every output tensor and every byte, known before a weight is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from canopyq.checkpoint.config import read_config, write_config
from canopyq.checkpoint.derived import converted, dequantized, experts_apart
from canopyq.checkpoint.files import Checkpoint
from canopyq.checkpoint.groups import Layer, cache_note, grouped, ignored
from canopyq.checkpoint.headers import TensorInfo
from canopyq.checkpoint.layout import disk_format, expected
from canopyq.checkpoint.names import Names, foreign_names, names_of, part_shape, without_place
from canopyq.checkpoint.readers import readers
from canopyq.checkpoint.skeleton import build, read_model_config
from canopyq.errors import CanopyError, and_more, by_reason, prefixed, shown
from canopyq.memory import human
from canopyq.nn.fused_linear import fused
from canopyq.nn.targets import few, find_targets
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe

SHARD_BYTES = 2_000_000_000  # an interrupted run loses at most the file that it was writing
WORK = 64_000_000  # bytes that quantizing a chunk takes, and the tables around it

Announced = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # output name -> dtype, shape


@dataclass(frozen=True)
class Step:
    """One tensor of the source, and what is written for it.

    Attributes:
        name: of the tensor in the source.
        layer: the quantized layer whose weight it is; None: the tensor is copied as it is.
        together: names of the tensors whose layers a server computes as one, itself among them; only for formats that
            have a global scale, which those share. Else empty.
        outputs: name -> (dtype, shape). A scale's dtype may turn out to be another one of the same width.
    """

    name: str
    file: Path
    info: TensorInfo
    layer: Layer | None
    outputs: Announced
    together: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""
        return _shape(self.info, self.layer)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.outputs.values())


@dataclass(frozen=True)
class Plan:
    """All steps, by the file that they are written to.

    Attributes:
        shards: file name -> its steps, in the order of the source.
        kept: module -> why it stays as it is.
        dropped: tensors of the source for which the model has no place.
        config: the ``quantization_config``.
        share: of the linear parameters that will be quantized; embeddings and what the recipe keeps do not count.
    """

    source: Checkpoint
    recipe: Recipe
    shards: dict[str, list[Step]]
    kept: dict[str, str]
    dropped: list[str]
    config: dict
    share: float

    @property
    def steps(self) -> list[Step]:
        return [step for steps in self.shards.values() for step in steps]

    @property
    def quantized(self) -> list[Step]:
        return [step for step in self.steps if step.layer is not None]

    @property
    def bytes_before(self) -> int:
        """Of all tensors of the source."""
        return self.source.nbytes

    @property
    def bytes_after(self) -> int:
        """Of all tensors that are written."""
        return sum(step.nbytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """Memory that the work takes at most: the largest linear weight, what becomes of it, and room to work."""
        whole = 12 if self.recipe.weights.granularity.kind == "tensor" else 0  # then nothing is done in chunks

        def needed(step: Step) -> int:
            turned = step.info.nbytes if step.layer.kind.transposed else 0
            making = self.source.room(step.name)
            return step.info.nbytes + making + turned + 2 * step.nbytes + whole * torch.Size(step.info.shape).numel()

        return WORK + max(map(needed, self.quantized))

    def __str__(self) -> str:
        weights = sum(torch.Size(step.info.shape).numel() for step in self.quantized)
        bits = 8 * sum(step.nbytes for step in self.quantized) / weights
        lines = [
            f"{self.recipe.name}: {len(self.quantized)} weights will be quantized{few(self.share, ',')}, "
            f"{bits:.3f} bits per weight; tensors {human(self.bytes_before)} -> {human(self.bytes_after)} in "
            f"{_files(len(self.shards))}"
        ]
        lines += [f"  kept: {line}" for line in by_reason(self.kept)]
        if self.dropped:
            lines.append(f"  left out: {and_more(self.dropped)} (the model has no place for it)")
        lines.append(f"  memory: at most {human(self.peak_bytes)} on top of what Python and torch take")
        shapes = {step.layer.name: step.shape for step in self.quantized}
        for tool, verdict in readers(read_config(self.config), shapes, self.source.config).items():
            lines.append(f"  {tool} will load it: {verdict}")
        if self.recipe.cache is not None:
            lines.append(f"  note: {cache_note(self.recipe.cache)}")
        return "\n".join(lines)


def _files(count: int) -> str:
    return "one file" if count == 1 else f"{count} files"


def make_plan(source: Checkpoint, recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> Plan:
    """What to do with every tensor of ``source``.

    Raises:
        CanopyError: for a recipe that the format cannot hold or that does not fit a layer, a model that transformers
            does not know or that is quantized otherwise than in FP8 or MXFP4, and tensors that are not those of the
            model.
    """
    if shard_bytes < 1:
        raise CanopyError(f"files of {shard_bytes} bytes hold nothing; use {SHARD_BYTES:,}")
    if recipe.exceptions:
        raise CanopyError(f"{recipe.name} quantizes some layers otherwise; use cq.quantize_ and cq.save")
    if recipe.static:
        raise CanopyError(
            f"{recipe.name} needs its activations calibrated, which takes the whole model in memory: load it, use "
            "quantize_(model, recipe, calibration=…) and save"
        )
    disk_format(recipe.weights, recipe.activations)  # says at once what the format cannot hold
    source = dequantized(source)
    model = meta_model(source)
    files = names_of(model)
    targets, kept, share = find_targets(model, recipe)
    source = source.renamed(foreign_names(model, files, source.tensors))
    source = converted(source, model, files)
    dropped = _match(source, model, files)
    source = experts_apart(source, targets, files)
    layers: dict[str, Layer] = {}
    tensors: dict[str, str] = {}
    for target in targets:
        name = files.of_layer(target.name)
        tensor = f"{name}.weight" if target.part else files.of(target.tensor)[0]
        if tensor not in source.tensors:
            raise CanopyError(
                f"{target.name} is a {type(target.module).__name__} that the files do not hold as {tensor} of its "
                "own; add it to the recipe's ignore list (--ignore), or load the model and use quantize_"
            )
        if not target.kind.multiplies and _shared(target.module, model):
            raise CanopyError(
                f"{target.name} and the output head are one tensor in the files, and quantized they are two; load the "
                "model and use quantize_, or leave +embed out"
            )
        inputs = recipe.activations if target.kind.multiplies else None
        tensors[target.name] = tensor
        layers[tensor] = Layer(name, target.kind, recipe.weights, inputs, static=False)
    config = write_config(grouped(layers.values()), ignored(model, layers.values(), files))
    order = sorted(source.tensors.items(), key=lambda item: (str(item[1][0]), item[1][1].start, item[0]))
    together = {}
    if recipe.weights.format.has_global_scale:
        together = {tensors[name]: tuple(map(tensors.get, names)) for name, names in fused(tensors).items()}
    steps = [
        Step(name, file, info, layers.get(name), _outputs(name, info, layers.get(name)), together.get(name, ()))
        for name, (file, info) in order
        if name not in dropped
    ]
    return Plan(source, recipe, _name_shards(list(_group(steps, shard_bytes))), kept, dropped, config, share)


def meta_model(source: Checkpoint) -> nn.Module:
    """The transformers model that config.json describes, in float32 on the meta device: shapes and names, no memory.

    Raises:
        CanopyError: if transformers cannot build it without running code from the folder.
    """
    config = read_model_config(source.folder, source.config, len(source.tensors))
    most = source.nbytes * (1 if source.quantization is None else 2)  # of four bits at least
    return build(config, torch.float32, most=most, tensors=len(source.tensors))


def _shared(embedding: nn.Module, model: nn.Module) -> bool:
    """Whether another module has the weight of an embedding too."""
    return any(m is not embedding and m._parameters.get("weight") is embedding.weight for m in model.modules())


def _match(source: Checkpoint, model: nn.Module, files: Names) -> list[str]:
    """Raise unless the source holds the model's tensors. Returns the names that it holds beyond those."""
    state = set(model.state_dict())
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[tuple, list[str]] = {}
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in held:
        if name in state:
            for part, file in enumerate(files.of(name)):
                shapes[file] = part_shape(tensor, len(files.of(name)))
                aliases.setdefault((id(tensor), part), []).append(file)
    cure = "load it with transformers and use quantize_, or write it again with this version's save_pretrained"
    dropped = []
    for name, (file, info) in source.tensors.items():
        if name not in shapes:
            dropped.append(name)
        elif info.shape != shapes[name]:
            raise CanopyError(f"{file}: {name} is {info.shape}, by config.json it has to be {shapes[name]}; {cure}")
    for names in aliases.values():
        if not any(name in source.tensors for name in names):
            raise CanopyError(f"{source.folder} lacks {shown(names[0])}, which {type(model).__name__} needs; {cure}")
    if unknown := without_place(model, dropped):
        warnings.warn(f"{type(model).__name__} has no place for {and_more(unknown)}; left out", stacklevel=4)
    return dropped


def _shape(info: TensorInfo, layer: Layer) -> tuple[int, int]:
    return info.shape[::-1] if layer.kind.transposed else info.shape


def _outputs(name: str, info: TensorInfo, layer: Layer | None) -> Announced:
    if layer is None:
        return {name: (info.torch_dtype, info.shape)}
    shape = _shape(info, layer)
    with prefixed(f"{layer.name}: "):
        layer.weights.granularity.check(shape)
        # One row tells the dtype of a scale and whether groups fit, and takes no time.
        probe = quantize(torch.ones(1, shape[1], dtype=info.torch_dtype), layer.weights).scale.dtype
        wanted = expected(layer.weights, shape, disk_format(layer.weights, layer.activations))
    return {
        f"{layer.name}.{part}": (probe if part == "weight_scale" else dtypes[0], shape)
        for part, (dtypes, shape) in wanted.items()
    }


def _group(steps: list[Step], most: int) -> Iterator[list[Step]]:
    """Runs of steps whose outputs fill a file of at most ``most`` bytes, or that hold one larger tensor."""
    group: list[Step] = []
    size = 0
    for step in steps:
        if group and size + step.nbytes > most:
            yield group
            group, size = [], 0
        group.append(step)
        size += step.nbytes
    yield group


def _name_shards(groups: list[list[Step]]) -> dict[str, list[Step]]:
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
