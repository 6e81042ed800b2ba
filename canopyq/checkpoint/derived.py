"""Tensors that a checkpoint does not hold as the model does, each made when it is read: FP8 and MXFP4 as floats, what
transformers makes of several tensors, and experts one by one of a tensor that holds all of a layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from canopyq.checkpoint.files import Checkpoint, Derived
from canopyq.checkpoint.layout import FLOAT, from_disk
from canopyq.checkpoint.names import Names, part_shape
from canopyq.errors import CanopyError, shown, wrapped
from canopyq.nn.sites import Site
from canopyq.tensor.scheme import Scheme

READABLE = ("fp8", "fbgemm_fp8", "mxfp4")  # values of quant_method
SCALES = ("{}_scale_inv", "{}_scale")  # of a tensor in FP8, and beside a layer's weight:
SCALES_BESIDE = (".scale", ".qscale_weight")
OF_INPUTS = (".input_scale", ".activation_scale", ".qscale_act")  # ranges of inputs, which a recipe fixes anew
ROWS = 1024  # that are dequantized at a time


# FP8 and MXFP4 --------------------------------------------------------------------------------------------------------


def dequantized(source: Checkpoint) -> Checkpoint:
    """A checkpoint whose weights are in FP8 or MXFP4, with those as floats of the dtype that its config names; any
    other as it is.

    Raises:
        CanopyError: for weights that are quantized otherwise, and for those that their config does not describe.
    """
    if (config := source.quantization) is None:
        return source
    _check_readable(source, config)
    dtype, derived, gone = _dtype(source.config), {}, []
    for name, (_, info) in source.tensors.items():
        if info.dtype == "F8_E4M3":
            scale = _scale_of(name, source)
            derived[name] = _fp8(name, scale, source, config, dtype)
            gone.append(scale)
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in source.tensors:
            whole = name.removesuffix("_blocks")
            derived[whole] = _mxfp4(name, f"{whole}_scales", source, dtype)
            gone += [name, f"{whole}_scales"]
        elif name.endswith(OF_INPUTS):
            gone.append(name)
    if not derived:
        raise CanopyError(f"{source.folder} says it is quantized and holds no FP8 or MXFP4 weight; mend config.json")
    return source.deriving(derived, gone)


def _check_readable(source: Checkpoint, given: object) -> None:
    config = given if isinstance(given, Mapping) else {}
    method, format = config.get("quant_method"), config.get("format")
    weights = _weights_of_groups(config)
    if method == "compressed-tensors" and format in (FLOAT, "naive-quantized") and weights:
        if all(each.get("type") == "float" for each in weights):
            return
    if method in READABLE:
        return
    how = " ".join(str(part) for part in (method, format) if part)
    raise CanopyError(
        f"{source.folder} is quantized already{f' ({shown(how)})' if how else ''}, and only FP8 and MXFP4 can be a "
        "source: coarser codes have lost too much; start from the original checkpoint"
    )


def _weights_of_groups(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """What compressed-tensors' groups say of weights; nothing of what is no such group."""
    groups = config.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in groups]
    return [each if isinstance(each, Mapping) else {} for each in weights]


