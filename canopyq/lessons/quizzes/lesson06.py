"""The quiz of lesson 06."""

from .base import Choice, Question

parameters = 7e9
scale_bytes = 2
before_mb = parameters / 128 * scale_bytes / 1e6
after_mb = parameters / 32 * scale_bytes / 1e6
before_bits = 4 + 16 / 128
after_bits = 4 + 16 / 32

QUIZ = Question(
    id="granularity",
    lesson="06",
    title="Smaller drawers",
    question=(
        "Canopy's 7B model is stored in INT4 with one 16-bit scale for every **128** weights (g128). Somebody "
        "proposes **g32**. What changes?"
    ),
    choices=(
        Choice(
            "a",
            "The rounding error becomes four times smaller, since a scale serves four times fewer weights",
            "The error follows the step, and the step follows the largest weight of each group. Most groups of 32 "
            "hold a weight nearly as large as the group of 128 did, so the steps shrink by a part, not to a quarter. "
            "Dividing the error by four takes two more bits.",
        ),
        Choice(
            "b",
            "The model becomes smaller, since the groups are smaller",
            f"Smaller groups are more groups: {parameters / 32 / 1e6:.0f} million scales where there were "
            f"{parameters / 128 / 1e6:.0f} million. Each weight still keeps its own four bits, so the model grows.",
        ),
        Choice(
            "c",
            "The weights take half the memory again, as from INT8 to INT4",
            f"That would be fewer bits. The group size leaves the codes as they are, {parameters * 4 / 8 / 1e9:g} "
            "GB, and only changes how many scales stand beside them.",
        ),
        Choice(
            "d",
            f"The error falls somewhat, and the scales grow from {before_mb:.0f} MB to {after_mb:.0f} MB",
            f"Every ruler fits its few weights better, and there are four times as many: {before_bits:g} bits a "
            f"weight become {after_bits:g}. That is {(after_bits / before_bits - 1):.0%} more memory, so g32 has to "
            "earn it.",
            correct=True,
        ),
    ),
)
