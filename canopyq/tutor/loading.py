"""Loading the tutor model, or the one that the environment variable ``CANOPYQ_MODEL`` names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from canopyq import checks
from canopyq.errors import CanopyError, shown, wrapped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from canopyq.checkpoint.load import LoadedModel

VARIABLE = "CANOPYQ_MODEL"
TUTOR = "tutor"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
MANIFEST = "weights.json"
WEIGHTS = "model.safetensors"
CHECKED = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def path() -> Path:
    """The folder of the tutor model that ships with the package."""
    return Path(__file__).with_name("weights")


def source() -> str:
    """What `load` loads: "tutor", or the folder or hub id that ``CANOPYQ_MODEL`` names."""
    return os.environ.get(VARIABLE, "").strip() or TUTOR


def load(
    dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    """The model, ready to answer, and its tokenizer.

    It is the tutor model, read offline, unless ``CANOPYQ_MODEL`` names a folder or a model on the Hugging Face hub.
    By default it computes in float32 on the CPU, and in bfloat16 on a GPU.
    """
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.checkpoint.plan import meta_model

    if source() == TUTOR:
        return load_folder(path(), dtype, device)
    folder = source_folder()
    cure = "name a folder or a hub id of a causal language model"
    with _of_variable(), wrapped(f"{folder} cannot be loaded", cure):
        meta_model(Checkpoint(folder))  # it is one, no larger than its files, and runs no foreign code
        return _read(folder, dtype, device)


def source_folder() -> Path:
    """The folder of the model that `load` loads; one that the hub has is fetched to the cache first."""
    from canopyq.checkpoint.hub import model_folder

    if (name := source()) == TUTOR:
        return path()
    with _of_variable():
        return model_folder(name)


@contextmanager
def _of_variable() -> Iterator[None]:
    """Say whose value it was that led to an error."""
    try:
        yield
    except CanopyError as error:
        raise CanopyError(f"{VARIABLE}={shown(source())}: {error}; or unset {VARIABLE}") from None


def load_folder(
    folder: Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    """A model that the training script wrote. Its files are checked before any of them is read."""
    verify(folder)
    with wrapped(f"the tutor model in {folder} cannot be loaded", "reinstall canopyq"):
        return _read(folder, dtype, device)


def verify(folder: Path) -> None:
    """Raise a ``CanopyError`` unless every file is the one that the training script wrote."""
    cure = "reinstall canopyq, or train anew with make train-tutor"
    with wrapped(f"{folder / MANIFEST} of the tutor model is missing or damaged", cure):
        entries = json.loads((folder / MANIFEST).read_text())
        expected = {name: (int(entries[name]["bytes"]), entries[name]["sha256"]) for name in CHECKED}
    for name, (size, digest) in expected.items():
        with wrapped(f"{folder / name} of the tutor model is missing, damaged or not to be read", cure):
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"it has {found:,} bytes instead of {size:,}")
            if sha256(folder / name) != digest:
                raise ValueError(f"it does not have the SHA-256 that {MANIFEST} names")


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        CanopyError: if there is none, or transformers cannot read it without running code from the folder.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise CanopyError(f"{folder} holds no tokenizer; save the model's own there: tokenizer.save_pretrained(folder)")
    with wrapped(f"the tokenizer in {folder} cannot be loaded", "write it again"):
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_other(
    folder: Path, model_class: type[PreTrainedModel] | None = None
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    """Any model in a folder, in float32 on the CPU, and its tokenizer.

    Args:
        model_class: None: a causal language model.

    Raises:
        CanopyError: if transformers cannot read it without running code from the folder.
    """
    with wrapped(f"{folder} cannot be loaded as a model with a tokenizer"):
        return _read(folder, None, None, model_class)


def _read(
    folder: Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    model_class: type[PreTrainedModel] | None = None,
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from canopyq.checkpoint.files import raise_not_finite

    place = torch.device("cpu") if device is None else checks.device(device)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    else:
        dtype = checks.dtype("dtype", dtype)
    with _quiet():
        options = {"local_files_only": True, "trust_remote_code": False}  # never ask whether to run foreign code
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        config = AutoConfig.from_pretrained(folder, **options)
        if "/" in str(config._attn_implementation):  # transformers would fetch and run it
            raise CanopyError(
                f"{folder} asks for {shown(config._attn_implementation)}, code on the hub; do not trust it"
            )
        if isinstance(quantization := getattr(config, "quantization_config", None), dict):
            config.quantization_config = quantization | {"dequantize": True}  # models published in FP8 or MXFP4
        model, report = (model_class or AutoModelForCausalLM).from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            example = sorted(report[problem], key=str)[0]
            raise CanopyError(
                f"the weights in {folder} do not match its config.json ({problem}: {example}); mend the folder"
            )
    for name, parameter in model.named_parameters():
        raise_not_finite(parameter, name)
    if model.dtype != dtype:  # dequantized in another one
        model.to(dtype)
    return model.to(place).eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no chatter from transformers for a model that loads in a moment."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
