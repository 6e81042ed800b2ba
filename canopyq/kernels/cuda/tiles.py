"""How the CUDA kernels cut a product into blocks: the constants that each kernel is compiled for, and what fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

SHARED = 227 * 1024  # bytes of shared memory that a multiprocessor of compute capability 9.0 gives to its blocks
RESERVED = 1024  # of them for each block
STEP = 128  # columns that are copied at a time


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

    KERNEL: ClassVar[str] = "decode"

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

    KERNEL: ClassVar[str] = "warpgroup"

    tokens: int
    m_tiles: int
    warpgroups_m: int
    warpgroups_k: int
    stages: int
    batch: int
    cluster: int
    per_sm: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.m_tiles * self.warpgroups_m

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return self.warpgroups_m * self.warpgroups_k

    @property
    def threads(self) -> int:
        return self.groups * 128 + (128 if self.m_tiles * self.tokens > 192 and self.groups > 1 else 64)

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
        stages = min(self.stages, most) // self.warpgroups_k * self.warpgroups_k
        tile = replace(self, stages=stages, cluster=min(self.cluster, weight.steps))
        # A warpgroup frees a stage when it has got its next one, so there must be more stages than take turns.
        if tile.stages > tile.warpgroups_k:
            return tile
        return (
            replace(self, per_sm=self.per_sm - 1).fitted(weight)
            if self.per_sm > 1
            else replace(self, warpgroups_k=1).fitted(weight)
        )


@dataclass(frozen=True)
class StreamKTile:
    """Constants of ``stream_k.cu``, named as there, and into how many parts a tile is cut; 0 for one a step."""

    KERNEL: ClassVar[str] = "stream_k"
    BOX_TOKENS: ClassVar[int] = 32  # rows of x whose results are stored together

    tokens: int
    m_tiles: int
    warpgroups: int
    stages: int
    batch: int
    cluster: int
    per_sm: int
    parts: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.m_tiles * self.warpgroups

    @property
    def threads(self) -> int:
        return self.groups * 128 + (128 if self.m_tiles * self.tokens > 192 and self.groups > 1 else 64)

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return self.warpgroups

    def shared(self, weight: Weight) -> int:
        """Bytes of shared memory: rings of x and W, results on their way out, and what aligning them may cost."""
        step = weight.step_bytes if weight.group else 16 * 128 * weight.bits // 8  # scales of rows are not copied
        w = (self.stages + 1) // 2 * self.rows // 16 * step
        return self.stages * self.tokens * 128 + self.warpgroups * 2 * self.BOX_TOKENS * 128 + w + 1024

    def fitted(self, weight: Weight) -> StreamKTile | None:
        """This tile with as many stages as fit, or None if three do not."""
        limit = SHARED // self.per_sm - RESERVED - 512
        fits = [stages for stages in range(3, self.stages + 1) if replace(self, stages=stages).shared(weight) <= limit]
        return replace(self, stages=fits[-1]) if fits else None

    def grid(self, rows: int, weight: Weight, multiprocessors: int) -> StreamKGrid:
        """How the work on so many rows is shared out."""
        across = -(-rows // self.tokens)
        count = across * -(-weight.n // (self.rows * self.cluster))
        parts = min(self.parts or weight.steps, weight.steps)
        clusters = min(multiprocessors * self.per_sm // self.cluster, count * parts)
        turns, rest = divmod(count, clusters)
        if rest and parts > 1:  # between one and two tiles to a cluster are shared
            turns = max(0, turns - 1)
        return StreamKGrid(clusters, across, turns * clusters, count - turns * clusters, parts)


@dataclass(frozen=True)
class StreamKGrid:
    """How a stream-K product is shared out.

    Attributes:
        clusters: of blocks.
        across: tiles to cover the rows of x.
        whole, shared: tiles, of all blocks of a cluster together, that a cluster takes alone, and that they share.
        parts: of the columns of a shared tile.
    """

    clusters: int
    across: int
    whole: int
    shared: int
    parts: int


@dataclass(frozen=True)
class CodesTile:
    """Constants of ``w8a8_wgmma.cu``, named as there."""

    KERNEL: ClassVar[str] = "w8a8_wgmma"

    tokens: int
    m_tiles: int
    warpgroups: int
    stages: int
    cluster: int
    per_sm: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.m_tiles * self.warpgroups

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, whose memory the sums take over, and what aligning it may cost."""
        return max(self.stages * (self.tokens + self.rows) * STEP, self.tokens * (self.rows + 4) * 4) + 1024

    def fitted(self, k: int) -> CodesTile:
        """This tile with as many stages as fit, and no more blocks that split the columns than there are steps."""
        most = (SHARED // self.per_sm - RESERVED - 1024 - 512) // ((self.tokens + self.rows) * STEP)
        return replace(self, stages=min(self.stages, most), cluster=min(self.cluster, -(-k // STEP)))

    def blocks(self, m: int, n: int) -> tuple[int, int, int]:
        """The grid: tiles of tokens, tiles of W, blocks of a cluster."""
        return -(-m // self.tokens), -(-n // self.rows), self.cluster


@dataclass(frozen=True)
class W4A8Tile:
    """Constants of ``w4a8.cu``, named as there."""

    KERNEL: ClassVar[str] = "w4a8"

    tokens: int
    warpgroups: int
    stages: int
    cluster: int
    per_sm: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + (128 if self.tokens > 64 and self.warpgroups > 1 else 64)

    def stage_bytes(self, weight: Weight) -> int:
        return -(-(self.tokens * STEP + self.rows // 16 * weight.step_bytes) // 1024) * 1024

    def shared(self, weight: Weight) -> int:
        """Bytes of shared memory: the ring, whose memory the sums take over, and what aligning it may cost."""
        return max(self.stages * self.stage_bytes(weight), self.tokens * (self.rows + 4) * 4) + 1024

    def fitted(self, weight: Weight) -> W4A8Tile:
        """This tile with as many stages as fit, and no more blocks that split the columns than there are steps."""
        most = (SHARED // self.per_sm - RESERVED - 1024 - 512) // self.stage_bytes(weight)
        return replace(self, stages=min(self.stages, most), cluster=min(self.cluster, weight.steps))


@dataclass(frozen=True)
class WideTile:
    """Constants of ``wide_int8.cu``, named as there."""

    KERNEL: ClassVar[str] = "wide_int8"
    WARPGROUPS: ClassVar[int] = 2
    BOX_TOKENS: ClassVar[int] = 64  # rows of x whose results are stored together

    tokens: int
    m_tiles: int
    stages: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.m_tiles * self.WARPGROUPS

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, the results on their way out, and what aligning them may cost."""
        return (self.stages * (self.tokens + self.rows)) * STEP + self.WARPGROUPS * 2 * self.BOX_TOKENS * 64 * 2 + 1024

    @property
    def threads(self) -> int:
        return self.WARPGROUPS * 128 + 32


@dataclass(frozen=True)
class SkinnyTile:
    """``skinny.cu`` for few rows of 8-bit codes, which has nothing to choose."""

    KERNEL: ClassVar[str] = "skinny"
    MAX_ROWS: ClassVar[int] = 16  # at most


Tile = DecodeTile | WarpgroupTile | StreamKTile | CodesTile | W4A8Tile | WideTile | SkinnyTile
KINDS = {
    kind.KERNEL: kind for kind in (DecodeTile, WarpgroupTile, StreamKTile, CodesTile, W4A8Tile, WideTile, SkinnyTile)
}


def as_dict(tile: Tile) -> dict[str, int | str]:
    """The kernel and its constants by name, as tables have them."""
    return {"kernel": tile.KERNEL, **asdict(tile)}


def of_dict(said: dict[str, int | str]) -> Tile:
    """The inverse of `as_dict`."""
    return KINDS[said["kernel"]](**{name: value for name, value in said.items() if name != "kernel"})


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


def w4a8_product_source(tokens: int) -> str:
    """``warpgroup_multiply_add`` as `product_source` has it, of int8: d (64, tokens) = a (64, 32) · b (32, tokens) in
    int32, a in registers as for m16n8k32."""
    sums = tokens // 2
    d = ", ".join(f"%{i}" for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void warpgroup_multiply_add(int (&d)[{sums}], const u32 (&a)[4], u64 b, bool add) {{
    asm volatile("{{\\n\\t.reg .pred add;\\n\\tsetp.ne.u32 add, %{sums + 5}, 0;\\n\\t"
                 "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 "
                 "{{{d}}}, {{{a}}}, %{sums + 4}, add;\\n\\t}}"
                 : {outputs} : {inputs}, "l"(b), "r"(u32(add)));
}}
"""
