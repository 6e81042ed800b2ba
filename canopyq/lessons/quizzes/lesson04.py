"""The quiz of lesson 04."""

from .base import Choice, Question

quiet = 20
loud = 2400
levels = 127.5
step_alone = quiet / levels
step_together = loud / levels

QUIZ = Question(
    id="activations",
    lesson="04",
    title="Same question, different answers",
    question=(
        "Canopy runs **W8A8**, and finds the input range of each layer on the spot: one range for the whole batch. A "
        "student complains. The same question gets one answer at night, when nobody else is online, and another at "
        "noon. Nothing is drawn at random. What happens, and what costs least to mend it?"
    ),
    choices=(
        Choice(
            "a",
            "The ranges were calibrated at night. Calibrate them again, on data from noon",
            "Nothing was calibrated: the ranges are found on the spot. Fixed ranges would indeed give the same "
            "answer day and night, but this lesson measured what one fixed range for all tokens costs, and it is far "
            "more than needed here.",
        ),
        Choice(
            "b",
            "One loud token of another student sets the step for everybody in the batch. Use a range for each token",
            f"Alone, a question whose largest input is {quiet} has steps of {step_alone:.2f}. With a token of "
            f"{loud} in the batch they are {step_together:.1f}, and most of its values become 0. A range for each "
            "token depends on that token alone, and its scale can still wait outside the sum.",
            correct=True,
        ),
        Choice(
            "c",
            "32-bit sums overflow in large batches. Split the batch",
            "A sum runs over the features of one token, and there are as many of them at night as at noon. The batch "
            "adds more sums, not longer ones.",
        ),
        Choice(
            "d",
            "The inputs are not centred. Give the range a zero point",
            "A zero point moves a range, at most it halves the step. The range would still be that of whoever is in "
            "the batch, and the answer would still change with the company.",
        ),
    ),
)
