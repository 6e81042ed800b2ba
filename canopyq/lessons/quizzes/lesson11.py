"""The quiz of lesson 11."""

from .base import Choice, Question

layers = 32
kv_heads = 32
head_dim = 128
tokens = 32 * 1024
cache_gb = 2 * layers * kv_heads * head_dim * 2 * tokens / 1e9
kv8_gb = cache_gb * (8 + 2 * 16 / 64) / 16
linear = 6476005376
plain_gb = (2 * 32000 * 4096 + 65 * 4096) * 2 / 1e9
g128_gb = linear * (4 + 16 / 128) / 8 / 1e9 + plain_gb
g256_gb = linear * (4 + 16 / 256) / 8 / 1e9 + plain_gb
w2_gb = linear * (2 + 16 / 32) / 8 / 1e9 + plain_gb
w8_gb = linear / 1e9 + plain_gb
saved_mb = (g128_gb - g256_gb) * 1000

QUIZ = Question(
    id="choose",
    lesson="11",
    title="The right thing to squeeze",
    question=(
        "Canopy serves a 7B model (Llama-2's shape) as **w4a16-g128**. One student's chat has grown to **32k "
        f"tokens**, and the GPU runs out of memory: weights {g128_gb:.1f} GB, cache {cache_gb:.1f} GB. Which change "
        "frees the most, for the least damage?"
    ),
    choices=(
        Choice(
            "a",
            'Go on to w4a16-g256, the row "more compression"',
            f"Larger groups have fewer scales, and scales are a small part of it: {saved_mb:.0f} MB of {g128_gb:.1f} "
            "GB. The cache stays as it is.",
        ),
        Choice(
            "b",
            "Quantize the cache to 8 bits",
            f"The cache is {cache_gb / (cache_gb + g128_gb):.0%} of the memory, and 8 bits leave {kv8_gb:.1f} GB of "
            "it. Measured on the tutor, an 8-bit cache does less damage than 16-bit arithmetic itself.",
            correct=True,
        ),
        Choice(
            "c",
            "Go back to w8a16, since INT8 keeps accuracy high",
            f"More bits are more bytes: the weights would grow from {g128_gb:.1f} to {w8_gb:.1f} GB, on a GPU that "
            "is full already.",
        ),
        Choice(
            "d",
            "Quantize the weights to 2 bits, they are what a model is made of",
            f"That frees {g128_gb - w2_gb:.1f} GB with groups of 32, far less than the cache takes, and at 2 bits "
            "the answers suffer. In a long chat the weights are the smaller part.",
        ),
    ),
)
