"""Compiling without a GPU: once, then from disk; what is said when it does not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import nvrtc

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
DECODE = {"ELEMENT_BF16": 1, "SCALE_BF16": 1, "BITS": 4, "GROUP": 128, "ASYMMETRIC": 0, "COLUMN_TILES": 1,
          "TILE_BLOCKS": 1, "WARPS": 8, "DEPTH": 6, "CLUSTER": 1}  # fmt: skip


@needs_nvrtc
def test_what_was_compiled_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path / "cache"))
    first = nvrtc.compile("decode.cu", DECODE, "sm_80")
    assert first.cubin[:4] == b"\x7fELF" and 0 < first.registers <= 128
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compile("decode.cu", DECODE, "sm_80") == first
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cubin", ".log"]


@needs_nvrtc
def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path / "file" / "cache"))
    assert nvrtc.compile("decode.cu", DECODE, "sm_80").cubin


@needs_nvrtc
def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(CanopyError, match="decode.cu does not compile for sm_80: .*COLUMN_TILES"):
        nvrtc.compile("decode.cu", {"BITS": 4, "GROUP": 128}, "sm_80")


def test_without_nvrtc_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda: "it is not here")
    with pytest.raises(CanopyError, match="decode.cu cannot be compiled: it is not here"):
        nvrtc.compile("decode.cu", DECODE, "sm_80")


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_architectures(capability: tuple[int, int], name: str) -> None:
    assert nvrtc.architecture(capability) == name
