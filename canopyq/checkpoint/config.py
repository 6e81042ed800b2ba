"""The ``quantization_config`` of a checkpoint's config.json: written from groups, read into groups.

Each group says how its layers are quantized and, in ``targets``, which those are: by full name, by ``re:`` and a
pattern that the name starts with, or by class. ``ignore`` speaks the same language and goes before all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from canopyq.checkpoint.layout import BLOCKS, DISK_FORMATS, FLOAT, INT, MXFP4, NVFP4, PACKED, disk_format
from canopyq.checkpoint.patterns import check, matching
from canopyq.errors import CanopyError, prefixed, shown, unknown
from canopyq.tensor.formats import Format, IntFormat, get_format
from canopyq.tensor.scheme import Scheme

VERSION = "0.20.0"  # of compressed-tensors, whose form this is
NOT_READ = ("mxfp6-pack-quantized", "mxfp8-quantized", "marlin-24", "dense", "sparse-bitmask", "sparse-24-bitmask")
_ARGS = ("actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer", "observer_kwargs",
         "scale_dtype", "strategy", "symmetric", "type", "zp_dtype")  # fmt: skip
_GROUP = ("format", "input_activations", "output_activations", "targets", "weights")
CONV1D = "canopyq_conv1d"  # of a group; compressed-tensors refuses a key that it does not know


@dataclass(frozen=True)
class Group:
    """Layers that are quantized alike.

    Attributes:
        name: such as ``"group_0"``.
        targets: which layers: names, ``re:`` patterns, class names.
        weights: how their weights are quantized.
        activations: how what goes into them is; None leaves it as it is.
        format: one of `DISK_FORMATS`.
        static: whether the range of the activations is fixed, in an ``input_scale``, or each input's own.
        conv1d: whether the layers are GPT-2's Conv1D. transformers would pass over their codes and make up weights in
            their place, so the group says it in a key on which compressed-tensors ends with an error.
    """

    name: str
    targets: tuple[str, ...]
    weights: Scheme
    activations: Scheme | None
    format: str
    static: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class Quantization:
    """A whole ``quantization_config``: its groups, and what no group may touch."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def group_of(self, name: str, kind: str = "Linear") -> Group | None:
        """The group that a module belongs to, by its name and class; None leaves it unquantized.

        The most specific target wins, as in compressed-tensors: a full name before a pattern before a class.
        """
        return self.groups_of({name: kind})[name]

    def groups_of(self, kinds: Mapping[str, str]) -> dict[str, Group | None]:
        """`group_of` for many modules: name -> group.

        Args:
            kinds: name -> class.

        Raises:
            CanopyError: for regular expressions that take too long (`patterns`).
        """
        targets = sorted(((target, group) for group in self.groups for target in group.targets), key=lambda x: x[0])
        patterns = [entry for entry in (*self.ignore, *(target for target, _ in targets)) if entry.startswith("re:")]
        names = matching([entry[3:] for entry in patterns], list(kinds))
        groups: dict[str, Group | None] = {}
        for target, group in targets:
            if not target.startswith("re:") and target in kinds:
                groups.setdefault(target, group)
        for target, group in targets:
            if target.startswith("re:"):
                groups |= {name: group for name in names[target[3:]] if name not in groups}
        classes = {target: group for target, group in reversed(targets)}
        groups = {name: groups.get(name) or classes.get(kind) for name, kind in kinds.items()}
        for entry in self.ignore:
            groups |= dict.fromkeys(names[entry[3:]] if entry.startswith("re:") else [entry] if entry in kinds else [])
        return {name: None if kinds[name] in self.ignore else group for name, group in groups.items()}


