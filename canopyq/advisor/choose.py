"""`advise`: of all measured recipes the best one that meets the needs; if none does, which of the needs must give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from canopyq.advisor import gpus
from canopyq.advisor.measured import Measurement, recorded
from canopyq.advisor.needs import FLOOR, Needs
from canopyq.advisor.options import Option, costs
from canopyq.advisor.table import against_the_table
from canopyq.errors import CanopyError
from canopyq.memory import cache_bytes, human
from canopyq.utils import Preformatted


@dataclass(frozen=True)
class Advice(Preformatted):
    """What `advise` recommends.

    Attributes:
        needs: as they were understood.
        best: the recommendation.
        others: the other recipes that meet the needs, the next best first.
        table: what the decision table of lesson 11 says to it.
        remarks: on speed, and on what is not counted.
    """

    needs: Needs
    best: Option
    others: tuple[Option, ...]
    table: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def recipe(self) -> str:
        return self.best.measured.recipe

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        needs = asdict(self.needs) | {"parameters": self.needs.shape.parameters}
        others = [option.to_dict() for option in self.others]
        said = {"table": list(self.table), "remarks": list(self.remarks)}
        return {"needs": needs} | self.best.to_dict() | {"others": others} | said

    def __str__(self) -> str:
        needs, best, shape = self.needs, self.best, self.needs.shape
        named = "" if needs.asked.lower() == needs.model.lower() else f", the nearest that is known to {needs.asked}"
        left = "" if needs.memory is None else f"; {human(needs.memory - best.total)} to spare"
        parts = {"codes": best.weights.codes, "scales": best.weights.scales, "zero points": best.weights.zero_points,
                 "in 16 bits": best.weights.plain, "cache": best.cache}  # fmt: skip
        sum_of = " + ".join(f"{name} {human(count)}" for name, count in parts.items() if count)
        m = best.measured
        lines = [
            f"model    {needs.model} ({shape.parameters:,} parameters{named})",
            f"needs    {needs}",
            f"recipe   {best.name}",
            f"bytes    {human(best.total)} = {sum_of}{left}",
            f"quality  KL {m.kl:.2g} nats per token, {m.accuracy} right of {m.n}; {m.source}",
        ]
        lines += [f"table    {line}" for line in self.table]
        lines += [f"note     {line}" for line in self.remarks]
        lines += [
            f"also     {option.name}: {human(option.total)}, KL {option.measured.kl:.2g}, {option.measured.accuracy}"
            for option in self.others[:3]
        ]
        return "\n".join(lines)


def advise(
    model: str | int | float | Needs,
    *,
    memory: str | int | float | None = None,
    context: str | int = 0,
    batch: int = 1,
    accuracy: float = FLOOR,
    gpu: str | float | None = None,
    priority: str = "balanced",
    measurements: Iterable[Measurement] | None = None,
) -> Advice:
    """Recommend a recipe.

    Args:
        model, memory, context, batch, gpu: see `Needs.parse`; or `Needs` alone.
        accuracy: the least share of right answers, as measured.
        priority: ``"accuracy"``, ``"balanced"``, ``"compression"``, or ``"throughput"`` (8-bit activations only).
        measurements: what to choose from; None takes those that ship with canopyq, of the tutor model. They order the
            recipes of a larger model as they order the tutor's; how much it loses has to be measured on it.

    Raises:
        CanopyError: for needs that cannot be read, and for needs that nothing meets: the message says which of them has
            to give, and by how much.
    """
    words = {"memory": memory, "context": context, "batch": batch, "accuracy": accuracy, "gpu": gpu}
    needs = model if isinstance(model, Needs) else Needs.parse(model, **words, priority=priority)
    known = list(recorded() if measurements is None else _measurements(measurements))
    if not known:
        raise CanopyError("there is nothing to choose from; measure some recipes with cq.compare")
    if not needs.context:  # no chat was named: whatever cache there will be is not part of the question
        known = [measured for measured in known if measured.parts[1] is None] or known
    options = _options(known, needs)
    meeting = [option for option in options if option.meets(needs)]
    if not meeting:
        raise CanopyError(f"nothing meets these needs ({needs}). {_what_must_give(known, options, needs)}")
    cost = costs(known, needs.priority)
    best, *others = sorted(meeting, key=cost)
    recipe, cache = best.measured.parts
    remarks = [*gpus.remarks(recipe, cache, needs.capability, needs.batch), *_not_counted(best, needs)]
    return Advice(needs, best, tuple(others), tuple(against_the_table(best, options, needs)), tuple(remarks))


def _measurements(given: object) -> list[Measurement]:
    if isinstance(given, Iterable):
        found = list(given)
        if all(isinstance(measured, Measurement) for measured in found):
            return found
    raise CanopyError("measurements are a list of Measurement; read them by cq.advisor.read(file)")


def _options(known: list[Measurement], needs: Needs) -> list[Option]:
    """The recipes whose groups fit the model's layers."""
    options, misfits = [], []
    for measured in known:
        try:
            options.append(Option.of(measured, needs))
        except CanopyError as error:
            misfits.append(error)
    if not options:
        raise misfits[0]
    return options


