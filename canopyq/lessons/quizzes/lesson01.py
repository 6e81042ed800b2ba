"""The quiz of lesson 01."""

from .base import Choice, Question

parameters = 7e9
fp32_gb = parameters * 32 / 8 / 1e9
fp16_gb = parameters * 16 / 8 / 1e9
int8_gb = parameters * 8 / 8 / 1e9
int4_gb = parameters * 4 / 8 / 1e9
int2_gb = parameters * 2 / 8 / 1e9

QUIZ = Question(
    id="memory",
    lesson="01",
    title="How small does it get?",
    question=(
        f"A 7B model fills **{fp32_gb:g} GB** in FP32, four bytes a parameter. How much memory do its weights need "
        "in **INT4**?"
    ),
    choices=(
        Choice(
            "a",
            f"{fp16_gb:g} GB",
            f"{fp16_gb:g} GB is the FP16 or BF16 model: 16 of 32 bits, half of FP32. INT4 keeps 4 bits, a quarter of "
            "that again.",
        ),
        Choice(
            "b",
            f"{int8_gb:g} GB",
            f"{int8_gb:g} GB is INT8, one byte a parameter. Two INT4 codes share each byte, so halve it once more.",
        ),
        Choice(
            "c",
            f"{int4_gb:g} GB",
            f"4 of 32 bits is {4 / 32:.1%} of FP32: {fp32_gb:g} GB × {4 / 32:g} = {int4_gb:g} GB, {32 / 4:g} times "
            "smaller. (The scales come on top; with one 16-bit scale for every 128 weights they are another "
            f"{parameters / 128 * 2 / 1e6:.0f} MB.)",
            correct=True,
        ),
        Choice(
            "d",
            f"{int2_gb:g} GB",
            f"{int2_gb:g} GB is what 2 bits a parameter would take: `7e9 * 2 / 8` bytes. INT4 has 4 bits, half a "
            "byte each.",
        ),
    ),
)
