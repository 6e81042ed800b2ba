"""How the CUDA kernels cut a product into blocks: the constants of a kernel, and which ones suit a shape.

`tiles.json` holds the fastest kernel and its tile for some shapes and numbers of rows, measured on an H200; where
``us`` is null the tile was taken over from its neighbours. ``benchmarks/tune_linear.py`` measures anew. Other shapes
take the nearest one's. Beyond the largest number of rows a library is the fastest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path

SHARED = 227 * 1024  # bytes of shared memory that a multiprocessor of compute capability 9.0 gives to its blocks
RESERVED = 1024  # of them for each block
TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Weight:
    """What both kernels need to know of a weight.

    Attributes:
        n: rows.
        slabs, steps: of 64 rows and of 128 columns.
        groups: scales to a row.
        bits: of a code.
        group: columns that share a scale; 0 for all of them.
        asymmetric: whether there are zero points.
    """

    n: int
    slabs: int
    steps: int
    groups: int
    bits: int
    group: int
    asymmetric: bool

    @property
    def recipe(self) -> str:
        """As the table calls it."""
        return f"w{self.bits}a16"

    @property
    def blocks(self) -> int:
        """Of 16 rows, without those of the padding."""
        return -(-self.n // 16)

    @property
    def step_bytes(self) -> int:
        """Of 16 rows and a step: codes, scales, zero points."""
        groups = max(1, 128 // self.group) if self.group else 1
        return 16 * 128 * self.bits // 8 + 32 * groups * (1 + self.asymmetric)


@dataclass(frozen=True)
class DecodeTile:
    """Constants of ``decode.cu``, and how many blocks there are to a multiprocessor (at most: as many as fit)."""

    columns: int  # 8 rows of x each
    blocks: int  # of 16 rows of W, taken together
    warps: int
    depth: int
    cluster: int
    per_sm: int

    def shared(self, weight: Weight, rows: int) -> int:
        """Bytes of shared memory for so many rows of x."""
        sums = 2 * (self.warps + (self.cluster > 1)) * self.blocks * self.columns * 8 * 20 * 4
        ring = self.warps * self.depth * self.blocks * weight.step_bytes
        return sums + ring + rows * (-(-weight.steps // self.cluster) * 128 + 8) * 2

    def fitted(self, weight: Weight, rows: int, limit: int) -> DecodeTile | None:
        """This tile with as deep a ring as fits, or None if even the shortest does not."""
        for depth in range(self.depth, 1, -1):
            tile = replace(self, depth=depth)
            if (shared := tile.shared(weight, rows)) <= limit:
                return replace(tile, per_sm=min(self.per_sm, SHARED // (shared + RESERVED)) or 1)
        return None


@dataclass(frozen=True)
class WarpgroupTile:
    """Constants of ``warpgroup.cu``, named as there."""

    tokens: int
    tall: int
    beside: int
    deep: int
    stages: int
    batch: int
    cluster: int
    per_sm: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.tall * self.beside

    @property
    def threads(self) -> int:
        return self.beside * self.deep * 128 + (128 if self.tall * self.tokens > 192 else 32)

    def stage_bytes(self, weight: Weight) -> int:
        stage = 2 * self.tokens * 128 + self.rows // 16 * weight.step_bytes
        return -(-stage // 1024) * 1024

    def shared(self, weight: Weight) -> int:
        """Bytes of shared memory: the ring, whose memory the sums take over, and what aligning it may cost."""
        return max(self.stages * self.stage_bytes(weight), self.tokens * (self.rows + 4) * 4) + 1024

    def fitted(self, weight: Weight) -> WarpgroupTile:
        """This tile with as many stages as fit, and no more blocks to a cluster than there are steps."""
        most = (SHARED // self.per_sm - RESERVED - 1024 - 512) // self.stage_bytes(weight)
        # Warpgroups take turns, and a stage must always be the same one's: a barrier tells a phase only from the next,
        # so that one which is a phase ahead of another would take what is still to come for what has been.
        stages = min(self.stages, most) // self.deep * self.deep
        tile = replace(self, stages=stages, cluster=min(self.cluster, weight.steps))
        # A warpgroup frees a stage when it has got its next one, so there must be more stages than take turns.
        if tile.stages > tile.deep:
            return tile
        return (
            replace(self, per_sm=self.per_sm - 1).fitted(weight)
            if self.per_sm > 1
            else replace(self, deep=1).fitted(weight)
        )


@cache
def measured() -> list[dict]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["tiles"]


@cache
def nearest(recipe: str, n: int, k: int) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Kernel and constants by number of rows, of the measured shape that is nearest.

    Args:
        recipe: w4a16, w8a16, w8a8 or fp8.
    """

    def distance(row: dict) -> float:
        return abs(log(row["n"] / n)) + abs(log(row["k"] / k))

    rows = [row for row in measured() if row["recipe"] == recipe]
    least = min(map(distance, rows))
    return {row["rows"]: (row["kernel"], tuple(row["tile"])) for row in rows if distance(row) == least}


