"""What vLLM's and SGLang's own classes make of checkpoints, without a GPU and without either of them installed.

python tools/servers.py SOURCE FOLDER…
    SOURCE is the unpacked source of vLLM or SGLang. Prints a JSON object: for each folder and number of ranks the class
    that takes each quantized layer, the kernel where it names one, and the shapes that do not fit the files.

Real are the classes that read a quantization config, choose a scheme and a kernel, and lay out its weights
(``from_config``, ``get_scheme``, ``create_weights``). Everything else that they import is a stand-in, and the GPU that
they ask for has an H100's compute capability, 9.0. Nothing is computed. Run it in a process of its own: it replaces
imports.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

REAL = {
    "vllm": (
        "vllm.model_executor.layers.quantization.compressed_tensors",
        "vllm.model_executor.layers.quantization.base_config",
        *(f"vllm.model_executor.layers.quantization.utils.{name}_utils" for name in
          ("config", "quant", "fp8", "w8a8", "marlin", "marlin_fp4", "machete")),
        "vllm.model_executor.layers.quantization.utils.humming.priority",
        "vllm.model_executor.kernels", "vllm.model_executor.parameter", "vllm.scalar_type", "vllm.distributed.utils",
    ),
    "sglang": (
        "sglang.srt.layers.quantization.compressed_tensors", "sglang.srt.layers.quantization.base_config",
        "sglang.srt.layers.quantization.base_scheme", "sglang.srt.layers.quantization.utils",
        "sglang.srt.layers.quantization.marlin_utils", "sglang.srt.layers.quantization.fp8_utils",
        "sglang.srt.layers.parameter",
    ),
}  # fmt: skip
CAPABILITY = (9, 0)
ROW_PARALLEL = ("o_proj", "down_proj")  # split along the inputs; every other layer along the outputs
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class StandIn(types.ModuleType):
    """A module that has whatever is asked of it: a class for a name like ``Name``, something to call for others."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[0].isupper() and not name.isupper()
        made = type(name, (), {"__init__": lambda *_, **__: None}) if is_class else MagicMock(name=name)
        setattr(self, name, made)
        return made


