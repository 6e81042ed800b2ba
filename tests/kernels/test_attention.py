"""Attention on codes: the kernel held to float64 on a GPU; that variants compile, and what is refused, anywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import attention, nvrtc
from canopyq.tensor.kv_codes import QuantizedStates, get_cache_format

BF16, FP16 = torch.bfloat16, torch.float16
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]


@dataclasses.dataclass
class Case:
    """A cache of ``quantized`` tokens as codes and ``recent`` ones as they are, and the queries of the newest ``n``."""

    format: str = "kv8"
    batch: int = 1
    kv_heads: int = 2
    group: int = 4
    n: int = 1
    head_dim: int = 128
    quantized: int = 320
    recent: int = 7
    dtype: torch.dtype = FP16
    starts: tuple[int, ...] | None = None

    def make(self, device: str = "cuda") -> tuple[list, Tensor, Tensor, Tensor]:
        """The arguments of `attend`, and float64 queries, keys and values that its codes stand for."""
        random = torch.Generator().manual_seed(self.quantized + self.recent + self.group)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        b, h, tokens, d = self.batch, self.kv_heads, self.quantized + self.recent, self.head_dim
        q = normal(b, h * self.group, self.n, d).to(self.dtype)
        k = (normal(b, h, tokens, d) + 2 * normal(b, h, 1, d)).to(self.dtype)
        v = (0.7 * normal(b, h, tokens, d) + 0.2).to(self.dtype)
        states = []
        for x, per in ((k, "channel"), (v, "token")):
            format = get_cache_format(self.format)
            states.append(QuantizedStates.quantize(x[:, :, : self.quantized], format, per))
        seen = [torch.cat([s.dequantize(torch.empty(b, h, self.quantized, d)).double(), x[:, :, self.quantized :]], 2)
                for s, x in zip(states, (k, v), strict=True)]  # fmt: skip
        tensors = [q, *(t for s in states for t in (s.codes, s.scale, s.offset))]
        tensors += [x[:, :, self.quantized :].clone() for x in (k, v)]
        starts = None if self.starts is None else torch.tensor(self.starts, dtype=torch.int32, device=device)
        arguments = [None if t is None else t.to(device) for t in tensors] + [self.format, d**-0.5, starts]
        return arguments, q.double(), *seen

    def expected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q · Kᵀ / √D) · V, (B, n, heads, D) float64."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (k, v))
        position = torch.arange(k.shape[2])
        visible = position <= (k.shape[2] - self.n + torch.arange(self.n))[:, None]
        starts = torch.tensor(self.starts or [0] * self.batch)
        visible = visible & (position >= starts[:, None, None, None])
        scores = (q @ k.transpose(2, 3) * self.head_dim**-0.5).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)


CASES = [
    *[Case(f, head_dim=d, dtype=t) for f in attention.CODES for d in (64, 128) for t in (FP16, BF16)],
    *[Case(group=g, kv_heads=h) for g, h in ((1, 3), (2, 1), (3, 2), (7, 1), (8, 1), (9, 1), (16, 2))],
    *[Case("kv4", group=g, n=n, dtype=BF16) for g, n in ((4, 2), (4, 4), (1, 5), (8, 8), (16, 3))],
    *[Case(f, quantized=q, recent=r) for f in ("kv8", "kv4") for q, r in ((64, 1), (128, 64), (4160, 63), (8192, 130))],
    *[Case(quantized=q, recent=0) for q in (64, 640)],
    *[Case(quantized=0, recent=r, dtype=BF16) for r in (1, 65)],
    Case(batch=3, quantized=1024, recent=5, starts=(0, 70, 1027)),
    Case("kv4", batch=2, n=3, quantized=256, recent=1, starts=(254, 64)),
    Case(batch=17, kv_heads=8, quantized=2048, recent=9, dtype=BF16),
]


def relative_error(out: Tensor, exact: Tensor) -> float:
    assert out.isfinite().all()
    return float((out.cpu().double() - exact).norm() / exact.norm())


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_it_is_right(self, case: Case) -> None:
        arguments, *values = case.make()
        out = attention.attend(*arguments)
        assert out.dtype == case.dtype
        assert relative_error(out, case.expected(*values)) < (4e-3 if case.dtype == BF16 else 6e-4)
        assert torch.equal(out, attention.attend(*arguments))

    def test_int8_stays_close_to_the_original_values(self) -> None:
        case = Case(quantized=4096, recent=3, dtype=BF16)
        arguments, q, *_ = case.make()
        random = torch.Generator().manual_seed(case.quantized + case.recent + case.group)
        torch.randn(q.shape, generator=random)
        shape = (1, case.kv_heads, 4099, 128)
        k = torch.randn(shape, generator=random) + 2 * torch.randn(1, case.kv_heads, 1, 128, generator=random)
        v = 0.7 * torch.randn(shape, generator=random) + 0.2
        original = case.expected(q, k.to(BF16).double(), v.to(BF16).double())
        assert relative_error(attention.attend(*arguments), original) < 1e-2

    def test_queries_may_lie_in_any_order(self) -> None:
        case = Case(n=2, batch=2)
        (q, *rest), *values = case.make()
        turned = q.transpose(1, 2).contiguous().transpose(1, 2)
        shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view_as(q).copy_(q)
        for each in (turned, shifted):
            assert torch.equal(attention.attend(each, *rest), attention.attend(q, *rest))

    def test_recent_tokens_in_a_ring_and_lengths_on_the_device(self) -> None:
        """One captured graph goes on from token to token, as the number of tokens on the device grows."""
        case = Case(quantized=256, recent=1)
        window, ring = 5, 128
        (q, kc, ks, ko, vc, vs, vo, _, _, *rest), _, _, _ = case.make()
        random = torch.Generator().manual_seed(1)
        tokens = [torch.randn(1, 2, 256 + ring, 128, generator=random).half() for _ in range(2)]
        rings = [torch.full((1, 2, ring, 128), float("nan"), dtype=FP16, device="cuda") for _ in range(2)]
        before = torch.zeros(1, dtype=torch.int32, device="cuda")
        inputs = (q, kc, ks, ko, vc, vs, vo, *rings, *rest[:2], None, before, window)
        graph = torch.cuda.CUDAGraph()
        attention.attend(*inputs)
        with torch.cuda.graph(graph):
            out = attention.attend(*inputs)
        for total in (1, 6, 64, 69, 70, 133, 134, 260):
            quantized = max(total - 1 - window, 0) // 64 * 64
            for ring_of, x in zip(rings, tokens, strict=True):
                ring_of.fill_(float("nan"))
                slots = torch.arange(quantized, total) % ring
                ring_of[:, :, slots] = x[:, :, quantized:total].cuda()
            before.fill_(total - 1)
            graph.replay()
            cut = slice(0, quantized // 64), slice(0, quantized)
            held = [
                kc[:, :, cut[1]],
                ks[:, :, cut[0]],
                ko[:, :, cut[0]],
                vc[:, :, cut[1]],
                vs[:, :, cut[1]],
                vo[:, :, cut[1]],
            ]
            recent = [x[:, :, quantized:total].cuda() for x in tokens]
            expected = attention.attend(q, *(x.clone() for x in held), *(x.clone() for x in recent), *rest)
            assert relative_error(out, expected.cpu().double()) < 1e-3, total

    def test_it_compiles_whole(self) -> None:
        case = Case()
        arguments, *values = case.make()
        compiled = torch.compile(lambda *a: attention.attend(*a) * 2, fullgraph=True)
        assert relative_error(compiled(*arguments) / 2, case.expected(*values)) < 1e-3

    def test_the_operator_is_well_formed(self) -> None:
        arguments, *_ = Case().make()
        torch.library.opcheck(attention.attend, tuple(arguments))

    def test_an_empty_batch_passes_through(self) -> None:
        arguments, *_ = Case().make()
        empty = [x[:0] if isinstance(x, Tensor) else x for x in arguments]
        assert attention.attend(*empty).shape == (0, 1, 8, 128)

    @pytest.mark.parametrize(
        ("index", "change", "words"),
        [
            (0, lambda q: q.repeat(1, 1, 17, 1), "at most 16 new tokens"),
            (0, lambda q: q[:, :7], "cannot share 2 key heads"),
            (0, lambda q: q.float(), "float16 and bfloat16"),
            (0, lambda q: q[..., :96], "heads of 64 or 128"),
            (1, lambda c: c[:, :, :100], "blocks of 64"),
            (1, lambda c: c.transpose(2, 3).contiguous().transpose(2, 3), "key_codes must be contiguous"),
            (2, lambda s: s.float(), "key_scale should be torch.float16"),
            (3, lambda o: None, "key_offset is missing"),
            (5, lambda s: s[:, :, :64], "value_scale should be"),
            (6, lambda o: o.cpu(), "value_offset lies on cpu"),
            (7, lambda r: r.bfloat16(), "recent_keys should be torch.float16"),
            (8, lambda r: r[:, :, :3], "recent_values should be"),
            (10, lambda s: -1.0, "positive number"),
            (11, lambda s: torch.zeros(2, dtype=torch.int32, device="cuda"), "starts should be"),
        ],
    )
    def test_bad_input_is_refused(self, index: int, change, words: str) -> None:
        arguments, *_ = Case().make()
        arguments[index] = change(arguments[index])
        with pytest.raises(CanopyError, match=words):
            attention.attend(*arguments)


COMPILED = [
    *[(f, 128, BF16, 8, "sm_90a") for f in attention.CODES],
    *[(f, 64, FP16, 16, arch) for f, arch in zip(attention.CODES, 2 * ("sm_80", "sm_100"), strict=True)],
    *[("kv8", 128, FP16, 16, arch) for arch in ("sm_80", "sm_100")],
]


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(("format", "head_dim", "dtype", "rows", "arch"), COMPILED, ids=str)
def test_it_compiles_without_spilling(format: str, head_dim: int, dtype: torch.dtype, rows: int, arch: str) -> None:
    found = nvrtc.compile("attention.cu", attention.constants(format, head_dim, dtype, rows), arch)
    assert found.spilled == 0 and not found.warnings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "kv6"}, "this cache is kv6"),
        ({"head_dim": 96}, "these have 96"),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"keys": "token"}, "one per token"),
        ({"group": 32}, "one per 32"),
        ({"device": torch.device("cpu")}, "lies on cpu"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(change: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "device" not in change:
        monkeypatch.setattr(attention.launch, "unavailable", lambda device: None)
    given = {
        "format": "kv8",
        "head_dim": 128,
        "dtype": BF16,
        "keys": "channel",
        "group": 64,
        "device": torch.device("cuda"),
    }
    assert words in attention.refuse(**(given | change))


@pytest.mark.parametrize(("blocks", "jobs"), [(0, 8), (1, 1), (63, 8), (511, 8), (63, 128), (511, 128), (511, 1000)])
def test_splits_fill_the_gpu_evenly(blocks: int, jobs: int) -> None:
    n = attention.splits_for(blocks, jobs, multiprocessors=132, resident=3)
    assert 1 <= n <= max(1, -(-blocks // 4))
    assert n == 1 or jobs * n <= 132 * 3
    if blocks >= 500 and jobs <= 128:
        assert jobs * n >= 132  # no multiprocessor idle
