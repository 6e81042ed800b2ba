"""`save`: a quantized model into a folder that is whole or absent, read back and compared before it gets its name."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from canopyq.checkpoint.config import Group, Quantization, write_config
from canopyq.checkpoint.files import CONFIG, INDEX, SINGLE, refuse_not_empty, whole_or_absent
from canopyq.checkpoint.layout import SCALE_DTYPES, disk_format, input_to_disk, to_disk
from canopyq.checkpoint.load import load_as, tied
from canopyq.checkpoint.readers import readers
from canopyq.checkpoint.skeleton import build, one_line, quiet
from canopyq.embedding import QuantizedEmbedding
from canopyq.errors import CanopyError
from canopyq.experts import QuantizedExperts
from canopyq.formats import IntFormat
from canopyq.hadamard import online_hadamard
from canopyq.kept_columns import OutlierLinear
from canopyq.linear import QuantizedLinear, quantized_layers
from canopyq.memory import human
from canopyq.mode import eval_mode
from canopyq.offload import is_away, lies
from canopyq.scheme import Recipe, Scheme

NOTE = "canopyq.json"  # what canopyq itself says of a checkpoint
MOST_KL = 0.01  # nats per token between the model and its file: beyond that the file does not hold the model
TOKENS = 64


@dataclass(frozen=True)
class Check:
    """What came back from the disk beside the model in memory, on a fixed batch of tokens.

    Attributes:
        tokens: how many.
        max_abs_difference: of any logit.
        kl: mean KL divergence, nats per token.
    """

    tokens: int
    max_abs_difference: float
    kl: float


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        readers: other tool -> whether it loads the checkpoint ("yes", "no: …", or how).
    """

    folder: Path
    recipe: str
    nbytes: int
    dtype: torch.dtype
    check: Check | None
    readers: dict[str, str]

    def __str__(self) -> str:
        text = f"{self.folder}: {self.recipe}, {human(self.nbytes)} of tensors"
        if self.check is not None:
            text += f"; read back, logits differ by at most {self.check.max_abs_difference:.2g}"
        return "\n".join([text, *(f"  {tool} will load it: {verdict}" for tool, verdict in self.readers.items())])


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    check: bool = True,
) -> Saved:
    """Write a quantized transformers model as a compressed-tensors checkpoint.

    It is written beside ``folder`` under another name, read back, compared, and then renamed: ``folder`` is whole or
    absent, whatever happens in between.

    Args:
        model: quantized by `quantize_` or loaded by `load`.
        folder: absent or empty.
        tokenizer: written beside the weights.
        dtype: of what is not quantized. None takes bfloat16 if that changes no value (as for the tutor, whose file
            is bfloat16 and which runs in float32), and else leaves every tensor its own. Scales take it where that
            changes none of them.
        max_shard_bytes: above this the tensors are divided among several files with an index.
        check: read the file back and compare logits. Takes the memory of a second model.

    Raises:
        CanopyError: for a model that is not quantized, or in a way that the format cannot hold; a folder that is not
            empty; a disk that is full; a file that gives other logits than the model.
    """
    folder = Path(folder)
    groups, ignore = _groups(model)
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise CanopyError(f"weights are saved in bfloat16, float16 or float32, not {dtype}")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise CanopyError(f"a file of at most {max_shard_bytes} bytes holds nothing; use 5_000_000_000")
    refuse_not_empty(folder)
    plain = _plain(model)
    stored = dtype or (torch.bfloat16 if _lossless(plain.values(), torch.bfloat16) else None)
    config = _config(model, plain, groups, ignore, stored or _widest(plain.values()))
    formats = {name: group.format for group in groups for name in group.targets}
    recipe = ", ".join(_word(group) for group in groups)
    try:
        with whole_or_absent(folder) as work:
            nbytes = _write_tensors(work, _tensors(model, plain, formats, stored), max_shard_bytes)
            _write_json(work / CONFIG, config)
            _write_others(work, model, tokenizer)
            found = _compare(model, work) if check else None
            _write_json(work / NOTE, _note(recipe, found))
    except (OSError, SafetensorError) as error:
        raise CanopyError(f"{folder} could not be written ({one_line(error)}); nothing was left behind") from error
    shapes = {name: module.quantized_weight.shape for name, module in quantized_layers(model)}
    tools = readers(Quantization(tuple(groups), tuple(ignore)), shapes)
    return Saved(folder, recipe, nbytes, getattr(torch, config["dtype"]), found, tools)


