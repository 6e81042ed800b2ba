"""`advise`: of all measured recipes the best one that meets the needs; if none does, which of the needs must give.

The order is the same whatever the memory: the least of

    log(damage) + rate · log(bytes)

where damage is the recipe's KL above the noise of 16-bit arithmetic, and the rate is that of the priority. A larger
budget only adds recipes to choose from, so it never makes the choice worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

from canopyq import checks
from canopyq.advisor.measured import ORIGINAL, Measurement, recorded
from canopyq.advisor.needs import FLOOR, GPUS, PRIORITIES, Needs, misfit, not_served, refuse, speed_remarks
from canopyq.errors import CanopyError, shown
from canopyq.memory import ModelBytes, cache_bytes, human, model_bytes
from canopyq.utils import Preformatted

CURE = "advisor.measure, on the command line --text FILE, measures it"

# The decision table that the course starts from: situation, the priority that stands for it, the recipe. The fourth
# row, long chats, is about the cache alone.
ROWS = (
    ("Keep accuracy high", "accuracy", "w8a16"),
    ("A balanced middle ground", "balanced", "w4a16-g128"),
    ("More compression, accuracy is negotiable", "compression", "w4a16-g256"),
    ("Long chats eat the memory", None, "a quantized KV cache"),
)


@dataclass(frozen=True)
class Option:
    """One measured recipe on the model that is asked about.

    Attributes:
        measured: its quality.
        weights: bytes of the model: codes, scales, zero points, and what stays in 16 bits.
        cache: bytes of the KV cache.
        refused: why no kernel takes it, or none of the GPU or the server, or None.
        here: whether the quality was measured on the model that is asked about. If not, it orders recipes and no more.
    """

    measured: Measurement
    weights: ModelBytes
    cache: int
    refused: str | None
    here: bool

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
        refused = misfit(recipe, needs.shape) or not_served(recipe, cache, needs.server, needs.capability)
        refused = refused or refuse(recipe, cache, needs.capability)
        if refused is None and needs.priority == "throughput" and (recipe is None or recipe.activations is None):
            refused = "throughput asks for 8-bit activations, and this recipe computes in 16 bits"
        here = measured.model in (None, needs.model)
        return cls(measured, model_bytes(needs.shape, recipe), held, refused, here)

    def right_enough(self, needs: Needs) -> bool:
        """Whether it has the accuracy that is asked for. A text has no answers, and another model's do not count."""
        return not self.here or self.measured.accuracy is None or self.measured.accuracy.value >= needs.accuracy

    @property
    def doubtful(self) -> bool:
        """Whether all that is known of it is that another model lost answers: taken where nothing else fits."""
        return not self.here and self.measured.accuracy is not None and self.measured.accuracy.value < FLOOR

    def meets(self, needs: Needs) -> bool:
        """Whether it has the accuracy, a kernel, and room."""
        roomy = needs.memory is None or self.total <= needs.memory
        return roomy and self.refused is None and self.right_enough(needs)

    def to_dict(self) -> dict:
        """Plain values, for JSON; a quality of None was not measured on this model."""
        sizes = asdict(self.weights) | {"cache": self.cache, "total": self.total}
        quality = None
        if self.here:
            share = self.measured.accuracy
            quality = asdict(self.measured) | {"accuracy": None if share is None else share.to_dict()}
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
        quality = f"{best.measured}; {best.measured.source}" if best.here else f"not measured on this model; {CURE}"
        lines = [
            f"model    {needs.model} ({shape.parameters:,} parameters{named})",
            f"needs    {needs}",
            f"recipe   {best.name}",
            f"bytes    {human(best.total)} = {sum_of}{left}",
            f"quality  {quality}",
        ]
        lines += [f"table    {line}" for line in self.table]
        lines += [f"note     {line}" for line in self.remarks]
        lines += [
            f"also     {option.name}: {human(option.total)}" + (f", {option.measured}" if option.here else "")
            for option in self.others[:3]
        ]
        return "\n".join(lines)


