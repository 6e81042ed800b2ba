"""Needs as people write them, and GPUs by their names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopyq import tutor
from canopyq.advisor.needs import (
    GPUS,
    Needs,
    byte_count,
    find_capability,
    find_shape,
    refuse,
    speed_remarks,
    token_count,
)
from canopyq.errors import CanopyError
from canopyq.memory import MODEL_SHAPES, ModelShape
from canopyq.tensor.scheme import Recipe


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8_000_000_000), ("8gb", 8_000_000_000), ("8 G", 8_000_000_000), ("6.5GiB", 6_979_321_856),
     ("500MB", 500_000_000),
     ("5.4e6", 5_400_000), ("123", 123), (123, 123), (5.4e6, 5_400_000), ("2TB", 2 * 10**12), ("1KiB", 1024)],
    ids=str,
)  # fmt: skip
def test_memory_as_people_write_it(text: str | int | float, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "8 apples", "-8GB", "GB", "8iB", "0", "0.1", "nan", "inf", None, "8GBGB"])
def test_what_is_no_memory(text: object) -> None:
    with pytest.raises(CanopyError, match="8GB, 6.5GiB or 500MB"):
        byte_count(text)


@pytest.mark.parametrize(("text", "count"), [("32k", 32768), ("32K", 32768), (4096, 4096),
                         ("128_000", 128_000), ("0", 0), ("1.5k", 1536), ("1m", 1048576)], ids=str)  # fmt: skip
def test_context_as_people_write_it(text: str | int, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "-1", "32 tokens", "1.5", "0.0001k", "9999m", None])
def test_what_is_no_context(text: object) -> None:
    with pytest.raises(CanopyError, match="32k or 32768"):
        token_count(text)


@given(st.integers(1, 10**15))
def test_a_number_of_bytes_is_itself(count: int) -> None:
    assert byte_count(count) == byte_count(str(count)) == count


@pytest.mark.parametrize(
    ("asked", "name"),
    [("7B", "mistral-7b"), ("0.5B", "qwen2.5-0.5b"), ("8B", "llama-3.1-8b"), ("13b", "llama-2-13b"),
     ("70B", "llama-3.1-70b"), ("llama-2-7b", "llama-2-7b"),
     ("Llama-2-7B", "llama-2-7b"), ("tutor", "tutor"), (7e9, "mistral-7b")],
    ids=str,
)  # fmt: skip
def test_a_count_names_the_nearest_model(asked: str | float, name: str) -> None:
    assert find_shape(asked) == (name, MODEL_SHAPES[name])


@pytest.mark.parametrize(
    ("asked", "message"),
    [("200B", "no known model has about 200B parameters, the nearest is qwen2.5-72b"), ("100M", "no known model"),
     ("llama-2-7", "did you mean 'llama-2-7b'"), ("./nowhere", "no folder with a config.json")],
)  # fmt: skip
def test_what_is_no_model(asked: str, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        find_shape(asked)


def test_a_folder_is_read_from_its_config(tmp_path) -> None:
    name, shape = find_shape(str(tutor.path()))
    assert shape == MODEL_SHAPES["tutor"] and name == str(tutor.path())
    qwen = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
            "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    assert find_shape(str(tmp_path))[1] == MODEL_SHAPES["qwen2.5-0.5b"]
    mixtral = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    with pytest.raises(CanopyError, match="a model with experts"):
        find_shape(str(tmp_path))


def test_a_config_without_sizes_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(CanopyError, match="has no intermediate_size"):
        ModelShape.of(GPT2Config())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gpu": "h10"}, "unknown GPU 'h10'; did you mean 'h100'"),
        ({"gpu": "42"}, "unknown GPU '42'"),
    ],
)
def test_needs_that_cannot_be_read(words: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        Needs.parse("7B", **words)


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [("H100", 9.0), ("RTX 4090", 8.9), ("NVIDIA L4", 8.9), ("sm_89", 8.9),
     ("sm_90a", 9.0), ("sm_120", 12.0), (8.6, 8.6), ("8", 8.0), ("cpu", 0.0)],
    ids=str,
)  # fmt: skip
def test_gpus_by_name_and_number(gpu: str | float, capability: float) -> None:
    assert find_capability(gpu) == capability


@pytest.mark.parametrize(
    ("recipe", "cache", "runs"),
    [
        ("fp8", None, {"l4", "h100", "b200"}),
        ("w8a8", None, {"cpu", "t4", "a100", "l4", "h100"}),
        ("w4a16-g128", None, {"cpu", "a100", "l4", "h100", "b200"}),
        ("w8a16", "kv-fp8", {"l4", "h100", "b200"}),
        ("w8a16", "kv8", {"cpu", "a100", "l4", "h100", "b200"}),
        ("w2a16-g32", None, {"cpu"}),
        (None, None, {"cpu", "a100", "l4", "h100", "b200"}),
    ],
)
def test_which_generation_runs_what(recipe: str | None, cache: str | None, runs: set[str]) -> None:
    parsed = None if recipe is None else Recipe.parse(recipe)
    machines = ("cpu", "v100", "t4", "a100", "l4", "h100", "b200")
    assert {name for name in machines if refuse(parsed, cache, GPUS[name]) is None} == runs
    assert refuse(parsed, cache, None) is None


def test_remarks_on_speed() -> None:
    weight_only = Recipe.parse("w4a16-g128")
    assert speed_remarks(weight_only, None, 9.0, 1) == []
    assert "not arithmetic" in speed_remarks(weight_only, None, 9.0, 64)[0]
    assert "8.9" in speed_remarks(Recipe.parse("fp8"), None, None, 64)[0]
    assert "--kv-cache-dtype" in speed_remarks(weight_only, "kv4", 9.0, 1)[0]
    assert "none of 256" in speed_remarks(Recipe.parse("w4a16-g256"), None, 9.0, 1)[0]
    assert "2-bit" in speed_remarks(Recipe.parse("w2a16-g32"), None, 0.0, 1)[0]
