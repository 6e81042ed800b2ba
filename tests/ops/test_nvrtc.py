"""Every kernel compiles for every architecture without a GPU, keeps its registers, and is compiled only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from canopyq.errors import CanopyError
from canopyq.ops.cuda import nvrtc

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
DECODE = {"ELEMENT_BF16": 1, "SCALE_BF16": 1, "BITS": 4, "GROUP": 128, "ASYMMETRIC": 0, "COLUMN_TILES": 1,
          "TILE_BLOCKS": 1, "WARPS": 8, "DEPTH": 6, "CLUSTER": 1}  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_compiles_without_spilling(arch: str) -> None:
    found = nvrtc.compile("decode.cu", DECODE, arch)
    assert found.cubin[:4] == b"\x7fELF"
    assert found.spilled == 0 and 0 < found.registers <= 64 and not found.warnings


@needs_nvrtc
def test_what_was_compiled_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path / "cache"))
    first = nvrtc.compile("decode.cu", DECODE, "sm_80")
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
    with pytest.raises(CanopyError, match="decode.cu does not compile for sm_80: (.|\n)*COLUMN_TILES"):
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
