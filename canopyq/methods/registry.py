"""What a method's name stands for, and which methods go with which recipes."""

from __future__ import annotations

from dataclasses import dataclass

from canopyq.errors import CanopyError, shown, unknown
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.scheme import Recipe

TRANSFORMS = ("rotation", "smoothquant", "awq", "outliers")
ROUNDINGS = ("rtn", "clip", "gptq", "hqq")


@dataclass(frozen=True)
class Method:
    """How a model is quantized: what is done to it before rounding, and how its weights are rounded.

    Attributes:
        name: as it was given.
        transforms: of `TRANSFORMS`, in the order in which they are done. None of them changes what the model computes:
            ``outliers`` keeps the loudest inputs of every layer, and their columns, in 16 bits.
        rounding: one of `ROUNDINGS`.
    """

    name: str
    transforms: tuple[str, ...]
    rounding: str

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of a name: parts joined by ``+``, such as ``"rotation+gptq"``.

        A name without a rounding rounds to nearest, and ``awq`` on the ranges of ``clip``, which belongs to it.

        Raises:
            CanopyError: for a part that does not exist, one that stands twice, and more than one rounding.
        """
        parts = (name.lower() if isinstance(name, str) else shown(name)).split("+")
        for part in parts:
            if part not in TRANSFORMS + ROUNDINGS:
                raise unknown("method", part, TRANSFORMS + ROUNDINGS, more=", and several joined by +")
        roundings = [part for part in parts if part in ROUNDINGS]
        if len(set(parts)) != len(parts) or len(roundings) > 1:
            raise CanopyError(
                f"method {shown(name)} names a part twice, or two ways to round; weights are rounded once"
            )
        transforms = tuple(part for part in TRANSFORMS if part in parts)
        default = "clip" if "awq" in parts else "rtn"
        return cls("+".join(parts), transforms, roundings[0] if roundings else default)

    @property
    def smoothing(self) -> str | None:
        """The transform that rescales channels block by block, if there is one."""
        return next((part for part in self.transforms if part in ("smoothquant", "awq")), None)

    @property
    def needs_data(self) -> bool:
        return self.smoothing is not None or "outliers" in self.transforms or self.rounding in ("clip", "gptq")

    def check(self, recipe: Recipe) -> None:
        """Raise `CanopyError` if the method makes no sense for the recipe, with the reason."""
        formats = [recipe.weights.format, *(scheme.format for _, scheme in recipe.exceptions)]
        if "smoothquant" in self.transforms and recipe.activations is None:
            raise CanopyError(
                f"SmoothQuant moves outliers from the inputs into the weights, and {recipe.name} quantizes only the "
                "weights: that would harm them; use awq or gptq, or a recipe such as w8a8"
            )
        if {"awq", "smoothquant"} <= set(self.transforms):
            raise CanopyError("AWQ and SmoothQuant rescale the same channels to different ends; use one of them")
        if "awq" in self.transforms and recipe.activations is not None:
            raise CanopyError(
                f"AWQ chooses its scales for weights whose inputs stay as they are, and {recipe.name} quantizes the "
                "inputs; use smoothquant"
            )
        for fmt in formats:
            if self.rounding == "hqq" and not isinstance(fmt, IntFormat):
                raise CanopyError(f"HQQ fits the step of evenly spaced codes, which {fmt.name} has not; use gptq")
        if recipe.weights.is_plain_cast and self.name != "rtn":
            raise CanopyError(f"{recipe.weights.format.name} is a plain cast, which every method does alike; use rtn")
