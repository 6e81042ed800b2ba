"""The reader's progress: one small JSON file beside the notebooks.

Progress is a convenience. Whatever is wrong with the file, the course goes on without it; the reader is told once, in
one line that names the file and the cure.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from canopyq.disk import locked, write_atomic

VARIABLE = "CANOPYQ_PROGRESS"
FILE_NAME = ".canopyq-progress.json"
# What an entry of each section may hold; anything else stays in the file and is left out when it is read.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "quizzes": {"answer": str, "right": bool, "tries": int},
    "exercises": {"passed": bool, "tries": int, "solution_seen": bool, "started": (int, float)},
    "predictions": {"guess": (int, float)},
}


def default_path() -> Path:
    """``$CANOPYQ_PROGRESS``, else a hidden file in the notebooks folder (the current folder, if there is none)."""
    if named := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(named))
    here = Path.cwd()
    places = (here / "notebooks", here.parent)  # opened from the project's folder, or an appendix in notebooks/more
    return next((folder for folder in places if any(folder.glob("00_*.ipynb"))), here) / FILE_NAME


class Store:
    """Reads the file before each use, since several notebooks may be open. What changes is put into the file as it then
    is, under a lock; whatever else stands in it, such as what a newer version wrote, stays."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self._memory = _empty()  # what could not be written
        self._said: set[str] = set()
        self._pending: list[str] = []

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All entries, by section and id, with the fields that are known and well-formed."""
        try:
            content = self._parse()
        except ValueError:
            content = self._read_anew()
        except OSError as error:
            self._say("read", f"cannot be read ({_reason(error)})", "make it readable")
            content = {}
        return _known(_merged(content, self._memory))

    def get(self, section: str, key: str) -> dict[str, Any]:
        return self.read()[section].get(key, {})

    def record(self, section: str, key: str, *, tried: bool = False, **fields: Any) -> dict[str, Any]:
        """Write ``fields`` into an entry, and one try more if it was ``tried``; the entry as it then is.

        In memory only while the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                content = _merged(self._parse(set_aside=True), self._memory)
                entry = _record(content, section, key, tried, fields)
                text = json.dumps({"version": 1, **content}, indent=1, sort_keys=True)
                write_atomic(self.path, f"{text}\n".encode())
            self._memory = _empty()
        except (OSError, RecursionError) as error:
            self._say("write", f"cannot be written ({_reason(error)})", "make it and its folder writable")
            self._memory[section].setdefault(key, dict(self.get(section, key)))
            entry = _record(self._memory, section, key, tried, fields)
        return entry

    def notice(self) -> str:
        """What the reader has to be told and has not been yet; empty if nothing."""
        text, self._pending = " ".join(self._pending), []
        return text

    def _parse(self, *, set_aside: bool = False) -> dict[str, Any]:
        """The content of the file. If it is damaged, raise ValueError, or move it away: then the rest of it."""
        if not self.path.exists():
            return {}
        if not self.path.is_file():  # a pipe would wait for ever
            raise OSError(errno.EINVAL, "it is no regular file")
        raw = self.path.read_bytes()
        if not raw.strip():  # a new, empty file
            return {}
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):
            content = None
        whole = _well_formed(content)
        if whole != content:
            if not set_aside:
                raise ValueError
            self._set_aside()
        return whole

    def _read_anew(self) -> dict[str, Any]:
        """Move a damaged file away, unless another program has done so meanwhile; what could be read of it."""
        try:
            with locked(self.path):
                return self._parse(set_aside=True)
        except OSError as error:
            self._say("aside", f"is damaged and cannot be moved ({_reason(error)})", "delete it")
            return {}

    def _set_aside(self) -> None:
        real = Path(os.path.realpath(self.path))
        name = f"{real.name.lstrip('.')}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (name, *(f"{name}-{n}" for n in range(2, 1000)))
        aside = next(real.with_name(name) for name in names if not real.with_name(name).exists())
        os.rename(real, aside)
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


def _merged(content: dict[str, Any], over: dict) -> dict[str, Any]:
    """A file's content with other entries' fields over it."""
    merged = {**content, **{section: dict(content.get(section, {})) for section in FIELDS}}
    for section, entries in over.items():
        for key, fields in entries.items():
            merged[section][key] = {**merged[section].get(key, {}), **fields}
    return merged


def _record(content: dict, section: str, key: str, tried: bool, fields: dict[str, Any]) -> dict[str, Any]:
    entry = content[section].setdefault(key, {})
    if tried:
        tries = entry.get("tries", 0)
        fields = {**fields, "tries": (tries if _fits(tries, int) else 0) + 1}
    entry.update(fields)
    return entry


def _well_formed(content: Any) -> dict[str, Any]:
    """What can be gone on with of a parsed file: an object whose sections are objects, and in them entries likewise."""
    if not isinstance(content, dict):
        return {}
    whole = {name: part for name, part in content.items() if name not in FIELDS or isinstance(part, dict)}
    for section in FIELDS:
        if section in whole:
            whole[section] = {key: entry for key, entry in whole[section].items() if isinstance(entry, dict)}
    return whole


def _known(content: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The fields that this version knows, of the type that it knows; entries without any are left out."""
    known = _empty()
    for section, kinds in FIELDS.items():
        for key, entry in content[section].items():
            fields = {name: entry[name] for name, kind in kinds.items() if name in entry and _fits(entry[name], kind)}
            if fields:
                known[section][key] = fields
    return known


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, kind) and (not isinstance(value, float) or math.isfinite(value))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
