"""Quantizing from disk to disk: the same bytes as in memory, little memory, and no half-written result ever."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import canopyq as cq
from benchmarks.stream import measure, random_checkpoint
from canopyq import cli
from canopyq.checkpoint import output, stream
from canopyq.checkpoint.config import read_config
from canopyq.checkpoint.files import INDEX, SINGLE, Checkpoint
from canopyq.checkpoint.load import load
from canopyq.checkpoint.save import save
from canopyq.checkpoint.stream import prepare, quantize_checkpoint
from canopyq.errors import CanopyError
from canopyq.tensor.scheme import Recipe, Scheme
from canopyq.tutor import loading

SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": 200, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_FILES = {"shard_bytes": 40_000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bfloat16 Llama in three files, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    random_checkpoint(folder, files=3, **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(loading.path() / name, folder / name)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes, in many files."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(model, "w4a16-g64", out, **SMALL_FILES)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything that the files hold, bit by bit."""
    checkpoint = Checkpoint(folder)
    return {
        name: (info.torch_dtype, info.shape, file.read_bytes()[info.start : info.end])
        for name, (file, info) in checkpoint.tensors.items()
    }


def in_memory(source: Path, recipe: str | Recipe, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    cq.quantize_(model, recipe)
    save(model, out, check=False)


# The same as in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a16-g128", "w4a16-g64-asym", "w8a16", "w2a16-g32", "w4a16-tensor", "w4a16-g48",
                                    "nvfp4", "mxfp4"])  # fmt: skip