def advise(
    model: str | int | float | Needs,
    *,
    memory: str | int | float | None = None,
    context: str | int = 0,
    batch: int = 1,
    accuracy: float | None = None,
    gpu: str | float | None = None,
    priority: str = "balanced",
    server: str | None = None,
    measurements: Iterable[Measurement] | None = None,
) -> Advice:
    """Recommend a recipe.

    Args:
        model, memory, context, batch, gpu: see `Needs.parse`; or `Needs` alone.
        accuracy: the least share of right answers, as measured on this model; None asks for 0.98 where there are such.
        server: ``"vllm"`` recommends only what vLLM runs; None also what canopyq alone does.
        priority: ``"accuracy"``, ``"balanced"``, ``"compression"``, or ``"throughput"`` (8-bit activations only).
        measurements: of this model, to choose from: `measure` makes them from a text. None takes those that ship with
            canopyq, of the tutor. They order the recipes of another model as they order the tutor's, and no quality is
            given for it; those with which the tutor lost answers come last.

    Raises:
        CanopyError: for needs that cannot be read, and for needs that nothing meets: the message says which of them has
            to give, and by how much.
    """
    known = list(recorded() if measurements is None else _measurements(measurements))
    words = {"memory": memory, "context": context, "batch": batch, "accuracy": accuracy, "gpu": gpu, "server": server}
    needs = model if isinstance(model, Needs) else Needs.parse(model, **words, priority=priority)
    needs = replace(needs, accuracy=_floor(needs, known))
    if not needs.context:  # no chat was named: whatever cache there will be is not part of the question
        known = [measured for measured in known if measured.parts[1] is None] or known
    options = _options(known, needs)
    meeting = [option for option in options if option.meets(needs)]
    if not meeting:
        raise CanopyError(f"nothing meets these needs ({needs}). {_what_must_give(known, options, needs)}")
    cost = costs(known, needs.priority)
    best, *others = sorted(meeting, key=lambda option: (option.doubtful, *cost(option)))
    recipe, cache = best.measured.parts
    remarks = [*speed_remarks(recipe, cache, needs.capability, needs.batch), *_not_counted(best, needs)]
    return Advice(needs, best, tuple(others), tuple(against_the_table(best, options, needs)), tuple(remarks))


def _measurements(given: object) -> list[Measurement]:
    cure = "give a list of Measurement, such as cq.advisor.read(file)"
    found = checks.sequence("measurements", given, 1)
    return [checks.instance("measurements", each, Measurement, cure) for each in found]


def _floor(needs: Needs, known: list[Measurement]) -> float:
    """The least share of right answers: of this model, and 0 where none of its answers were counted."""
    here = [measured for measured in known if measured.model in (None, needs.model)]
    without = next((measured.recipe for measured in here if measured.accuracy is None), None)
    if needs.accuracy is None:
        return FLOOR if here and without is None else 0.0
    if here and without is None:
        return needs.accuracy
    of = "of this model's none were counted" if without is None else f"{without} was measured on none"
    raise CanopyError(f"accuracy={shown(needs.accuracy)} is a share of right answers, and {of}; leave it out")


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
    good = [option for option in runs if option.right_enough(needs)]
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
    if fitting and not any(option.right_enough(needs) for option in fitting):
        best = max(fitting, key=lambda option: option.measured.accuracy.value)
        value = best.measured.accuracy.value
        gives.append(f"an accuracy floor of {100 * value:.4g} % ({100 * (needs.accuracy - value):.2g} points less) "
                     f"for {best.name}")  # fmt: skip
    if needs.capability is not None:
        for capability in sorted(set(GPUS.values())):
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


def _whose(option: Option) -> str:
    """Whose quality is spoken of, where it is not that of the model that is asked about."""
    return "" if option.here else f", as measured on the {option.measured.model}"


