"""Attention on codes against attention in float64 on what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from canopyq.kernels.cpu_attention import attend, unsupported_reason
from canopyq.kv_cache import quantized_kv
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import CACHE_FORMATS, get_cache_format


def exact(query: Tensor, view: KVView, scaling: float, mask: Tensor | None) -> Tensor:
    def whole(quantized: QuantizedKV, recent: Tensor) -> Tensor:
        old = quantized.dequantize(torch.empty(*quantized.codes.shape[:3], recent.shape[3]))
        return torch.cat([old, recent], 2).double().repeat_interleave(query.shape[1] // recent.shape[1], 1)

    k, v = whole(view.quantized_keys, view.keys), whole(view.quantized_values, view.values)
    n, total = query.shape[2], k.shape[2]
    if mask is None:
        mask = torch.arange(total) <= (total - n + torch.arange(n))[:, None]
    scores = (query.double() @ k.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(CACHE_FORMATS)), dim=st.sampled_from([16, 64, 128]), blocks=st.integers(1, 4),
    recent=st.integers(1, 90), n=st.integers(1, 4), shared=st.sampled_from([1, 2, 4]), masked=st.booleans(),
    tile=st.sampled_from([1, 2**18]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_attention_on_what_the_codes_stand_for(name, dim, blocks, recent, n, shared, masked, tile, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = min(n, recent)
    x = torch.randn(2, 2, 2, 64 * blocks + recent, dim, generator=generator) + torch.randn(dim, generator=generator) * 3
    query = torch.randn(2, 2 * shared, n, dim, generator=generator)
    old, new = x[:, :, :, : 64 * blocks], x[:, :, :, 64 * blocks :]
    keys = QuantizedKV.quantize(old[0], get_cache_format(name), "channel", min(64, dim))
    values = QuantizedKV.quantize(old[1], get_cache_format(name), "token", min(64, dim))
    mask = None
    if masked:
        mask = torch.rand(2, 1, n, x.shape[3], generator=generator) > 0.3
        mask[..., -1] = True
    arguments = (query, KVView(keys, values, new[0], new[1]), dim**-0.5, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_kv, "TILE", tile)
        got = attend(*arguments)
    torch.testing.assert_close(got.double(), exact(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "key_granularity", "device", "words"),
    [
        (torch.float32, "channel", "meta", "it is for the CPU"),
        (torch.bfloat16, "channel", "cpu", "these queries are torch.bfloat16"),
        (torch.float32, "token", "cpu", "one per token"),
    ],
)
def test_what_it_does_not_read(dtype: torch.dtype, key_granularity: str, device: str, words: str) -> None:
    assert words in unsupported_reason(dtype, key_granularity, torch.device(device))
    assert unsupported_reason(torch.float32, "channel", torch.device("cpu")) is None
