"""The model's files: written whole or not at all, and checked before anything is read from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from canopyq.errors import CanopyError

MANIFEST = "weights.json"
WEIGHTS = "model.safetensors"
CHECKED = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: nobody ever sees half a file."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def write_json(path: Path, content: object) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def write_manifest(folder: Path) -> None:
    """Size and SHA-256 of every file that makes up the model."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in CHECKED}
    write_json(folder / MANIFEST, entries)


def verify(folder: Path) -> None:
    """Raise a ``CanopyError`` unless every file is the one that the training script wrote."""
    cure = "reinstall canopyq, or train anew with python -m canopyq.tutor.train"
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        expected = {name: (int(entries[name]["bytes"]), entries[name]["sha256"]) for name in CHECKED}
    except FileNotFoundError:
        raise CanopyError(f"the tutor model is missing: no {MANIFEST} in {folder}; {cure}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CanopyError(f"{folder / MANIFEST} is damaged; {cure}") from None
    for name, (size, sha256) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CanopyError(f"the tutor model is incomplete: no {name} in {folder}; {cure}")
        if file.stat().st_size != size:
            raise CanopyError(f"{file} has {file.stat().st_size:,} bytes instead of {size:,}: it is damaged; {cure}")
        try:
            found = _sha256(file)
        except OSError as error:
            raise CanopyError(f"{file} cannot be read ({error.strerror}); allow reading it, or {cure}") from None
        if found != sha256:
            raise CanopyError(f"{file} does not have the SHA-256 that {MANIFEST} names: it is damaged; {cure}")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
