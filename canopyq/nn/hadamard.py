"""The Hadamard transform: a rotation that spreads every value over all others by additions alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError


def hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply each run of ``size`` neighbours of the last dimension by the orthogonal Hadamard matrix of that size.

    The fast Walsh-Hadamard transform: log2(size) passes of sums and differences. It is its own inverse.

    Args:
        x: (…, K), ``size`` divides K.
        size: a power of two.

    Raises:
        CanopyError: for another size.
    """
    if size < 1 or size & (size - 1) or x.shape[-1] % size:
        raise CanopyError(f"a Hadamard transform takes a power of two that divides {x.shape[-1]}, got size={size}")
    y, width = x.reshape(-1, size), 1
    while width < size:
        pairs = y.reshape(-1, size // (2 * width), 2, width)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], dim=2)
        width *= 2
    return (y.reshape(x.shape) * size**-0.5).to(x.dtype)


def largest_power_of_two(n: int) -> int:
    """That divides ``n``."""
    return n & -n


class OnlineHadamard:
    """A forward pre-hook that transforms what goes into a layer, while the model runs."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hadamard(given[0], self.size), *given[1:])


def online_hadamard(module: nn.Module) -> int | None:
    """The size of the transform before a layer's input, or None."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, OnlineHadamard))
    return next((hook.size for hook in hooks), None)
