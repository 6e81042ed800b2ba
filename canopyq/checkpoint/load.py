"""`load`: a checkpoint back into a model, its weights packed as they lie on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from canopyq.checkpoint.config import Group, Quantization, read_config
from canopyq.checkpoint.files import Checkpoint
from canopyq.checkpoint.layout import check, from_disk, input_from_disk
from canopyq.checkpoint.skeleton import build, one_line, quiet, read_model_config
from canopyq.errors import CanopyError, unknown
from canopyq.linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = tuple(DTYPES.values())


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    strict: bool = True,
) -> PreTrainedModel:
    """The model in a compressed-tensors checkpoint, ready to answer, its linear layers packed (`QuantizedLinear`).

    Headers are compared with the config tensor by tensor before any data is read.

    Args:
        folder: with config.json and safetensors, written by `save`, llm-compressor or another tool.
        device: where the model goes.
        dtype: of what is not quantized, and of the computation. None takes float32 on a CPU, and on a GPU what the
            config says. Codes and scales stay as they are.
        strict: refuse tensors that the model has no place for; else they are left out.

    Raises:
        CanopyError: for a checkpoint that is damaged, incomplete, pickled, or in a format that is not read.
    """
    return load_as(folder, device, dtype, strict=strict)


def load_as(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    *,
    strict: bool = True,
    attention: str | None = None,
) -> PreTrainedModel:
    """`load` with a choice of transformers' attention implementation."""
    checkpoint = Checkpoint(Path(folder))
    given = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if given is None:
        raise CanopyError(f"{folder} holds no quantized model (no quantization_config); use transformers to load it")
    quantization = read_config(given)
    place = _device(device)
    config = read_model_config(checkpoint.folder, len(checkpoint.tensors))
    model = build(config, _dtype(dtype, place, config), attention, most=4 * checkpoint.nbytes)  # 2-bit codes at least
    targets = _targets(model, quantization)
    plain = _plain(model, targets, checkpoint)
    _check(model, targets, plain, checkpoint, strict)
    return _fill(model, targets, plain, checkpoint, place)


def tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one by a second name -> that other one's name, as the model's config has it."""
    names = getattr(model, "all_tied_weights_keys", None)
    return dict(names) if isinstance(names, dict) else {}


def _device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:
        raise CanopyError(f"device {str(device)!r} cannot be used here ({one_line(error)}); use 'cpu'") from error
    return place


def _dtype(dtype: torch.dtype | str | None, place: torch.device, config) -> torch.dtype:
    if dtype is None:
        own = config.dtype if config.dtype in FLOATS else torch.bfloat16
        return torch.float32 if place.type == "cpu" else own
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype not in FLOATS:
        raise unknown("dtype", str(dtype).removeprefix("torch."), DTYPES)
    return dtype


def _targets(model: nn.Module, quantization: Quantization) -> dict[str, tuple[nn.Linear, Group]]:
    """The linear layers that the config says are quantized, by name."""
    targets = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (group := quantization.group_of(name)) is not None:
            if type(module) is not nn.Linear:
                raise CanopyError(
                    f"{name} is a {type(module).__name__}; canopyq holds plain nn.Linear layers quantized"
                )
            targets[name] = (module, group)
    if not targets:
        raise CanopyError("quantization_config names no linear layer of this model; mend its targets")
    return targets


def _plain(model: nn.Module, targets: dict, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name -> parameter or buffer, of all that the checkpoint has to hold beside quantized weights."""
    plain = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if _weight_of(name) not in targets
    }
    second = {name: of for name, of in tied(model).items() if name in plain and name not in checkpoint.tensors}
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name in list(plain):
        optional = not plain[name].is_meta and any(re.search(pattern, name) for pattern in may_lack)
        if name not in checkpoint.tensors and (second.get(name) in checkpoint.tensors or optional):
            del plain[name]
    return plain


