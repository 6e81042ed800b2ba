"""Headers that lie, indexes that wander off, pickles, and folders that are whole or absent."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from canopyq.checkpoint import output
from canopyq.checkpoint.files import INDEX, SINGLE, Checkpoint
from canopyq.checkpoint.headers import DTYPES, read_header
from canopyq.checkpoint.output import refuse_not_empty, whole_or_absent
from canopyq.errors import CanopyError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.bfloat16), "c": torch.tensor(7)}


def raw(header: object, data: int = 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors(), made / SINGLE, metadata={"format": "pt"})
    return made


def shard(folder: Path, weight_map: object, **held: dict[str, torch.Tensor]) -> None:
    (folder / SINGLE).unlink()
    for name, content in held.items():
        save_file(content, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# Headers --------------------------------------------------------------------------------------------------------------


def test_a_header_says_what_safetensors_wrote(folder: Path) -> None:
    header = read_header(folder / SINGLE)
    assert set(header) == {"a", "b", "c"}
    content = (folder / SINGLE).read_bytes()
    for name, tensor in tensors().items():
        info = header[name]
        assert (info.torch_dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert content[info.start : info.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read_as_it_was_written(dtype: torch.dtype, folder: Path) -> None:
    x = torch.arange(24, dtype=torch.uint8).remainder(2).view(dtype)
    save_file({"x": x}, folder / SINGLE)
    found = Checkpoint(folder).read("x")
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), x.view(torch.uint8))


def test_empty_tensors_and_files(folder: Path) -> None:
    save_file({"x": torch.zeros(0, 3), "y": torch.ones(2), "z": torch.zeros(0)}, folder / SINGLE)
    assert Checkpoint(folder).read("x").shape == (0, 3)
    save_file({}, folder / SINGLE)
    assert read_header(folder / SINGLE) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        raw({"a": F32}, length=2**63),
        raw({"a": F32}, length=10**6),
        raw(b"{", 0),
        raw(b"\xff\xfe", 0),
        raw(b"[" * 9_000, 0),
        raw(b"{}," * 100_000, 0),
        raw(b"9" * 10_000, 0),
        raw(json.dumps({"a": F32, "b": F32 | {"data_offsets": [24, 48]}}).replace('"b"', '"a"').encode(), 48),
        raw([1]),
        raw({"__metadata__": {"a": 1}, "a": F32}),
        raw({"a": 3}),
        raw({"a": {"dtype": "F32", "shape": [2, 3]}}),
        raw({"a": F32 | {"dtype": "F33"}}),
        raw({"a": F32 | {"dtype": ["F32"]}}),
        raw({"a": F32 | {"shape": [2, -3]}}),
        raw({"a": F32 | {"shape": [2, 3.0]}}),
        raw({"a": F32 | {"shape": [True, 6]}}),
        raw({"a": F32 | {"shape": [2**70, 0]}}),
        raw({"a": F32 | {"shape": [2**31, 2**31]}}),
        raw({"a": F32 | {"shape": [2] * 9_000}}),
        raw({"a": F32 | {"data_offsets": [0]}}),
        raw({"a": F32 | {"data_offsets": [-4, 20]}}),
        raw({"a": F32 | {"data_offsets": [24, 0]}}),
        raw({"a": F32 | {"data_offsets": [0, 20]}}),
        raw({"a": F32, "b": F32 | {"data_offsets": [20, 44]}}, 44),
        raw({"a": F32, "b": F32}),
        raw({"a": F32, "b": F32 | {"data_offsets": [28, 52]}}, 52),
        raw({"a": F32}, 23),
        raw({"a": F32}, 25),
        raw({"a": F32 | {"shape": [2**40], "data_offsets": [0, 2**42]}}),
    ],
)
def test_headers_that_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CanopyError, match="x.safetensors") as refused:
        read_header(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_file_that_cannot_be_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of more bytes than a process may have takes no room on the disk."""

    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("canopyq.checkpoint.headers.safe_open", no_memory)
    with pytest.raises(CanopyError, match=SINGLE):
        read_header(folder / SINGLE)


