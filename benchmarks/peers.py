"""Other people's kernels for linear layers with 4- and 8-bit weights, as far as they are installed.

Every maker takes codes (N, K), unsigned and symmetric around the middle, and scales (N, groups), and returns a function
x (M, K) -> (M, N). `available` says which of them there are and why not the others. vLLM's kernels may also be loaded
from a folder that holds ``_C.abi3.so`` and ``_C_stable_libtorch.abi3.so``, named by CANOPYQ_VLLM. torchao's INT4 layers
run tinygemm, with scales of their own; `decode.py` has them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from canopyq.tensor import packing

BF16, FP16 = torch.bfloat16, torch.float16
VARIABLE = "CANOPYQ_VLLM"
# vLLM names a scalar type by a number: unsigned with 4 bits and bias 8, unsigned with 8 bits and bias 128.
SCALAR_TYPE = {4: 1125899907892224, 8: 1125899923621888}

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One kernel: ``bits`` of its weights, the dtype of x, and up to how many rows it is worth timing."""

    name: str
    bits: int
    make: Callable[[Tensor, Tensor], Product]
    dtype: torch.dtype = BF16
    max_rows: int = 1 << 30
    needs: str = "vllm"


def _words(codes: Tensor, bits: int) -> Tensor:
    """(N, K) codes -> (K · bits / 32, N) words along K, as GPTQ has them."""
    return packing.pack_unchecked(codes, bits, 0).t().contiguous()


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int32, device="cuda")


def _marlin(bits: int) -> Callable[[Tensor, Tensor], Product]:
    def make(codes: Tensor, scale: Tensor) -> Product:
        (n, k), ops = codes.shape, torch.ops._C
        weight = ops.gptq_marlin_repack(_words(codes, bits), _none(), k, n, bits, False)
        rows = scale.t().to(BF16).contiguous()
        if len(rows) > 1:  # groups: 64 columns as an 8 by 8 square, transposed
            rows = rows.view(-1, 8, 8).transpose(1, 2).reshape(-1, n).contiguous()
        else:
            order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
            rows = rows.view(-1, 32)[:, order].reshape(-1, n).contiguous()
        space = torch.zeros(132 * 16, dtype=torch.int32, device="cuda")
        kind = SCALAR_TYPE[bits]

        def run(x: Tensor) -> Tensor:
            return ops.marlin_gemm(x, None, weight, None, rows, None, None, None, None, None, space, kind,
                                   len(x), n, k, True, False, True, False)  # fmt: skip

        return run

    return make


def _machete(bits: int) -> Callable[[Tensor, Tensor], Product]:
    def make(codes: Tensor, scale: Tensor) -> Product:
        ops, kind = torch.ops._C, SCALAR_TYPE[bits]
        words = _words(codes, bits).t().contiguous().t()
        weight = ops.machete_prepack_B(words, BF16, kind, BF16)
        rows, group = scale.t().to(BF16).contiguous(), codes.shape[1] // scale.shape[1]
        return lambda x: ops.machete_mm(x, weight, kind, None, rows, None, group, None, None, None)

    return make


def _exllama(codes: Tensor, scale: Tensor) -> Product:
    n, ops = len(codes), torch.ops._C
    weight = _words(codes, 4).clone()
    ops.gptq_shuffle(weight, _none(), 4)
    zeros = torch.full((scale.shape[1], n // 8), -0x77777778, dtype=torch.int32, device="cuda")  # 8 in every nibble
    rows = scale.t().to(FP16).contiguous()
    return lambda x: ops.gptq_gemm(x, weight, zeros, rows, _none(), True, True, 4)


def _tinygemm(codes: Tensor, scale: Tensor) -> Product:
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    weight = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    rows = scale.t().to(BF16)
    both = torch.stack([rows, torch.zeros_like(rows)], -1).contiguous()
    group = codes.shape[1] // scale.shape[1]
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, group, both)


PEERS = (
    Peer("tinygemm", 4, _tinygemm, max_rows=64, needs="torch"),
    Peer("Marlin (vLLM)", 4, _marlin(4)),
    Peer("Machete (vLLM)", 4, _machete(4)),
    Peer("ExLlamaV2 (vLLM)", 4, _exllama, dtype=FP16, max_rows=32),
    Peer("Marlin (vLLM)", 8, _marlin(8)),
    Peer("Machete (vLLM)", 8, _machete(8)),
)


def load_vllm() -> str | None:
    """Register vLLM's operators; why that cannot be, or None."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        if importlib.util.find_spec("vllm") is None:
            return f"vllm is not installed, and {VARIABLE} names no folder with its libraries"
        folder = str(Path(importlib.util.find_spec("vllm").origin).parent)
    try:
        for name in ("_C_stable_libtorch.abi3.so", "_C.abi3.so"):
            torch.ops.load_library(str(Path(folder) / name))
    except OSError as error:
        return f"vllm's libraries do not load: {error}"
    return None


def available(bits: int) -> tuple[list[Peer], dict[str, str]]:
    """The peers for weights of so many bits, and why each other one is absent."""
    reasons = {"torch": None, "vllm": load_vllm()}
    wanted = [peer for peer in PEERS if peer.bits == bits]
    absent = {peer.name: reason for peer in wanted if (reason := reasons[peer.needs])}
    return [peer for peer in wanted if peer.name not in absent], absent
