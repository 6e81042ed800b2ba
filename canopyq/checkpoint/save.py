"""`save`: a quantized model into a folder that is whole or absent, read back and compared before it gets its name."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from canopyq import checks
from canopyq.checkpoint.config import Quantization, write_config
from canopyq.checkpoint.contents import Contents, bare_config, contents, own_memory, tensors_of, widest
from canopyq.checkpoint.files import CONFIG, INDEX, SINGLE, as_path
from canopyq.checkpoint.groups import word
from canopyq.checkpoint.layout import SCALE_DTYPES
from canopyq.checkpoint.load import load_as
from canopyq.checkpoint.names import tied
from canopyq.checkpoint.output import refuse_not_empty, whole_or_absent
from canopyq.checkpoint.readers import readers, tried_by_transformers
from canopyq.checkpoint.skeleton import quiet
from canopyq.errors import CanopyError, wrapped
from canopyq.memory import human
from canopyq.nn.linear import QuantizedLinear, quantized_layers
from canopyq.utils import eval_mode

NOTE = "canopyq.json"  # what canopyq itself says of a checkpoint
MOST = 0.05  # of the logits' norm: from run to run kernels differ by less, and another model by more
TOKENS = 64
INPUTS = ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class Check:
    """What came back from the disk beside the model in memory, on a fixed batch of tokens.

    Attributes:
        tokens: how many; of a model that takes images or sound, how many numbers of those.
        max_abs_difference: of any logit, or of any number that a model without logits gives.
        kl: mean KL divergence, nats per token; of a model without logits None.
    """

    tokens: int
    max_abs_difference: float
    kl: float | None


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        readers: other tool -> whether it loads the checkpoint ("yes, …", "no: …", or how), and whether that was tried
            or is so by the layout.
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
            answers = "answers" if self.check.kl is None else "logits"
            text += f"; read back, {answers} differ by at most {self.check.max_abs_difference:.2g}"
        return "\n".join([text, *(f"  {tool} will load it: {verdict}" for tool, verdict in self.readers.items())])


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    check: bool | str = True,
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
            ``"transformers"``: also let plain transformers load the file, and compare the answers; `Saved.readers` says
            what came of it. That takes the memory of the model in 16 bits, or in its own dtype.

    Raises:
        CanopyError: for a model that is not quantized, or in a way that the format cannot hold; a folder that is not
            empty; a disk that is full; a file that does not hold the model.
    """
    folder = as_path(folder)
    try_others = check == "transformers"
    if try_others and find_spec("compressed_tensors") is None:
        raise CanopyError("check='transformers' needs the package that it reads such files with; pip install "
                          "compressed-tensors, or use check=True")  # fmt: skip
    check = try_others or checks.flag("check", check)
    checks.count("max_shard_bytes", max_shard_bytes, 1, 10**15)
    dtype = None if dtype is None else checks.dtype("dtype", dtype, SCALE_DTYPES)
    if tokenizer is not None:
        checks.tokenizer(tokenizer)
    refuse_not_empty(folder)
    _check_generation(checks.loaded("model", model))
    held = contents(model)
    plain = held.plain.values()
    stored = dtype or (torch.bfloat16 if _lossless(plain, torch.bfloat16) else None)
    config = _config(model, held, stored or widest(plain))
    recipe = ", ".join(dict.fromkeys(map(word, held.groups)))
    with wrapped(f"{folder} could not be written", "nothing was left behind", OSError, SafetensorError):
        with whole_or_absent(folder) as work:
            nbytes = _write_tensors(work, tensors_of(model, held, stored), max_shard_bytes)
            _write_json(work / CONFIG, config)
            _write_others(work, model, tokenizer)
            found = read_back(model, work, held.plain, stored) if check else None
            shapes = {
                held.files.of_layer(name): module.quantized_weight.shape for name, module in quantized_layers(model)
            }
            tools = readers(Quantization(tuple(held.groups), tuple(held.ignore)), shapes, config)
            if try_others:
                tools["transformers"] = _try_transformers(work, model, tools["transformers"])
            _write_json(work / NOTE, _note(recipe, found))
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
    if getattr(config, "tie_word_embeddings", None) is False:
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


def _check_generation(model: nn.Module) -> None:
    """Raise `CanopyError` for settings of generation that transformers would refuse to write in the end."""
    generation = getattr(model, "generation_config", None)
    with wrapped("model.generation_config is not valid", "mend it first", ValueError):
        if generation is not None:
            with quiet():
                generation.validate(strict=True)


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


