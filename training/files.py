"""The files of a trained model: written whole or not at all, and the manifest that loading checks them by."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from canopyq.tutor.loading import CHECKED, MANIFEST, sha256


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: nobody ever sees half a file."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def write_json(path: Path, content: object) -> None:
    """``content`` as indented JSON."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def write_manifest(folder: Path) -> None:
    """Size and SHA-256 of every file that makes up the model."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in CHECKED}
    write_json(folder / MANIFEST, entries)
