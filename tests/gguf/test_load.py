"""GGUF files that `export_gguf` wrote, as llama.cpp reads them, come back; what is not read right is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.gguf.load import _goes_by_family
from tests.gguf.test_export import LLAMA3, YARN, tiny

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'canopyq[gguf]'")

IDS = torch.arange(3, 60)[None]
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture(scope="module")
def tokenizer():
    return cq.tutor.load()[1]


def tokenizer_is_read(family: str) -> bool:
    return family in ("llama", "qwen2", "qwen3") or not _goes_by_family()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("gemma2", GEMMA),
        ("gemma3_text", GEMMA),
        ("phi3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("recipe", [None, "w8a16-g32", "w4a16-g32"])
def test_every_family_comes_back(family: str, options: dict, recipe: str | None, tokenizer, tmp_path: Path) -> None:
    model = tiny(family, **options)
    if recipe is not None:
        cq.quantize_(model, recipe)
    cq.export_gguf(model, tmp_path / "model.gguf", tokenizer)
    with pytest.raises(CanopyError, match="cq.load_gguf"):
        cq.load(tmp_path / "model.gguf")
    if not tokenizer_is_read(family):
        with pytest.raises(CanopyError, match="tokenizer .* newer"):
            cq.load_gguf(tmp_path / "model.gguf")
        return
    loaded, own = cq.load_gguf(tmp_path / "model.gguf")
    wanted = logits(model)
    assert (logits(loaded) - wanted).abs().max() <= 0.02 * wanted.abs().max()  # scales become float16, and kernels bf16
    assert own.encode("Spell meadow, please.") == tokenizer.encode("Spell meadow, please.")
    cq.quantize_(loaded, "w4a16-g32")  # it is a plain model again
    cq.save(loaded, tmp_path / "saved", own)
    assert torch.equal(logits(cq.load(tmp_path / "saved", dtype="float32")), logits(loaded))


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("llama", {"rope_parameters": LLAMA3}, "rotary"), ("qwen2", {"rope_parameters": YARN}, "'yarn'"),
        ("phi3", {"rope_parameters": PARTIAL}, "16 of 32"), ("llama", {"attention_bias": True}, "of which"),
        ("gemma2", GEMMA | {"head_dim": 128}, "256"), ("qwen3", {"head_dim": 64}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_would_be_read_otherwise_is_refused(family, options, named: str, tokenizer, tmp_path: Path) -> None:
    cq.export_gguf(tiny(family, **options), tmp_path / "model.gguf", tokenizer)
    with pytest.raises(CanopyError, match=named if tokenizer_is_read(family) else "newer") as caught:
        cq.load_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_damaged_files(tokenizer, tmp_path: Path) -> None:
    """Cut anywhere, and bytes changed in what describes the tensors: a model, or one line that says why not."""
    whole, damaged = tmp_path / "whole.gguf", tmp_path / "damaged.gguf"
    cq.export_gguf(tiny(num_hidden_layers=1), whole, tokenizer)
    content, draw = whole.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(12):
        damaged.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(CanopyError, match="damaged.gguf"):
            cq.load_gguf(damaged)
    for _ in range(12):
        changed = bytearray(content)
        changed[draw.randrange(3000)] ^= 1 << draw.randrange(8)
        damaged.write_bytes(changed)
        try:
            cq.load_gguf(damaged)
        except CanopyError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 2


@pytest.mark.parametrize(
    ("key", "value"), [("general.architecture", "mamba"), ("llama.block_count", 2**31), ("llama.block_count", 2)]
)
def test_a_file_that_says_what_it_does_not_hold(key: str, value, tokenizer, tmp_path: Path) -> None:
    import gguf

    cq.export_gguf(tiny(num_hidden_layers=1), tmp_path / "model.gguf", tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    part = reader.fields[key].parts[reader.fields[key].data[0]]
    if isinstance(value, str):
        part[:] = bytearray(value.encode())
    else:
        part[0] = value
    reader.data.flush()
    with pytest.raises(CanopyError, match=r"mamba|block_count|hold what it describes|cannot be loaded"):
        cq.load_gguf(tmp_path / "model.gguf")
