"""The reader's progress: one small JSON file beside the notebooks.

Progress is a convenience. Whatever is wrong with the file, the course goes on without it; the reader is told once, in
one line that names the file and the cure.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

VARIABLE = "CANOPYQ_PROGRESS"
FILE_NAME = ".canopyq-progress.json"
# What an entry of each section may hold; anything of another type is left out when the file is read.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "quizzes": {"answer": str, "right": bool, "tries": int},
    "exercises": {"passed": bool, "tries": int, "solution_seen": bool, "started": (int, float)},
    "predictions": {"guess": (int, float)},
}


def default_path() -> Path:
    """``$CANOPYQ_PROGRESS``, else a hidden file in the notebooks folder (the current folder, if there is none)."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    here = Path.cwd()
    folder = here / "notebooks"
    return (folder if any(folder.glob("0*.ipynb")) else here) / FILE_NAME


class Store:
    """Reads the file before each use, since several notebooks may be open, and replaces it whole when it changes."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self._memory = _empty()
        self._said: set[str] = set()
        self._pending: list[str] = []

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All entries, by section and id."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return _merged(_empty(), self._memory)
        except (OSError, UnicodeDecodeError) as error:
            self._say("read", f"cannot be read ({_reason(error)})", "make it readable")
            return _merged(_empty(), self._memory)
        if not text.strip():  # a new, empty file
            return _merged(_empty(), self._memory)
        try:
            data, clean = _checked(json.loads(text))
        except (ValueError, RecursionError):
            data, clean = _empty(), False
        if not clean:
            self._set_aside()
        return _merged(data, self._memory)

    def get(self, section: str, key: str) -> dict[str, Any]:
        return self.read()[section].get(key, {})

    def record(self, section: str, key: str, **fields: Any) -> dict[str, Any]:
        """Write ``fields`` into an entry, atomically; in memory only when the file cannot be written."""
        data = self.read()
        entry = data[section].setdefault(key, {})
        entry.update(fields)
        try:
            _replace(self.path, json.dumps({"version": 1, **data}, indent=1, sort_keys=True) + "\n")
            self._memory = _empty()
        except OSError as error:
            self._memory[section][key] = dict(entry)
            self._say("write", f"cannot be written ({_reason(error)})", "make its folder writable")
        return entry

    def notice(self) -> str:
        """What the reader has to be told and has not been yet; empty if nothing."""
        text, self._pending = " ".join(self._pending), []
        return text

    def _set_aside(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        try:
            os.replace(self.path, aside)
        except OSError as error:
            self._say("aside", f"is damaged and cannot be moved ({_reason(error)})", "delete it")
            return
        self._say("damaged", f"was damaged; what could be read goes on, the old file is kept as {aside.name}", "")

    def _say(self, topic: str, what: str, cure: str) -> None:
        if topic in self._said:
            return
        self._said.add(topic)
        cure = (
            f"; {cure}, or set {VARIABLE} to a file that can be written. The course goes on without it" if cure else ""
        )
        self._pending.append(f"Progress file {self.path} {what}{cure}.")


_stores: dict[Path, Store] = {}


def store() -> Store:
    """The store for the current path: one a file, so that each complaint is made once."""
    path = default_path()
    return _stores.setdefault(path, Store(path))


def _empty() -> dict[str, dict[str, dict[str, Any]]]:
    return {section: {} for section in FIELDS}


def _merged(base: dict, over: dict) -> dict:
    return {section: {**base[section], **{k: dict(v) for k, v in over[section].items()}} for section in FIELDS}


def _checked(data: Any) -> tuple[dict, bool]:
    """The well-formed entries of a parsed file, and whether that was all of it."""
    if not isinstance(data, dict):
        return _empty(), False
    kept, clean = _empty(), True
    for section, fields in FIELDS.items():
        entries = data.get(section, {})
        if not isinstance(entries, dict):
            clean = False
            continue
        for key, entry in entries.items():
            if isinstance(entry, dict) and all(_fits(entry[f], kind) for f, kind in fields.items() if f in entry):
                kept[section][key] = {f: entry[f] for f in fields if f in entry}
            else:
                clean = False
    return kept, clean


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, kind) and (not isinstance(value, float) or math.isfinite(value))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "the file is read-only")
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
