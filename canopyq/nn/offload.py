"""Models that accelerate has spread out (``device_map``): layers whose weights lie on disk or in RAM and are fetched
for each call.

Such a module holds meta tensors, and a hook of accelerate's that knows where the values are. When the module is
replaced by a quantized one, the packed weight goes where the old weight was, and a hook like the old one fetches it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from canopyq.errors import CanopyError, wrapped
from canopyq.nn.linear import QuantizedLinear


def is_away(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's weights for each call."""
    return any(hook.offload for hook in _hooks(module))


def runs_on(module: nn.Module) -> torch.device | None:
    """The device that accelerate runs the module on; None if it has no say in it."""
    return next((_device(hook) for hook in _hooks(module) if hook.execution_device is not None), None)


def lies(module: nn.Module) -> str:
    """Where the weights of a module that `is_away` lie: ``"on disk"`` or ``"in RAM"``."""
    return "in RAM" if _disk(_offloading(module)) is None else "on disk"


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its first weight lies, or, if that is away, where it runs."""
    weight = next(model.parameters(), None)
    if weight is not None and not weight.is_meta:
        return weight.device
    return runs_on(model) or torch.device("cpu")


def values(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters, those that lie elsewhere read from there.

    Raises:
        CanopyError: if they cannot be read.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if is_away(module):
        stored = _offloading(module).weights_map
        with wrapped(
            "its weights lie elsewhere and cannot be read", "load the model again"
        ):  # safetensors has its own exception, the system others
            return {name: stored[name] if tensor.is_meta else tensor for name, tensor in own.items()}
    return own


class Replacing:
    """Puts quantized layers where the weights lie that they take the place of. A context: if it is left by an error,
    the files that it wrote are gone again."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def take(self, name: str, old: nn.Module, layer: QuantizedLinear) -> None:
        """Send the tensors of ``layer`` where those of ``old`` are, if they are away.

        Raises:
            CanopyError: if they lie on disk in a folder that is not known or not writable.
        """
        if not is_away(old):
            return
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        hook = _offloading(old)
        layer.to(_device(hook)).prepack()  # the layout has to be the last one: a fetched layer cannot change it
        named = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        store: Mapping[str, Tensor] = {leaf: tensor.detach().cpu() for leaf, tensor in named}
        if (folder := _disk(hook)) is not None:
            store = self._write(name, store, folder)
        fetching = AlignDevicesHook(_device(hook), offload=True, io_same_device=_io_same_device(old), weights_map=store,
                                    offload_buffers=True, skip_keys=hook.skip_keys)  # fmt: skip
        add_hook_to_module(layer, fetching)

    def _write(self, name: str, tensors: Mapping[str, Tensor], folder: str | Path) -> Mapping[str, Tensor]:
        from accelerate.utils import OffloadedWeightsLoader

        if not folder:
            raise CanopyError(f"{name} lies on disk, and its packed weight needs a folder there; load the model with "
                              "offload_folder=…")  # fmt: skip
        with wrapped(f"{name} could not be written to {folder}", "the model is as it was"):
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix="canopyq-", dir=folder))
            file = self.folder / f"{name}.safetensors"
            save_file({leaf: tensor.contiguous() for leaf, tensor in tensors.items()}, file)
        index = {leaf: {"safetensors_file": str(file), "weight_name": leaf} for leaf in tensors}
        return OffloadedWeightsLoader(index=index)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hook of the one that it replaces, if that one brings inputs to its device and no more."""
    if not _hooks(old) or is_away(old):
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = _hooks(old)[0]
    add_hook_to_module(new, AlignDevicesHook(hook.execution_device, io_same_device=_io_same_device(old),
                                             skip_keys=hook.skip_keys, place_submodules=True))  # fmt: skip


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks that move inputs and weights of a module."""
    found = module.__dict__.get("_hf_hook")
    return [hook for hook in getattr(found, "hooks", (found,)) if hasattr(hook, "weights_map")]


def _offloading(module: nn.Module) -> Any:
    return next(hook for hook in _hooks(module) if hook.offload)


def _device(hook: Any) -> torch.device:
    return torch.device(hook.execution_device)


def _io_same_device(module: nn.Module) -> bool:
    return any(hook.io_same_device for hook in _hooks(module))


def _disk(hook: Any) -> str | Path | None:
    """The folder in which a hook's weights lie, "" if it is not known; None if they lie in RAM."""
    stored, prefix = hook.weights_map, ""
    while hasattr(stored, "prefix"):
        stored, prefix = stored.dataset, stored.prefix + prefix
    index, in_memory = getattr(stored, "index", {}), getattr(stored, "state_dict", {})
    if not any(name.startswith(prefix) and name not in in_memory for name in index):
        return None
    return stored.save_folder or ""