def _dtype(config: Mapping[str, object]) -> torch.dtype:
    """The dtype that a config names, of the model or of its text part; bfloat16 if none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            found = getattr(torch, str(part.get("dtype") or part.get("torch_dtype")), None)
            if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
                return found
    return torch.bfloat16


def _scale_of(name: str, source: Checkpoint) -> str:
    candidates = [form.format(name) for form in SCALES]
    candidates += [name.removesuffix(".weight") + leaf for leaf in SCALES_BESIDE if name.endswith(".weight")]
    found = next((each for each in candidates if each in source.tensors), None)
    if found is None:
        raise CanopyError(
            f"{source.folder}: {shown(name)} is FP8 and no {candidates[0]} says its scale; download again"
        )
    return found


def _fp8(name: str, scale: str, source: Checkpoint, config: Mapping[str, object], dtype: torch.dtype) -> Derived:
    """Values times scales: one of them for the tensor, for each row, or for each block of the last two dimensions."""
    shape, found = source.tensors[name][1].shape, source.tensors[scale][1].shape
    rows, columns = _blocks(shape, found, config)
    if rows is None:
        raise CanopyError(
            f"{source.folder}: {shown(scale)} is {found}, which fits no blocks of {shape}; mend config.json"
        )

    def read(at: int | None) -> Tensor:
        whole, factors = source.read(name, at), source.read(scale, None if math.prod(found) == 1 else at)
        if factors.dtype == torch.uint8:  # exponents of two
            factors = torch.exp2(factors.float() - 127)
        before = whole.shape[:-2] if factors.numel() > 1 else (1,) * (whole.dim() - 2)
        factors = factors.float().reshape(*before, -1, factors.shape[-1] if columns else 1)
        out = torch.empty(whole.shape, dtype=dtype)
        for first in range(0, whole.shape[-2], ROWS):
            part = whole[..., first : first + ROWS, :].float()
            row = torch.arange(first, first + part.shape[-2]) // rows
            own = factors[..., row, :]
            if columns:
                own = own.repeat_interleave(columns, -1)[..., : part.shape[-1]]
            out[..., first : first + ROWS, :] = (part * own).to(dtype)
        return out

    return Derived(read, dtype, shape, (name, scale), source.tensors[name][1].nbytes + 16 * ROWS * shape[-1])


def _blocks(shape: tuple, scale: tuple, config: Mapping[str, object]) -> tuple[int | None, int]:
    """Rows and columns that share a scale; no columns: all of a row. (None, 0) if the shapes do not fit."""
    if len(shape) < 2:
        return None, 0
    if math.prod(scale) == 1:
        return shape[-2], 0
    if scale in ((*shape[:-1], 1), shape[:-1]):
        return 1, 0
    block = config.get("weight_block_size")
    for weights in _weights_of_groups(config):
        block = block or weights.get("block_structure")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        if scale == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
            return block[0], block[1]
    return None, 0


def _mxfp4(blocks: str, scales: str, source: Checkpoint, dtype: torch.dtype) -> Derived:
    """gpt_oss': blocks (experts, out, groups, 16) of two codes a byte, and exponents (experts, out, groups), for the
    model's (experts, in, out)."""
    info, exponents = source.tensors[blocks][1], source.tensors[scales][1]
    fits = len(info.shape) == 4 and info.shape[-1] == 16 and info.shape[:-1] == exponents.shape
    if not fits or (info.dtype, exponents.dtype) != ("U8", "U8"):
        raise CanopyError(
            f"{source.folder}: {shown(blocks)} is {info.dtype} {info.shape}, which is no MXFP4; download again"
        )
    experts, out, groups, _ = info.shape
    scheme, width = Scheme("mxfp4"), 32 * groups

    def one(expert: int) -> Tensor:
        held = {
            "weight_packed": source.read(blocks, expert).reshape(out, -1),
            "weight_scale": source.read(scales, expert),
        }
        return from_disk(held, scheme, (out, width), dtype).dequantize().t()

    def read(at: int | None) -> Tensor:
        return one(at) if at is not None else torch.stack([one(expert) for expert in range(experts)])

    return Derived(read, dtype, (experts, width, out), (blocks, scales), 8 * experts * out * width)


# As transformers converts them ----------------------------------------------------------------------------------------


