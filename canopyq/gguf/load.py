"""A model from a GGUF file, its weights the numbers that its blocks stand for: by transformers and the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from canopyq import checks
from canopyq.checkpoint.files import as_path, raise_not_finite
from canopyq.checkpoint.skeleton import quiet
from canopyq.errors import CanopyError, shown, wrapped
from canopyq.gguf.base import read

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from canopyq.checkpoint.load import LoadedModel

# GGUF's names of the families of `architectures`, whose files transformers was seen to read right.
READ = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
SENTENCEPIECE = ("gemma2", "gemma3", "phi3")  # the families whose published models have such a tokenizer
COUNTS = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
          "attention.head_count_kv", "attention.key_length", "vocab_size")  # fmt: skip
MOST = 2**24  # of anything that a file counts; the longest contexts are of some million tokens


def load_gguf(
    path: str | Path, dtype: torch.dtype | str = "float32"
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, and its tokenizer. Nothing is packed: `quantize_` does that, by any recipe.

    The weights lie on the grid of the file's types, such as four bits of Q4_K, and so are not those of the model that
    it was made from: figures beside this model do not tell what quantizing the original costs.

    Args:
        path: of a model of Llama, SmolLM, Qwen 2 or 3, Gemma 2 or 3, or Phi-3.
        dtype: of the weights.

    Raises:
        CanopyError: without the gguf package, for a file that is damaged, of another family, with a rotary embedding
            or a tokenizer that transformers does not read, or whose tensors are not those that it describes.
    """
    dtype = checks.dtype("dtype", dtype)
    path = as_path(path)
    reader = read(path)
    _check(path, reader)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with wrapped(f"{path} cannot be loaded", "download it again"):
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=dtype, output_loading_info=True, **options
            )
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(report.get(problem) or (), key=str):
            raise CanopyError(f"{path} does not hold what it describes ({problem}: {names[0]}); download it again")
    for name, parameter in model.named_parameters():
        raise_not_finite(parameter, name)
    _agree(path, model, reader)
    # It is plain now: neither transformers nor `save` may take it for quantized.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)  # transformers 5.15 sets none
    return model.eval(), tokenizer


def _check(path: Path, reader: GGUFReader) -> None:
    """What can be said before any tensor is read."""
    family = reader.fields["general.architecture"].contents()
    if family not in READ:
        raise CanopyError(f"{path} holds a model of {shown(family)}, and {', '.join(READ)} are read")
    if family in SENTENCEPIECE and _value(reader, "tokenizer.ggml.model") == "gpt2" and _goes_by_family():
        raise CanopyError(f"{path} has a tokenizer with merges, and transformers before 5.23 takes that of a {family} "
                          "for another kind; install a newer one")  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name in COUNTS:
        value = _value(reader, f"{family}.{name}")
        limit = len(tensors) if name == "block_count" else MOST
        if value is not None and (type(value) is not int or not 0 < value <= limit):
            raise CanopyError(
                f"{path} says {name} = {shown(value)}, which its tensors do not bear out; do not trust it"
            )
    width = _value(reader, f"{family}.embedding_length")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or int(embedding.shape[0]) != width:
        raise CanopyError(f"{path} has no token_embd.weight of {shown(width)} columns; download it again")
    kind = _value(reader, f"{family}.rope.scaling.type")
    size, rotated = (_value(reader, f"{family}.{name}") for name in ("attention.key_length", "rope.dimension_count"))
    if "rope_freqs.weight" in tensors or kind not in (None, "none") or (size and rotated and size != rotated):
        raise CanopyError(
            f"{path} has a rotary embedding that transformers does not read from GGUF (scaling {shown(kind)}, "
            f"{shown(rotated)} of {shown(size)} values); load the model in safetensors"
        )


def _goes_by_family() -> bool:
    """Whether this transformers tells a tokenizer's kind by the model's family, as 5.15 does, not by the file."""
    from transformers.integrations import ggml

    return hasattr(ggml, "GGUF_TO_FAST_CONVERTERS")


def _agree(path: Path, model: PreTrainedModel, reader: GGUFReader) -> None:
    """Refuse a model that was made with less, or otherwise, than the file says: transformers says nothing of that."""
    family, config = reader.fields["general.architecture"].contents(), model.config
    used = len({id(parameter) for parameter in model.parameters()})
    if used != len(reader.tensors):
        raise CanopyError(f"{path} has {len(reader.tensors)} tensors, of which transformers reads {used}; load the "
                          "model in safetensors")  # fmt: skip
    size = _value(reader, f"{family}.attention.key_length")
    for name in ("head_dim", "query_pre_attn_scalar"):
        read_as = getattr(config, name, None)
        if None not in (size, read_as) and read_as != size:
            raise CanopyError(f"{path} has heads of {size} values, and transformers takes {name}={read_as}; load the "
                              "model in safetensors")  # fmt: skip


def _value(reader: GGUFReader, name: str) -> Any:
    found = reader.fields.get(name)
    return None if found is None else found.contents()
