"""CUDA C++ to machine code by NVRTC, the compiler that torch's CUDA builds bring, kept on disk for the next time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from canopyq.disk import write_atomic
from canopyq.errors import CanopyError

SOURCES = Path(__file__).parent
VARIABLE = "CANOPYQ_CACHE"  # a folder for compiled kernels, instead of ~/.cache/canopyq
OLDEST = (8, 0)  # compute capability: the first with bfloat16 tensor cores and asynchronous copies

NO_LOG_FROM = (13, 0)  # NVRTC: it has a cache of its own, and reports nothing of what it takes from there

Constants = Mapping[str, int | str]


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, and what the compiler reports of the kernel in it.

    Attributes:
        cubin: the code.
        registers: of each thread.
        spilled: bytes that each thread keeps in memory because its registers do not suffice.
        warnings: what the compiler says of slow code, such as tensor-core instructions that it had to serialize.
    """

    cubin: bytes
    registers: int
    spilled: int
    warnings: str = ""


@cache
def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-bindings is not installed ({error}); pip install 'canopyq[gpu]'"
    try:
        result, *_ = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda.pathfinder's own class, whose place has moved between its releases
        return f"NVRTC was not found ({str(error).splitlines()[0]}); pip install nvidia-cuda-nvrtc"
    return None if result == 0 else f"NVRTC does not answer ({result.name})"


def architecture(capability: tuple[int, int]) -> str:
    """The name that NVRTC has for a GPU: sm_90a has instructions (warpgroup matrix products) that sm_90 lacks."""
    major, minor = capability
    return f"sm_{major}{minor}a" if capability == (9, 0) else f"sm_{major}{minor}"


def compile(file: str, constants: Constants, arch: str, *, extra: str = "") -> Compiled:
    """Machine code of a source of this folder, from disk if it was compiled before.

    Args:
        file: such as ``"decode.cu"``.
        constants: defined for the preprocessor, so that one source makes many kernels.
        arch: such as ``"sm_90a"``.
        extra: source text that the file includes as ``"extra.cuh"``.

    Raises:
        CanopyError: if NVRTC is missing, or does not accept the source; with its messages.
    """
    if reason := missing():
        raise CanopyError(f"{file} cannot be compiled: {reason}")
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))}
    headers["extra.cuh"] = extra
    source = (SOURCES / file).read_text(encoding="utf-8")
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in sorted(constants.items())]
    options.append("--device-as-default-execution-space")  # generic lambdas cannot be marked __device__
    version = nvrtc.nvrtcVersion()[1:]
    if version >= NO_LOG_FROM:
        options.append("--no-cache")
    key = hashlib.sha256(repr((version, options, source, headers)).encode()).hexdigest()[:24]
    path = folder() / f"{Path(file).stem}-{arch}-{key}.cubin"
    try:
        return _parse(path.read_bytes(), path.with_suffix(".log").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        cubin, log = _compile(nvrtc, file, source, headers, options)
    with suppress(OSError):  # a folder that cannot be written to only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path.with_suffix(".log"), log.encode())
        write_atomic(path, cubin)
    return _parse(cubin, log)


def folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "canopyq"


def _compile(nvrtc, file: str, source: str, headers: dict[str, str], options: list[str]) -> tuple[bytes, str]:
    names, texts = [name.encode() for name in headers], [text.encode() for text in headers.values()]
    result, program = nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), len(names), texts, names)
    _check(result, file)
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.rstrip(b"\0").decode(errors="replace")
        if result != 0:
            raise CanopyError(f"{file} does not compile for {options[0].split('=')[1]}: {' '.join(text.split())}")
        result, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(result, file)
        cubin = bytearray(size)
        _check(*nvrtc.nvrtcGetCUBIN(program, cubin), file)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), text


def _check(result, file: str) -> None:
    if result != 0:
        raise CanopyError(f"NVRTC failed on {file}: {result.name}")


def _parse(cubin: bytes, log: str) -> Compiled:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    slow = [line.strip() for line in log.splitlines() if "Performance" in line or "warning" in line]
    return Compiled(cubin, max(registers, default=0), sum(spilled), "\n".join(slow))