def write_config(groups: Sequence[Group], ignore: Sequence[str]) -> dict:
    """What stands in config.json under ``quantization_config``, in the full form of compressed-tensors.

    Args:
        groups: see `groups.grouped`.
        ignore: the full names of all layers that stayed as they are.

    Raises:
        CanopyError: for activations that the format cannot hold.
    """
    formats = {group.format for group in groups}
    return {
        "config_groups": {
            group.name: {
                "format": group.format,
                "input_activations": None
                if group.activations is None
                else _arguments(group.activations, not group.static, inputs=True),
                "output_activations": None,
                "targets": list(group.targets),
                "weights": _arguments(group.weights, False),
            }
            | ({CONV1D: True} if group.conv1d else {})
            for group in groups
        },
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _arguments(scheme: Scheme, dynamic: bool, inputs: bool = False) -> dict:
    fmt, granularity = scheme.format, scheme.granularity
    if fmt.name in BLOCKS:
        return {
            "dynamic": "local" if inputs and fmt.has_global_scale else inputs,
            "group_size": fmt.block_size,
            "num_bits": 4,
            "scale_dtype": str(fmt.scale_dtype),
            "strategy": _block_strategy(fmt),
            "symmetric": True,
            "type": "float",
        }
    if not isinstance(fmt, IntFormat) and fmt.name != "fp8_e4m3":
        raise CanopyError(f"compressed-tensors has no {fmt.name} activations; use int8 or fp8_e4m3")
    return {
        "dynamic": dynamic,
        "group_size": granularity.group_size,
        "num_bits": fmt.bits,
        "strategy": granularity.kind,
        "symmetric": scheme.symmetric,
        "type": "int" if isinstance(fmt, IntFormat) else "float",
    }


def _block_strategy(fmt: Format) -> str:
    """How compressed-tensors calls blocks with a scale each, and with one more number for the whole tensor."""
    return "tensor_group" if fmt.has_global_scale else "group"


def read_config(config: Mapping) -> Quantization:
    """The inverse of `write_config`, for files of other tools too.

    Raises:
        CanopyError: for anything that is not understood, by name: no guess is made about what codes mean.
    """
    config = _mapping(config, "quantization_config")
    method = config.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise CanopyError(f"quant_method {shown(method)} is not read; canopyq reads 'compressed-tensors' checkpoints")
    for key in ("kv_cache_scheme", "moe_sparsity_config", "transform_config"):
        if config.get(key):
            raise CanopyError(f"the checkpoint has a {key}, which canopyq does not read yet; open it with transformers")
    sparsity = config.get("sparsity_config") or {}
    if _mapping(sparsity, "sparsity_config").get("format", "dense") != "dense":
        raise CanopyError(f"sparsity_config {shown(sparsity['format'])} is not read yet; open it with transformers")
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise CanopyError(
            f"quantization_status {shown(status)}: the weights were never compressed; save them compressed"
        )
    groups = _mapping(config.get("config_groups"), "config_groups")
    if not groups:
        raise CanopyError("config_groups is empty, so nothing says how the weights are quantized")
    read = tuple(_group(str(name), group, config.get("format")) for name, group in groups.items())
    return Quantization(read, _strings(config.get("ignore") or [], "ignore"))


def _group(name: str, given: object, default: object) -> Group:
    group = _mapping(given, name)
    _no_more(group, (*_GROUP, CONV1D), name)
    format = group.get("format") or default
    if format == "naive-quantized":  # the name that int-quantized and float-quantized share in older files
        format = FLOAT if _mapping(group.get("weights"), f"weights of {name}").get("type") == "float" else INT
    if format in NOT_READ:
        raise CanopyError(f"format {shown(format)} of {name} is not read yet; canopyq reads {', '.join(DISK_FORMATS)}")
    if format not in DISK_FORMATS:
        raise unknown("format", format, DISK_FORMATS)
    if group.get("output_activations"):
        raise CanopyError(f"{name} quantizes output_activations, which canopyq does not read yet")
    if not group.get("weights"):
        raise CanopyError(f"{name} quantizes no weights, which canopyq does not read yet")
    weights = _scheme(group["weights"], f"weights of {name}")
    activations, static = None, False
    if given_inputs := group.get("input_activations"):
        where = f"input_activations of {name}"
        static = _mapping(given_inputs, where).get("dynamic") in (None, False, "local")
        activations = _scheme(given_inputs, where, inputs="static" if static else "dynamic")
    fits = {PACKED: isinstance(weights.format, IntFormat), INT: weights.format.name == "int8",
            FLOAT: weights.format.name == "fp8_e4m3", NVFP4: weights.format.name == "nvfp4",
            MXFP4: weights.format.name == "mxfp4"}  # fmt: skip
    if not fits[format]:
        disk_format(weights, activations)  # says why, if no file holds them
        raise CanopyError(f"format {shown(format)} of {name} does not hold {weights.format.name} weights")
    targets = _strings(group.get("targets"), f"targets of {name}")
    return Group(name, targets, weights, activations, format, static, bool(group.get(CONV1D)))


def _scheme(given: object, where: str, *, inputs: str | None = None) -> Scheme:
    """A scheme of weights, or of ``inputs`` that are ``"static"`` or ``"dynamic"``."""
    args = _mapping(given, where)
    _no_more(args, _ARGS, where)
    bits, kind, symmetric = args.get("num_bits", 8), args.get("type", "int"), args.get("symmetric", True)
    is_nvfp4 = (kind, bits, args.get("strategy")) == ("float", 4, _block_strategy(get_format("nvfp4")))
    dynamic = args.get("dynamic")  # of the scales beside a global one, which is fixed, it is "local"
    if inputs and (dynamic == "local") != is_nvfp4 or inputs == "dynamic" and dynamic is not True:
        raise CanopyError(f"{where} are dynamic {shown(dynamic)}, which canopyq does not read yet")
    if inputs is None and dynamic:
        raise CanopyError(f"{where} are marked dynamic; weights have fixed scales")
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise CanopyError(f"actorder {shown(args['actorder'])} of {where} needs a g_idx, which canopyq does not read")
    if kind not in ("int", "float") or type(bits) is not int or type(symmetric) is not bool:
        raise CanopyError(
            f"{where} of type {shown(kind)} with num_bits {shown(bits)} and symmetric {shown(symmetric)} are not known"
        )
    size, strategy = args.get("group_size"), args.get("strategy")
    if kind == "float" and bits == 4:
        scheme = Scheme(_block_format(size, strategy, args.get("scale_dtype"), symmetric, where))
        if inputs == "static" and not is_nvfp4:
            raise CanopyError(f"{where} are {scheme.format.name} with fixed scales, which canopyq does not read yet")
        return scheme
    if kind == "float" and bits != 8:
        raise CanopyError(f"{where} are floats of {bits} bits; canopyq reads 4 (E2M1) and 8 (E4M3)")
    if strategy is None:  # compressed-tensors' own reading: -1 means channels
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "group" and (type(size) is not int or size < 1):
        raise CanopyError(f"{where} have strategy 'group' and group_size {shown(size)}; it has to be 1 or more")
    granularity = {"tensor": "tensor", "group": f"g{size}", "channel": "channel", "token": "token"}
    readable = {None: ("tensor", "group", "channel"), "dynamic": ("tensor", "group", "token"), "static": ("tensor",)}
    if not isinstance(strategy, str) or strategy not in readable[inputs]:
        raise CanopyError(f"strategy {shown(strategy)} of {where} is not read yet; {', '.join(readable[inputs])} are")
    name = "fp8_e4m3" if kind == "float" else f"int{bits}"
    return Scheme(name, granularity[strategy], symmetric)


def _block_format(size: object, strategy: object, scale_dtype: object, symmetric: bool, where: str) -> Format:
    """The FP4 format that a config means by its block size."""
    for fmt in map(get_format, BLOCKS):
        known = (fmt.block_size, _block_strategy(fmt), True)
        if (size, strategy, symmetric) == known and scale_dtype in (None, str(fmt.scale_dtype)):
            return fmt
    raise CanopyError(
        f"{where} are FP4 with group_size {shown(size)}, strategy {shown(strategy)}, symmetric {shown(symmetric)} and "
        f"scale_dtype {shown(scale_dtype)}; canopyq reads those of nvfp4 (16, 'tensor_group', torch.float8_e4m3fn) and "
        "mxfp4 (32, 'group', torch.uint8)"
    )


def _mapping(given: object, what: str) -> Mapping:
    if not isinstance(given, Mapping):
        raise CanopyError(f"{what} has to be an object of names and values, got {shown(given)}; mend config.json")
    return given


def _strings(given: object, what: str) -> tuple[str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise CanopyError(f"{what} has to be a list of names, got {shown(given)}; mend config.json")
    with prefixed(f"{what}: "):
        for text in given:
            if text.startswith("re:"):
                check(text[3:])
    return tuple(given)


def _no_more(given: Mapping, known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known and given[key] not in (None, {}, [], False):
            raise CanopyError(f"{shown(key)} in {where} is not understood; known: {', '.join(known)}")