def _not_counted(best: Option, needs: Needs) -> list[str]:
    said = []
    if not best.here:
        said.append(f"the order of recipes is that of {best.measured.source}; others lose more or less with each")
    if best.doubtful:
        said.append(f"with {best.name} the {best.measured.model} lost answers, and nothing milder meets the needs; "
                    "measure it on this model before you rely on it")  # fmt: skip
    if not needs.context:
        said.append("no context was named, so the cache is not counted; add context= (--context) to plan for chats")
    if needs.memory is not None and best.total > 0.9 * needs.memory:
        said.append("activations and the runtime come on top; less than a tenth of the budget is left for them")
    share = best.weights.plain / best.weights.total
    if best.measured.parts[0] is not None and share > 0.25:
        said.append(f"{100 * share:.0f} % of the model's bytes are its embedding and head, which stay in 16 bits")
    return said


def against_the_table(best: Option, options: list[Option], needs: Needs) -> list[str]:
    """What the table says to these needs, and if it is something else, why the recommendation differs."""
    said = []
    for situation, priority, recipe in ROWS:
        if priority == needs.priority:
            said.append(_weights(f"“{situation}”", recipe, best, options, needs))
    if needs.context:
        said.append(_cache(best, options, needs))
    original = next((option for option in options if option.measured.parts == (None, None)), None)
    if original is not None and needs.memory is not None and best is not original and original.total <= needs.memory:
        said.append(
            f"neither asks whether to quantize at all: in 16 bits everything takes {human(original.total)} and fits"
        )
    return said


def _weights(situation: str, recipe: str, best: Option, options: list[Option], needs: Needs) -> str:
    """One row of the table beside the recommendation."""
    chosen = best.measured.recipe.split("+kv")[0]
    if chosen == recipe:
        return f"{situation} gives {recipe}: agreed"
    rows = [option for option in options if option.measured.recipe.split("+kv")[0] == recipe]
    if not rows:
        return f"{situation} gives {recipe}, which has not been measured"
    same_cache = [option for option in rows if option.measured.parts[1] == best.measured.parts[1]]
    row = min(same_cache or rows, key=lambda option: option.measured.kl)
    return f"{situation} gives {recipe}. Not here: {_why_not(row, best, options, needs)}"


def _why_not(row: Option, best: Option, options: list[Option], needs: Needs) -> str:
    if row.refused is not None:
        return row.refused
    if not row.right_enough(needs):
        return f"it got {row.measured.accuracy} right, and the floor is {100 * needs.accuracy:.4g} %"
    if needs.memory is not None and row.total > needs.memory:
        return f"with the same cache it takes {human(row.total)}, {human(row.total - needs.memory)} too many"
    noise = noise_of([option.measured for option in options])
    memory = best.total / row.total - 1
    hurt = damage(best.measured, noise) / damage(row.measured, noise) - 1
    rate = PRIORITIES[needs.priority]
    share = row.weights.plain / row.total
    because = f", since {100 * share:.0f} % of its bytes stay in 16 bits anyway" if share > 0.25 else ""
    return (
        f"{best.name} has {100 * memory:+.1f} % of memory and {100 * hurt:+.0f} % of damage{_whose(best)}{because}, "
        f"and “{needs.priority}” gives 1 % of memory for {rate:g} % of damage"
    )


def _cache(best: Option, options: list[Option], needs: Needs) -> str:
    """The row on long chats."""
    recipe, cache = best.measured.parts
    plain = next((option for option in options if option.measured.parts == (recipe, None)), None)
    whole = f", {human(plain.cache)} in 16 bits" if plain is not None else ""
    if cache is not None:
        return f"“{ROWS[3][0]}” gives {ROWS[3][2]}: agreed, {human(best.cache)} in {cache}{whole}"
    if not any(option.measured.parts[0] == recipe and option.measured.parts[1] for option in options):
        return f"“{ROWS[3][0]}” gives {ROWS[3][2]}, and none has been measured with {best.name}"
    share = 100 * best.cache / best.total
    return (
        f"“{ROWS[3][0]}” gives {ROWS[3][2]}. Not here: the cache takes {human(best.cache)}, {share:.1f} % of the memory"
    )
