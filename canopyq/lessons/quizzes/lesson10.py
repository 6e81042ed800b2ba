"""The quiz of lesson 10."""

from .base import Choice, Question

bandwidth = 4.57e12
rate = 700e12
balance = rate / bandwidth
full_rows = balance
small_rows = balance * 4.125 / 16
ratio = 16 / 4.125

QUIZ = Question(
    id="speed",
    lesson="10",
    title="Faster for whom?",
    question=(
        "Canopy's weights go from BF16 to INT4 (g128). A student who is alone on the server gets answers more than "
        "twice as fast. In the evening, when **512** requests are decoded together, nothing is gained. Why?"
    ),
    choices=(
        Choice(
            "a",
            "With 512 requests the weights no longer fit in the GPU's memory",
            "The weights are the same for one request and for 512, and in INT4 they take a quarter of the memory. "
            "What grows with requests is the KV cache.",
        ),
        Choice(
            "b",
            "With 512 tokens for every weight that is read, the arithmetic takes longer than the reading, and INT4 "
            "saves only reading",
            f"The GPU can do about {balance:.0f} operations in the time of one byte. In BF16 the arithmetic takes "
            f"over at about {full_rows:.0f} tokens, in INT4 already at about {small_rows:.0f} (a few more when "
            "inputs and outputs are counted, as in the lesson). With 512 both do the same 16-bit products, and a "
            "smaller weight only makes the memory wait.",
            correct=True,
        ),
        Choice(
            "c",
            "Each request needs its own copy of the scales",
            "Codes and scales belong to the weights and are shared by all requests. A scale is read once for its "
            "group, whoever asks.",
        ),
        Choice(
            "d",
            "INT4 products are less exact, so the GPU repeats them for large batches",
            "Nothing is repeated. The codes become 16-bit numbers on the way, and the tensor cores do the same "
            "products as for BF16, once.",
        ),
        Choice(
            "e",
            "The kernel computes with 4-bit numbers, which GPUs do slowly",
            "W4A16 never multiplies 4-bit numbers: weights are made 16-bit numbers in registers, a few instructions "
            f"for eight of them. It saves memory traffic, up to {ratio:.2f} times, and no arithmetic.",
        ),
    ),
)
