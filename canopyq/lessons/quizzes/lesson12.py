"""The quiz of lesson 12."""

from .base import Choice, Question

perplexity, quantized = 12.40, 12.31
agreement = 0.91
lower = 100 * (1 - quantized / perplexity)
moved = round(100 * (1 - agreement))

QUIZ = Question(
    id="own-model",
    lesson="12",
    title="Better than the original?",
    question=(
        f"On your text the quantized model has perplexity {quantized:.2f}, the original {perplexity:.2f}. KL is 0.06 "
        f"nats a token, and at {moved} of 100 positions the two find another token the most likely. What do you "
        "make of it?"
    ),
    choices=(
        Choice(
            "a",
            f"Quantizing has made the model {lower:.1f} % better",
            "Rounding adds no knowledge. Perplexity looks at a single token at each position, the one that came. "
            "Errors in both directions cancel there, and sometimes leave a gain. KL looks at all tokens, "
            "and cannot cancel.",
        ),
        Choice(
            "b",
            "The measurement is broken: a quantized model cannot have the lower perplexity",
            "It can: rounding moves probabilities up and down, and on one text the ups may win. An interval that stays "
            "below says that they do on text like this, not that the model knows more.",
        ),
        Choice(
            "c",
            "KL is below 0.1, so nothing has changed",
            f"No threshold holds for every model and text. Here {moved} of 100 next tokens would already be others, "
            "and one other token can turn an answer.",
        ),
        Choice(
            "d",
            "The predictions have moved; whether that matters, answers to your own questions have to say",
            f"KL and the {moved} of 100 say that this is another model now, though perplexity hides it. Whether "
            "the moves are harmless (another word for the same thing) or not (another number) shows in answers alone: "
            "ask, before and after, what your users ask.",
            correct=True,
        ),
        Choice(
            "e",
            "The text was too much like the calibration text",
            "If both are the same text, that flatters a calibrated method, and is worth checking. But round-to-nearest "
            "sees no text, and shows such figures as well.",
        ),
    ),
)