def converted(source: Checkpoint, model: nn.Module, files: Names) -> Checkpoint:
    """A checkpoint with the tensors of the model that transformers would make of several of its tensors, or of parts of
    one, under the names of `names_of`.

    Args:
        model: on the meta device.

    Raises:
        CanopyError: if transformers ends with an error on them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    state = model.state_dict()
    held = {file for name in state for file in files.of(name) if file in source.tensors}
    missing = {name for name in state if not all(file in held for file in files.of(name))}
    conversions = get_model_conversion_mapping(model)
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    if not missing or not converters:
        return source
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    gathered: dict[str, list[tuple[str, str, str]]] = {}
    for name in sorted(source.tensors.keys() - held, key=dot_natural_key):
        own = source.in_files.get(name, name)
        key, pattern = rename_source_key(own, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and key in state:
            gathered.setdefault(key, []).append((name, own, pattern))
    derived: dict[str, Derived] = {}
    gone: list[str] = []
    last = [(None, None)]
    for key, parts in gathered.items():
        convert = _Conversion(of[parts[0][2]], key, parts, source, model, last)
        found = convert.shapes()
        room = sum(2 * tensor.nbytes for tensor in found.values())  # one of each before an operation, and after it
        for name, tensor in found.items():
            names = files.of(name)
            if name in missing and tuple(tensor.shape) == tuple(state[name].shape):
                for part, file in enumerate(names):
                    read, shape = convert.reader(name, part, len(names)), part_shape(tensor, len(names))
                    derived[file] = Derived(read, tensor.dtype, shape, convert.sources, room, in_parts=False)
                gone += convert.sources
    return source.deriving(derived, gone)


class _Conversion:
    """One use of a converter of transformers.

    Attributes:
        last: what the last of a checkpoint's conversions gave, kept until another one is asked: [(it, its tensors)].
    """

    def __init__(
        self, converter, key: str, parts: list[tuple[str, str, str]], source: Checkpoint, model: nn.Module, last: list
    ) -> None:
        self.converter, self.key, self.parts, self.source, self.model = converter, key, parts, source, model
        self.last = last
        self.sources = tuple(name for name, _, _ in parts)

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for name, own, pattern in self.parts:
            converter.add_tensor(self.key, own, pattern, read(name))
        with wrapped(
            f"{self.source.folder}: transformers cannot make {self.key} of {shown(self.sources[0])}",
            "the files do not fit config.json",
        ):  # whatever an operation raises on tensors of other shapes
            found = converter.convert(self.key, model=self.model, config=self.model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in found.items()}

    def shapes(self) -> dict[str, Tensor]:
        """What it gives, without values."""
        tensors = {name: self.source.tensors[name][1] for name in self.sources}
        return self.run(lambda name: torch.empty(tensors[name].shape, dtype=tensors[name].torch_dtype, device="meta"))

    def reader(self, name: str, part: int, count: int) -> Callable[[int | None], Tensor]:
        def read(at: int | None) -> Tensor:
            whose, tensors = self.last[0]
            if whose is not self:
                tensors, self.last[0] = None, (None, None)  # let go before the new ones come
                tensors = self.run(self.source.read)
                self.last[0] = self, tensors
            tensor = tensors[name]
            tensor = tensor if count == 1 else tensor.reshape(count, -1, tensor.shape[-1])[part]
            return tensor if at is None else tensor[at]

        return read


# Experts --------------------------------------------------------------------------------------------------------------


def experts_apart(source: Checkpoint, sites: list[Site], files: Names) -> Checkpoint:
    """A checkpoint with a tensor for each projection of each expert where it has one for all, and for its bias.

    Args:
        sites: of experts, on the meta device; all of a module's or none.
    """
    derived: dict[str, Derived] = {}
    gone: set[str] = set()

    def derive(name: str, file: str, site: Site, leaf: str, parts: str, shape: tuple[int, ...]) -> None:
        info = source.tensors[file][1]
        room = info.nbytes // info.shape[0] + source.room(file, info.shape[0])
        derived[name] = Derived(_expert(source, file, site, leaf, parts), info.torch_dtype, shape, (file,), room)
        gone.add(file)

    sites = [site for site in sites if site.part]
    weights = {f"{files.of_layer(site.name)}.weight" for site in sites}
    for site in sites:
        name, leaf, file = files.of_layer(site.name), site.tensor.rpartition(".")[2], files.of(site.tensor)[0]
        gone |= set(files.of(site.tensor)) - weights  # LongCat has rows of no expert after the last
        if f"{name}.weight" not in source.tensors and file in source.tensors:
            derive(f"{name}.weight", file, site, leaf, "split", site.shape)
            biases = files.of(f"{site.owner}.{leaf}_bias")[0]
            if site.bias() is not None and biases in source.tensors:
                derive(f"{site.name}.bias", biases, site, f"{leaf}_bias", "biases", tuple(site.bias().shape))
    return source.deriving(derived, gone)


def _expert(source: Checkpoint, file: str, site: Site, leaf: str, parts: str) -> Callable[[int | None], Tensor]:
    """Reads the weight or the bias of one expert's projection. ``parts``: the method of its kind that finds it."""
    number, _, projection = site.part.partition(".")
    tensors = dict(site.module.named_parameters(recurse=False))
    first = {name: tensor[:1] for name, tensor in tensors.items()}

    def read(at: int | None) -> Tensor:
        if tensors[leaf].dim() == 2 and parts == "split":  # of experts behind one another
            return site.kind.split(site.module, tensors | {leaf: source.read(file)})[site.part][1]
        found = getattr(site.kind, parts)(site.module, first | {leaf: source.read(file, int(number))[None]})
        found = found[f"0.{projection}" if projection else "0"]
        return found if parts == "biases" else found[1]

    return read
