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
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq import checks
from canopyq.batches import Batch, read_batches
from canopyq.blocks import Blocks, call, find_blocks
from canopyq.errors import CanopyError, by_reason, unknown
from canopyq.inputs import InputStatistics, Seen
from canopyq.mode import eval_mode
from canopyq.targets import expert_weights, linear_kind
from canopyq.utils import track

SETTLED = 0.05  # a range that the second half of the data widens by less than this is called settled

Visit = Callable[[str, dict[str, InputStatistics]], None]


@dataclass(eq=False)
class Calibration(dict[str, InputStatistics]):
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
    cap: float | None = None,
    histograms: bool = True,
    examples: int = 0,
    visit: Visit | None = None,
) -> Calibration:
    """Run the model over data and keep statistics of what goes into its linear layers.

    Fused experts are watched one by one, under the names ``<module>.<number>.gate_proj``, ``up_proj``, ``down_proj``;
    those that the router sends no token to are named in the result's ``unseen``.

    Args:
        model: nn.Linear, GPT-2's Conv1D and transformers' fused experts are watched.
        batches, tokenizer, length: texts, token ids (B, T) or what a tokenizer returns; see `batches.read_batches`.
        layers: names of those to watch; None watches all but the output head.
        hessian: keep Σ x xᵀ / tokens of every layer too. With ``visit`` it is let go after the visit.
        cap: a token whose input to a layer is more than so many times as long as the median of its batch counts in the
            Hessian as if it were so long. Few tokens are far louder than the others, and the norm after the layer makes
            up for it; uncapped they decide over every column.
        histograms: count the values of every layer's inputs.
        examples: keep about so many of every layer's inputs too.
        visit: called with a block's name and the statistics of its layers once they are complete, before anything
            after the block runs; it may change the block or replace what is in it. Layers outside the blocks come
            last, under the name "". Without a list of blocks, all come at once under that name.

    Raises:
        CanopyError: for data that does not fit the model (see `read_batches`), NaN or infinite activations (the message
            names the layer), or nothing to watch. The model is then as it was, but for what ``visit`` did.
    """
    checks.flag("hessian", hessian), checks.flag("histograms", histograms), checks.count("examples", examples)
    if cap is not None:
        checks.number("cap", cap, 1)
    if visit is not None:
        checks.function("visit", visit)
    if layers is not None:
        layers = checks.sequence("layers", layers)
    data = read_batches(batches, model, tokenizer, length)
    watched = _layers(model, layers)
    if not watched:
        raise CanopyError(f"{type(model).__name__} has no linear layer to calibrate")
    keep = {"histogram": histograms, "examples": -(-examples // len(data)), "cap": cap}
    collector = _Collector(model, watched, hessian, keep)
    with eval_mode(model):
        blocks = find_blocks(model, watched, data[0])
        if blocks is None:
            _run_whole(model, collector, data, visit)
        else:
            _run_blocks(blocks, collector, data, visit)
    return _result(collector, data, blocks is not None)


def _layers(model: nn.Module, wanted: Collection[str] | None) -> dict[str, str]:
    """Layer -> the name of the module whose inputs tell of it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, module in model.named_modules():
        kind = linear_kind(module)
        if kind == "expert":
            found |= {f"{name}.{part}": name for part in expert_weights(module)}
        elif kind is not None and (module is not head or wanted is not None):
            found[name] = name
    if wanted is None:
        return found
    if missing := [layer for layer in wanted if layer not in found]:
        raise unknown("linear layer", missing[0], found)
    return {layer: module for layer, module in found.items() if layer in wanted}


class _Collector:
    """Hooks on the layers, and the statistics that they fill."""

    def __init__(self, model: nn.Module, watched: dict[str, str], hessian: bool, keep: dict[str, Any]) -> None:
        self.model, self.watched, self.hessian, self.keep = model, watched, hessian, keep
        self.statistics: dict[str, InputStatistics] = {}
        self.called: set[str] = set()
        self._last: tuple[Tensor, Seen] | None = None

    def inside(self, block: str) -> list[str]:
        """The watched layers of a block."""
        return [layer for layer, module in self.watched.items() if module.startswith(f"{block}.")]

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next."""
        number = torch.arange(len(batch.ids))[:, None].expand_as(batch.ids)
        self._sample = torch.where(batch.real, number, -1).flatten()
        self._samples = len(batch.ids)
        self._last = None

    @contextmanager
    def watching(self, layers: Collection[str]) -> Iterator[None]:
        modules = dict.fromkeys(self.watched[layer] for layer in layers)
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in modules
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()]
            self.called.add(name)
            if linear_kind(module) == "expert":
                self._experts(name, module, given[0], given[1])
            else:
                self._add([name], given[0])

        return hook

    def _experts(self, name: str, module: nn.Module, x: Tensor, chosen: Tensor) -> None:
        """Each expert sees the tokens that were routed to it; what goes into its last projection is computed here."""
        sample = self._sample_of(name, x)
        for number, (gate_up, _) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            token = (chosen == number).any(-1).nonzero().flatten()
            routed, own = x[token], sample[token]
            self._add([f"{name}.{number}.gate_proj", f"{name}.{number}.up_proj"], routed, own)
            if f"{name}.{number}.down_proj" in self.watched and len(token):
                gate, up = F.linear(routed, gate_up).chunk(2, dim=-1)
                self._add([f"{name}.{number}.down_proj"], module.act_fn(gate) * up, own)

    def _add(self, layers: list[str], x: Tensor, sample: Tensor | None = None) -> None:
        layers = [layer for layer in layers if layer in self.watched]
        if not layers:
            return
        try:
            if self._last is None or self._last[0] is not x:
                sample = self._sample_of(layers[0], x) if sample is None else sample
                self._last = (x, Seen(x, sample, self._samples))
            seen = self._last[1]
            for layer in layers:
                if seen.tokens and layer not in self.statistics:
                    self.statistics[layer] = InputStatistics.empty(x.shape[-1], x.device, hessian=self.hessian)
                if seen.tokens:
                    self.statistics[layer].add(seen, **self.keep)
        except CanopyError as error:
            raise CanopyError(f"{layers[0]}: {error}") from None

    def _sample_of(self, layer: str, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows != len(self._sample):
            raise CanopyError(
                f"{layer} gets {rows} rows for {len(self._sample)} tokens, so nothing says which of them are padding; "
                "leave it out of layers"
            )
        return self._sample.to(x.device)


def _run_blocks(blocks: Blocks, collector: _Collector, data: list[Batch], visit: Visit | None) -> None:
    names = blocks.names()
    inside = {name: collector.inside(name) for name in names}
    outside = [layer for layer in collector.watched if not any(layer in own for own in inside.values())]
    passes = len(names) * (1 if visit is None else 2) + (1 if outside else -1 if visit is not None else 0)
    bar = iter(track(range(passes * len(data)), "calibrating", passes * len(data)))
    entering: list[Any] = [None] * len(data)

    def run(number: int, watch: list[str], keep: bool) -> None:
        with collector.watching(watch):
            for n, (batch, _) in enumerate(zip(data, bar, strict=False)):
                collector.begin(batch)
                leaving = blocks.run(batch, number, entering[n])
                if keep:
                    entering[n] = leaving

    for number, name in enumerate(names):
        run(number, inside[name], keep=visit is None)
        if visit is not None:
            _show(visit, name, collector, inside[name])
            if outside or number + 1 < len(names):
                run(number, [], keep=True)
    if outside:
        with collector.watching(outside):
            for batch, leaving, _ in zip(data, entering, bar, strict=False):
                collector.begin(batch)
                blocks.run_rest(batch, leaving)
        if visit is not None:
            _show(visit, "", collector, outside)


def _run_whole(model: nn.Module, collector: _Collector, data: list[Batch], visit: Visit | None) -> None:
    with collector.watching(collector.watched):
        for batch in track(data, "calibrating", len(data)):
            collector.begin(batch)
            call(model, batch)
    if visit is not None:
        _show(visit, "", collector, list(collector.watched))


def _show(visit: Visit, block: str, collector: _Collector, layers: list[str]) -> None:
    seen = {layer: collector.statistics[layer] for layer in layers if layer in collector.statistics}
    visit(block, seen)
    for statistics in seen.values():
        statistics.hessian = None


def _result(collector: _Collector, data: list[Batch], by_blocks: bool) -> Calibration:
    unseen = {}
    for layer, module in collector.watched.items():
        if layer not in collector.statistics:
            called = module in collector.called
            unseen[layer] = "the router sent no token to it" if called else "the model never called it"
    samples = sum(int(batch.real.any(1).sum()) for batch in data)
    found = Calibration(samples, sum(int(batch.real.sum()) for batch in data), by_blocks, unseen)
    for layer in collector.watched:
        if layer in collector.statistics:
            found[layer] = collector.statistics[layer]
    if samples < 2:
        warnings.warn(f"calibrated on {found.notes()[1]}", stacklevel=3)
    return found
