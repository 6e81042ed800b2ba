"""New tokens of a KV cache of fixed size, into a ring and block by block to codes: `append`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch
from canopyq.kernels.cuda.attention import code_constant, pointers
from canopyq.tensor.formats import CacheFormat, get_cache_format

if TYPE_CHECKING:
    from canopyq.kv_cache.quantized_kv import KVView


def append(keys: Tensor, values: Tensor, view: KVView) -> None:
    """Write tokens where `attention.attend` reads them in the same pass.

    Blocks that are followed by ``view.residual_length`` tokens become codes, once and for good; this pass still reads
    them from the ring. NaN and infinity are not looked for. Tokens for which there is no room are not written.

    Args:
        keys, values: (B, kv_heads, n, D) in the dtype of the view's recent tokens, n at most the length of its ring.
        view: of a cache of fixed size on the same GPU, its tensors contiguous.

    Raises:
        CanopyError: for more tokens than the ring takes.
    """
    if keys.shape[2] > view.keys.shape[2]:
        raise CanopyError(f"{keys.shape[2]} tokens at a time are more than the ring of {view.keys.shape[2]} takes")
    append_codes(keys, values, view.tensors, view.before, view.quantized_keys.format.name, view.residual_length)


@torch.library.custom_op("canopyq::append", mutates_args=("cache",), device_types="cuda")
def append_codes(
    keys: Tensor, values: Tensor, cache: list[Tensor], before: Tensor, format: str, residual_length: int
) -> None:
    """`append` as an operator. ``cache``: the tensors of a `KVView`."""
    batch, heads, count, head_dim = keys.shape
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    *codes, recent_keys, recent_values = pointers(cache, get_cache_format(format))
    capacity, ring = cache[0].shape[2], cache[-1].shape[2]
    run = _function(get_cache_format(format), head_dim, keys.dtype, keys.device.index)
    run(
        (heads, batch, 2),
        keys.data_ptr(), values.data_ptr(), recent_keys, recent_values, *codes, before.data_ptr(),
        count, capacity, ring, residual_length, *keys.stride()[:3], *values.stride()[:3],
    )  # fmt: skip


@append_codes.register_fake
def _(*_: object) -> None:
    return None


@cache
def _function(format: CacheFormat, head_dim: int, dtype: torch.dtype, device: int) -> launch.Function:
    defined = {"CODE": code_constant(format), "HEAD_DIM": head_dim, "ELEMENT_BF16": int(dtype == torch.bfloat16)}
    return launch.Function("append.cu", "append", defined, "P" * 11 + "i" * 10, device, 128)
