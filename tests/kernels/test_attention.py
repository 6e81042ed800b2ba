"""Attention on codes: the kernel held to float64 on a GPU; that variants compile, and what is refused, anywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import attention, kv_append, nvrtc
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV
from canopyq.tensor.formats import CACHE_FORMATS, CacheFormat, get_cache_format

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

    def make(self, device: str = "cuda") -> tuple[tuple, Tensor, Tensor, Tensor]:
        """The arguments of `attend`, and float64 queries, keys and values that its codes stand for."""
        random = torch.Generator().manual_seed(self.quantized + self.recent + self.group)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        b, h, tokens, d = self.batch, self.kv_heads, self.quantized + self.recent, self.head_dim
        q = normal(b, h * self.group, self.n, d).to(self.dtype)
        k = (normal(b, h, tokens, d) + 2 * normal(b, h, 1, d)).to(self.dtype)
        v = (0.7 * normal(b, h, tokens, d) + 0.2).to(self.dtype)
        codes, recent, seen = [], [], []
        for x, granularity in ((k, "channel"), (v, "token")):
            old, new = x[:, :, : self.quantized], x[:, :, self.quantized :].clone()
            kv = QuantizedKV.quantize(old, get_cache_format(self.format), granularity)
            seen.append(torch.cat([kv.dequantize(torch.empty(old.shape)).double(), new], 2))
            codes.append(kv.map(lambda t: t.to(device)))
            recent.append(new.to(device))
        starts = None if self.starts is None else torch.tensor(self.starts, dtype=torch.int32, device=device)
        return (q.to(device), KVView(*codes, *recent), d**-0.5, starts), q.double(), *seen

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
    *[Case(f, head_dim=d, dtype=t) for f in CACHE_FORMATS for d in (64, 128) for t in (FP16, BF16)],
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
        (q, *rest), *_ = case.make()
        turned = q.transpose(1, 2).contiguous().transpose(1, 2)
        shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view_as(q).copy_(q)
        for each in (turned, shifted):
            assert torch.equal(attention.attend(each, *rest), attention.attend(q, *rest))

    def test_recent_tokens_in_a_ring_and_lengths_on_the_device(self) -> None:
        """One captured graph goes on from token to token, as the number of tokens on the device grows."""
        case = Case(quantized=256, recent=1)
        residual_length, ring = 5, 128
        (q, view, scaling, _), *_ = case.make()
        codes = view.quantized_keys, view.quantized_values
        random = torch.Generator().manual_seed(1)
        tokens = [torch.randn(1, 2, 256 + ring, 128, generator=random).half() for _ in range(2)]
        rings = [torch.full((1, 2, ring, 128), float("nan"), dtype=FP16, device="cuda") for _ in range(2)]
        before = torch.zeros(1, dtype=torch.int32, device="cuda")
        static = KVView(*codes, *rings, before, residual_length)
        graph = torch.cuda.CUDAGraph()
        attention.attend(q, static, scaling)
        with torch.cuda.graph(graph):
            out = attention.attend(q, static, scaling)
        for total in (1, 6, 64, 69, 70, 133, 134, 260):
            quantized = max(total - 1 - residual_length, 0) // 64 * 64
            for ring_of, x in zip(rings, tokens, strict=True):
                ring_of.fill_(float("nan"))
                slots = torch.arange(quantized, total) % ring
                ring_of[:, :, slots] = x[:, :, quantized:total].cuda()
            before.fill_(total - 1)
            graph.replay()
            recent = [x[:, :, quantized:total].clone().cuda() for x in tokens]
            growing = KVView(*(kv.narrow(0, quantized) for kv in codes), *recent)
            expected = attention.attend(q, growing, scaling)
            assert relative_error(out, expected.cpu().double()) < 1e-3, total

    def test_it_compiles_whole(self) -> None:
        case = Case()
        arguments, *values = case.make()
        compiled = torch.compile(lambda *a: attention.attend(*a) * 2, fullgraph=True)
        assert relative_error(compiled(*arguments) / 2, case.expected(*values)) < 1e-3

    def test_the_operator_is_well_formed(self) -> None:
        (q, view, scaling, _), *_ = Case().make()
        torch.library.opcheck(attention.attend_codes, (q, view.tensors, "kv8", scaling))


# Anywhere, without a launch: what is asked before it, and what it is given.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """As on a GPU; the kernels write nothing. Name, grid and arguments of each launch."""
    launches: list[tuple] = []

    class Function:
        registers = 128

        def __init__(self, file: str, name: str, constants: dict, arguments: str, *_: object) -> None:
            self.name, self.arguments = name, arguments

        def __call__(self, grid: tuple, *values: object) -> None:
            kinds = [float if kind == "f" else int for kind in self.arguments]
            assert all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
            launches.append((self.name, grid, values))

    for clear in (attention._functions, kv_append._function):
        clear.cache_clear()
    monkeypatch.setattr(attention.launch, "unavailable", lambda device: None)
    monkeypatch.setattr(attention.launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(attention.launch, "Function", Function)
    yield launches
    for clear in (attention._functions, kv_append._function):
        clear.cache_clear()


def addresses(view: KVView) -> list[int]:
    """In the order of the kernels' parameters; 0 is null."""
    tensors = [x for kv in (view.quantized_keys, view.quantized_values) for x in (kv.codes, kv.scale, kv.offset)]
    return [0 if x is None else x.data_ptr() for x in (*tensors, view.keys, view.values)]


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_kernels_get_each_tensor_in_its_place(format: str, emulated: list[tuple]) -> None:
    (q, view, scaling, starts), *_ = Case(format, recent=64, batch=2, starts=(0, 3)).make("cpu")
    assert attention.attend(q, view, scaling, starts).shape == (2, 1, 8, 128)
    (name, _, values), (combine, *_) = emulated
    assert (name, combine) == ("attention_decode", "attention_combine")
    assert list(values[:11]) == [q.data_ptr(), *addresses(view), 0, starts.data_ptr()]
    static = dataclasses.replace(view, before=torch.tensor([300], dtype=torch.int32), residual_length=5)
    attention.attend(q, static, scaling)
    _, _, values = emulated[2]
    assert list(values[1:11]) == [*addresses(view), static.before.data_ptr(), 0]
    assert values[20] == 5
    new = torch.zeros(2, 2, 1, 128, dtype=FP16)
    kv_append.append_codes._init_fn(new, new, static.tensors, static.before, format, 5)
    *codes, recent_keys, recent_values = addresses(view)
    name, grid, values = emulated[-1]
    assert (name, grid) == ("append", (2, 2, 2))
    assert list(values[:15]) == [new.data_ptr()] * 2 + [
        recent_keys, recent_values, *codes, static.before.data_ptr(), 1, 320, 64, 5]  # fmt: skip