def _groups(model: nn.Module) -> tuple[list[Group], list[str]]:
    """The model's quantized layers, those of a kind together, and the names of the linear layers left as they are.

    With one group its targets are the class and ``ignore`` has the exceptions, as other tools write it.
    """
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "to_json_string"):
        raise CanopyError(f"save needs a transformers model, got {type(model).__name__}")
    shape = dict(build(_bare_config(model), torch.float32).named_modules(remove_duplicate=False))
    kinds: dict[tuple, tuple[QuantizedLinear, list[str]]] = {}
    ignore = []
    for name, module in model.named_modules(remove_duplicate=False):
        if is_away(module):
            raise CanopyError(
                f"{name} lies {lies(module)}, and save needs the whole model at hand; load it without offloading, or "
                "quantize from disk to disk: canopyq quantize FOLDER --out DIR"
            )
        if isinstance(module, (QuantizedEmbedding, QuantizedExperts)):
            raise CanopyError(
                f"{name}: quantized embeddings and experts are not written yet; leave them out of the recipe"
            )
        if isinstance(module, QuantizedLinear):
            weights, activations = module.scheme, module.activations
            if isinstance(model.get_submodule(name.rpartition(".")[0]), OutlierLinear):
                raise CanopyError(
                    f"{name.rpartition('.')[0]} keeps some inputs in 16 bits beside its codes, which "
                    "compressed-tensors cannot hold; use a method without outliers"
                )
            if online_hadamard(module) is not None:
                raise CanopyError(
                    f"{name} has a Hadamard transform at run time, which no file holds; rotate under a recipe with "
                    "activations of 8 bits or more"
                )
            if type(shape.get(name)) is not nn.Linear:
                raise CanopyError(f"{name} was a {type(shape.get(name)).__name__}; only nn.Linear is written")
            try:
                disk_format(weights, activations)
            except CanopyError as error:
                raise CanopyError(f"{name}: {error}") from None
            key = (weights.format, weights.granularity, weights.symmetric, activations, module.input_scale is None)
            kinds.setdefault(key, (module, []))[1].append(name)
        elif isinstance(module, nn.Linear):
            ignore.append(name)
    if not kinds:
        raise CanopyError("the model is not quantized; call cq.quantize_(model, recipe) first, or use save_pretrained")
    return [_group(f"group_{i}", names, layer) for i, (layer, names) in enumerate(kinds.values())], ignore


def _group(name: str, layers: list[str], like: QuantizedLinear) -> Group:
    format = disk_format(like.scheme, like.activations)
    return Group(name, tuple(layers), like.scheme, like.activations, format, like.input_scale is not None)