class Imports(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand-ins for all of a server but `REAL`, and for what it imports that is not installed."""

    def __init__(self, source: Path, package: str) -> None:
        self.source, self.package = str(source), package

    def find_spec(self, name: str, path=None, target=None):
        parts, real = name.split("."), REAL[self.package]
        if parts[0] == self.package:
            below = any(name == one or name.startswith(f"{one}.") for one in real)
            above = any(one.startswith(f"{name}.") for one in real)
            found = Path(self.source, *parts)
            if not below or not (found.is_dir() or found.with_suffix(".py").is_file()):
                spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
                if above:
                    spec.submodule_search_locations = [str(found)]
                return spec
            return None  # the ordinary finders read it
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(self.source) and parts[0] != "triton" and not _installed(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__path__ = spec.submodule_search_locations or []
        return module

    def exec_module(self, module) -> None:
        pass


def _installed(name: str) -> bool:
    return any(
        finder.find_spec(name.split(".")[0], None) for finder in sys.meta_path if not isinstance(finder, Imports)
    )


def main(source: Path, folders: list[Path]) -> dict:
    package = next(name for name in REAL if (source / name).is_dir())
    sys.path.insert(0, str(source))
    sys.meta_path.insert(0, Imports(source, package))
    asked = _vllm() if package == "vllm" else _sglang()
    return {str(folder): {ranks: asked(folder, ranks) for ranks in (1, 2, 4)} for folder in folders}


def _vllm():
    import vllm.config
    import vllm.envs
    import vllm.logger
    import vllm.platforms

    class Capability(tuple):
        major, minor = CAPABILITY

        def to_int(self) -> int:
            return 10 * self[0] + self[1]

    platform = MagicMock(name="current_platform")
    platform.is_cuda.return_value = platform.is_cuda_alike.return_value = True
    for other in ("is_rocm", "is_xpu", "is_cpu", "is_tpu", "is_out_of_tree"):
        getattr(platform, other).return_value = False
    platform.get_device_capability.return_value = Capability(CAPABILITY)
    platform.has_device_capability.side_effect = lambda wanted, *_: CAPABILITY >= _pair(wanted)
    platform.is_device_capability.side_effect = lambda wanted, *_: CAPABILITY == _pair(wanted)
    platform.is_device_capability_family.side_effect = lambda wanted, *_: CAPABILITY[0] == wanted // 10
    platform.fp8_dtype.return_value = torch.float8_e4m3fn
    vllm.platforms.PlatformEnum = enum.Enum("PlatformEnum", "CUDA ROCM TPU XPU CPU OOT UNSPECIFIED")
    platform._enum = vllm.platforms.PlatformEnum.CUDA
    vllm.platforms.current_platform = platform
    humming = importlib.import_module("vllm.model_executor.layers.quantization.utils.humming")
    priority = importlib.import_module(f"{humming.__name__}.priority")
    humming.prefers_humming, humming.prioritize_humming = priority.prefers_humming, priority.prioritize_humming
    vllm.config.get_current_vllm_config_or_none = lambda: None
    for name in ("VLLM_BATCH_INVARIANT", "VLLM_DISABLED_KERNELS", "VLLM_MARLIN_INPUT_DTYPE"):
        setattr(vllm.envs, name, () if name.endswith("KERNELS") else None)
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    def kernel_of(scheme) -> str:
        kernel = getattr(scheme, "kernel", None)
        return type(kernel).__name__ if kernel is not None else ""

    return lambda folder, ranks: _ask(folder, ranks, CompressedTensorsConfig, LinearBase, kernel_of)


def _sglang():
    import sglang.srt.utils

    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    sglang.srt.utils.get_device_capability = lambda *_: CAPABILITY
    sglang.srt.utils.get_cuda_version = lambda: (12, 8)
    for name in ("hip", "npu", "xpu", "cpu", "musa", "hpu"):
        setattr(sglang.srt.utils, f"is_{name}", lambda: False)
    from sglang.srt.layers.linear import LinearBase

    marlin_utils = importlib.import_module("sglang.srt.layers.quantization.marlin_utils")
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    def kernel_of(scheme) -> str:
        if (c := getattr(scheme, "kernel_config", None)) is None:
            return ""
        if c.group_size not in marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES:
            raise ValueError(f"Marlin has no groups of {c.group_size}")
        (inputs, outputs), whole = c.partition_weight_shape, c.full_weight_shape[0]
        fits, why = marlin_utils.check_marlin_supports_shape(outputs, inputs, whole, c.group_size)
        if not fits:
            raise ValueError(why)
        return "Marlin"

    return lambda folder, ranks: _ask(folder, ranks, CompressedTensorsConfig, LinearBase, kernel_of)


def _pair(capability) -> tuple[int, int]:
    return divmod(capability, 10) if isinstance(capability, int) else tuple(capability)


def _ask(
    folder: Path, ranks: int, config_class: type, base: type, kernel_of: Callable[[Any], str]
) -> dict[str, dict[str, str]]:
    """Layer, as the server fuses it -> scheme, kernel, and what does not fit."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        quantization = config_class.from_config(config["quantization_config"])
    except Exception as error:
        return {"": {"error": _words(error)}}
    quantization.packed_modules_mapping = FUSED
    tensors = _headers(folder)
    found = {}
    for name, parts in _layers(tensors).items():
        layer = type("Linear", (base, torch.nn.Module), {"__init__": torch.nn.Module.__init__})()
        leaf, shapes = name.rpartition(".")[2], [_shape(tensors, part) for part in parts]
        inputs, outputs = shapes[0][1], [shape[0] for shape in shapes]
        by_inputs = leaf in ROW_PARALLEL
        try:
            scheme = (getattr(quantization, "get_linear_scheme", None) or quantization.get_scheme)(layer, name)
            if scheme is None:
                found[name] = {"error": "it takes the layer as unquantized"}
                continue
            scheme.create_weights(
                layer=layer, input_size=inputs, input_size_per_partition=inputs // ranks if by_inputs else inputs,
                output_partition_sizes=[n if by_inputs else n // ranks for n in outputs], output_size=sum(outputs),
                params_dtype=torch.bfloat16, weight_loader=lambda *_: None,
            )  # fmt: skip
            found[name] = {"scheme": type(scheme).__name__, "kernel": kernel_of(scheme)}
        except Exception as error:
            found[name] = {"error": _words(error)}
            continue
        if wrong := _misfits(layer, tensors, parts, ranks if by_inputs else 1, 1 if by_inputs else ranks):
            found[name]["error"] = wrong
    return found


def _headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], tuple]]:
    """Name -> dtype, shape, and the values if they are one or two."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                values = tuple(opened.get_tensor(name).flatten().tolist()) if math.prod(part.get_shape()) <= 2 else ()
                found[name] = (part.get_dtype(), tuple(part.get_shape()), values)
    return found


def _layers(tensors: dict) -> dict[str, list[str]]:
    """Layers as a server computes them -> the modules in the files that they are made of."""
    made: dict[str, list[str]] = {}
    for name in tensors:
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            parent, _, leaf = module.rpartition(".")
            fused = next((one for one, leaves in FUSED.items() if leaf in leaves), leaf)
            made.setdefault(f"{parent}.{fused}", []).append(module)
    order = [leaf for leaves in FUSED.values() for leaf in leaves]
    return {name: sorted(parts, key=lambda part: (*order, part).index(part.rpartition(".")[2])
                         if part.rpartition(".")[2] in order else 0) for name, parts in made.items()}  # fmt: skip


def _shape(tensors: dict, module: str) -> tuple[int, int]:
    if f"{module}.weight_shape" in tensors:
        return tensors[f"{module}.weight_shape"][2]
    if f"{module}.weight_packed" in tensors:  # two FP4 codes in a byte
        n, half = tensors[f"{module}.weight_packed"][1]
        return n, 2 * half
    return tensors[f"{module}.weight"][1]


def _misfits(layer: torch.nn.Module, tensors: dict, parts: list[str], across: int, down: int) -> str:
    """Which parameters of a rank, times the ranks that share them, are not as large as what lies in the files."""
    wrong = []
    for name, parameter in layer.named_parameters():
        if name == "weight_shape" or f"{parts[0]}.{name}" not in tensors:
            continue
        shapes = [tensors[f"{part}.{name}"][1] for part in parts]
        if name.startswith("input_") and parameter.numel() == 1:  # of the one input that all parts share
            if len({tensors[f"{part}.{name}"][2] for part in parts}) > 1:
                wrong.append(f"{name} differs between {' and '.join(parts)}")
            continue
        file = sum(shape[0] if shape else 1 for shape in shapes), *shapes[0][1:]
        whole = tuple(parameter.shape)
        scale_of_all = parameter.numel() == len(parts) * max(1, *(s[0] if len(s) == 1 else 0 for s in shapes))
        if len(file) == 2 and len(whole) == 2:
            split = across if whole[1] * across == file[1] else 1  # a scale a channel is the same on all ranks
            whole = (whole[0] * down, whole[1] * split)
        if whole != file and not scale_of_all:
            wrong.append(f"{name} would be {whole}, and the files hold {file}")
    return "; ".join(wrong)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), [Path(one) for one in sys.argv[2:]]), indent=1))