def test_an_empty_batch_passes_through(emulated: list[tuple]) -> None:
    (q, view, scaling, _), *_ = Case().make("cpu")
    codes = (kv.map(lambda x: x[:0]) for kv in (view.quantized_keys, view.quantized_values))
    empty = KVView(*codes, view.keys[:0], view.values[:0])
    assert attention.attend(q[:0], empty, scaling).shape == (0, 1, 8, 128)
    assert not emulated


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (lambda q: q.repeat(1, 1, 17, 1), "17"),
        (lambda q: q[:, :7], "7 query heads"),
        (lambda q: q.float(), "torch.float32"),
        (lambda q: q[..., :96], "96"),
        (lambda q: q.bfloat16(), "torch.bfloat16"),
        (lambda q: q[0], r"\(8, 1, 128\)"),
        (lambda q: q.repeat(2, 1, 1, 1), r"\(2, 8, 1, 128\)"),
    ],
)
def test_queries_that_do_not_fit_are_refused(change, value: str, emulated: list[tuple]) -> None:
    (q, view, scaling, _), *_ = Case().make("cpu")
    with pytest.raises(CanopyError, match=value):
        attention.attend(change(q), view, scaling)
    assert not emulated


@pytest.mark.parametrize(
    ("tensor", "change", "value"),
    [
        ("key_codes", lambda x: x[:, :, :100], "100"),
        ("key_codes", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "contiguous"),
        ("key_scale", lambda x: x.float(), "key_scale"),
        ("key_offset", lambda x: None, "key_offset"),
        ("key_scale", lambda x: x[..., :0], "key_scale"),
        ("value_scale", lambda x: x[:, :, :64], "value_scale"),
        ("value_offset", lambda x: x.to("meta"), "value_offset .* on meta"),
        ("keys", lambda x: x.bfloat16(), "torch.bfloat16"),
        ("values", lambda x: x[:, :, :3], r"\(1, 2, 3, 128\)"),
        ("before", lambda x: torch.zeros(2, dtype=torch.int32), "before"),
        ("before", lambda x: torch.zeros(1, dtype=torch.int32), "7"),  # a ring is a whole number of blocks
    ],
)
def test_tensors_that_do_not_go_together_are_refused(tensor: str, change, value: str, emulated: list[tuple]) -> None:
    (q, view, scaling, _), *_ = Case().make("cpu")
    with pytest.raises(CanopyError, match=value):
        attention.attend(q, changed(view, tensor, change), scaling)
    assert not emulated