# Read back ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def read_back(model: nn.Module, folder: Path, plain: Mapping[str, Tensor], dtype: torch.dtype | None) -> Check:
    """Load what was written, and compare it with the model: every code and scale, which have to be the same; every
    other tensor, which has to be what its cast to the file's dtype makes of it; and then the answers of both. How far
    the cast itself moves them is for the caller to judge, and stands in the result.

    Args:
        plain: name in the model -> tensor, of what is not quantized.
        dtype: that it was written in; None for its own.

    Raises:
        CanopyError: for a file that does not hold the model.
    """
    parameter = next(model.parameters())
    loaded = load_as(
        folder, parameter.device, parameter.dtype, attention=getattr(model.config, "_attn_implementation", None)
    )
    modules = dict(loaded.named_modules())
    for name, layer in quantized_layers(model):
        _compare_layer(name, layer, modules.get(name))
    for name, tensor in plain.items():
        _compare_plain(name, tensor, loaded, dtype)
    example = _example(model)
    with eval_mode(model):
        what = f"the file could not be judged, and was removed: {type(model).__name__} gives no answer to "
        with wrapped(what + f"{' and '.join(example)} alone", "save it with check=False"):
            before, kind = _answer(model, example)
        after, _ = _answer(loaded, example)
        for name, tensor in plain.items():  # now both compute with the same numbers, and only their code can differ
            module, _, leaf = name.rpartition(".")
            own = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
            held = loaded.get_submodule(module)
            (held._parameters if leaf in held._parameters else held._buffers)[leaf] = own
        same, _ = _answer(loaded, example)
    if not (off := float((before - same).norm() / before.norm())) <= MOST:
        raise CanopyError(
            f"what was written gives other answers than the model ({kind} off by {100 * off:.2g} %), and was removed; "
            "look for logits that are not finite, or a hook or method that the model's class does not have"
        )
    kl = _kl(before, after) if kind == "logits" else None
    return Check(next(iter(example.values())).numel(), float((before - after).abs().max()), kl)


def _example(model: nn.Module) -> dict[str, Tensor]:
    """What a model takes, by the name of its main input: two sequences of tokens, images or sounds; and two sequences
    of tokens for a decoder beside its encoder."""
    parameter, config = next(model.parameters()), model.config
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    ids = torch.arange(TOKENS).mul(2654435761).remainder(getattr(text, "vocab_size", TOKENS)).reshape(2, -1)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        height, width = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else vision.image_size
        given = _noise(2, getattr(vision, "num_channels", 3), height, width)
    elif name == "input_features":
        given = _noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        given = ids
    example = {name: given}
    if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        example["decoder_input_ids"] = ids
    return {
        name: x.to(parameter.device, parameter.dtype if x.is_floating_point() else None) for name, x in example.items()
    }


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _answer(model: nn.Module, example: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    """The logits of a model, or else the first tensor that it gives; and what that is called."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = model(**example, **options, return_dict=True)
    name = "logits" if "logits" in given else next(name for name, x in given.items() if isinstance(x, Tensor))
    return given[name].float(), name


@torch.inference_mode()
def _try_transformers(folder: Path, model: nn.Module, verdict: str) -> str:
    example = _example(model)
    with eval_mode(model):
        return tried_by_transformers(folder, model, verdict, lambda one: _answer(one, example), MOST)


def _compare_layer(name: str, layer: QuantizedLinear, other: nn.Module | None) -> None:
    if isinstance(other, QuantizedLinear):
        mine, theirs = layer.quantized_weight.parts, other.quantized_weight.parts
        mine |= {leaf: getattr(layer, leaf) for leaf in INPUTS if getattr(layer, leaf) is not None}
        theirs |= {leaf: getattr(other, leaf) for leaf in INPUTS if getattr(other, leaf) is not None}
        if mine.keys() == theirs.keys() and all(_equal(mine[part], theirs[part]) for part in mine):
            return
    raise CanopyError(f"{name} came back from the file as something else, which was removed; please report it")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether values are the same; scales may have found a narrower dtype that holds them."""
    if one.is_floating_point():
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def _compare_plain(name: str, tensor: Tensor, loaded: nn.Module, dtype: torch.dtype | None) -> None:
    module, _, leaf = name.rpartition(".")
    found = getattr(loaded.get_submodule(module), leaf)
    stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if not torch.equal(stored.to(found.dtype), found):
        raise CanopyError(f"{name} came back from the file as something else, which was removed; please report it")


def _kl(reference: Tensor, logits: Tensor) -> float:
    p, q = F.log_softmax(reference, -1), F.log_softmax(logits, -1)
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)  # in this order NaN stays NaN
