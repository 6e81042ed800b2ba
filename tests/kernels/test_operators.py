"""The operators that canopyq registers with torch."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import canopyq


def test_every_operator_has_a_name_of_its_own() -> None:
    """A second definition silently takes the place of the first."""
    names = Counter()
    for path in Path(canopyq.__file__).parent.rglob("*.py"):
        names.update(re.findall(r'custom_op\(\s*"(canopyq::\w+)"', path.read_text(encoding="utf-8")))
    assert len(names) > 10 and max(names.values()) == 1, names.most_common(3)