def changed(view: KVView, name: str, change) -> KVView:
    """The view with one tensor of its own, or of its quantized keys or values, in another form."""
    if hasattr(view, name):
        return dataclasses.replace(view, **{name: change(getattr(view, name))})
    which, tensor = name.split("_")
    kv = getattr(view, f"quantized_{which}s")
    return dataclasses.replace(
        view, **{f"quantized_{which}s": dataclasses.replace(kv, **{tensor: change(getattr(kv, tensor))})}
    )


@pytest.mark.parametrize(
    ("scaling", "starts", "value"),
    [(-1.0, None, "-1.0"), (float("nan"), None, "nan"), (0.1, torch.zeros(2, dtype=torch.int32), "starts")],
)
def test_other_arguments_that_cannot_be_are_refused(scaling, starts, value: str, emulated: list[tuple]) -> None:
    (q, view, *_), *_ = Case().make("cpu")
    with pytest.raises(CanopyError, match=value):
        attention.attend(q, view, scaling, starts)
    assert not emulated


COMPILED = [
    *[(f, 128, BF16, 8, "sm_90a") for f in CACHE_FORMATS],
    *[(f, 64, FP16, 16, arch) for f, arch in zip(CACHE_FORMATS, 2 * ("sm_80", "sm_100"), strict=True)],
    *[("kv8", 128, FP16, 16, arch) for arch in ("sm_80", "sm_100")],
]


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(("format", "head_dim", "dtype", "rows", "arch"), COMPILED, ids=str)
def test_it_compiles_without_spilling(format: str, head_dim: int, dtype: torch.dtype, rows: int, arch: str) -> None:
    found = nvrtc.compile("attention.cu", attention.constants(get_cache_format(format), head_dim, dtype, rows), arch)
    assert found.spilled == 0 and not found.warnings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": CacheFormat("kv6", 6)}, "this cache is kv6"),
        ({"head_dim": 96}, "these have 96"),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"key_granularity": "token"}, "one per token"),
        ({"group_size": 32}, "one per 32"),
        ({"device": torch.device("cpu")}, "lies on cpu"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(change: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "device" not in change:
        monkeypatch.setattr(attention.launch, "unavailable", lambda device: None)
    given = {
        "format": get_cache_format("kv8"),
        "head_dim": 128,
        "dtype": BF16,
        "key_granularity": "channel",
        "group_size": 64,
        "device": torch.device("cuda"),
    }
    assert words in attention.unsupported_reason(**(given | change))


@pytest.mark.parametrize(("blocks", "jobs"), [(0, 8), (1, 1), (63, 8), (511, 8), (63, 128), (511, 128), (511, 1000)])
def test_splits_fill_the_gpu_evenly(blocks: int, jobs: int) -> None:
    n = attention.splits_for(blocks, jobs, multiprocessors=132, resident=3)
    assert 1 <= n <= max(1, -(-blocks // 4))
    assert n == 1 or jobs * n <= 132 * 3
    if blocks >= 500 and jobs <= 128:
        assert jobs * n >= 132  # no multiprocessor idle
