"""The decision table that the course starts from, and where the advisor disagrees with it."""

from __future__ import annotations

from canopyq.advisor.needs import PRIORITIES, Needs
from canopyq.advisor.options import Option, damage, noise_of
from canopyq.memory import human

# Situation, the priority that stands for it, the recipe. The fourth row, long chats, is about the cache alone.
ROWS = (
    ("Keep accuracy high", "accuracy", "w8a16"),
    ("A balanced middle ground", "balanced", "w4a16-g128"),
    ("More compression, accuracy is negotiable", "compression", "w4a16-g256"),
    ("Long chats eat the memory", None, "a quantized KV cache"),
)


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
    if row.measured.accuracy.value < needs.accuracy:
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
        f"{best.name} has {100 * memory:+.1f} % of memory and {100 * hurt:+.0f} % of damage{because}, and “"
        f"{needs.priority}” gives 1 % of memory for {rate:g} % of damage"
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
