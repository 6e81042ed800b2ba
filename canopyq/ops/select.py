"""Which kernel runs a layer, and why each other one does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from canopyq.ops import cpu_int4, cpu_int8, cublas, reference, skinny, sliced
from canopyq.ops.kernel import Kernel, Layout, Problem

# Fastest first: a layer is held in the layout of the first that can run it, and of those that read this layout the
# first whose `most_rows` allows it runs.
KERNELS: tuple[Kernel, ...] = (
    cpu_int4.PACKED,
    cpu_int4.SLICED,
    cpu_int8.WEIGHT_ONLY,
    cpu_int8.INT8,
    cpu_int8.CODES,
    skinny.INT8,
    skinny.FP8,
    cublas.INT8,
    cublas.FP8,
    sliced.SLICED,
    reference.REFERENCE,
)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one kernel: ``runs`` says for which inputs it does, ``reason`` why it never does."""

    kernel: str
    runs: str | None
    reason: str | None


def usable(problem: Problem) -> tuple[Kernel, ...]:
    """The kernels that share the best layout for a problem, fastest first. The reference is always among them, or a
    kernel of its layout that takes any number of rows."""
    able = [kernel for kernel in KERNELS if kernel.refuse(problem) is None]
    return tuple(kernel for kernel in able if kernel.layout == able[0].layout)


def layout_for(problem: Problem) -> Layout:
    return usable(problem)[0].layout


def pick(kernels: tuple[Kernel, ...], rows: int) -> Kernel:
    """The first kernel that takes inputs of so many rows."""
    return next(kernel for kernel in kernels if kernel.most_rows is None or rows <= kernel.most_rows)


def verdicts(problem: Problem) -> Iterator[Verdict]:
    """Every kernel there is, whether it runs this problem and for how many rows (tokens), or why not."""
    chosen = usable(problem)
    taken = 0  # rows that an earlier kernel takes
    everything = False
    for kernel in KERNELS:
        if reason := kernel.refuse(problem):
            yield Verdict(kernel.name, None, reason)
        elif kernel not in chosen:
            yield Verdict(kernel.name, None, f"the weight is held {chosen[0].layout.name}, which it does not read")
        elif everything:
            yield Verdict(kernel.name, None, "a faster kernel takes every input")
        elif kernel.most_rows is None:
            everything = True
            yield Verdict(kernel.name, f"{taken + 1} rows and more" if taken else "any number of rows", None)
        else:
            yield Verdict(kernel.name, f"{taken + 1} to {kernel.most_rows} rows", None)
            taken = kernel.most_rows
