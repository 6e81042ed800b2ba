"""The first 500 mutants of the fuzzer; `make fuzz` runs 10,000."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_checkpoints.py"


def test_no_mutant_does_harm() -> None:
    """In a process of its own, which forks: one that has run other tests may have threads."""
    done = subprocess.run([sys.executable, TOOL, "--count", "500"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and re.search(r"^500 mutants .* 0 failures$", done.stdout, re.MULTILINE), done.stdout
