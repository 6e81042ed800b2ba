"""The quiz of lesson 09."""

from .base import Choice, Question

bits = 3
levels = 2**bits

QUIZ = Question(
    id="rounding",
    lesson="09",
    title="Farther from the weights, nearer to the answers",
    question=(
        "Two versions of a layer in INT3. In **A** every weight went to its nearest code. In **B**, made by GPTQ, "
        "many weights did not, and the weights as a whole are farther from the original. On real inputs B's outputs "
        "are much nearer to the original's. How can that be?"
    ),
    choices=(
        Choice(
            "a",
            "B uses more bits for the important weights",
            f"Both have {levels} codes a weight and the same scales. GPTQ only chooses other codes. Giving some "
            "weights more bits is mixed precision.",
        ),
        Choice(
            "b",
            "Errors of different weights add up in an output, and GPTQ chooses them so that they cancel on the "
            "inputs that occur",
            "An output is a sum. Nearest codes make each term's error small and leave the sum to luck. GPTQ rounds "
            "one column, sees what it broke, and moves the columns still to come so that they make up for it, as far "
            "as the inputs go together.",
            correct=True,
        ),
        Choice(
            "c",
            "The nearest code is computed wrongly for negative weights",
            "Nearest is nearest on both sides of zero. A is the best that can be done for each weight by itself, and "
            "that is exactly its limit.",
        ),
        Choice(
            "d",
            "B was trained again for some steps, so it is a different model",
            "No training and no gradients: one pass over a few thousand tokens to see which inputs go together, then "
            "a sum for each column.",
        ),
        Choice(
            "e",
            "The inputs were rounded too, which smooths the errors",
            "These are W3A16 layers: inputs stay in 16 bits in both. Rounding inputs adds errors and smooths none.",
        ),
    ),
)
