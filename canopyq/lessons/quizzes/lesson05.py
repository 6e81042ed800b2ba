"""The quiz of lesson 05."""

from .base import Choice, Question

layers = 32
kv_heads = 32
head_dim = 128
per_token = 2 * layers * kv_heads * head_dim * 2
weights_gb = 7e9 * 2 / 1e9
chat_gb = per_token * 32768 / 1e9

QUIZ = Question(
    id="kv-cache",
    lesson="05",
    title="What grows while students talk?",
    question=(
        "Canopy's students keep asking: one question leads to the next, and a session lasts all evening. The server "
        "starts with plenty of free memory and has less after **every turn**, until it runs out. What should be "
        "quantized?"
    ),
    choices=(
        Choice(
            "a",
            "The weights",
            f"Weights are loaded once. They take the same {weights_gb:g} GB (7B, BF16) in the first turn and in the "
            "hundredth. Quantizing them starts the evening from a lower level, and the climb goes on as before.",
        ),
        Choice(
            "b",
            "The activations",
            "Activations are made for the tokens at hand and thrown away when the next layer has read them. They do "
            "not pile up from turn to turn. Quantizing them is about the speed of matrix products.",
        ),
        Choice(
            "c",
            "The KV cache",
            "Of all three only the cache keeps something of every token that was ever said: a key and a value in "
            f"each layer, {per_token:,} bytes a token in a 7B model without shared heads. A chat of 32,768 tokens "
            f"holds {chat_gb:.1f} GB, more than the weights. With INT4 codes it is less than a third of that.",
            correct=True,
        ),
        Choice(
            "d",
            "Nothing; shorter answers are the only cure",
            "Shorter answers make the climb slower, and what students type is cached as well. With INT4 codes the "
            "cache holds every token in less than a third of the bytes, and nobody has to talk less.",
        ),
    ),
)
