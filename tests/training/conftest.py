"""What the tutor's tests share: a tokenizer, and a folder that the training script wrote in its smallest form."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that has taken 20 steps."""
    out = tmp_path_factory.mktemp("tutor")
    status = train.main(["--out", str(out), "--steps", "20", "--tiny", "--cpu", "--workers", "0", "--gate", "0"])
    assert status == 0
    return out
