"""What quantizing a model will do (`Plan`), and what it did (`Report`)."""

from __future__ import annotations

from dataclasses import dataclass

from canopyq.errors import and_more, by_reason
from canopyq.memory import human
from canopyq.nn.targets import few
from canopyq.utils import Preformatted

MOST_NOTES = 6  # on layers that are printed; all of them are in the report


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight.

    Attributes:
        name, shape: of the layer; (out_features, in_features).
        bits_per_weight: held, scales and zero points included.
        bytes_before, bytes_after: of the weight.
        sqnr_db: signal to quantization noise of the weight.
        output_error: ‖y − ŷ‖ / ‖y‖ over the calibration data, y of the layer before and ŷ after; None without data, or
            where none of it passed.
        notes: what the method did to this layer, in words.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    sqnr_db: float
    output_error: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan(Preformatted):
    """What `quantize_` would do, found without doing it.

    Attributes:
        recipe: its name.
        layers: name -> (shape, bytes now, bytes then) of every weight that will be quantized.
        kept: module name -> why its weight stays as it is.
        bytes_before, bytes_after: storage behind the whole model.
        bytes_peak: the most that weights take at once on the way, old and new ones together.
        notes: what to know before such a model is saved.
        share: of the linear parameters that will be quantized; embeddings and what the recipe keeps do not count.
    """

    recipe: str
    layers: dict[str, tuple[tuple[int, int], int, int]]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int
    bytes_peak: int
    notes: tuple[str, ...] = ()
    share: float = 1.0

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: {len(self.layers)} weights to quantize{few(self.share, ',')}; model "
            f"{human(self.bytes_before)} -> {human(self.bytes_after)}, at most {human(self.bytes_peak)} on the way"
        ]
        lines += [
            f"  {name} {n}x{k}: {human(before)} -> {human(after)}"
            for name, ((n, k), before, after) in self.layers.items()
        ]
        return "\n".join(lines + [f"  {note}" for note in self.notes] + [f"  kept: {x}" for x in by_reason(self.kept)])


@dataclass(frozen=True)
class Report(Preformatted):
    """What `quantize_` did.

    Attributes:
        recipe: its name.
        layers: the quantized layers, in the model's order.
        kept: module name -> why its weight stayed as it is. Nothing that holds a weight is left out of both lists.
        bytes_before, bytes_after: storage behind the whole model's parameters and buffers.
        method: how the weights were rounded.
        notes: what the method did to the model as a whole, and what to know of the calibration data.
        share: of the linear parameters that is quantized; embeddings and what the recipe keeps do not count.
    """

    recipe: str
    layers: tuple[LayerReport, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int
    method: str = "rtn"
    notes: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def worst(self) -> list[LayerReport]:
        """Layers with the largest output error first; without calibration data, those with the most noise."""
        return sorted(self.layers, key=lambda layer: (-(layer.output_error or 0.0), layer.sqnr_db))

    def __str__(self) -> str:
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        bits = sum(8 * layer.bytes_after for layer in self.layers) / weights
        how = "" if self.method == "rtn" else f" by {self.method}"
        lines = [
            f"{self.recipe}: {len(self.layers)} linear layers quantized{how}{few(self.share, ',')}, "
            f"{bits:.3f} bits per weight; model {human(self.bytes_before)} -> {human(self.bytes_after)}"
        ]
        for x in self.worst[:3]:
            error = "" if x.output_error is None else f", output off by {100 * x.output_error:.2g} %"
            lines.append(f"  noisiest: {x.name} {x.shape[0]}x{x.shape[1]}, SQNR {x.sqnr_db:.1f} dB{error}")
        said: dict[str, list[str]] = {}
        for layer in self.layers:
            for note in layer.notes:
                said.setdefault(note, []).append(layer.name)
        told = [f"  {and_more(names)} ({note})" for note, names in said.items()]
        if len(told) > MOST_NOTES:
            told = [*told[:MOST_NOTES], f"  and {len(told) - MOST_NOTES} more notes on layers, in .layers"]
        return "\n".join(
            lines + told + [f"  {note}" for note in self.notes] + [f"  kept: {line}" for line in by_reason(self.kept)]
        )
