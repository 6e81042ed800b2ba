"""The training log: one JSON object a line, and a short line on the screen."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


class Log:
    """Writes to a temporary file, which gets its name when the run has ended well."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._part.unlink(missing_ok=True)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self._part.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.note(json.dumps(record))

    def note(self, text: str) -> None:
        print(text, flush=True)

    def finish(self) -> None:
        os.replace(self._part, self._path)


def machine(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    import tokenizers
    import transformers

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
