"""How the CUDA kernels cut a product into blocks: the constants of a kernel, and which ones suit a shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

SHARED = 227 * 1024  # bytes of shared memory that a multiprocessor of compute capability 9.0 gives to blocks


@dataclass(frozen=True)
class Weight:
    """What both kernels need to know of a weight: its shape in slabs and steps."""

    n: int
    slabs: int  # of 64 rows
    steps: int
    groups: int
    bits: int
    group: int  # columns that share a scale; 0 for all of them
    asymmetric: bool

    @property
    def blocks(self) -> int:
        """Of 16 rows, without those of the padding."""
        return -(-self.n // 16)

    @property
    def step_bytes(self) -> int:
        """Of codes, for 16 rows."""
        return 16 * 128 * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of the scales and zero points of a step, for 16 rows."""
        return 32 * max(1, 128 // self.group if self.group else 1) * (1 + self.asymmetric)


@dataclass(frozen=True)
class DecodeTile:
    """Constants of ``decode.cu``, and how many blocks there are to a multiprocessor."""

    columns: int  # 8 rows of x each
    blocks: int  # of 16 rows of W, taken together
    warps: int
    depth: int
    cluster: int
    per_sm: int

    def shared(self, weight: Weight, rows: int) -> int:
        sums = 2 * (self.warps + (self.cluster > 1)) * self.blocks * self.columns * 8 * 20 * 4
        ring = self.warps * self.depth * self.blocks * (weight.step_bytes + weight.scale_bytes)
        return sums + ring + rows * (-(-weight.steps // self.cluster) * 128 + 8) * 2


@dataclass(frozen=True)
class WarpgroupTile:
    """Constants of ``warpgroup.cu``."""

    tokens: int
    tall: int  # a block computes 128 · tall rows of W
    stages: int
    batch: int
    cluster: int
    per_sm: int

    @property
    def threads(self) -> int:
        return 384 if self.tall * self.tokens > 192 else 288

    def shared(self, weight: Weight) -> int:
        rows = 128 * self.tall
        stage = 2 * self.tokens * 128 + rows // 16 * (weight.step_bytes + weight.scale_bytes)
        return max(self.stages * (-(-stage // 1024) * 1024), self.tokens * (rows + 4) * 4) + 1024


def stages_that_fit(tokens: int, tall: int, weight: Weight, per_sm: int) -> int:
    one = WarpgroupTile(tokens, tall, 1, 2, 1, per_sm)
    stage = 2 * tokens * 128 + 8 * tall * (weight.step_bytes + weight.scale_bytes)
    return (SHARED // per_sm - 3072) // (-(-stage // 1024) * 1024) if one else 0


@cache
def decode_tile(weight: Weight, rows: int, processors: int, clusters: bool) -> DecodeTile | None:
    """The tile for so many rows of x, or None if x does not fit in shared memory."""
    raise NotImplementedError


def product_source(tokens: int, bf16: bool) -> str:
    """``warpgroup_multiply_add`` for ``tokens`` columns: the one instruction whose operands are that many registers.

    d (64, tokens) += a (64, 16) · b (16, tokens): a in registers as for m16n8k16, 16 rows a warp; b in shared memory.
    """
    sums, kind = tokens // 2, "bf16" if bf16 else "f16"
    d = ", ".join(f"%{i}" for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void warpgroup_multiply_add(float (&d)[{sums}], const u32 (&a)[4], u64 b) {{
    asm volatile("{{\\n\\t.reg .pred yes;\\n\\tsetp.eq.u32 yes, 0, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} "
                 "{{{d}}}, {{{a}}}, %{sums + 4}, yes, 1, 1, 0;\\n\\t}}"
                 : {outputs} : {inputs}, "l"(b));
}}
"""
