"""The quiz of lesson 02."""

from .base import Choice, Question

relu_max = 1.3
asym_step = relu_max / 255
sym_step = relu_max / 127.5

QUIZ = Question(
    id="symmetry",
    lesson="02",
    title="Which thermometer for which data?",
    question=(
        "Weights usually lie around zero: `[-0.5, 0.3, -0.1, 0.4]`. Activations after a ReLU do not: `[0.0, 0.7, "
        "0.2, 1.3]`.\n\n"
        "(A ReLU keeps positive numbers and turns negative ones into 0, so nothing below zero ever leaves it.)\n\n"
        "Which would you use?"
    ),
    choices=(
        Choice(
            "a",
            "Symmetric for the weights, asymmetric for the activations",
            "The weights fill both halves of a symmetric range, so a scale is all they need. The activations use one "
            f"half only: a zero point moves all 256 INT8 codes onto 0 to {relu_max:g}, and the step shrinks from "
            f"{sym_step:.4f} to {asym_step:.4f}.",
            correct=True,
        ),
        Choice(
            "b",
            "Asymmetric for both",
            "It would work, but the weights gain little: their range is nearly centred already. They would pay for "
            "it with a stored zero point for every scale and an extra subtraction in every matrix product.",
        ),
        Choice(
            "c",
            "Symmetric for both",
            f"Right for the weights. But a symmetric range for 0 to {relu_max:g} also covers -{relu_max:g} to 0, "
            "where no ReLU output ever lands: half of the codes are never used, and the step is "
            f"{sym_step / asym_step:.0f} times as wide as it has to be.",
        ),
        Choice(
            "d",
            "Asymmetric for the weights, symmetric for the activations",
            "The wrong way round: the zero point goes to data that is already centred, and the one-sided activations "
            "lose half of their codes to numbers that never occur.",
        ),
    ),
)
