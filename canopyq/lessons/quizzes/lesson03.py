"""The quiz of lesson 03."""

from .base import Choice, Question

parameters = 7e9
bandwidth = 2e12
operations = 3e14
noon = 512
move_16 = parameters * 2 / bandwidth * 1e3
move_4 = parameters * (4 + 16 / 128) / 8 / bandwidth * 1e3
multiply_1 = parameters * 2 / operations * 1e3
multiply_noon = multiply_1 * noon

QUIZ = Question(
    id="weights",
    lesson="03",
    title="Fast at night, slow at noon",
    question=(
        "Canopy's 7B model goes from BF16 to **W4A16**, on a GPU that reads 2 TB a second and does 300 trillion "
        "multiplications and additions a second. At night, with one student, every token comes several times sooner. "
        f"At noon, with {noon} students in one batch, nothing is gained. Why?"
    ),
    choices=(
        Choice(
            "a",
            "At noon every student needs a copy of the weights, and the copies fill the memory",
            "All students share the weights, which are fixed: that is what makes them easy. What grows with the "
            "students is the KV cache of lesson 05.",
        ),
        Choice(
            "b",
            "The GPU multiplies 4-bit integers, and it is not good at that in large batches",
            "Nothing is multiplied in 4 bits. A16 says what the other factor is: 16-bit activations. The codes "
            "become 16-bit numbers on their way to the arithmetic, and the arithmetic is the same as before.",
        ),
        Choice(
            "c",
            "At night the time goes into reading weights, at noon into multiplying, and W4A16 multiplies as much as "
            "BF16",
            f"Reading the weights takes {move_16:.1f} ms in BF16 and {move_4:.1f} ms in W4A16, for one student or "
            f"for {noon}. Multiplying takes {multiply_1:.2f} ms for one and {multiply_noon:.0f} ms for {noon}, "
            "whatever the weights were stored as. The slower of the two decides, and unpacking the codes comes on "
            "top.",
            correct=True,
        ),
        Choice(
            "d",
            "At noon there are more activations, and W4A16 quantizes them again for every student",
            "W4A16 leaves activations alone. Recipes that quantize them are called W8A8, and because they multiply "
            "8-bit numbers, they do gain at noon. Lesson 04 is about them.",
        ),
    ),
)
