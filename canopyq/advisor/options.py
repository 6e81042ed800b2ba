"""A measured recipe on the model that is asked about, and the order in which a priority prefers one to another.

The order is the same whatever the memory: the least of

    log(damage) + rate · log(bytes)

where damage is the recipe's KL above the noise of 16-bit arithmetic, and the rate is that of the priority. A larger
budget only adds recipes to choose from, so it never makes the choice worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from canopyq.advisor import gpus
from canopyq.advisor.measured import ORIGINAL, Measurement, recorded
from canopyq.advisor.needs import PRIORITIES, Needs
from canopyq.memory import ModelBytes, cache_bytes, model_bytes


@dataclass(frozen=True)
class Option:
    """One measured recipe on the model that is asked about.

    Attributes:
        measured: its quality.
        weights: bytes of the model: codes, scales, zero points, and what stays in 16 bits.
        cache: bytes of the KV cache.
        refused: why the GPU has no kernel for it, or None.
    """

    measured: Measurement
    weights: ModelBytes
    cache: int
    refused: str | None

    @property
    def name(self) -> str:
        return self.measured.recipe + ("" if self.measured.method == "rtn" else f" by {self.measured.method}")

    @property
    def total(self) -> int:
        return self.weights.total + self.cache

    @classmethod
    def of(cls, measured: Measurement, needs: Needs) -> Option:
        recipe, cache = measured.parts
        held = cache_bytes(needs.shape, needs.context, needs.batch, cache)
        refused = gpus.refuse(recipe, cache, needs.capability)
        if refused is None and needs.priority == "throughput" and (recipe is None or recipe.activations is None):
            refused = "throughput asks for 8-bit activations, and this recipe computes in 16 bits"
        return cls(measured, model_bytes(needs.shape, recipe), held, refused)

    def meets(self, needs: Needs) -> bool:
        """Whether it has the accuracy, a kernel, and room."""
        right = self.measured.accuracy.value >= needs.accuracy
        return right and self.refused is None and (needs.memory is None or self.total <= needs.memory)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        sizes = asdict(self.weights) | {"cache": self.cache, "total": self.total}
        quality = asdict(self.measured) | {"accuracy": self.measured.accuracy.to_dict()}
        return {"recipe": self.measured.recipe, "method": self.measured.method, "bytes": sizes, "quality": quality}


def costs(known: Iterable[Measurement], priority: str) -> Callable[[Option], tuple[float, int]]:
    """The order of a priority: the lower the better; of equals, the one with fewer bytes."""
    noise = noise_of(known)
    rate = PRIORITIES[priority]

    def cost(option: Option) -> tuple[float, int]:
        return math.log(damage(option.measured, noise)) + rate * math.log(option.total), option.total

    return cost


def noise_of(known: Iterable[Measurement]) -> float:
    """The KL of the original in 16-bit arithmetic: differences below it cannot be seen when the model is served."""
    kls = [m.kl for m in known if m.recipe == ORIGINAL] or [m.kl for m in recorded() if m.recipe == ORIGINAL]
    return max(min(kls), 1e-9)


def damage(measured: Measurement, noise: float) -> float:
    """KL with the noise of 16-bit arithmetic, which every recipe has when served; the original was measured with it."""
    return max(measured.kl, noise) if measured.parts[0] is None else measured.kl + noise
