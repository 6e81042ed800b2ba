"""What a function returned, brought into one form so that it can be compared and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exercises.base import Exercise


class FormError(ValueError):
    """What was returned cannot be compared at all; the message says what is expected."""


@dataclass(frozen=True)
class Outcome:
    """Every part as a float64 tensor, and remarks that do not change the verdict."""

    parts: dict[str, Tensor]
    notes: tuple[str, ...]


def normalised(result: Any, exercise: Exercise) -> Outcome:
    """The parts of what was returned. Raises `FormError` with clear words if that is impossible."""
    names = exercise.parts
    if len(names) == 1:
        values = [result]
    else:
        wanted = f"Return {len(names)} things, `{', '.join(names)}`"
        if not isinstance(result, (tuple, list)):
            raise FormError(f"{wanted}; yours returns {_kind(result)}.")
        if len(result) != len(names):
            raise FormError(f"{wanted}; yours returns {len(result)}.")
        values = list(result)
    parts, notes = {}, []
    for name, value in zip(names, values, strict=True):
        parts[name], note = _tensor(name, value, name in exercise.integers)
        notes += [note] if note else []
    return Outcome(parts, tuple(notes))


def _tensor(name: str, value: Any, whole: bool) -> tuple[Tensor, str]:
    note = ""
    if value is None or isinstance(value, (str, dict, set)):
        raise FormError(f"`{name}` should be a tensor or a number; yours is {_kind(value)}.")
    if isinstance(value, np.ndarray):
        note = f"`{name}` is a NumPy array. The numbers count here, but the lessons go on with tensors."
    elif isinstance(value, (list, tuple)):
        note = f"`{name}` is a {type(value).__name__}. The numbers count here, but the lessons go on with tensors."
    try:
        tensor = torch.as_tensor(value).detach().cpu()
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    except (TypeError, ValueError, RuntimeError):
        raise FormError(f"`{name}` should be a tensor of numbers; yours is {_kind(value)}.") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise FormError(f"`{name}` should hold real numbers; yours is {_kind(value)}.")
    if whole and isinstance(value, Tensor) and tensor.is_floating_point() and tensor.dim():
        kind = str(tensor.dtype).removeprefix("torch.")
        note = f"`{name}` are whole numbers kept as {kind}. `.to(torch.int8)` stores them in one byte each."
    return tensor.to(torch.float64), note


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to float32 rounding. A single number may come with or without a dimension."""
    if a.shape != b.shape:
        if a.numel() != 1 or b.numel() != 1:
            return False
        a, b = a.reshape(()), b.reshape(())
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-9, equal_nan=True)


def copied(case: tuple) -> tuple:
    """The arguments anew, so that one call cannot change those of the next."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def describe(value: Any) -> str:
    """An argument as it would be typed, cut short."""
    if not isinstance(value, Tensor):
        return f"{value:_}" if isinstance(value, int) and value > 9999 else str(value)
    if value.dim() == 0:
        return f"{value.item():.4g}"
    numbers = ", ".join(_number(v) for v in value.flatten()[:4].double().tolist())
    if value.numel() > 4:
        numbers += ", …"
    elif value.dim() == 1:
        return f"tensor([{numbers}])"
    return f"tensor of shape {tuple(value.shape)}: {numbers}"


def differing(
    exercise: Exercise, case: tuple, mine: Tensor, right: Tensor, part: str
) -> list[tuple[str, str, str, str]]:
    """Up to four places where the results differ: which, the value of the input there, expected, got.

    The input's value stands there if exactly one argument has the result's shape: only then is it clear which one.
    """
    if mine.shape != right.shape and not mine.numel() == right.numel() == 1:
        return [(f"shape of {part}", "", str(tuple(right.shape)), str(tuple(mine.shape)))]
    flat_mine, flat_right = mine.flatten(), right.flatten()
    alike = [v for v in case if isinstance(v, Tensor) and v.shape == right.shape]
    x = alike[0] if len(alike) == 1 else None
    bad = [i for i in range(right.numel()) if not same(flat_mine[i], flat_right[i])][:4]
    rows = []
    for i in bad:
        place = f"{part}[{', '.join(map(str, _index(i, right.shape)))}]" if right.dim() else part
        given = "" if x is None or not right.dim() else _number(x.flatten()[i].item())
        rows.append((place, given, _number(flat_right[i].item()), _number(flat_mine[i].item())))
    return rows


def _index(i: int, shape: torch.Size) -> list[int]:
    return [int(n) for n in np.unravel_index(i, tuple(shape))]


def _number(value: float) -> str:
    value += 0.0  # no "-0"
    return f"{value:.0f}" if abs(value) < 1e15 and value == round(value) else f"{value:.6g}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor"
    return "nothing (`None`)" if value is None else f"a {type(value).__name__}"