@example(edits=[], cut=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 400),
)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_refused_or_read(
    edits: list, cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the bytes are: a `CanopyError`, or a header whose tensors safetensors can read too."""
    base = tmp_path_factory.getbasetemp()
    save_file(tensors(), base / "whole.safetensors", metadata={"format": "pt"})
    content = bytearray((base / "whole.safetensors").read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    file = base / "damaged.safetensors"
    file.write_bytes(content[:cut])
    try:
        header = read_header(file)
    except CanopyError:
        return
    for info in header.values():
        assert 0 <= info.start <= info.end <= len(content)


@given(text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), data=st.integers(0, 40))
@settings(max_examples=200)
def test_random_headers_are_refused_or_read(text: bytes, data: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "random.safetensors"
    file.write_bytes(raw(text, data))
    try:
        read_header(file)
    except CanopyError:
        pass


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16", "I8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(entry=st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}) | JSON, metadata=JSON)
@settings(max_examples=200)
def test_wrong_json_is_refused_or_read(
    entry: object, metadata: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "json.safetensors"
    file.write_bytes(raw({"__metadata__": metadata, "a": entry}, 4))
    try:
        read_header(file)
    except CanopyError:
        pass


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_one_file(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"} and checkpoint.files == [folder / SINGLE]
    assert checkpoint.nbytes == 24 + 10 + 8
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.read(name), tensor)
    with pytest.raises(CanopyError, match="unknown tensor 'd'"):
        checkpoint.read("d")


def test_a_checkpoint_of_several_files(folder: Path) -> None:
    x = tensors()
    shard(folder, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": x["a"]}, two={"b": x["b"], "c": x["c"]})
    checkpoint = Checkpoint(folder)
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in x.items())


def test_files_may_be_links_as_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).rename(tmp_path / "blob")
    (folder / SINGLE).symlink_to(tmp_path / "blob")
    assert torch.equal(Checkpoint(folder).read("a"), tensors()["a"])


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "../one.safetensors"}, "no file of its folder"),
        ({"a": "/etc/passwd"}, "no file of its folder"),
        ({"a": "sub/one.safetensors"}, "no file of its folder"),
        ({"a": ".."}, "no file of its folder"),
        ({"a": "one\0"}, "no file of its folder"),
        ({"a": "three.safetensors"}, "which is missing"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "and it does not"),
        ({"d": "one.safetensors"}, "and it does not"),
        ({"a": 3}, "no weight_map"),
        ({}, "no weight_map"),
        (["one.safetensors"], "no weight_map"),
    ],
    ids=str,
)
def test_an_index_that_is_refused(weight_map: object, part: str, folder: Path) -> None:
    shard(folder, weight_map, one={"a": torch.ones(2)}, two={"b": torch.ones(2)})
    with pytest.raises(CanopyError, match=part):
        Checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    x = {"a": torch.ones(2)}
    shard(folder, {"a": "one.safetensors", "b": "two.safetensors"}, one=x, two=x | {"b": torch.ones(1)})
    with pytest.raises(CanopyError, match="'a' is in one.safetensors too"):
        Checkpoint(folder)


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (folder / SINGLE).unlink()
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(CanopyError, match="reading a pickle runs whatever code is in it"):
            Checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_folders_without_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CanopyError, match="has no config.json"):
        Checkpoint(folder)
    (folder / "config.json").write_text("[1, 2")
    with pytest.raises(CanopyError, match="no valid JSON"):
        Checkpoint(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(CanopyError, match="has neither"):
        Checkpoint(folder)
    with pytest.raises(CanopyError, match="is no folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_file_that_shrinks_after_its_header_was_read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    os.truncate(folder / SINGLE, 100)
    with pytest.raises(CanopyError, match="was the file changed meanwhile"):
        checkpoint.read("a")


# Whole or absent ------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with whole_or_absent(out) as work:
        assert work.parent == out.parent and work.name.startswith(".out.")
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x" and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_folder_stays_absent_on_failure(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), whole_or_absent(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_stays_absent_if_the_disk_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(output, "sync", fail)
    with pytest.raises(OSError), whole_or_absent(tmp_path / "out") as work:
        (work / "file").write_text("x")
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_filled_and_another_one_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_or_absent(tmp_path / "out") as work:
        (work / "file").write_text("x")
    with pytest.raises(CanopyError, match="is not empty"), whole_or_absent(tmp_path / "out"):
        raise AssertionError("never reached")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CanopyError, match="is a file"):
        refuse_not_empty(tmp_path / "file")
    with pytest.raises(CanopyError, match="cannot be made"):
        refuse_not_empty(tmp_path / "file" / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]
