"""What this machine has, and what of the course can run on it and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from canopyq.kernels.dispatch import KERNELS
from canopyq.kernels.spec import LinearSpec
from canopyq.tensor.scheme import Recipe

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "jupyterlab", "ipywidgets", "matplotlib")


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``needed`` ones must be ok for the course to run."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


def describe() -> dict[str, str]:
    """Python, operating system, processor, memory, GPU and the versions of what canopyq builds on."""
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "memory": f"{_memory_bytes() / 1e9:.1f} GB" if _memory_bytes() else "unknown",
        "gpu": gpu(),
    }
    for package in PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def gpu() -> str:
    """The GPU that torch would use, or why there is none."""
    if not torch.cuda.is_available():
        return "none: this torch is a CPU build" if torch.version.cuda is None else "none that CUDA can see"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB, compute capability {found.major}.{found.minor}"


def kernels() -> list[Check]:
    """The ways in which a quantized layer can be computed, and whether each runs here."""
    why_not = None
    if not torch.cuda.is_available():
        why_not = f"no GPU ({gpu().removeprefix('none: ').removeprefix('none ')})"
    found = []
    for kernel in KERNELS.values():
        recipe = Recipe.parse(kernel.recipe)
        device = torch.device(kernel.device or "cpu")
        spec = LinearSpec(recipe.weights, recipe.activations, 4096, 4096, torch.bfloat16, device)
        reason = kernel.unsupported_reason(spec)
        found.append(Check(kernel.name, reason is None, reason or f"runs here, e.g. {kernel.recipe}", needed=False))
    return [*found, Check("dequantize, then multiply on CUDA", why_not is None, why_not or gpu(), needed=False)]


def checks() -> list[Check]:
    """Everything that the course needs, looked at one by one."""
    from canopyq.errors import CanopyError

    found = [
        Check("python", sys.version_info >= (3, 10), f"{platform.python_version()} (3.10 or newer)"),
        *[_importable(package) for package in ("transformers", "safetensors", "tokenizers")],
        *[
            _importable(package, "pip install 'canopyq[course]'")
            for package in ("jupyterlab", "ipywidgets", "matplotlib")
        ],
    ]
    try:
        from canopyq import tutor
        from canopyq.tutor.loading import TUTOR, VARIABLE, source

        model, _ = tutor.load()
        detail = f"{sum(p.numel() for p in model.parameters()):,} parameters loaded"
        if source() != TUTOR:
            detail += f" from {VARIABLE}={source()!r}"
        found.append(Check("tutor", True, detail))
    except (CanopyError, ImportError) as error:
        found.append(Check("tutor", False, str(error)))
    return found + kernels()


def _importable(package: str, cure: str = "pip install canopyq") -> Check:
    missing = Check(package, False, f"not installed; {cure}")
    if importlib.util.find_spec(package) is None:
        return missing
    try:
        return Check(package, True, version(package))
    except PackageNotFoundError:  # a folder of that name, and nothing installed
        return missing


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
