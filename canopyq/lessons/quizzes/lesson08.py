"""The quiz of lesson 08."""

from .base import Choice, Question

outlier = 500
codes = 2**8
step = 2 * outlier / (codes - 1)
half = round(0.5 / step)
more = round(1.5 / step)
used = 2 * round(2 / step) + 1
fine = 2 * 2 / (codes - 1)

QUIZ = Question(
    id="outlier",
    lesson="08",
    title="One value jumps",
    question=(
        "Inside your INT8 model nearly all values of a tensor lie between **-2 and 2**. Now and then one of them "
        f"jumps to **{outlier}**, and all share one symmetric scale. What happens to the ordinary values?"
    ),
    choices=(
        Choice(
            "a",
            "They become more precise, since the range is now larger",
            f"A larger range does not add codes. The same {codes} of them are spread over -{outlier} to "
            f"{outlier}, so each step grows from {fine:.4f} to {step:.2f}.",
        ),
        Choice(
            "b",
            "They lose precision, since the outlier stretches the scale",
            f"The step becomes 2 · {outlier} / {codes - 1} = {step:.2f}. So 0.5 gets code {half}, 1.5 gets "
            f"code {more} as well, and all that lies between -2 and 2 is left with {used} of the {codes} "
            "codes. Nearly everything becomes 0.",
            correct=True,
        ),
        Choice(
            "c",
            "Nothing, 8 bits are enough for that",
            f"8 bits are {codes} codes, however wide the range. Over -{outlier} to {outlier} two neighbours "
            f"are {step:.2f} apart, about as much as the whole way from -2 to 2.",
        ),
        Choice(
            "d",
            "Only the outlier suffers, it is clamped to 127",
            "That would be saturation: a range chosen for the ordinary values, with the outlier cut off. Here the "
            "scale is made for the largest value, so the outlier is kept well, and all the others pay.",
        ),
    ),
)
