"""The quiz of lesson 00."""

from .base import Choice, Question

parameters = 7e9
card_gb = 8
tokens = 4096
kv_per_token = 2 * 32 * 32 * 128 * 2
kv_gb = tokens * kv_per_token / 1e9
bf16_gb = parameters * 2 / 1e9
int8_gb = parameters * 1 / 1e9
int4_gb = parameters * 4 / 8 / 1e9 + parameters / 128 * 2 / 1e9
int2_gb = parameters * 2 / 8 / 1e9 + parameters / 128 * 2 / 1e9

QUIZ = Question(
    id="budget",
    lesson="00",
    title="Eight gigabytes, and not one more",
    question=(
        f"Canopy has to run a 7B model on a card with **{card_gb} GB**. A chat of {tokens} tokens keeps a KV "
        "cache, the model's notes\n"
        f"on the conversation so far, which takes {kv_per_token / 1e6:.3f} MB a token here: {kv_gb:.2f} GB in "
        "all.\n\n"
        "Which weights fit beside that cache and keep the **most bits**?"
    ),
    choices=(
        Choice(
            "a",
            "16 bits a weight (BF16), as it was trained",
            f"`7e9 * 2` bytes are {bf16_gb:.0f} GB: {bf16_gb - card_gb:.0f} GB too many before the first token is "
            "read.",
        ),
        Choice(
            "b",
            "8 bits a weight",
            f"{int8_gb:.0f} GB do load, which is what makes this one treacherous: with the cache it is "
            f"{int8_gb + kv_gb:.2f} GB, and the card runs out in the middle of a chat, after about "
            f"{(card_gb - int8_gb) * 1e9 / kv_per_token:.0f} tokens.",
        ),
        Choice(
            "c",
            "4 bits a weight, one 16-bit scale for every 128 weights",
            f"{int4_gb:.2f} GB of weights, scales included, and {kv_gb:.2f} GB of cache make {int4_gb + kv_gb:.2f} "
            f"GB of {card_gb}. That is what quantization buys. What it costs in right answers is not for a formula "
            "to say: this course measures it.",
            correct=True,
        ),
        Choice(
            "d",
            "2 bits a weight, one 16-bit scale for every 128 weights",
            f"It fits with {card_gb - int2_gb - kv_gb:.1f} GB to spare, but only {2**2} different values are "
            "left for each weight, and the budget did not ask for that: 4 bits fit too.",
        ),
    ),
)
