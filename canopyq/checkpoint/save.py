"""`save`: a quantized model into a folder that is whole or absent, read back and compared before it gets its name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from canopyq import checks
from canopyq.checkpoint.config import Quantization, write_config
from canopyq.checkpoint.contents import Contents, bare_config, contents, own_memory, tensors_of, widest
from canopyq.checkpoint.files import CONFIG, INDEX, SINGLE, as_path
from canopyq.checkpoint.groups import word
from canopyq.checkpoint.layout import SCALE_DTYPES
from canopyq.checkpoint.output import refuse_not_empty, whole_or_absent
from canopyq.checkpoint.read_back import Check, read_back
from canopyq.checkpoint.readers import readers
from canopyq.checkpoint.skeleton import quiet
from canopyq.checkpoint.wanted import tied
from canopyq.errors import CanopyError, one_line
from canopyq.memory import human
from canopyq.nn.linear import QuantizedLinear, quantized_layers

NOTE = "canopyq.json"  # what canopyq itself says of a checkpoint


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

    Each expert's projections are written by themselves, under the names that transformers, llm-compressor and vLLM use
    on disk, and quantized embeddings as the format has them. GPT-2's Conv1D, of which the format knows nothing, is
    written in a way that canopyq loads and on which transformers ends with an error. `Saved.readers` says which tool
    loads the file, and why another does not.

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
        check: read the file back and compare all of it, and the answers. Takes the memory of a second model.

    Raises:
        CanopyError: for a model that is not quantized, or in a way that the format cannot hold; a folder that is not
            empty; a disk that is full; a file that does not hold the model.
    """
    folder = as_path(folder)
    checks.flag("check", check), checks.count("max_shard_bytes", max_shard_bytes, 1, 10**15)
    dtype = None if dtype is None else checks.dtype("dtype", dtype, SCALE_DTYPES)
    if tokenizer is not None:
        checks.tokenizer(tokenizer)
    refuse_not_empty(folder)
    held = contents(model)
    plain = held.plain.values()
    stored = dtype or (torch.bfloat16 if _lossless(plain, torch.bfloat16) else None)
    config = _config(model, held, stored or widest(plain))
    recipe = ", ".join(dict.fromkeys(map(word, held.groups)))
    try:
        with whole_or_absent(folder) as work:
            nbytes = _write_tensors(work, tensors_of(model, held, stored), max_shard_bytes)
            _write_json(work / CONFIG, config)
            _write_others(work, model, tokenizer)
            found = read_back(model, work, held.plain, stored) if check else None
            _write_json(work / NOTE, _note(recipe, found))
    except (OSError, SafetensorError) as error:
        raise CanopyError(f"{folder} could not be written ({one_line(error)}); nothing was left behind") from error
    shapes = {held.files.of_layer(name): module.quantized_weight.shape for name, module in quantized_layers(model)}
    tools = readers(Quantization(tuple(held.groups), tuple(held.ignore)), shapes)
    return Saved(folder, recipe, nbytes, getattr(torch, config["dtype"]), found, tools)


def _lossless(tensors, dtype: torch.dtype) -> bool:
    floats = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype != dtype)
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats)


def _config(model: nn.Module, held: Contents, dtype: torch.dtype) -> dict:
    """config.json: the model's own, and what was done to it."""
    config = bare_config(model)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    pairs = tied(model)
    if any(second in held.plain or isinstance(_owner(model, second), QuantizedLinear) for second in pairs):
        config.tie_word_embeddings = False  # two tensors: tied again they would be one
    content = json.loads(config.to_json_string(use_diff=True))
    if config.tie_word_embeddings is False:
        content["tie_word_embeddings"] = False  # said aloud: its default differs from model to model
    content["quantization_config"] = write_config(held.groups, held.ignore)
    return content


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _write_tensors(work: Path, modules: Iterator[dict[str, Tensor]], most: int) -> int:
    """One file, or several with an index; the bytes of all tensors. At most one file's tensors are held at a time."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        save_file(own_memory(shard), work / f"shard-{len(files)}", metadata={"format": "pt"})
        (work / f"shard-{len(files)}").chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone
        files.append(list(shard))
        shard.clear()

    for tensors in modules:
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
