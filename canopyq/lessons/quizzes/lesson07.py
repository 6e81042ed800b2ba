"""The quiz of lesson 07."""

from .base import Choice, Question

rows = 4096
words = 512
groups = 32
group_size = 128
in_4 = words * 32 / 4
in_8 = words * 32 / 8
by_scale = groups * group_size
packed_mb = rows * words * 4 / 1e6
bf16_mb = rows * by_scale * 2 / 1e6
zero_rows = rows / 8

QUIZ = Question(
    id="storage",
    lesson="07",
    title="Reading a header",
    question=(
        "A checkpoint has, for one linear layer:\n\n"
        f"`weight_packed` int32 ({rows}, {words}) · `weight_scale` bfloat16 ({rows}, {groups}) · "
        "`weight_shape`\n\n"
        f'and its config says `"group_size": {group_size}`. Nothing else of that layer is in the file. What is it?'
    ),
    choices=(
        Choice(
            "a",
            f"{rows} × {words} weights of 32 bits, since it says int32",
            "int32 is only the box. Nobody stores weights as 32-bit integers: each word carries several small codes. "
            f"And {groups} scales for {words} columns would be groups of {words / groups:.0f}, not "
            f"{group_size}.",
        ),
        Choice(
            "b",
            f"INT8, {rows} × {in_8:.0f} weights: four codes a word",
            f"Four codes a word would make {in_8:.0f} columns. But {groups} scales of {group_size} weights each "
            f"cover {by_scale:.0f} columns. The scales tell how many weights there are, and the words then tell how "
            "wide they are.",
        ),
        Choice(
            "c",
            f"INT4, {rows} × {in_4:.0f} weights, symmetric: eight codes a word and no zero points",
            f"{groups} scales × {group_size} = {by_scale:.0f} columns, in {words} words of 32 bits: "
            f"{words * 32 / by_scale:.0f} bits each. {packed_mb:.1f} MB of codes instead of {bf16_mb:.1f} MB in "
            "BF16. Without a `weight_zero_point` the weight is symmetric.",
            correct=True,
        ),
        Choice(
            "d",
            "INT4, asymmetric; the zero points are packed into the words",
            f"The words are full: {words} × 32 bits are just {by_scale:.0f} codes of 4. Zero points have a tensor "
            f"of their own, here it would be `weight_zero_point`, int32 ({zero_rows:.0f}, {groups}). It is "
            "missing, so there are none.",
        ),
    ),
)
