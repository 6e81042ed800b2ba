"""The files of a trained model: written whole or not at all, and the manifest that loading checks them by."""

from __future__ import annotations

import json
from pathlib import Path

from canopyq.disk import write_atomic
from canopyq.tutor.loading import CHECKED, MANIFEST, sha256


def write_json(path: Path, content: object) -> None:
    """``content`` as indented JSON."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def write_manifest(folder: Path) -> None:
    """Size and SHA-256 of every file that makes up the model."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in CHECKED}
    write_json(folder / MANIFEST, entries)