def _what_must_give(known: list[Measurement], options: list[Option], needs: Needs) -> str:
    """For each of the needs alone, how far it would have to give."""
    runs = [option for option in options if option.refused is None]
    good = [option for option in runs if option.measured.accuracy.value >= needs.accuracy]
    gives = []
    if good and needs.memory is not None:
        least = min(good, key=lambda option: option.total)
        more = least.total - needs.memory
        gives.append(f"{human(more)} more memory ({human(least.total)} in all) for {least.name}")
        smaller = {field: _most(good, needs, field) for field in ("context", "batch")}
        if smaller["context"]:
            gives.append(f"a context of at most {smaller['context']:,} tokens")
        if smaller["batch"] and needs.context:
            gives.append(f"a batch of at most {smaller['batch']}")
    fitting = [option for option in runs if needs.memory is None or option.total <= needs.memory]
    if fitting:
        best = max(fitting, key=lambda option: option.measured.accuracy.value)
        value = best.measured.accuracy.value
        if value < needs.accuracy:
            gives.append(f"an accuracy floor of {100 * value:.4g} % ({100 * (needs.accuracy - value):.2g} points less) "
                         f"for {best.name}")  # fmt: skip
    if needs.capability is not None:
        for capability in sorted(set(gpus.GPUS.values())):
            other = replace(needs, capability=capability)
            able = [option for option in _options(known, other) if option.meets(other)]
            if able:
                least = min(able, key=lambda option: option.total)
                where = f"a GPU of compute capability {capability}" if capability else "a CPU"
                gives.append(f"{where} for {least.name}")
                break
    if not gives:
        reasons = sorted({option.refused for option in options if option.refused is not None})
        return f"No single one of them can give enough{'; ' + reasons[0] if reasons else ''}"
    return "One of them has to give: " + ", or ".join(gives)


def _most(good: list[Option], needs: Needs, field: str) -> int:
    """The longest context, or largest batch, with which one of the options fits; 0 if none does, or any number."""

    def fits(count: int) -> bool:
        tried = replace(needs, **{field: count})
        return any(
            option.weights.total + cache_bytes(needs.shape, tried.context, tried.batch, option.measured.parts[1])
            <= needs.memory
            for option in good
        )

    low, high = 0, getattr(needs, field)
    if not fits(1):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _not_counted(best: Option, needs: Needs) -> list[str]:
    said = []
    if not needs.context:
        said.append("no context was named, so the cache is not counted; add context= (--context) to plan for chats")
    if needs.memory is not None and best.total > 0.9 * needs.memory:
        said.append("activations and the runtime come on top; less than a tenth of the budget is left for them")
    share = best.weights.plain / best.weights.total
    if best.measured.parts[0] is not None and share > 0.25:
        said.append(f"{100 * share:.0f} % of the model's bytes are its embedding and head, which stay in 16 bits")
    return said