def test_the_same_bytes_as_quantizing_in_memory(recipe: str, model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, recipe, tmp_path / "disk", **SMALL_FILES)
    in_memory(model, recipe, tmp_path / "memory")
    assert tensors(tmp_path / "disk") == tensors(tmp_path / "memory")
    ours, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("disk", "memory"))
    assert ours["quantization_config"] == other["quantization_config"] and read_config(ours["quantization_config"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [None, torch.bfloat16, torch.float32], ids=str)
def test_the_same_bytes_in_every_dtype(dtype: torch.dtype, scale: torch.dtype | None, tmp_path: Path) -> None:
    """A scale that the model's dtype cannot hold exactly keeps its own, and which it is shows only in the data."""
    random_checkpoint(tmp_path / "model", dtype=dtype, **(SIZES | {"tie_word_embeddings": False, "vocab_size": 60}))
    recipe = Recipe("mine", Scheme("int4", "g32", scale_dtype=scale), ignore=("lm_head", "layers.1"))
    quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "disk")
    in_memory(tmp_path / "model", recipe, tmp_path / "memory")
    assert tensors(tmp_path / "disk") == tensors(tmp_path / "memory")
    ignored = json.loads((tmp_path / "disk" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored and "model.layers.1.mlp.up_proj" in ignored and len(ignored) == 8


def test_the_result_answers_as_the_model_in_memory_does(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantize_checkpoint(model, "w4a16-g128", tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cq.quantize_(there, "w4a16-g128")
    here = load(tmp_path / "out")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(here(input_ids=ids).logits, there(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_tutor_loads_in_plain_transformers(canopyq, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = canopyq("quantize", "tutor", "--recipe", "w4a16-g128", "--out", str(tmp_path / "out"), "--json")
    found = json.loads(done.out)
    assert done.code == 0 and len(found["layers"]) == 56 and found["files"] == [SINGLE]
    assert found["bytes"]["after"] == sum(x.nbytes for x in load_file(tmp_path / "out" / SINGLE).values())
    model, loading_info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading_info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("1 + 1", return_tensors="pt")["input_ids"]
    ours = load(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=0.05, atol=0.1)


def test_what_is_written_beside_the_weights(model: Path, whole: dict[str, bytes]) -> None:
    names = {name for name in whole if not name.endswith(".safetensors")}
    assert names == {"config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    index = json.loads(whole[INDEX])
    assert len(set(index["weight_map"].values())) == len(whole) - len(names) > 5
    assert "lm_head.weight" not in index["weight_map"] and "model.embed_tokens.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] < Checkpoint(model).nbytes / 2
    config = json.loads(whole["config.json"])
    assert config.pop("quantization_config") and config == json.loads((model / "config.json").read_text())


def test_a_file_is_what_safetensors_would_write(model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, "w4a16-g128", tmp_path / "out")
    save_file(load_file(tmp_path / "out" / SINGLE), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "again").read_bytes()


# What will be done, before it is done ---------------------------------------------------------------------------------


def test_the_preflight(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    plan, _ = prepare(model, "w4a16-g64-asym", tmp_path / "out", say=said.append)
    for part in ("21 weights will be quantized", "in one file", "kept: model.embed_tokens (an embedding",
                 "kept: lm_head (named in", "memory: at most", "dequantize=True"):  # fmt: skip
        assert part in said[0]
    assert os.listdir(tmp_path) == []
    done = quantize_checkpoint(model, "w4a16-g64-asym", tmp_path / "out")
    assert done.plan.bytes_after == plan.bytes_after == Checkpoint(tmp_path / "out").nbytes


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path, canopyq) -> None:
    done = canopyq("quantize", str(model), "--out", str(tmp_path / "out"), "--dry-run")
    assert done.code == 0 and "will be quantized" in done.out and os.listdir(tmp_path) == []


def test_too_little_room_is_found_before_anything_is_written(model: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 12_345))
    with pytest.raises(CanopyError, match="the disk has 12,345 free; make room"):
        quantize_checkpoint(model, "w4a16-g64", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The checkpoint in one file, after a change."""
    held = {name: tensor for file in Checkpoint(folder).files for name, tensor in load_file(file).items()}
    change(held)
    save_file(held, folder / SINGLE)


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: rewrite(f, lambda x: x.update({"model.old_name": x.pop(NORM)})), f"lacks '{NORM}'"),
        (lambda f: rewrite(f, lambda x: x.pop(NORM)), "lacks 'model.norm.weight'"),
        (lambda f: rewrite(f, lambda x: x.pop(DOWN)), "lacks 'model.layers.1.mlp.down_proj.weight'"),
        (lambda f: rewrite(f, lambda x: x.update({NORM: torch.ones(5)})), r"has to be \(128,\)"),
        (lambda f: rewrite(f, lambda x: x.update({DOWN: x[DOWN].int()})), "torch.int32"),
        (lambda f: reconfigure(f, quantization_config={}), "is quantized already"),
        (lambda f: reconfigure(f, model_type="lama"), "lama"),
        (lambda f: reconfigure(f, hidden_size=-3), "-3"),
        (lambda f: reconfigure(f, tie_word_embeddings=False), "lacks 'lm_head.weight'"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)  # fmt: skip
def test_sources_that_are_refused(damage: Callable[[Path], None], part: str, own: Path, tmp_path: Path) -> None:
    damage(own)
    with pytest.raises(CanopyError, match=part) as refused:
        quantize_checkpoint(own, "w4a16-g64", tmp_path / "out")
    assert "\n" not in str(refused.value) and os.listdir(tmp_path) == ["model"]


def foreign(folder: Path, **config: object) -> None:
    """A model with code of its own, which leaves a file behind if it is ever run."""
    code = f"open({str(folder.parent / 'ran')!r}, 'w')"
    for file in ("configuration_own.py", "modeling_own.py"):
        (folder / file).write_text(code)
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    reconfigure(folder, architectures=["OwnForCausalLM"], auto_map=auto, **config)


def first_only(folder: Path) -> None:
    """The first of several files, under the name of the only one."""
    (folder / INDEX).unlink()
    first, *others = sorted(folder.glob("*.safetensors"))
    for file in others:
        file.unlink()
    first.rename(folder / SINGLE)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: foreign(f, model_type="own"), "'own'.*never run"),
        (lambda f: foreign(f), "'OwnForCausalLM'.*never run"),
        (lambda f: reconfigure(f, architectures=["BertForMaskedLM"]), "BertForMaskedLM.*'llama'"),
        (lambda f: reconfigure(f, architectures=["LlamaForSequenceClassification"]), "score.weight"),
        (lambda f: reconfigure(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]), "GPT2LMHead|missing_keys"),
        (lambda f: sorted(f.glob("*.safetensors"))[-1].unlink(), r"model-\d+-of-\d+.safetensors.*missing"),
        (lambda f: (f / INDEX).unlink(), "index"),
        (first_only, "lacks|missing_keys"),
    ],
    ids=["foreign type", "foreign class", "class of another type", "another class", "another type", "half", "no index",
         "first file"],
)  # fmt: skip
@pytest.mark.parametrize("method", [[], ["--method", "hqq"]], ids=["streamed", "in memory"])
def test_sources_of_which_something_is_not_there(
    damage: Callable[[Path], None], part: str, method: list[str], own: Path, tmp_path: Path, canopyq
) -> None:
    damage(own)
    done = canopyq("quantize", str(own), "--recipe", "w4a16-g64", "--out", str(tmp_path / "out"), *method)
    assert done.code == 2 and re.search(part, done.err) and done.err.count("\n") == 1 and not done.out
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("w4a16-g512", "q_proj is kept, group size 512 does not fit"),
        ("nf4", "no nf4"),
        ("w44", "unknown recipe"),
        (Recipe("all", Scheme("int4", "g64"), ignore=()), "lm_head is a Linear that the files do not hold"),
        (Recipe("none", Scheme("int4", "g64"), ignore=("model", "lm_head")), "left to quantize"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value.replace(" ", "_"),
)
def test_recipes_that_are_refused(recipe: str | Recipe, part: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CanopyError, match=part):
        quantize_checkpoint(model, recipe, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_empty_is_refused(model: Path, tmp_path: Path, canopyq) -> None:
    (tmp_path / "file").write_text("mine")
    done = canopyq("quantize", str(model), "--out", str(tmp_path))
    assert done.code == 2 and "is not empty" in done.err and done.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_weights_that_are_not_finite_leave_nothing(own: Path, tmp_path: Path) -> None:
    rewrite(own, lambda x: x[DOWN].view(-1).__setitem__(7, math.nan))
    with pytest.raises(CanopyError, match="layers.1.mlp.down_proj: the tensor of shape .* holds 1 NaN"):
        quantize_checkpoint(own, "w4a16-g64", tmp_path / "out", **SMALL_FILES)
    assert os.listdir(tmp_path) == ["model"]


def test_what_transformers_ignores_is_left_out(own: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"rotary_emb\.inv_freq"])
    rewrite(own, lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    said: list[str] = []
    done = quantize_checkpoint(own, "w4a16-g64", tmp_path / "out", say=said.append)
    assert len(done.plan.dropped) == 1 and "left out: model.layers.0.self_attn.rotary_emb.inv_freq" in said[0]
    assert done.plan.dropped[0] not in Checkpoint(tmp_path / "out").tensors


# Interruptions --------------------------------------------------------------------------------------------------------


def failing_after(count: int, error: BaseException) -> Callable:
    """`output.write` that raises in the middle of a block once it was called ``count`` times."""
    real, calls = output.write, iter(range(10**9))

    def write(file, block: memoryview) -> None:
        if next(calls) >= count:
            real(file, block[: len(block) // 2])
            raise error
        real(file, block)

    return write


@pytest.mark.parametrize("count", [0, 1, 7, 30, 60])
def test_a_full_disk(count: int, model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(output, "write", failing_after(count, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CanopyError, match="the disk is full.* the same command again: it continues") as refused:
            quantize_checkpoint(model, "w4a16-g64", tmp_path / "out", **SMALL_FILES)
    assert "\n" not in str(refused.value) and os.listdir(tmp_path) == [".out.partial"]
    assert not list((tmp_path / ".out.partial" / "model").glob("*.part")), "half a file takes up room"
    said: list[str] = []
    done = quantize_checkpoint(model, "w4a16-g64", tmp_path / "out", say=said.append, **SMALL_FILES)
    assert content(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]
    if count == 60:
        assert done.resumed > 3 and f"continuing: {done.resumed} of {len(done.plan.shards)} files" in said[-1]


def test_control_c(model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch, canopyq) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(output, "write", failing_after(9, KeyboardInterrupt()))
        done = canopyq("quantize", str(model), "--recipe", "w4a16-g64", "--out", str(tmp_path / "out"), "--json")
    assert (done.code, done.out) == (130, "") and done.err.startswith("canopyq: interrupted; ")
    assert done.err.count("\n") == 1 and os.listdir(tmp_path) == [".out.partial"]
    done = canopyq("quantize", str(model), "--recipe", "w4a16-g64", "--out", str(tmp_path / "out"), "--json")
    assert done.code == 0 and os.listdir(tmp_path) == ["out"]


def test_killed_at_random_moments(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 until it gets through: the result is the same byte for byte, and before that there is none."""
    out, moments, killed = tmp_path / "out", random.Random(0), 0
    fork = multiprocessing.get_context("fork")
    for attempt in range(40):
        started = fork.Event()
        child = fork.Process(target=_quantize_slowly, args=(model, out, started))
        child.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.3 + 0.1 * attempt))  # on a busy machine the first file alone takes longer
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        killed += 1
        if out.exists():
            break
    else:
        raise AssertionError("no run ever got through")
    assert killed >= 2, "it was never interrupted"
    assert content(out) == whole


def _quantize_slowly(model: Path, out: Path, started) -> None:
    torch.set_num_threads(1)  # OpenMP's other threads do not live on in a forked process, which would wait for them
    real = stream._do

    def slowly(*arguments) -> None:
        started.set()
        time.sleep(0.03)
        real(*arguments)

    stream._do = slowly
    stream.Work.become = lambda self, real=stream.Work.become: (started.set(), real(self))
    quantize_checkpoint(model, "w4a16-g64", out, **SMALL_FILES)


@pytest.fixture
def interrupted(own: Path, tmp_path: Path, monkeypatch) -> Path:
    """Where a run that was stopped half-way left its work."""
    with monkeypatch.context() as patched:
        patched.setattr(output, "write", failing_after(60, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(own, "w4a16-g64", tmp_path / "out", **SMALL_FILES)
    return tmp_path / ".out.partial"


@pytest.mark.parametrize("what", ["recipe", "source", "config", "files", "version", "manifest"])
def test_on_other_terms_it_starts_over(what: str, interrupted: Path, own: Path, tmp_path: Path, monkeypatch) -> None:
    recipe, said = "w4a16-g64", []
    reason = {"config": "source", "files": "list of files"}.get(what, what)
    if what == "recipe":
        recipe = "w4a16-g64-asym"
    elif what == "source":
        os.utime(Checkpoint(own).files[1], ns=(1, 1))
    elif what == "config":
        reconfigure(own, rms_norm_eps=1e-3)
    elif what == "version":
        monkeypatch.setattr(cq, "__version__", "9.9")
    elif what == "manifest":
        (interrupted / "manifest.json").write_text("{")
    options = {"shard_bytes": 90_000} if what == "files" else SMALL_FILES
    done = quantize_checkpoint(own, recipe, tmp_path / "out", say=said.append, **options)
    assert done.resumed == 0 and "starting over" in said[-1] and reason in said[-1]
    quantize_checkpoint(own, recipe, tmp_path / "afresh", **options)
    assert content(tmp_path / "out") == content(tmp_path / "afresh")


def test_a_finished_file_that_was_cut_is_made_again(
    interrupted: Path, own: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first = sorted((interrupted / "model").iterdir())[0]
    os.truncate(first, 1000)
    quantize_checkpoint(own, "w4a16-g64", tmp_path / "out", **SMALL_FILES)
    assert content(tmp_path / "out") == whole


def test_other_things_where_the_work_goes_are_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "diary").write_text("mine")
    with pytest.raises(CanopyError, match="it holds other things; move it away"):
        quantize_checkpoint(model, "w4a16-g64", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "diary").read_text() == "mine"


def test_two_at_a_time_are_refused(interrupted: Path, own: Path, tmp_path: Path) -> None:
    with open(interrupted / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CanopyError, match="another process is writing"):
            quantize_checkpoint(own, "w4a16-g64", tmp_path / "out", **SMALL_FILES)
    assert len(list((interrupted / "model").iterdir())) > 3


def test_a_source_that_changes_meanwhile(own: Path, tmp_path: Path, monkeypatch) -> None:
    real = stream._do
    monkeypatch.setattr(stream, "_do", lambda *a: (real(*a), os.utime(Checkpoint(own).files[0], ns=(1, 1))))
    with pytest.raises(CanopyError, match="was changed while it was read"):
        quantize_checkpoint(own, "w4a16-g64", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much of a process was resident at most")
def test_memory_is_that_of_one_layer() -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 3, "vocab_size": 24000}
    found = measure(files=1, **sizes, num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False)
    largest = 2 * 24000 * 1024
    added = found["peak_bytes"] - found["import_bytes"]
    assert found["source_bytes"] > 3 * largest
    assert added < 2 * largest and added < found["expected_bytes"], found


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def canopyq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """`canopyq …` in this process."""
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # a slow machine shows progress where a fast one shows none
    ended = namedtuple("Ended", "code out err")

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["canopyq", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return ended(exit.value.code or 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["quantize", "some/model"], "cannot be reached"),
        (["quantize", "./nowhere"], "is no folder"),
        (["quantize", "tutor", "--recipe", "w44a16"], "unknown recipe 'w44a16'"),
        (["quantize", "weights.bin"], "weights.bin is a pickle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_commands_mistakes(arguments: list[str], part: str, canopyq, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = canopyq(*arguments, "--out", "out")
    assert done.code == 2 and part in done.err and done.err.count("\n") == 1 and os.listdir(tmp_path) == []


def test_the_tutor_may_be_another_model(model: Path, canopyq, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, str(model))
    done = canopyq("quantize", "tutor", "--recipe", "w4a16-g64", "--out", str(tmp_path / "out"))
    assert done.code == 0 and "21 weights" in done.out and done.out.endswith(f"written to {tmp_path / 'out'}\n")
    monkeypatch.setenv(loading.VARIABLE, "some/model")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "unset CANOPYQ_MODEL" in canopyq("quantize", "tutor", "--out", str(tmp_path / "two")).err
