"""How fast a machine could be: the bytes that have to move, the arithmetic that has to be done, and the larger time.

Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model for multicore architectures".
"""

from __future__ import annotations

from dataclasses import dataclass

from canopyq import checks


@dataclass(frozen=True)
class Machine:
    """Two rates of a processor.

    Attributes:
        bytes_per_s: that its memory gives.
        operations_per_s: multiplications and additions of 16-bit floats, counted apart.
    """

    name: str
    bytes_per_s: float
    operations_per_s: float

    @property
    def balance(self) -> float:
        """Operations that it can do in the time of one byte."""
        return self.operations_per_s / self.bytes_per_s


# What was sustained on one, by a kernel that only reads and by large products of random numbers.
H200 = Machine("NVIDIA H200", bytes_per_s=4.57e12, operations_per_s=700e12)


@dataclass(frozen=True)
class Work:
    """What a computation needs at least.

    Attributes:
        nbytes: each input read once, each output written once.
        operations: multiplications and additions.
    """

    nbytes: float
    operations: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.nbytes

    def seconds(self, machine: Machine) -> float:
        """The least time: that of the bytes or that of the arithmetic, whichever is longer."""
        return max(self.nbytes / machine.bytes_per_s, self.operations / machine.operations_per_s)

    def limit(self, machine: Machine) -> str:
        """What the time goes into: ``"memory"`` or ``"arithmetic"``."""
        return "memory" if self.intensity < machine.balance else "arithmetic"


def linear_work(rows: int, inputs: int, outputs: int, bits: float = 16) -> Work:
    """A linear layer on ``rows`` tokens of 16-bit inputs.

    Args:
        rows: tokens, M.
        inputs, outputs: in_features K and out_features N.
        bits: held per weight, scales included: 4.125 for INT4 with a 16-bit scale per 128.

    Raises:
        CanopyError: for a size below 1, or weights of no bits.
    """
    for name, value in {"rows": rows, "inputs": inputs, "outputs": outputs}.items():
        checks.count(name, value, 1)
    checks.number("bits", bits, 0.1, 64)
    return Work(outputs * inputs * bits / 8 + 2 * rows * (inputs + outputs), 2 * rows * inputs * outputs)


def crossover(inputs: int, outputs: int, bits: float, machine: Machine) -> float:
    """Rows from which on the arithmetic takes longer than the bytes; infinite if it never does."""
    weights, row = inputs * outputs * bits / 8, 2 * (inputs + outputs)
    free = 2 * inputs * outputs / machine.balance - row  # bytes' worth of arithmetic that a row adds beyond its own
    return weights / free if free > 0 else float("inf")