def _weight_of(name: str) -> str:
    """``layers.0.q_proj`` for ``layers.0.q_proj.weight``: the layer whose weight the name is."""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _check(model: nn.Module, targets: dict, plain: dict[str, Tensor], checkpoint: Checkpoint, strict: bool) -> None:
    """Compare the headers with what the config makes: after this, reading takes the memory that it should."""
    headers = {name: (info.torch_dtype, info.shape) for name, (_, info) in checkpoint.tensors.items()}
    if missing := sorted(plain.keys() - headers.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CanopyError(f"{checkpoint.folder} lacks {missing[0]}{more}; download or write it again")
    for name, tensor in plain.items():
        dtype, shape = headers[name]
        kind = "floats" if tensor.is_floating_point() else str(tensor.dtype)
        if shape != tuple(tensor.shape) or (dtype not in FLOATS if kind == "floats" else dtype != tensor.dtype):
            raise CanopyError(f"{name} is {dtype} {shape}; by config.json it has to be {kind} {tuple(tensor.shape)}")
    parts: dict[str, dict[str, tuple]] = {name: {} for name in targets}
    extra = []
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        if name in plain:
            continue
        if module in targets:
            parts[module][leaf] = header
        else:
            extra.append(name)
    for name, (linear, group) in targets.items():
        try:
            shape = (linear.out_features, linear.in_features)
            check(parts[name], group.weights, shape, group.format, group.activations if group.static else None)
        except CanopyError as error:
            raise CanopyError(f"{name}.{error}") from None
    known = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in known)]
    if strict and extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CanopyError(f"the model has no place for {extra[0]}{more}; mend config.json, or use strict=False")


def _fill(
    model: PreTrainedModel, targets: dict, plain: dict[str, Tensor], checkpoint: Checkpoint, place: torch.device
) -> PreTrainedModel:
    read = _Reader(checkpoint)
    for name, wanted in plain.items():
        tensor = _own(read(name), place, wanted.dtype)
        if isinstance(wanted, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=wanted.requires_grad)
        _set(model, name, tensor)
    suffixes: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if module in targets and name not in plain:
            suffixes.setdefault(module, []).append(leaf)
    for name, (linear, group) in targets.items():
        tensors = {leaf: _own(read(f"{name}.{leaf}"), place) for leaf in suffixes[name]}
        try:
            fixed = input_from_disk(tensors, group.activations) if group.static else (None, None)
            shape = (linear.out_features, linear.in_features)
            own = {leaf: tensor for leaf, tensor in tensors.items() if leaf.startswith("weight")}
            weight = from_disk(own, group.weights, shape, linear.weight.dtype)
        except CanopyError as error:
            raise CanopyError(f"{name}: {error}") from None
        model.set_submodule(name, QuantizedLinear(weight, linear.bias, group.activations, *fixed).eval())
    _tie(model, plain)
    for name, buffer in list(model.named_buffers()):
        if buffer.device != place:
            _set(model, name, buffer.to(place))
    if left := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        raise CanopyError(f"{left[0]} was given no value: this architecture is not one that canopyq can load")
    _generation(model, checkpoint.folder)
    return model.eval()


class _Reader:
    """`Checkpoint.read`, without opening the file for each tensor; now and then, so that what was read is let go."""

    MOST = 2**26

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.file: Path | None = None
        self.opened, self.bytes = None, 0

    def __call__(self, name: str) -> Tensor:
        file, info = self.checkpoint.tensors[name]
        try:
            if file != self.file or self.bytes + info.nbytes > self.MOST:
                self.opened = None  # the old mapping goes before the new one comes
                self.opened, self.file, self.bytes = safe_open(file, framework="pt"), file, 0
            self.bytes += info.nbytes
            return self.opened.get_tensor(name)
        except Exception as error:  # safetensors has its own exception, the system others
            raise CanopyError(f"{file}: tensor {name!r} cannot be read ({one_line(error)})") from None


def _tie(model: nn.Module, plain: dict[str, Tensor]) -> None:
    """One tensor again where the model has two names for it; two that the file holds apart stay two if they differ."""
    apart = False
    for second, first in tied(model).items():
        if second in plain and first in plain:
            one, other = model.get_parameter(first), model.get_parameter(second)
            if not torch.equal(one, other):
                apart = True
                continue
        elif first not in plain and second in plain:
            first, second = second, first
        elif first not in plain:
            apart = True  # quantized by itself
            continue
        module, _, leaf = second.rpartition(".")
        if not isinstance(model.get_submodule(module), QuantizedLinear):
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))
        else:
            apart = True
    if apart:
        model.config.tie_word_embeddings = False


def _own(tensor: Tensor, place: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of its own: what is mapped from a file changes, or ends the process, when the file does."""
    moved = tensor.to(place, dtype or tensor.dtype)
    return moved.clone() if moved is tensor else moved


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _generation(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CanopyError(f"{folder / 'generation_config.json'} is not understood ({one_line(error)})") from error
