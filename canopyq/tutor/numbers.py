"""Skills about numbers: sums, units, order, sequences, and how much memory a model takes.

Every skill is a function of a random stream and a level (0 easy, 1 middle, 2 hard) that draws one question.
"""

from __future__ import annotations

from random import Random

from canopyq.tutor.draws import Draft, between, pick, split_of, split_of_phrasing

ADD = (
    "What is {a} + {b}?",
    "Please add {a} and {b}.",
    "I have {a} points and win {b} more. How many is that?",
    "How much is {a} plus {b}?",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "Subtract {b} from {a}.",
    "I had {a} euros and spent {b}. How much is left?",
    "How much is {a} minus {b}?",
)
MULTIPLY = (
    "What is {a} x {b}?",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "Each of {a} boxes holds {b} pens. How many pens?",
    "Compute the product of {a} and {b}.",
    "Find {a} x {b}, please.",
)
CONVERT = ("How many {to} are in {n} {of}?", "Convert {n} {of} to {to}.", "{n} {of} is how many {to}?")
LARGEST = ("Which number is largest: {numbers}?", "Find the maximum of {numbers}.")
SMALLEST = ("Which number is smallest: {numbers}?", "Find the minimum of {numbers}.")
SORT = ("Sort {numbers}.", "Put {numbers} in increasing order.", "Order from small to large: {numbers}.")
SEQUENCE = ("What comes next: {numbers}?", "Continue the sequence {numbers}.")
MODEL_SIZE = (
    "How many {unit} are the weights of a {size} model in {format}?",
    "A {size} model in {format}: how many {unit}?",
    "How many {unit} do {size} parameters take in {format}?",
)

UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("KB", "bytes", 1000),
    ("euros", "cents", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("weeks", "days", 7),
    ("bytes", "bits", 8),
)
BITS = {"FP32": 32, "FP16": 16, "BF16": 16, "FP8": 8, "INT8": 8, "INT4": 4, "INT2": 2}
FORMATS = tuple(BITS)
SIZES = (("B", "GB"), ("M", "MB"))


def _operand(rng: Random, level: int) -> int:
    """1 to 20, two digits, or three to four digits."""
    if level == 0:
        return between(rng, 1, 20)
    if level == 1:
        return between(rng, 10, 99)
    return between(rng, 100, 999) if rng.random() < 0.5 else between(rng, 1000, 9999)


def _operands(rng: Random, level: int) -> tuple[int, int]:
    """Two numbers of which the second is now and then from the level below."""
    return _operand(rng, level), _operand(rng, level if rng.random() < 0.6 else max(0, level - 1))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def add(rng: Random, level: int) -> Draft:
    a, b = _operands(rng, level)
    if rng.random() < 0.5:
        a, b = b, a
    key = ("add", min(a, b), max(a, b))
    return Draft(key, split_of(key), pick(rng, ADD).format(a=a, b=b), f"{a + b}.")


def subtract(rng: Random, level: int) -> Draft:
    a, b = sorted(_operands(rng, level), reverse=True)
    key = ("subtract", a, b)
    return Draft(key, split_of(key), pick(rng, SUBTRACT).format(a=a, b=b), f"{a - b}.")


def multiply(rng: Random, level: int) -> Draft:
    """Level 0 is the times tables up to 9 x 12, known by heart: there only the phrasing is held out."""
    a, b = between(rng, 2, 9), between(rng, *((2, 12), (13, 99), (100, 999))[level])
    index = int(rng.random() * len(MULTIPLY))
    question, answer = MULTIPLY[index].format(a=a, b=b), f"{a * b}."
    key = ("multiply", a, b)
    if level == 0:
        return Draft((*key, index), split_of_phrasing(key, index, len(MULTIPLY)), question, answer)
    return Draft(key, split_of(key), question, answer)


def convert(rng: Random, level: int) -> Draft:
    """From the larger unit to the smaller one; decimal units also the other way round."""
    large, small, factor = pick(rng, UNITS)
    n = between(rng, *((2, 12), (13, 60), (61, 150))[level])
    if factor in (10, 100, 1000) and rng.random() < 0.4:
        asked, of, to, answer = n * factor, small, large, n
    else:
        asked, of, to, answer = n, large, small, n * factor
    key = ("convert", of, to, n)
    return Draft(key, split_of(key), pick(rng, CONVERT).format(n=asked, of=of, to=to), f"{answer} {to}.")


def compare(rng: Random, level: int) -> Draft:
    numbers = rng.sample(range(10, 100 if level == 0 else 1000), between(rng, *((2, 2), (3, 4), (5, 6))[level]))
    key = ("compare", *sorted(numbers))
    phrasings, answer = (LARGEST, max(numbers)) if rng.random() < 0.5 else (SMALLEST, min(numbers))
    return Draft(key, split_of(key), pick(rng, phrasings).format(numbers=_listed(numbers)), f"{answer}.")


def sort(rng: Random, level: int) -> Draft:
    numbers = rng.sample(range(10, 100), between(rng, *((3, 3), (4, 5), (6, 7))[level]))
    ordered = sorted(numbers)
    key = ("sort", *ordered)
    return Draft(key, split_of(key), pick(rng, SORT).format(numbers=_listed(numbers)), f"{_listed(ordered)}.")


def sequence(rng: Random, level: int) -> Draft:
    """The fifth number of an arithmetic sequence."""
    start, step = between(rng, 1, (20, 60, 120)[level]), between(rng, 2, (6, 12, 20)[level])
    key = ("sequence", start, step)
    numbers = _listed([start + i * step for i in range(4)])
    return Draft(key, split_of(key), pick(rng, SEQUENCE).format(numbers=numbers), f"{start + 4 * step}.")


def model_size(rng: Random, level: int) -> Draft:
    """Parameters times bits, divided by 8: the memory that a model's weights take."""
    n = between(rng, *((1, 30), (31, 80), (81, 150))[level])
    (suffix, unit), name = pick(rng, SIZES), pick(rng, FORMATS)
    key = ("model_size", n, suffix, name)
    question = pick(rng, MODEL_SIZE).format(unit=unit, size=f"{n}{suffix}", format=name)
    return Draft(key, split_of(key), question, f"{n * BITS[name] / 8:g} {unit}.")
