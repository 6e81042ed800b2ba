"""The table of all kernels for a linear layer: which of them runs, and why each other one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from canopyq.kernels import cpu_int4, cpu_int8, cpu_tiled, reference
from canopyq.kernels.cuda import w4a8, w8a8, weight_only
from canopyq.kernels.cuda.fragments import FRAGMENTS
from canopyq.kernels.reference import CHECKPOINT_LAYOUT
from canopyq.kernels.spec import ANY_ROWS, ROW_LIMIT, LinearSpec, RowRanges, WeightLayout, up_to


@dataclass(frozen=True)
class Kernel:
    """A way to compute a linear layer.

    Attributes:
        name: what `explain` calls it.
        device: the type of device that it is for; None for any.
        layout: the layout that it reads.
        unsupported: why it cannot run a spec that lies on such a device, in words that tell what to change; None if it
            can.
        run: (x (M, K), packed, spec) -> (M, N) in x's dtype, without the bias.
        rows: for which numbers of rows of x it is taken; a function if they depend on the spec.
        recipe: a recipe that it is for.
        takes_codes: x is a `QuantizedTensor`, where the others get quantized inputs dequantized.
    """

    name: str
    device: str | None
    layout: WeightLayout
    unsupported: Callable[[LinearSpec], str | None]
    run: Callable[..., Tensor]
    rows: RowRanges | Callable[[LinearSpec], RowRanges] = ANY_ROWS
    recipe: str = "w4a16-g128"
    takes_codes: bool = False

    def unsupported_reason(self, spec: LinearSpec) -> str | None:
        """Why it cannot run a spec, or None if it can."""
        if self.device in (None, spec.device.type):
            return self.unsupported(spec)
        whose = "is for NVIDIA GPUs" if self.device == "cuda" else "is a processor's kernel"
        return f"it {whose}; the layer lies on {spec.device}"

    def for_spec(self, spec: LinearSpec) -> Kernel:
        """The same with ranges for ``rows``."""
        return replace(self, rows=self.rows(spec)) if callable(self.rows) else self

    def takes(self, rows: int) -> bool:
        """Whether a kernel `for_spec` is taken for an input of so many rows."""
        return any(rows in some for some in self.rows)


# Fastest first: a weight is prepacked in the layout of the first that can run it, and of those that read this layout
# the first that is taken for so many rows runs.
KERNELS: dict[str, Kernel] = {
    # int4 and int8 weights, 16-bit inputs, on a GPU
    "weight_only_decode": Kernel(
        "int4/int8 decode (CUDA)", "cuda", FRAGMENTS,
        weight_only.unsupported, weight_only.decode, weight_only.decode_rows,
    ),
    "weight_only_warpgroup": Kernel(
        "int4/int8 on warpgroups (CUDA)", "cuda", FRAGMENTS,
        weight_only.unsupported_warpgroup, weight_only.warpgroup, weight_only.warpgroup_rows,
    ),
    "weight_only_stream_k": Kernel(
        "int4/int8 on warpgroups, stream-K (CUDA)", "cuda", FRAGMENTS,
        weight_only.unsupported_stream_k, weight_only.stream_k, weight_only.stream_k_rows,
    ),
    "weight_only_dequantize": Kernel(
        "int4/int8 dequantized, then cuBLAS (CUDA)", "cuda", FRAGMENTS, weight_only.unsupported, weight_only.dequantize
    ),
    # int4 weights, int8 inputs, on a GPU
    "w4a8": Kernel(
        "int4 by int8 on warpgroups (CUDA)", "cuda", w4a8.INTEGER_FRAGMENTS,
        w4a8.unsupported, w4a8.linear, ANY_ROWS, "w4a8-g128", takes_codes=True,
    ),
    # int4 and int8 weights on a processor, the latter with inputs of any kind
    "cpu_int4": Kernel(
        "packed int4, bfloat16 input (torch)", "cpu", cpu_int4.BLOCKS,
        cpu_int4.unsupported, cpu_int4.packed_linear, up_to(32),
    ),
    "cpu_int4_tiled": Kernel(
        "packed int4, slice by slice in float32", "cpu", cpu_int4.BLOCKS, cpu_int4.unsupported, cpu_int4.tiled_linear
    ),
    "cpu_w8a16": Kernel(
        "packed int8, bfloat16 input (torch)", "cpu", CHECKPOINT_LAYOUT,
        cpu_int8.unsupported_weight_only, cpu_int8.weight_only, up_to(16), "w8a16",
    ),
    "cpu_w8a8": Kernel(
        "int8 by int8, int32 sums (torch)", "cpu", CHECKPOINT_LAYOUT,
        cpu_int8.unsupported_int8, cpu_int8.int8_by_int8, ANY_ROWS, "w8a8", takes_codes=True,
    ),
    "cpu_w8a8_bfloat16": Kernel(
        "int8 codes held in bfloat16 by int8 (torch)", "cpu", CHECKPOINT_LAYOUT,
        cpu_int8.unsupported_bfloat16, cpu_int8.codes_in_bfloat16, up_to(16), "w8a8", takes_codes=True,
    ),
    # 8 bits by 8 bits on a GPU
    "skinny_int8": Kernel(
        "int8 by int8, few rows (CUDA)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_skinny_int8, w8a8.skinny, w8a8.skinny_int8_rows, "w8a8", takes_codes=True,
    ),
    "skinny_fp8": Kernel(
        "FP8 by FP8, few rows (CUDA)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_skinny_fp8, w8a8.skinny, w8a8.skinny_fp8_rows, "fp8", takes_codes=True,
    ),
    "wgmma_int8": Kernel(
        "int8 by int8 on warpgroups (CUDA)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_wgmma_int8, w8a8.wgmma, ANY_ROWS, "w8a8", takes_codes=True,
    ),
    "wgmma_fp8": Kernel(
        "FP8 by FP8 on warpgroups (CUDA)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_wgmma_fp8, w8a8.wgmma, w8a8.wgmma_fp8_rows, "fp8", takes_codes=True,
    ),
    "cublas_int8": Kernel(
        "int8 by int8, int32 sums (cuBLAS)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_cublas_int8, w8a8.cublas_int8, ANY_ROWS, "w8a8", takes_codes=True,
    ),
    "cublas_fp8": Kernel(
        "FP8 by FP8, float32 sums (cuBLAS)", "cuda", w8a8.FLOAT32_SCALES,
        w8a8.unsupported_cublas_fp8, w8a8.cublas_fp8, ANY_ROWS, "fp8", takes_codes=True,
    ),
    # everything else
    "cpu_tiled": Kernel(
        "slice by slice: dequantize in cache, multiply in float32", "cpu", CHECKPOINT_LAYOUT,
        cpu_tiled.unsupported, cpu_tiled.linear,
    ),
    "reference": Kernel(
        "reference: dequantize, then multiply", None, CHECKPOINT_LAYOUT, lambda spec: None, reference.linear
    ),
}  # fmt: skip


def candidates(spec: LinearSpec) -> tuple[Kernel, ...]:
    """The kernels that share the best layout for a spec, fastest first, with ranges for their ``rows``, which together
    are any number of rows."""
    layouts = dict.fromkeys(kernel.layout for kernel in KERNELS.values() if kernel.unsupported_reason(spec) is None)
    return next(found for layout in layouts if _take_all(found := candidates_in_layout(spec, layout)))


def _take_all(kernels: tuple[Kernel, ...]) -> bool:
    left = ANY_ROWS
    for kernel in kernels:
        left = _without(left, kernel.rows)
    return not left


def candidates_in_layout(spec: LinearSpec, layout: WeightLayout) -> tuple[Kernel, ...]:
    """The kernels that can run a spec whose weight lies in a layout, fastest first, with ranges for their ``rows``."""
    reads = [kernel for kernel in KERNELS.values() if kernel.layout == layout]
    return tuple(kernel.for_spec(spec) for kernel in reads if kernel.unsupported_reason(spec) is None)


def select(kernels: tuple[Kernel, ...], rows: int) -> Kernel:
    """The first of `candidates` that takes inputs of so many rows."""
    return next(kernel for kernel in kernels if kernel.takes(rows))


@dataclass(frozen=True)
class Verdict:
    """What becomes of one kernel: ``runs`` says for which inputs it does, ``reason`` why it never does."""

    kernel: str
    runs: str | None
    reason: str | None


def verdicts(spec: LinearSpec) -> Iterator[Verdict]:
    """Every kernel there is, whether it runs this spec and for how many rows (tokens), or why not."""
    chosen = {kernel.name: kernel for kernel in candidates(spec)}
    layout = next(iter(chosen.values())).layout
    left = ANY_ROWS  # rows that no earlier kernel takes
    for kernel in KERNELS.values():
        if reason := kernel.unsupported_reason(spec):
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


def _common(some: RowRanges, others: RowRanges) -> RowRanges:
    pairs = (range(max(a.start, b.start), min(a.stop, b.stop)) for a in some for b in others)
    return tuple(pair for pair in pairs if pair)


def _without(some: RowRanges, taken: RowRanges) -> RowRanges:
    for cut in taken:
        parts = ((range(a.start, min(a.stop, cut.start)), range(max(a.start, cut.stop), a.stop)) for a in some)
        some = tuple(part for pair in parts for part in pair if part)
    return some


def _words(rows: RowRanges) -> str:
    """Such as "1 to 16, 129 rows and more"."""
    if rows == ANY_ROWS:
        return "any number of rows"
    *first, last = [str(some.start) if len(some) == 1 else f"{some.start} to {some.stop - 1}" for some in rows]
    last = f"{rows[-1].start} rows and more" if rows[-1].stop == ROW_LIMIT else f"{last} rows"
    return ", ".join([*first, last])
