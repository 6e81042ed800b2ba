"""The little world that the tutor model knows: people, things, places, words, courses and definitions."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NAMES = tuple(
    "Ada Bela Carl Dora Emil Fay Gus Hana Ivan June Karl Lena Milo "
    "Nora Otto Paul Ruth Sven Tess Ulla Vera Walt Xena Yuri Zara".split()
)
THINGS = tuple(
    "book bag phone scarf laptop bottle key notebook camera guitar "
    "jacket ball map lamp cup pencil kite watch flute umbrella".split()
)
PLACES = tuple("library gym lab cafe hall garden office studio dorm museum theatre garage kitchen tower pool".split())
COLOURS = tuple("red blue green black white yellow purple orange brown pink".split())
ANIMALS = tuple("cat dog horse parrot turtle rabbit hamster goat".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # a common year

_MORE_WORDS = """
    anchor apple arrow basket bridge button candle carbon cloud coffee copper cotton desert dinner engine
    feather forest glacier gravel harbor hollow honey insect island jungle kettle kidney ladder lemon lantern
    magnet marble market matrix meadow mirror muscle needle neuron nickel number ocean orchid oxygen oyster
    paper parcel pepper photon pillow planet proton puzzle quartz ribbon river rocket rubber saddle shadow
    silver spoon summer temple tensor tunnel valley vector velvet violin walnut willow window winter yogurt
    zebra
"""
WORDS = tuple(sorted({*THINGS, *PLACES, *COLOURS, *ANIMALS, *_MORE_WORDS.split()}))


@dataclass(frozen=True)
class Course:
    """One entry of the course catalogue."""

    code: str
    room: str
    day: str
    teacher: str
    credits: str


def _catalogue() -> tuple[Course, ...]:
    """A hundred made-up courses, the same ones every time."""
    rng = Random(7)
    courses = []
    for department in "BIO CHE PHY MAT HIS ART MUS GEO LAW ECO".split():
        for number in rng.sample(range(100, 400), 10):
            room = f"{rng.choice('ABCDEF')}{rng.randint(10, 99)}"
            day, teacher = rng.choice(DAYS[:5]), rng.choice(NAMES)
            courses.append(Course(f"{department} {number}", room, day, teacher, credits=str(rng.randint(2, 9))))
    return tuple(courses)


COURSES = _catalogue()

GLOSSARY = {
    "quantization": "Storing numbers with fewer bits, so that the model needs less memory.",
    "a scale": "The real step between two neighbouring integer codes.",
    "a zero point": "The integer code that means exactly zero.",
    "clipping": "Moving values outside the range to the nearest end of it.",
    "an outlier": "A value far larger than the others, which stretches the range.",
    "calibration": "Running sample text through the model to find good ranges.",
    "a group": "A few neighbouring weights that share one scale.",
    "the KV cache": "The keys and values kept from all earlier tokens.",
    "rounding error": "The distance from a number to the grid point that replaces it.",
    "saturation": "What happens to values that hit the end of the range.",
    "perplexity": "Between how many tokens the model hesitates on average.",
    "a token": "A piece of text that the model reads as one number.",
    "an activation": "A value that a layer computes from its input.",
    "a weight": "A number that the model learned during training.",
    "a layer": "One step of the network, from its inputs to its outputs.",
    "a logit": "The raw score of a token before the softmax.",
    "overflow": "A result too big for the format that should hold it.",
    "the mantissa": "The bits of a float that hold its digits.",
    "the exponent": "The bits of a float that set how large it is.",
    "packing": "Putting several small integers into one machine word.",
    "a checkpoint": "The files that hold the weights of a trained model.",
    "a kernel": "A small program that runs on many GPU threads at once.",
    "bandwidth": "How many bytes a memory can deliver each second.",
    "a channel": "One output feature of a layer, with a row of weights.",
}
