"""Which kernel runs a layer, and why each other one does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from canopyq.kernels import cpu_int4, cpu_int8, cublas, many_codes, reference, skinny, sliced
from canopyq.kernels.cuda import weight_only
from canopyq.kernels.kernel import ANY, MANY, Kernel, Layout, Problem, Rows

# Fastest first: a layer is held in the layout of the first that can run it, and of those that read this layout the
# first that is taken for so many rows runs.
KERNELS: tuple[Kernel, ...] = (
    weight_only.DECODE,
    weight_only.WARPGROUP,
    weight_only.STREAM_K,
    weight_only.LIBRARY,
    cpu_int4.PACKED,
    cpu_int4.SLICED,
    cpu_int8.WEIGHT_ONLY,
    cpu_int8.INT8,
    cpu_int8.CODES,
    skinny.INT8,
    skinny.FP8,
    many_codes.INT8,
    many_codes.FP8,
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
    """The kernels that share the best layout for a problem, fastest first, settled for it. The reference is always
    among them, or a kernel of its layout that takes any number of rows."""
    return of_layout(problem, next(kernel.layout for kernel in KERNELS if kernel.refuse(problem) is None))


def of_layout(problem: Problem, layout: Layout) -> tuple[Kernel, ...]:
    """The kernels that can run a problem whose weight lies in a layout, fastest first, settled for it."""
    reads = [kernel for kernel in KERNELS if kernel.layout == layout]
    return tuple(kernel.settled(problem) for kernel in reads if kernel.refuse(problem) is None)


def pick(kernels: tuple[Kernel, ...], rows: int) -> Kernel:
    """The first of `usable` kernels that takes inputs of so many rows."""
    return next(kernel for kernel in kernels if kernel.takes(rows))


def verdicts(problem: Problem) -> Iterator[Verdict]:
    """Every kernel there is, whether it runs this problem and for how many rows (tokens), or why not."""
    chosen = {kernel.name: kernel for kernel in usable(problem)}
    layout = next(iter(chosen.values())).layout
    left = ANY  # rows that no earlier kernel takes
    for kernel in KERNELS:
        if reason := kernel.refuse(problem):
            yield Verdict(kernel.name, None, reason)
        elif kernel.name not in chosen:
            yield Verdict(kernel.name, None, f"the weight is held {layout.name}, which it does not read")
        elif not left:
            yield Verdict(kernel.name, None, "a faster kernel takes every input")
        elif not (own := _common(left, chosen[kernel.name].rows)):
            yield Verdict(kernel.name, None, "another kernel is faster for every number of rows")
        else:
            yield Verdict(kernel.name, _words(own), None)
            left = _without(left, own)


def _common(some: Rows, others: Rows) -> Rows:
    pairs = (range(max(a.start, b.start), min(a.stop, b.stop)) for a in some for b in others)
    return tuple(pair for pair in pairs if pair)


def _without(some: Rows, taken: Rows) -> Rows:
    for cut in taken:
        parts = ((range(a.start, min(a.stop, cut.start)), range(max(a.start, cut.stop), a.stop)) for a in some)
        some = tuple(part for pair in parts for part in pair if part)
    return some


def _words(rows: Rows) -> str:
    """Such as "1 to 16, 129 rows and more"."""
    if rows == ANY:
        return "any number of rows"
    *first, last = [str(some.start) if len(some) == 1 else f"{some.start} to {some.stop - 1}" for some in rows]
    last = f"{rows[-1].start} rows and more" if rows[-1].stop == MANY else f"{last} rows"
    return ", ".join([*first, last])
