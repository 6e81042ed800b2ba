"""One pass over calibration data, block by block, of which only statistics stay.

Each decoder block runs on all batches before the next one does. So the memory taken is that of the hidden states
between two blocks, and a method may change a block before its outputs are computed: later blocks then see what the
changed ones really give them, as GPTQ wants it (Frantar et al. 2022, section 3.3).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.calibration.blocks import call, find_blocks
from canopyq.calibration.data import Batch, read_batches
from canopyq.calibration.statistics import ActivationStats, Seen
from canopyq.errors import CanopyError, by_reason, prefixed, unknown
from canopyq.nn.kinds import Kind
from canopyq.nn.sites import Site, output_heads, weight_sites
from canopyq.utils import eval_mode, progress

SETTLED = 0.05  # a range that the second half of the data widens by less than this is called settled


@dataclass(eq=False)
class Calibration(dict[str, ActivationStats]):
    """Layer name -> what was seen of its inputs, in the model's order; and how far the data can be trusted.

    Attributes:
        samples, tokens: of the data, padding not counted.
        by_blocks: whether the model was run block by block.
        unseen: layers that no token reached -> why. They are missing from the dictionary.
        source: what the data is, in a few words; "" if nothing is known of it.
    """

    samples: int
    tokens: int
    by_blocks: bool
    unseen: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def growth(self) -> dict[str, float]:
        """Layer -> by how much the second half of the samples widened the range of its inputs, as a share."""
        return {name: seen.growth() for name, seen in self.items()}

    @property
    def settled(self) -> bool:
        """Whether the second half of the samples left every range as it was, within 5 %."""
        return all(grown <= SETTLED for grown in self.growth.values())

    def notes(self) -> list[str]:
        """What to know about the data before its ranges are used, in lines to print."""
        lines = [f"calibrated on {self.samples} samples, {self.tokens:,} tokens" + (self.source and f": {self.source}")]
        growth = self.growth
        worst = max(growth, key=lambda name: growth[name], default=None)
        if self.samples < 2:
            lines.append("one sample: its ranges are thin, other texts will go beyond; give some dozens")
        elif self.settled:
            most = max(growth.values(), default=0.0)
            lines.append(
                f"ranges settled: the second half of the {self.samples} samples widened none by over {most:.1%}"
            )
        else:
            open_ = sum(grown > SETTLED for grown in growth.values())
            lines.append(
                f"ranges not settled: the second half of the {self.samples} samples widened {open_} of {len(self)} by "
                f"over {SETTLED:.0%}, {worst} by {growth[worst]:.0%}; more data would change them further"
            )
        if not self.by_blocks:
            lines.append("the model has no list of blocks that runs alone: all layers were watched in one go")
        return lines + [f"not calibrated: {line}" for line in by_reason(self.unseen)]

    def __str__(self) -> str:
        first, *rest = self.notes()
        return "\n".join([f"{len(self)} layers {first}", *(f"  {line}" for line in rest)])

    __repr__ = __str__


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    tokenizer=None,
    length: int | None = None,
    layers: Collection[str] | None = None,
    hessian: bool = False,
    token_norm_cap: float | None = None,
    histograms: bool = True,
    examples: int = 0,
) -> Calibration:
    """Run the model over data and keep statistics of what goes into its linear layers.

    Fused experts are watched one by one, under the names ``<module>.<number>.gate_proj``, ``up_proj``, ``down_proj``;
    those that the router sends no token to are named in the result's ``unseen``.

    Args:
        model: nn.Linear, GPT-2's Conv1D and transformers' fused experts are watched.
        batches, tokenizer, length: texts, token ids (B, T) or what a tokenizer returns; see `data.read_batches`.
        layers: names of those to watch; None watches all but the output head.
        hessian: keep Σ x xᵀ / tokens of every layer too.
        token_norm_cap: a token whose input to a layer is more than so many times as long as the median of its batch
            counts in the Hessian as if it were so long. Few tokens are far louder than the others, and the norm after
            the layer makes up for it; uncapped they decide over every column.
        histograms: count the values of every layer's inputs.
        examples: keep about so many of every layer's inputs too.

    Raises:
        CanopyError: for data that does not fit the model (see `read_batches`), NaN or infinite activations (the message
            names the layer), or nothing to watch. The model is then as it was.
    """
    checks.flag("hessian", hessian), checks.flag("histograms", histograms), checks.count("examples", examples)
    if token_norm_cap is not None:
        checks.number("token_norm_cap", token_norm_cap, 1)
    if layers is not None:
        layers = checks.sequence("layers", layers)
    data = read_batches(batches, model, tokenizer, length)
    collector = _Collector(model, layers, data, hessian, token_norm_cap, histograms, examples)
    for _ in _walk(collector, data, changing=False):
        pass
    samples = sum(int(batch.real.any(1).sum()) for batch in data)
    tokens = sum(int(batch.real.sum()) for batch in data)
    found = Calibration(samples, tokens, collector.by_blocks, collector.unseen())
    found |= {layer: collector.statistics[layer] for layer in collector.watched if layer in collector.statistics}
    if samples < 2:
        warnings.warn(f"calibrated on {found.notes()[1]}", stacklevel=3)
    return found


@torch.no_grad()
def calibration_blocks(
    model: nn.Module,
    batches: list[Batch],
    *,
    layers: Collection[str] | None = None,
    hessian: bool = False,
    token_norm_cap: float | None = None,
    histograms: bool = True,
    examples: int = 0,
) -> Iterator[tuple[str, dict[str, ActivationStats]]]:
    """`calibrate`, one decoder block after the other: for loops that change each block on the way.

    What follows a block runs after its turn in the loop, so the body may change the block or replace what is in it, and
    later blocks see what the changed one gives them. Between the turns the model is as the body left it. Each block
    runs twice over the data: once for its statistics, once changed.

    Args:
        batches: of `data.read_batches`.
        layers, hessian, token_norm_cap, histograms, examples: see `calibrate`.

    Yields:
        The block's name, and the statistics of its layers by name, which are let go of afterwards. Layers outside the
        blocks come last, under the name "". Without a list of blocks, all come at once under that name.

    Raises:
        CanopyError: as `calibrate`.
    """
    collector = _Collector(model, layers, batches, hessian, token_norm_cap, histograms, examples)
    for block, names in _walk(collector, batches, changing=True):
        yield block, {name: collector.statistics.pop(name) for name in names if name in collector.statistics}


def _layers(model: nn.Module, wanted: Collection[str] | None) -> dict[str, Site]:
    """Layer -> the weight whose inputs are watched."""
    heads = output_heads(model)
    found = {
        site.name: site
        for site in weight_sites(model)
        if site.kind.multiplies and (site.module not in heads or wanted is not None)
    }
    if wanted is None:
        return found
    if missing := [layer for layer in wanted if layer not in found]:
        raise unknown("linear layer", missing[0], found)
    return {layer: site for layer, site in found.items() if layer in wanted}


class _Collector:
    """Hooks on the layers, and the statistics that they fill. The arguments are those of `calibrate`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str] | None,
        data: list[Batch],
        hessian: bool,
        token_norm_cap: float | None,
        histograms: bool,
        examples: int,
    ) -> None:
        self.model, self.hessian = model, hessian
        self.watched = _layers(model, layers)
        if not self.watched:
            raise CanopyError(f"{type(model).__name__} has no linear layer to calibrate")
        self.options = {
            "histogram": histograms, "examples": -(-examples // len(data)), "token_norm_cap": token_norm_cap,
        }  # fmt: skip
        self.statistics: dict[str, ActivationStats] = {}
        self.by_blocks = True
        self._called: set[str] = set()
        self._last: tuple[Tensor, Seen] | None = None

    def unseen(self) -> dict[str, str]:
        """Layers that no token reached, and why."""
        never, not_sent = "the model never called it", "the router sent no token to it"
        return {
            layer: site.kind.unwatched or (not_sent if site.owner in self._called else never)
            for layer, site in self.watched.items()
            if layer not in self.statistics
        }

    def inside(self, block: str) -> list[str]:
        """The watched layers of a block."""
        return [layer for layer in self.watched if layer.startswith(f"{block}.")]

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next."""
        number = torch.arange(len(batch.ids))[:, None].expand_as(batch.ids)
        self._sample = torch.where(batch.real, number, -1).flatten()
        self._samples = len(batch.ids)
        self._last = None

    @contextmanager
    def watching(self, layers: Collection[str]) -> Iterator[None]:
        sites = {site.owner: site for site in (self.watched[layer] for layer in layers)}
        handles = [
            site.module.register_forward_pre_hook(self._hook(name, site.kind), with_kwargs=True)
            for name, site in sites.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, owner: str, kind: Kind) -> Callable:
        parts = {site.part: layer for layer, site in self.watched.items() if site.owner == owner}

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()]
            self._called.add(owner)
            for own, x, token in kind.inputs(module, given, parts):
                sample = None if token is None else self._sample_of(owner, kind.tokens(module, given), x.device)[token]
                self._add([parts[part] for part in own if part in parts], x, sample)

        return hook

    def _add(self, layers: list[str], x: Tensor, sample: Tensor | None = None) -> None:
        layers = [layer for layer in layers if layer in self.watched]
        if not layers:
            return
        with prefixed(f"{layers[0]}: "):
            if self._last is None or self._last[0] is not x:
                sample = self._sample_of(layers[0], x[..., 0].numel(), x.device) if sample is None else sample
                self._last = (x, Seen(x, sample, self._samples))
            seen = self._last[1]
            for layer in layers:
                if seen.tokens and layer not in self.statistics:
                    self.statistics[layer] = ActivationStats.empty(x.shape[-1], x.device, hessian=self.hessian)
                if seen.tokens:
                    self.statistics[layer].add(seen, **self.options)

    def _sample_of(self, layer: str, rows: int, device: torch.device) -> Tensor:
        if rows != len(self._sample) and bool((self._sample >= 0).all()) and rows % self._samples == 0:
            return torch.arange(self._samples, device=device).repeat_interleave(rows // self._samples)
        if rows != len(self._sample):
            raise CanopyError(
                f"{layer} gets {rows} rows for {len(self._sample)} tokens, so nothing says which of them are padding; "
                "leave it out of layers"
            )
        return self._sample.to(device)


def _walk(collector: _Collector, data: list[Batch], *, changing: bool) -> Iterator[tuple[str, list[str]]]:
    """Run the model over the data, block by block, and yield each block's name and watched layers once it was seen;
    last "" and the layers outside. ``changing``: what a block puts out is computed after its turn, by a second run."""
    model = collector.model
    with eval_mode(model):
        blocks = find_blocks(model, collector.watched, data[0])
    names = [] if blocks is None else blocks.names()
    collector.by_blocks = blocks is not None
    inside = {name: collector.inside(name) for name in names}
    outside = [layer for layer in collector.watched if not any(layer in own for own in inside.values())]
    entering: list[Any] = [None] * len(data)

    def run(number: int, layers: list[str], keep: bool) -> None:
        with eval_mode(model), collector.watching(layers):
            for n, batch in enumerate(data):
                collector.begin(batch)
                leaving = blocks.run(batch, number, entering[n])
                if keep:
                    entering[n] = leaving
                step()

    runs = len(names) * (2 if changing else 1) - (changing and blocks is not None and not outside) + bool(outside)
    with progress("calibrating", runs * len(data)) as step:
        for number, name in enumerate(names):
            run(number, inside[name], keep=not changing)
            yield name, inside[name]
            if changing and (outside or number + 1 < len(names)):
                run(number, [], keep=True)
        if outside:
            with eval_mode(model), collector.watching(outside):
                for n, batch in enumerate(data):
                    collector.begin(batch)
                    if blocks is None:
                        call(model, batch)
                    else:
                        blocks.run_rest(batch, entering[n])
                    step()
            yield "", outside