@cache
def choose(weight: Weight, kernel: str, rows: int) -> DecodeTile | WarpgroupTile | None:
    """The tile with which a kernel takes so many rows, ``"decode"`` or ``"warpgroup"``; None if another kernel should.

    It is the one measured for the next larger number of rows for which this kernel was the fastest.
    """
    best = nearest(weight.recipe, weight.n, weight.steps * 128)
    fits = [count for count, (name, _) in best.items() if name == kernel and count >= rows]
    if not fits:
        return None
    constants = best[min(fits)][1]
    if kernel == "decode":
        return DecodeTile(*constants).fitted(weight, rows, SHARED)
    return WarpgroupTile(*constants).fitted(weight)


def most_rows(weight: Weight, kernel: str) -> int:
    """Up to how many rows a kernel is the fastest and fits; 0 if it never is."""
    counts = [
        count for count, (name, _) in nearest(weight.recipe, weight.n, weight.steps * 128).items() if name == kernel
    ]
    return max((count for count in counts if choose(weight, kernel, count)), default=0)


def product_source(tokens: int, bf16: bool) -> str:
    """``warpgroup_multiply_add`` for ``tokens`` columns: the one instruction whose operands are that many registers.

    d (64, tokens) = a (64, 16) · b (16, tokens), added to d if asked to; a in registers as for m16n8k16, 16 rows
    a warp; b in shared memory.
    """
    sums, kind = tokens // 2, "bf16" if bf16 else "f16"
    d = ", ".join(f"%{i}" for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void warpgroup_multiply_add(float (&d)[{sums}], const u32 (&a)[4], u64 b, bool add) {{
    asm volatile("{{\\n\\t.reg .pred add;\\n\\tsetp.ne.u32 add, %{sums + 5}, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} "
                 "{{{d}}}, {{{a}}}, %{sums + 4}, add, 1, 1, 0;\\n\\t}}"
                 : {outputs} : {inputs}, "l"(b), "r"(u32(add)));
}}
"""


def codes_product_source(integers: bool, tokens: int) -> str:
    """``codes_multiply_add``: d (64, tokens) = w (64, 32) · x (tokens, 32)ᵀ, added to d if asked to.

    INT8 with sums in int32, or FP8. w and x lie in shared memory.
    """
    sums = tokens // 2
    number, letter = ("int", "r") if integers else ("float", "f")
    kind, signs = ("s32.s8.s8", "") if integers else ("f32.e4m3.e4m3", ", 1, 1")
    d = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+{letter}"(d[{i}])' for i in range(sums))
    return f"""
__device__ __forceinline__ void codes_multiply_add({number} (&d)[{sums}], u64 w, u64 x, bool add) {{
    asm volatile("{{\\n\\t.reg .pred add;\\n\\tsetp.ne.u32 add, %{sums + 2}, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{tokens}k32.{kind} "
                 "{{{d}}}, %{sums}, %{sums + 1}, add{signs};\\n\\t}}"
                 : {outputs} : "l"(w), "l"(x), "r"(u32(add)));
}}
"""