def _bare_config(model: nn.Module):
    """A copy of the model's config that says nothing of quantization."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """What is written beside quantized weights, each tied tensor once: under the name of the first of its names."""
    plain = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        held = dict(module._parameters)  # of a quantized layer, its bias
        if not isinstance(module, QuantizedLinear):
            held |= {leaf: x for leaf, x in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
        plain |= {prefix + leaf: tensor.detach() for leaf, tensor in held.items() if tensor is not None}
    for second, first in tied(model).items():
        if second in plain and first in plain and plain[second].data_ptr() == plain[first].data_ptr():
            del plain[second]
    if unset := [name for name, tensor in plain.items() if tensor.is_meta]:
        raise CanopyError(f"{unset[0]} has no values (meta device); load the model before saving it")
    return plain


def _lossless(tensors, dtype: torch.dtype) -> bool:
    floats = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype != dtype)
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats)


def _widest(tensors) -> torch.dtype:
    """The dtype that config.json names: one that holds every tensor of the file."""
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def _config(model: nn.Module, plain: dict[str, Tensor], groups: list[Group], ignore: list[str], dtype) -> dict:
    """config.json: the model's own, and what was done to it."""
    config = _bare_config(model)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    pairs = tied(model)
    if any(second in plain or isinstance(_owner(model, second), QuantizedLinear) for second in pairs):
        config.tie_word_embeddings = False  # two tensors: tied again they would be one
    content = json.loads(config.to_json_string(use_diff=True))
    if config.tie_word_embeddings is False:
        content["tie_word_embeddings"] = False  # said aloud: its default differs from model to model
    if len(groups) == 1:
        groups = [replace(groups[0], targets=("Linear",))]
    content["quantization_config"] = write_config(groups, ignore)
    return content


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _tensors(
    model: nn.Module, plain: dict[str, Tensor], formats: dict[str, str], dtype: torch.dtype | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Module by module in the model's order: full tensor name -> tensor, made when its turn comes."""
    scales = dtype or _widest(plain.values())
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        found = {}
        if isinstance(module, QuantizedLinear):
            found |= to_disk(module.quantized_weight, scales, formats[name])
            if module.input_scale is not None:
                found |= input_to_disk(module.input_scale, module.input_zero_point, scales)
        own = [*module._parameters, *module._buffers]
        found |= {leaf: _cast(plain[prefix + leaf], dtype) for leaf in own if prefix + leaf in plain}
        if found:
            yield name, {prefix + leaf: tensor.detach().cpu().contiguous() for leaf, tensor in found.items()}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _write_tensors(work: Path, modules: Iterator[tuple[str, dict[str, Tensor]]], most: int) -> int:
    """One file, or several with an index; the bytes of all tensors. At most one file's tensors are held at a time."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        own = {}
        seen = set()
        for name, tensor in shard.items():  # safetensors refuses two names for the same bytes
            own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        save_file(own, work / f"shard-{len(files)}", metadata={"format": "pt"})
        (work / f"shard-{len(files)}").chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone
        files.append(list(shard))
        shard.clear()

    for _, tensors in modules:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and held + size > most:
            flush()
            held = 0
        shard |= tensors
        held, total = held + size, total + size
    flush()
    if len(files) == 1:
        (work / "shard-0").rename(work / SINGLE)
        return total
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (work / f"shard-{i}").rename(work / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _umask() -> int:
    """What the user denies to others in new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_others(work: Path, model: nn.Module, tokenizer) -> None:
    with quiet():
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _note(recipe: str, found: Check | None) -> dict:
    from canopyq import __version__

    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"canopyq": __version__, "date": date, "recipe": recipe, "check": None if found is None else vars(found)}


def _word(group: Group) -> str:
    """The name of the recipe that gives such layers, such as ``w4a16-g128-asym``; the schemes in words if none does."""
    weights, inputs = group.weights, group.activations
    asymmetric = not (weights if inputs is None else inputs).symmetric
    tail = ("-static" if group.static else "") + ("-asym" if asymmetric else "")
    bits = 16 if inputs is None else inputs.format.bits
    name = f"w{weights.format.bits}a{bits}" if isinstance(weights.format, IntFormat) else "fp8"
    if name != "fp8" and (weights.format.bits, str(weights.granularity)) != (8, "channel"):
        name += f"-{weights.granularity}"
    try:
        meant = Recipe.parse(name + tail)
    except CanopyError:
        meant = None
    if meant is not None and _alike(meant.weights, weights) and _alike(meant.activations, inputs):
        return meant.name
    return str(weights) + (f" with {inputs} activations" if inputs is not None else "")


def _alike(one: Scheme | None, other: Scheme | None) -> bool:
    parts = (None if x is None else (x.format, x.granularity, x.symmetric) for x in (one, other))
    return next(parts) == next(parts)


@torch.inference_mode()
def _compare(model: nn.Module, work: Path) -> Check:
    """Load what was written, and look at the logits of both."""
    parameter = next(model.parameters())
    loaded = load_as(
        work, parameter.device, parameter.dtype, attention=getattr(model.config, "_attn_implementation", None)
    )
    ids = (
        torch.arange(TOKENS, device=parameter.device).mul(2654435761).remainder(model.config.vocab_size).reshape(2, -1)
    )
    with eval_mode(model):
        before, after = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, loaded))
    p, q = F.log_softmax(before, -1), F.log_softmax(after, -1)
    kl = max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)  # in this order NaN stays NaN
    found = Check(ids.numel(), float((before - after).abs().max()), kl)
    if not found.kl <= MOST_KL:
        raise CanopyError(
            f"what was written gives other answers than the model (KL {found.kl:.2g} nats per token), and was removed; "
            "look for logits that are not finite, or leave dtype out"
        )
    return found
