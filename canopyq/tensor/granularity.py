"""Which values share a scale.

`Granularity.rows` rearranges any tensor into a matrix whose rows each share one scale; `from_rows` puts it back. With
that, range finding and rounding need to know about rows and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, unknown

MOST_DIMENSIONS = 64  # that a tensor has
KINDS = ("tensor", "channel", "token", "group")


@dataclass(frozen=True)
class Granularity:
    """How many values share one scale.

    * ``tensor``   all of them: one scale
    * ``channel``  those with the same index on ``axis``: for a weight (out_features, in_features), one per output row
    * ``token``    those along the last axis: for an activation (…, hidden), a scale per token
    * ``group``    runs of ``group_size`` neighbours along the last axis, written ``g128``
    """

    kind: str
    group_size: int | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        checks.choice("kind of granularity", self.kind, KINDS)
        if self.kind == "group":
            checks.count("group_size", self.group_size, 1)
        if self.kind != "group" and self.group_size is not None:
            raise CanopyError(
                f"a scale per {self.kind} takes no group size, got {self.group_size}; use g{self.group_size}"
            )
        if checks.count("axis", self.axis, -MOST_DIMENSIONS, MOST_DIMENSIONS) and self.kind != "channel":
            raise CanopyError(f"a scale per {self.kind} has no axis {self.axis}; only 'channel' has one, an integer")

    @classmethod
    def parse(cls, spec: str | Granularity) -> Granularity:
        """``"tensor"``, ``"channel"``, ``"token"`` or ``"g128"``. Raises `CanopyError` for anything else."""
        if isinstance(spec, Granularity):
            return spec
        text = spec.lower() if isinstance(spec, str) else ""
        if match := re.fullmatch(r"g([1-9][0-9]{0,8})", text):
            return cls("group", int(match.group(1)))
        if text in ("tensor", "channel", "token"):
            return cls(text)
        raise unknown("granularity", spec, ("tensor", "channel", "token", "g32", "g64", "g128"), more=", any g<size>")

    def __str__(self) -> str:
        if self.kind == "group":
            return f"g{self.group_size}"
        return self.kind if self.axis == 0 else f"{self.kind} axis {self.axis}"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `CanopyError` if a tensor of this shape cannot be cut so."""
        if self.kind == "channel" and len(shape) < 2:
            raise CanopyError(
                f"a scale per channel needs at least 2 dimensions, got shape {tuple(shape)}; use 'tensor'"
            )
        if self.kind == "channel" and not -len(shape) <= self.axis < len(shape):
            raise CanopyError(f"channel axis {self.axis} does not exist in shape {tuple(shape)}")
        if self.kind == "group" and self.group_size > shape[-1]:
            raise CanopyError(
                f"group size {self.group_size} does not fit: the last dimension of {tuple(shape)} has {shape[-1]}; "
                f"use g{shape[-1]} or smaller, or 'channel'"
            )

    def padding(self, shape: tuple[int, ...]) -> int:
        """How many values the ragged last group lacks (0 unless groups do not divide the last dimension)."""
        return -shape[-1] % self.group_size if self.kind == "group" else 0

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as a matrix (number of scales, values per scale). A ragged last group is filled up with zeros."""
        if self.kind == "tensor":
            return x.reshape(1, -1)
        if self.kind == "channel":
            return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        if self.kind == "token":
            return x.reshape(-1, x.shape[-1])
        if pad := self.padding(x.shape):
            x = F.pad(x, (0, pad))
        return x.reshape(-1, self.group_size)

    def from_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `rows` for a tensor of ``shape``."""
        if self.kind == "channel":
            moved = (shape[self.axis], *(n for i, n in enumerate(shape) if i != self.axis % len(shape)))
            return rows.reshape(moved).movedim(0, self.axis)
        if pad := self.padding(shape):
            return rows.reshape(*shape[:-1], shape[-1] + pad)[..., : shape[-1]]
        return rows.reshape(shape)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which scales are kept: (1,), (N, 1), (…, 1) or (…, groups), as compressed-tensors has them."""
        if self.kind == "tensor":
            return (1,)
        if self.kind == "channel":
            return tuple(n if i == self.axis % len(shape) else 1 for i, n in enumerate(shape))
        if self.kind == "token":
            return (*shape[:-1], 1)
        return (*shape[:-1], (shape[-1] + self.padding(shape)) // self.group_size)
