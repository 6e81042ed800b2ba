"""Every kernel of the table of tiles, and of other weights and architectures, compiles without spilling registers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from canopyq.kernels.cuda import nvrtc, quantize_rows, selection, tiles, w8a8_launch, weight_only_launch
from canopyq.kernels.cuda.tiles import DecodeTile, StreamKTile, WarpgroupTile, Weight

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
BF16, FP16 = torch.bfloat16, torch.float16
Job = tuple[str, dict, str, str]


def decode(tile: DecodeTile, arch: str, bits: int, group: int, asymmetric: bool, x: torch.dtype) -> Job:
    constants = weight_only_launch.constants(bits, group, asymmetric, x, BF16)
    return "decode.cu", constants | weight_only_launch.decode_constants(tile), arch, ""


def warpgroup(tile: WarpgroupTile, bits: int, group: int, asymmetric: bool, x: torch.dtype) -> Job:
    constants = weight_only_launch.constants(bits, group, asymmetric, x, BF16)
    constants |= weight_only_launch.warpgroup_constants(tile)
    return "warpgroup.cu", constants, "sm_90a", tiles.product_source(tile.tokens, x == BF16)


def compile_all(jobs: list[Job]) -> dict[str, nvrtc.Compiled]:
    """NVRTC runs without Python's lock, so threads suffice."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda job: nvrtc.compile(*job[:3], extra=job[3]), jobs)
        return {f"{job[0]} {job[1]} {job[2]}": one for job, one in zip(jobs, found, strict=True)}


def check(found: dict[str, nvrtc.Compiled]) -> None:
    wrong = {
        name: (one.registers, one.spilled, one.warnings) for name, one in found.items() if one.spilled or one.warnings
    }
    assert not wrong, wrong


def stream_k(tile: StreamKTile, bits: int, group: int, asymmetric: bool, x: torch.dtype) -> Job:
    constants = weight_only_launch.constants(bits, group, asymmetric, x, BF16)
    constants |= weight_only_launch.stream_k_constants(tile)
    return "stream_k.cu", constants, "sm_90a", tiles.product_source(tile.tokens, x == BF16)


def table(kind: type, *matters: str) -> list:
    """One tile of the table for each combination of these constants; others hardly change the code."""
    found = [tile for tile, _ in selection.palette("w4a16") if isinstance(tile, kind)]
    return list({tuple(getattr(tile, name) for name in matters): tile for tile in found}.values())


@pytest.mark.slow
def test_every_kind_of_tile_in_the_table() -> None:
    """All but the lengths of rings and clusters."""
    jobs = [decode(tile, "sm_90a", 4, 128, False, BF16) for tile in table(DecodeTile, "columns", "blocks", "warps")]
    of_warpgroups = table(WarpgroupTile, "tokens", "m_tiles", "warpgroups_m", "warpgroups_k", "batch", "per_sm")
    jobs += [warpgroup(tile, 4, 128, False, BF16) for tile in of_warpgroups]
    shared_out = table(StreamKTile, "tokens", "m_tiles", "warpgroups", "per_sm")
    jobs += [stream_k(tile, 4, 128, False, BF16) for tile in shared_out]
    assert len(jobs) > 20
    check(compile_all(jobs))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_the_decode_kernel_for_every_weight(arch: str) -> None:
    """Two rows of tokens are what older GPUs take; the groups and zero points change the inner loop."""
    weights = [
        (4, 128, False, BF16),
        (4, 32, True, FP16),
        (8, 0, False, BF16),
        (8, 64, True, FP16),
        (4, 256, True, BF16),
    ]
    columns = (1, 2) if arch == "sm_90a" else (2,)
    check(compile_all([decode(DecodeTile(n, 1, 8, 4, 1, 2), arch, *w) for w in weights for n in columns]))


@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_the_warpgroup_kernel_for_every_weight(tokens: int) -> None:
    tile = WarpgroupTile(tokens, 1, 2, 1, 4, 2, 1, 1)
    weights = [(4, 32, True, FP16), (8, 0, False, BF16)]
    check(compile_all([warpgroup(tile, *weight) for weight in weights]))


def test_the_stream_k_kernel_for_every_weight() -> None:
    """Also in float16, for groups smaller than a batch of products, and with zero points."""
    jobs = []
    for bits, group, asymmetric, x in (
        (4, 32, True, FP16),
        (8, 0, False, BF16),
        (4, 0, True, FP16),
        (8, 64, True, BF16),
    ):
        weight = Weight(4096, 64, 32, 32 * 128 // group if group else 1, bits, group, asymmetric)
        for tile in table(StreamKTile, "tokens", "m_tiles", "warpgroups"):
            jobs.append(stream_k(tile.fitted(weight), bits, group, asymmetric, x))
    check(compile_all(jobs))


def test_dequantizing() -> None:
    jobs = []
    for arch, bits, out in (("sm_80", 4, BF16), ("sm_90a", 8, FP16), ("sm_100", 4, torch.float32)):
        constants = weight_only_launch.constants(bits, 128, True, out, BF16) | {"WIDE": int(out == torch.float32)}
        jobs.append(("dequantize.cu", constants, arch, ""))
    check(compile_all(jobs))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_what_needs_no_hopper_instructions_compiles_for_every_gpu(arch: str) -> None:
    dequantize = weight_only_launch.constants(4, 128, False, BF16, BF16) | {"WIDE": 0}
    step = {"ELEMENT_BF16": 1, "HEAD_DIM": 128, "GROUP_HEADS": 4, "CLUSTER": 1 if arch.startswith("sm_8") else 8}
    jobs = [
        decode(DecodeTile(2, 1, 8, 4, 1, 2), arch, 8, 0, False, FP16),
        ("dequantize.cu", dequantize, arch, ""),
        ("skinny.cu", w8a8_launch.skinny_constants("int8", 2, BF16, BF16), arch, ""),
        ("quantize_rows.cu", quantize_rows.constants("int8", BF16, 0, 256, 4), arch, ""),
        ("decode_step.cu", step, arch, ""),
        ("append.cu", {"CODE": 4, "HEAD_DIM": 128, "ELEMENT_BF16": 1}, arch, ""),
    ]
    assert all(found.cubin for found in compile_all(jobs).values())
