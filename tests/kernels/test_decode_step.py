"""The operations of a decoding step: as torch ops, and their kernels against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from canopyq.kernels import decode_step
from canopyq.kernels.cuda import decode_step as decode_step_cuda
from canopyq.kernels.cuda import nvrtc

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def heads(batch: int, q: int, kv: int, length: int, d: int, device: str, dtype: torch.dtype) -> tuple:
    """qkv, cosines, sines, position, keys, values of one token that stands in the middle of the cache."""
    angles = normal(length, d // 2, device=device)
    position = torch.tensor([length // 2], device=device)
    cache = [normal(batch, kv, length, d, device=device, dtype=dtype) for _ in range(2)]
    return normal(batch, (q + 2 * kv) * d, device=device, dtype=dtype), angles.cos(), angles.sin(), position, *cache


def test_they_are_torch_ops_that_compile() -> None:
    torch.library.opcheck(decode_step.add_rms_norm, (normal(2, 64), normal(2, 64), normal(64), 1e-5))
    torch.library.opcheck(decode_step.add_rms_norm, (normal(2, 64), None, normal(64), 1e-5))
    torch.library.opcheck(decode_step.silu_mul, (normal(2, 64),))
    arguments = heads(2, 4, 2, 9, 64, "cpu", torch.float32)
    torch.library.opcheck(decode_step.rotate_and_append, arguments)
    torch.library.opcheck(decode_step.attend, (normal(2, 4, 64), *arguments[4:], arguments[3]))


def test_attention_is_that_of_torch_over_the_tokens_so_far() -> None:
    q, (keys, values), position = normal(2, 4, 1, 64), (normal(2, 2, 9, 64), normal(2, 2, 9, 64) * 2), torch.tensor([5])
    keys[:, :, 6:] = float("nan")  # not written yet
    values[:, :, 6:] = 1e30
    expected = F.scaled_dot_product_attention(q, keys[:, :, :6], values[:, :, :6], enable_gqa=True)
    found = decode_step.attend(q.squeeze(2), keys, values, position)
    torch.testing.assert_close(found, expected.reshape(2, 256))


ATTEND = [{"HEAD_DIM": d, "GROUP_HEADS": g} for d in (64, 128) for g in (1, 2, 4, 8)]
VARIANTS = [{"WIDTH": 256}, {"WIDTH": 4096}, {"WIDTH": 8192}, *ATTEND]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_every_kernel_compiles_without_spilling(arch: str) -> None:
    for constants in VARIANTS:
        cluster = {"CLUSTER": 1 if arch == "sm_80" else 8} if "HEAD_DIM" in constants else {}
        found = nvrtc.compile("decode_step.cu", {"ELEMENT_BF16": 1} | constants | cluster, arch)
        assert found.spilled == 0 and not found.warnings, constants


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [("cpu", torch.bfloat16, 128, "NVIDIA GPUs")],
)
def test_where_the_kernels_do_not_run_is_said(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in decode_step_cuda.unsupported_reason(torch.device(device), dtype, 4096, head_dim)


class TestOnTheGpu:
    pytestmark = gpu
    both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

    @both
    @pytest.mark.parametrize("rows", [1, 5])
    @pytest.mark.parametrize("width", [256, 4096, 5120, 8192])
    @pytest.mark.parametrize("with_change", [True, False])
    def test_norm(self, dtype: torch.dtype, rows: int, width: int, with_change: bool) -> None:
        x = normal(rows, width, device="cuda", dtype=dtype)
        change = normal(rows, width, device="cuda", dtype=dtype).flip(0) if with_change else None
        weight, mine = normal(width, device="cuda", dtype=dtype), x.clone()
        found = decode_step.add_rms_norm(mine, change, weight, 1e-5)
        assert torch.equal(mine, x if change is None else x + change)
        wide = mine.double()
        expected = weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        close(found, expected, dtype)

    @both
    def test_gate(self, dtype: torch.dtype) -> None:
        x = normal(3, 2 * 11008, device="cuda", dtype=dtype)
        gate, up = x.double().chunk(2, dim=-1)
        close(decode_step.silu_mul(x), F.silu(gate) * up, dtype)

    @both
    @pytest.mark.parametrize(("q", "kv"), [(4, 4), (8, 2), (32, 2), (14, 2)])
    @pytest.mark.parametrize("d", [64, 128])
    @pytest.mark.parametrize("length", [1, 33, 1000])
    def test_rotation_and_attention(self, dtype: torch.dtype, q: int, kv: int, d: int, length: int) -> None:
        qkv, cos, sin, position, keys, values = heads(3, q, kv, length, d, "cuda", dtype)
        wide_keys, wide_values = keys.double(), values.double()
        wide = decode_step.rotate_and_append_reference(
            qkv.double(), cos.double(), sin.double(), position, wide_keys, wide_values
        )
        turned = decode_step.rotate_and_append(qkv, cos, sin, position, keys, values)
        close(turned, wide, dtype)
        close(keys, wide_keys, dtype)
        assert torch.equal(values.double(), wide_values)
        seen = int(position) + 1
        keys[:, :, seen:] = float("nan")
        expected = F.scaled_dot_product_attention(
            turned.double().unsqueeze(2), keys[:, :, :seen].double(), values[:, :, :seen].double(), enable_gqa=True
        )
        close(decode_step.attend(turned, keys, values, position), expected.reshape(3, q * d), dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4), f"relative error {error:.2g}"
